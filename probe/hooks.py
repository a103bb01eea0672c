"""The four hooks: the only file that calls a ``register_*`` of torch.

A `Session` puts a `Tap` on every chosen layer. A tap's hooks turn each call of its module into a `Call`, sort calls
into passes, apply edits, and hand what flows to the takers that the session's receivers offer.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from probe.capture import Kind
from probe.graph import Edges, version
from probe.select import Layer
from probe.tree import inputs, leaves, rebuild, shape, snapshot, storage_of

_graph_task: Callable[[], int] = torch._C._current_graph_task_id

UNSET: Any = type("Unset", (), {"__repr__": lambda self: "<not captured>", "__bool__": lambda self: False})()


class PassInfo:
    """What all calls of a pass share; it refers to none of them, so that no pass is a reference cycle."""

    __slots__ = ("backwards", "grad_enabled", "mode", "step")

    def __init__(self, step: int, mode: str) -> None:
        self.step = step
        self.mode = mode
        self.grad_enabled = torch.is_grad_enabled()
        self.backwards: set[int] = set()


class Call:
    """One call of one module: its place in the pass, and what the takers put on it."""

    args: Any = UNSET
    kwargs: Any = UNSET
    output: Any = UNSET
    shape_in: Any = UNSET  # what gradients mirror: arguments and output with a slot in place of every tensor
    shape_kwargs: Any = UNSET
    shape_out: Any = UNSET
    raised = False
    backwards: tuple[Any, ...] | list[Any] = ()
    notes: tuple[str, ...] = ()
    needs_grad = False
    views: tuple[tuple[str, torch.Tensor, int], ...] = ()  # outputs that are views: path, detached alias, version

    def __init__(self, layer: Layer, index: int, info: PassInfo) -> None:
        self.layer = layer
        self.index = index
        self.info = info

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes = (*self.notes, text)


class Pass:
    """One outermost call into the probed model, or into any part of it, in one thread."""

    __slots__ = ("__weakref__", "calls", "depth", "events", "handles", "info", "open", "outermost", "stack", "storages")

    def __init__(self, outermost: nn.Module, info: PassInfo, handles: list[Any]) -> None:
        self.outermost = outermost
        self.info = info
        self.handles = handles
        self.depth = 1
        self.open = True
        self.calls: defaultdict[Layer, list[Call]] = defaultdict(list)
        self.events: list[tuple[Kind, Call, Any]] = []
        self.stack: list[tuple[Tap, Call, Any]] = []
        self.storages: dict[int, str] = {}

    def call(self, layer: Layer) -> Call:
        calls = self.calls[layer]
        call = Call(layer, len(calls), self.info)
        calls.append(call)
        return call

    def pop(self, tap: Tap) -> tuple[Call, Edges | None] | None:
        """The innermost open call of the tap; calls above it were left by an exception."""
        for depth in range(len(self.stack) - 1, -1, -1):
            if self.stack[depth][0] is tap:
                _, call, edges = self.stack[depth]
                del self.stack[depth:]
                return call, edges
        return None


class Receiver(Protocol):
    """What a session delivers to. A taker runs in the hook: ``(pass, call, value)``.

    The value is ``(args, kwargs)`` for INPUT, what the module returned for OUTPUT, and ``(path, gradient, backward)``
    for the gradients, where `backward` is the number of the backward pass. For the gradients ``pass`` is None.
    """

    def taker(self, layer: Layer, kind: Kind) -> Callable[[Any, Call, Any], None] | None: ...

    def begin(self, pass_: Pass) -> None: ...


class StopForward(Exception):
    """Ends a forward after the layer that ``Probe.stop_after`` named; the probe's ``with`` swallows it."""

    def __init__(self, session: Session, name: str) -> None:
        super().__init__(f"the forward was stopped after layer {name!r}")
        self.session = session


class _Local(threading.local):
    current: Pass | None = None
    replays: tuple[int, dict[Any, int]] = (-1, {})
    replay_stack: tuple[tuple[Tap, Any], ...] = ()


