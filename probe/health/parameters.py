"""Checks of parameters and of what optimizers do with them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from probe.capture import Kind, ParameterKind
from probe.findings import Finding, Severity
from probe.health.doctor import Check
from probe.health.values import every_step, shown
from probe.health.vitals import ParameterRecord, Step

_PARAMETERS = (ParameterKind.VALUE | ParameterKind.GRAD | ParameterKind.UPDATE, Kind.GRAD_OUTPUT)


def updates(*, high: float = 0.3, low: float = 1e-7, window: int = 5) -> Check:
    """Weights whose updates are far too large or too small beside them: the ratio of norms, which should be near 1e-3.

    Of tensors of two dimensions or more. Too small is judged only while the learning rate stands still, so that a
    warm-up or a decay to zero is no finding. Where half of a param group is concerned the group is named.

    Arguments:
        high: the greatest ratio of update to weight, the median of `window` steps.
        low: the least one.
        window: steps.

    Source: Karpathy, CS231n, "Ratio of weights:updates": "somewhere around 1e-3".
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        if not every_step(seen, window):
            return
        ratios = {name: r for name in seen[-1].parameters if (r := _ratio(name, seen)) is not None}
        still = {key for key in seen[-1].rates if len({step.rates.get(key) for step in seen}) == 1}
        steady = {name: r for name, r in ratios.items() if set(seen[-1].parameters[name].groups) <= still}
        for found, limit, what in (
            ({name: r for name, r in ratios.items() if r > high}, high, "large"),
            ({name: r for name, r in steady.items() if 0 < r < low}, low, "small"),
        ):
            yield from _grouped(found, ratios, limit, what, seen[-1])

    return Check("update size", judge, _PARAMETERS, window)


def _ratio(name: str, seen: Sequence[Step]) -> float | None:
    records = [step.parameters.get(name) for step in seen]
    found = [_update_ratio(r) for r in records if r is not None and len(r.shape) >= 2]
    ratios = [r for r in found if r is not None]
    return statistics.median(ratios) if len(ratios) == len(seen) else None


def _update_ratio(p: ParameterRecord) -> float | None:
    if p.value is None or p.update is None or not p.value.norm:
        return None
    return p.update.norm / p.value.norm


def _grouped(found: dict[str, float], all_: dict[str, float], limit: float, what: str, step: Step) -> Iterator[Finding]:
    of = step.parameters
    for group in step.rates:
        mine = [name for name in all_ if group in of[name].groups]
        bad = [name for name in mine if name in found]
        if len(bad) >= 2 and 2 * len(bad) >= len(mine):
            worst = sorted(bad, key=lambda name: found[name], reverse=what == "large")
            yield _update_finding(
                group,
                statistics.median(found[name] for name in bad),
                limit,
                what,
                step,
                (
                    f"{len(bad)} of {len(mine)} weights, foremost {shown(worst, 3)}",
                    f"learning rate {step.rates[group]:.3g}",
                ),
            )
            found = {name: r for name, r in found.items() if name not in bad}
    for name, ratio in found.items():
        yield _update_finding(of[name].layer, ratio, limit, what, step, (f"parameter {name!r}",))


def _update_finding(layer: str, ratio: float, limit: float, what: str, step: Step, details: tuple[str, ...]) -> Finding:
    return Finding(
        layer,
        f"updates too {what}",
        "norm of an update, as a ratio to the norm of the weights",
        ratio,
        limit,
        "the steps overshoot: the weights are overwritten rather than trained"
        if what == "large"
        else "the weights hardly move",
        f"{'lower' if what == 'large' else 'raise'} the learning rate; the ratio should be near 1e-3",
        "Karpathy, CS231n: the ratio of updates to weights should be somewhere around 1e-3",
        step.number,
        Severity.ERROR if what == "large" else Severity.WARNING,
        details,
    )


