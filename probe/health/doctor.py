"""`Check`, a judgment on the last steps, and `Doctor`, which measures what checks need and asks them."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from probe import sketch
from probe.calls import Call, Pass, PassInfo, Receiver
from probe.capture import Kind, Layer, ParameterKind
from probe.findings import Finding, Findings
from probe.graph import backward_of, version
from probe.health import modules, vitals
from probe.health.vitals import CallRecord, Fetch, ParameterRecord, PassRecord, Step, Vitals
from probe.hooks import after_backward
from probe.observers import Scene, quiet, tensor_taker
from probe.tree import local

Judge = Callable[[Sequence[Step]], Iterable[Finding]]
"""What a check is: from the last observed steps, the newest last, to what is wrong in the newest."""

PASSES = 8  # of a step that are measured with a graph, and
BLIND_PASSES = 2  # without one
FIRST = 4  # steps in which the rows of weights are compared: symmetry is a matter of how they were initialised
CALLS = 16  # of a layer in a pass that are measured one by one; what comes later is added to the last one


@dataclass(frozen=True)
class Check:
    """A health check, for ``Probe(observers=...)`` and ``p.log``: all checks of one probe share their measurements.

    Arguments:
        name: what `Finding.check` says.
        judge: from the last observed steps (the newest last, at most `window`) to findings.
        kinds: what has to be measured for it: a `Kind`, a `ParameterKind`, or a tuple of both.
        window: how many steps it wants to see.
        of_broken: whether it is asked also of steps in which values are NaN or Inf; others would tell consequences.
    """

    name: str
    judge: Judge
    kinds: Any = ()
    window: int = 1
    of_broken: bool = False

    @classmethod
    def receiver(cls, members: Sequence[Check], scene: Scene) -> Receiver:
        """One `Doctor` for all of them."""
        return Doctor(members, scene)


class Doctor(Receiver):
    """Measures tensors in hooks and around optimizer steps, and has checks judge the steps once they are over.

    No hook waits for a device: a step's numbers are copied to the host as it ends, and read when the next one ends.
    What is held is bounded: the records of as many steps as the largest window, and one finding a layer and check.

    Arguments:
        checks: whose findings to gather.
        scene: what to observe, and where to write.
    """

    def __init__(self, checks: Sequence[Check], scene: Scene) -> None:
        self._checks = list(checks)
        self._scene = scene
        wanted: set[Any] = set()
        for check in checks:
            for each in check.kinds if isinstance(check.kinds, tuple) else (check.kinds,):
                wanted.update(each)
        self._kinds = {kind for kind in wanted if isinstance(kind, Kind) and kind in scene.kinds}
        self._wanted = wanted
        self._layers = {*scene.layers, scene.every[0]}
        self._steps: deque[Step] = deque(maxlen=max((check.window for check in checks), default=1))
        self._open: dict[int, _Open] = {}
        self._pending: deque[Fetch] = deque()
        self._found: dict[tuple[str, str], Finding] = {}
        self._examined = 0
        self._blind = 0
        self._last_backward = -1
        self._before: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()
        self._parameters = _parameters(scene)
        self._heads = modules.heads(scene.every)
        self._first_loss: float | None = None

    # -- activations and their gradients -------------------------------------------------------------------------------

    def active(self, step: int) -> bool:
        """Whether the step is observed."""
        return step % self._scene.every_n == 0

    def taker(self, layer: Layer, kind: Kind) -> Callable[..., None] | None:
        if kind not in self._kinds or layer not in self._layers:
            return None
        measure = {
            Kind.INPUT: self._input,
            Kind.OUTPUT: self._output,
            Kind.GRAD_OUTPUT: self._gradient,
            Kind.GRAD_INPUT: self._gradient,
        }[kind]

        def deliver(call: Call, tensors: list[tuple[str, torch.Tensor]]) -> None:
            found = self._record(call, create=kind in Kind.INPUT | Kind.OUTPUT)
            if found is not None:
                with quiet():
                    measure(*found, kind, call, [(path, local(tensor)) for path, tensor in tensors])

        take = tensor_taker(kind, deliver)
        if kind in Kind.INPUT | Kind.OUTPUT:
            return take

        def take_gradient(call: Call, path: str, gradient: torch.Tensor, backward: int) -> None:
            if backward != self._last_backward:
                self._last_backward = backward
                self._begin_backward(call.info)
            take(call, path, gradient, backward)

        return take_gradient

    def begin(self, pass_: Pass) -> None:
        """Count passes in training mode that record no graph."""
        if self.active(pass_.info.step):
            with self._lock:
                blind = pass_.outermost.training and not pass_.info.grad_enabled
                self._blind = self._blind + 1 if blind else 0
                step = self._step(pass_.info.step)
                step.record.blind_passes = max(step.record.blind_passes, self._blind)
                seen = step.of(pass_.info, create=True)
                if seen is not None:
                    seen.record.training = pass_.outermost.training

    def _step(self, number: int) -> _Open:
        if number not in self._open:
            self._open[number] = _Open(Step(number))
        return self._open[number]

    def _record(self, call: Call, *, create: bool) -> tuple[_Pass, CallRecord] | None:
        with self._lock:
            step = self._step(call.info.step) if create else self._open.get(call.info.step)
            pass_ = None if step is None else step.of(call.info, create=create)
            record = None if pass_ is None else pass_.of(call, create=create)
        return None if pass_ is None or record is None else (pass_, record)

    def _input(self, pass_: _Pass, record: CallRecord, kind: Kind, call: Call, tensors: Any) -> None:
        module = call.layer.module
        for path, tensor in tensors:
            known = pass_.known(tensor)
            if known is None:
                extra = {**vitals.spread(tensor), **vitals.alive(tensor, modules.is_1d(module))}
                measured = vitals.of(tensor, extra)
                if measured is not None:
                    pass_.remember(tensor, measured, "")
            else:
                measured, producer = known
                record.fed_by = (*record.fed_by, producer) if producer else record.fed_by
            if measured is not None:
                _put(record.inputs, path, measured)
        record.facts.update(modules.input_facts(module, tensors))

    def _output(self, pass_: _Pass, record: CallRecord, kind: Kind, call: Call, tensors: Any) -> None:
        module = call.layer.module
        for path, tensor in tensors:
            known = pass_.known(tensor)  # the very input, or the output of a layer within
            if known is not None:
                measured: Vitals | None = known[0]
            else:
                extra = {**vitals.spread(tensor), **vitals.alive(tensor, modules.is_1d(module))}
                measured = vitals.of(tensor, {**extra, **vitals.subnormal(tensor)})
            if measured is not None:
                _put(record.outputs, path, measured)
                if record.layer:
                    pass_.remember(tensor, measured, record.layer)
        record.facts.update(modules.output_facts(module, tensors, self._heads.get(id(module))))

    def _gradient(self, pass_: _Pass, record: CallRecord, kind: Kind, call: Call, tensors: Any) -> None:
        for path, tensor in tensors:
            measured = vitals.of(tensor, vitals.subnormal(tensor))
            if measured is not None:
                _put(record.grad_outputs if kind is Kind.GRAD_OUTPUT else record.grad_inputs, path, measured)

    def _begin_backward(self, info: PassInfo) -> None:
        """Note the loss, and have the parameters' gradients read when the backward pass is over."""
        with self._lock:
            step = self._open.get(info.step)
        if step is None:
            return
        step.losses += [each.clone() for each in backward_of(info.thread) if each.numel() == 1]
        after_backward(lambda: self._read_gradients(step))

    # -- parameters ----------------------------------------------------------------------------------------------------

    def _read_gradients(self, step: _Open) -> None:
        """Read gradients as autograd left them: before anybody unscales or clips them."""
        if ParameterKind.GRAD not in self._wanted:
            return
        step.read = True
        with quiet():
            present = [each for each in self._parameters.values() if each.tensor.grad is not None]
            grads = [local(each.tensor.grad.detach()) for each in present]  # type: ignore[union-attr]
            for each, grad, head in zip(present, grads, sketch.of_many(grads, histogram=False), strict=True):
                record = step.parameter(each)
                if head is not None:
                    record.grad = Vitals(head, grad.dtype, tuple(grad.shape), vitals.subnormal(grad))
                if self._examined < FIRST:
                    record.facts.update(modules.row_facts("alike", each.type, grad))

    def before_step(self, optimizer: Any, step: int) -> None:
        """Read rates, and parameters as they are before the update."""
        if not self.active(step):
            return
        with self._lock:
            open_ = self._step(step)
        if not open_.read:
            self._read_gradients(open_)  # no hook fired in a backward pass
        open_.record.stepped = True
        number = self._scene.optimizers.index(optimizer)
        prefix = f"optimizer{number}/" if len(self._scene.optimizers) > 1 else ""
        for at, group in enumerate(optimizer.param_groups):
            rate = group["lr"]
            rate = rate.detach().clone() if isinstance(rate, torch.Tensor) else rate
            open_.record.rates[_group_name(prefix, at, group)] = rate
        with quiet():
            own = self._of(optimizer)
            values = [local(each.tensor.detach()) for each in own]
            for each, value, head in zip(own, values, sketch.of_many(values, histogram=False), strict=True):
                record = open_.parameter(each)
                record.stepped = True
                if head is not None:
                    record.value = Vitals(head, value.dtype, tuple(value.shape))
                if self._examined < FIRST:
                    record.facts.update(modules.row_facts("same", each.type, value))
                self._before[id(each.tensor)] = value.clone()

    def after_step(self, optimizer: Any, step: int) -> None:
        """Read what the update added."""
        if not self._before or not self.active(step):
            return
        with quiet():
            own = [each for each in self._of(optimizer) if id(each.tensor) in self._before]
            updates = [local(each.tensor.detach()) - self._before.pop(id(each.tensor)) for each in own]
            for each, update, head in zip(own, updates, sketch.of_many(updates, histogram=False), strict=True):
                record = self._open[step].parameter(each)
                if head is not None:
                    record.update = Vitals(head, update.dtype, tuple(update.shape))
                record.facts.update(modules.rounding_facts(each.tensor, update))

    def _of(self, optimizer: Any) -> list[_Parameter]:
        own = [id(p) for group in optimizer.param_groups for p in group["params"]]
        return [self._parameters[key] for key in dict.fromkeys(own) if key in self._parameters]

    # -- the end of a step ---------------------------------------------------------------------------------------------

    def end_step(self, step: int, *, stepped: bool) -> None:
        """Send the step's numbers to the host, and have the step before it judged."""
        with self._lock:
            ended = [self._open.pop(number) for number in sorted(self._open) if number <= step]
        for each in ended:
            record = each.close(self._parameters.values())
            if record.passes or record.parameters:
                with quiet():
                    self._pending.append(Fetch(record))
        while len(self._pending) > 1:
            self._judge(self._pending.popleft())

    def close(self) -> None:
        """Judge what is left."""
        while self._pending:
            self._judge(self._pending.popleft())
        self._before.clear()

    def findings(self) -> Findings:
        """What was found so far in the steps that have ended."""
        self.close()
        return Findings(self._found.values(), self._examined)

    def _judge(self, fetch: Fetch) -> None:
        step = fetch.result()
        self._steps.append(step)
        self._examined += 1
        if self._first_loss is None:
            self._first_loss = step.loss
        step.first_loss, step.scaled = self._first_loss, self._scene.scaler is not None
        seen = list(self._steps)
        asked = [check for check in self._checks if check.of_broken or not any(each.broken for each in seen)]
        now = [found for check in asked for found in check.judge(seen[-check.window :])]
        new = [each for each in now if (each.layer, each.check) not in self._found]
        for each in new:
            self._found.setdefault((each.layer, each.check), each)
        writer = self._scene.writer
        if writer is not None:
            writer.add_scalar("health/findings", len(now), step.number)
            for each in new:
                writer.add_text(f"health/{each.layer or 'model'}/{each.check}", _as_text(each), step.number)


