"""The book that is kept of a step while it is open: its passes, calls and parameters, and what was measured already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from probe.cache import Known
from probe.calls import Call, PassInfo
from probe.graph import version
from probe.health.records import CallRecord, ParameterRecord, PassRecord, Step
from probe.health.vitals import Vitals
from probe.observers import Scene
from probe.tree import storage_of

PASSES = 8  # of a step that are measured with a graph, and
BLIND_PASSES = 2  # without one
CALLS = 16  # of a layer in a pass that are measured one by one; what comes later is added to the last one


@dataclass(eq=False)
class Parameter:
    """A trainable parameter, its names, and the param groups that list it."""

    name: str
    layer: str
    type: type
    tensor: torch.Tensor
    groups: tuple[str, ...]


def parameters(scene: Scene) -> dict[int, Parameter]:
    """The trainable parameters of the model, by id."""
    listed: dict[int, tuple[str, ...]] = {}
    for optimizer in scene.optimizers:
        for name, group in groups(scene, optimizer).items():
            for each in group["params"]:
                listed[id(each)] = (*listed.get(id(each), ()), name)
    found: dict[int, Parameter] = {}
    for layer in scene.every:
        for key, tensor in layer.module._parameters.items():
            if tensor is not None and tensor.requires_grad and id(tensor) not in found:
                name = f"{layer.name}.{key}" if layer.name else key
                found[id(tensor)] = Parameter(name, layer.name, type(layer.module), tensor, listed.get(id(tensor), ()))
    return found


def groups(scene: Scene, optimizer: torch.optim.Optimizer) -> dict[str, Mapping[str, Any]]:
    """The param groups of an optimizer by name: their own, or ``"group0"``, ...; of several ``"optimizer1/group0"``."""
    several = len(scene.optimizers) > 1
    prefix = f"optimizer{scene.optimizers.index(optimizer)}/" if several else ""
    return {f"{prefix}{each.get('name', f'group{i}')}": each for i, each in enumerate(optimizer.param_groups)}


class OpenStep:
    """A step that is still going on."""

    def __init__(self, number: int, *, scaled: bool) -> None:
        self.record = Step(number, scaled=scaled)
        self._loss: torch.Tensor | None = None  # the sum of so many
        self._losses = 0
        self.has_gradients = False  # whether the parameters' were read
        self._passes: dict[int, OpenPass] = {}

    def of(self, info: PassInfo, *, create: bool) -> OpenPass | None:
        """The pass; None if there are too many."""
        found = self._passes.get(id(info))
        if found is None and create:
            alike = sum(each.record.grad == info.grad_enabled for each in self._passes.values())
            if alike < (PASSES if info.grad_enabled else BLIND_PASSES):
                found = self._passes[id(info)] = OpenPass(info)
                self.record.passes.append(found.record)
        return found

    def add_loss(self, loss: torch.Tensor) -> None:
        """Count in what a backward pass was called on."""
        loss = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss
        self._loss = loss.reshape(()).clone() if self._loss is None else self._loss + loss.reshape(()).to(self._loss)
        self._losses += 1

    def parameter(self, each: Parameter) -> ParameterRecord:
        """The parameter's record, made where there is none yet."""
        found = self.record.parameters.get(each.name)
        if found is None:
            shape, once = tuple(each.tensor.shape), tuple(dict.fromkeys(each.groups))
            found = ParameterRecord(each.name, each.layer, each.type, shape, each.tensor.dtype, len(each.groups), once)
            self.record.parameters[each.name] = found
        return found

    def close(self, known: Iterable[Parameter]) -> Step:
        """The record, complete."""
        if self.has_gradients or self.record.stepped:
            for each in known:
                self.parameter(each).facts["version"] = version(each.tensor)
        for pass_ in self._passes.values():
            pass_.close()
        if self._loss is not None:
            self.record.loss = self._loss / self._losses
        return self.record


class OpenPass:
    """A pass of an open step, and which of its tensors were measured already."""

    def __init__(self, info: PassInfo) -> None:
        self.info = info  # held, so that its id is not given to another
        self.record = PassRecord(info.mode, info.grad_enabled)
        self._calls: dict[tuple[str, int], CallRecord] = {}
        self._known: Known[tuple[Vitals, str]] = Known()
        self._watched: list[tuple[CallRecord, torch.Tensor, int]] = []

    def of(self, call: Call, *, create: bool) -> CallRecord | None:
        """The call's record; that of the last one measured for those after it."""
        key = (call.layer.name, min(call.index, CALLS - 1))
        found = self._calls.get(key)
        if found is None and create:
            module = call.layer.module
            found = CallRecord(call.layer.name, type(module), key[1], len(self._calls), module.training)
            self._calls[key] = found
            self.record.calls.append(found)
        return found

    def known(self, tensor: torch.Tensor) -> tuple[Vitals, str] | None:
        """What was measured of this very tensor, if nobody wrote to it since, and the layer that it came from."""
        return self._known.find(tensor)

    def remember(self, tensor: torch.Tensor, measured: Vitals, producer: str) -> None:
        """Note what was measured of a tensor, and the layer that it came from, for `known`."""
        self._known.keep(tensor, (measured, producer))

    def watch(self, record: CallRecord, tensor: torch.Tensor) -> None:
        """Tell at the end of the step whether somebody wrote to the tensor and somebody still holds it."""
        self._watched.append((record, tensor.detach(), version(tensor)))

    def close(self) -> None:
        """Tell of the watched tensors which were overwritten."""
        for record, alias, before in self._watched:
            storage = storage_of(alias)
            if version(alias) != before and storage is not None and storage_users(storage) > 2:
                record.facts["overwritten"] = version(alias) - before


def storage_users(storage: torch.UntypedStorage) -> int:
    """How many references there are to a storage, `storage` itself and one tensor on it among them."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count
