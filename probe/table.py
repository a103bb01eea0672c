"""The table of layers that ``print(p)`` shows."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import NamedTuple

from probe import sketch
from probe.calls import UNSET, Call
from probe.capture import Layer
from probe.tree import leaves


class LayerRow(NamedTuple):
    """One layer. Statistics are over the finite values of its first output tensor in the last call.

    `zeros` is a share (0 to 1), `nonfinite` the number of NaN and Inf, `grad_norm` the L2 norm of ``grad_output``;
    None where nothing was captured. `mark` says what a person should look at.
    """

    name: str
    type: str
    shape: tuple[int, ...] | None
    dtype: str
    mean: float | None
    std: float | None
    zeros: float | None
    nonfinite: int | None
    grad_norm: float | None
    calls: int
    mark: str


class LayerTable(list[LayerRow]):
    """Rows that print as an aligned table, and as HTML in a notebook."""

    def __str__(self) -> str:
        cells = [_HEADER, *(_cells(row) for row in self)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(_HEADER))]
        justify = [str.rjust if i in _NUMBERS else str.ljust for i in range(len(_HEADER))]
        lines = ["  ".join(j(c, w) for j, c, w in zip(justify, row, widths, strict=True)) for row in cells]
        return "\n".join(line.rstrip() for line in [lines[0], "  ".join("-" * w for w in widths), *lines[1:]])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in _HEADER)
        body = "".join(
            ("<tr style='background:#fdd'>" if row.mark.startswith("!") else "<tr>")
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row))
            + "</tr>"
            for row in self
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_HEADER = ("layer", "type", "output", "dtype", "mean", "std", "zeros", "NaN/Inf", "grad norm", "calls", "")
_NUMBERS = range(4, 10)


def layer_table(layers: Iterable[tuple[Layer, list[Call], bool]]) -> LayerTable:
    """The table of layers, each with its calls of the last pass, and whether it was ever called.

    Reading the numbers waits for the device.
    """
    rows = [(_row(layer, calls), fired) for layer, calls, fired in layers]
    return LayerTable(row._replace(mark="(not kept)") if fired and not row.calls else row for row, fired in rows)


def _row(layer: Layer, calls: list[Call]) -> LayerRow:
    call = calls[-1] if calls else None
    kind = layer.module_type.__name__
    outputs = leaves(call.output) if call is not None and call.output is not UNSET else []
    value = outputs[0][1] if outputs else None
    drawn = None if value is None else sketch.of(value)
    norm = _gradient_norm(call)
    row = LayerRow(layer.name, kind, None, "", None, None, None, None, norm, len(calls), "")
    if value is not None:
        shape = () if value.is_nested else tuple(value.shape)
        row = row._replace(shape=shape, dtype=str(value.dtype).removeprefix("torch."))
    if drawn is not None:
        row = row._replace(
            mean=drawn.mean,
            std=drawn.std,
            zeros=drawn.zeros / drawn.count if drawn.count else None,
            nonfinite=drawn.nan + drawn.posinf + drawn.neginf,
        )
    return row._replace(mark=f"({call.raised})" if call is not None and call.raised else _mark(row))


def _gradient_norm(call: Call | None) -> float | None:
    backwards = [each for each in call.backwards if each.grad_output] if call is not None else []
    if not backwards:
        return None
    norms = [drawn.norm for g in backwards[-1].grad_output.values() if (drawn := sketch.of(g)) is not None]
    return math.hypot(*norms) if norms else None


def _mark(row: LayerRow) -> str:
    if not row.calls:
        return "! not called"
    if row.nonfinite:
        return "! NaN or Inf"
    if row.zeros is not None and row.zeros > 0.95:
        return "! dead" if row.zeros == 1 else "! nearly all zero"
    if row.std == 0 and row.shape and math.prod(row.shape) > 1:
        return "! constant"
    if row.grad_norm is not None and (row.grad_norm == 0 or not math.isfinite(row.grad_norm)):
        return "! gradient is zero" if row.grad_norm == 0 else "! gradient not finite"
    return ""


def _cells(row: LayerRow) -> tuple[str, ...]:
    shape = "" if row.shape is None else "×".join(map(str, row.shape)) or "scalar"
    zeros = "" if row.zeros is None else f"{row.zeros:.1%}"
    bad = "" if row.nonfinite is None else str(row.nonfinite)
    numbers = [_number(row.mean), _number(row.std), zeros, bad, _number(row.grad_norm), str(row.calls)]
    return (row.name or '""', row.type, shape, row.dtype, *numbers, row.mark)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
