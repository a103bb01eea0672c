"""`check`: a few steps on a copy of the model, and a report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from probe.core import Probe
from probe.findings import Findings


def check(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    *batch: Any,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 10,
    checks: list[Any] | None = None,
    report: Callable[[str], Any] | None = print,
) -> Findings:
    """Train a copy of the model on one batch for a few steps, print what is wrong, and leave the model untouched.

    Arguments:
        model: in the modes it is to be trained in.
        loss_fn: ``loss_fn(output, target)``, or ``loss_fn(output)`` where the batch has no target.
        batch: the model's input and the target, ``x, y``; of more than two all but the last one go to the model. A
            mapping goes to the model as keywords. One alone has no target.
        optimizer: of the model's parameters; a copy of it steps. Without one only a forward and a backward are run,
            and what optimizers do is not checked.
        steps: how many.
        checks: which, by default ``health.checks()``.
        report: what to hand the report to; None prints nothing.

    Returns:
        the findings, the worst first.
    """
    from probe import health

    if not batch:
        raise TypeError("check needs a batch: health.check(model, loss_fn, x, y)")
    twin, stepper = _copied(model, optimizer)
    given = batch[:-1] if len(batch) > 1 else batch
    target = batch[-1:] if len(batch) > 1 else ()
    devices = sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
    p = Probe(twin, optimizer=stepper, observers=health.checks() if checks is None else checks)
    with torch.random.fork_rng(devices), p:

        def closure() -> Any:
            twin.zero_grad()
            output = twin(**given[0]) if len(given) == 1 and isinstance(given[0], Mapping) else twin(*given)
            loss = loss_fn(output, *target)
            loss.backward()
            return loss

        for _ in range(steps):
            if isinstance(stepper, torch.optim.LBFGS):  # it calls the model itself
                stepper.step(closure)
                continue
            closure()
            if stepper is None:
                p.step()
            else:
                stepper.step()
    if report is not None:
        report(str(p.findings))
    return p.findings


def _copied(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """Copies, the optimizer's of the copied model's parameters."""
    memo: dict[int, Any] = {}
    twin, stepper = copy.deepcopy(model, memo), copy.deepcopy(optimizer, memo)
    if stepper is not None:  # what an optimizer has of its own, as LBFGS, torch does not copy
        own = {key: value for key, value in vars(optimizer).items() if not callable(value)}
        vars(stepper).update(copy.deepcopy({key: own[key] for key in own.keys() - vars(stepper).keys()}, memo))
    return twin, stepper
