"""Faithfulness: does the map show what the model uses? No map should be believed without such numbers.

Every function takes raw maps ``[B, *spatial]``, enlarges them to the input, and returns numbers for each sample. The
score is the class's softmax probability, as in the papers, or whatever a target function returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probe.cam.explain import Target
from probe.cam.fill import baseline_of, impute
from probe.cam.methods.arithmetic import resize
from probe.cam.perturb import score_rows
from probe.cam.picture import unit
from probe.cam.run import Run
from probe.cam.state import untouched, warn_if_training
from probe.cam.targets import Classes


@dataclass(frozen=True)
class Curve:
    """The score while more and more of the image goes or comes.

    Attributes:
        share: of the pixels changed, from 0 to 1, ``[steps + 1]``.
        score: ``[B, steps + 1]``.
    """

    share: Tensor
    score: Tensor

    @property
    def area(self) -> Tensor:
        """Area under each curve, ``[B]``: low is good for deletion, high for insertion."""
        return torch.trapezoid(self.score, self.share.to(self.score), dim=1)


def deletion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    steps: int = 32,
    baseline: float | str | Tensor = 0.0,
    batch_size: int = 32,
) -> Curve:
    """Deletion: the score while the most important pixels are taken away first. A faithful map makes it drop early.

    Petsiuk et al., "RISE", BMVC 2018 (arXiv:1806.07421).

    Arguments:
        model: the model; it takes the images alone.
        images: ``[B, C, *size]``.
        maps: raw, ``[B, *spatial]``.
        target: as for `explain`.
        steps: points of the curve, beside the one at 0.
        baseline: what a pixel becomes: a number in the model's input space, ``"blur"``, or a tensor like the images.
        batch_size: rows in one forward.
    """
    return _curve(model, images, maps, target, steps, baseline, batch_size, insert=False)


def insertion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    steps: int = 32,
    baseline: float | str | Tensor = "blur",
    batch_size: int = 32,
) -> Curve:
    """Insertion: the score while the most important pixels come back first, from a blurred image. High is good.

    The arguments are those of `deletion`.
    """
    return _curve(model, images, maps, target, steps, baseline, batch_size, insert=True)


def _curve(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target,
    steps: int,
    baseline: float | str | Tensor,
    batch_size: int,
    insert: bool,
) -> Curve:
    if steps < 1:
        raise ValueError(f"a curve needs at least one step, not {steps}")
    order = ranks(maps, images)
    pixels = order[0].numel()
    empty = baseline_of(images, baseline)
    share = torch.linspace(0, 1, steps + 1)

    def perturbed(rows: slice) -> Tensor:
        thresholds = (share[rows] * pixels).round().to(images.device)
        important = order[:, None] < thresholds.view(1, -1, *[1] * (order.dim() - 1))
        keep = important if insert else ~important
        return torch.where(keep.unsqueeze(2), images[:, None], empty[:, None])

    return Curve(share, _scores(model, images, target, perturbed, steps + 1, batch_size, "curves run"))


def ranks(maps: Tensor, images: Tensor) -> Tensor:
    """Each pixel's rank in importance, ``[B, *size]``: 0 is the most important."""
    large = _enlarged(maps, images).flatten(1)
    order = large.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(large.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(len(large), *images.shape[2:])


def average_drop(
    model: nn.Module, images: Tensor, maps: Tensor, target: Target = None, *, batch_size: int = 32
) -> Tensor:
    """Average drop: how much of the score is lost when only what the map shows is left, max(0, y - o) / y.

    Chattopadhay et al., "Grad-CAM++" (arXiv:1710.11063): o is the score of the image times its map (negative parts cut,
    maximum 1). Low is good; a map that shows everything is perfect by it, so look at `insertion` too.

    Returns:
        ``[B]``, as shares; their mean is the metric.
    """
    before, after = _confidence(model, images, maps, target, batch_size)
    return (before - after).clamp_min(0) / before.clamp_min(torch.finfo(before.dtype).tiny)


def increase_in_confidence(
    model: nn.Module, images: Tensor, maps: Tensor, target: Target = None, *, batch_size: int = 32
) -> Tensor:
    """Increase in confidence: whether the score rises when only what the map shows is left. See `average_drop`.

    Returns:
        bool ``[B]``; the share of True is the metric.
    """
    before, after = _confidence(model, images, maps, target, batch_size)
    return after > before


def _confidence(
    model: nn.Module, images: Tensor, maps: Tensor, target: Target, batch_size: int
) -> tuple[Tensor, Tensor]:
    shown = images * unit(_enlarged(maps, images)).unsqueeze(1).to(images.dtype)

    def rows(chosen: slice) -> Tensor:
        return torch.stack([images, shown], 1)[:, chosen]

    scores = _scores(model, images, target, rows, 2, batch_size, "confidence runs")
    return scores[:, 0], scores[:, 1]


@dataclass(frozen=True)
class Road:
    """Scores of ROAD, ``[B, shares]``, with the most and with the least relevant pixels removed."""

    share: Tensor
    most: Tensor
    least: Tensor

    @property
    def score(self) -> Tensor:
        """(least - most) / 2 averaged over the shares, ``[B]``: high is good."""
        return (self.least - self.most).mean(1) / 2


def road(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    noise: float = 0.01,
    batch_size: int = 32,
) -> Road:
    """ROAD, remove and debias: pixels are removed by imputing them from their neighbours, so that the shape of the hole
    tells the model nothing.

    Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022 (arXiv:2202.00449).

    Arguments:
        model, images, maps, target, batch_size: as for `deletion`, for 2-D images.
        shares: of the pixels that are removed.
        noise: deviation of the noise on imputed pixels, which is drawn but leaves the generators as they were.
    """
    order = ranks(maps, images)
    pixels, count = order[0].numel(), len(shares)
    share = torch.tensor(shares)

    def removed(rows: slice) -> Tensor:
        chosen = []
        for row in range(rows.start, rows.stop):
            limit = round(float(share[row % count]) * pixels)
            hole = order < limit if row < count else order >= pixels - limit
            chosen.append(impute(images, hole, noise))
        return torch.stack(chosen, 1)

    scores = _scores(model, images, target, removed, 2 * count, batch_size, "ROAD runs")
    return Road(share, scores[:, :count], scores[:, count:])


def infidelity(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    samples: int = 64,
    patch: float = 0.25,
    scale: bool = True,
    batch_size: int = 32,
) -> Tensor:
    """Infidelity: how badly the map predicts what removing random squares does, E[(Σ map over the square - Δy)²].

    Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019 (arXiv:1901.09392), with square
    removal.

    Arguments:
        model, images, maps, target, batch_size: as for `deletion`.
        samples: squares; drawn at random, which leaves the generators as they were.
        patch: side of a square, as a share of the image's.
        scale: scale the map by the best factor for each sample first (maps have no unit), as the paper allows.

    Returns:
        ``[B]``, low is good; with `scale` never above the mean square of Δy.
    """
    large = _enlarged(maps, images)
    generator = torch.Generator().manual_seed(0)
    squares = torch.stack([_square(tuple(large.shape[1:]), patch, generator) for _ in range(samples)]).to(images.device)

    def removed(rows: slice) -> Tensor:
        keep = torch.cat([torch.ones_like(squares[:1]), 1 - squares])[rows]
        return images[:, None] * keep[None, :, None].to(images.dtype)

    scores = _scores(model, images, target, removed, samples + 1, batch_size, "infidelity runs")
    drop = scores[:, :1] - scores[:, 1:]
    predicted = large.flatten(1) @ squares.flatten(1).T.to(large)
    if scale:
        square = predicted.square().mean(1, keepdim=True)
        predicted = predicted * (predicted * drop).mean(1, keepdim=True) / square.masked_fill(square == 0, 1)
    return (predicted - drop).square().mean(1)


def sensitivity(
    explainer: Callable[[Tensor], Tensor], images: Tensor, *, radius: float = 0.02, samples: int = 10
) -> Tensor:
    """Max-sensitivity: how much the map can change, max |Φ(x') - Φ(x)| / |Φ(x)|, while the image hardly does.

    Yeh et al. (see `infidelity`). The maximum is over random x' within `radius` of x in every pixel.

    Arguments:
        explainer: images to maps, as ``lambda images: cam.explain(model, images, layer="layer4", target=3)``.
        images: ``[B, C, *size]``.
        radius: in units of the input.
        samples: how many x'; drawn from a generator of their own.

    Returns:
        ``[B]``, low is good.
    """
    maps = explainer(images).flatten(1)
    generator = torch.Generator().manual_seed(0)
    norm = maps.norm(dim=1)
    worst = torch.zeros_like(norm)
    for _ in range(samples):
        shift = (torch.rand(images.shape, generator=generator) * 2 - 1).to(images) * radius
        change = (explainer(images + shift).flatten(1) - maps).norm(dim=1)
        worst = torch.maximum(worst, change / norm.masked_fill(norm == 0, 1))
    return worst


def _scores(
    model: nn.Module,
    images: Tensor,
    target: Target,
    make: Callable[[slice], Tensor],
    count: int,
    batch_size: int,
    what: str,
) -> Tensor:
    """Scores ``[B, count]`` of changed images; ``make(slice)`` makes ``[B, len(slice), C, *size]`` of them."""
    with untouched(model, [images]):
        run = Run(model, (images,), {}, target, batch_size)
        warn_if_training(run.every, what)
        run.forward_plain()

        def output(rows: Tensor, samples: Tensor) -> Any:
            return model(rows)

        return score_rows(run, make, count, output, probability=isinstance(run.score, Classes))


def _enlarged(maps: Tensor, images: Tensor) -> Tensor:
    if len(maps) != len(images) or maps.dim() != images.dim() - 1:
        raise ValueError(f"maps {tuple(maps.shape)} don't belong to images {tuple(images.shape)}")
    return resize(maps[:, None].float(), tuple(images.shape[2:]))[:, 0].to(images.device)


def _square(size: tuple[int, ...], share: float, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(size)
    window = []
    for length in size:
        side = max(1, round(share * length))
        start = int(torch.randint(0, length - side + 1, (), generator=generator))
        window.append(slice(start, start + side))
    mask[tuple(window)] = 1
    return mask
