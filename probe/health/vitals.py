"""What is measured of one tensor, and the plain records of a step that checks judge.

Measuring leaves everything on the tensor's own device. A step's records cross to the host in one copy (`Fetch`), after
which every number is a Python float.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from probe import sketch
from probe.sketch import Sketch
from probe.tree import is_fake

COMPARED = 4  # samples of a batch that are compared with each other


@dataclass(slots=True, eq=False)
class Vitals:
    """What was measured of one tensor; of several, where a layer is called very often.

    Arguments:
        head: its `Sketch`, without a histogram.
        dtype: of the tensor.
        shape: of the tensor.
        extra: further numbers, 0-dim or ``[units]`` tensors, by name: ``spread`` is the largest difference between the
            first samples of the batch, relative to the largest value; ``alive`` says of every unit whether it was ever
            unlike zero; ``subnormal`` is the share of the non-zero values that are too small for full precision.
    """

    head: Sketch
    dtype: torch.dtype
    shape: tuple[int, ...]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def nonfinite(self) -> int:
        """How many elements are NaN or Inf."""
        return self.head.nan + self.head.posinf + self.head.neginf

    @property
    def norm(self) -> float:
        """L2 norm of the finite values."""
        return self.head.norm

    @property
    def rms(self) -> float:
        """Root mean square of the finite values; NaN when there is none."""
        return self.head.rms

    @property
    def largest(self) -> float:
        """Largest absolute value among the finite ones; NaN when there is none."""
        return max(abs(self.head.min), abs(self.head.max))

    def get(self, name: str) -> Any:
        """One of `extra`: a float, or a bool array ``[units]``; None where it was not measured."""
        return self.extra.get(name)


def of(tensor: torch.Tensor, extra: Mapping[str, Any] | None = None) -> Vitals | None:
    """Measure one tensor; None where there are no numbers to read."""
    head = sketch.of(tensor, histogram=False)
    if head is None:
        return None
    return Vitals(head, tensor.dtype, () if tensor.is_nested else tuple(tensor.shape), dict(extra or {}))


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether ordinary operations can read it: strided, with values, and not empty."""
    strided = not tensor.is_nested and tensor.layout == torch.strided and not tensor.is_quantized
    return strided and tensor.device.type != "meta" and tensor.numel() > 0 and not is_fake(tensor)


def spread(tensor: torch.Tensor) -> dict[str, Any]:
    """How much the first samples differ, as a share of the largest value; nothing for a batch of one."""
    if not is_plain(tensor) or tensor.dim() == 0 or len(tensor) < 2 or tensor.is_complex():
        return {}
    few = tensor[:COMPARED]
    few = few.float() if few.is_floating_point() and few.dtype != torch.float64 else few.double()
    largest = few.abs().amax()
    return {"spread": (few[1:] - few[:1]).abs().amax() / largest.clamp_min(torch.finfo(few.dtype).tiny)}


def alive(tensor: torch.Tensor, channels_first: bool = False) -> dict[str, Any]:
    """Which units, along dimension 1 (the last one for ``[B, T, F]``), are unlike zero anywhere."""
    if not is_plain(tensor) or tensor.dim() < 2 or not tensor.is_floating_point():
        return {}
    unit = tensor.dim() - 1 if tensor.dim() == 3 and not channels_first else 1
    others = [dim for dim in range(tensor.dim()) if dim != unit]
    return {"alive": (tensor != 0).any(dim=others)}


def subnormal(tensor: torch.Tensor) -> dict[str, Any]:
    """Of float16 values that are not zero, the share below the smallest normal number."""
    if tensor.dtype != torch.float16 or not is_plain(tensor):
        return {}
    size = tensor.abs()
    small = (size < torch.finfo(torch.float16).smallest_normal).sum() - (size == 0).sum()
    return {"subnormal": small / (size != 0).sum().clamp_min(1)}


# -- records -----------------------------------------------------------------------------------------------------------


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
        facts: numbers that only some modules have, by name.
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
        return any(each.head.nan or each.head.posinf for call in self.calls for each in call.outputs.values())

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
        value: before the step.
        grad: as the last backward pass of the step left it; None: there is no gradient.
        update: what the step added.
        facts: ``alike`` is the largest difference between rows of the gradient, relative to its largest value;
            ``unmoved`` the share of elements with a gradient that the step left as they were.
    """

    name: str
    layer: str
    type: type
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    optimizers: int = 0
    groups: tuple[str, ...] = ()
    stepped: bool = False
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

    @property
    def broken(self) -> bool:
        """Whether NaN or Inf came out of a layer, or of the loss."""
        return any(each.broken for each in self.passes) or (self.loss is not None and not math.isfinite(self.loss))

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
        values = [each.head for each in self._vitals] + [step.loss]
        self._copy = sketch.fetch([*values, *(value for each in self._dicts for value in each.values())])

    def result(self) -> Step:
        """The step with its numbers on the host; waits until they are there."""
        values = iter(self._copy.result())
        for each in self._vitals:
            each.head = next(values)
        self._step.loss = _number(next(values))
        for found in self._dicts:
            found.update({key: _number(next(values)) for key in found})
        return self._step


def _number(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.item() if value.dim() == 0 else value.numpy()


def finite(values: Iterable[Vitals]) -> bool:
    """Whether no element of any of the tensors is NaN or Inf."""
    return not any(each.nonfinite for each in values)


def total_norm(values: Iterable[Vitals]) -> float:
    """The L2 norm of all of the tensors together."""
    return math.hypot(*(each.norm for each in values))
