"""What is explained: from a model's output to one score a sample.

A target is an int, a list or tensor of ints, None (each sample's top class), or any function of the whole batch's
output that returns ``[B]`` scores or a scalar. The functions here make the usual ones:
``target=cam.targets.segmentation(3)``.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe import tree

Score = Callable[[Any], Tensor]
"""From the whole batch's output to ``[B]`` scores, or to a scalar."""


@dataclass(frozen=True)
class Classes:
    """The score of one class a sample; the class is looked up in logits ``[B, K]`` or ``[B, K, *positions]``.

    Dense logits are summed over their positions. Calling it needs the batch it was made for; `of` takes any rows.
    """

    index: Tensor

    def __call__(self, output: Any) -> Tensor:
        scores = class_scores(output, len(self.index))
        return scores.gather(1, self.index.to(scores.device).unsqueeze(1)).squeeze(1)

    def of(self, output: Any, samples: Tensor, probability: bool = False) -> Tensor:
        """Scores of rows that belong to `samples`: ``[len(samples)]``."""
        scores = class_scores(output, len(samples))
        if probability:
            scores = scores.float().softmax(1)
        index = self.index.to(scores.device)[samples.to(scores.device)]
        return scores.gather(1, index[:, None])[:, 0]


def resolve(target: Any, output: Any, batch: int) -> Score:
    """The score that `target` means, for a model that returned `output` for `batch` samples.

    Raises:
        TypeError: `target` is nothing that can be one.
        ValueError: the number of targets is not the batch size, or the output holds no logits.
        IndexError: a class that the output does not have.
    """
    if callable(target):
        return target  # type: ignore[no-any-return]
    scores = class_scores(output, batch).detach()
    classes = scores.shape[1]
    if target is None:
        return Classes(scores.argmax(1))
    index = _index(target)
    if isinstance(index, int):
        index = [index] * batch
    if len(index) != batch:
        raise ValueError(
            f"{len(index)} targets for a batch of {batch}: give one class a sample, or a single int for all of them"
        )
    wrong = next((each for each in index if not 0 <= each < classes), None)
    if wrong is not None:
        raise IndexError(f"target class {wrong} is out of range: the output has classes 0 to {classes - 1}")
    return Classes(torch.tensor(index, dtype=torch.long, device=scores.device))


def _index(target: Any) -> int | list[int]:
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool or target.dim() > 1:
            raise TypeError(
                "a tensor of targets holds one integer class a sample, "
                f"not {target.dtype} of shape {tuple(target.shape)}"
            )
        return target.tolist()
    if isinstance(target, numbers.Integral) and not isinstance(target, bool):
        return int(target)
    if hasattr(target, "tolist") or isinstance(target, (list, tuple, range)):
        items = target.tolist() if hasattr(target, "tolist") else list(target)
        return _ints(items) if isinstance(items, list) else _index(items)
    raise TypeError(f"a target is an int, a list or tensor of ints, None or a function, not {target!r}")


def _ints(items: list[Any]) -> list[int]:
    for item in items:
        whole = isinstance(item, numbers.Integral) or (isinstance(item, Tensor) and item.dim() == 0)
        if not whole or isinstance(item, bool) or (isinstance(item, Tensor) and item.is_floating_point()):
            raise TypeError(f"a list of targets holds one integer class a sample, not {item!r}")
    return [int(item) for item in items]


