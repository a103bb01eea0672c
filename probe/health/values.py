"""Checks of what flows forward: where NaN began, dead, constant and saturated layers, the range of half precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from probe.capture import Kind, ParameterKind
from probe.findings import Finding, Severity
from probe.health.doctor import Check
from probe.health.vitals import CallRecord, PassRecord, Step, finite

_FORWARD = Kind.INPUT | Kind.OUTPUT


def calls_of(step: Step) -> Iterator[CallRecord]:
    """The calls of a step's passes in training, without those of the root."""
    for pass_ in step.trained():
        yield from (call for call in pass_.calls if call.layer)


def shown(names: Sequence[str], limit: int = 4) -> str:
    """A few names in words."""
    few = ", ".join(repr(name) for name in names[:limit])
    return few + (f" and {len(names) - limit} more" if len(names) > limit else "")


def every_step(seen: Sequence[Step], window: int) -> bool:
    """Whether there are `window` steps to judge."""
    return len(seen) >= window


# -- NaN and Inf -------------------------------------------------------------------------------------------------------


def nonfinite(*, window: int = 5) -> Check:
    """Where NaN or Inf began in a forward pass: the layer that made it out of finite inputs, not those that pass it on.

    ``-Inf`` alone is taken for a mask, as long as nothing else comes of it.

    Arguments:
        window: of how many steps before it to give the layer's statistics.

    Source: IEEE 754: every operation on NaN gives NaN, so only the first one tells.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        if any(each.broken for each in seen[:-1]):
            return  # it was told
        for pass_ in step.passes:
            if pass_.broken:
                yield _origin(pass_, seen)
                return
        if step.loss is not None and not np.isfinite(step.loss):
            yield Finding(
                "loss",
                NONFINITE,
                "NaN or Inf in the loss, with finite outputs of all layers",
                1,
                0,
                "the loss function makes it: a logarithm or a division by zero, or a target out of range",
                "use the losses that take logits (cross_entropy, binary_cross_entropy_with_logits), or add an epsilon",
                _IEEE,
                step.number,
                Severity.ERROR,
            )

    return Check(NONFINITE, judge, (_FORWARD, ParameterKind.VALUE), window + 1, of_broken=True)


NONFINITE = "NaN or Inf"
_IEEE = "IEEE 754: NaN and Inf spread to all that is computed from them, so only where they begin tells"


def _origin(pass_: PassRecord, seen: Sequence[Step]) -> Finding:
    step = seen[-1]
    inner = [call for call in pass_.calls if call.layer] or pass_.calls
    bad = [call for call in inner if not finite(call.outputs.values())]
    made = [call for call in bad if finite(call.inputs.values())]
    root = pass_.root
    if root is not None and not finite(root.inputs.values()) and any(each.head.nan for each in root.inputs.values()):
        return Finding(
            "",
            NONFINITE,
            "NaN or Inf in the model's input",
            sum(v.nonfinite for v in root.inputs.values()),
            0,
            "the data holds it; the layers only pass it on",
            "look at the data: torch.isfinite(batch).all()",
            _IEEE,
            step.number,
            Severity.ERROR,
        )
    first = _innermost(made) if made and made[0].order <= bad[0].order else (bad or inner)[0]
    count = sum(each.nonfinite for each in first.outputs.values())
    passed = [call.layer for call in bad if call is not first]
    details = [f"passed on by {shown(list(dict.fromkeys(passed)))}"] if passed else []
    own = [p for p in step.parameters.values() if p.layer == first.layer and p.value and p.value.nonfinite]
    details += _before(first, seen)
    if first in made or not bad:
        what = f"NaN or Inf in the output, of {sum(v.head.count for v in first.outputs.values())} elements"
        meaning = "this layer made it out of finite inputs; those after it only pass it on"
    else:
        what = "NaN or Inf in the output, and already in what came in"
        meaning = "an operation between the layer before and this one made it"
    if own:
        meaning = f"its parameter {own[0].name!r} is not finite: an earlier update broke it"
    return Finding(
        first.layer,
        NONFINITE,
        what,
        count,
        0,
        meaning,
        "look for a division, root, logarithm or exponential there; lower the learning rate or clip gradients if "
        "values grew step by step; in half precision compute this layer in float32",
        _IEEE,
        step.number,
        Severity.ERROR,
        tuple(details),
    )


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
        if not every_step(seen, window):
            return
        alive, fed, count = _alive(seen)
        for (layer, index), units in alive.items():
            dead = 1 - units.mean()
            before = fed.get((layer, index))
            passes_on = before is not None and 1 - before.mean() > dead - share / 2
            if passes_on or dead <= share or (dead < 1 and count[layer, index] < samples):
                continue
            yield Finding(
                layer,
                "dead units",
                f"share of units that were zero for all samples of {window} steps",
                dead,
                share,
                "these units get no gradient any more and will stay dead; a learning rate that was too high or a large "
                "negative bias pushed them there"
                if dead < 1
                else "nothing passes this layer, forward or backward",
                "lower the learning rate or warm it up; He initialisation; LeakyReLU or GELU in place of ReLU",
                "Lu et al. 2019, arXiv:1903.06733; CS231n: up to 40 % with a learning rate set too high",
                seen[-1].number,
                Severity.ERROR if dead == 1 else Severity.WARNING,
                tuple(f"fed by {name!r}" for name in _feeders(seen[-1], layer, index)),
            )

    return Check("dead units", judge, _FORWARD, window)


def _alive(seen: Sequence[Step]) -> tuple[dict[tuple[str, int], np.ndarray], ...]:
    """By layer and call: which units of output and of input were ever alive, and how many samples there were."""
    out: dict[tuple[str, int], np.ndarray] = {}
    into: dict[tuple[str, int], np.ndarray] = {}
    count: dict[tuple[str, int], int] = {}
    steps: dict[tuple[str, int], set[int]] = {}
    for step in seen:
        for call in calls_of(step):
            key = call.layer, call.index
            for place, found in ((call.outputs, out), (call.inputs, into)):
                units = next((v.get("alive") for v in place.values() if v.get("alive") is not None), None)
                if units is not None:
                    before = found.get(key)
                    found[key] = units if before is None or before.shape != units.shape else before | units
            for value in list(call.outputs.values())[:1]:
                units = value.get("alive")
                count[key] = count.get(key, 0) + (value.head.count // max(len(units), 1) if units is not None else 0)
            steps.setdefault(key, set()).add(step.number)
    whole = {key: units for key, units in out.items() if len(steps[key]) == len(seen)}
    return whole, into, count  # type: ignore[return-value]


def _feeders(step: Step, layer: str, index: int) -> tuple[str, ...]:
    return next((call.fed_by for call in calls_of(step) if (call.layer, call.index) == (layer, index)), ())


def constant(*, spread: float = 1e-6, window: int = 3) -> Check:
    """Layers that give every sample the same output though their inputs differ.

    Arguments:
        spread: the largest difference between samples, relative to the largest value, that counts as none.
        window: steps in which it has to be so.

    Source: an output without variance over the data carries no information about it.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        if not every_step(seen, window):
            return
        flat = [{(c.layer, c.index): c for c in calls_of(step) if _collapses(c, spread)} for step in seen]
        for (layer, index), call in flat[-1].items():
            if all((layer, index) in each for each in flat):
                yield Finding(
                    layer,
                    "constant output",
                    "largest difference between samples, relative to the largest value",
                    _least_spread(call.outputs.values()),
                    spread,
                    "the layer gives every sample the same: what comes after it cannot depend on the data",
                    "look at its weights (all zero, or swamped by a bias?), at its input's scale, and at reductions "
                    "over the batch",
                    "an output without variance over the batch carries nothing of the data",
                    seen[-1].number,
                    Severity.ERROR,
                )

    return Check("constant output", judge, _FORWARD, window)


