"""Checks of what flows backward: where NaN began, vanishing and exploding with depth, symmetry, no gradient at all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import torch

from probe.capture import Kind, ParameterKind
from probe.findings import Finding, Severity
from probe.health.doctor import Check
from probe.health.values import _IEEE, calls_of, every_step, shown
from probe.health.vitals import CallRecord, ParameterRecord, PassRecord, Step, finite, total_norm

_BACKWARD = Kind.GRAD_INPUT | Kind.GRAD_OUTPUT
NONFINITE = "NaN or Inf in gradients"


def nonfinite(*, window: int = 5) -> Check:
    """Where NaN or Inf began in a backward pass that follows a finite forward pass.

    That is the layer that was handed a finite gradient and handed on another, or whose parameters got one. Where a
    ``GradScaler`` skips the update (float16), nothing is said: finding the largest scale by overflowing is its way.

    Arguments:
        window: of how many steps before it to give the layer's statistics.

    Source: IEEE 754, and the chain rule: a gradient that is not finite makes all those before it so.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        if step.broken or any(_bad(each) for each in seen[:-1]) or not _bad(step) or _skipped(step):
            return
        for pass_ in step.trained():
            found = _origin(pass_, step)
            if found is not None:
                layer, meaning, passed = found
                details = [f"passed on by {shown(passed)}"] if passed else []
                yield Finding(
                    layer,
                    NONFINITE,
                    "NaN or Inf in the gradient, after a forward pass without any",
                    1,
                    0,
                    meaning,
                    "look for the derivative of a root, norm, division or power at zero; add an epsilon inside of it, "
                    "or clip its input; torch.autograd.detect_anomaly() names the line",
                    _IEEE,
                    step.number,
                    Severity.ERROR,
                    (*details, *_before(layer, seen)),
                )
                return

    return Check(NONFINITE, judge, (_BACKWARD | Kind.OUTPUT, ParameterKind.GRAD), window + 1, of_broken=True)


def _grads(call: CallRecord) -> list[object]:
    return [*call.grad_outputs.values(), *call.grad_inputs.values()]


def _bad(step: Step) -> bool:
    calls = [each for call in calls_of(step) for each in (call.grad_outputs, call.grad_inputs)]
    own = [p.grad for p in step.parameters.values() if p.grad is not None]
    return not (all(finite(each.values()) for each in calls) and finite(own))


def _skipped(step: Step) -> bool:
    """Whether a GradScaler seems to have skipped the update."""
    half = any(v.dtype is torch.float16 for c in calls_of(step) for v in [*c.grad_outputs.values()])
    moved = any(p.update is not None and (p.update.nonfinite or p.update.norm) for p in step.parameters.values())
    grads = [p.grad for p in step.parameters.values() if p.grad is not None]
    return (half or step.scaled) and (finite(grads) or not moved)


def _origin(pass_: PassRecord, step: Step) -> tuple[str, str, list[str]] | None:
    calls = sorted((call for call in pass_.calls if call.layer), key=lambda call: -call.order)  # as backward goes
    bad = [c for c in calls if not finite(c.grad_outputs.values())]
    made = [c for c in calls if c.grad_outputs and c not in bad and not finite(c.grad_inputs.values())]
    passed = list(dict.fromkeys(call.layer for call in bad))
    if made and (not bad or made[0].order > bad[0].order):
        meaning = "this layer was handed a finite gradient and handed back one that is not; those before it pass it on"
        return made[0].layer, meaning, passed
    if bad:
        after = [call for call in calls if call.order > bad[0].order and call.grad_outputs]
        if not after:
            return "loss", "the derivative of the loss is not finite already at the model's output", passed
        meaning = f"an operation between this layer and {after[-1].layer!r} made it"
        return bad[0].layer, meaning, passed[1:]
    broken = {p.layer for p in step.parameters.values() if p.grad is not None and p.grad.nonfinite}
    own = [call for call in calls if call.layer in broken]
    if own:  # with a clipped norm all parameters are broken; the first layer is the one that hands nothing back
        return own[-1].layer, "this layer's parameters get a gradient that is not finite, from finite ones", []
    return None


