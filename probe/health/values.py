"""Checks of what flows forward: where NaN began, dead, constant and saturated layers, the range of half precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from probe.capture import Kind, ParameterKind
from probe.findings import Finding, Severity
from probe.health.records import CallRecord, PassRecord, Step
from probe.health.rules import Check, Rule, calls_of, shown
from probe.health.vitals import Vitals, finite

_FORWARD = Kind.INPUT | Kind.OUTPUT
IEEE = "IEEE 754: NaN and Inf spread to all that is computed from them, so only where they begin tells"
Key = tuple[str, int]  # a layer's name, and which of its calls

# -- NaN and Inf -------------------------------------------------------------------------------------------------------

NONFINITE = Rule(
    "NaN or Inf",
    "this layer made it out of finite inputs; those after it only pass it on",
    "look for a division, root, logarithm or exponential there; lower the learning rate or clip gradients if values "
    "grew step by step; in half precision compute this layer in float32",
    IEEE,
    Severity.ERROR,
)
NONFINITE_INPUT = replace(
    NONFINITE,
    meaning="the data holds it; the layers only pass it on",
    advice="look at the data: torch.isfinite(batch).all()",
)
NONFINITE_LOSS = replace(
    NONFINITE,
    meaning="the loss function makes it: a logarithm or a division by zero, or a target out of range",
    advice="use the losses that take logits (cross_entropy, binary_cross_entropy_with_logits), or add an epsilon",
)


def nonfinite_values(*, history: int = 5) -> Check:
    """Where NaN or Inf began in a forward pass: the layer that made it out of finite inputs, not those that pass it on.

    ``-Inf`` alone is taken for a mask, as long as nothing else comes of it.

    Arguments:
        history: of how many steps before it to give the layer's statistics.

    Source: IEEE 754.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        if any(each.broken or each.poisoned for each in seen[:-1]):
            return  # it was told
        for pass_ in step.passes:
            if pass_.broken:
                yield _origin(pass_, seen)
                return
        if step.broken:
            yield NONFINITE_LOSS.broken(step, "loss", "NaN or Inf in the loss; all layers' outputs are finite", 1, 0)

    kinds = (_FORWARD, ParameterKind.VALUE, ParameterKind.GRAD, Kind.GRAD_OUTPUT)
    return Check("NaN or Inf", judge, kinds, history + 1, eager=True, of_broken=True)


def _origin(pass_: PassRecord, seen: Sequence[Step]) -> Finding:
    """The finding about the data, or about the layer that made it or met it first."""
    step, root = seen[-1], pass_.root
    if root is not None and any(each.nan or each.posinf for each in root.inputs.values()):
        count = sum(each.nonfinite for each in root.inputs.values())
        return NONFINITE_INPUT.broken(step, "", "elements of the model's input that are NaN or Inf", count, 0)
    inner = [call for call in pass_.calls if call.layer] or pass_.calls
    bad = [call for call in inner if not finite(call.outputs.values())] or inner[-1:]
    made = [call for call in bad if finite(call.inputs.values())]
    first = _innermost(made) if made and made[0] is bad[0] else bad[0]
    own = [p.name for p in step.parameters.values() if p.layer == first.layer and p.value and p.value.nonfinite]
    meaning = ""
    if own:
        meaning = f"its parameter {own[0]!r} is not finite: it was so from the start, or an update made it so"
    elif first not in made:
        before = [call.layer for call in inner if call.order < first.order and finite(call.outputs.values())]
        where = f"between {before[-1]!r} and this one" if before else "before it"
        meaning = f"it was in this layer's input already: an operation {where} made it"
    return NONFINITE.broken(
        step,
        first.layer,
        f"elements of the output that are NaN or Inf, of {sum(each.count for each in first.outputs.values())}",
        sum(each.nonfinite for each in first.outputs.values()),
        0,
        _passed_on([call.layer for call in bad if call.layer != first.layer]),
        *_before(first, seen),
        meaning=meaning,
    )


def _passed_on(layers: list[str]) -> str:
    return f"passed on by {shown(layers)}" if layers else ""