class _Hook(functools.partial):  # type: ignore[type-arg]  # a partial: C speed, where __call__ in Python costs a frame
    """A hook that becomes an inert one in a deep copy or a pickle of the model, which then needs no `probe` to load."""

    __torch_unserializable__ = True  # tensors that carry it may be saved: torch would warn otherwise

    def __deepcopy__(self, memo: Any) -> Any:
        return contextlib.nullcontext().__exit__  # takes anything, returns None

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


class Tap:
    """The hooks of one layer: which kinds, to which takers, with which edits."""

    def __init__(self, layer: Layer, session: Session) -> None:
        self.layer = layer
        self.session = session
        self.takers: dict[Kind, tuple[Callable[[Any, Call, Any], None], ...]] = {}
        self.edits: dict[Kind, tuple[Callable[[Any], Any], ...]] = {}
        self.stop = False
        self.fired = False
        # (sequence number, weak call, index, info) of calls whose gradients come back by another road than a closure:
        # torch's module backward hook, and the recomputation of a reentrant checkpoint
        self.tickets: deque[tuple[int, weakref.ref[Call], int, PassInfo]] = deque(maxlen=4096)

    def asks(self, kind: Kind) -> bool:
        return bool(self.takers.get(kind) or self.edits.get(kind))

    def register(self) -> list[Any]:
        """Put the hooks on; the handles."""
        module, handles = self.layer.module, []
        by_module = self.session.backward == "module" and (self.asks(Kind.GRAD_OUTPUT) or self.asks(Kind.GRAD_INPUT))
        paired = by_module or self.asks(Kind.INPUT) or self.asks(Kind.GRAD_INPUT)
        try:
            if by_module:
                flag = module._is_full_backward_hook
                handles.append(module.register_full_backward_hook(_Hook(self._module_backward())))
                handles.append(_Restore(functools.partial(_reset_full_flag, module, flag)))
            if paired:
                handles.append(module.register_forward_pre_hook(_Hook(self._before(by_module)), with_kwargs=True))
            if paired or self.asks(Kind.OUTPUT) or self.asks(Kind.GRAD_OUTPUT) or self.stop:
                after = _Hook(self._after(paired, by_module))
                handles.append(module.register_forward_hook(after, always_call=paired))
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        return handles[::-1]  # the full-backward flag can be reset only once its hook is gone

    def _before(self, by_module: bool) -> Callable[..., Any]:
        session, local, layer, owner = self.session, self.session.local, self.layer, self.layer.module
        takers, edits = self.takers.get(Kind.INPUT, ()), self.edits.get(Kind.INPUT, ())
        wants_grad = self.asks(Kind.GRAD_INPUT) and not by_module
        edits_grad = bool(self.edits.get(Kind.GRAD_INPUT)) and not by_module
        sequence = torch.autograd._get_sequence_nr

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if module is not owner and not _is_replica(module):
                return None
            if _graph_task() != -1:
                return self._replay_before(args, kwargs, wants_grad)
            pass_ = local.current or session.begin(module)
            if pass_ is None or not pass_.open:
                return None
            call = pass_.call(layer)
            edited = False
            pass_.stack.append((self, call, None))  # before user code: the forward hook finds it whatever that raises
            for edit in edits:
                args, kwargs = _put(args, kwargs, edit(inputs(args, kwargs)))
                edited = True
            for take in takers:
                take(pass_, call, (args, kwargs))
            if wants_grad or by_module:
                call.shape_in, call.shape_kwargs = shape(inputs(args, kwargs)), shape(kwargs)
            if edits_grad and torch.is_grad_enabled():
                args, kwargs = self._separate(call, pass_.handles, args, kwargs)
                edited = True
            elif wants_grad and torch.is_grad_enabled():
                pass_.stack[-1] = (self, call, Edges(args, kwargs))
            if by_module:
                self.tickets.append((sequence(), weakref.ref(call), call.index, call.info))
            return (args, kwargs) if edited else None

        return before

    def _after(self, paired: bool, by_module: bool) -> Callable[..., Any]:
        session, local, layer, owner = self.session, self.session.local, self.layer, self.layer.module
        takers, edits = self.takers.get(Kind.OUTPUT, ()), self.edits.get(Kind.OUTPUT, ())
        wants_output = self.asks(Kind.GRAD_OUTPUT) and not by_module
        wants_grad = wants_output or (self.asks(Kind.GRAD_INPUT) and not by_module)
        copies_views = wants_output and session.copy_views

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if module is not owner and not _is_replica(module):
                return None
            if _graph_task() != -1:
                return self._replay_after(output, wants_output) if wants_grad else None
            pass_ = local.current
            alone = pass_ is None and not paired
            if alone:
                pass_ = session.begin(module)
            if pass_ is None or not pass_.open:
                return None
            try:
                edges: Edges | None = None
                if not paired:
                    call = pass_.call(layer)
                else:
                    popped = pass_.pop(self)
                    if popped is None:
                        return None  # the hooks were put on while the module ran
                    call, edges = popped
                    if output is None and sys.exc_info()[1] is not None:
                        call.raised = True
                        session.explain(sys.exc_info()[1], pass_)
                        return None
                self.fired = True
                result = output
                for edit in edits:
                    result = edit(result)
                if copies_views and torch.is_grad_enabled():
                    result = rebuild(result, _unview, opaque=_same)
                for take in takers:
                    take(pass_, call, result)
                if wants_grad:
                    self._hook_gradients(pass_.handles, call, result, edges, wants_output)
                elif by_module:
                    call.shape_out = shape(result)
                    pass_.storages.update((s._cdata, layer.name) for _, t in leaves(result) if (s := storage_of(t)))
                if self.stop:
                    raise StopForward(session, layer.name)
                return None if result is output else result
            finally:
                if pass_.outermost is module and not pass_.stack and pass_.depth == 1 and not session.is_scope(module):
                    session.end(pass_)

        return after

    def _hook_gradients(self, handles: list[Any], call: Call, output: Any, edges: Edges | None, grads: bool) -> None:
        call.shape_out = shape(output)
        tensors = [(path, tensor) for path, tensor in leaves(output) if tensor.requires_grad]
        if not tensors:
            if not torch.is_grad_enabled() and call.info.grad_enabled:  # perhaps a reentrant checkpoint's first run
                ticket = (torch.autograd._get_sequence_nr(), weakref.ref(call), call.index, call.info)
                self.tickets.append(ticket)
            return
        call.needs_grad = True
        if edges is not None and edges.paths:
            self._hook_inputs(handles, call, tensors, edges)
        if grads:
            deliver = self._deliver(Kind.GRAD_OUTPUT)
            edits = self.edits.get(Kind.GRAD_OUTPUT, ())
            for path, tensor in tensors:
                self._hook_tensor(handles, tensor, _Hook(_on_tensor, deliver, call, path, edits))
                if tensor._is_view():
                    call.views = (*call.views, (path, tensor.detach(), version(tensor)))

    def _hook_inputs(self, handles: list[Any], call: Call, tensors: list[tuple[str, Any]], edges: Edges) -> None:
        deliver = self._deliver(Kind.GRAD_INPUT)
        consumers, passed = edges.consumers(tensors)
        shares: dict[str, _Share] = {}
        for node, position, paths in consumers:
            if paths[0] in passed:
                continue
            share = shares.get(paths[0])
            if share is None:
                share = shares[paths[0]] = _Share(deliver, call, paths)
            else:
                share.alone = False
            handles.append(node.register_hook(_Hook(share.collect, position)))
            if len(paths) > 1:
                call.note(f"the same tensor came in as {', '.join(map(repr, paths))}: each shows the gradient of all")
        for _, tensor in tensors:
            for own in edges.paths.get((tensor.grad_fn, tensor.output_nr), ()) if passed else ():
                self._hook_tensor(handles, tensor, _Hook(_on_tensor, deliver, call, own, ()))
        if passed:
            call.note("pass-through: the output is the input, so grad_input is the gradient of the whole tensor")
        if lost := [path for path in edges.overwritten_views() if path not in shares and path not in passed]:
            call.note(f"grad_input{lost[0]} is lost: the input is a view and the module writes to it in place")

    def _hook_tensor(self, handles: list[Any], tensor: torch.Tensor, hook: Any) -> None:
        if tensor.grad_fn is None:  # a leaf of the user's or the model's: leave it as it was, and soon
            self.session.hook_leaf(tensor, hook)
        else:
            handles.append(tensor.register_hook(hook))

    def _separate(self, call: Call, handles: list[Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Copies of the input tensors that only this module consumes, so that an edit of its share touches no other."""
        deliver, edits = self._deliver(Kind.GRAD_INPUT), self.edits[Kind.GRAD_INPUT]

        def copied(path: str, tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                return tensor
            copy = tensor.clone()
            handles.append(copy.register_hook(_Hook(_on_tensor, deliver, call, path, edits)))
            return copy

        given = rebuild(inputs(args, kwargs), copied, opaque=_same)
        args, kwargs = _put(args, kwargs, given)
        if args and kwargs:
            kwargs = rebuild(kwargs, lambda path, tensor: copied(f"kwargs{path}", tensor), opaque=_same)
        return args, kwargs

    def _deliver(self, kind: Kind) -> Callable[[Call, str, torch.Tensor], None]:
        takers, session = self.takers.get(kind, ()), self.session

        def deliver(call: Call, path: str, gradient: torch.Tensor) -> None:
            if session.closed:
                return
            backward = _graph_task()
            call.info.backwards.add(backward)
            for take in takers:
                take(None, call, (path, gradient, backward))

        return deliver

    def _replay_before(self, args: tuple[Any, ...], kwargs: dict[str, Any], wants_grad: bool) -> None:
        """Recomputation under activation checkpointing, inside backward: no new call, only gradients are of use."""
        edges = Edges(args, kwargs) if wants_grad and torch.is_grad_enabled() else None
        local = self.session.local
        local.replay_stack = (*local.replay_stack, (self, edges))

    def _replay_after(self, output: Any, wants_output: bool) -> None:
        local = self.session.local
        edges = None
        while local.replay_stack:  # early stop leaves modules behind that were entered and not left
            (tap, found), local.replay_stack = local.replay_stack[-1], local.replay_stack[:-1]
            if tap is self:
                edges = found
                break
        node = torch._C._current_autograd_node()
        if not isinstance(node, torch.autograd.function.BackwardCFunction) or self.session.closed:
            return
        number = node._sequence_nr()
        if local.replays[0] != _graph_task():
            local.replays = (_graph_task(), {})
        key = (number, self.layer)
        nth = local.replays[1].get(key, 0)
        later = [ticket for ticket in self.tickets if ticket[0] > number]
        if nth < len(later):
            local.replays[1][key] = nth + 1
            self._hook_gradients(self.session.handles(), self.redeem(later[nth]), output, edges, wants_output)

    def redeem(self, ticket: tuple[int, weakref.ref[Call], int, PassInfo]) -> Call:
        """The call that a ticket stands for, or one like it where nobody keeps the call any more."""
        _, call, index, info = ticket
        return call() or Call(self.layer, index, info)

    def _module_backward(self) -> Callable[..., Any]:
        into, out = self._deliver(Kind.GRAD_INPUT), self._deliver(Kind.GRAD_OUTPUT)
        edits_in, edits_out = self.edits.get(Kind.GRAD_INPUT, ()), self.edits.get(Kind.GRAD_OUTPUT, ())
        session = self.session

        def backward(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
            node = torch._C._current_autograd_node()
            before = [t for t in self.tickets if node is not None and t[0] <= node._sequence_nr()]
            if not before or session.closed:
                return None
            call = self.redeem(before[-1])
            call.needs_grad = True
            if edits_out:
                raise RuntimeError(
                    f"{self.layer.name!r}: torch's module backward hook cannot change grad_output; "
                    'use Probe(..., backward="tensor"), the default, to edit it'
                )
            for path, gradient in _module_paths(grad_output):
                out(call, path, gradient)
            result = grad_input
            for edit in edits_in:
                result = tuple(None if g is None else edit(g) for g in result)
            for path, gradient in _module_paths(result):
                into(call, path, gradient)
            return None if result is grad_input else result

        return backward


def _on_tensor(
    deliver: Callable[[Call, str, torch.Tensor], None],
    call: Call,
    path: str,
    edits: tuple[Callable[[Any], Any], ...],
    gradient: torch.Tensor | None,
) -> torch.Tensor | None:
    if gradient is None:  # a custom Function that returned None
        return None
    edited = gradient
    for edit in edits:
        edited = edit(edited)
    deliver(call, path, edited)
    return None if edited is gradient else edited


class _Share:
    """The gradient that one call hands back to one of its inputs: the sum of what the consuming nodes hand back."""

    __slots__ = ("alone", "call", "deliver", "paths", "sums")

    def __init__(self, deliver: Callable[[Call, str, torch.Tensor], None], call: Call, paths: list[str]) -> None:
        self.deliver = deliver
        self.call = call
        self.paths = paths
        self.alone = True
        self.sums: dict[int, torch.Tensor] = {}

    def collect(self, position: int, grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]) -> None:
        gradient = grad_inputs[position]
        if gradient is None:
            return
        if self.alone:
            for path in self.paths:
                self.deliver(self.call, path, gradient)
            return
        backward = _graph_task()
        if backward in self.sums:
            self.sums[backward] = self.sums[backward] + gradient.detach()
        else:
            # other consumers may never run in this backward, so the sum is complete only at its end
            kept = snapshot(gradient)
            self.sums[backward] = gradient.detach() if kept is None else kept
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self.flush, backward))

    def flush(self, backward: int) -> None:
        total = self.sums.pop(backward, None)
        if total is not None:
            for path in self.paths:
                self.deliver(self.call, path, total)


def _same(value: Any) -> Any:
    return value


def _unview(path: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.requires_grad and tensor._is_view() else tensor


def _module_paths(gradients_: Any) -> list[tuple[str, torch.Tensor]]:
    given = (gradients_,) if isinstance(gradients_, torch.Tensor) else gradients_
    single = len(given) == 1
    return [("" if single else f"[{i}]", g) for i, g in enumerate(given) if g is not None]


def _is_replica(module: nn.Module) -> bool:
    return getattr(module, "_is_replica", False)  # DataParallel's copies share the hook dictionaries


def _put(args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) == 1:
        return (value,), kwargs
    return (args, value) if kwargs and not args else (tuple(value), kwargs)


def _reset_full_flag(module: nn.Module, flag: bool | None) -> None:
    if not module._backward_hooks:
        module._is_full_backward_hook = flag


class _Restore:
    """An undo step that looks like a hook's handle."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self.remove = undo


class Session:
    """All hooks of one probe, and the state they share. It never refers to the probe, which can so be collected."""

    def __init__(self, model: nn.Module, *, backward: str = "tensor", copy_views: bool = False) -> None:
        self.model = model
        self.backward = backward
        self.copy_views = copy_views
        self.local = _Local()
        self.closed = True
        self.step = 0
        self.passes = 0
        self.tag: str | None = None
        self.receivers: list[Receiver] = []
        self.taps: dict[Layer, Tap] = {}
        self.scopes: dict[int, nn.Module] = {}
        self._handles: list[Any] = []
        self._active: set[Pass] = set()
        self._tensor_handles: list[list[Any]] = []
        self._leaves: list[tuple[Any, torch.Tensor, bool]] = []
        self._prune_at = 64
        self._lock = threading.Lock()

    def attach(self, scopes: Iterable[nn.Module]) -> None:
        """Put every hook on; if one cannot be put on, none is left behind."""
        self.scopes = {id(module): module for module in scopes}
        try:
            for module in self.scopes.values():  # first in, so that a pass begins before and ends after our other hooks
                self._handles.append(module.register_forward_pre_hook(_Hook(self._enter)))
            for tap in self.taps.values():
                self._handles.extend(tap.register())
            for module in self.scopes.values():
                self._handles.append(module.register_forward_hook(_Hook(self._leave), always_call=True))
        except BaseException:
            self.detach()
            raise
        self.closed = False

    def detach(self) -> None:
        """Take every module hook off; the hooks on tensors of live graphs stay until `close`."""
        while self._handles:
            self._handles.pop(0).remove()

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
        self.local.current = None
        self.local.replay_stack = ()
        for handles in lists:
            for handle in handles:
                handle.remove()
        self._release_leaves()

    def advance(self) -> None:
        """A step has ended."""
        self.step += 1

    def is_scope(self, module: nn.Module) -> bool:
        return id(module) in self.scopes

    def begin(self, module: nn.Module) -> Pass | None:
        if self.closed:
            return None
        pass_ = Pass(
            module, PassInfo(self.step, self.tag or ("train" if self.model.training else "eval")), self.handles()
        )
        pass_.open = not (torch.jit.is_tracing() or torch.compiler.is_exporting())
        with self._lock:
            self.passes += 1
            self._active.add(pass_)
        self.local.current = pass_
        self._release_leaves()
        if pass_.open:
            for receiver in self.receivers:
                receiver.begin(pass_)
        return pass_

    def end(self, pass_: Pass) -> None:
        self.local.current = None
        pass_.stack.clear()
        with self._lock:
            self._active.discard(pass_)

    def handles(self) -> list[Any]:
        """A new list for the handles of hooks on tensors; lists whose graphs are gone are dropped now and then."""
        fresh: list[Any] = []
        with self._lock:
            self._tensor_handles.append(fresh)
            if len(self._tensor_handles) > self._prune_at:
                live = [[h for h in each if h.hooks_dict_ref() is not None] for each in self._tensor_handles[:-1]]
                # lists of passes still running are appended to by their threads: keep those very lists
                running = {id(pass_.handles) for pass_ in self._active}
                kept = [
                    old if id(old) in running else new for old, new in zip(self._tensor_handles, live, strict=False)
                ]
                self._tensor_handles = [each for each in kept if each or id(each) in running] + [fresh]
                self._prune_at = 2 * len(self._tensor_handles) + 64
        return fresh

    def hook_leaf(self, tensor: torch.Tensor, hook: Any) -> None:
        had_none = tensor._backward_hooks is None
        handle = tensor.register_hook(hook)
        with self._lock:
            self._leaves.append((handle, tensor, had_none))

    def _release_leaves(self) -> None:
        with self._lock:
            leaves_, self._leaves = self._leaves, []
        for handle, tensor, had_none in reversed(leaves_):
            handle.remove()
            if had_none and not tensor._backward_hooks:
                tensor._backward_hooks = None

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        pass_ = self.local.current
        if pass_ is None:
            if _graph_task() == -1 and (id(module) in self.scopes or _is_replica(module)):
                self.begin(module)
        elif pass_.outermost is module or module is self.model:
            # A model that calls itself, or one whose last forward was interrupted (no hook runs on KeyboardInterrupt)?
            if _running(pass_.outermost) < pass_.depth + (pass_.outermost is module):
                self.end(pass_)
                self.begin(module)
            elif pass_.outermost is module:
                pass_.depth += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        pass_ = self.local.current
        if pass_ is not None and pass_.outermost is module:
            error = sys.exc_info()[1]
            if output is None and error is not None:
                self.explain(error, pass_)
            pass_.depth -= 1
            if pass_.depth == 0:
                self.end(pass_)

    def explain(self, error: BaseException | None, pass_: Pass) -> None:
        """Make torch's error about its module backward hook name the module whose output was overwritten."""
        if self.backward != "module" or not isinstance(error, RuntimeError):
            return
        text = str(error)
        if "BackwardHookFunctionBackward" not in text or "inplace" not in text or "Probe(" in text:
            return
        name = next((pass_.storages[key] for key in _storages_near(error) if key in pass_.storages), None)
        who = "a probed module" if name is None else repr(name)
        error.args = (
            f"the output of {who} is modified in place by what follows it, which torch's module backward hook forbids. "
            'Leave backward="module" out: Probe(model) reads the same gradients from tensor hooks, in-place or not. '
            f"(torch: {text})",
        )


def on_step(optimizer: torch.optim.Optimizer, *, after: Callable[[], None]) -> list[Any]:
    """Have `after` called when the optimizer has stepped; the handles. Step hooks only: ``step`` is never wrapped."""
    return [optimizer.register_step_post_hook(_Hook(_after_step, after))]


def _after_step(after: Callable[[], None], optimizer: Any, args: Any, kwargs: Any) -> None:
    after()


def _running(module: nn.Module) -> int:
    """How many calls of `module` are running in this thread, by the interpreter's stack."""
    count = 0
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            count += 1
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
