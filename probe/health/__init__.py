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
from probe.health import gradients, losses, modes, parameters, values
from probe.health.doctor import Check
from probe.health.run import check
from probe.health.vitals import CallRecord, ParameterRecord, PassRecord, Step, Vitals

__all__ = [
    "CallRecord",
    "Check",
    "Finding",
    "Findings",
    "ParameterRecord",
    "PassRecord",
    "Severity",
    "Step",
    "Vitals",
    "check",
    "checks",
]


def checks() -> list[Check]:
    """Every check."""
    return [
        values.nonfinite(),
        values.dead_units(),
        values.constant(),
        values.saturated(),
        values.attention(),
        values.half_precision(),
        gradients.nonfinite(),
        gradients.gradient_flow(),
        gradients.no_gradient(),
        gradients.symmetry(),
        parameters.updates(),
        parameters.never_moves(),
        parameters.optimizers(),
        parameters.learning_rate(),
        modes.evaluated_in_train_mode(),
        modes.trained_in_eval_mode(),
        modes.batch_norm(),
        losses.independent(),
        losses.spike(),
    ]