def _innermost(calls: list[CallRecord]) -> CallRecord:
    """The first call, or one of a layer within it that is as guilty."""
    first = calls[0]
    for each in calls[1:]:
        if each.layer.startswith(f"{first.layer}."):
            first = each
    return first


def _before(call: CallRecord, seen: Sequence[Step]) -> list[str]:
    """The statistics of a layer's output in the steps before."""
    lines = []
    for step in seen[:-1]:
        same = [each for each in calls_of(step) if (each.layer, each.index) == (call.layer, call.index)]
        if same and same[0].outputs:
            value = next(iter(same[0].outputs.values()))
            lines.append(f"step {step.number}: rms {value.rms:.3g}, largest {value.largest:.3g}")
    return lines


# -- units that do nothing ---------------------------------------------------------------------------------------------

_DYING = "Lu et al. 2019, arXiv:1903.06733; CS231n: up to 40 % with a learning rate set too high"
DEAD_UNITS = Rule(
    "dead units",
    "these units get no gradient any more and stay dead; a learning rate that was too high or a large negative bias "
    "pushed them there",
    "lower the learning rate or warm it up; He initialisation; LeakyReLU or GELU in place of ReLU",
    _DYING,
)
DEAD_LAYER = replace(
    DEAD_UNITS, meaning="nothing passes this layer, neither forward nor backward", severity=Severity.ERROR
)


def dead_units(*, share: float = 0.5, samples: int = 100, window: int = 5) -> Check:
    """Units (channels) that were exactly zero for every sample and position of `window` steps, where they became so.

    Arguments:
        share: of the layer's units that may be dead.
        samples: fewer than this in the window prove nothing, unless all units are dead.
        window: steps.

    Source: Lu et al., "Dying ReLU and Initialization" (2019); at a high learning rate "as much as 40 % of your network
    can be dead" (Karpathy, CS231n).
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        out, into, counts = _ever_alive(seen)
        for key, units in out.items():
            dead, before = 1 - units.mean(), 1 - into[key].mean() if key in into else 0.0
            if dead > share and before <= dead - share / 2 and (dead == 1 or counts[key] >= samples):
                rule = DEAD_LAYER if dead == 1 else DEAD_UNITS
                what = f"share of units that were zero for all samples of {window} steps"
                last = next((call for call in calls_of(seen[-1]) if (call.layer, call.index) == key), None)
                fed = shown(last.fed_by) if last is not None else ""
                yield rule.broken(seen[-1], key[0], what, dead, share, f"fed by {fed}" if fed else "")

    return Check("dead units", judge, (_FORWARD,), window)


def _ever_alive(seen: Sequence[Step]) -> tuple[dict[Key, np.ndarray], dict[Key, np.ndarray], dict[Key, int]]:
    """Which units of a call's output, and of its input, were ever alive; and how many values of each there were."""
    out: dict[Key, np.ndarray] = {}
    into: dict[Key, np.ndarray] = {}
    counts: dict[Key, int] = {}
    steps: dict[Key, set[int]] = {}
    for step in seen:
        for call in calls_of(step):
            key = call.layer, call.index
            for place, found in ((call.outputs, out), (call.inputs, into)):
                value = next((each for each in place.values() if each.get("alive") is not None), None)
                if value is None:
                    continue
                units, before = value.get("alive"), found.get(key)
                found[key] = units if before is None or before.shape != units.shape else before | units
                if place is call.outputs:
                    counts[key] = counts.get(key, 0) + value.count // len(units)
                    steps.setdefault(key, set()).add(step.number)
    return {key: out[key] for key in out if len(steps[key]) == len(seen)}, into, counts


CONSTANT = Rule(
    "constant output",
    "the layer gives every sample the same: what comes after it cannot depend on the data",
    "look at its weights (all zero, or swamped by a bias?), at its input's scale, and at reductions over the batch",
    "an output without variance over the batch carries nothing of the data",
    Severity.ERROR,
)


