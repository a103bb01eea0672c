"""Checks of parameters and of what optimizers do with them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from probe.capture import Kind, ParameterKind
from probe.findings import Finding, Severity
from probe.health.records import ParameterRecord, Step
from probe.health.rules import Check, Rule, shown

_CS231N = "Karpathy, CS231n: the ratio of updates to weights should be somewhere around 1e-3"
TOO_LARGE = Rule(
    "updates too large",
    "the steps overshoot: the weights are overwritten rather than trained",
    "lower the learning rate, or warm it up; the ratio should be near 1e-3",
    _CS231N,
    Severity.ERROR,
)
TOO_SMALL = Rule(
    "updates too small",
    "the weights hardly move",
    "raise the learning rate; the ratio should be near 1e-3",
    _CS231N,
)


def update_sizes(*, high: float = 1.0, low: float = 1e-7, window: int = 5) -> Check:
    """Weights whose updates are far too large or too small beside them: the ratio of norms, which should be near 1e-3.

    Of tensors with two dimensions or more longer than 1, that do not start at zero. Too large is a ratio to the weights
    as they were in the first step: later they are as large as the updates made them. Where half of a param group is
    concerned the group is named. One weight alone has to be three times beyond the upper limit, as a normalisation
    after it may make its scale of no consequence, or a hundred times beyond the lower one, as a branch may be meant to
    be quiet. Too small is judged only while the learning rate stands still, so that a warm-up or a decay to zero is no
    finding.

    Arguments:
        high: the greatest ratio of update to first weight, the median of `window` steps.
        low: the least ratio of update to weight, likewise.
        window: steps.

    Source: Karpathy, CS231n, "Ratio of weights:updates".
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        large = _ratios(seen, lambda p: p.first_norm)
        yield from _beyond(TOO_LARGE, {name: ratio / high for name, ratio in large.items()}, high, 3, step)
        small = _ratios(seen, lambda p: 0.0 if p.value is None else p.value.norm)
        still = {group for group, rate in step.rates.items() if all(each.rates.get(group) == rate for each in seen)}
        inverse = {name: low / r for name, r in small.items() if r and still.issuperset(step.parameters[name].groups)}
        yield from _beyond(TOO_SMALL, inverse, low, 100, step)

    return Check("update size", judge, (ParameterKind.VALUE | ParameterKind.UPDATE,), window)


def _ratios(seen: Sequence[Step], of: Callable[[ParameterRecord], float]) -> dict[str, float]:
    """For each weight the median over the steps of its updates' norms, relative to the norm that `of` gives."""
    found = {}
    for name, p in seen[-1].parameters.items():
        records = [each.parameters[name] for each in seen if name in each.parameters]
        ratios = [r.update.norm / of(r) for r in records if r.update is not None and r.first_norm and of(r)]
        if len(ratios) == len(seen) and sum(size > 1 for size in p.shape) >= 2:
            found[name] = statistics.median(ratios)
    return found


def _beyond(rule: Rule, excess: dict[str, float], limit: float, alone: float, step: Step) -> Iterator[Finding]:
    """One finding for a param group half of which is beyond the limit, and one for others that are far beyond it.

    Arguments:
        excess: by name, how many times the limit a weight is beyond it; 1 or less is well.
        alone: how many times it has to be for one weight alone.
    """
    sign = 1 if rule is TOO_LARGE else -1
    what = f"norm of an update, as a ratio to the norm of the {'first ' if sign > 0 else ''}weights"
    left = dict(excess)
    for group, rate in step.rates.items():
        own = [name for name in excess if group in step.parameters[name].groups]
        bad = sorted((name for name in own if excess[name] > 1), key=lambda name: -excess[name])
        if len(bad) >= 2 and 2 * len(bad) >= len(own):
            median = statistics.median(left.pop(name) for name in bad)
            details = f"{len(bad)} of {len(own)} weights: {shown(bad)}"
            yield rule.broken(step, group, what, limit * median**sign, limit, details, f"learning rate {rate:.3g}")
    for name, times in left.items():
        if times > alone:
            measured, bound = limit * times**sign, limit * alone**sign
            yield rule.broken(step, step.parameters[name].layer, what, measured, bound, f"parameter {name!r}")


