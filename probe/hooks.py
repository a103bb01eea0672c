"""The four hooks: the only file that calls a ``register_*`` of torch.

A `Tap` sits on one layer. Its hooks turn each call of the module into a `Call`, apply edits, and hand what flows to the
takers that receivers offer.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_pre_hook

from probe.calls import Call, Pass, PassInfo, StopForward
from probe.capture import Kind, Layer
from probe.graph import Base, Edges, edge, version
from probe.tree import SOLE, input_leaves, inputs, leaves, rebuild, shape, snapshot, storage_of

graph_task: Callable[[], int] = torch._C._current_graph_task_id
_sequence_number: Callable[[], int] = torch._C._autograd._get_sequence_nr

_tensor_type = torch.Tensor


class Deliver(Protocol):
    """Takes a gradient that came to a call; what it returns replaces it."""

    def __call__(self, call: Call, gradient: torch.Tensor | None, path: str = "") -> torch.Tensor | None: ...



class Passes(Protocol):
    """What a tap needs of the session that it belongs to."""

    backward: str
    closed: bool
    copy_views: bool
    local: Local
    scaler: Any
    stopping: str | None
    versions: bool

    def begin(self, module: nn.Module) -> Pass | None: ...
    def end(self, pass_: Pass, *, whole: bool) -> None: ...
    def explain(self, error: BaseException | None, pass_: Pass) -> None: ...
    def handles(self) -> list[Any]: ...
    def hook_leaf(self, tensor: torch.Tensor, hook: Any) -> None: ...
    def is_scope(self, module: nn.Module) -> bool: ...
    def unscaled(self, gradient: torch.Tensor) -> torch.Tensor: ...


class Hook(functools.partial):  # type: ignore[type-arg]  # a partial: C speed, where __call__ in Python costs a frame
    """A hook that becomes an inert one in a deep copy or a pickle of the model, which then needs no `probe` to load."""

    __torch_unserializable__ = True  # tensors that carry it may be saved: torch would warn otherwise
    flag: bool | None = None  # of a module backward hook: the module's ``_is_full_backward_hook`` before any probe

    @property
    def __name__(self) -> str:  # only torch.jit.script asks
        raise AttributeError("a Probe is attached, and torch.jit.script would compile its hooks; script outside of it")

    def __deepcopy__(self, memo: Any) -> Any:
        return contextlib.nullcontext().__exit__  # takes anything, returns None

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


class Short:
    """The hook of a layer of which only the output is kept: it logs a snapshot, which becomes a call when read.

    Its cost beyond a bare hook is one ``_lazy_clone`` and a handful of attribute reads. Whatever is not a plain tensor
    in a plain pass goes the long way round. The hook is a bound method, as Python calls these without a detour through
    C, and of this name: a pickle of it looks `__exit__` up in what `__reduce__` says, and finds something inert.
    """

    __slots__ = ("_after", "_local", "_owner", "_session", "_taker", "_tap")

    def __init__(self, tap: Tap, after: Callable[..., Any]) -> None:
        self._tap = tap
        self._after = after
        self._session = tap.session
        self._local = tap.session.local
        self._owner: nn.Module | None = None  # the module, once a snapshot shared memory: until somebody writes to it
        self._taker = tap.short
        self._taker.shares = False

    def __exit__(self, module: nn.Module, args: Any, output: Any) -> Any:
        log = self._local.log
        if log is None or module is not self._owner or type(output) is not _tensor_type or graph_task() != -1:
            return self._long(module, args, output)
        try:
            storage = output.untyped_storage()  # first: wrappers of torch.func refuse it
            count = output._version if self._session.versions else -1
            if output.requires_grad:
                output = output.data  # costs less than detach(), as it is no operation; it counts its own versions
            log((self._tap, storage, output._lazy_clone(), count))
        except (RuntimeError, NotImplementedError):
            return self._long(module, args, output)
        return None

    def _long(self, module: nn.Module, args: Any, output: Any) -> Any:
        result = self._after(module, args, output)
        self._owner = self._tap.layer.module if self._taker.shares else None
        return result

    def __deepcopy__(self, memo: Any) -> Any:
        return _InertShort()

    def __reduce__(self) -> Any:
        return contextlib.nullcontext, ()


class _InertShort(Short):
    """What a copy of a short hook is bound to."""

    __slots__ = ()

    def __init__(self) -> None:
        self._local = Local()

    def _long(self, module: nn.Module, args: Any, output: Any) -> None:
        return None


class Local(threading.local):
    current: Pass | None = None
    log: Callable[[Any], None] | None = None  # appends to the current pass's `raw`; None where the short hook must not
    replays: tuple[int, dict[Any, int]] = (-1, {})
    replay_stack: tuple[tuple[Tap, Any], ...] = ()


class Tap:
    """The hooks of one layer: which kinds, to which takers, with which edits."""

    def __init__(self, layer: Layer, session: Passes) -> None:
        self.layer = layer
        self.session = session
        self.takers: dict[Kind, tuple[Callable[..., None], ...]] = {}
        self.edits: dict[Kind, tuple[Callable[[Any], Any], ...]] = {}
        self.stop = 0  # how many times it was asked to end the forward here
        self.tried = False  # whether a whole pass went by while it had hooks, and whether they ever fired
        self.fired = False
        self.short: Any = None
        self.before: Any = None  # the hook before the forward, where it needs one
        # (sequence number, weak call, index, info) of calls whose gradients come back by another road than a closure:
        # torch's module backward hook, and the recomputation of a reentrant checkpoint
        self.tickets: deque[tuple[int, weakref.ref[Call], int, PassInfo]] = deque(maxlen=4096)

    def asks(self, kind: Kind) -> bool:
        return bool(self.takers.get(kind) or self.edits.get(kind))

    def register(self) -> list[Any]:
        """Put the hooks on; the handles."""
        module = self.layer.module
        handles: list[Any] = []
        self.before = None
        by_module = self.session.backward == "module" and (self.asks(Kind.GRAD_OUTPUT) or self.asks(Kind.GRAD_INPUT))
        paired = by_module or self.asks(Kind.INPUT) or self.asks(Kind.GRAD_INPUT)
        try:
            if by_module:
                handles.append(_FullBackwardHandle(module, Hook(self._module_backward())))
            if paired:
                self.before = Hook(self._before(by_module))
                handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
            if paired or self.asks(Kind.OUTPUT) or self.asks(Kind.GRAD_OUTPUT) or self.stop:
                after = self._after(paired, by_module)
                self.short = None if paired or self.stop or self.asks(Kind.GRAD_OUTPUT) else self._only_taker()
                hook = Hook(after) if self.short is None else Short(self, after).__exit__
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

    def _before(self, by_module: bool) -> Callable[..., Any]:
        session, local, layer, owner = self.session, self.session.local, self.layer, self.layer.module
        takers, edits = self.takers.get(Kind.INPUT, ()), self.edits.get(Kind.INPUT, ())
        wants_grad = self.asks(Kind.GRAD_INPUT) and not by_module
        edits_grad = bool(self.edits.get(Kind.GRAD_INPUT)) and not by_module
        replays = wants_grad or (self.asks(Kind.GRAD_OUTPUT) and not by_module)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if kwargs is None:  # a hook that is removed while torch runs the hooks is called as one without keywords
                return None
            if module is not owner and not is_replica(module):
                return None
            edited = False
            if graph_task() != -1:  # recomputation under activation checkpointing: no new call
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
            entry = [self, call, None]
            pass_.stack.append(entry)  # before user code: the forward hook finds it whatever that raises
            for edit in edits:
                args, kwargs = _put(args, kwargs, edit(inputs(args, kwargs)))
                edited = True
            for take in takers:
                take(pass_, call, (args, kwargs))
            if not pass_.open:  # an edit or observer left the probe
                return (args, kwargs) if edited else None
            if wants_grad or by_module:
                call.shape_in = shape(args[0] if len(args) == 1 else inputs(args, kwargs))
                call.shape_kwargs = call.shape_in if kwargs and not args else shape(kwargs) if kwargs else {}
            if edits_grad and torch.is_grad_enabled():
                args, kwargs = self._separate(call, pass_.handles, args, kwargs)
                edited = True
            elif wants_grad and torch.is_grad_enabled():
                entry[2] = Edges(args, kwargs)
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
            if module is not owner and not is_replica(module):
                return None
            if graph_task() != -1:
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
                    error = None if output is not None else raised(module, output)
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
                    result = _without_views(result)
                for take in takers:
                    take(pass_, call, result)
                if not pass_.open:  # an edit or observer left the probe: no hook may be put on a graph now
                    return None if result is output else result
                if hook_gradients is not None:
                    hook_gradients(pass_.handles, call, result, edges)
                elif by_module:
                    call.shape_out = shape(result)
                    pass_.storages.update((s._cdata, layer.name) for _, t in leaves(result) if (s := storage_of(t)))
                if self.stop:
                    session.stopping = layer.name
                    raise StopForward(session, layer.name)
                return None if result is output else result
            finally:
                if pass_.outermost is module and not pass_.stack and pass_.depth == 1 and not session.is_scope(module):
                    session.end(pass_, whole=sys.exc_info()[1] is None)

        return after

    def _gradient_hooks(self, wants_output: bool) -> Callable[[list[Any], Call, Any, Edges | None], None]:
        """The function that puts hooks on the graph of one call: on its outputs, and on what consumes its inputs."""
        at_output = self.on_gradient(Kind.GRAD_OUTPUT) if wants_output else None
        at_input = self.on_gradient(Kind.GRAD_INPUT)
        tensor_type, hook_leaf = torch.Tensor, self.session.hook_leaf
        edited, replaced = bool(self.edits.get(Kind.GRAD_OUTPUT)), bool(self.edits.get(Kind.OUTPUT))

        def hook(handles: list[Any], call: Call, output: Any, edges: Edges | None) -> None:
            if type(output) is tensor_type:
                call.shape_out = SOLE
                tensors = [("", output)] if output.requires_grad else []
            else:
                call.shape_out = shape(output)
                tensors = [(path, tensor) for path, tensor in leaves(output) if tensor.requires_grad]
            if not tensors:
                if not torch.is_grad_enabled() and call.info.grad_enabled:  # perhaps a reentrant checkpoint's first run
                    self.tickets.append((_sequence_number(), weakref.ref(call), call.index, call.info))
                return
            call.needs_grad = True
            if edges is not None and edges.paths:
                call.input_needs_grad = True
                self._hook_inputs(handles, call, tensors, edges, at_input)
            if at_output is not None:
                for path, tensor in tensors:
                    node = tensor.grad_fn
                    if node is None:  # a leaf of the user's or the model's: leave it as it was, and soon
                        hook_leaf(tensor, Hook(at_output, call, path=path))
                        continue
                    deliver: Deliver = at_output
                    if tensor._is_view():
                        view = _View(at_output, tensor, None if replaced else Base.of(tensor, self.layer.module))
                        call.views = (*call.views, (path, view.alias, view.before))
                        deliver = view.at_view
                        if view.base is not None:
                            whole: Any = tensor._base
                            handles.append(whole.grad_fn.register_prehook(Hook(view.at_base, call, path)))
                    # a bound method is one object, a partial two
                    gradient_hook = Hook(deliver, call, path=path) if path else types.MethodType(deliver, call)
                    handles.append(on_gradient_of(tensor, node, gradient_hook))
                    if edited:
                        _run_first(handles[-1])

        return hook

    def _hook_inputs(
        self, handles: list[Any], call: Call, tensors: list[tuple[str, Any]], edges: Edges, deliver: Deliver
    ) -> None:
        consumers, passed = edges.consumers(tensors, self.layer.module)
        for paths, nodes in consumers:
            if paths[0] in passed:
                continue
            if len(nodes) == 1:
                node, position = nodes[0]
                handles.append(node.register_hook(Hook(_collect, deliver, call, paths, position)))
            else:
                share = _Share(deliver, call, paths)
                handles.extend(node.register_hook(Hook(share.collect, position)) for node, position in nodes)
            if len(paths) > 1:
                call.note(f"the same tensor came in as {', '.join(map(repr, paths))}: each shows the gradient of all")
        for _, tensor in tensors if passed else ():
            for path in edges.paths.get(edge(tensor), ()):
                if tensor.grad_fn is None:
                    self.session.hook_leaf(tensor, Hook(deliver, call, path=path))
                else:
                    handles.append(tensor.register_hook(Hook(deliver, call, path=path)))
        if passed:
            call.note("pass-through: the output is the input, so grad_input is the gradient of the whole tensor")
        if edges.views and (lost := edges.overwritten_views(consumers, passed)):
            call.note(f"grad_input{lost[0]} is lost: the input is a view and the module writes to it in place")

    def _separate(self, call: Call, handles: list[Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Copies of the input tensors that only this module consumes, so that an edit of its share touches no other."""
        on_gradient = self.on_gradient(Kind.GRAD_INPUT)
        if not any(tensor.requires_grad for _, tensor in input_leaves(args, kwargs)):
            return args, kwargs

        def copied(path: str, tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                return tensor
            copy = tensor.clone()
            handles.append(copy.register_hook(Hook(on_gradient, call, path=path)))
            return copy

        args, kwargs = _put(args, kwargs, rebuild(inputs(args, kwargs), copied, opaque=same))
        if args and kwargs:
            kwargs = rebuild(kwargs, lambda path, tensor: copied(f"kwargs{path}", tensor), opaque=same)
        return args, kwargs

    def on_gradient(self, kind: Kind) -> Deliver:
        """The function that every gradient of one kind goes through: edits, then takers."""
        takers, edits, session = self.takers.get(kind, ()), self.edits.get(kind, ()), self.session

        def on_gradient(call: Call, gradient: torch.Tensor | None, path: str = "") -> torch.Tensor | None:
            if gradient is None or session.closed:  # None: from a custom Function that returned it
                return None
            edited = gradient
            for edit in edits:
                edited = edit(edited)
            backward = graph_task()
            call.info.backwards.add(backward)
            value = edited if session.scaler is None else session.unscaled(edited)
            for take in takers:
                take(call, path, value, backward)
            return None if edited is gradient else edited

        on_gradient.__torch_unserializable__ = True  # type: ignore[attr-defined]  # as `Hook` has it
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
        if raised(module, output) is None:
            for edit in edits:
                result = edit(result)
            if copies_views:
                result = _without_views(result)
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
        if local.replays[0] != graph_task():
            local.replays = (graph_task(), {})
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
        into, out = self.on_gradient(Kind.GRAD_INPUT), self.on_gradient(Kind.GRAD_OUTPUT)
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
                out(call, gradient, path)
            edited = [into(call, gradient, path) for path, gradient in _module_paths(grad_input)]
            if all(each is None for each in edited):
                return None
            return tuple(old if new is None else new for old, new in zip(grad_input, edited, strict=True))

        return backward


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Have `function` called at the end of the backward pass that is running in this thread."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def after_backward(function: Callable[[], None]) -> None:
    """Have `function` called after the backward pass: after all that is queued in it for its end.

    Such is how DDP finishes averaging gradients, and FSDP hands them over: until then ``p.grad`` is not theirs.
    """
    at_end_of_backward(functools.partial(at_end_of_backward, function))


def _collect(
    deliver: Deliver, call: Call, paths: list[str], position: int, grad_inputs: tuple[Any, ...], _: Any
) -> None:
    """The hook of the only node that consumes an input: what it hands back is the module's whole share."""
    for path in paths:
        deliver(call, grad_inputs[position], path)


class _View:
    """An output that is a view: an in-place write drops its hook, or leaves it what came from uses before the write."""

    __slots__ = ("alias", "base", "before", "deliver")

    def __init__(self, deliver: Deliver, tensor: torch.Tensor, base: Base | None) -> None:
        self.deliver = deliver
        self.alias = tensor.detach()
        self.before = version(tensor)
        self.base = base

    def at_view(self, call: Call, gradient: torch.Tensor | None, path: str = "") -> torch.Tensor | None:
        if version(self.alias) != self.before:
            if self.base is not None:
                return None  # the whole comes to the base
            call.note(f"grad_output{path} can be a part: the output is a view and was written to in place afterwards")
        return self.deliver(call, gradient, path)

    def at_base(self, call: Call, path: str, gradients: tuple[Any, ...]) -> tuple[Any, ...] | None:
        base = self.base
        if base is None or gradients[base.position] is None or version(self.alias) == self.before:
            return None
        whole, gradient = base.as_view(gradients[base.position])
        edited = self.deliver(call, gradient, path)
        if edited is None:
            return None
        gradient.copy_(edited)
        return (*gradients[: base.position], whole, *gradients[base.position + 1 :])


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
        backward, kept = graph_task(), snapshot(gradient)
        if kept is None:
            return
        if backward in self.sums:
            self.sums[backward] = self.sums[backward] + kept
        else:
            # other consumers may never run in this backward, so the sum is complete only at its end
            self.sums[backward] = kept
            at_end_of_backward(functools.partial(self.flush, backward))

    def flush(self, backward: int) -> None:
        total = self.sums.pop(backward, None)
        if total is not None:
            for path in self.paths:
                self.deliver(self.call, total, path)


def _run_first(handle: Any) -> None:
    """Have a tensor's hook run before the others: a gradient comes to a container before the child that it contains."""
    hooks = handle.hooks_dict_ref()
    others = dict(hooks)
    hooks.clear()
    hooks[handle.id] = others.pop(handle.id)
    hooks.update(others)


def same(value: Any) -> Any:
    return value


def _without_views(value: Any) -> Any:
    """The value itself where no tensor is a view that needs a gradient, else a copy of it with clones of those."""
    views = {id(tensor) for _, tensor in leaves(value) if tensor.requires_grad and tensor._is_view()}
    if not views:
        return value
    return rebuild(value, lambda _, tensor: _copied(tensor) if id(tensor) in views else tensor, opaque=same)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is no view, also of a subclass, whose operations hand out views of plain tensors."""
    if type(tensor) is torch.Tensor:
        return tensor.clone()
    with torch._C.DisableTorchFunctionSubclass():
        copy = tensor.clone()
    if type(copy) is not type(tensor):
        copy.__class__ = type(tensor)
        copy.__dict__.update(tensor.__dict__)
    return copy


def _module_paths(gradients: Any) -> list[tuple[str, torch.Tensor | None]]:
    given = (gradients,) if isinstance(gradients, torch.Tensor) else gradients
    return [("" if len(given) == 1 else f"[{i}]", gradient) for i, gradient in enumerate(given)]


def is_replica(module: nn.Module) -> bool:
    return getattr(module, "_is_replica", False)  # DataParallel's copies share the hook dictionaries


def _put(args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) == 1:
        return (value,), kwargs
    return (args, value) if kwargs and not args else (tuple(value), kwargs)


class _FullBackwardHandle:
    """A module backward hook whose removal also gives back the flag that torch leaves, which forbids legacy hooks."""

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        # a hook of another probe knows what the flag was before: probes may leave in any order
        others = [other.flag for other in module._backward_hooks.values() if isinstance(other, Hook)]
        hook.flag = others[0] if others else module._is_full_backward_hook
        self.module = module
        self.hook = hook
        self.handle = module.register_full_backward_hook(hook)

    def remove(self) -> None:
        self.handle.remove()
        if not self.module._backward_hooks:
            self.module._is_full_backward_hook = self.hook.flag


def raised(module: nn.Module, output: Any) -> BaseException | None:
    """The exception that left `module`, in a hook that torch always calls; not one that is handled further out."""
    error = sys.exc_info()[1]
    if output is not None or error is None or error.__traceback__ is None:
        return None
    frame = error.__traceback__.tb_frame
    left = frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
    return error if left else None


def hookable(layers: list[Layer]) -> list[Layer]:
    """The layers without ScriptModules; that nothing is left is an error."""
    found = [layer for layer in layers if not isinstance(layer.module, torch.jit.ScriptModule)]
    if layers and not found:
        names = ", ".join(repr(layer.name) for layer in layers)
        raise TypeError(f"{names}: torch puts no hooks on ScriptModules; probe the model before torch.jit.script")
    return found


def ours(hook: Any) -> bool:
    """Whether a module's hook is a probe's; inert ones, of copies, are not."""
    return isinstance(hook, Hook) or type(getattr(hook, "__self__", None)) is Short


def on_enter(module: nn.Module, function: Callable[..., Any], *, with_kwargs: bool = False) -> Any:
    """Have ``function(module, args)`` (or ``args, kwargs``) called before the module's forward; the handle."""
    return module.register_forward_pre_hook(Hook(function), with_kwargs=with_kwargs)


def on_output(module: nn.Module, function: Callable[..., Any]) -> Any:
    """Have ``function(module, args, output)`` called after the module's forward; the handle."""
    return module.register_forward_hook(Hook(function))


def on_leave(module: nn.Module, function: Callable[..., Any]) -> Any:
    """Have ``function(module, args, output)`` called after the module's forward, also one that raised; the handle."""
    return module.register_forward_hook(Hook(function), always_call=True)


def on_step(optimizer: torch.optim.Optimizer, before: Callable[..., Any], after: Callable[..., Any]) -> list[Any]:
    """Have functions of ``(optimizer, args, kwargs)`` called around every step, which is never wrapped; the handles."""
    return [optimizer.register_step_pre_hook(Hook(before)), optimizer.register_step_post_hook(Hook(after))]


def on_gradient_of(tensor: torch.Tensor, node: Any, hook: Callable[..., Any]) -> Any:
    """Put a hook on a tensor, whose ``grad_fn`` is `node`; the handle."""
    if node is None or tensor._backward_hooks is not None or type(tensor) is not torch.Tensor:
        return tensor.register_hook(hook)
    # The first hook of a tensor is put on as register_hook does it, but with a handle that costs a tenth of torch's.
    hooks = tensor._backward_hooks = OrderedDict()
    node._register_hook_dict(tensor)
    hooks[_FirstHook.id] = hook
    return _FirstHook(hooks)


class _FirstHook(weakref.ref[Any]):
    """The handle of a tensor's first hook: what is of use here of torch's ``RemovableHandle``."""

    __slots__ = ()
    id = -1  # torch counts from 0
    hooks_dict_ref = weakref.ref.__call__

    def remove(self) -> None:
        hooks = self()
        if hooks is not None:
            hooks.pop(self.id, None)


def on_any_call(function: Callable[[nn.Module, tuple[Any, ...]], None]) -> Any:
    """Have ``function(module, args)`` called before the forward of every module of this process; the handle."""
    return _OnAnyCall(function)


class _OnAnyCall:
    """A hook on all calls, and its handle.

    A compiled module warns at each call when there are such hooks, which a script may have made an error. So torch is
    told of others only, for as long as this one is there.
    """

    _own: ClassVar[set[int]] = set()
    _has_any = staticmethod(getattr(torch_module, "_has_any_global_hook", bool))

    def __init__(self, function: Callable[[nn.Module, tuple[Any, ...]], None]) -> None:
        self._handle = torch_module.register_module_forward_pre_hook(function)
        self._own.add(self._handle.id)
        torch_module._has_any_global_hook = self._has_others

    def remove(self) -> None:
        self._handle.remove()
        self._own.discard(self._handle.id)
        if not self._own:
            torch_module._has_any_global_hook = self._has_any

    @classmethod
    def _has_others(cls) -> bool:
        if torch_module._global_forward_pre_hooks.keys() - cls._own:
            return True
        others = "_global_forward_hooks", "_global_backward_hooks", "_global_backward_pre_hooks"
        return any(getattr(torch_module, name, ()) for name in others)


def on_any_step(function: Callable[..., None]) -> Any:
    """Have ``function(optimizer, args, kwargs)`` called before every step of every optimizer; the handle."""
    return register_optimizer_step_pre_hook(function)
