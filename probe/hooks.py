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
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from probe.capture import Kind
from probe.graph import Edges, edge, version
from probe.select import Layer, ancestors
from probe.tree import inputs, leaves, rebuild, shape, snapshot, storage_of

_graph_task: Callable[[], int] = torch._C._current_graph_task_id
_sequence_number: Callable[[], int] = torch._C._autograd._get_sequence_nr

UNSET: Any = type("Unset", (), {"__repr__": lambda self: "<not captured>", "__bool__": lambda self: False})()


class PassInfo:
    """What all calls of a pass share; it refers to none of them, so that no pass is a reference cycle."""

    __slots__ = ("backwards", "grad_enabled", "mode", "step", "thread")

    def __init__(self, step: int, mode: str) -> None:
        self.step = step
        self.mode = mode
        self.grad_enabled = torch.is_grad_enabled()
        self.thread = threading.get_ident()
        self.backwards: set[int] = set()


class Call:
    """One call of one module: its place in the pass, and what the takers put on it."""

    args: Any = UNSET
    kwargs: Any = UNSET
    output: Any = UNSET
    shape_in: Any = UNSET  # what gradients mirror: arguments and output with a slot in place of every tensor
    shape_kwargs: Any = UNSET
    shape_out: Any = UNSET
    raised = ""  # why there is no output
    backwards: tuple[Any, ...] = ()
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

    __slots__ = (
        "__weakref__",
        "calls",
        "depth",
        "events",
        "handles",
        "info",
        "open",
        "outermost",
        "raw",
        "stack",
        "storages",
    )

    def __init__(self, outermost: nn.Module, info: PassInfo, handles: list[Any]) -> None:
        self.outermost = outermost
        self.info = info
        self.handles = handles
        self.depth = 1
        self.open = True
        self.calls: defaultdict[Layer, list[Call]] = defaultdict(list)
        self.events: list[Any] = []  # what the store saw, in order of time
        self.stack: list[tuple[Tap, Call, Any]] = []
        self.storages: dict[int, str] = {}
        self.raw: list[tuple[Tap, torch.UntypedStorage, torch.Tensor, int]] = []

    def settle(self) -> None:
        """Make calls of what the short hooks logged since the last time, in order."""
        if self.raw:
            with _settling:
                entries = self.raw[:]
                del self.raw[: len(entries)]  # the same list: its append is bound in the running thread
                for tap, *entry in entries:
                    tap.short.settle(self, self._call(tap.layer), *entry)

    def call(self, layer: Layer) -> Call:
        self.settle()
        return self._call(layer)

    def _call(self, layer: Layer) -> Call:
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


Deliver = Callable[[Call, str, torch.Tensor | None], torch.Tensor | None]


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

    def begin(self, pass_: Pass) -> None:
        """A pass begins."""

    def before_step(self, optimizer: Any, step: int) -> None:
        """An optimizer is about to step."""

    def after_step(self, optimizer: Any, step: int) -> None:
        """An optimizer has stepped."""

    def end_step(self, step: int, *, stepped: bool) -> None:
        """A step is over; `stepped`: by an optimizer's step."""


class StopForward(Exception):
    """Ends a forward after the layer that ``Probe.stop_after`` named; the probe's ``with`` swallows it."""

    def __init__(self, session: Session, name: str) -> None:
        super().__init__(f"the forward was stopped after layer {name!r}")
        self.session = session


_settling = threading.Lock()


class _Local(threading.local):
    current: Pass | None = None
    log: Callable[[Any], None] | None = None  # appends to the current pass's `raw`; None where the short hook must not
    replays: tuple[int, dict[Any, int]] = (-1, {})
    replay_stack: tuple[tuple[Tap, Any], ...] = ()


class _Hook(functools.partial):  # type: ignore[type-arg]  # a partial: C speed, where __call__ in Python costs a frame
    """A hook that becomes an inert one in a deep copy or a pickle of the model, which then needs no `probe` to load."""

    __torch_unserializable__ = True  # tensors that carry it may be saved: torch would warn otherwise
    flag: bool | None = None  # of a module backward hook: the module's ``_is_full_backward_hook`` before any probe

    def __deepcopy__(self, memo: Any) -> Any:
        return contextlib.nullcontext().__exit__  # takes anything, returns None

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


