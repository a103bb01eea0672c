"""The hooks around a module's forward: each call becomes a `Call`, edits are applied, takers get what flows.

Each is a bound method, as Python calls these without a detour through C; all are put on by `probe.hooks`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from probe.calls import Call, Pass, StopForward
from probe.capture import Kind, Layer
from probe.graph import Edges
from probe.tree import inputs, leaves, rebuild, shape, storage_of

graph_task: Callable[[], int] = torch._C._current_graph_task_id
_tensor_type = torch.Tensor

HookGradients = Callable[[list[Any], Call, Any, "Edges | None"], None]


class Passes(Protocol):
    """What a tap needs of the session that it belongs to."""

    backward: str
    closed: bool
    copy_views: bool
    fixed: frozenset[int]
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


class Local(threading.local):
    current: Pass | None = None
    log: Callable[[Any], None] | None = None  # appends to the current pass's `raw`; None where the short hook must not
    replays: tuple[int, dict[Any, int]] = (-1, {})
    replay_stack: tuple[tuple[Any, Any], ...] = ()


NOT_TO_COMPILE = "a Probe is attached, and torch.jit.script would compile its hooks; script outside of it"
nothing = contextlib.nullcontext().__exit__  # takes anything, returns None; its pickle needs the standard library alone


class ForwardHook:
    """What a hook is bound to. A deep copy or a pickle of the model gets something inert in its place.

    A pickle of a method looks its name up in what it is bound to, and so finds a function that does nothing, without
    `probe`; a deep copy, and a pickle by cloudpickle, bind the method itself to it.
    """

    __slots__ = ("_local", "_owner", "_session", "_stands_in", "_tap", "layer")

    def __init__(self, tap: Any) -> None:
        self._tap = tap
        self.layer: Layer = tap.layer
        self._session: Passes = tap.session
        self._local = tap.session.local
        self._owner: nn.Module | None = tap.layer.module
        self._stands_in = is_replica

    def __deepcopy__(self, memo: Any) -> Any:
        return types.SimpleNamespace(**_INERT)

    def __reduce__(self) -> Any:
        return types.SimpleNamespace, (), _INERT


_INERT = {"__exit__": nothing, "_owner": None, "_stands_in": nothing, "_known": None, "_long": nothing}


class Before(ForwardHook):
    """The hook before the forward, where inputs or their gradients are of interest."""

    __slots__ = (
        "_by_module",
        "_edits",
        "_edits_grad",
        "_replays",
        "_takers",
        "_wants_grad",
    )

    def __init__(self, tap: Any, by_module: bool) -> None:
        super().__init__(tap)
        self._by_module = by_module
        self._takers, self._edits = tap.takers.get(Kind.INPUT, ()), tap.edits.get(Kind.INPUT, ())
        self._wants_grad = tap.asks(Kind.GRAD_INPUT) and not by_module
        self._edits_grad = bool(tap.edits.get(Kind.GRAD_INPUT)) and not by_module
        self._replays = self._wants_grad or (tap.asks(Kind.GRAD_OUTPUT) and not by_module)

    def __exit__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None:  # a hook that is removed while torch runs the hooks is called as one without keywords
            return None
        if module is not self._owner and not self._stands_in(module):
            return None
        edited = False
        if graph_task() != -1:  # recomputation under activation checkpointing: no new call
            for edit in self._edits:
                args, kwargs = put(args, kwargs, edit(inputs(args, kwargs)))
                edited = True
            if self._replays:
                self._tap.replay_before(args, kwargs, self._wants_grad)
            return (args, kwargs) if edited else None
        pass_ = self._local.current or self._session.begin(module)
        if pass_ is None or not pass_.open:
            return None
        call = pass_.call(self.layer)
        entry = [self._tap, call, None]
        pass_.stack.append(entry)  # before user code: the forward hook finds it whatever that raises
        for edit in self._edits:
            args, kwargs = put(args, kwargs, edit(inputs(args, kwargs)))
            edited = True
        for take in self._takers:
            take(pass_, call, (args, kwargs))
        if not pass_.open:  # an edit or observer left the probe
            return (args, kwargs) if edited else None
        if self._wants_grad or self._by_module:
            call.shape_in = shape(args[0] if len(args) == 1 else inputs(args, kwargs))
            call.shape_kwargs = call.shape_in if kwargs and not args else shape(kwargs) if kwargs else {}
        if self._edits_grad and torch.is_grad_enabled():
            args, kwargs = self._tap.separate(call, pass_.handles, args, kwargs)
            edited = True
        elif self._wants_grad and torch.is_grad_enabled():
            entry[2] = Edges(args, kwargs)
        if self._by_module:
            self._tap.ticket(call)
        return (args, kwargs) if edited else None


class After(ForwardHook):
    """The hook after the forward.

    Arguments:
        tap: whose.
        paired: whether there is one before the forward.
        by_module: whether torch's module backward hook brings the gradients.
        hook_gradients: puts the hooks on the graph of one call; None where no gradient is of interest.
    """

    __slots__ = (
        "_by_module",
        "_copies_views",
        "_edits",
        "_hook_gradients",
        "_paired",
        "_takers",
    )

    def __init__(self, tap: Any, paired: bool, by_module: bool, hook_gradients: HookGradients | None) -> None:
        super().__init__(tap)
        self._paired = paired
        self._by_module = by_module
        self._hook_gradients = hook_gradients
        self._takers, self._edits = tap.takers.get(Kind.OUTPUT, ()), tap.edits.get(Kind.OUTPUT, ())
        self._copies_views = tap.asks(Kind.GRAD_OUTPUT) and not by_module and tap.session.copy_views

    def __exit__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if module is not self._owner and not self._stands_in(module):
            return None
        if graph_task() != -1:
            return self._again(module, output)
        session, tap = self._session, self._tap
        pass_ = self._local.current
        if pass_ is None and not self._paired:
            pass_ = session.begin(module)
        if pass_ is None or not pass_.open:
            return None
        try:
            edges: Edges | None = None
            if not self._paired:
                call = pass_.call(self.layer)
            else:
                popped = pass_.pop(tap)
                if popped is None:
                    return None  # the hooks were put on while the module ran
                call, edges = popped
                tap.fired = True
                error = None if output is not None else raised(module, output)
                if error is not None:
                    stopped = isinstance(error, StopForward)
                    call.raised = "stop_after ended its forward" if stopped else "its forward raised an exception"
                    session.explain(error, pass_)
                    return None
            tap.fired = True
            result = output
            for edit in self._edits:
                result = edit(result)
            if self._copies_views and torch.is_grad_enabled():
                result = _without_views(result)
            for take in self._takers:
                take(pass_, call, result)
            if not pass_.open:  # an edit or observer left the probe: no hook may be put on a graph now
                return None if result is output else result
            if self._hook_gradients is not None:
                self._hook_gradients(pass_.handles, call, result, edges)
            elif self._by_module:
                call.shape_out = shape(result)
                pass_.storages.update((s._cdata, self.layer.name) for _, t in leaves(result) if (s := storage_of(t)))
            if tap.stop:
                session.stopping = self.layer.name
                raise StopForward(session, self.layer.name)
            return None if result is output else result
        finally:
            if pass_.outermost is module and not pass_.stack and pass_.depth == 1 and not session.is_scope(module):
                session.end(pass_, whole=sys.exc_info()[1] is None)

    def _again(self, module: nn.Module, output: Any) -> Any:
        """While a checkpoint recomputes: what flows is edited again, and the gradients are hooked."""
        result = output
        if raised(module, output) is None:
            for edit in self._edits:
                result = edit(result)
            if self._copies_views:
                result = _without_views(result)
        if self._hook_gradients is not None:
            self._tap.replay_gradients(result, self._hook_gradients)
        return None if result is output else result


class Short(ForwardHook):
    """The hook of a layer of which only the output is kept: it logs a snapshot, which becomes a call when read.

    Its cost beyond a bare hook is one ``_lazy_clone`` and a handful of attribute reads, of few objects. Whatever is not
    a plain tensor in a plain pass goes the long way round.

    Arguments:
        tap: whose.
        taker: the only one of its outputs: it can `settle` what this logs, and says whether a snapshot `shares` memory.
    """

    __slots__ = ("_after", "_fixed", "_known", "taker")

    def __init__(self, tap: Any, taker: Any) -> None:
        super().__init__(tap)
        self._after = After(tap, False, False, None)
        self._fixed = tap.session.fixed
        self._known: nn.Module | None = None  # the module, once a snapshot shared memory: until somebody writes to it
        self.taker = taker
        taker.shares = False

    def __exit__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if module is not self._known:
            return self._long(module, args, output)
        log = self._local.log
        if log is None or type(output) is not _tensor_type or graph_task() != -1:
            return self._long(module, args, output)
        try:
            storage = output.untyped_storage()  # first: wrappers of torch.func refuse it
            if storage._cdata in self._fixed:  # a view of a parameter now, and not before
                return self._long(module, args, output)
            count = output._version if self._session.versions else -1
            if output.requires_grad:
                output = output.data  # costs less than detach(), as it is no operation; it counts its own versions
            log((self, storage, output._lazy_clone(), count))
        except (RuntimeError, NotImplementedError):
            return self._long(module, args, output)
        return None

    def _long(self, module: nn.Module, args: Any, output: Any) -> Any:
        result = self._after.__exit__(module, args, output)
        if module is self._owner:
            self._known = module if self.taker.shares else None
        return result


class _NotToCompile:
    """What torch.jit.script comes upon where it looks for the source of a hook."""

    @property
    def __wrapped__(self) -> Any:
        raise RuntimeError(NOT_TO_COMPILE)


for _hook in (Before.__exit__, After.__exit__, Short.__exit__):
    _hook.__wrapped__ = _NotToCompile()  # type: ignore[union-attr]


def raised(module: nn.Module, output: Any) -> BaseException | None:
    """The exception that left `module`, in a hook that torch always calls; not one that is handled further out."""
    error = sys.exc_info()[1]
    if output is not None or error is None or error.__traceback__ is None:
        return None
    frame = error.__traceback__.tb_frame
    left = frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
    return error if left else None


def is_replica(module: nn.Module) -> bool:
    # DataParallel's copies share the hook dictionaries; a module's own __getattr__ is not to be asked
    return bool(module.__dict__.get("_is_replica"))


def put(args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) == 1:
        return (value,), kwargs
    return (args, value) if kwargs and not args else (tuple(value), kwargs)


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


def same(value: Any) -> Any:
    return value
