"""Checks of what flows backward: where NaN began, vanishing and exploding with depth, symmetry, no gradient at all."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from probe.capture import Kind, ParameterKind
from probe.findings import Finding, Severity
from probe.health.records import ParameterRecord, PassRecord, Step
from probe.health.rules import Check, Rule, calls_of, shown
from probe.health.values import IEEE
from probe.health.vitals import finite, total_norm

# -- NaN and Inf -------------------------------------------------------------------------------------------------------

NONFINITE = Rule(
    "NaN or Inf in gradients",
    "this layer was handed a finite gradient and handed back one that is not; those before it pass it on",
    "look for the derivative of a root, norm, division or power at zero; add an epsilon inside of it, or clip its "
    "input; torch.autograd.detect_anomaly() names the line",
    IEEE,
    Severity.ERROR,
)


def nonfinite_gradients(*, history: int = 5) -> Check:
    """Where NaN or Inf began in a backward pass that follows a finite forward pass.

    That is the layer that was handed a finite gradient and handed back another, or whose parameters got one. Where a
    ``GradScaler`` skips the update (float16), nothing is said: finding the largest scale by overflowing is its way.

    Arguments:
        history: of how many steps before it to give the layer's statistics.

    Source: IEEE 754.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        if step.broken or not step.poisoned or any(each.broken or each.poisoned for each in seen[:-1]):
            return
        for pass_ in step.trained():
            found = _origin(pass_, step)
            if found is not None:
                layer, meaning, passed = found
                details = f"passed on by {shown(passed)}" if passed else ""
                what = "gradients that are NaN or Inf, after a forward pass without any"
                yield NONFINITE.broken(
                    step, layer, what, max(len(passed), 1), 0, details, *_before(layer, seen), meaning=meaning
                )
                return

    kinds = (Kind.OUTPUT | Kind.GRAD_INPUT | Kind.GRAD_OUTPUT, ParameterKind.GRAD, ParameterKind.UPDATE)
    return Check("NaN or Inf in gradients", judge, kinds, history + 1, eager=True, of_broken=True)


def _origin(pass_: PassRecord, step: Step) -> tuple[str, str, list[str]] | None:
    """The layer or ``"loss"``, what it means (empty: the rule's), and who passes it on; None where all is well."""
    calls = sorted((call for call in pass_.calls if call.layer), key=lambda call: -call.order)  # as backward goes
    bad = [call for call in calls if not finite(call.grad_outputs.values())]
    made = [c for c in calls if c.grad_outputs and c not in bad and not finite(c.grad_inputs.values())]
    passed = [call.layer for call in bad]
    if made and (not bad or made[0].order > bad[0].order):
        return made[0].layer, "", passed
    if bad:
        after = [call.layer for call in calls if call.order > bad[0].order and call.grad_outputs]
        if not after:
            return "loss", "the derivative of the loss is not finite already at the model's output", passed
        return bad[0].layer, f"an operation between this layer and {after[-1]!r} made it", passed[1:]
    broken = {p.layer for p in step.parameters.values() if p.grad is not None and p.grad.nonfinite}
    own = [call.layer for call in calls if call.layer in broken]
    if own:  # the first layer of the model: it hands nothing back
        return own[-1], "this layer's parameters get a gradient that is not finite, from finite ones", []
    return None


def _before(layer: str, seen: Sequence[Step]) -> list[str]:
    lines = []
    for step in seen[:-1]:
        norms = [total_norm(c.grad_outputs.values()) for c in calls_of(step) if c.layer == layer and c.grad_outputs]
        if norms:
            lines.append(f"step {step.number}: norm of the gradient at its output {norms[-1]:.3g}")
    return lines


# -- with depth --------------------------------------------------------------------------------------------------------

_SCALE = "Bengio et al. 1994; Glorot & Bengio 2010: gradients should keep their scale along the path"
VANISHING = Rule(
    "gradients vanishing",
    "the first layers hardly learn",
    "He or Glorot initialisation, normalisation layers, residual connections; ReLU-like activations in place of "
    "sigmoid and tanh",
    _SCALE,
    Severity.ERROR,
)
EXPLODING = replace(
    VANISHING,
    check="gradients exploding",
    meaning="the first layers are thrown about",
    advice="He or Glorot initialisation, normalisation layers; clip the gradient's norm",
)


