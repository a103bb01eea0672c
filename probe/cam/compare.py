"""Several methods side by side, and Grad-CAM as a summary of a training run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from probe import image
from probe.cam import metrics
from probe.cam.explain import LayerSpec, Method, Target, by_name, explain, fixed_layer, method_name
from probe.cam.methods.gradient import grad_cam, grad_cam_pp, hires_cam, layer_cam
from probe.cam.picture import grid, magnified, overlay
from probe.cam.run import Run
from probe.cam.state import silent, untouched
from probe.cam.targets import Classes
from probe.capture import Capture, Image, Kind

_LEAST = 64  # pixels across, below which an overlay cannot be made out


class ComparisonRow(NamedTuple):
    """One method: milliseconds for the batch, means over its samples (see `probe.cam.metrics`), or why it failed."""

    method: str
    ms: float
    deletion: float
    insertion: float
    drop: float
    increase: float
    error: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns; it prints as a table.

    Attributes:
        rows: one a method. Better is: deletion low, insertion high, drop low, increase high.
        maps: raw maps by method, ``[B, *spatial]``, without the methods that failed.
        picture: uint8 RGB ``[3, H, W]``: a row for each image, a column for each method.
    """

    rows: list[ComparisonRow]
    maps: dict[str, Tensor]
    picture: Tensor

    def __str__(self) -> str:
        header = ("method", "ms", "deletion", "insertion", "drop", "increase")
        body = [
            (row.method, *([row.error] if row.error else [f"{row.ms:.0f}", *(f"{value:.3f}" for value in row[2:6])]))
            for row in self.rows
        ]
        full = [cells for cells in (header, *body) if len(cells) == len(header)]
        widths = [max(len(cells[i]) for cells in (header, *full)) for i in range(len(header))]
        widths[0] = max(widths[0], *(len(cells[0]) for cells in body), 0)
        lines = []
        for cells in (header, *body):
            numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=False)]
            lines.append("  ".join([cells[0].ljust(widths[0]), *numbers]))
        return "\n".join(lines)


def compare(
    model: nn.Module,
    images: Tensor,
    layer: LayerSpec | None = None,
    methods: Sequence[Method] = (grad_cam, grad_cam_pp, layer_cam, hires_cam),
    *,
    target: Target = None,
    labels: Sequence[str] | None = None,
    steps: int = 16,
    batch_size: int = 32,
) -> Comparison:
    """Explain the same images by several methods: their pictures side by side, and how faithful each is.

    Arguments:
        model: takes the images alone.
        images: ``[B, 1 or 3, H, W]``, as the model wants them.
        layer, target, batch_size: as for `explain`; all methods explain the same classes.
        methods: as for `explain`. One that cannot explain this model says so in its row.
        labels: of the picture's rows.
        steps: points of the deletion and insertion curves.
    """
    if not methods:
        raise ValueError("compare needs at least one method")
    with untouched(model, [images]):
        run = Run(model, (images,), {}, target, batch_size)
        run.forward_plain()
        fixed = run.score.index if isinstance(run.score, Classes) else target
    layer = fixed_layer(model, images, layer, fixed)
    rows: list[ComparisonRow] = []
    maps: dict[str, Tensor] = {}
    for method in methods:
        name = method_name(method)
        name = name if name not in {row.method for row in rows} else f"{name} {len(rows)}"
        started = time.perf_counter()
        try:
            found = explain(model, images, layer=layer, target=fixed, method=method, batch_size=batch_size)
            float(found.sum())  # waits for the device
        except ValueError as error:
            nan = float("nan")
            rows.append(ComparisonRow(name, nan, nan, nan, nan, nan, str(error)))
            continue
        spent = 1000 * (time.perf_counter() - started)
        deleted, inserted, drop, increase = _faithfulness(model, images, found, fixed, steps, batch_size)
        rows.append(ComparisonRow(name, spent, deleted, inserted, drop, increase))
        maps[name] = found
    return Comparison(rows, maps, grid(images, maps, labels))


def _faithfulness(
    model: nn.Module, images: Tensor, maps: Tensor, target: Any, steps: int, batch_size: int
) -> list[float]:
    deleted = metrics.deletion(model, images, maps, target, steps=steps, batch_size=batch_size)
    inserted = metrics.insertion(model, images, maps, target, steps=steps, batch_size=batch_size)
    drop = metrics.average_drop(model, images, maps, target, batch_size=batch_size)
    increase = metrics.increase_in_confidence(model, images, maps, target, batch_size=batch_size)
    return [float(value.float().mean()) for value in (deleted.area, inserted.area, drop, increase)]


def grad_cam_summary(
    model: nn.Module,
    images: Tensor,
    layer: LayerSpec | None = None,
    target: Target = None,
    *,
    method: Method = grad_cam,
    colormap: str | int = "jet",
    alpha: float = 0.5,
    nrow: int = 8,
) -> Callable[[Capture], Iterable[Image]]:
    """Watch what a model looks at while it learns: ``p.log(board, cam.grad_cam_summary(model, images),
    layers="conv2")``.

    On each step that is logged, a fixed batch of images is explained by a copy of the model in eval mode, so that the
    run being observed is not disturbed. Every layer that it is logged with shows the same picture: log it with one.

    Arguments:
        model: the model that is being trained.
        images: ``[B, 1 or 3, H, W]``, on the model's device.
        layer, target, method: as for `explain`; the layer of ``layer=None`` is chosen the first time.
        colormap, alpha: as for `overlay`.
        nrow: pictures in a row.

    Returns:
        a summary that yields one `Image`, the overlays side by side, tagged with the method's name. Small images are
        enlarged.
    """
    shown = magnified(images, _LEAST)
    at = None if layer is None else by_name(model, layer)
    drawn: tuple[int, Tensor] | None = None

    def summary(capture: Capture) -> Iterator[Image]:
        nonlocal at, drawn
        if drawn is None or drawn[0] != capture.step:
            twin = copy.deepcopy(model).eval()  # without live hooks: a probe's hooks copy as inert ones
            with silent():  # an untrained model has blank maps, and the picture shows it
                at = fixed_layer(twin, images, at, target)
                maps = explain(twin, images, layer=at, target=target, method=method)
            drawn = capture.step, image.grid(overlay(shown, maps, colormap, alpha), nrow=nrow)
        yield Image(method_name(method), drawn[1])

    summary.kinds = Kind.OUTPUT  # type: ignore[attr-defined]  # all that it is to be called with
    return summary
