"""`Recorder`: writes down what every update of an optimizer uses, from the optimizer's two step hooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from probe.schedule.log import Log, Number, unique
from probe.schedule.scaler import SkipWatch
from probe.schedule.trace import Trace


class Recorder:
    """Records what every update of one or several optimizers uses. It holds numbers only and changes nothing.

    `before_step` and `after_step` have the signature of torch's hooks: they are what ``register_step_pre_hook`` and
    ``register_step_post_hook`` take. An update counts once it is through; a step that raises leaves no row. A rate that
    is a tensor is copied, and one on another device than the CPU is fetched only when the trace is read, so that no
    step waits for the device. A step that is replayed from a CUDA graph runs no hooks and is not seen. That a scheduler
    was stepped before the optimizer is told where it is older than the recorder and its step moved a rate.

    Arguments:
        optimizers: an optimizer, several of them, or name -> optimizer.
        scaler: the `torch.amp.GradScaler` that steps them, if one does. With it `Trace.skipped` is exact. Without it
            only the skips of fused optimizers are known, because other optimizers are not called when they skip.
        start: how many updates were made before row 0. By default what the optimizer's state tells (Adam's ``step``).

    Raises:
        TypeError: `optimizers` or `scaler` is something else.
    """

    def __init__(
        self,
        optimizers: Optimizer | Iterable[Optimizer] | Mapping[str, Optimizer],
        scaler: Any = None,
        start: int | None = None,
    ) -> None:
        named = _named(optimizers)
        self._logs = [Log(optimizer, name, start) for name, optimizer in named.items()]
        self._watch = None if scaler is None else SkipWatch(scaler, named.values())
        # In a compiled step the two hooks stay out of the graph: traced, they would make it recompile. Not a decorator,
        # because that would import the compiler with this module; an optimizer has imported it already.
        vars(self).update({name: torch.compiler.disable(getattr(self, name)) for name in ("before_step", "after_step")})

    def before_step(self, optimizer: Optimizer, *_: object) -> None:
        """Read the param groups before the update uses them.

        Raises:
            KeyError: this optimizer is not recorded.
        """
        log = self._log(optimizer)
        if self._watch is not None:
            for other, count in self._watch.look(optimizer):
                self._log(other).skip(count)
        log.before(optimizer)

    def after_step(self, optimizer: Optimizer, *_: object) -> None:
        """Keep what `before_step` read: the update was made."""
        self._log(optimizer).after(optimizer)

    def poll(self) -> None:
        """Look whether the `GradScaler` skipped the last iteration. Optional.

        Only when one scaler steps several optimizers in turns it takes this to tell whose updates were skipped: call it
        once an iteration, between ``scaler.update()`` and the next ``scaler.step()``, from a forward hook for example.
        It never waits for the device.
        """
        self._look(wait=False)

    def trace(self, optimizer: Optimizer | None = None) -> Trace:
        """What was recorded so far.

        Arguments:
            optimizer: one of the recorded optimizers. By default all of them in one trace, where the groups of several
                optimizers stand side by side and carry the optimizer's name: ``"SGD.group0"``.

        Raises:
            KeyError: this optimizer is not recorded.
        """
        self._look(wait=True)
        logs = self._logs if optimizer is None else [self._log(optimizer)]
        traces = {log.name: log.trace() for log in logs}
        whole = next(iter(traces.values())) if len(traces) == 1 else _side_by_side(traces)
        whole.events.extend(self._watch.events if self._watch is not None else [])
        return whole

    def scalars(self, optimizer: Optimizer | None = None) -> dict[str, Number]:
        """What the last update used, by tag of TensorBoard.

        Returns:
            ``lr/<group>`` of every group, and ``<hyper-parameter>/<group>`` of each that has changed so far; with a
            scaler ``grad_scaler/skipped``, the number of updates that it has skipped so far. A number that lives on a
            device is a tensor: nobody has waited for it.
        """
        numbers: dict[str, Number] = {}
        for log in self._logs if optimizer is None else [self._log(optimizer)]:
            for name, group in zip(log.names(), log.groups, strict=True):
                for key, column in group.columns.items():
                    if column.last is not None and (key == "lr" or len(column.rows) > 1):
                        numbers[f"{key}/{self._prefix(log)}{name}"] = column.last
            if self._watch is not None:
                numbers[f"grad_scaler/{self._prefix(log)}skipped"] = log.skips
        return numbers

    def prefix(self, optimizer: Optimizer) -> str:
        """What tags of this optimizer begin with to tell it from the others, ``"SGD."``; nothing where it is alone.

        Raises:
            KeyError: this optimizer is not recorded.
        """
        return self._prefix(self._log(optimizer))

    def _prefix(self, log: Log) -> str:
        return f"{log.name}." if len(self._logs) > 1 else ""

    def _look(self, wait: bool) -> None:
        if self._watch is not None:
            for optimizer, count in self._watch.look(wait=wait):
                self._log(optimizer).skip(count)

    def _log(self, optimizer: Optimizer) -> Log:
        for log in self._logs:
            if log.optimizer() is optimizer:
                return log
        known = ", ".join(log.name for log in self._logs)
        raise KeyError(f"this {type(optimizer).__name__} is not among the recorded optimizers ({known})")


def _named(optimizers: Optimizer | Iterable[Optimizer] | Mapping[str, Optimizer]) -> dict[str, Optimizer]:
    if isinstance(optimizers, Optimizer):
        optimizers = [optimizers]
    if not isinstance(optimizers, Mapping):
        listed = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
        optimizers = dict(zip(unique([type(optimizer).__name__ for optimizer in listed]), listed, strict=True))
    for name, optimizer in optimizers.items():
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"a Recorder records torch optimizers; {name!r} is a {type(optimizer).__name__}")
    if not optimizers:
        raise TypeError("a Recorder needs an optimizer to record")
    return dict(optimizers)


def _side_by_side(traces: dict[str, Trace]) -> Trace:
    """The groups of several optimizers in one trace; those that made fewer updates end in NaN."""
    rows = max(len(trace) for trace in traces.values())
    keys = dict.fromkeys(key for trace in traces.values() for key in trace.values)
    values = {key: np.full((rows, sum(len(trace.names) for trace in traces.values())), np.nan) for key in keys}
    column = 0
    for trace in traces.values():
        for key, numbers in trace.values.items():
            values[key][: len(trace), column : column + len(trace.names)] = numbers
        column += len(trace.names)
    return Trace(
        values,
        tuple(f"{title}.{name}" for title, trace in traces.items() for name in trace.names),
        sorted({update for trace in traces.values() for update in trace.skipped}),
        [f"{title}.{event}" for title, trace in traces.items() for event in trace.events]
        + [f"{title}: skipped updates {trace.skipped}" for title, trace in traces.items() if trace.skipped],
        max(trace.start for trace in traces.values()),
    )