LAST = 3  # layers that stand for the end of the path: one alone may have a gradient of its own kind


def gradient_flow(*, vanishing: float = 1e-5, exploding: float = 1e4, window: int = 3) -> Check:
    """Gradients that vanish or explode on their way back: the ratio of their norms along the path.

    At every place in the order of layers it compares the gradients at the outputs before it with those after it: all
    that are before, so that a branch with little gradient beside a healthy shortcut is no finding. Where one layer
    makes most of the change that layer is named, else the first one.

    Arguments:
        vanishing: the least ratio of the largest gradient before to the largest after.
        exploding: the greatest ratio of the smallest gradient before to the largest at the last layers.
        window: steps in which it has to be so.

    Source: Bengio, Simard & Frasconi, "Learning long-term dependencies with gradient descent is difficult" (1994);
    Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks" (2010).
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        layers, norms = _path(seen)
        cuts = range(1, len(norms))
        largest, smallest = list(itertools.accumulate(norms, max)), list(itertools.accumulate(norms, min))
        least = {cut: largest[cut - 1] / max(norms[cut:]) for cut in cuts}
        most = {cut: smallest[cut - 1] / max(norms[cut:][-LAST:]) for cut in cuts}
        if least and min(least.values()) < vanishing:
            beyond = [cut for cut in cuts if least[cut] < vanishing]
            yield _along(VANISHING, seen[-1], layers, largest, beyond, min(least.values()), vanishing)
        if most and max(most.values()) > exploding:
            beyond = [cut for cut in cuts if most[cut] > exploding]
            yield _along(EXPLODING, seen[-1], layers, smallest, beyond, max(most.values()), exploding)

    return Check("gradient flow", judge, (Kind.OUTPUT | Kind.GRAD_OUTPUT,), window)


def _path(seen: Sequence[Step]) -> tuple[list[str], list[float]]:
    """Layers in the order of their calls, and for each the median over steps of the gradient's norm at its output."""
    norms: dict[tuple[str, int], list[float]] = {}
    order: dict[tuple[str, int], int] = {}
    for step in seen:
        for call in next((each.calls for each in step.trained()), []):
            norm = total_norm(call.grad_outputs.values())
            if call.layer and norm:
                norms.setdefault((call.layer, call.index), []).append(norm)
                order[call.layer, call.index] = call.order
    kept = sorted((key for key, values in norms.items() if len(values) == len(seen)), key=lambda key: order[key])
    return [layer for layer, _ in kept], [statistics.median(norms[key]) for key in kept]


def _along(
    rule: Rule, step: Step, layers: list[str], reach: list[float], beyond: list[int], ratio: float, limit: float
) -> Finding:
    """The finding about the layer that makes most of the change, else about the first one.

    Arguments:
        reach: for each layer the most (or least) gradient that it and those before it get.
        beyond: the layers before which it is too little (or too much).
    """
    jumps = {cut: abs(math.log(reach[cut] / reach[cut - 1])) for cut in beyond}
    sharpest = max(jumps, key=lambda cut: jumps[cut])
    if jumps[sharpest] > 0.6 * abs(math.log(ratio)):
        what = "gradient norms before it, as a ratio to those after it"
        return rule.broken(step, layers[sharpest], what, ratio, limit, meaning="it is this layer that does it")
    what = f"gradient norm at the first of {len(layers)} layers, as a ratio to the last ones"
    factor = ratio ** (1 / (len(layers) - 1))
    details = f"each layer multiplies the gradient by {factor:.2g} on average"
    return rule.broken(step, layers[0], what, ratio, limit, details)


# -- parameters' gradients ---------------------------------------------------------------------------------------------

CUT = Rule(
    "no gradient",
    "the graph is cut after this layer (detach, no_grad, argmax, .data), or what comes after it lets nothing through",
    "let the loss depend on it, or freeze it (requires_grad_(False)) and leave it out of the optimizer",
    "an optimizer leaves a parameter without a gradient as it is",
)
UNUSED = replace(
    CUT,
    meaning="it takes no part in the forward pass (an expert or a head that never has its turn?), or not in the loss",
)