class Tap:
    """The hooks of one layer: which kinds, to which takers, with which edits."""

    def __init__(self, layer: Layer, session: Session) -> None:
        self.layer = layer
        self.session = session
        self.takers: dict[Kind, tuple[Callable[..., None], ...]] = {}
        self.edits: dict[Kind, tuple[Callable[[Any], Any], ...]] = {}
        self.stop = False
        self.tried = False  # whether a whole pass went by while it had hooks, and whether they ever fired
        self.fired = False
        self.short: Any = None
        # (sequence number, weak call, index, info) of calls whose gradients come back by another road than a closure:
        # torch's module backward hook, and the recomputation of a reentrant checkpoint
        self.tickets: deque[tuple[int, weakref.ref[Call], int, PassInfo]] = deque(maxlen=4096)

    def asks(self, kind: Kind) -> bool:
        return bool(self.takers.get(kind) or self.edits.get(kind))

    def register(self) -> list[Any]:
        """Put the hooks on; the handles."""
        module = self.layer.module
        handles: list[Any] = []
        by_module = self.session.backward == "module" and (self.asks(Kind.GRAD_OUTPUT) or self.asks(Kind.GRAD_INPUT))
        paired = by_module or self.asks(Kind.INPUT) or self.asks(Kind.GRAD_INPUT)
        try:
            if by_module:
                handles.append(_FullBackwardHandle(module, _Hook(self._module_backward())))
            if paired:
                handles.append(module.register_forward_pre_hook(_Hook(self._before(by_module)), with_kwargs=True))
            if paired or self.asks(Kind.OUTPUT) or self.asks(Kind.GRAD_OUTPUT) or self.stop:
                after = self._after(paired, by_module)
                self.short = None if paired or self.stop or self.asks(Kind.GRAD_OUTPUT) else self._only_taker()
                hook = _Hook(after if self.short is None else self._short(after))
                handles.append(module.register_forward_hook(hook, always_call=paired))
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        return handles

    def _only_taker(self) -> Any:
        """The taker of outputs, if it is the only one, nothing is edited, and it can take them without a call."""
        takers = self.takers.get(Kind.OUTPUT, ())
        alone = len(takers) == 1 and not self.edits.get(Kind.OUTPUT)
        return takers[0] if alone and hasattr(takers[0], "settle") else None

    def _short(self, after: Callable[..., Any]) -> Callable[..., Any]:
        """The hook of a layer of which only the output is kept: it logs a snapshot, which becomes a call when read.

        Its whole cost beyond a bare hook is one ``_lazy_clone`` and five attribute reads. Whatever is not a plain
        tensor in a plain pass goes the long way round.
        """
        session, local, owner, taker = self.session, self.session.local, self.layer.module, self.short
        lazy: Callable[[torch.Tensor], torch.Tensor] = torch._lazy_clone
        plain, graph_task = torch.Tensor, _graph_task
        ready = False  # learned on the long way: here snapshots share memory until somebody writes

        def short(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal ready
            log = local.log
            if not ready or log is None or type(output) is not plain or graph_task() != -1:
                result = after(module, args, output)
                ready = taker.shares
                return result
            if module is owner:
                try:
                    storage = output.untyped_storage()  # first: wrappers of torch.func refuse it
                    kept = lazy(output.detach() if output.requires_grad else output)
                    log((self, storage, kept, output._version if session.versions else -1))
                except (RuntimeError, NotImplementedError):
                    return after(module, args, output)
            return None

        return short

    def _before(self, by_module: bool) -> Callable[..., Any]:
        session, local, layer, owner = self.session, self.session.local, self.layer, self.layer.module
        takers, edits = self.takers.get(Kind.INPUT, ()), self.edits.get(Kind.INPUT, ())
        wants_grad = self.asks(Kind.GRAD_INPUT) and not by_module
        edits_grad = bool(self.edits.get(Kind.GRAD_INPUT)) and not by_module
        replays = wants_grad or (self.asks(Kind.GRAD_OUTPUT) and not by_module)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if kwargs is None:  # a hook that is removed while torch runs the hooks is called as one without keywords
                return None
            if module is not owner and not _is_replica(module):
                return None
            edited = False
            if _graph_task() != -1:  # recomputation under activation checkpointing: no new call
                for edit in edits:
                    args, kwargs = _put(args, kwargs, edit(inputs(args, kwargs)))
                    edited = True
                if replays:
                    self._replay_before(args, kwargs, wants_grad)
                return (args, kwargs) if edited else None
            pass_ = local.current or session.begin(module)
            if pass_ is None or not pass_.open:
                return None
            call = pass_.call(layer)
            pass_.stack.append((self, call, None))  # before user code: the forward hook finds it whatever that raises
            for edit in edits:
                args, kwargs = _put(args, kwargs, edit(inputs(args, kwargs)))
                edited = True
            for take in takers:
                take(pass_, call, (args, kwargs))
            if wants_grad or by_module:
                call.shape_in = shape(inputs(args, kwargs))
                call.shape_kwargs = call.shape_in if kwargs and not args else shape(kwargs) if kwargs else {}
            if edits_grad and torch.is_grad_enabled():
                args, kwargs = self._separate(call, pass_.handles, args, kwargs)
                edited = True
            elif wants_grad and torch.is_grad_enabled():
                pass_.stack[-1] = (self, call, Edges(args, kwargs))
            if by_module:
                self.tickets.append((_sequence_number(), weakref.ref(call), call.index, call.info))
            return (args, kwargs) if edited else None

        return before

    def _after(self, paired: bool, by_module: bool) -> Callable[..., Any]:
        session, local, layer, owner = self.session, self.session.local, self.layer, self.layer.module
        takers, edits = self.takers.get(Kind.OUTPUT, ()), self.edits.get(Kind.OUTPUT, ())
        wants_output = self.asks(Kind.GRAD_OUTPUT) and not by_module
        wants_grad = wants_output or (self.asks(Kind.GRAD_INPUT) and not by_module)
        hook_gradients = self._gradient_hooks(wants_output) if wants_grad else None
        copies_views = wants_output and session.copy_views

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if module is not owner and not _is_replica(module):
                return None
            if _graph_task() != -1:
                return self._replay_after(module, output, edits, copies_views, hook_gradients)
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
                    self.fired = True
                    error = _raised(module, output)
                    if error is not None:
                        stopped = isinstance(error, StopForward)
                        call.raised = "stop_after ended its forward" if stopped else "its forward raised an exception"
                        session.explain(error, pass_)
                        return None
                self.fired = True
                result = output
                for edit in edits:
                    result = edit(result)
                if copies_views and torch.is_grad_enabled():
                    result = rebuild(result, _unview, opaque=_same)
                for take in takers:
                    take(pass_, call, result)
                if hook_gradients is not None:
                    hook_gradients(pass_.handles, call, result, edges)
                elif by_module:
                    call.shape_out = shape(result)
                    pass_.storages.update((s._cdata, layer.name) for _, t in leaves(result) if (s := storage_of(t)))
                if self.stop:
                    raise StopForward(session, layer.name)
                return None if result is output else result
            finally:
                if pass_.outermost is module and not pass_.stack and pass_.depth == 1 and not session.is_scope(module):
                    session.end(pass_, whole=sys.exc_info()[1] is None)

        return after

    def _gradient_hooks(self, wants_output: bool) -> Callable[[list[Any], Call, Any, Edges | None], None]:
        """The function that puts hooks on the graph of one call: on its outputs, and on what consumes its inputs."""
        at_output = self._on_gradient(Kind.GRAD_OUTPUT) if wants_output else None
        at_input = self._on_gradient(Kind.GRAD_INPUT)
        tensor_type, hook_leaf = torch.Tensor, self.session.hook_leaf

        def hook(handles: list[Any], call: Call, output: Any, edges: Edges | None) -> None:
            call.shape_out = shape(output)
            if type(output) is tensor_type:
                tensors = [("", output)] if output.requires_grad else []
            else:
                tensors = [(path, tensor) for path, tensor in leaves(output) if tensor.requires_grad]
            if not tensors:
                if not torch.is_grad_enabled() and call.info.grad_enabled:  # perhaps a reentrant checkpoint's first run
                    self.tickets.append((_sequence_number(), weakref.ref(call), call.index, call.info))
                return
            call.needs_grad = True
            if edges is not None and edges.paths:
                self._hook_inputs(handles, call, tensors, edges, at_input)
            if at_output is not None:
                for path, tensor in tensors:
                    if tensor.grad_fn is None:  # a leaf of the user's or the model's: leave it as it was, and soon
                        hook_leaf(tensor, _Hook(at_output, call, path))
                        continue
                    handles.append(tensor.register_hook(_Hook(at_output, call, path)))
                    if tensor._is_view():
                        call.views = (*call.views, (path, tensor.detach(), version(tensor)))

        return hook

    def _hook_inputs(
        self, handles: list[Any], call: Call, tensors: list[tuple[str, Any]], edges: Edges, deliver: Deliver
    ) -> None:
        consumers, passed = edges.consumers(tensors)
        for paths, nodes in consumers:
            if paths[0] in passed:
                continue
            if len(nodes) == 1:
                node, position = nodes[0]
                handles.append(node.register_hook(_Hook(_collect, deliver, call, paths, position)))
            else:
                share = _Share(deliver, call, paths)
                handles.extend(node.register_hook(_Hook(share.collect, position)) for node, position in nodes)
            if len(paths) > 1:
                call.note(f"the same tensor came in as {', '.join(map(repr, paths))}: each shows the gradient of all")
        for _, tensor in tensors if passed else ():
            for path in edges.paths.get(edge(tensor), ()):
                if tensor.grad_fn is None:
                    self.session.hook_leaf(tensor, _Hook(deliver, call, path))
                else:
                    handles.append(tensor.register_hook(_Hook(deliver, call, path)))
        if passed:
            call.note("pass-through: the output is the input, so grad_input is the gradient of the whole tensor")
        if edges.views and (lost := edges.overwritten_views(consumers, passed)):
            call.note(f"grad_input{lost[0]} is lost: the input is a view and the module writes to it in place")

    def _separate(self, call: Call, handles: list[Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Copies of the input tensors that only this module consumes, so that an edit of its share touches no other."""
        on_gradient = self._on_gradient(Kind.GRAD_INPUT)

        def copied(path: str, tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                return tensor
            copy = tensor.clone()
            handles.append(copy.register_hook(_Hook(on_gradient, call, path)))
            return copy

        args, kwargs = _put(args, kwargs, rebuild(inputs(args, kwargs), copied, opaque=_same))
        if args and kwargs:
            kwargs = rebuild(kwargs, lambda path, tensor: copied(f"kwargs{path}", tensor), opaque=_same)
        return args, kwargs

    def _on_gradient(self, kind: Kind) -> Deliver:
        """The function that every gradient of one kind goes through: edits, then takers."""
        takers, edits, session = self.takers.get(kind, ()), self.edits.get(kind, ()), self.session
        graph_task = _graph_task

        def on_gradient(call: Call, path: str, gradient: torch.Tensor | None) -> torch.Tensor | None:
            if gradient is None or session.closed:  # None: from a custom Function that returned it
                return None
            edited = gradient
            for edit in edits:
                edited = edit(edited)
            backward = graph_task()
            call.info.backwards.add(backward)
            for take in takers:
                take(call, path, edited, backward)
            return None if edited is gradient else edited

        return on_gradient

    def _replay_before(self, args: tuple[Any, ...], kwargs: dict[str, Any], wants_grad: bool) -> None:
        """Recomputation under activation checkpointing, inside backward: no new call, only gradients are of use."""
        edges = Edges(args, kwargs) if wants_grad and torch.is_grad_enabled() else None
        local = self.session.local
        local.replay_stack = (*local.replay_stack, (self, edges))

    def _replay_after(
        self,
        module: nn.Module,
        output: Any,
        edits: tuple[Callable[[Any], Any], ...],
        copies_views: bool,
        hook_gradients: Callable[[list[Any], Call, Any, Edges | None], None] | None,
    ) -> Any:
        """The forward hook while a checkpoint recomputes: what flows is edited again, and the gradients are hooked."""
        result = output
        if _raised(module, output) is None:
            for edit in edits:
                result = edit(result)
            if copies_views:
                result = rebuild(result, _unview, opaque=_same)
        if hook_gradients is not None:
            self._replay_gradients(result, hook_gradients)
        return None if result is output else result

    def _replay_gradients(
        self, output: Any, hook_gradients: Callable[[list[Any], Call, Any, Edges | None], None]
    ) -> None:
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
        later = [ticket for ticket in self._own_tickets() if ticket[0] > number]
        if nth < len(later):
            if self.edits.get(Kind.GRAD_INPUT):
                raise RuntimeError(
                    f"{self.layer.name!r}: grad_input cannot be edited under a reentrant checkpoint; "
                    "use checkpoint(..., use_reentrant=False)"
                )
            local.replays[1][key] = nth + 1
            hook_gradients(self.session.handles(), self.redeem(later[nth]), output, edges)

    def _own_tickets(self) -> list[tuple[int, weakref.ref[Call], int, PassInfo]]:
        """The tickets of this thread's passes, as every thread numbers its nodes itself; all on a device's thread."""
        tickets = list(self.tickets)
        return [ticket for ticket in tickets if ticket[3].thread == threading.get_ident()] or tickets

    def redeem(self, ticket: tuple[int, weakref.ref[Call], int, PassInfo]) -> Call:
        """The call that a ticket stands for, or one like it where nobody keeps the call any more."""
        _, call, index, info = ticket
        return call() or Call(self.layer, index, info)

    def _module_backward(self) -> Callable[..., Any]:
        into, out = self._on_gradient(Kind.GRAD_INPUT), self._on_gradient(Kind.GRAD_OUTPUT)
        refused = bool(self.edits.get(Kind.GRAD_OUTPUT))
        session = self.session

        def backward(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
            node = torch._C._current_autograd_node()
            before = [t for t in self._own_tickets() if node is not None and t[0] <= node._sequence_nr()]
            if not before or session.closed:
                return None
            call = self.redeem(before[-1])
            call.needs_grad = True
            if refused:
                raise RuntimeError(
                    f"{self.layer.name!r}: torch's module backward hook cannot change grad_output; "
                    'leave backward="module" out to edit it'
                )
            for path, gradient in _module_paths(grad_output):
                out(call, path, gradient)
            edited = [into(call, path, gradient) for path, gradient in _module_paths(grad_input)]
            if all(each is None for each in edited):
                return None
            return tuple(old if new is None else new for old, new in zip(grad_input, edited, strict=True))

        return backward


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Have `function` called at the end of the backward pass that is running in this thread."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _collect(
    deliver: Deliver, call: Call, paths: list[str], position: int, grad_inputs: tuple[Any, ...], _: Any
) -> None:
    """The hook of the only node that consumes an input: what it hands back is the module's whole share."""
    for path in paths:
        deliver(call, path, grad_inputs[position])


class _Share:
    """The gradient that one call hands back to one of its inputs: the sum of what several nodes hand back."""

    __slots__ = ("call", "deliver", "paths", "sums")

    def __init__(self, deliver: Deliver, call: Call, paths: list[str]) -> None:
        self.deliver = deliver
        self.call = call
        self.paths = paths
        self.sums: dict[int, torch.Tensor] = {}

    def collect(self, position: int, grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]) -> None:
        gradient = grad_inputs[position]
        if gradient is None:
            return
        backward = _graph_task()
        if backward in self.sums:
            self.sums[backward] = self.sums[backward] + gradient.detach()
        else:
            # other consumers may never run in this backward, so the sum is complete only at its end
            kept = snapshot(gradient)
            self.sums[backward] = gradient.detach() if kept is None else kept
            at_end_of_backward(functools.partial(self.flush, backward))

    def flush(self, backward: int) -> None:
        total = self.sums.pop(backward, None)
        if total is not None:
            for path in self.paths:
                self.deliver(self.call, path, total)


def _same(value: Any) -> Any:
    return value


def _unview(path: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.requires_grad and tensor._is_view() else tensor


def _module_paths(gradients: Any) -> list[tuple[str, torch.Tensor | None]]:
    given = (gradients,) if isinstance(gradients, torch.Tensor) else gradients
    return [("" if len(given) == 1 else f"[{i}]", gradient) for i, gradient in enumerate(given)]


def _is_replica(module: nn.Module) -> bool:
    return getattr(module, "_is_replica", False)  # DataParallel's copies share the hook dictionaries


def _put(args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) == 1:
        return (value,), kwargs
    return (args, value) if kwargs and not args else (tuple(value), kwargs)


class _FullBackwardHandle:
    """A module backward hook whose removal also gives back the flag that torch leaves, which forbids legacy hooks."""

    def __init__(self, module: nn.Module, hook: _Hook) -> None:
        # a hook of another probe knows what the flag was before: probes may leave in any order
        others = [other.flag for other in module._backward_hooks.values() if isinstance(other, _Hook)]
        hook.flag = others[0] if others else module._is_full_backward_hook
        self.module = module
        self.hook = hook
        self.handle = module.register_full_backward_hook(hook)

    def remove(self) -> None:
        self.handle.remove()
        if not self.module._backward_hooks:
            self.module._is_full_backward_hook = self.hook.flag


def _raised(module: nn.Module, output: Any) -> BaseException | None:
    """The exception that left `module`, in a hook that torch always calls; not one that is handled further out."""
    error = sys.exc_info()[1]
    if output is not None or error is None or error.__traceback__ is None:
        return None
    frame = error.__traceback__.tb_frame
    left = frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
    return error if left else None


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
        self.whole_passes = 0  # those that no exception ended
        self.versions = True  # False in inference mode, where tensors count no versions
        self.tag: str | None = None
        self.receivers: list[Receiver] = []
        self.optimizers: list[Any] = []
        self._bound: list[bool] = []
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

    def bind(self) -> None:
        """Ask every receiver what it wants in this step, and put the hooks on; if one can't be, none is left behind."""
        self.detach()
        self._bound = [receiver.active(self.step) for receiver in self.receivers]
        active = [receiver for receiver, wants in zip(self.receivers, self._bound, strict=True) if wants]
        for tap in self.taps.values():
            tap.takers = {
                kind: tuple(take for each in active if (take := each.taker(tap.layer, kind)) is not None)
                for kind in Kind
            }
        taps = [tap for tap in self.taps.values() if tap.stop or any(map(tap.asks, Kind))]
        scopes = ancestors(self.model, [tap.layer.module for tap in taps])
        self.scopes = {id(module): module for module in scopes if not isinstance(module, torch.jit.ScriptModule)}
        try:
            for module in self.scopes.values():  # first in, so that a pass begins before and ends after our other hooks
                self._handles.append(module.register_forward_pre_hook(_Hook(self._enter)))
            for tap in taps:
                self._handles.extend(tap.register())
            self._live, self._live_since = taps, self.whole_passes
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
        self.local.current = self.local.log = None
        self.local.replay_stack = ()
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
        self.optimizers.append(optimizer)
        before = optimizer.register_step_pre_hook(_Hook(self._before_step))
        return [before, optimizer.register_step_post_hook(_Hook(self._after_step))]

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for receiver in self.receivers:
            receiver.before_step(optimizer, self.step)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for receiver in self.receivers:
            receiver.after_step(optimizer, self.step)
        if optimizer is self.optimizers[0]:
            self.advance(stepped=True)

    def advance(self, *, stepped: bool = False) -> None:
        """A step has ended: receivers send off what they have, and hooks are put on or taken off for the next one."""
        for receiver in self.receivers:
            receiver.end_step(self.step, stepped=stepped)
        self.step += 1
        if not self.closed and [receiver.active(self.step) for receiver in self.receivers] != self._bound:
            self.bind()

    def is_scope(self, module: nn.Module) -> bool:
        return id(module) in self.scopes

    def begin(self, module: nn.Module) -> Pass | None:
        if self.closed:
            return None
        pass_ = Pass(
            module, PassInfo(self.step, self.tag or ("train" if self.model.training else "eval")), self.handles()
        )
        pass_.open = not (torch._C._is_tracing() or torch.compiler.is_exporting())
        with self._lock:
            self.passes += 1
            self._active.add(pass_)
        self.local.current = pass_
        self._release_leaves(threading.get_ident())
        if pass_.open:
            self.versions = not torch.is_inference_mode_enabled()
            self.local.log = pass_.raw.append
            for receiver in self.receivers:
                receiver.begin(pass_)
        return pass_

    def end(self, pass_: Pass, *, whole: bool) -> None:
        self.whole_passes += whole
        self.local.current = self.local.log = None
        pass_.stack.clear()
        with self._lock:
            self._active.discard(pass_)

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

    def hook_leaf(self, tensor: torch.Tensor, hook: Any) -> None:
        had_none = tensor._backward_hooks is None
        handle = tensor.register_hook(hook)
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
            if _graph_task() == -1 and (id(module) in self.scopes or _is_replica(module)):
                self.begin(module)
        elif pass_.outermost is module or module is self.model:
            # A model that calls itself, or one whose last forward was interrupted (no hook runs on KeyboardInterrupt)?
            if _running(pass_.outermost) < pass_.depth + (pass_.outermost is module):
                self.end(pass_, whole=False)
                self.begin(module)
            elif pass_.outermost is module:
                pass_.depth += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        pass_ = self.local.current
        if pass_ is not None and pass_.outermost is module:
            error = _raised(module, output)
            if error is not None:
                self.explain(error, pass_)
            pass_.depth -= 1
            if pass_.depth == 0:
                self.end(pass_, whole=error is None)

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