class _Parameter:
    """A trainable parameter, its names, and where it is updated."""

    def __init__(self, name: str, layer: Layer, tensor: torch.Tensor, groups: tuple[str, ...]) -> None:
        self.name = name
        self.layer = layer.name
        self.type = type(layer.module)
        self.tensor = tensor
        self.groups = groups


def _group_name(prefix: str, number: int, group: Mapping[str, Any]) -> str:
    return prefix + str(group.get("name", f"group{number}"))


def _parameters(scene: Scene) -> dict[int, _Parameter]:
    """The trainable parameters of the observed layers and of what is below them, by id."""
    groups: dict[int, tuple[str, ...]] = {}
    for number, optimizer in enumerate(scene.optimizers):
        prefix = f"optimizer{number}/" if len(scene.optimizers) > 1 else ""
        for at, group in enumerate(optimizer.param_groups):
            for each in group["params"]:
                groups[id(each)] = (*groups.get(id(each), ()), _group_name(prefix, at, group))
    found: dict[int, _Parameter] = {}
    for layer in scene.every:
        for key, tensor in layer.module._parameters.items():
            if tensor is not None and tensor.requires_grad and id(tensor) not in found:
                name = f"{layer.name}.{key}" if layer.name else key
                found[id(tensor)] = _Parameter(name, layer, tensor, groups.get(id(tensor), ()))
    return found


