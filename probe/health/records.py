"""The plain records of a step, which checks judge, and `Fetch`, which brings their numbers to the host in one copy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from probe import sketch
from probe.health.vitals import Vitals, finite


@dataclass(slots=True, eq=False)
class CallRecord:
    """One call of one layer. Tensors are by path, as in `Capture`.

    Arguments:
        layer: the layer's name; ``""`` is the root.
        type: the class of the module.
        index: which call of the pass, from 0.
        order: the position of the call among all of the pass, by when it began.
        training: the module's mode.
        fed_by: the layers whose very outputs came in.
        facts: numbers that only some modules have, by name: see `probe.health.modules`.
    """

    layer: str
    type: type
    index: int = 0
    order: int = 0
    training: bool = True
    inputs: dict[str, Vitals] = field(default_factory=dict)
    outputs: dict[str, Vitals] = field(default_factory=dict)
    grad_outputs: dict[str, Vitals] = field(default_factory=dict)
    grad_inputs: dict[str, Vitals] = field(default_factory=dict)
    fed_by: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def vitals(self) -> Iterator[Vitals]:
        for each in (self.inputs, self.outputs, self.grad_outputs, self.grad_inputs):
            yield from each.values()


@dataclass(slots=True, eq=False)
class PassRecord:
    """One forward pass, and the backward passes through it.

    Arguments:
        mode: ``"train"``, ``"eval"``, or what ``Probe.tag`` says.
        grad: whether a graph was recorded.
        training: the mode of the module that was called.
        calls: in the order they began.
    """

    mode: str = "train"
    grad: bool = True
    training: bool = True
    calls: list[CallRecord] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        """Whether NaN or Inf came out of a layer; -Inf alone is taken for a mask."""
        return any(each.nan or each.posinf for call in self.calls for each in call.outputs.values())

    @property
    def root(self) -> CallRecord | None:
        """The call of the model itself."""
        return next((call for call in self.calls if call.layer == ""), None)


@dataclass(slots=True, eq=False)
class ParameterRecord:
    """One parameter around one optimizer step.

    Arguments:
        name: its dotted name.
        layer: the name of the module that owns it.
        type: the class of that module.
        shape: of the parameter.
        dtype: of the parameter.
        optimizers: how often it is listed in the param groups of the probe's optimizers.
        groups: the names of these groups.
        stepped: whether an optimizer that has it stepped.
        first_norm: the L2 norm of its value in the first observed step.
        reached: whether it had a gradient other than zero in any step so far.
        value: before the step.
        grad: as the last backward pass of the step left it, times `Step.scale`; None: there is no gradient.
        update: what the step added.
        facts: ``same`` and ``alike`` are the largest differences between rows of the weight and of its gradient,
            relative to the largest value (in the first steps only); ``unmoved`` the share of elements with a gradient
            that the step left as they were, in half precision; ``version`` how often it was written to in place.
    """

    name: str
    layer: str
    type: type
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    optimizers: int = 0
    groups: tuple[str, ...] = ()
    stepped: bool = False
    first_norm: float = 0.0
    reached: bool = False
    value: Vitals | None = None
    grad: Vitals | None = None
    update: Vitals | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def vitals(self) -> Iterator[Vitals]:
        return (each for each in (self.value, self.grad, self.update) if each is not None)


@dataclass(slots=True, eq=False)
class Step:
    """One observed step: what checks judge.

    Arguments:
        number: the probe's step count.
        passes: the forward passes, a bounded number of them.
        parameters: the trainable parameters, by name.
        rates: the learning rate of every param group, by its name.
        loss: the mean of the numbers that ``backward()`` was called on; None where none was seen.
        stepped: whether an optimizer stepped.
        blind_passes: how many passes in training mode ran without a graph, one after the other.
        first_loss: the loss of the first step that had one.
        scaled: whether the probe has a GradScaler.
        scale: its scale, which is in the parameters' gradients; 1 without.
        broken: whether NaN or Inf came out of a layer, or of the loss.
        poisoned: whether NaN or Inf is in a gradient, and no ``GradScaler`` skipped the update for it.
    """

    number: int = 0
    passes: list[PassRecord] = field(default_factory=list)
    parameters: dict[str, ParameterRecord] = field(default_factory=dict)
    rates: dict[str, Any] = field(default_factory=dict)
    loss: Any = None
    stepped: bool = False
    blind_passes: int = 0
    first_loss: float | None = None
    scaled: bool = False
    scale: Any = 1.0
    broken: bool = False
    poisoned: bool = False

    def trained(self) -> Iterator[PassRecord]:
        """The passes that recorded a graph."""
        return (each for each in self.passes if each.grad)


class Fetch:
    """A step on its way to the host."""

    def __init__(self, step: Step) -> None:
        self._step = step
        calls = [call for each in step.passes for call in each.calls]
        owners: list[Any] = [*calls, *step.parameters.values()]
        vitals = {id(each): each for owner in owners for each in owner.vitals()}  # an input is often an output too
        self._vitals = list(vitals.values())
        self._dicts = [each.extra for each in self._vitals] + [owner.facts for owner in owners] + [step.rates]
        values = [each.head for each in self._vitals] + [step.loss, step.scale]
        self._copy = sketch.fetch([*values, *(value for each in self._dicts for value in each.values())])

    def result(self) -> Step:
        """The step with its numbers on the host; waits until they are there."""
        values = iter(self._copy.result())
        for each in self._vitals:
            each.settle(next(values))
        self._step.loss = _number(next(values))
        self._step.scale = _number(next(values))
        for found in self._dicts:
            found.update({key: _number(next(values)) for key in found})
        step = self._step
        step.broken = any(each.broken for each in step.passes) or not math.isfinite(step.loss or 0.0)
        step.poisoned = _poisoned(step)
        return step


def _poisoned(step: Step) -> bool:
    calls = [call for pass_ in step.trained() for call in pass_.calls]
    flowing = [each for call in calls for each in (*call.grad_outputs.values(), *call.grad_inputs.values())]
    own = [p.grad for p in step.parameters.values() if p.grad is not None]
    if finite(flowing) and finite(own):
        return False
    scaled = step.scaled or any(each.dtype is torch.float16 for each in flowing)
    moved = any(p.update is not None and (p.update.nonfinite or p.update.norm) for p in step.parameters.values())
    return not scaled or (moved and not finite(own))


def _number(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.item() if value.dim() == 0 else value.numpy()
