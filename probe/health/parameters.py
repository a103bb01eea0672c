"""Checks of parameters and of what optimizers do with them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
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


def update_sizes(*, high: float = 0.3, low: float = 1e-7, window: int = 5) -> Check:
    """Weights whose updates are far too large or too small beside them: the ratio of norms, which should be near 1e-3.

    Of tensors of two dimensions or more that do not start at zero. Too small is judged only while the learning rate
    stands still, so that a warm-up or a decay to zero is no finding. Where half of a param group is concerned the group
    is named.

    Arguments:
        high: the greatest ratio of update to weight, the median of `window` steps.
        low: the least one.
        window: steps.

    Source: Karpathy, CS231n, "Ratio of weights:updates".
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        ratios = {name: ratio for name in step.parameters if (ratio := _median_ratio(name, seen)) is not None}
        still = {group for group, rate in step.rates.items() if all(each.rates.get(group) == rate for each in seen)}
        large = {name: ratio for name, ratio in ratios.items() if ratio > high}
        small = {
            name: r for name, r in ratios.items() if 0 < r < low and still.issuperset(step.parameters[name].groups)
        }
        yield from _grouped(TOO_LARGE, large, ratios, high, step)
        yield from _grouped(TOO_SMALL, small, ratios, low, step)

    return Check("update size", judge, (ParameterKind.VALUE | ParameterKind.UPDATE,), window)


def _median_ratio(name: str, seen: Sequence[Step]) -> float | None:
    records = [each.parameters[name] for each in seen if name in each.parameters]
    ratios = [
        p.update.norm / p.value.norm
        for p in records
        if len(p.shape) >= 2 and p.update is not None and p.value is not None and p.value.norm and p.first_norm
    ]
    return statistics.median(ratios) if len(ratios) == len(seen) else None


def _grouped(
    rule: Rule, found: dict[str, float], measured: dict[str, float], limit: float, step: Step
) -> Iterator[Finding]:
    """One finding for a param group half of which is concerned, and one for each other parameter."""
    what = "norm of an update, as a ratio to the norm of the weights"
    for group, rate in step.rates.items():
        own = [name for name in measured if group in step.parameters[name].groups]
        bad = sorted((name for name in own if name in found), key=lambda name: -found[name])
        if len(bad) >= 2 and 2 * len(bad) >= len(own):
            median = statistics.median(found.pop(name) for name in bad)
            details = f"{len(bad)} of {len(own)} weights: {shown(bad)}"
            yield rule.broken(step, group, what, median, limit, details, f"learning rate {rate:.3g}")
    for name, ratio in found.items():
        yield rule.broken(step, step.parameters[name].layer, what, ratio, limit, f"parameter {name!r}")


ROUNDED = Rule(
    "updates lost",
    "the weights' dtype cannot hold them plus such small updates",
    "keep the weights in float32 and use autocast, or an optimizer with stochastic rounding",
    "Zamirai et al. 2020, arXiv:2010.06192: bfloat16 rounds away changes below 1/512 of a weight",
)
STUCK = Rule(
    "never moves",
    "it has a gradient and a learning rate, and is after every step what it was before",
    "is it written back after the step (a constraint, a copy), or does a hook or a mask undo the update?",
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
    return rate * min(1.0, p.grad.rms) > 1e-5 * p.value.rms


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
                what = f"param groups that list {name!r}: {shown(p.groups)}"
                yield TWICE.broken(step, p.layer, what, p.optimizers, 1)
        for layer, names in unlisted.items():
            what = f"parameters that no optimizer of the probe lists: {shown(names)}"
            yield UNLISTED.broken(step, layer, what, len(names), 0)

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
