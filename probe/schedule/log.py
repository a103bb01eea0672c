"""`Log`: the numbers in an optimizer's param groups over time, stored compactly."""

from __future__ import annotations

import weakref
from array import array
from collections import Counter
from collections.abc import Mapping
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from probe.schedule.trace import Floats, Trace

Number = float | torch.Tensor

_BLOCK = 256  # numbers on a device that are kept one by one before they are joined to one tensor
_FIXED = {float, int, bool, str, type(None)}
_NOTHING = object()


class Log:
    """What one optimizer used, update by update. A value is stored where it changes, so that constants cost nothing."""

    def __init__(self, optimizer: Optimizer, name: str = "", start: int | None = None) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.name = name
        self.groups: list[_Group] = []
        self._events: list[str] = []
        self._asked = 0  # updates asked for, those that were skipped included
        self._skipped: list[int] = []
        self.skips: Number = 0  # how many so far
        self._found_inf = _Deferred()  # of fused optimizers: an update that they skipped in their kernel has one > 0
        self._stepping = False
        self._start: Number | None = start
        self._look(optimizer)
        # When there is a scheduler already, it moved a rate that moves before the first update. Loading a state moves
        # rates too, but makes a new list of groups.
        self._first = [group.changes.get("lr") for group in self.groups]
        self._scheduled = id(optimizer.param_groups) if hasattr(optimizer.step, "_wrapped_by_lr_sched") else None

    def before(self, optimizer: Optimizer) -> None:
        """Read the groups of `optimizer`, to be kept if the update is made."""
        self._look(optimizer)
        if self._start is None:
            self._start = updates_made(optimizer)
        if self._scheduled == id(optimizer.param_groups):
            self._tell_moved()
        self._scheduled = None
        self._stepping = True

    def after(self, optimizer: Optimizer) -> None:
        """Keep what `before` read."""
        if not self._stepping:  # the hooks were attached in the middle of a step
            return
        self._stepping = False
        for group in self.groups:
            group.commit(self._asked)
        found_inf = getattr(optimizer, "found_inf", None)  # GradScaler sets it while it steps a fused optimizer
        if isinstance(found_inf, torch.Tensor):
            self._found_inf.put(self._asked, found_inf.detach().clone())
            self.skips = self.skips + (found_inf.detach() > 0).sum()
        self._asked += 1

    def skip(self, count: int) -> None:
        """Note that the next `count` updates were asked for and not made."""
        self._skipped.extend(range(self._asked, self._asked + count))
        self._asked += count
        self.skips = self.skips + count

    def names(self) -> list[str]:
        """One name a group, no two alike."""
        return unique([group.title for group in self.groups])

    def trace(self) -> Trace:
        """The updates so far, as plain data."""
        skipped = sorted({*self._skipped, *(update for update, flag in self._found_inf.fetch() if flag > 0)})
        made = np.delete(np.arange(self._asked), skipped)
        keys = dict.fromkeys(["lr", *(key for group in self.groups for key in group.columns)])
        values = {key: np.full((len(made), len(self.groups)), np.nan) for key in keys}
        for index, group in enumerate(self.groups):
            for key, column in group.columns.items():
                values[key][:, index] = column.read(self._asked)[made]
        events = list(self._events)
        for name, group, lr in zip(self.names(), self.groups, values["lr"].T, strict=True):
            there = ~np.isnan(group.there.read(self._asked)[made])
            events += _events(name, lr, there, rated="lr" in group.columns)
        return Trace(values, tuple(self.names()), skipped, events, int(self._start or 0))

    def _look(self, optimizer: Optimizer) -> None:
        for index, group in enumerate(optimizer.param_groups):
            if index == len(self.groups):
                self.groups.append(_Group(str(group.get("name") or f"group{index}")))
            self.groups[index].look(group)
        for gone in self.groups[len(optimizer.param_groups) :]:
            gone.look({})

    def _tell_moved(self) -> None:
        why = "a scheduler was stepped before the optimizer (or the rate was set by hand)"
        if self._asked:
            why = "the GradScaler skipped the first update, and the scheduler went on"
        for name, group, first in zip(self.names(), self.groups, self._first, strict=False):
            now = group.changes.get("lr")
            if isinstance(first, float) and isinstance(now, float) and first != now:
                self._events.append(
                    f"{name}: no update used the first rate {first:.4g}, update 0 uses {now:.4g}: {why}"
                )