def _before(layer: str, seen: Sequence[Step]) -> list[str]:
    lines = []
    for step in seen[:-1]:
        same = [call for call in calls_of(step) if call.layer == layer and call.grad_outputs]
        if same:
            lines.append(
                f"step {step.number}: gradient norm at its output {total_norm(same[-1].grad_outputs.values()):.3g}"
            )
    return lines


# -- with depth --------------------------------------------------------------------------------------------------------


def gradient_flow(*, vanishing: float = 1e-4, exploding: float = 1e4, window: int = 3) -> Check:
    """Gradients that vanish or explode on their way back: the ratio of their norms along the path.

    Of every place in the order of layers it compares the gradients at the outputs before it with those after it: all
    that are before, so that a branch with little gradient beside a healthy shortcut is no finding. Where one layer
    makes most of the change that layer is named, else the first one.

    Arguments:
        vanishing: the least ratio of the largest gradient before to the largest after.
        exploding: the greatest ratio of the smallest gradient before to the largest after.
        window: steps in which it has to be so.

    Source: Bengio, Simard & Frasconi, "Learning long-term dependencies with gradient descent is difficult" (1994);
    Glorot & Bengio (2010): gradients should keep their scale from layer to layer.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        if not every_step(seen, window):
            return
        path = _path(seen)
        if len(path) < 3:
            return
        layers, norms = [layer for layer, _ in path], [norm for _, norm in path]
        for name, limit, severity in (
            ("vanishing", vanishing, Severity.WARNING),
            ("exploding", exploding, Severity.ERROR),
        ):
            ratios = [_ratio(norms, cut, name) for cut in range(1, len(norms))]
            beyond = [i for i, r in enumerate(ratios) if (r < limit if name == "vanishing" else r > limit)]
            if not beyond:
                continue
            worst = (
                min(beyond, key=lambda i: ratios[i]) if name == "vanishing" else max(beyond, key=lambda i: ratios[i])
            )
            steps = {i: abs(math.log(norms[i + 1] / norms[i])) for i in beyond}
            sharpest = max(steps, key=lambda i: steps[i])
            local = steps[sharpest] > 0.6 * abs(math.log(ratios[worst]))
            layer = layers[sharpest + 1] if local else layers[0]
            depth = len(norms)
            factor = (norms[0] / norms[-1]) ** (1 / (depth - 1))
            yield Finding(
                layer,
                f"gradients {name}",
                "gradient norms before it, as a ratio to those after it"
                if local
                else f"gradient norm at the first of {depth} layers, as a ratio to the last ones",
                ratios[worst],
                limit,
                "this layer lets almost no gradient through"
                if name == "vanishing" and local
                else "this layer multiplies the gradient"
                if local
                else f"every layer multiplies the gradient by {factor:.2g} on average",
                "look at the scale of its weights and of what comes in"
                if local
                else "He or Glorot initialisation, normalisation layers, residual connections; ReLU-like activations"
                + ("; clip the gradient's norm" if name == "exploding" else ""),
                "Bengio et al. 1994; Glorot & Bengio 2010: gradients should keep their scale along the path",
                seen[-1].number,
                severity,
            )

    return Check("gradient flow", judge, Kind.OUTPUT | Kind.GRAD_OUTPUT, window)


def _path(seen: Sequence[Step]) -> list[tuple[str, float]]:
    """Layers in the order of their calls, each with the median over steps of the gradient's norm at its output."""
    norms: dict[tuple[str, int], list[float]] = {}
    for step in seen:
        for pass_ in list(step.trained())[:1]:
            for call in pass_.calls:
                norm = total_norm(call.grad_outputs.values())
                if call.layer and norm:
                    norms.setdefault((call.layer, call.index), []).append(norm)
    order = {(c.layer, c.index): c.order for pass_ in seen[-1].trained() for c in pass_.calls}
    kept = [key for key, values in norms.items() if len(values) == len(seen) and key in order]
    return [(key[0], statistics.median(norms[key])) for key in sorted(kept, key=lambda key: order[key])]


def _ratio(norms: list[float], cut: int, name: str) -> float:
    before, after = norms[:cut], norms[cut:]
    return (max(before) if name == "vanishing" else min(before)) / max(after)