def never_moves(*, rounded: float = 0.95, window: int = 3) -> Check:
    """Parameters that have a gradient and a learning rate and stay as they are; in half precision: nearly all of them.

    Arguments:
        rounded: the share of a float16 or bfloat16 parameter's elements that updates may leave as they are.
        window: steps in which it has to be so.

    Source: bfloat16 has 8 bits of precision: a change below 1/512 of a weight is rounded away (Zamirai et al.,
    "Revisiting BFloat16 Training", 2020).
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        if not every_step(seen, window):
            return
        for name, p in seen[-1].parameters.items():
            records = [step.parameters.get(name) for step in seen]
            lost = [r.facts.get("unmoved") for r in records if r is not None]
            if len(lost) == len(seen) and all(each is not None and each > rounded for each in lost):
                yield Finding(
                    p.layer,
                    "updates lost",
                    f"share of {name!r} that updates leave as it is, by rounding",
                    float(lost[-1] or 0),
                    rounded,
                    f"{p.dtype} cannot hold weights plus such small updates",
                    "keep the weights in float32 and use autocast, or an optimizer with stochastic rounding",
                    "Zamirai et al. 2020, arXiv:2010.06192: bfloat16 rounds away changes below 1/512",
                    seen[-1].number,
                )
            elif all(r is not None and _stuck(r, step) for r, step in zip(records, seen, strict=True)):
                yield Finding(
                    p.layer,
                    "never moves",
                    f"norm of the updates of {name!r}",
                    0.0,
                    0.0,
                    "it has a gradient and a learning rate, and the optimizer leaves it as it is",
                    "is it written back after the step (a constraint, a copy), or does a hook zero the gradient?",
                    "parameters with a gradient move",
                    seen[-1].number,
                )

    return Check("never moves", judge, _PARAMETERS, window)


def _stuck(p: ParameterRecord, step: Step) -> bool:
    if p.update is None or p.grad is None or not p.stepped:
        return False
    return p.update.norm == 0 and p.grad.norm > 0 and all(step.rates.get(group) for group in p.groups)


def optimizers(*, window: int = 2) -> Check:
    """Trainable parameters that are in none of the probe's optimizers and do not change, or are listed twice.

    Arguments:
        window: steps in which it has to be so.

    Source: what no optimizer lists is never updated; what two list is updated twice.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        if not every_step(seen, window) or not all(each.stepped for each in seen):
            return
        none: dict[str, list[str]] = {}
        for name, p in step.parameters.items():
            versions = {each.parameters[name].facts.get("version") for each in seen if name in each.parameters}
            if p.optimizers == 0 and len(versions) == 1:
                none.setdefault(p.layer, []).append(name)
            elif p.optimizers > 1:
                yield Finding(
                    p.layer,
                    "in two optimizers",
                    f"param groups that list {name!r}",
                    p.optimizers,
                    1,
                    f"it is updated more than once a step, by {shown(p.groups)}",
                    "list every parameter once",
                    "each optimizer updates what it lists",
                    step.number,
                    Severity.ERROR,
                )
        for layer, names in none.items():
            yield Finding(
                layer,
                "in no optimizer",
                f"parameters that no optimizer of the probe lists: {shown(names)}",
                len(names),
                0,
                "they need a gradient but are never updated; was the layer made or replaced after the optimizer?",
                "create the optimizer after the model is complete (and on its device), or freeze the layer: "
                "requires_grad_(False)",
                "an optimizer updates what it was given, object by object",
                step.number,
            )

    return Check("optimizers", judge, _PARAMETERS, window)


def learning_rate(*, window: int = 3) -> Check:
    """Param groups whose learning rate is zero.

    Arguments:
        window: steps in a row; a warm-up may begin at zero.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        if not every_step(seen, window):
            return
        for group in seen[-1].rates:
            if all(step.rates.get(group) == 0 for step in seen):
                yield Finding(
                    group,
                    "learning rate is zero",
                    f"learning rate, in {window} steps in a row",
                    0.0,
                    0.0,
                    "nothing in this group is trained: the schedule has ended, or never began",
                    "look at the schedule: print(schedule.simulate(scheduler, steps=...))",
                    "an update is a multiple of the learning rate",
                    seen[-1].number,
                    Severity.ERROR,
                )

    return Check("learning rate", judge, _PARAMETERS, window)