def missing_gradients(*, window: int = 5, patience: int = 10) -> Check:
    """Parameters that an optimizer updates and that never got a gradient, or only one of exact zeros.

    Of a row of such layers, one after the other, the last one is named: there the gradient stops. One that had a
    gradient once, or was updated in steps that were not observed, is no finding: layers may be skipped at random
    (stochastic depth, LayerDrop), or take turns (experts, heads of several tasks). Nor is one whose gradient is zero
    beside another of its layer that is not: a bias may cancel in the loss, as a critic's does.

    Arguments:
        window: steps in a row in which it has to be so, at least.
        patience: in so many steps, observed or not, a layer has to be called with a sample for the first time.

    Source: an optimizer leaves a parameter without a gradient as it is.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step, waited = seen[-1], seen[-1].number - seen[0].number + 1
        recent = seen[-window:]
        calls = [call for each in recent for call in calls_of(each)]
        if len(recent) < window or not any(c.grad_outputs for c in calls) or not all(each.stepped for each in recent):
            return
        reached = {p.layer for p in step.parameters.values() if p.reached}
        never = [p for p in step.parameters.values() if _never_got([s.parameters.get(p.name) for s in recent])]
        lacking = [p for p in never if p.grad is None or p.layer not in reached]
        what = "parameters without a gradient"
        order = {call.layer: call.order for call in calls if any(each.count for each in call.outputs.values())}
        called = sorted(order, key=lambda layer: order[layer])
        owners = {p.layer for p in step.parameters.values()}
        for row in _rows([layer for layer in called if layer in owners], {p.layer for p in lacking}):
            names = [p.name for p in lacking if p.layer == row[-1]]
            more = f"likewise {shown(row[-2::-1])} before it" if len(row) > 1 else ""
            yield CUT.broken(step, row[-1], what, len(names), 0, shown(names), more)
        unused = [p for p in lacking if p.layer not in called]
        if unused and waited >= patience:
            yield UNUSED.broken(step, unused[0].layer, what, len(unused), 0, shown(p.name for p in unused))

    kinds = (Kind.OUTPUT | Kind.GRAD_OUTPUT, ParameterKind.GRAD)
    return Check("no gradient", judge, kinds, max(window, patience), eager=True)


def _never_got(records: Sequence[ParameterRecord | None]) -> bool:
    """Whether a parameter had no gradient but zero in these steps nor, as far as can be seen, in any before."""
    versions = {p.facts.get("version") for p in records if p is not None and p.grad is None}
    return len(versions) <= 1 and all(p is not None and p.stepped and not p.reached for p in records)


def _rows(called: list[str], lacking: set[str]) -> list[list[str]]:
    """Of the layers in the order of their calls the runs that all are among `lacking`."""
    rows: list[list[str]] = [[]]
    for layer in called:
        if layer in lacking:
            rows[-1].append(layer)
        elif rows[-1]:
            rows.append([])
    return [row for row in rows if row]


SYMMETRY = Rule(
    "symmetry",
    "all units of this layer are copies of one, and their gradients keep them so",
    "initialise with random numbers (the layer's reset_parameters()); only biases may start all alike",
    "Goodfellow et al. 2016, Deep Learning, 8.4: initial weights have to break the symmetry",
    Severity.ERROR,
)


def symmetric_weights(*, alike: float = 1e-6, window: int = 2) -> Check:
    """Weights whose rows are all the same and get all the same gradient: the units will stay copies of each other.

    It looks at the first steps only.

    Arguments:
        alike: the largest difference between rows, relative to the largest value, that counts as none.
        window: steps in which it has to be so.

    Source: Goodfellow, Bengio & Courville, "Deep Learning" (2016), 8.4.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        for name, p in seen[-1].parameters.items():
            facts = [each.parameters[name].facts for each in seen if name in each.parameters]
            differences = [fact.get(key, math.nan) for fact in facts for key in ("same", "alike")]
            if all(each <= alike for each in differences):
                what = f"largest difference between the rows of the gradient of {name!r}, relative to its largest value"
                yield SYMMETRY.broken(seen[-1], p.layer, what, p.facts["alike"], alike)

    kinds = (ParameterKind.GRAD, ParameterKind.VALUE, Kind.GRAD_OUTPUT)
    return Check("symmetry", judge, kinds, window)
