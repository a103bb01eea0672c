"""Health checks: what is wrong in a training, where, and what to try.

    with Probe(model, optimizer=optimizer, observers=health.checks()) as p:
        train(...)
    print(p.findings)                                    # the worst first; "nothing found" when all is well

    p.log(board, *health.checks(), every=100)            # into TensorBoard: findings as text, and a mark at their steps
    health.check(model, loss_fn, x, y, optimizer=optimizer)    # a few steps on a copy, and a report

A check is a function of the last steps' plain records that yields findings (`Check`); what it needs is measured once
for all checks, in the hooks and around the optimizer's step, without waiting for the device.
"""

from __future__ import annotations

from probe.findings import Finding, Findings, Severity
from probe.health.gradients import gradient_flow, missing_gradients, nonfinite_gradients, symmetric_weights
from probe.health.losses import independent_loss, loss_spikes
from probe.health.modes import batch_norm, evaluation_mode, training_mode
from probe.health.parameters import optimizer_membership, stuck_parameters, update_sizes, zero_learning_rate
from probe.health.records import CallRecord, ParameterRecord, PassRecord, Step
from probe.health.rules import Check, Rule
from probe.health.run import check
from probe.health.values import (
    attention_entropy,
    constant_outputs,
    dead_units,
    half_precision,
    nonfinite_values,
    overwritten_captures,
    saturation,
)
from probe.health.vitals import Vitals

__all__ = [
    "CallRecord",
    "Check",
    "Finding",
    "Findings",
    "ParameterRecord",
    "PassRecord",
    "Rule",
    "Severity",
    "Step",
    "Vitals",
    "attention_entropy",
    "batch_norm",
    "check",
    "checks",
    "constant_outputs",
    "dead_units",
    "evaluation_mode",
    "gradient_flow",
    "half_precision",
    "independent_loss",
    "loss_spikes",
    "missing_gradients",
    "nonfinite_gradients",
    "nonfinite_values",
    "optimizer_membership",
    "overwritten_captures",
    "saturation",
    "stuck_parameters",
    "symmetric_weights",
    "training_mode",
    "update_sizes",
    "zero_learning_rate",
]


def checks(
    *,
    dead: float = 0.5,
    spread: float = 1e-6,
    saturated: float = 0.9,
    peaked: float = 0.9,
    overflow: float = 0.5,
    underflow: float = 0.5,
    vanishing: float = 1e-5,
    exploding: float = 1e4,
    alike: float = 1e-6,
    update_high: float = 1.0,
    update_low: float = 1e-7,
    rounded: float = 0.95,
    lag: float = 8.0,
    spike: float = 0.5,
) -> list[Check]:
    """Every check, for ``Probe(model, observers=...)`` and ``p.log``.

    The thresholds that one may want to change are here; the others, and how many steps each check looks at, are
    arguments of the checks themselves, any of which can be given alone: ``observers=[health.dead_units(share=0.3)]``.

    Arguments:
        dead: share of a layer's units that may be zero for all samples (`dead_units`; Lu et al. 2019).
        spread: relative difference between samples that counts as none (`constant_outputs`, `independent_loss`).
        saturated: share of a sigmoid's or tanh's outputs that may have no slope (`saturation`; Glorot & Bengio 2010).
        peaked: share of queries that may look at one place (`attention_entropy`; Zhai et al. 2023).
        overflow: share of float16's range that an output may use (`half_precision`; Micikevicius et al. 2018).
        underflow: share of a gradient's values that float16 may not hold in full precision (likewise).
        vanishing: least ratio of gradient norms, first layers to last (`gradient_flow`; Bengio et al. 1994).
        exploding: greatest one (likewise).
        alike: relative difference between rows of a weight and of its gradient that counts as none
            (`symmetric_weights`; Goodfellow et al. 2016).
        update_high: greatest ratio of an update to the first weight (`update_sizes`; CS231n: should be near 1e-3).
        update_low: least ratio of an update to the weight (likewise).
        rounded: share of a half precision weight that updates may not change (`stuck_parameters`; Zamirai et al. 2020).
        lag: how many times BatchNorm's running variance the batch's may be (`batch_norm`; Wu & Johnson 2021).
        spike: share of what was gained that a jump of the loss may undo (`loss_spikes`; Chowdhery et al. 2022).

    Returns:
        a new list; the checks in it hold no state and may serve several probes.
    """
    return [
        nonfinite_values(),
        nonfinite_gradients(),
        dead_units(share=dead),
        constant_outputs(spread=spread),
        saturation(share=saturated),
        attention_entropy(share=peaked),
        half_precision(overflow=overflow, underflow=underflow),
        overwritten_captures(),
        gradient_flow(vanishing=vanishing, exploding=exploding),
        missing_gradients(),
        symmetric_weights(alike=alike),
        update_sizes(high=update_high, low=update_low),
        stuck_parameters(rounded=rounded),
        optimizer_membership(),
        zero_learning_rate(),
        evaluation_mode(),
        training_mode(),
        batch_norm(lag=lag),
        independent_loss(spread=spread),
        loss_spikes(share=spike),
    ]
