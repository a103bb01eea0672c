"""`Work`: one step of a model, forward or training, on data that does not change; what every arm runs."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.models import build
from probe.tree import leaves


@dataclass
class Work:
    """A model, its inputs, and how to take a step.

    Arguments:
        model: on its device, in its dtype.
        inputs: a tensor, a tuple of arguments or a dict of keywords.
        optimizer: None: steps are forwards under ``no_grad`` in eval mode. Otherwise training steps.
        compiled: whether steps call ``torch.compile(model)``.
    """

    model: nn.Module
    inputs: Any
    optimizer: torch.optim.Optimizer | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        self.called: Any = torch.compile(self.model) if self.compiled else self.model

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        inputs = (x for _, x in leaves(self.inputs))
        return next(itertools.chain(self.model.parameters(), inputs)).device.type

    def twin(self) -> Work:
        """The same work on a copy of the model.

        Raises:
            ValueError: the model has hooks, which would be copied too: make the copy before an arm is attached.
        """
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.model.modules()):
            raise ValueError("make the twin of a model before hooks are put on it: they would be copied too")
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return Work(model, self.inputs, optimizer, self.compiled)

    def forward(self) -> Any:
        """The model's output."""
        if isinstance(self.inputs, dict):
            return self.called(**self.inputs)
        return self.called(*self.inputs) if isinstance(self.inputs, tuple) else self.called(self.inputs)

    def step(self) -> None:
        """One step."""
        if self.optimizer is None:
            with torch.no_grad():
                self.forward()
            return
        self.optimizer.zero_grad()
        loss(self.forward()).backward()
        self.optimizer.step()


def prepare(spec: str, mode: str, device: str, dtype: torch.dtype, compiled: bool, settings: dict[str, int]) -> Work:
    """The work that a command line asks for: see `benchmarks.models.build`."""
    torch.manual_seed(0)
    model, inputs = build(spec, **settings)
    model = model.to(device, dtype).train(mode == "train")
    inputs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype), inputs
    )
    return Work(model, inputs, _optimizer(model) if mode == "train" else None, compiled)


def loss(output: Any) -> torch.Tensor:
    """A loss that every output has a gradient of: the sum of the mean squares of its floating-point tensors.

    Raises:
        ValueError: no gradient goes through any of them.
    """
    means = [x.float().square().mean() for _, x in leaves(output) if x.is_floating_point()]
    if not any(mean.requires_grad for mean in means):
        raise ValueError("the output has no tensor that a gradient goes through, so nothing trains: --mode forward")
    total = means[0]
    for mean in means[1:]:
        total = total + mean
    return total


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    if not any(True for _ in model.parameters()):
        raise SystemExit("--mode train: the model has no parameters; there is --mode forward")
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def calls(work: Work) -> tuple[list[str], int]:
    """The names of the leaf modules, and how many calls of them there are in a step."""
    names = [name for name, module in work.model.named_modules() if not any(True for _ in module.children())]
    count = 0

    def hook(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [work.model.get_submodule(name).register_forward_hook(hook) for name in names]
    plain = Work(work.model, work.inputs)
    plain.step()
    for handle in handles:
        handle.remove()
    return names, count
