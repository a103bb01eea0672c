"""`SkipWatch`: which updates a `GradScaler` skipped, found out without touching it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

_WHOSE = (
    "a GradScaler that steps several optimizers in turns skipped an update, and it cannot be known whose; "
    "call poll() once an iteration, between scaler.update() and the next scaler.step()"
)
_FOREIGN = (
    "the GradScaler's scale changed in a way that the recorded optimizers do not explain (set by hand, or another "
    "optimizer uses it too): updates that were skipped meanwhile are not known"
)


class _Reading(NamedTuple):
    """The scaler's numbers during an iteration, and whether the iteration looked at before it met an Inf or NaN."""

    scale: float
    growth_tracker: float
    overflow: bool


class SkipWatch:
    """Finds the updates that a `GradScaler` skipped, from what it keeps about an iteration.

    An optimizer whose update is skipped calls no hook. But the scaler keeps a stage for each optimizer in a dict, and
    its ``update()`` puts a fresh dict in that one's place. So whenever there is an occasion one looks (`look`):

    - An optimizer that the dict calls stepped and whose hook did not fire was skipped. The dict can be held, and read
      after its iteration.
    - Iterations in which every update was skipped pass unseen. Each multiplies the scale by the backoff factor, and the
      scale after the iteration before them is known: their number is the logarithm of a ratio.

    Arguments:
        scaler: a `torch.amp.GradScaler`, enabled or not.
        optimizers: those whose updates are of interest.

    Raises:
        TypeError: `scaler` is not a `GradScaler`.
    """

    def __init__(self, scaler: Any, optimizers: Iterable[Optimizer]) -> None:
        self.events: list[str] = []
        self._scaler = scaler
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        try:
            self._enabled: bool = scaler.is_enabled()
            self._iteration: dict[int, dict[str, Any]] = scaler._per_optimizer_states if self._enabled else {}
        except AttributeError:
            raise TypeError(f"scaler= takes a torch.amp.GradScaler, not a {type(scaler).__name__}") from None
        # Fused optimizers are called also to skip. With no others the scaler never waits for the device, no iteration
        # passes unseen, and the scale is not read.
        self._fused = all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in self._alive())
        self._settled = {key for key, entry in self._iteration.items() if entry["stage"] is OptState.STEPPED}
        self._reading = self._read() if self._enabled and not self._fused else None

    def look(self, stepping: Optimizer | None = None, *, wait: bool = True) -> list[tuple[Optimizer, int]]:
        """Tell the updates that were skipped since the last look, as `(optimizer, how many)`, in order.

        Arguments:
            stepping: the optimizer that is about to make its update, when this is its hook.
            wait: whether the scale may be read from the device.
        """
        if not self._enabled:
            return []
        skipped = self._in_iteration()
        # No wait worth the name inside a step: GradScaler has itself just waited for the same device, to decide it.
        reading = self._read() if wait and not self._fused else None
        current = self._scaler._per_optimizer_states
        if current is not self._iteration:
            if reading is not None and self._reading is not None:
                skipped += self._unseen(self._reading, reading)
            self._iteration, self._settled, self._reading = current, set(), None
            skipped += self._in_iteration()
        self._reading = reading or self._reading
        if stepping is not None and id(stepping) in current:  # absent when somebody steps past the scaler
            self._settled.add(id(stepping))
        return skipped

    def _alive(self) -> list[Optimizer]:
        return [optimizer for ref in self._optimizers if (optimizer := ref()) is not None]

    def _stepped(self) -> list[Optimizer]:
        """Those that the iteration in hand asked to make an update."""
        entries = [(optimizer, self._iteration.get(id(optimizer))) for optimizer in self._alive()]
        return [optimizer for optimizer, entry in entries if entry and entry["stage"] is OptState.STEPPED]

    def _in_iteration(self) -> list[tuple[Optimizer, int]]:
        skipped = [optimizer for optimizer in self._stepped() if id(optimizer) not in self._settled]
        self._settled.update(map(id, skipped))
        return [(optimizer, 1) for optimizer in skipped]

    def _unseen(self, then: _Reading, now: _Reading) -> list[tuple[Optimizer, int]]:
        """Updates skipped in iterations between the one in hand and the one going on."""
        scale, tracker = self._after_update(then, now.overflow)
        backoff = self._scaler.get_backoff_factor()
        count = round(math.log(now.scale / scale) / math.log(backoff)) if now.scale > 0 and scale > 0 else -1
        explained = count >= 0 and math.isclose(scale * backoff**count, now.scale, rel_tol=1e-5)
        if not explained or now.growth_tracker != (0 if count else tracker):
            self._tell(_FOREIGN)
            return []
        took_part = self._alive() if len(self._optimizers) == 1 else self._stepped()
        if count and len(took_part) < len(self._optimizers):
            self._tell(_WHOSE)
            return []
        return [(optimizer, count) for optimizer in took_part if count]

    def _after_update(self, reading: _Reading, overflow: bool) -> tuple[float, float]:
        """What ``scaler.update()`` makes of scale and growth tracker."""
        if overflow:
            return reading.scale * self._scaler.get_backoff_factor(), 0.0
        if reading.growth_tracker + 1 != self._scaler.get_growth_interval():
            return reading.scale, reading.growth_tracker + 1
        grown = reading.scale * self._scaler.get_growth_factor()
        return (grown if grown <= torch.finfo(torch.float32).max else reading.scale), 0.0

    def _read(self) -> _Reading:
        """Scale and growth tracker now, and whether the iteration in hand met an Inf or NaN; one copy to the host."""
        scale, tracker = self._scaler._scale, self._scaler._growth_tracker
        found = [flag for entry in self._iteration.values() for flag in entry["found_inf_per_device"].values()]
        if scale is None:  # before the first scaler.scale()
            return _Reading(self._scaler._init_scale, self._scaler._init_growth_tracker, False)
        numbers = [number.to(scale.device, torch.float32) for number in (scale, tracker, *found)]
        first, second, *rest = torch.stack(numbers).tolist()
        return _Reading(first, second, any(rest))

    def _tell(self, event: str) -> None:
        if event not in self.events:
            self.events.append(event)
