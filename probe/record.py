"""What a person reads: records of calls, the report of what is missing, what was overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from probe.calls import UNSET, Backward, Call, Pass
from probe.capture import Kind, Layer
from probe.observers import Seen, seen
from probe.reasons import why_no_gradient
from probe.select import NoSuchLayer
from probe.tree import data_address, fill, inputs, leaves


class Reading:
    """Why a layer has nothing to show, in words; one a probe.

    Arguments:
        kinds: what the probe was asked to keep.
        keep: how many passes it keeps.
        why_never: the reason why a layer was never called.
    """

    def __init__(self, kinds: Kind, keep: int, why_never: Any) -> None:
        self.kinds = kinds
        self.keep = keep
        self.why_never = why_never

    def check_kept(self, what: str) -> None:
        if not self.keep:
            raise AttributeError(
                f"this probe keeps no values (keep=0, the default with observers and logs); to read {what} create it "
                "with Probe(..., keep=1)"
            )

    def check(self, layer: Layer, kind: Kind, field: str) -> None:
        self.check_kept(f"{field} of {layer.name!r}")
        if kind not in self.kinds:
            have = " | ".join(f"Kind.{member.name}" for member in self.kinds)
            raise AttributeError(
                f"{field} of {layer.name!r} was not asked for: this probe captures {have}; "
                f"create it with kinds={have} | Kind.{kind.name}"
            )


class BackwardRecord:
    """The gradients that one backward pass brought to one call, shaped like its output and its input.

    Attributes: ``grad_output``, ``grad_input`` (as ``input``), ``grad_kwargs`` (by name).
    """

    def __init__(self, call: Call, backward: Backward) -> None:
        self._call = call
        self._backward = backward

    @property
    def grad_output(self) -> Any:
        return fill(self._call.shape_out, self._backward.grad_output)

    @property
    def grad_input(self) -> Any:
        return fill(self._call.shape_in, self._backward.grad_input)

    @property
    def grad_kwargs(self) -> Any:
        alone = self._call.shape_kwargs is self._call.shape_in
        return fill(self._call.shape_kwargs, self._backward.grad_input, "" if alone else "kwargs")


class Record:
    """One layer's call: what went in, what came out, and the gradients at both.

    Values have the structure that the module took or returned, detached, in their own dtype and on their own device.
    A value that is not there raises an AttributeError which says why. Reading a record of a layer that was called
    several times shows the last call; ``calls`` has all of the pass, in order.
    """

    def __init__(self, layer: Layer, calls: list[Call], index: int, reading: Reading) -> None:
        self._layer = layer
        self._calls = calls
        self._index = index
        self._reading = reading

    @property
    def name(self) -> str:
        """The layer's name."""
        return self._layer.name

    @property
    def module_type(self) -> type:
        """The class of the module."""
        return type(self._layer.module)

    @property
    def calls(self) -> list[Record]:
        """A record for every call of the last pass that contains the layer, in the order they began; empty if none.

        Where only outputs are captured, calls of a module that calls itself are in the order they returned.
        """
        return [Record(self._layer, self._calls, i, self._reading) for i in range(len(self._calls))]

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""
        value: tuple[Any, ...] = self._get(Kind.INPUT, "args")
        return value

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments."""
        value: dict[str, Any] = self._get(Kind.INPUT, "kwargs")
        return value

    @property
    def input(self) -> Any:
        """The sole argument, the tuple of positional ones, or the dict of keywords where there are only those."""
        return inputs(self._get(Kind.INPUT, "args", "input"), self._get(Kind.INPUT, "kwargs", "input"))

    @property
    def output(self) -> Any:
        """What the module returned."""
        return self._get(Kind.OUTPUT, "output")

    @property
    def grad_output(self) -> Any:
        """Gradient of the loss at the output, of the last backward pass; None for tensors that have none."""
        return self._gradient(Kind.GRAD_OUTPUT, "grad_output")

    @property
    def grad_input(self) -> Any:
        """Gradient at the input, this module's share of it, of the last backward pass; None for tensors without."""
        return self._gradient(Kind.GRAD_INPUT, "grad_input")

    @property
    def grad_kwargs(self) -> dict[str, Any]:
        """Gradients at the keyword arguments, by name."""
        value: dict[str, Any] = self._gradient(Kind.GRAD_INPUT, "grad_kwargs")
        return value

    @property
    def backwards(self) -> list[BackwardRecord]:
        """What every backward pass through this call brought, the first one first."""
        call = self._call("backwards")
        return [BackwardRecord(call, each) for each in call.backwards]

    def _call(self, field: str) -> Call:
        if not self._calls:
            raise AttributeError(f"there is no {field} of {self.name!r}: {self._reading.why_never(self._layer)}")
        return self._calls[self._index]

    def _get(self, kind: Kind, field: str, shown: str = "") -> Any:
        self._reading.check(self._layer, kind, shown or field)
        call = self._call(shown or field)
        value = getattr(call, field)
        if value is UNSET:
            why = call.raised or "its forward has not returned yet"
            raise AttributeError(f"there is no {shown or field} of {self.name!r}: {why}")
        return value

    def _gradient(self, kind: Kind, field: str) -> Any:
        self._reading.check(self._layer, kind, field)
        call = self._call(field)
        side = "grad_output" if kind is Kind.GRAD_OUTPUT else "grad_input"
        with_values = [each for each in call.backwards if getattr(each, side)]
        if not with_values:
            reason = why_no_gradient(call, kind)
            if reason:
                raise AttributeError(f"there is no {field} of {self.name!r}: {reason}")
        shape = {"grad_output": call.shape_out, "grad_input": call.shape_in}.get(field, call.shape_kwargs)
        if shape is UNSET:
            why = call.raised or "its forward has not returned yet"
            raise AttributeError(f"there is no {field} of {self.name!r}: {why}")
        return getattr(BackwardRecord(call, with_values[-1] if with_values else Backward(-1)), field)

    def __repr__(self) -> str:
        if not self._calls:
            return f"<Record {self.name!r} ({self.module_type.__name__}), not called>"
        what = [f for f in ("args", "output") if getattr(self._calls[self._index], f) is not UNSET]
        what += ["gradients"] if self._calls[self._index].backwards else []
        call = f"call {self._index} of {len(self._calls)}"
        return f"<Record {self.name!r} ({self.module_type.__name__}), {call}: {', '.join(what) or 'nothing kept'}>"