def _least_spread(values: object) -> float:
    return min((v.get("spread") for v in values if v.get("spread") is not None), default=float("nan"))  # type: ignore


def _collapses(call: CallRecord, limit: float) -> bool:
    into = [v.get("spread") for v in call.inputs.values() if v.get("spread") is not None]
    out = [v.get("spread") for v in call.outputs.values() if v.get("spread") is not None]
    zero = all(v.head.zeros == v.head.count for v in call.outputs.values())
    varies = bool(into) and len(into) == len(call.inputs) and min(into) > limit
    return varies and bool(out) and max(out) <= limit and not zero


# -- saturation --------------------------------------------------------------------------------------------------------


def saturated(*, share: float = 0.9, window: int = 3) -> Check:
    """Sigmoid, Tanh, Hardtanh, Hardsigmoid and Softsign modules whose outputs lie where they have no slope.

    That is where the derivative is below a tenth of its greatest value. The model's last layer is left out: there a
    classifier that is sure of itself saturates.

    Arguments:
        share: of the outputs that may be saturated.
        window: steps in which it has to be so.

    Source: Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks" (2010).
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        yield from _persistent(
            seen,
            window,
            "saturated",
            share,
            "saturated",
            f"share of outputs that are saturated, the least of {window} steps",
            "almost no gradient passes: the inputs of this function are far too large",
            "scale down the weights before it, or normalise its input (LayerNorm, BatchNorm)",
            "Glorot & Bengio 2010, AISTATS",
        )

    return Check("saturated", judge, _FORWARD, window)


def attention(*, share: float = 0.9, window: int = 3) -> Check:
    """Attention whose every query looks at one place: the entropy of nearly all rows has collapsed.

    Seen where the weights pass a module: ``nn.Softmax`` (of three dimensions or more) and ``nn.Dropout``; the weights
    of ``nn.MultiheadAttention`` are computed once more for one sample, and so are those of a module with a ``qkv`` or
    ``c_attn`` layer and ``num_heads`` or ``n_head``. Others that call ``scaled_dot_product_attention`` are not seen.

    Arguments:
        share: of the rows that may have an entropy below a hundredth of the greatest possible one.
        window: steps in which it has to be so.

    Source: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (2023).
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        yield from _persistent(
            seen,
            window,
            "peaked",
            share,
            "attention collapsed",
            f"share of queries with all their attention in one place, the least of {window} steps",
            "the softmax is saturated: no gradient reaches queries and keys",
            "scale the logits by 1/sqrt(head size); normalise queries and keys; warm the learning rate up",
            "Zhai et al. 2023, arXiv:2303.06296",
        )

    return Check("attention collapsed", judge, _FORWARD, window)


