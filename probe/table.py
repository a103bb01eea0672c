"""The table of layers that ``print(p)`` shows."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from probe import sketch
from probe.calls import UNSET, Call
from probe.capture import Capture, Kind, Layer
from probe.findings import Finding
from probe.sketch import Sketch
from probe.summary import drawn as drawn_of
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


def layer_table(layers: Iterable[tuple[Layer, list[Call], bool]], findings: Iterable[Finding] = ()) -> LayerTable:
    """The table of layers, each with its calls of the last pass, and whether it was ever called.

    A layer with a finding is marked with the worst one. Reading the numbers waits for the device.
    """
    found = {each.layer: f"! {each.check}" for each in reversed(list(findings))}
    rows = [(_row(layer, calls), fired) for layer, calls, fired in layers]
    kept = (row._replace(mark="(not kept)") if fired and not row.calls else row for row, fired in rows)
    return LayerTable(row._replace(mark=found.get(row.name, row.mark)) for row in kept)


def _row(layer: Layer, calls: list[Call]) -> LayerRow:
    call = calls[-1] if calls else None
    outputs = leaves(call.output) if call is not None and call.output is not UNSET else []
    value = outputs[0][1] if outputs else None
    backwards = [each for each in call.backwards if each.grad_output] if call is not None else []
    gradients = [sketch.of(gradient) for gradient in backwards[-1].grad_output.values()] if backwards else []
    seen = None if value is None else (_form(value), sketch.of(value))
    row = _row_of(layer.name, layer.module_type.__name__, seen, gradients, len(calls))
    return row._replace(mark=f"({call.raised})") if call is not None and call.raised else row


_Form = tuple[tuple[int, ...], str]
"""Shape and dtype of a tensor."""


def _form(value: torch.Tensor) -> _Form:
    return () if value.is_nested else tuple(value.shape), str(value.dtype).removeprefix("torch.")


def _row_of(
    name: str, kind: str, seen: tuple[_Form, Sketch | None] | None, gradients: Iterable[Sketch | None], calls: int
) -> LayerRow:
    norms = [gradient.norm for gradient in gradients if gradient is not None]
    norm = math.hypot(*norms) if norms else None
    row = LayerRow(name, kind, None, "", None, None, None, None, norm, calls, "")
    (shape, dtype), drawn = seen or ((None, ""), None)
    row = row._replace(shape=shape, dtype=dtype)
    if drawn is not None:
        row = row._replace(
            mean=drawn.mean,
            std=drawn.std,
            zeros=drawn.zeros / drawn.count if drawn.count else None,
            nonfinite=drawn.nan + drawn.posinf + drawn.neginf,
        )
    return row._replace(mark=_mark(row))


class LastSeen:
    """A summary that yields nothing, and remembers of each layer what its row of the table says.

    So a probe that logs and keeps no values has a table too, of each layer's last observed call. It holds sketches, on
    the layers' devices.
    """

    kinds = Kind.OUTPUT | Kind.GRAD_OUTPUT

    def __init__(self) -> None:
        self.steps: set[int] = set()
        self.gradients: dict[str, dict[str, Sketch | None]] = {}
        self._outputs: dict[str, tuple[_Form, Sketch | None]] = {}
        self._places: dict[str, tuple[int, int]] = {}

    def __call__(self, c: Capture) -> tuple[()]:
        place = (c.step, c.call)
        if c.kind is Kind.OUTPUT:
            self.steps.add(c.step)
            if self._places.get(c.name) != place:  # of several outputs the first
                self._places[c.name] = place
                self._outputs[c.name] = _form(c.value), drawn_of(c)
        elif c.kind is Kind.GRAD_OUTPUT and self._places.get(c.name, place) == place:
            if c.path in (of_layer := self.gradients.setdefault(c.name, {})):
                of_layer.clear()  # it is of an earlier backward
            of_layer[c.path] = drawn_of(c)
        return ()

    def table(self, layers: Iterable[tuple[str, str]]) -> LayerTable:
        """The table of these layers, given as names and types. Reading the numbers waits for the device."""
        calls = {name: call + 1 for name, (_, call) in self._places.items()}
        return LayerTable(
            _row_of(name, kind, self._outputs.get(name), self.gradients.get(name, {}).values(), calls.get(name, 0))
            for name, kind in layers
        )


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