def logits_of(output: Any) -> Tensor:
    """The tensor of class scores in a model's output.

    The output itself; else its entry or attribute ``logits`` (Hugging Face) or ``out`` (torchvision's segmentation);
    else its first floating point tensor.

    Raises:
        ValueError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    found = [(path, tensor) for path, tensor in tree.leaves(output) if tensor.is_floating_point()]
    for name in (".logits", ".out"):
        for path, tensor in found:
            if path == name:
                return tensor
    if not found or isinstance(output, list):
        raise ValueError(
            f"the output ({type(output).__name__}) holds no logits: give target= a function of it that returns one "
            "score a sample (cam.targets has some, for boxes, masks and embeddings)"
        )
    return found[0][1]


def class_scores(output: Any, batch: int) -> Tensor:
    """Scores ``[B, K]``: the logits, summed over any positions they have.

    Raises:
        ValueError: the logits do not belong to a batch of that size.
    """
    logits = logits_of(output)
    if logits.dim() == 0 or (logits.dim() == 1 and len(logits) != batch and batch == 1):
        logits = logits.reshape(1, -1)
    elif logits.dim() == 1:
        logits = logits[:, None]
    if len(logits) != batch or logits.shape[1] == 0:
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)} for a batch of {batch}: give target= a function of the "
            "output that returns one score a sample"
        )
    return logits.flatten(2).sum(2) if logits.dim() > 2 else logits


def probability(index: Any = None) -> Score:
    """Softmax probability of a class instead of its logit. Gradients vanish where the model is certain."""

    def score(output: Any) -> Tensor:
        scores = class_scores(output, _batch(output))
        classes = resolve(index, scores, len(scores))
        return classes(scores.float().softmax(1))

    return score


def residual_softmax(index: Any = None) -> Score:
    """ReST: y_c + log p_c, logit and log-probability together.

    Cai, "CAMs as Shapley Value-based Explainers" (arXiv:2501.06261): neither blind to the other classes, as the logit
    is, nor vanishing, as the probability is; and curved, which `shapley_cam` needs.
    """

    def score(output: Any) -> Tensor:
        scores = class_scores(output, _batch(output))
        classes = resolve(index, scores, len(scores))
        return classes(scores + scores.float().log_softmax(1))

    return score


def contrast(index: Any = None, *, alpha: float = 0.6, similar: int = 3) -> Score:
    """What sets a class apart: y_c - alpha · mean of the `similar` classes with the nearest logits (Finer-CAM)."""

    def score(output: Any) -> Tensor:
        scores = class_scores(output, _batch(output))
        classes = resolve(index, scores, len(scores))
        assert isinstance(classes, Classes), "the index of a contrast is a class, not a function"
        return contrast_score(scores, classes.index, alpha, similar)

    return score


def contrast_score(logits: Tensor, index: Tensor, alpha: float, similar: int) -> Tensor:
    """y_c - alpha · mean of the `similar` nearest other logits: ``[B]`` of logits ``[B, K]`` and classes ``[B]``.

    Raises:
        ValueError: there is no other class, or `similar` is not positive.
    """
    if similar < 1 or logits.shape[1] < 2:
        raise ValueError(f"nothing to compare with: {logits.shape[1]} classes, similar={similar}")
    own = logits.gather(1, index[:, None])
    distance = (logits - own).detach().abs().scatter(1, index[:, None], torch.inf)
    nearest = distance.topk(min(similar, logits.shape[1] - 1), dim=1, largest=False).indices
    return own[:, 0] - alpha * logits.gather(1, nearest).mean(1)


def segmentation(index: int, mask: Tensor | None = None) -> Score:
    """Logits of class `index` summed over a mask, for outputs ``[B, K, *spatial]`` (or a dict that holds them).

    Arguments:
        index: the class.
        mask: bool or weights, ``[*spatial]`` for all samples or ``[B, *spatial]``; by default where the model predicts
            the class.

    Raises (when called):
        ValueError: the mask's size is not the output's, or no position is predicted as the class.
        IndexError: no such class.
    """

    def score(output: Any) -> Tensor:
        logits = logits_of(output)
        if logits.dim() < 3:
            raise ValueError(f"segmentation needs logits [B, K, *spatial], not {tuple(logits.shape)}")
        if not 0 <= index < logits.shape[1]:
            raise IndexError(f"class {index} is out of range: the output has classes 0 to {logits.shape[1] - 1}")
        chosen = (logits.argmax(1) == index) if mask is None else mask.to(logits.device)
        if tuple(chosen.shape[-(logits.dim() - 2) :]) != tuple(logits.shape[2:]):
            raise ValueError(
                f"the mask has shape {tuple(chosen.shape)}, the output {tuple(logits.shape)}: resize the mask"
            )
        if mask is None and not bool(chosen.flatten(1).any(1).all()):
            raise ValueError(
                f"no position is predicted as class {index} in some sample: pass mask= to say where to look"
            )
        return (logits[:, index] * chosen.to(logits.dtype)).flatten(1).sum(1)

    return score


def detection(boxes: Sequence[Tensor], labels: Sequence[Tensor], *, iou_threshold: float = 0.5) -> Score:
    """How surely a detector finds given boxes again: Σ over boxes of IoU + score of the best match with that label.

    For outputs like torchvision's, one dict ``boxes, labels, scores`` a sample.

    Arguments:
        boxes: for each sample ``[N, 4]`` as x1, y1, x2, y2.
        labels: for each sample ``[N]``.
        iou_threshold: matches that overlap less count 0.
    """
    if len(boxes) != len(labels):
        raise ValueError(f"detection needs boxes and labels for each sample, not {len(boxes)} and {len(labels)}")

    def score(output: Any) -> Tensor:
        if len(output) != len(boxes):
            raise ValueError(f"boxes for {len(boxes)} samples, detections for {len(output)}")
        return torch.stack([_refound(*each, iou_threshold) for each in zip(output, boxes, labels, strict=True)])

    return score


def _refound(found: Any, boxes: Tensor, labels: Tensor, threshold: float) -> Tensor:
    wanted = boxes.to(found["boxes"])
    total: Tensor = found["boxes"].sum() * 0 + found["scores"].sum() * 0  # keeps the graph when nothing matches
    if len(wanted) == 0 or len(found["boxes"]) == 0:
        return total
    overlap = _iou(wanted, found["boxes"])
    same = labels.to(found["labels"])[:, None] == found["labels"][None]
    best, match = overlap.masked_fill(~same, -1).max(1)
    matched: Tensor = ((best + found["scores"][match]) * (best > threshold)).sum()
    return total + matched


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes ``[N, 4]`` and ``[M, 4]``: ``[N, M]``."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    common: Tensor = (high - low).clamp_min(0).prod(2)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    return common / (area_a[:, None] + area_b[None] - common).clamp_min(torch.finfo(common.dtype).tiny)


def similarity(reference: Tensor) -> Score:
    """Cosine similarity of the output embedding ``[B, D]`` to a reference ``[D]`` or ``[B, D]``."""

    def score(output: Any) -> Tensor:
        embedding = logits_of(output).flatten(1)
        other = (
            reference.to(embedding).expand_as(embedding) if reference.dim() == 1 else reference.to(embedding).flatten(1)
        )
        return torch.cosine_similarity(embedding, other, dim=1)

    return score


def _batch(output: Any) -> int:
    logits = logits_of(output)
    return len(logits) if logits.dim() else 1
