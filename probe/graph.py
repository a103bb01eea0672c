"""Reading the autograd graph of one module call: which nodes consume an input's gradient edge. Nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

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
        self, outputs: list[tuple[str, torch.Tensor]], module: torch.nn.Module
    ) -> tuple[list[Consumers], list[str]]:
        """Which nodes made during the call hand a gradient back to the inputs.

        They are found by walking from `outputs`, and from tensors that the module or one below it keeps as an attribute
        (an auxiliary loss). A graph that leaves the module in any other way is not seen.

        Returns:
            For each input's edge that is consumed, its paths and ``(node, position among the node's inputs)`` of every
            node that does; and the paths of the inputs that are themselves among the outputs.
        """
        ends = {edge(tensor) for _, tensor in outputs}
        passed = [path for key, paths in self.paths.items() if key in ends for path in paths]
        found: dict[tuple[Any, int], Consumers] = {}
        waiting = [node for node, _ in ends]
        for each in module.modules() if module._modules else (module,):
            kept = [value for value in each.__dict__.values() if type(value) is torch.Tensor]
            waiting.extend(value.grad_fn for value in kept if value.grad_fn is not None)
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            if node._sequence_nr() < self.since:
                continue  # made before the call: what lies beyond is not this module's work
            for position, key in enumerate(node.next_functions):
                after = key[0]
                if after is None:
                    continue
                paths = self.paths.get(key)
                if paths is not None:
                    found.setdefault(key, (paths, []))[1].append((node, position))
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)
        return list(found.values()), passed

    def overwritten_views(self, consumers: list[Consumers], passed: list[str]) -> list[str]:
        """Paths of inputs that are views and were written to in place since, so that the graph left their edge."""
        served = {path for paths, _ in consumers for path in paths} | set(passed)
        return [path for tensor, before, path in self.views if path not in served and version(tensor) != before]


def edge(tensor: torch.Tensor) -> tuple[Any, int]:
    """The node and output number that the tensor's gradient goes to, as a node's ``next_functions`` lists it."""
    node = tensor.grad_fn
    if node is not None:
        return node, tensor.output_nr
    where = torch.autograd.graph.get_gradient_edge(tensor)
    return where.node, where.output_nr


def version(tensor: torch.Tensor) -> int:
    """How often the tensor was written to in place; -1 where torch keeps no count (inference mode)."""
    try:
        return tensor._version
    except RuntimeError:
        return -1