def constant_outputs(*, spread: float = 1e-6, window: int = 3) -> Check:
    """Layers that give every sample the same output though their inputs differ.

    One that no gradient passes, while it reaches the layers that feed it, is meant to be so: it looks at no more than
    its input's shape, as an encoding of positions does.

    Arguments:
        spread: the largest difference between samples, relative to the largest value, that counts as none.
        window: steps in which it has to be so.

    Source: an output without variance over the batch carries nothing of the data.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        flat = [
            {(c.layer, c.index): c for p in step.trained() for c in p.calls if c.layer and _swallows(c, p, spread)}
            for step in seen
        ]
        for key, call in flat[-1].items():
            if all(key in each for each in flat):
                what = "largest difference between samples, relative to the largest value"
                yield CONSTANT.broken(seen[-1], key[0], what, max(_spreads(call.outputs.values())), spread)

    return Check("constant output", judge, (_FORWARD, Kind.GRAD_INPUT | Kind.GRAD_OUTPUT), window)


def _swallows(call: CallRecord, pass_: PassRecord, limit: float) -> bool:
    """Whether a call collapses what it does depend on."""
    if not collapses(call, limit):
        return False
    reached = {each.layer for each in pass_.calls if each.grad_outputs}
    fed_back = bool(call.grad_inputs) or not any(each.grad_inputs for each in pass_.calls)
    return fed_back or not call.fed_by or not reached.issuperset(call.fed_by)


def collapses(call: CallRecord, limit: float) -> bool:
    """Whether a call's inputs differ between samples, and its outputs do not; all zero is dead, not constant."""
    into, out = _spreads(call.inputs.values()), _spreads(call.outputs.values())
    varies = bool(into) and len(into) == len(call.inputs) and min(into) > limit
    return varies and bool(out) and max(out) <= limit and not is_zero(call)


def is_zero(call: CallRecord) -> bool:
    """Whether all of a call's outputs are zero."""
    return bool(call.outputs) and all(each.zeros == each.count for each in call.outputs.values())


def _spreads(values: Iterable[Vitals]) -> list[float]:
    return [each.get("spread") for each in values if each.get("spread") is not None]


# -- saturation --------------------------------------------------------------------------------------------------------

SATURATED = Rule(
    "saturated",
    "almost no gradient passes: the inputs of this function are far too large",
    "scale down the weights before it, or normalise its input (LayerNorm, BatchNorm)",
    "Glorot & Bengio 2010, AISTATS",
)
COLLAPSED = Rule(
    "attention collapsed",
    "every query looks at one place only; the softmax is saturated, and no gradient reaches queries and keys",
    "scale the logits by 1/sqrt(head size); normalise queries and keys; warm the learning rate up",
    "Zhai et al. 2023, arXiv:2303.06296",
)


def saturation(*, share: float = 0.9, window: int = 3) -> Check:
    """Sigmoid, Tanh, Hardtanh, Hardsigmoid and Softsign modules whose outputs lie where they have no slope.

    That is where the derivative is below a tenth of its greatest value. The model's last layer is left out: there a
    classifier that is sure of itself saturates.

    Arguments:
        share: of the outputs that may be saturated.
        window: steps in which it has to be so.

    Source: Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks" (2010).
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        for layer, least in _persistent(seen, "saturated", share):
            what = f"share of outputs that are saturated, the least of {window} steps"
            yield SATURATED.broken(seen[-1], layer, what, least, share)

    return Check("saturated", judge, (_FORWARD,), window)


def attention_entropy(*, share: float = 0.9, window: int = 3) -> Check:
    """Attention whose every query looks at one place: the entropy of nearly all rows has collapsed.

    Seen where the weights pass a module: ``nn.Softmax`` (of three dimensions or more) and ``nn.Dropout``; the weights
    of ``nn.MultiheadAttention`` are computed once more for one sample, and so are those of a module with a layer
    ``qkv`` or ``c_attn`` and an attribute ``num_heads`` or ``n_head``. Others that call
    ``scaled_dot_product_attention`` are not seen.

    Arguments:
        share: of the rows that may have an entropy below a hundredth of the greatest possible one.
        window: steps in which it has to be so.

    Source: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (2023).
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        for layer, least in _persistent(seen, "peaked", share):
            what = f"share of queries with all their attention in one place, the least of {window} steps"
            yield COLLAPSED.broken(seen[-1], layer, what, least, share)

    return Check("attention collapsed", judge, (_FORWARD,), window)