def _persistent(
    seen: Sequence[Step],
    window: int,
    fact: str,
    limit: float,
    check: str,
    what: str,
    meaning: str,
    advice: str,
    src: str,
) -> Iterator[Finding]:
    """Findings for layers whose fact was above the limit in every step."""
    if not every_step(seen, window):
        return
    least: dict[tuple[str, int], list[float]] = {}
    for step in seen:
        root = [pass_.root for pass_ in step.trained()]
        last = {id(v) for call in root if call is not None for v in call.outputs.values()}
        for call in calls_of(step):
            valid = call.facts.get("sums", 0.0) < 0.01 and not any(id(v) in last for v in call.outputs.values())
            if fact in call.facts and valid:
                least.setdefault((call.layer, call.index), []).append(call.facts[fact])
    for (layer, _), values in least.items():
        if len(values) >= len(seen) and min(values) > limit:
            yield Finding(layer, check, what, min(values), limit, meaning, advice, src, seen[-1].number)


# -- half precision ----------------------------------------------------------------------------------------------------


def half_precision(*, overflow: float = 0.5, underflow: float = 0.5, window: int = 2) -> Check:
    """float16 activations about to overflow, and float16 gradients most of which are too small for it.

    bfloat16 has float32's range and needs neither.

    Arguments:
        overflow: how much of float16's range (65504) the largest activation may use.
        underflow: the share of a gradient's non-zero values that may be below the smallest normal number (6.1e-5).
        window: steps in which it has to be so.

    Source: Micikevicius et al., "Mixed Precision Training" (2018).
    """
    largest = torch.finfo(torch.float16).max
    source = "Micikevicius et al. 2018, arXiv:1710.03740: float16 keeps 6e-5 to 65504 in full precision"

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        if not every_step(seen, window):
            return
        over, under = [], []
        for step in seen:
            outputs = [(c.layer, v) for c in calls_of(step) for v in c.outputs.values() if v.dtype is torch.float16]
            grads = [(c.layer, v) for c in calls_of(step) for v in c.grad_outputs.values()]
            over.append({layer: v.largest / largest for layer, v in outputs if v.largest > overflow * largest})
            under.append({layer: v.get("subnormal") for layer, v in grads if (v.get("subnormal") or 0) > underflow})
        for layer in over[-1]:
            if all(layer in each for each in over):
                yield Finding(
                    layer,
                    "float16 overflow",
                    "largest output, as a share of float16's range",
                    over[-1][layer],
                    overflow,
                    "the next doubling is Inf",
                    "compute this layer in float32 or bfloat16, or scale it down",
                    source,
                    seen[-1].number,
                )
        common = [layer for layer in under[-1] if all(layer in each for each in under)]
        if common:
            worst = max(common, key=lambda layer: float(under[-1][layer]))
            yield Finding(
                worst,
                "float16 underflow",
                "share of the gradient's values too small for full precision",
                under[-1][worst],
                underflow,
                "gradients are rounded, and at last become zero",
                "scale the loss: torch.amp.GradScaler; or use bfloat16",
                source,
                seen[-1].number,
                details=(f"likewise {shown([each for each in common if each != worst])}",) if len(common) > 1 else (),
            )

    return Check("half precision", judge, (Kind.OUTPUT | Kind.GRAD_OUTPUT), window)
