"""Checks of the loss: that it depends on the input, and who moved first when it jumps."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from probe.capture import Kind, ParameterKind
from probe.findings import Finding, Severity
from probe.health.records import CallRecord, Step
from probe.health.rules import Check, Rule, calls_of, shown
from probe.health.values import collapses, is_zero
from probe.health.vitals import total_norm

SAME = Rule(
    "loss ignores the input",
    "the model says the same of every sample: its output does not depend on the input",
    "look at what the model returns, and at the scale of what its last layers add up",
    "an output without variance over the batch carries nothing of the data",
    Severity.ERROR,
)
NOTHING_BACK = replace(
    SAME,
    meaning="the optimizer steps, but the loss is no function of the model's output: it was detached, rebuilt from "
    "numbers, or taken of something else; or backward() is not called",
    advice="compute the loss from the very tensors that the model returned",
    source="the chain rule",
)


def independent_loss(*, spread: float = 1e-6, window: int = 3) -> Check:
    """A loss that does not depend on the data: no gradient comes back, or the model says the same of every sample.

    A layer that makes it so is named by the checks of dead and constant layers; this one is for what no layer shows.

    Arguments:
        spread: the largest difference between the model's outputs for different samples, relative to the largest value,
            that counts as none.
        window: steps in which it has to be so.

    Source: an output without variance over the batch carries nothing of the data.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        passes = [list(each.trained()) for each in seen]
        if not all(passes):
            return
        if all(each.stepped for each in seen) and not any(
            call.grad_outputs for part in passes for each in part for call in each.calls
        ):
            yield NOTHING_BACK.broken(step, "", "gradients that came back to the model", 0, 1)
            return
        roots = [[each.root for each in part if each.root is not None] for part in passes]
        told = any(is_zero(call) or collapses(call, spread) for call in calls_of(step))
        if not told and all(each and all(collapses(root, spread) for root in each) for each in roots):
            least = max(each.get("spread") or 0.0 for each in roots[-1][-1].outputs.values())
            what = "largest difference between the outputs for different samples, relative to the largest value"
            yield SAME.broken(step, "", what, least, spread)

    return Check("loss ignores the input", judge, (Kind.INPUT | Kind.OUTPUT | Kind.GRAD_OUTPUT,), window)


SPIKE = Rule(
    "loss spike",
    "something threw the parameters, or a layer's output, off the track; this layer moved first",
    "clip the gradient's norm, lower the learning rate or warm it up; look at the batch",
    "Chowdhery et al. 2022, arXiv:2204.02311, 5.1: spikes come of parameters and batch together; skip the batch",
)


def loss_spikes(*, share: float = 0.5, sigmas: float = 10.0, jump: float = 3.0, window: int = 12) -> Check:
    """A loss that jumps, and the layer that moved first.

    The loss is known from what ``backward()`` is called on. Of jumps within one window the first is told.

    Arguments:
        share: a jump undoes this share of what was gained since the first step, and is at least this share of half the
            loss before it;
        sigmas: and it is so many times the usual difference between two steps, a robust standard deviation of them.
        jump: a layer's output, or a parameter's update, moved if it is so many times the median of three steps before.
        window: steps to look back.

    Source: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways" (2022), 5.1.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        if any(_limit(seen[:number], share, sigmas) for number in range(len(seen))):
            return  # it was told; what comes now is a consequence
        found = _limit(seen, share, sigmas)
        if found is not None:
            usual, limit = found
            layer, details = _first_mover(seen, jump)
            before = f"median before it {usual:.3g}"
            yield SPIKE.broken(seen[-1], layer, "loss", seen[-1].loss, limit, before, details)

    kinds = (Kind.OUTPUT | Kind.GRAD_OUTPUT, ParameterKind.UPDATE)
    return Check("loss spike", judge, kinds, window, eager=True)


def _limit(seen: Sequence[Step], share: float, sigmas: float) -> tuple[float, float] | None:
    """The usual loss, and the limit that the last step's is above; None if it is not, or if too few are known."""
    losses = [each.loss for each in seen[:-1] if each.loss is not None]
    if len(losses) < 5 or seen[-1].loss is None or seen[-1].first_loss is None:
        return None
    usual = statistics.median(losses[-5:])
    sigma = 1.4826 * statistics.median(abs(b - a) for a, b in itertools.pairwise(losses))
    limit = usual + max(sigmas * sigma, share * max(seen[-1].first_loss - usual, abs(usual) / 2))
    return (usual, limit) if seen[-1].loss > limit else None


def _first_mover(seen: Sequence[Step], jump: float) -> tuple[str, str]:
    """The layer whose output, or the parameter whose update, was the first to be many times its median."""
    for position in range(3, len(seen)):
        step, before = seen[position], seen[position - 3 : position]
        for call in calls_of(step):
            usual = statistics.median([total_norm(c.outputs.values()) for c in _same(call, before)] or [0.0])
            norm = total_norm(call.outputs.values())
            if usual and norm > jump * usual:
                return call.layer, f"step {step.number}: its output is {norm / usual:.3g} times what it was"
        moved = {name: ratio for name in step.parameters if (ratio := _jump(name, step, before)) > jump}
        if moved:
            worst = max(moved, key=lambda name: moved[name])
            record = step.parameters[worst]
            updated = [p for p in step.parameters.values() if p.update is not None and p.groups == record.groups]
            together = len(moved) > 1 and 2 * len(moved) >= len(updated)
            layer = record.groups[0] if together and record.groups else record.layer
            return layer, f"step {step.number}: updates of {shown(moved)} are up to {moved[worst]:.3g} times as large"
    return "loss", "no layer's output and no update moved before it: look at the batch and its targets"


def _same(call: CallRecord, steps: Sequence[Step]) -> list[CallRecord]:
    return [c for each in steps for c in calls_of(each) if (c.layer, c.index) == (call.layer, call.index)]


def _jump(name: str, step: Step, before: Sequence[Step]) -> float:
    past = [p.update.norm for each in before if (p := each.parameters.get(name)) is not None and p.update is not None]
    now, usual = step.parameters[name].update, statistics.median(past or [0.0])
    return now.norm / usual if now is not None and usual else 0.0
