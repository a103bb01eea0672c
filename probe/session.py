"""`Session`: all hooks of one probe, put on and taken off together, and the passes that go through them."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
from typing import Any

import torch
from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from probe.calls import Pass, PassInfo, Receiver
from probe.capture import Kind, Layer
from probe.forward import Local, graph_task, is_replica, raised
from probe.hooks import Tap, on_enter, on_gradient_of, on_leave, on_step
from probe.select import ancestors, modules
from probe.tree import leaves, local, storage_of

IN_GRAPH = (
    "the hooks that a probe with optimizer= has around optimizer.step() cannot be in a graph: leave optimizer= out of "
    "Probe(...) and call p.step() after each step, or compile without fullgraph=True"
)
_SCALED_STEP = torch.amp.GradScaler.step.__code__


class Session:
    """All hooks of one probe, and the state they share. It never refers to the probe, which can so be collected."""

    def __init__(self, model: nn.Module, *, backward: str = "tensor", copy_views: bool = False) -> None:
        self.model = model
        self.backward = backward
        self.copy_views = copy_views
        self.local = Local()
        self.closed = True
        self.step = 0
        self.passes = 0
        self.whole_passes = 0  # those that no exception ended
        self.versions = True  # False in inference mode, where tensors count no versions
        self.resting = False  # layers are hooked only for single passes, see `rest`
        self.tag: str | None = None
        self.stopping: str | None = None  # the layer after which the running forward was to end
        self.receivers: list[Receiver] = []
        self.optimizers: list[Any] = []
        self.scaler: Any = None  # the GradScaler whose scale is to be taken out of captured gradients
        self.scaled = False  # whether a GradScaler that was not given was seen to step an optimizer
        self._entered = 0  # at which step
        self._late: dict[int, bool] = {}  # whether an optimizer steps after the first one has ended the step
        self._bound: list[bool] = []
        self.fixed: frozenset[int] = frozenset()  # storages of parameters and buffers, which stay where they are
        self._live: list[Tap] = []  # the taps that have hooks, and how many whole passes there were when they got them
        self._live_since = 0
        self.taps: dict[Layer, Tap] = {}
        self.scopes: dict[int, nn.Module] = {}
        self._handles: list[Any] = []
        self._active: set[Pass] = set()
        self._tensor_handles: list[list[Any]] = []
        self._leaves: dict[int, list[tuple[Any, torch.Tensor, bool]]] = {}  # by the thread whose pass handed them on
        self._prune_at = 2
        self._lock = threading.Lock()

    def ask(self) -> None:
        """Ask every receiver what it wants in this step."""
        self._bound = self._wishes()
        active = [receiver for receiver, wants in zip(self.receivers, self._bound, strict=True) if wants]
        for tap in self.taps.values():
            tap.takers = {
                kind: tuple(take for each in active if (take := each.taker(tap.layer, kind)) is not None)
                for kind in Kind
            }

    def bind(self) -> None:
        """Ask every receiver what it wants in this step, and put the hooks on; if one can't be, none is left behind."""
        self.detach()
        self.ask()
        taps = [tap for tap in self.taps.values() if tap.stop or any(map(tap.asks, Kind))]
        own = [t for m in modules(self.model) for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        self.fixed = frozenset(s._cdata for tensor in own if (s := storage_of(local(tensor))) is not None)
        scopes = ancestors(self.model, [tap.layer.module for tap in taps])
        self.scopes = {id(module): module for module in scopes if not isinstance(module, torch.jit.ScriptModule)}
        try:
            for module in self.scopes.values():  # first in, so that a pass begins before and ends after our other hooks
                self._handles.append(on_enter(module, self._enter))
            for tap in taps:
                self._handles.extend(tap.register())
            self._live, self._live_since = taps, self.whole_passes
            for module in self.scopes.values():
                self._handles.append(on_leave(module, self._leave))
        except BaseException:
            self.detach()
            raise
        self.closed = False
        for receiver in self.receivers:
            receiver.bound(self.idle)

    def _wishes(self) -> list[bool]:
        return [not self.resting and receiver.active(self.step) for receiver in self.receivers]

    def rest(self) -> None:
        """Leave the layers without hooks, whatever receivers want, but for the passes that `see` is asked for."""
        self.resting = True
        self.detach()

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook the layers for the pass that the running call of `module` begins, and for no longer.

        To be called from a hook that torch runs before the forward of every module, and that is not told of keyword
        arguments: those of `module` itself are not captured. The hooks that `module` gets here do not run before its
        forward any more, so what they do is done here.
        """
        self.resting = False
        try:
            self.bind()
        finally:
            self.resting = True
        taps = [tap for tap in self._live if tap.layer.module is module]
        if not taps and id(module) not in self.scopes:
            self.detach()
            return
        self.begin(module)
        for tap in taps:
            if tap.before is not None:
                tap.before(module, args, {})

    @property
    def idle(self) -> bool:
        """Whether nobody wanted anything when it last bound, so that no layer has a hook."""
        return bool(self._bound) and not any(tap.stop or any(map(tap.asks, Kind)) for tap in self.taps.values())

    def detach(self) -> None:
        """Take every module hook off; the hooks on tensors of live graphs stay until `close`."""
        while self._handles:
            self._handles.pop(0).remove()
        for tap in self._live:
            tap.tried = tap.tried or self.whole_passes > self._live_since
        self._live = []

    def close(self) -> None:
        """Take everything off, also from live graphs, from any thread, also from inside a hook; again is harmless."""
        self.closed = True
        self.detach()
        with self._lock:
            lists, self._tensor_handles = self._tensor_handles, []
            active, self._active = self._active, set()
        for pass_ in active:
            pass_.open = False
            pass_.stack.clear()
            pass_.newest = None
        self.local.current = self.local.log = None
        self.local = Local()  # a pass that another thread is in does not go on when the probe is entered again
        for handles in lists:
            for handle in handles:
                handle.remove()
        for thread in list(self._leaves):
            self._release_leaves(thread)

    def dissolve(self) -> None:
        """The probe is gone: break the cycle of session and taps, so that what was kept is freed now."""
        self.receivers = []
        self.taps = {}

    def step_with(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Have receivers told of the optimizer's steps; a step of the first such optimizer ends a step. The handles.

        Step hooks only: ``step`` is never wrapped.
        """
        if not self.optimizers:
            self._late, self._entered = {}, self.step
        self.optimizers.append(optimizer)
        # in a compiled training step they stay out of the graph; torch's optimizers have imported the compiler already
        outside = functools.partial(torch.compiler.disable, reason=IN_GRAPH)
        return on_step(optimizer, outside(self._before_step), outside(self._after_step))

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if within_step(optimizer):
            return None
        if self._live and self.scaler is None and not self.scaled:
            self.scaled = stepping_scaler() is not None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._tell_before(optimizer)
            return None
        told = False

        def closed() -> Any:
            nonlocal told
            loss = closure()
            if not told:
                told = True
                self._tell_before(optimizer)
            return loss

        # the gradients come to be inside the step: at the end of the first call of its closure
        if len(args) > 1:
            return (args[0], closed, *args[2:]), kwargs
        return args, {**kwargs, "closure": closed}

    def _tell_before(self, optimizer: Any) -> None:
        step = self._step_of(optimizer)
        for receiver in self.receivers:
            receiver.before_step(optimizer, step)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if within_step(optimizer):
            return
        step = self._step_of(optimizer)
        for receiver in self.receivers:
            receiver.after_step(optimizer, step)
        if optimizer is self.optimizers[0]:
            self.advance(stepped=True)

    def _step_of(self, optimizer: Any) -> int:
        """Which step an optimizer's update belongs to: one that comes after the first's, to the step that that ended.

        Which of them come after it is seen at their first update.
        """
        if optimizer is self.optimizers[0]:
            return self.step
        return self.step - self._late.setdefault(id(optimizer), self.step > self._entered)

    def advance(self, *, stepped: bool = False) -> None:
        """A step has ended: receivers send off what they have, and hooks are put on or taken off for the next one."""
        self.end_step(stepped=stepped)
        self.step += 1
        if not self.closed and not self.resting and self._wishes() != self._bound:
            self.bind()

    def end_step(self, *, stepped: bool) -> None:
        """Tell receivers that the step is over; logs, the first ones, last: they set threads to work."""
        for receiver in reversed(self.receivers):
            receiver.end_step(self.step, stepped=stepped)

    def count_from(self, step: int) -> None:
        """Go on as if so many steps had been made."""
        self.step = self._entered = step

    def is_scope(self, module: nn.Module) -> bool:
        return id(module) in self.scopes

    def begin(self, module: nn.Module) -> Pass | None:
        if self.closed:
            return None
        mode = self.tag or ("train" if self.model.training else "eval")
        pass_ = Pass(module, PassInfo(self.step, mode, self.fixed), self.handles())
        pass_.open = not (torch._C._is_tracing() or torch.compiler.is_exporting() or is_fx_symbolic_tracing())
        with self._lock:
            self.passes += 1
            self._active.add(pass_)
        self.local.current = pass_
        self.stopping = None
        self._release_leaves(threading.get_ident())
        if pass_.open:
            self.versions = pass_.versions
            self.local.log = pass_.raw.append
            for receiver in self.receivers:
                receiver.begin(pass_)
        return pass_

    def end(self, pass_: Pass, *, whole: bool) -> None:
        self.whole_passes += whole and pass_.open
        self.local.current = self.local.log = None
        pass_.stack.clear()
        pass_.newest = None
        with self._lock:
            self._active.discard(pass_)
        if self.resting:
            self.detach()

    def handles(self) -> list[Any]:
        """A new list for the handles of hooks on tensors; lists whose graphs are gone are dropped now and then."""
        fresh: list[Any] = []
        with self._lock:
            if len(self._tensor_handles) >= self._prune_at:
                running = {id(pass_.handles) for pass_ in self._active}  # their threads append to them
                for handles in self._tensor_handles:
                    if id(handles) not in running:
                        handles[:] = [handle for handle in handles if handle.hooks_dict_ref() is not None]
                self._tensor_handles = [each for each in self._tensor_handles if each or id(each) in running]
                self._prune_at = 2 * len(self._tensor_handles) + 2
            self._tensor_handles.append(fresh)
        return fresh

    def unscaled(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient without the scale that the given `GradScaler` put on the loss; the same where none was given.

        float16 becomes float32: without the scale its small values would be lost.
        """
        scale = getattr(self.scaler, "_scale", None)  # `get_scale()` would wait for the device
        if scale is None:
            return gradient
        wide = gradient.detach()
        wide = wide.float() if wide.dtype is torch.float16 else wide
        return wide / scale.to(wide.device)  # type: ignore[no-any-return]

    def hook_leaf(self, tensor: torch.Tensor, hook: Any) -> None:
        had_none = tensor._backward_hooks is None
        handle = on_gradient_of(tensor, None, hook)
        with self._lock:
            self._leaves.setdefault(threading.get_ident(), []).append((handle, tensor, had_none))

    def _release_leaves(self, thread: int) -> None:
        with self._lock:
            leaves_ = self._leaves.pop(thread, [])
        for handle, tensor, had_none in reversed(leaves_):
            handle.remove()
            if had_none and not tensor._backward_hooks:
                tensor._backward_hooks = None

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        pass_ = self.local.current
        if pass_ is None:
            if graph_task() == -1 and (id(module) in self.scopes or is_replica(module)):
                self.begin(module)
        elif pass_.outermost is module or module is self.model:
            # A model that calls itself, or one whose last forward was interrupted (no hook runs on KeyboardInterrupt)?
            running = _running(nn.Module._call_impl.__code__, pass_.outermost)
            if running < pass_.depth + (pass_.outermost is module):
                self.end(pass_, whole=False)
                self.begin(module)
            elif pass_.outermost is module:
                pass_.depth += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        pass_ = self.local.current
        if pass_ is not None and pass_.outermost is module:
            error = raised(module, None)  # whatever its forward returned: a later hook can have raised
            if error is not None:
                self.explain(error, pass_)
            pass_.depth -= 1
            if pass_.depth == 0:
                self.end(pass_, whole=error is None)
                if error is None and self.stopping is not None:
                    text = f"the model caught the interruption of stop_after({self.stopping!r}) and went on"
                    warnings.warn(text, RuntimeWarning, stacklevel=2)

    def explain(self, error: BaseException | None, pass_: Pass) -> None:
        """Make torch's error about its module backward hook name the module whose output was overwritten."""
        if self.backward != "module" or not isinstance(error, RuntimeError):
            return
        text = str(error)
        if "BackwardHookFunction" not in text or "inplace" not in text or "Probe(" in text:
            return
        name = next((pass_.storages[key] for key in _storages_near(error) if key in pass_.storages), None)
        who = "a probed module" if name is None else repr(name)
        error.args = (
            f"the output of {who} is modified in place by what follows it, which torch's module backward hook forbids. "
            'Leave backward="module" out: Probe(model) reads the same gradients from tensor hooks, in-place or not. '
            f"(torch: {text})",
        )


def stepping_scaler() -> torch.amp.GradScaler | None:
    """The enabled `GradScaler` that is calling an optimizer's step, if one is."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _SCALED_STEP:
            scaler: torch.amp.GradScaler = frame.f_locals["self"]
            return scaler if scaler.is_enabled() else None
        frame = frame.f_back
    return None


def within_step(optimizer: Any) -> bool:
    """Whether this is a step that the optimizer's own one calls, by ``super().step()``: torch calls hooks at both."""
    if not _calls_super(optimizer.__class__):
        return False
    code = getattr(type(optimizer).step, "__code__", None)  # of torch's wrapper, the same for all classes
    return _running(code, optimizer) > 1


@functools.cache
def _calls_super(kind: type) -> bool:
    """Whether a class of optimizers may step by another's: there are several steps in it, below torch's wrappers."""
    own = [vars(each)["step"] for each in kind.__mro__ if "step" in vars(each) and each is not torch.optim.Optimizer]
    return len(set(map(inspect.unwrap, own))) > 1


def _running(code: Any, owner: Any) -> int:
    """How many calls of a method of `owner` are running in this thread, by the interpreter's stack."""
    count = 0
    frame = sys._getframe()
    while frame is not None:
        count += frame.f_code is code and frame.f_locals.get("self") is owner
        frame = frame.f_back  # type: ignore[assignment]
    return count


def _storages_near(error: BaseException) -> list[int]:
    """Storages of the tensors that are local variables where `error` was raised, the innermost frame's first."""
    found: list[int] = []
    trace = error.__traceback__
    while trace is not None:
        tensors = [t for value in list(trace.tb_frame.f_locals.values()) for _, t in leaves(value)]
        views = [t for t in tensors if t.grad_fn is not None and t.grad_fn.name() == "BackwardHookFunctionBackward"]
        found = [s._cdata for t in views if (s := storage_of(t)) is not None] + found
        trace = trace.tb_next
    return found