# -- parameters' gradients ---------------------------------------------------------------------------------------------


def no_gradient(*, window: int = 3) -> Check:
    """Parameters that an optimizer updates and that got no gradient, or one of exact zeros, in `window` steps.

    Of a row of such layers, one after the other, the last one is named: there the gradient stops.

    Arguments:
        window: steps in which it has to be so.

    Source: an optimizer leaves a parameter without a gradient as it is.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        if not every_step(seen, window) or not all(each.stepped for each in seen):
            return
        lacking = {
            name: p
            for name, p in seen[-1].parameters.items()
            if all(_lacks(step.parameters.get(name)) for step in seen)
        }
        called = list(dict.fromkeys(call.layer for call in sorted(calls_of(seen[-1]), key=lambda call: call.order)))
        owners = {p.layer for p in seen[-1].parameters.values()}
        rows = _rows([layer for layer in called if layer in owners], {p.layer for p in lacking.values()})
        silent = [layer for layer in dict.fromkeys(p.layer for p in lacking.values()) if layer not in called]
        for row in rows:
            names = [p.name for p in lacking.values() if p.layer == row[-1]]
            more = f"likewise {shown(row[:-1][::-1])} before it" if len(row) > 1 else ""
            yield _no_gradient(
                row[-1],
                names,
                (more,) if more else (),
                seen[-1],
                "the graph is cut after this layer "
                "(detach, no_grad, argmax, .data), or what comes after it lets nothing through",
            )
        if silent:
            names = [p.name for p in lacking.values() if p.layer in silent]
            yield _no_gradient(
                silent[0], names, (), seen[-1], "it takes no part in the forward pass, or not in the loss"
            )

    return Check("no gradient", judge, (Kind.OUTPUT, ParameterKind.GRAD, ParameterKind.VALUE, Kind.GRAD_OUTPUT), window)


def _lacks(p: ParameterRecord | None) -> bool:
    return p is not None and p.stepped and (p.grad is None or p.grad.head.zeros == p.grad.head.count)


def _rows(called: list[str], lacking: set[str]) -> list[list[str]]:
    """Of the layers in the order of their calls the runs that all are among `lacking`."""
    rows: list[list[str]] = [[]]
    for layer in called:
        if layer in lacking:
            rows[-1].append(layer)
        elif rows[-1]:
            rows.append([])
    return [row for row in rows if row]


def _no_gradient(layer: str, names: list[str], details: tuple[str, ...], step: Step, meaning: str) -> Finding:
    return Finding(
        layer,
        "no gradient",
        f"parameters without a gradient: {shown(names)}",
        len(names),
        0,
        meaning,
        "let the loss depend on it, or freeze it (requires_grad_(False)) and leave it out of the optimizer",
        "an optimizer leaves parameters without a gradient as they are",
        step.number,
        details=details,
    )


def symmetry(*, alike: float = 1e-6, window: int = 2) -> Check:
    """Weights whose rows are all the same and get all the same gradient: the units will stay copies of each other.

    Arguments:
        alike: the largest difference between rows, relative to the largest value, that counts as none.
        window: steps in which it has to be so.

    Source: Goodfellow, Bengio & Courville, "Deep Learning" (2016), 8.4: initial weights have to break the symmetry.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        if not every_step(seen, window):
            return
        for name, p in seen[-1].parameters.items():
            records = [step.parameters.get(name) for step in seen]
            if all(r is not None and r.facts.get("alike", math.nan) <= alike for r in records) and all(
                r is not None and r.facts.get("same", math.nan) <= alike for r in records
            ):
                yield Finding(
                    p.layer,
                    "symmetry",
                    f"largest difference between the rows of the gradient of {name!r}, relative",
                    p.facts["alike"],
                    alike,
                    "all units of this layer are copies of one, and their gradients keep them so",
                    "initialise with random numbers (the layer's reset_parameters()); only biases may start all alike",
                    "Goodfellow et al. 2016, Deep Learning, 8.4",
                    seen[-1].number,
                    Severity.ERROR,
                )

    return Check("symmetry", judge, (ParameterKind.GRAD, ParameterKind.VALUE, Kind.GRAD_OUTPUT), window)
