"""Calls and passes: what the hooks make of a forward, and who receives it. Plain book-keeping."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from probe.capture import Kind, Layer
from probe.findings import Findings
from probe.graph import Edges, in_reentrant_checkpoint
from probe.tree import snapshot

UNSET: Any = type("Unset", (), {"__repr__": lambda self: "<not captured>", "__bool__": lambda self: False})()
"""Stands where nothing was captured."""

_settling = threading.RLock()


class PassInfo:
    """What all calls of a pass share; it refers to none of them, so that no pass is a reference cycle."""

    __slots__ = ("backwards", "fixed", "grad_enabled", "mode", "step", "thread")

    def __init__(self, step: int, mode: str, fixed: frozenset[int] = frozenset()) -> None:
        self.step = step
        self.mode = mode
        self.fixed = fixed  # storages of the model's own, which no snapshot may share
        self.grad_enabled = torch.is_grad_enabled() or in_reentrant_checkpoint()
        self.thread = threading.get_ident()
        self.backwards: set[int] = set()


class Backward:
    """What one backward pass brought to one call, by path."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.grad_output: dict[str, torch.Tensor] = {}
        self.grad_input: dict[str, torch.Tensor] = {}


class Call:
    """One call of one module: its place in the pass, and what the takers put on it."""

    args: Any = UNSET
    kwargs: Any = UNSET
    output: Any = UNSET
    shape_in: Any = UNSET  # what gradients mirror: arguments and output with a slot in place of every tensor
    shape_kwargs: Any = UNSET
    shape_out: Any = UNSET
    raised = ""  # why there is no output
    came: list[Any] | None = None  # gradients: backward pass, kind, path and tensor, one after another
    notes: tuple[str, ...] = ()
    needs_grad = False
    input_needs_grad = False
    views: tuple[tuple[str, torch.Tensor, int], ...] = ()  # outputs that are views: path, detached alias, version

    def __init__(self, layer: Layer, index: int, info: PassInfo) -> None:
        self.layer = layer
        self.index = index
        self.info = info

    @property
    def backwards(self) -> list[Backward]:
        """What came back, by backward pass."""
        found: list[Backward] = []
        fields = iter(list(self.came or ()))
        for number, kind, path, gradient in zip(fields, fields, fields, fields, strict=True):
            if not found or found[-1].number != number:
                found.append(Backward(number))
            (found[-1].grad_output if kind is Kind.GRAD_OUTPUT else found[-1].grad_input)[path] = gradient
        return found

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes = (*self.notes, text)


class Pass:
    """One outermost call into the probed model, or into any part of it, in one thread."""

    __slots__ = (
        "__weakref__",
        "_counts",
        "_grouped",
        "_ungrouped",
        "depth",
        "events",
        "handles",
        "info",
        "newest",
        "open",
        "outermost",
        "raw",
        "sharing",
        "stack",
        "storages",
        "versions",
    )

    def __init__(self, outermost: nn.Module, info: PassInfo, handles: list[Any]) -> None:
        self.outermost = outermost
        self.info = info
        self.handles = handles
        self.depth = 1
        self.open = True
        self._ungrouped: list[Call] = []  # calls that nobody asked for yet: a list a layer would be made for nothing
        self._grouped: dict[Layer, list[Call]] = {}
        self._counts: dict[Layer, int] = {}
        self.versions = not torch.is_inference_mode_enabled()  # whether its tensors count versions
        self.events: list[Any] = []  # what the store saw: the fields of each `Seen`, one after another
        self.stack: list[list[Any]] = []  # of tap, call, and the edges of its inputs or None
        self.storages: dict[int, str] = {}
        self.newest: Any = None  # the last event's live tensor, snapshot, storage and version, while the pass runs
        self.sharing: list[Call] = []  # whose argument is the snapshot of another call's output
        self.raw: list[tuple[Any, torch.UntypedStorage, torch.Tensor, int]] = []

    def settle(self) -> None:
        """Make what is kept ready to be read: calls of what the short hooks logged, in order; no snapshot shared."""
        self.newest = None
        if not self.raw and not self.sharing:
            return
        with _settling:
            entries = self.raw[:]
            del self.raw[: len(entries)]  # the same list: its append is bound in the running thread
            for hook, *entry in entries:
                hook.taker.settle(self, self._call(hook.layer), *entry)
            while self.sharing:
                call = self.sharing.pop()
                call.args = (snapshot(call.args[0]),)

    def call(self, layer: Layer) -> Call:
        if self.raw:
            self.settle()
        return self._call(layer)

    def _call(self, layer: Layer) -> Call:
        index = self._counts.get(layer, 0)
        self._counts[layer] = index + 1
        call = Call(layer, index, self.info)
        self._ungrouped.append(call)
        if self._grouped:  # somebody looked at this pass while it runs, and may have kept the lists
            self._group()
        return call

    @property
    def calls(self) -> dict[Layer, list[Call]]:
        """The calls by layer, each layer's in order."""
        self._group()
        return self._grouped

    def _group(self) -> None:
        with _settling:
            new = self._ungrouped[:]
            del self._ungrouped[: len(new)]
            for call in new:
                self._grouped.setdefault(call.layer, []).append(call)

    def pop(self, tap: Any) -> tuple[Call, Edges | None] | None:
        """The innermost open call of the tap; calls above it were left by an exception."""
        stack = self.stack
        for depth in range(len(stack) - 1, -1, -1):
            owner, call, edges = stack[depth]
            if owner is tap:
                del stack[depth:]
                return call, edges
        return None


class Receiver:
    """What a session delivers to."""

    def active(self, step: int) -> bool:
        """Whether it wants anything in this step; a layer that nobody wants anything of has no hook."""
        return True

    def taker(self, layer: Layer, kind: Kind) -> Callable[..., None] | None:
        """A function that runs in the hook, or None.

        It is called as ``take(pass_, call, value)`` with the ``(args, kwargs)`` for INPUT or what the module returned
        for OUTPUT, and as ``take(call, path, gradient, backward)`` with the number of the backward pass for gradients.
        """

    def bound(self, idle: bool) -> None:
        """The hooks of a step were put on; `idle`: nobody wanted any."""

    def begin(self, pass_: Pass) -> None:
        """A pass begins."""

    def before_step(self, optimizer: Any, step: int) -> None:
        """An optimizer is about to step."""

    def after_step(self, optimizer: Any, step: int) -> None:
        """An optimizer has stepped."""

    def end_step(self, step: int, *, stepped: bool) -> None:
        """A step is over; `stepped`: by an optimizer's step."""

    def leave(self, error: BaseException) -> None:
        """The probe is being left by an exception; the step that it interrupts ends after this."""

    def findings(self) -> Findings | None:
        """What it found wrong so far; None if it judges nothing."""

    def finish(self, step: int, *, stepped: bool) -> None:
        """The last step is over, as `end_step` says it."""
        self.end_step(step, stepped=stepped)
        self.close()

    def close(self) -> None:
        """Nothing more will come: the probe is detached, or this receiver is."""


class StopForward(Exception):
    """Ends a forward after the layer that ``Probe.stop_after`` named; the probe's ``with`` swallows it."""

    def __init__(self, session: object, name: str) -> None:
        super().__init__(f"the forward was stopped after layer {name!r}")
        self.session = session