ROUNDED = Rule(
    "updates lost",
    "the weights' dtype cannot hold them plus such small updates",
    "keep the weights in float32 and use autocast, or an optimizer with stochastic rounding",
    "Zamirai et al. 2020, arXiv:2010.06192: bfloat16 rounds away changes below 1/512 of a weight",
)
STUCK = Rule(
    "never moves",
    "it has a gradient and a learning rate, and is after every step what it was before",
    "is zero_grad() called between backward() and step()? is it written back after the step (a constraint, a copy), or "
    "does a hook or a mask undo the update?",
    "what has a gradient and a learning rate moves",
)


def stuck_parameters(*, rounded: float = 0.95, window: int = 3) -> Check:
    """Parameters that have a gradient and a learning rate and stay as they are; in half precision: nearly all of them.

    Arguments:
        rounded: the share of a float16 or bfloat16 parameter's elements that updates may leave as they are.
        window: steps in which it has to be so.

    Source: Zamirai et al., "Revisiting BFloat16 Training" (2020).
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        for name, p in seen[-1].parameters.items():
            records = [(each.parameters[name], each) for each in seen if name in each.parameters]
            if all(record.facts.get("unmoved", 0.0) > rounded for record, _ in records):
                what = f"share of {name!r} that updates leave as it is, by rounding to {p.dtype}"
                yield ROUNDED.broken(seen[-1], p.layer, what, p.facts["unmoved"], rounded)
            elif all(_is_stuck(record, step) for record, step in records):
                yield STUCK.broken(seen[-1], p.layer, f"norm of the updates of {name!r}", 0, 0)

    return Check("never moves", judge, (*ParameterKind, Kind.GRAD_OUTPUT), window)


def _is_stuck(p: ParameterRecord, step: Step) -> bool:
    """Whether an update came out as nothing that is not too small for the weights' precision anyway."""
    if not p.stepped or p.update is None or p.update.norm or p.grad is None or p.value is None:
        return False
    rate = min((step.rates.get(group, 0.0) for group in p.groups), default=0.0)
    return bool(rate * min(1.0, p.grad.rms / step.scale) > 1e-5 * p.value.rms)


UNLISTED = Rule(
    "in no optimizer",
    "it needs a gradient but is never updated; was the layer made or replaced after the optimizer?",
    "create the optimizer after the model is complete (and on its device), or freeze the layer: requires_grad_(False)",
    "an optimizer updates the tensors that it was given, object by object",
)
TWICE = replace(
    UNLISTED,
    check="in two optimizers",
    meaning="it is updated more than once a step",
    advice="list every parameter once",
    severity=Severity.ERROR,
)


def optimizer_membership(*, window: int = 2) -> Check:
    """Trainable parameters that are in none of the probe's optimizers and do not change, or are listed twice.

    Arguments:
        window: steps in which it has to be so.

    Source: what no optimizer lists is never updated; what two list is updated twice.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        if not all(each.stepped for each in seen):
            return
        unlisted: dict[str, list[str]] = {}
        for name, p in step.parameters.items():
            versions = {each.parameters[name].facts.get("version") for each in seen if name in each.parameters}
            if p.optimizers == 0 and len(versions) == 1:  # nobody else updates it
                unlisted.setdefault(p.layer, []).append(name)
            elif p.optimizers > 1:
                what = f"param groups that list {name!r}"
                yield TWICE.broken(step, p.layer, what, p.optimizers, 1, shown(p.groups))
        for layer, names in unlisted.items():
            what = "parameters that no optimizer of the probe lists"
            yield UNLISTED.broken(step, layer, what, len(names), 0, shown(names))

    return Check("optimizers", judge, (ParameterKind.GRAD, Kind.GRAD_OUTPUT), window)


ZERO_RATE = Rule(
    "learning rate is zero",
    "nothing in this group is trained: the schedule has ended, or never began",
    "look at the schedule: print(schedule.simulate(scheduler, steps=...))",
    "an update is a multiple of the learning rate",
    Severity.ERROR,
)


def zero_learning_rate(*, window: int = 3) -> Check:
    """Param groups whose learning rate is zero.

    Arguments:
        window: steps in a row; a warm-up may begin at zero.

    Source: an update is a multiple of the learning rate.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        for group in seen[-1].rates:
            if all(each.rates.get(group) == 0 for each in seen):
                yield ZERO_RATE.broken(seen[-1], group, f"learning rate, in {window} steps in a row", 0, 0)

    return Check("learning rate", judge, (), window)