class _Open:
    """A step that is still going on."""

    def __init__(self, record: Step) -> None:
        self.record = record
        self.passes: dict[int, _Pass] = {}
        self.losses: list[torch.Tensor] = []
        self.read = False

    def of(self, info: PassInfo, *, create: bool) -> _Pass | None:
        found = self.passes.get(id(info))
        if found is None and create:
            alike = sum(each.record.grad == info.grad_enabled for each in self.passes.values())
            if alike < (PASSES if info.grad_enabled else BLIND_PASSES):
                found = self.passes[id(info)] = _Pass(info)
                self.record.passes.append(found.record)
        return found

    def parameter(self, each: _Parameter) -> ParameterRecord:
        found = self.record.parameters.get(each.name)
        if found is None:
            shape, groups = tuple(each.tensor.shape), tuple(dict.fromkeys(each.groups))
            found = ParameterRecord(
                each.name, each.layer, each.type, shape, each.tensor.dtype, len(each.groups), groups
            )
            self.record.parameters[each.name] = found
        return found

    def close(self, parameters: Iterable[_Parameter]) -> Step:
        if self.read or self.record.stepped:
            for each in parameters:
                self.parameter(each).facts["version"] = version(each.tensor)
        if self.losses:
            self.record.loss = torch.stack([each.double().reshape(()) for each in self.losses]).mean()
        return self.record