class _Group:
    """One param group over time."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.columns: dict[str, _Column] = {}
        self.there = _Column()  # 1 while the group exists
        self.changes: dict[str, Number] = {}  # since the last update that was made
        self._seen: dict[str, object] = {}

    def look(self, group: Mapping[str, Any]) -> None:
        """Note what differs from the last look."""
        seen = self._seen
        for key, value in group.items():
            if seen.get(key, _NOTHING) is value:
                continue
            seen[key] = value if _is_fixed(value) else _NOTHING
            if key not in ("params", "param_names"):
                self.changes.update(_numbers(key, value, group))
        if len(seen) != len(group):  # something was taken away, or everything
            self._seen = {key: value for key, value in seen.items() if key in group}
            now = {name for key, value in group.items() for name in _numbers(key, value, group)}
            self.changes.update(dict.fromkeys((self.columns.keys() | self.changes.keys()) - now, np.nan))

    def commit(self, update: int) -> None:
        """The update that was looked at was made."""
        self.there.put(update, 1.0 if self._seen else np.nan)
        for name, value in self.changes.items():
            if name not in self.columns:
                self.columns[name] = _Column()
            self.columns[name].put(update, value)
        self.changes.clear()


class _Deferred:
    """Numbers on a device, fetched when they are asked for: a hook must not wait for them."""

    def __init__(self) -> None:
        self._at = array("q")
        self._blocks: list[torch.Tensor] = []
        self._tensors: list[torch.Tensor] = []

    def put(self, at: int, tensor: torch.Tensor) -> None:
        if len(self._tensors) == _BLOCK or (self._tensors and self._tensors[0].device != tensor.device):
            self._blocks.append(torch.cat(self._tensors))
            self._tensors = []
        self._at.append(at)
        self._tensors.append(tensor.reshape(1))

    def fetch(self) -> list[tuple[int, float]]:
        tail = [torch.cat(self._tensors)] if self._tensors else []
        numbers = [number for block in self._blocks + tail for number in block.tolist()]
        return list(zip(self._at, numbers, strict=True))


class _Column:
    """One hyper-parameter of one group over time: the values, and the updates from which on they hold."""

    def __init__(self) -> None:
        self.rows = array("q")
        self.last: Number | None = None
        self._values = array("d")
        self._deferred = _Deferred()

    def put(self, row: int, value: Number) -> None:
        if isinstance(value, torch.Tensor):
            self._deferred.put(len(self.rows), value)
            self._values.append(np.nan)
        elif isinstance(self.last, float) and (value == self.last or (value != value and self.last != self.last)):
            return
        else:
            self._values.append(value)
        self.rows.append(row)
        self.last = value

    def read(self, count: int) -> Floats:
        """The value at each of `count` updates, NaN before the first."""
        values = np.array(self._values)
        for index, number in self._deferred.fetch():
            values[index] = number
        return np.repeat(np.append(np.nan, values), np.diff([0, *self.rows, count]))


def _is_fixed(value: object) -> bool:
    """Whether the same object will always be the same value."""
    kind = type(value)
    return kind in _FIXED or (kind is tuple and all(type(item) in _FIXED for item in cast("tuple[object]", value)))


def _numbers(key: str, value: object, group: Mapping[str, Any]) -> dict[str, Number]:
    """The numbers in one entry of a group, by name."""
    items = value if isinstance(value, tuple | list) else [value]
    if key == "betas":
        names = ["momentum", *(f"betas[{index}]" for index in range(1, len(items)))]
    elif items is value:
        names = [f"{key}[{index}]" for index in range(len(items))]
    elif key == "momentum" and group.get("betas"):
        names = []
    else:
        names = [key]
    return {name: number for name, item in zip(names, items, strict=False) if (number := _number(item)) is not None}


def _number(value: object) -> Number | None:
    if type(value) is float:
        return value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_meta:
            return None
        return float(value.detach()) if value.device.type == "cpu" else value.detach().clone()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def updates_made(optimizer: Optimizer) -> Number:
    """How many updates the optimizer remembers: ``step`` in the state of the first parameter that has one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step = optimizer.state[parameter].get("step") if parameter in optimizer.state else None
            if (number := _number(step)) is not None:
                return number
    return 0.0


def unique(names: list[str]) -> list[str]:
    """The names, with their index where one occurs more than once."""
    count = Counter(names)
    return [name if count[name] == 1 else f"{name}.{index}" for index, name in enumerate(names)]


def _events(name: str, lr: Floats, there: NDArray[np.bool_], *, rated: bool) -> list[str]:
    """What to tell of one group, at the first update that shows it; `rated` is whether it has a rate at all."""
    events = []
    if there.any() and not there[0]:
        events.append(f"{name}: the group was added before update {np.argmax(there)}")
    for what, found in (
        ("0", lr == 0),
        ("negative", lr < 0),
        ("NaN", np.isnan(lr) & there & rated),
        ("infinite", np.isinf(lr)),
    ):
        if found.any():
            events.append(f"{name}: the rate is {what} at update {np.argmax(found)}")
    return events