class Values(Mapping[str, Any]):
    """``name -> value`` of the layers that have one; any other name is a KeyError that says why.

    Arguments:
        names: of the layers to look at.
        read: the value of a layer; raises KeyError or AttributeError where there is none.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Any]) -> None:
        self._read = read
        self._found = {name: value for name in names if (value := self._try(name)) is not None}

    def _try(self, name: str) -> Any:
        try:
            value = self._read(name)
        except AttributeError:
            return None
        return value if leaves(value) else None

    def __getitem__(self, name: str) -> Any:
        if name in self._found:
            return self._found[name]
        try:
            value = self._read(name)  # an alias
        except AttributeError as error:
            raise NoSuchLayer(str(error)) from None
        if not leaves(value):
            raise NoSuchLayer(f"layer {name!r} was called, but there is no tensor to show")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return f"<{len(self)} values: {', '.join(self)}>"


class PassRecords:
    """The records of one kept pass, by layer name: ``p.passes[-2]["fc"].output``."""

    def __init__(self, pass_: Pass, layer: Callable[[str], Layer], reading: Reading) -> None:
        self._pass = pass_
        self._layer = layer
        self._reading = reading

    def __getitem__(self, name: str) -> Record:
        layer = self._layer(name)
        calls = self._pass.calls.get(layer, [])
        return Record(layer, calls, len(calls) - 1, self._reading)

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in list(self._pass.calls))

    def __repr__(self) -> str:
        return f"<pass at step {self._pass.info.step}: {', '.join(name or repr(name) for name in self)}>"


class Row(NamedTuple):
    """One row of `Report`."""

    name: str
    reason: str


class OverwrittenRow(NamedTuple):
    """One row of what was overwritten after it was captured.

    `name` is the layer whose output it was; `by` the module that wrote, or where an operation between modules did;
    `share` the share of elements (0 to 1) that differ from what the layer returned.
    """

    name: str
    by: str | None
    share: float | None


class Table(list[Any]):
    """A list of rows that prints as an aligned table."""

    def __init__(self, rows: Iterable[Any], header: tuple[str, ...], empty: str) -> None:
        super().__init__(rows)
        self._header = header
        self._empty = empty

    def __repr__(self) -> str:
        if not self:
            return self._empty
        cells = [self._header, *(tuple(_cell(value) for value in row) for row in self)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self._header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}"
    return "" if value is None else value if value else '""'


def overwritten(pass_: Pass) -> list[OverwrittenRow]:
    """Which outputs of a pass were written to after they were captured, by whom, and how much of them."""
    events = seen(pass_)
    rows: dict[str, OverwrittenRow] = {}
    for position, event in enumerate(events):
        share = _share(event) if event.kind is Kind.OUTPUT else 0.0
        name = event.call.layer.name
        if share and (name not in rows or (rows[name].share or 0.0) < share):
            rows[name] = OverwrittenRow(name, _writer(event, events[position + 1 :]), share)
    return list(rows.values())


def _share(seen: Seen) -> float:
    """The share of elements that the tensor's own memory no longer holds as they were captured."""
    kept, storage = seen.kept, seen.storage
    if storage is None or kept.numel() == 0 or kept.layout != torch.strided or kept.device.type == "meta":
        return 0.0
    stride, offset = seen.geometry or (kept.stride(), kept.storage_offset())
    reach = offset + 1 + sum((size - 1) * step for size, step in zip(kept.shape, stride, strict=True))
    if reach * kept.element_size() > storage.nbytes():
        return 0.0  # freed or shrunk since; a tensor set on it would make it grow again
    with torch.no_grad(), torch.inference_mode(False):
        now = torch.empty(0, dtype=kept.dtype, device=kept.device).set_(storage, offset, kept.shape, stride)
        if data_address(now) == data_address(kept):
            return 0.0  # still one memory: nobody wrote
        return float(_differ(kept, now).double().mean())


def _differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.is_quantized:
        a, b = a.dequantize(), b.dequantize()
    return (a != b) & ~((a != a) & (b != b))  # NaN that stayed NaN is no change


def _writer(seen: Seen, later: list[Seen]) -> str | None:
    """Who wrote to a captured output: the first module that met the memory with other values in it tells."""
    entered: set[int] = set()  # calls that met the memory unchanged on their way in
    for each in later:
        if each.storage is None or seen.storage is None or each.storage._cdata != seen.storage._cdata:
            continue
        if each.kept.shape != seen.kept.shape or each.kept.dtype != seen.kept.dtype:
            continue
        name = each.call.layer.name
        if not bool(_differ(seen.kept, each.kept).any()):
            if each.kind is Kind.INPUT:
                entered.add(id(each.call))
        elif each.kind is Kind.INPUT:
            return f"an in-place operation before {name!r}"
        elif id(each.call) in entered or each.version - seen.version <= 1:
            return name
        else:
            return f"in-place operations before and in {name!r}"
    return None
