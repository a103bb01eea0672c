"""Reading the autograd graph of one module call: which nodes take its inputs in, and where its outputs come from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from probe.tree import input_leaves

Consumers = tuple[list[str], list[tuple[Any, int]]]


class Edges:
    """The gradient edges of a call's inputs, noted before the module runs.

    Arguments of `__init__`: the call's ``args`` and ``kwargs``. Inputs that need no gradient have no edge.
    """

    __slots__ = ("paths", "since", "views")

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.paths: dict[tuple[Any, int], list[str]] = {}
        self.views: list[tuple[torch.Tensor, int, str]] = []
        for path, tensor in input_leaves(args, kwargs):
            if tensor.requires_grad:
                self.paths.setdefault(edge(tensor), []).append(path)
                if tensor._is_view():
                    self.views.append((tensor, version(tensor), path))
        self.since = torch._C._autograd._get_sequence_nr()  # nodes made from now on have this number or a higher one

    def consumers(
        self, outputs: list[tuple[str, torch.Tensor]], module: nn.Module
    ) -> tuple[list[Consumers], list[str]]:
        """Which nodes made during the call hand a gradient back to the inputs.

        They are found by walking from `outputs`, and from tensors that the module or one below it keeps as an attribute
        (an auxiliary loss). A graph that leaves the module in any other way is not seen.

        Returns:
            For each input's edge that is consumed, its paths and ``(node, position among the node's inputs)`` of every
            node that does; and the paths of the inputs that are themselves among the outputs.
        """
        own, since, tensor_type, accumulate = self.paths, self.since, torch.Tensor, _Accumulate
        ends = {edge(tensor) for _, tensor in outputs}
        passed = [path for key, paths in own.items() if key in ends for path in paths]
        found: dict[tuple[Any, int], Consumers] = {}
        waiting = [node for node, _ in ends]
        for each in module.modules() if module._modules else (module,):
            values = each.__dict__.values()
            if tensor_type in map(type, values):
                kept = [value for value in values if type(value) is tensor_type]
                waiting.extend(value.grad_fn for value in kept if value.grad_fn is not None)
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            if node._sequence_nr() < since:
                continue  # made before the call: what lies beyond is not this module's work
            for position, key in enumerate(node.next_functions):
                if key in own:
                    found.setdefault(key, (own[key], []))[1].append((node, position))
                    continue
                after = key[0]
                # nothing lies beyond a leaf, or where no gradient goes
                if after is not None and type(after) is not accumulate and after not in seen:
                    seen.add(after)
                    waiting.append(after)
        return list(found.values()), passed

    def overwritten_views(self, consumers: list[Consumers], passed: list[str]) -> list[str]:
        """Paths of inputs that are views and were written to in place since, so that the graph left their edge."""
        served = {path for paths, _ in consumers for path in paths} | set(passed)
        return [path for tensor, before, path in self.views if path not in served and version(tensor) != before]


# What these return can be a view of a tensor that nobody else ever sees: of a product before it got its shape back, of
# a batch of one.
_OWN_BASE = frozenset(
    each.forward
    for each in (
        nn.Linear,
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        *(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell),
        nn.MultiheadAttention,
    )
)


class Base:
    """The tensor that an output is a view of, where only the module that made it ever sees it.

    An in-place write to the view drops the view's hooks, and leaves the gradient that comes to the base as it was: the
    gradient at the view before the write.
    """

    __slots__ = ("geometry", "position", "size", "strides")  # not its node, which a hook on it must not hold

    def __init__(self, view: torch.Tensor, base: torch.Tensor) -> None:
        self.geometry = view.shape, view.stride(), view.storage_offset() - base.storage_offset()
        self.size, self.strides = base.shape, base.stride()
        self.position = base.output_nr

    @classmethod
    def of(cls, view: torch.Tensor, module: nn.Module) -> Base | None:
        """The base of a view that `module` returned; None where it is not known to be the module's own."""
        base = view._base
        if type(module).forward not in _OWN_BASE or "forward" in module.__dict__ or base is None:
            return None
        return None if base.grad_fn is None or base.numel() != view.numel() else cls(view, base)

    def as_view(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the gradient at the base, and the view of it that is the gradient at the output."""
        copy = torch.empty_strided(self.size, self.strides, dtype=gradient.dtype, device=gradient.device)
        copy.copy_(gradient)
        return copy, copy.as_strided(*self.geometry)


_Accumulate = type(torch.autograd.graph.get_gradient_edge(torch.empty(0, requires_grad=True)).node)


def edge(tensor: torch.Tensor) -> tuple[Any, int]:
    """The node and output number that the tensor's gradient goes to, as a node's ``next_functions`` lists it."""
    node = tensor.grad_fn
    if node is not None:
        return node, tensor.output_nr
    where = torch.autograd.graph.get_gradient_edge(tensor)
    return where.node, where.output_nr


def version(tensor: torch.Tensor) -> int:
    """How often the tensor was written to in place; -1 where torch keeps no count (inference mode, ``vmap``)."""
    try:
        return -1 if torch._C._functorch.is_functorch_wrapped_tensor(tensor) else tensor._version
    except RuntimeError:
        return -1


def backward_of(thread: int) -> list[torch.Tensor]:
    """The tensors that the running backward pass was called on, detached; none where that cannot be seen.

    Autograd tells a hook nothing of what the user called ``backward()`` on, and a loss is often no module's output. It
    is a local variable of ``torch.autograd.backward``, which waits on the stack of this thread or, where a device's
    thread runs the hooks, of the one that called it.

    Arguments:
        thread: the identifier of the thread whose forward it was.
    """
    for frame in (sys._getframe(), sys._current_frames().get(thread)):
        each: FrameType | None = frame
        while each is not None:
            if each.f_code is torch.autograd.backward.__code__:
                given = each.f_locals.get("tensors", ())
                tensors = (given,) if isinstance(given, torch.Tensor) else given
                return [tensor.detach() for tensor in tensors if isinstance(tensor, torch.Tensor)]
            each = each.f_back
    return []


def in_reentrant_checkpoint() -> bool:
    """Whether this thread runs the first forward of a reentrant checkpoint.

    Gradients are disabled in it, and come all the same, when the checkpoint runs it again in the backward pass.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _FIRST_FORWARD:
        frame = frame.f_back
    return frame is not None


_FIRST_FORWARD = torch.utils.checkpoint.CheckpointFunction.forward.__code__
