"""`Doctor`: measures what checks need, in hooks and around optimizer steps, and asks them once a step is over."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from probe import sketch
from probe.calls import Call, Pass, PassInfo, Receiver
from probe.capture import Kind, Layer, ParameterKind
from probe.findings import Finding, Findings
from probe.graph import backward_of
from probe.health import book, modules, vitals
from probe.health.book import OpenPass, OpenStep, Parameter
from probe.health.records import CallRecord, Fetch, Step
from probe.health.rules import Check
from probe.health.vitals import Vitals
from probe.hooks import after_backward, ours
from probe.observers import Scene, quiet, tensor_taker
from probe.tree import local

FIRST = 4  # steps in which the rows of weights are compared: symmetry is a matter of how they were initialised


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
        scene.cache.users += 1
        self._wanted = {kind for check in checks for kinds in check.kinds for kind in kinds}
        self._layers = {*scene.layers, scene.every[0]}
        self._parameters = book.parameters(scene)
        self._heads = modules.heads(scene.every)
        self._steps: deque[Step] = deque(maxlen=max(check.window for check in checks))
        self._open: dict[int, OpenStep] = {}
        self._pending: deque[Fetch] = deque()
        self._found: dict[tuple[str, str], Finding] = {}
        self._examined = 0
        self._first_loss: float | None = None
        self._first_norms: dict[str, float] = {}
        self._reached: set[str] = set()  # parameters that had a gradient
        self._blind = 0
        self._last_backward = -1
        self._before: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    # -- activations and their gradients -------------------------------------------------------------------------------

    def active(self, step: int) -> bool:
        """Whether the step is observed."""
        return step % self._scene.every_n == 0

    def taker(self, layer: Layer, kind: Kind) -> Callable[..., None] | None:
        if kind not in self._wanted or kind not in self._scene.kinds or layer not in self._layers:
            return None
        forward = kind in Kind.INPUT | Kind.OUTPUT
        measure = {Kind.INPUT: self._input, Kind.OUTPUT: self._output}.get(kind, self._gradient)

        def deliver(call: Call, tensors: list[tuple[str, torch.Tensor]]) -> None:
            with self._lock:
                step = self._step(call.info.step) if forward else self._open.get(call.info.step)
                pass_ = None if step is None else step.of(call.info, create=forward)
                record = None if pass_ is None else pass_.of(call, create=forward)
            if pass_ is not None and record is not None:
                with quiet():
                    measure(pass_, record, kind, call, [(path, local(tensor)) for path, tensor in tensors])

        take = tensor_taker(kind, deliver)
        if forward:
            return take

        def take_gradient(call: Call, path: str, gradient: torch.Tensor, backward: int) -> None:
            if backward != self._last_backward:
                self._last_backward = backward
                self._begin_backward(call.info)
            take(call, path, gradient, backward)

        return take_gradient

    def begin(self, pass_: Pass) -> None:
        """Note the mode of a pass, and count those in training mode that record no graph."""
        if self.active(pass_.info.step):
            with self._lock:
                training = pass_.outermost.training
                self._blind = self._blind + 1 if training and not pass_.info.grad_enabled else 0
                step = self._step(pass_.info.step)
                step.record.blind_passes = max(step.record.blind_passes, self._blind)
                begun = step.of(pass_.info, create=True)
                if begun is not None:
                    begun.record.training = training

    def _step(self, number: int) -> OpenStep:
        if number not in self._open:
            self._open[number] = OpenStep(number, scaled=self._scene.scaler is not None)
        return self._open[number]

    def _input(self, pass_: OpenPass, record: CallRecord, kind: Kind, call: Call, tensors: Any) -> None:
        module = call.layer.module
        for path, tensor in tensors:
            known = pass_.known(tensor)
            if known is not None:
                measured: Vitals | None = known[0]
                record.fed_by += (known[1],) if known[1] else ()
            else:
                measured = self._flowing(tensor, call, kind)
                if measured is not None:
                    pass_.remember(tensor, measured, "")
            _put(record.inputs, path, measured)
        record.facts.update(modules.input_facts(module, tensors))

    def _output(self, pass_: OpenPass, record: CallRecord, kind: Kind, call: Call, tensors: Any) -> None:
        module = call.layer.module
        watched = bool(record.layer) and any(not ours(each) for each in module._forward_hooks.values())
        for path, tensor in tensors:
            known = pass_.known(tensor)  # the very input, or the output of a layer within
            if known is not None:
                measured: Vitals | None = known[0]
            else:
                measured = self._flowing(tensor, call, kind)
            _put(record.outputs, path, measured)
            if measured is not None and record.layer:
                pass_.remember(tensor, measured, record.layer)
            if watched:
                pass_.watch(record, tensor)
        record.facts.update(modules.output_facts(module, tensors, self._heads.get(id(module))))

    def _gradient(self, pass_: OpenPass, record: CallRecord, kind: Kind, call: Call, tensors: Any) -> None:
        for path, tensor in tensors:
            place = record.grad_outputs if kind is Kind.GRAD_OUTPUT else record.grad_inputs
            head = self._scene.cache.sketch(tensor, (call, kind), histogram=False)
            _put(place, path, vitals.of(tensor, vitals.subnormal(tensor), head))

    def _flowing(self, tensor: torch.Tensor, call: Call, kind: Kind) -> Vitals | None:
        """Measure an input or an output."""
        head = self._scene.cache.sketch(tensor, (call, kind), histogram=False)
        alive = vitals.alive(tensor, head, modules.is_1d(call.layer.module))
        return vitals.of(tensor, {**vitals.spread(tensor), **alive}, head)

    def _begin_backward(self, info: PassInfo) -> None:
        """Note the loss, and have the parameters' gradients read when the backward pass is over."""
        with self._lock:
            step = self._open.get(info.step)
        if step is not None:
            scale = getattr(self._scene.scaler, "_scale", None)
            for loss in map(local, backward_of(info.thread)):
                if loss.numel() == 1:
                    step.add_loss(loss if scale is None else loss / scale.to(loss.device))
            after_backward(lambda: self._read_gradients(step))

    # -- parameters ----------------------------------------------------------------------------------------------------

    def _read_gradients(self, step: OpenStep) -> None:
        """Read gradients as autograd left them: before anybody unscales or clips them."""
        if ParameterKind.GRAD not in self._wanted:
            return
        step.has_gradients = True
        scale = getattr(self._scene.scaler, "_scale", None)
        step.record.scale = 1.0 if scale is None else scale.clone()
        grads = {each: each.tensor.grad for each in self._parameters.values() if each.tensor.grad is not None}
        with quiet():
            for each, grad, head in self._heads_of(grads):
                record = step.parameter(each)
                record.grad = None if head is None else Vitals(head, grad.dtype, tuple(grad.shape), {})
                if self._examined < FIRST:
                    record.facts.update(modules.row_facts("alike", each.type, grad))

    def before_step(self, optimizer: Any, step: int) -> None:
        """Read rates, and parameters as they are before the update."""
        if not self.active(step):
            return
        with self._lock:
            begun = self._step(step)
        begun.record.stepped = True
        if not begun.has_gradients:  # no gradient came to a hook
            self._read_gradients(begun)
        for name, group in book.groups(self._scene, optimizer).items():
            rate = group["lr"]
            begun.record.rates[name] = rate.detach().clone() if isinstance(rate, torch.Tensor) else rate
        own = self._of(optimizer)
        for each in own:
            begun.parameter(each).stepped = True
        with quiet():
            if ParameterKind.VALUE in self._wanted:
                for each, value, head in self._heads_of({each: each.tensor for each in own}):
                    record = begun.parameter(each)
                    record.value = None if head is None else Vitals(head, value.dtype, tuple(value.shape), {})
                    if self._examined < FIRST:
                        record.facts.update(modules.row_facts("same", each.type, value))
            if ParameterKind.UPDATE in self._wanted:
                self._before = {id(each.tensor): self._scene.cache.copy(each.tensor) for each in own}

    def after_step(self, optimizer: Any, step: int) -> None:
        """Read what the update added."""
        before, self._before = self._before, {}
        if before and step in self._open:
            with quiet():
                own = [each for each in self._of(optimizer) if id(each.tensor) in before]
                updates = {each: self._scene.cache.update(each.tensor, before.pop(id(each.tensor))) for each in own}
                for each, update, head in self._heads_of(updates):
                    record = self._open[step].parameter(each)
                    record.update = None if head is None else Vitals(head, update.dtype, tuple(update.shape), {})
                    record.facts.update(modules.rounding_facts(each.tensor, update))

    def _heads_of(
        self, tensors: dict[Parameter, torch.Tensor]
    ) -> list[tuple[Parameter, torch.Tensor, sketch.Sketch | None]]:
        """Each with its sketch, in few launches."""
        values = [local(each.detach()) for each in tensors.values()]
        heads = self._scene.cache.sketches([*tensors.values()], values, histogram=False)
        return list(zip(tensors, values, heads, strict=True))

    def _of(self, optimizer: Any) -> list[Parameter]:
        own = dict.fromkeys(id(p) for group in optimizer.param_groups for p in group["params"])
        return [self._parameters[key] for key in own if key in self._parameters]

    # -- the end of a step ---------------------------------------------------------------------------------------------

    def end_step(self, step: int, *, stepped: bool) -> None:
        """Send the step's numbers to the host, and have the step before it judged."""
        with self._lock:
            ended = [self._open.pop(number) for number in sorted(self._open) if number <= step]
        if ended:
            self._scene.cache.forget()
        for each in ended:
            with quiet():
                self._pending.append(Fetch(each.close(self._parameters.values())))
        while len(self._pending) > 1:
            self._judge(self._pending.popleft())

    def close(self) -> None:
        """Judge what is left."""
        while self._pending:
            self._judge(self._pending.popleft())

    def findings(self) -> Findings:
        """What was found so far in the steps that have ended; waits for the device."""
        self.close()
        return Findings(self._found.values(), self._examined)

    def _judge(self, fetch: Fetch) -> None:
        step = fetch.result()
        self._steps.append(step)
        self._examined += step.stepped or not self._scene.optimizers or any(step.trained())
        if self._first_loss is None:
            self._first_loss = step.loss
        step.first_loss = self._first_loss
        for name, p in step.parameters.items():
            p.first_norm = self._first_norms.setdefault(name, p.value.norm) if p.value is not None else 0.0
            if p.grad is not None and p.grad.zeros < p.grad.count:
                self._reached.add(name)
            p.reached = name in self._reached
        now = [found for check in self._checks for found in self._ask(check)]
        new = [each for each in now if (each.layer, each.check) not in self._found]
        for each in new:
            self._found.setdefault((each.layer, each.check), each)
        writer = self._scene.writer
        if writer is not None:
            writer.add_scalar("health/findings", len(now), step.number)
            for each in new:
                writer.add_text(f"health/{each.layer or 'model'}/{each.check}", _as_text(each), step.number)

    def _ask(self, check: Check) -> list[Finding]:
        seen = list(self._steps)[-check.window :]
        ripe = check.eager or len(seen) == check.window
        sound = check.of_broken or not any(each.broken for each in seen)
        return list(check.judge(seen)) if ripe and sound else []


def _put(place: dict[str, Vitals], path: str, measured: Vitals | None) -> None:
    """Add what was measured to what the same place had before."""
    if measured is None:
        return
    before = place.get(path)
    if before is not None and before.head is not None and measured.head is not None:
        measured = Vitals(before.head + measured.head, measured.dtype, measured.shape, before.extra)
    place[path] = measured


def _as_text(found: Finding) -> str:
    """As Markdown that keeps the lines."""
    return "\n".join(f"    {line}" for line in str(found).splitlines())