class _Pass:
    """A pass of an open step, and which of its tensors were measured already."""

    def __init__(self, info: PassInfo) -> None:
        self.info = info  # held, so that its id is not given to another
        self.record = PassRecord(info.mode, info.grad_enabled)
        self.calls: dict[tuple[str, int], CallRecord] = {}
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, Vitals, str]] = {}

    def of(self, call: Call, *, create: bool) -> CallRecord | None:
        key = (call.layer.name, min(call.index, CALLS - 1))
        found = self.calls.get(key)
        if found is None and create:
            module = call.layer.module
            found = CallRecord(call.layer.name, type(module), call.index, len(self.calls), module.training)
            self.calls[key] = found
            self.record.calls.append(found)
        return found

    def known(self, tensor: torch.Tensor) -> tuple[Vitals, str] | None:
        found = self._known.get(id(tensor))
        if found is None or found[0]() is not tensor or found[1] != version(tensor) or found[1] < 0:
            return None
        return found[2], found[3]

    def remember(self, tensor: torch.Tensor, measured: Vitals, producer: str) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), version(tensor), measured, producer)


def _put(place: dict[str, Vitals], path: str, measured: Vitals) -> None:
    before = place.get(path)
    if before is not None:
        measured = Vitals(before.head + measured.head, measured.dtype, measured.shape, before.extra)
    place[path] = measured


def _as_text(found: Finding) -> str:
    return "\n".join(f"    {line}" for line in str(found).splitlines())
