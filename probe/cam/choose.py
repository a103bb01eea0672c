"""Which layer to explain when the user names none."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from probe.cam import layout as layouts
from probe.cam import targets
from probe.cam.layout import AmbiguousLayout, Layout
from probe.cam.run import Run
from probe.cam.spot import pick
from probe.capture import Layer
from probe.hooks import hookable, on_output

_MOST = 6
_POOLING = re.compile(r"pool(ing)?(\dd)?(same)?$")  # nn.MaxPool2d, timm's AvgPool2dSame, but not a PoolFormer's layers


@dataclass(eq=False)
class _Row:
    """A layer in the order in which layers finish, and the shape of what it returned."""

    layer: Layer
    shape: tuple[int, ...]
    pooled: bool  # a pooling, or a container that ends in one

    @property
    def type(self) -> str:
        return type(self.layer.module).__name__.lower()


def candidates(run: Run) -> list[str]:
    """Names of layers worth explaining, the best first.

    The last layer with space before the last pooling; where only tokens are left by then, the norm in front of the last
    attention: behind that attention, nothing flows from the patches to a class token any more.

    Raises:
        ValueError: no layer has space.
    """
    rows: list[_Row] = []
    pooled: Tensor | None = None

    def noting(layer: Layer) -> Callable[[], Any]:
        pools = _POOLING.search(type(layer.module).__name__.lower()) is not None

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal pooled
            try:
                _, tensor = pick(output, None, run.batch)
            except ValueError:
                return
            pooled = tensor if pools else pooled
            if run.batch in tensor.shape[: 2 if tensor.dim() == 3 else 1]:  # else regions of interest, windows, ...
                rows.append(_Row(layer, tuple(tensor.shape), tensor is pooled))

        return functools.partial(on_output, layer.module, note)

    inner = hookable([layer for layer in run.every if layer.name])
    run.forward([], graph=False, watch=[noting(layer) for layer in inner])
    attending = [i for i, row in enumerate(rows) if "attention" in row.type or "attn" in row.type]
    attention = attending[-1] if attending else -1
    norms = _before(rows, attention) if attending else []
    calls = Counter(id(row.layer) for row in rows)
    maps = [row for row in rows if calls[id(row.layer)] == 1 and _has_space(run, row)]
    late = [row for row in maps if rows.index(row) > attention and (len(row.shape) > 3 or not attending)]
    tokens = [row for row in norms if row in maps]
    if norms and not late and not tokens:
        _layout(run, norms[0])  # says what is not clear about the tokens
    found = [row.layer.name for row in (*reversed(late), *tokens)]
    if not found:
        raise ValueError("layer=None: no layer of this model returns a map; say which one to explain, layer=...")
    return list(dict.fromkeys(found))[:_MOST]


def _before(rows: list[_Row], attention: int) -> list[_Row]:
    """The norms that finished before the attention at that index, the nearest first, none of its own."""
    name = rows[attention].layer.name
    inside = f"{name}."
    before = [row for row in rows[:attention] if not row.layer.name.startswith(inside)]
    return [row for row in reversed(before) if "norm" in row.type and len(row.shape) == 3]


def _has_space(run: Run, row: _Row) -> bool:
    """Whether a layer returned a map with more than one position that is neither pooled nor the logits themselves."""
    if row.pooled or len(row.shape) < 3:
        return False
    dims = {len(size) for tensor in run.inputs.tensors if (size := layouts.input_size(tensor, run.batch))}
    if dims and len(row.shape) != 3 and len(row.shape) - 2 not in dims:
        return False  # heads, windows
    try:
        layout = _layout(run, row)
    except AmbiguousLayout:
        return False
    return _positions(row.shape, layout) > 1 and not _is_logits(run, row.shape, layout)


def _layout(run: Run, row: _Row) -> Layout:
    """How what a layer returned is laid out.

    Raises:
        AmbiguousLayout: that is not clear.
    """
    return layouts.infer(
        row.shape,
        inputs=run.inputs.tensors,
        batch=run.batch,
        module=row.layer.module,
        model=run.model,
        name=row.layer.name,
    )


def _positions(shape: tuple[int, ...], layout: Layout) -> int:
    if layout.kind == "tokens":
        return math.prod(layout.grid)
    return math.prod(shape[2:] if layout.kind == "channels_first" else shape[1:-1])


def _is_logits(run: Run, shape: tuple[int, ...], layout: Layout) -> bool:
    """Whether it is the dense logits (segmentation) themselves, by the number of channels: no layer to choose."""
    try:
        logits: Tensor = targets.logits_of(run.output)
    except ValueError:
        return False
    return logits.dim() > 2 and layout.kind == "channels_first" and shape[1] == logits.shape[1]
