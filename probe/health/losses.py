"""Checks of the loss: that it depends on the input, and who moved first when it jumps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from probe.capture import Kind, ParameterKind
from probe.findings import Finding, Severity
from probe.health.doctor import Check
from probe.health.values import calls_of, every_step, shown
from probe.health.vitals import Step, total_norm


def independent(*, spread: float = 1e-6, window: int = 3) -> Check:
    """A loss that does not depend on the data: no gradient comes back, or the model says the same of every sample.

    Arguments:
        spread: the largest difference between the model's outputs for different samples, relative to the largest value,
            that counts as none.
        window: steps in which it has to be so.
    """
    check = "loss ignores the input"

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        if not every_step(seen, window) or not all(list(each.trained()) for each in seen):
            return
        step = seen[-1]
        if all(each.stepped and each.loss is not None and not _comes_back(each) for each in seen):
            yield Finding(
                "",
                check,
                "gradients that came back to the model",
                0,
                1,
                "the loss is not a function of the model's output: it was detached, rebuilt from numbers, or taken of "
                "something else",
                "compute the loss from the very tensors that the model returned",
                "the chain rule",
                step.number,
                Severity.ERROR,
            )
        roots = [[p.root for p in each.trained() if p.root is not None] for each in seen]
        if all(each and all(_ignores(root, spread) for root in each) for each in roots):
            least = min(v.get("spread") for v in roots[-1][-1].outputs.values() if v.get("spread") is not None)
            yield Finding(
                "",
                check,
                "largest difference between the outputs for different samples, relative",
                least,
                spread,
                "the model says the same of every sample: its output does not depend on the input",
                "the finding about a constant or dead layer says where; else look at what the model returns",
                "an output without variance over the batch carries nothing of the data",
                step.number,
                Severity.ERROR,
            )

    return Check(check, judge, Kind.INPUT | Kind.OUTPUT | Kind.GRAD_OUTPUT, window)


def _comes_back(step: Step) -> bool:
    return any(call.grad_outputs for pass_ in step.trained() for call in pass_.calls)


def _ignores(root: object, limit: float) -> bool:
    into = [v.get("spread") for v in root.inputs.values()]  # type: ignore[attr-defined]
    out = [v.get("spread") for v in root.outputs.values()]  # type: ignore[attr-defined]
    varies = any(each is not None and each > limit for each in into)
    return varies and bool(out) and all(each is not None and each <= limit for each in out)


def spike(*, share: float = 0.5, sigmas: float = 10.0, jump: float = 3.0, window: int = 12) -> Check:
    """A loss that jumps, and the layer that moved first.

    Arguments:
        share: a jump that undoes this much of what was gained since the first step seen.
        sigmas: and is so many robust standard deviations (of the median absolute deviation) above the losses before.
        jump: a layer's output, or a parameter's update, moved if it is so many times the median of the steps before.
        window: steps to look back.

    Source: Chowdhery et al., "PaLM" (2022), 5.1: spikes come from the state of the parameters, not from the data alone.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        losses = [step.loss for step in seen if step.loss is not None]
        if len(losses) < 6 or seen[-1].loss is None:
            return
        median = statistics.median(losses[:-1])
        sigma = 1.4826 * statistics.median(abs(each - median) for each in losses[:-1])
        first = seen[-1].first_loss or median
        limit = median + max(sigmas * sigma, share * max(first - median, abs(median) / 2))
        if losses[-1] > limit:
            layer, details = _first_mover(seen, jump)
            yield Finding(
                layer,
                "loss spike",
                "loss",
                losses[-1],
                limit,
                "something threw the parameters, or a layer's output, off the track; this layer moved first",
                "clip the gradient's norm, lower the learning rate or warm it up; look at this batch",
                "Chowdhery et al. 2022, arXiv:2204.02311, 5.1",
                seen[-1].number,
                details=(f"median of the losses before: {median:.3g}", *details),
            )

    return Check("loss spike", judge, (Kind.OUTPUT | Kind.GRAD_OUTPUT, ParameterKind.UPDATE), window)


def _first_mover(seen: Sequence[Step], jump: float) -> tuple[str, tuple[str, ...]]:
    """The layer whose output, or the parameter whose update, was the first to be many times its median."""
    for position in range(3, len(seen)):
        step, before = seen[position], seen[:position]
        outputs = {(c.layer, c.index): c for c in reversed(list(calls_of(step))) if c.outputs}
        for key, call in reversed(outputs.items()):
            past = [c for each in before for c in calls_of(each) if (c.layer, c.index) == key]
            usual = statistics.median([total_norm(c.outputs.values()) for c in past] or [0.0])
            norm = total_norm(call.outputs.values())
            if usual and norm > jump * usual:
                return call.layer, (f"step {step.number}: its output is {norm / usual:.3g} times what it was",)
        moved = {name: ratio for name in step.parameters if (ratio := _jump(name, step, before)) > jump}
        if moved:
            worst = max(moved, key=lambda name: moved[name])
            record = step.parameters[worst]
            many = [name for name in moved if step.parameters[name].groups == record.groups]
            whole = len(many) > 1 and 2 * len(many) >= len([p for p in step.parameters.values() if p.update])
            layer = record.groups[0] if whole and record.groups else record.layer
            return layer, (f"step {step.number}: updates of {shown(many)} are up to {moved[worst]:.3g} times as large",)
    return "loss", ("no layer's output and no update moved before it: look at the batch and its targets",)


def _jump(name: str, step: Step, before: Sequence[Step]) -> float:
    past = [r.update.norm for each in before if (r := each.parameters.get(name)) is not None and r.update is not None]
    now, usual = step.parameters[name].update, statistics.median(past or [0.0])
    return now.norm / usual if now is not None and usual else 0.0