def _persistent(seen: Sequence[Step], fact: str, limit: float) -> Iterator[tuple[str, float]]:
    """Layers, but for the last one, whose fact was above the limit in every step, with the least value."""
    found: dict[Key, list[float]] = {}
    for step in seen:
        last = {id(v) for each in step.trained() if each.root is not None for v in each.root.outputs.values()}
        for call in calls_of(step):
            is_distribution = call.facts.get("sums", 0.0) < 0.01
            if fact in call.facts and is_distribution and not any(id(v) in last for v in call.outputs.values()):
                found.setdefault((call.layer, call.index), []).append(call.facts[fact])
    for (layer, _), values in found.items():
        if len(values) >= len(seen) and min(values) > limit:
            yield layer, min(values)


# -- half precision ----------------------------------------------------------------------------------------------------

_HALF = "Micikevicius et al. 2018, arXiv:1710.03740: float16 keeps 6e-5 to 65504 in full precision"
OVERFLOW = Rule(
    "float16 overflow",
    "the next doubling is Inf",
    "compute this layer in float32 or bfloat16, or scale it down",
    _HALF,
)
UNDERFLOW = Rule(
    "float16 underflow",
    "gradients are rounded coarsely, and at last become zero",
    "scale the loss: torch.amp.GradScaler; or use bfloat16",
    _HALF,
)


def half_precision(*, overflow: float = 0.5, underflow: float = 0.5, window: int = 2) -> Check:
    """float16 activations about to overflow, and float16 gradients most of which are too small for it.

    bfloat16 has float32's range and needs neither.

    Arguments:
        overflow: how much of float16's range (65504) the largest activation may use.
        underflow: the share of a gradient's non-zero values that may be below the smallest normal number (6.1e-5).
        window: steps in which it has to be so.

    Source: Micikevicius et al., "Mixed Precision Training" (2018).
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        over = [
            {c.layer: used for c in calls_of(step) if (used := _range_made(c, overflow)) > overflow} for step in seen
        ]
        for layer, used in over[-1].items():
            if all(layer in each for each in over):
                what = "largest output, as a share of float16's range"
                yield OVERFLOW.broken(seen[-1], layer, what, used, overflow)
        under = [{c.layer: lost for c in calls_of(step) if (lost := _lost(c)) > underflow} for step in seen]
        common = {layer: lost for layer, lost in under[-1].items() if all(layer in each for each in under)}
        if common:
            worst = max(common, key=lambda layer: common[layer])
            others = shown(layer for layer in common if layer != worst)
            what = "share of the gradient's values that are too small for full precision"
            details = f"likewise {others}" if others else ""
            yield UNDERFLOW.broken(seen[-1], worst, what, common[worst], underflow, details)

    return Check("half precision", judge, (_FORWARD, Kind.GRAD_OUTPUT), window)


def _range_made(call: CallRecord, limit: float) -> float:
    """How much of float16's range an output uses, where the inputs use less than the limit."""
    used, into = (
        max((v.largest for v in values if v.dtype is torch.float16), default=0.0) / torch.finfo(torch.float16).max
        for values in (call.outputs.values(), call.inputs.values())
    )
    return used if into <= limit else 0.0


def _lost(call: CallRecord) -> float:
    return max((each.get("subnormal") or 0.0 for each in call.grad_outputs.values()), default=0.0)


# -- written over ------------------------------------------------------------------------------------------------------

OVERWRITTEN = Rule(
    "overwritten capture",
    "a forward hook of yours was given this output, and an in-place operation wrote over it afterwards: what the hook "
    "kept, also by detach(), holds later values",
    "keep output.detach().clone() in the hook, or read the layer with a Probe, whose captures are copy-on-write",
    "torch.nn docs, register_forward_hook: the hook gets the output itself, not a copy",
    Severity.NOTICE,
)


def overwritten_captures() -> Check:
    """Outputs that somebody else's forward hook was given, that are still held, and that were written to in place."""

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        for pass_ in seen[-1].passes:
            for call in pass_.calls:
                writes = call.facts.get("overwritten", 0)
                if writes and not math.isnan(writes):
                    yield OVERWRITTEN.broken(seen[-1], call.layer, "in-place writes after the hook", writes, 0)

    return Check("overwritten capture", judge, (Kind.OUTPUT,))
