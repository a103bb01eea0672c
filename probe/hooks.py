"""The four hooks: the only file that calls a ``register_*`` of torch.

A `Tap` sits on one layer: it puts on the hooks around the module's forward, which `probe.forward` has, and those on the
graph of each call, through which gradients go to the takers that receivers offer.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_pre_hook

from probe.calls import Call, PassInfo
from probe.capture import Kind, Layer
from probe.forward import (
    NOT_TO_COMPILE,
    After,
    Before,
    ForwardHook,
    HookGradients,
    Passes,
    Short,
    graph_task,
    nothing,
    put,
    same,
)
from probe.graph import Base, Edges, edge, version
from probe.tree import SOLE, input_leaves, inputs, leaves, rebuild, shape, snapshot

Ticket = tuple[int, "weakref.ref[Call]", int, PassInfo]
"""The sequence number of the next node when a call began or ended, the call, its index, and what its pass shares."""


class Deliver(Protocol):
    """Takes a gradient that came to a call; what it returns replaces it."""

    def __call__(self, call: Call, gradient: torch.Tensor | None, path: str = "") -> torch.Tensor | None: ...


class Hook(functools.partial):  # type: ignore[type-arg]  # a partial: C speed, where __call__ in Python costs a frame
    """A hook that becomes an inert one in a deep copy or a pickle of the model, which then needs no `probe` to load."""

    __torch_unserializable__ = True  # tensors that carry it may be saved: torch would warn otherwise
    flag: bool | None = None  # of a module backward hook: the module's ``_is_full_backward_hook`` before any probe

    @property
    def __name__(self) -> str:  # only torch.jit.script asks
        raise AttributeError(NOT_TO_COMPILE)

    def __deepcopy__(self, memo: Any) -> Any:
        return nothing

    def __reduce__(self) -> Any:
        return nothing.__reduce__()


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
        self.before: Any = None  # the hook before the forward, where it needs one
        # of calls whose gradients come back by another road than a closure: torch's module backward hook, and the
        # recomputation of a reentrant checkpoint; and the threads that they are of
        self._tickets: deque[Ticket] = deque(maxlen=4096)
        self._threads: set[int] = set()

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
                self.before = Before(self, by_module).__exit__
                handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
            if paired or self.asks(Kind.OUTPUT) or self.asks(Kind.GRAD_OUTPUT) or self.stop:
                taker = None if paired or self.stop or self.asks(Kind.GRAD_OUTPUT) else self._only_taker()
                if taker is not None:
                    handles.append(module.register_forward_hook(Short(self, taker).__exit__))
                else:
                    after = After(self, paired, by_module, self._gradient_hooks(by_module))
                    handles.append(module.register_forward_hook(after.__exit__, always_call=paired))
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        return handles

    def _only_taker(self) -> Any:
        """What takes outputs, if nothing else does, nothing is edited, and it can take them without a call."""
        takers = self.takers.get(Kind.OUTPUT, ())
        taker = takers[0] if len(takers) == 1 and not self.edits.get(Kind.OUTPUT) else None
        owner = getattr(taker, "__self__", None)
        return owner if hasattr(owner, "settle") else None

    def _gradient_hooks(self, by_module: bool) -> HookGradients | None:
        """The function that puts hooks on the graph of one call: on its outputs, and on what consumes its inputs."""
        wants_output = self.asks(Kind.GRAD_OUTPUT) and not by_module
        if not wants_output and (by_module or not self.asks(Kind.GRAD_INPUT)):
            return None
        at_output = self.on_gradient(Kind.GRAD_OUTPUT) if wants_output else None
        unedited = self.on_gradient(Kind.GRAD_OUTPUT, edit=False)
        at_input = self.on_gradient(Kind.GRAD_INPUT)
        tensor_type, hook_leaf = torch.Tensor, self.session.hook_leaf
        edited, replaced = bool(self.edits.get(Kind.GRAD_OUTPUT)), bool(self.edits.get(Kind.OUTPUT))
        leads = edited or bool(self.edits.get(Kind.GRAD_INPUT))  # an output that is the input has its hook already

        def hook(handles: list[Any], call: Call, output: Any, edges: Edges | None) -> None:
            if type(output) is tensor_type:
                call.shape_out = SOLE
                tensors = [("", output)] if output.requires_grad else []
            else:
                call.shape_out = shape(output)
                tensors = [(path, tensor) for path, tensor in leaves(output) if tensor.requires_grad]
            if not tensors:
                if not torch.is_grad_enabled() and call.info.grad_enabled:  # perhaps a reentrant checkpoint's first run
                    self.ticket(call)
                return
            call.needs_grad = True
            if edges is not None and edges.paths:
                call.input_needs_grad = True
                self._hook_inputs(handles, call, tensors, edges, at_input)
            if at_output is not None:
                places = _places(tensors) if edited else None
                for path, tensor in tensors:
                    deliver: Deliver = at_output
                    if places is not None:
                        paths = places.pop(id(tensor), None)
                        if paths is None:  # returned in an earlier place, too
                            continue
                        if len(paths) > 1:
                            deliver = functools.partial(_everywhere, at_output, unedited, paths[1:])
                    node = tensor.grad_fn
                    if node is None:  # a leaf of the user's or the model's: leave it as it was, and soon
                        hook_leaf(tensor, Hook(deliver, call, path=path))
                        continue
                    if tensor._is_view():
                        view = _View(deliver, tensor, None if replaced else Base.of(tensor, self.layer.module))
                        call.views = (*call.views, (path, view.alias, view.before))
                        deliver = view.at_view
                        if view.base is not None:
                            whole: Any = tensor._base
                            handles.append(whole.grad_fn.register_prehook(Hook(view.at_base, call, path)))
                    # a bound method is one object, a partial two
                    gradient_hook = Hook(deliver, call, path=path) if path else types.MethodType(deliver, call)
                    handles.append(on_gradient_of(tensor, node, gradient_hook))
                    if leads:
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

    def separate(self, call: Call, handles: list[Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
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

        args, kwargs = put(args, kwargs, rebuild(inputs(args, kwargs), copied, opaque=same))
        if args and kwargs:
            kwargs = rebuild(kwargs, lambda path, tensor: copied(f"kwargs{path}", tensor), opaque=same)
        return args, kwargs

    def on_gradient(self, kind: Kind, *, edit: bool = True) -> Deliver:
        """The function that every gradient of one kind goes through: edits, unless they were made, then takers."""
        takers, session = self.takers.get(kind, ()), self.session
        edits = self.edits.get(kind, ()) if edit else ()

        def on_gradient(call: Call, gradient: torch.Tensor | None, path: str = "") -> torch.Tensor | None:
            if gradient is None or session.closed:  # None: from a custom Function that returned it
                return None
            edited = gradient
            for each in edits:
                edited = each(edited)
            backward = graph_task()
            call.info.backwards.add(backward)
            value = edited if session.scaler is None else session.unscaled(edited)
            for take in takers:
                take(call, path, value, backward)
            return None if edited is gradient else edited

        on_gradient.__torch_unserializable__ = True  # type: ignore[attr-defined]  # as `Hook` has it
        return on_gradient

    def replay_before(self, args: tuple[Any, ...], kwargs: dict[str, Any], wants_grad: bool) -> None:
        """Recomputation under activation checkpointing, inside backward: no new call, only gradients are of use."""
        edges = Edges(args, kwargs) if wants_grad and torch.is_grad_enabled() else None
        local = self.session.local
        local.replay_stack = (*local.replay_stack, (self, edges))

    def replay_gradients(self, output: Any, hook_gradients: HookGradients) -> None:
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
        later = list(itertools.takewhile(lambda ticket: ticket[0] > number, self._newest_tickets()))
        if nth < len(later):
            if self.edits.get(Kind.GRAD_INPUT):
                raise RuntimeError(
                    f"{self.layer.name!r}: grad_input cannot be edited under a reentrant checkpoint; "
                    "use checkpoint(..., use_reentrant=False)"
                )
            local.replays[1][key] = nth + 1
            hook_gradients(self.session.handles(), self.redeem(later[-1 - nth]), output, edges)

    def ticket(self, call: Call) -> None:
        """Note a call whose gradients come back by another road than a closure."""
        self._threads.add(call.info.thread)
        self._tickets.append((torch._C._autograd._get_sequence_nr(), weakref.ref(call), call.index, call.info))

    def _newest_tickets(self) -> Iterator[Ticket]:
        """The tickets of this thread's calls, the last first; on a device's thread, which makes no calls, all.

        Sequence numbers go down, as every thread numbers its nodes itself: who looks for some need not see all.
        """
        tickets, thread = list(self._tickets), threading.get_ident()
        if thread in self._threads:
            return (ticket for ticket in reversed(tickets) if ticket[3].thread == thread)
        return reversed(tickets if len(self._threads) == 1 else sorted(tickets, key=operator.itemgetter(0)))

    def redeem(self, ticket: Ticket) -> Call:
        """The call that a ticket stands for, or one like it where nobody keeps the call any more."""
        _, call, index, info = ticket
        return call() or Call(self.layer, index, info)

    def _module_backward(self) -> Callable[..., Any]:
        into, out = self.on_gradient(Kind.GRAD_INPUT), self.on_gradient(Kind.GRAD_OUTPUT)
        refused = bool(self.edits.get(Kind.GRAD_OUTPUT))
        session = self.session

        def backward(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
            node = torch._C._current_autograd_node()
            if node is None or session.closed:
                return None
            ticket = next((each for each in self._newest_tickets() if each[0] <= node._sequence_nr()), None)
            if ticket is None:
                return None
            call = self.redeem(ticket)
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


def _places(tensors: list[tuple[str, torch.Tensor]]) -> dict[int, list[str]]:
    """The paths at which each tensor was returned."""
    places: dict[int, list[str]] = {}
    for path, tensor in tensors:
        places.setdefault(id(tensor), []).append(path)
    return places


def _everywhere(
    deliver: Deliver, unedited: Deliver, others: list[str], call: Call, gradient: torch.Tensor | None, path: str = ""
) -> torch.Tensor | None:
    """The edit of a tensor that was returned in several places: it has one gradient, which each of them shows."""
    edited = deliver(call, gradient, path)
    for other in others:
        unedited(call, gradient if edited is None else edited, other)
    return edited


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

    at_view.__torch_unserializable__ = True  # type: ignore[attr-defined]  # as `Hook` has it

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


def _module_paths(gradients: Any) -> list[tuple[str, torch.Tensor | None]]:
    given = (gradients,) if isinstance(gradients, torch.Tensor) else gradients
    return [("" if len(given) == 1 else f"[{i}]", gradient) for i, gradient in enumerate(given)]


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


def hookable(layers: list[Layer]) -> list[Layer]:
    """The layers without ScriptModules; that nothing is left is an error."""
    found = [layer for layer in layers if not isinstance(layer.module, torch.jit.ScriptModule)]
    if layers and not found:
        names = ", ".join(repr(layer.name) for layer in layers)
        raise TypeError(f"{names}: torch puts no hooks on ScriptModules; probe the model before torch.jit.script")
    return found


def ours(hook: Any) -> bool:
    """Whether a module's hook is a probe's; inert ones, of copies, are not."""
    return isinstance(hook, Hook) or isinstance(getattr(hook, "__self__", None), ForwardHook)


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
