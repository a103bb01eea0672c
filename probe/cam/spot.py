"""Where an explanation looks: a layer, one call of it, and the tensor in what that returned."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from probe import tree
from probe.cam.layout import Layout
from probe.capture import Layer


@dataclass(frozen=True)
class At:
    """A layer, and what cannot be told from its output.

    Arguments:
        layer: its name, or the module.
        layout: how its output is laid out, where the shape does not tell.
        path: which tensor of a nested output, as ``"[0]"`` or ``".hidden"``.
    """

    layer: str | nn.Module
    layout: Layout | None = None
    path: str | None = None


@dataclass(eq=False)
class Spot:
    """A layer in one run: which call of it is meant, and what it returned there."""

    at: At
    layer: Layer
    call: int | None = None
    calls: int = 0
    value: Tensor | None = None  # its output as the layer laid it out; where the graph starts, if there is one

    @property
    def name(self) -> str:
        return self.layer.name

    def reset(self) -> None:
        self.calls, self.value = 0, None


def visitor(spot: Spot, batch: int, graph: bool) -> Callable[..., Any]:
    """The forward hook that notes what a layer returns, and starts the graph there."""

    def visit(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        spot.calls += 1
        if spot.calls - 1 != (spot.call or 0):
            return output
        _, tensor = pick(output, spot, batch)
        if not graph:
            spot.value = tree.snapshot(tensor)
            return output
        torch.set_grad_enabled(True)
        if tensor.requires_grad:
            spot.value = tensor
        else:
            kept = tensor.clone() if tensor.is_inference() else tree.snapshot(tensor)
            spot.value = None if kept is None else kept.requires_grad_()
        return swap(output, tensor, hand_on(spot.value))

    return visit


def hand_on(value: Tensor | None) -> Tensor:
    """A non-leaf with the same values that in-place operations may write to."""
    assert value is not None, "explain does not run under torch.export or a fake mode"
    try:
        return torch._lazy_clone(value)
    except (RuntimeError, NotImplementedError):
        return value.clone()


def pick(output: Any, spot: Spot | None, batch: int | None) -> tuple[str, Tensor]:
    """The tensor in a layer's output that is explained."""
    found = [(path, tensor) for path, tensor in tree.leaves(output) if tensor.is_floating_point()]
    if spot is not None and spot.at.path is not None:
        for path, tensor in found:
            if path == spot.at.path:
                return path, tensor
        raise ValueError(
            f"the output of layer {spot.name!r} has no float tensor at {spot.at.path!r}, but at {[p for p, _ in found]}"
        )
    name = "" if spot is None else spot.name
    spatial = [each for each in found if each[1].dim() > 2 and (batch is None or batch in each[1].shape[:2])] or found
    if not spatial:
        raise ValueError(f"layer {name!r} returns no float tensor; choose another layer")
    if len(spatial) > 1 and isinstance(output, dict) and type(output).__module__ in ("builtins", "collections"):
        paths = ", ".join(f"{path!r} {tuple(tensor.shape)}" for path, tensor in spatial)
        raise ValueError(
            f"layer {name!r} returns several tensors ({paths}): say which, "
            f"layer=cam.At({name!r}, path={spatial[0][0]!r})"
        )
    return spatial[0]


def swap(output: Any, old: Tensor, new: Tensor) -> Any:
    """`output` with one tensor replaced; all other objects in it stay the very same."""
    if output is old:
        return new
    if dataclasses.is_dataclass(output) and not isinstance(output, type) and not isinstance(output, dict):
        changed = copy.copy(output)
        for each in dataclasses.fields(output):
            object.__setattr__(changed, each.name, swap(getattr(output, each.name), old, new))
        return changed
    return pytree.tree_map(lambda leaf: new if leaf is old else leaf, output)


def check_called(spot: Spot) -> None:
    if not spot.calls:
        raise ValueError(
            f"layer {spot.name!r} was not called in this forward: the model skips it, calls its .forward directly, or "
            "uses its weights in a function (nn.MultiheadAttention's out_proj); choose its parent or another layer"
        )
    if spot.call is None and spot.calls > 1:
        raise ValueError(
            f"layer {spot.name!r} was called {spot.calls} times in this forward: say which call to explain, "
            f"call=0 to call={spot.calls - 1}"
        )
    if spot.value is None:
        raise ValueError(
            f"call={spot.call} of layer {spot.name!r}: it was called {spot.calls} times, 0 to {spot.calls - 1}"
        )
