"""Checks of modes: dropout and BatchNorm in training and in evaluation, BatchNorm's statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from probe.capture import Kind
from probe.findings import Finding, Severity
from probe.health.records import CallRecord, Step
from probe.health.rules import Check, Rule, calls_of, shown

_FORWARD = Kind.INPUT | Kind.OUTPUT
_MODES = "torch.nn docs: Dropout and BatchNorm do one thing under train() and another under eval()"
TRAIN_MODE = Rule(
    "train mode in evaluation",
    "dropout still drops, and BatchNorm normalises by the batch and updates its statistics from held-out data",
    "model.eval() before evaluation, model.train() after it",
    _MODES,
)
EVAL_MODE = Rule(
    "eval mode in training",
    "dropout does nothing, and BatchNorm normalises by stored statistics, which stand still",
    "model.train() before training; freeze the layer's parameters too if this is meant",
    _MODES,
)


def _switches(call: CallRecord) -> bool:
    """Whether the module works otherwise in eval mode than in train mode."""
    return issubclass(call.type, nn.modules.batchnorm._BatchNorm) or call.facts.get("dropout", 0.0) > 0


def evaluation_mode(*, passes: int = 2) -> Check:
    """Passes without a graph, as in evaluation, through dropout or BatchNorm in train mode.

    One such pass between two steps is no finding, nor are several in each of two successive steps: that is how a GAN
    makes samples for its discriminator.

    Arguments:
        passes: so many in a row are an evaluation; one is enough under ``p.tag(...)`` or in eval mode.

    Source: torch.nn's documentation of ``Dropout`` and ``BatchNorm``.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        before = seen[-2] if len(seen) == 3 else None
        rare = before is not None and (before.blind_passes < passes or step.number > before.number + 1)
        for pass_ in step.passes:
            wrong = [call.layer for call in pass_.calls if call.training and _switches(call)]
            if wrong and not pass_.grad and (pass_.mode != "train" or (step.blind_passes >= passes and rare)):
                layer = "" if pass_.training else wrong[0]
                what = "layers in train mode in a pass without gradients"
                yield TRAIN_MODE.broken(step, layer, what, len(wrong), 0, shown(wrong))
                return

    return Check("train mode in evaluation", judge, (_FORWARD,), 3, eager=True)


def training_mode(*, window: int = 2) -> Check:
    """Training steps in which dropout is off, or BatchNorm uses its stored statistics.

    BatchNorm layers whose own parameters are frozen are meant to be so.

    Arguments:
        window: steps in which it has to be so.

    Source: torch.nn's documentation of ``Dropout`` and ``BatchNorm``.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        wrong = [_asleep(each) if each.stepped else set() for each in seen]
        layers = [call.layer for call in calls_of(step) if all(call.layer in each for each in wrong)]
        if layers:
            whole = all(not pass_.training for pass_ in step.trained())
            for layer in [""] if whole else dict.fromkeys(layers):
                what = "layers in eval mode in training steps"
                yield EVAL_MODE.broken(step, layer, what, len(set(layers)), 0, shown(layers))

    return Check("eval mode in training", judge, (_FORWARD | Kind.GRAD_OUTPUT,), window)


def _asleep(step: Step) -> set[str]:
    """Layers that a gradient came back to and that are in eval mode, though it makes a difference."""
    trainable = {p.layer for p in step.parameters.values()}
    calls = [call for call in calls_of(step) if not call.training and _switches(call) and call.grad_outputs]
    return {call.layer for call in calls if call.facts.get("dropout", 0.0) > 0 or call.layer in trainable}


_NORM = "Ioffe & Szegedy 2015, arXiv:1502.03167; Wu & Johnson 2021, arXiv:2105.07576"
SINGLE = Rule(
    "BatchNorm with batch 1",
    "each sample is normalised by itself alone, and the running statistics are of single samples",
    "a larger batch, GroupNorm, LayerNorm, or SyncBatchNorm over several devices",
    _NORM,
)
STANDING = Rule(
    "BatchNorm statistics frozen",
    "the running statistics never become those of the data, and evaluation will use them",
    "momentum=0.1, torch's default",
    _NORM,
    Severity.ERROR,
)
ALIEN = replace(
    STANDING,
    meaning="the stored statistics are of other data: what comes out is not normalised",
    advice="load the statistics with the weights, or let the layer see the data in train mode for a while first",
)
DIVERGING = replace(
    STANDING,
    check="BatchNorm statistics diverge",
    meaning="what comes in grows faster than the running statistics can follow: evaluation will be wrong",
    advice="lower the learning rate; weight decay on the layer before; a larger momentum",
)


def batch_norm(
    *, momentum: float = 1e-4, lag: float = 8.0, shift: float = 3.0, scale: float = 10.0, window: int = 3
) -> Check:
    """BatchNorm with a batch of one, and statistics that stand still, run away, or are of other data.

    Arguments:
        momentum: of the running statistics, the least one.
        lag: how many times the running variance the batch's may be, once half of the running one is of this training.
        shift: how far, in standard deviations, the mean of the batch may lie from a frozen one.
        scale: how many times a frozen variance the batch's may be, or the other way round.
        window: steps in which it has to be so.

    Source: Ioffe & Szegedy, "Batch Normalization" (2015); Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021).
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        for call in _norms(step):
            past = [c for each in seen for c in _norms(each) if (c.layer, c.index) == (call.layer, call.index)]
            facts = [each.facts for each in past]
            if len({step.number for step in seen}) > len(past):
                continue
            if all(each.training and each.facts["batch"] == 1 for each in past):
                yield SINGLE.broken(step, call.layer, "samples in the batch", 1, 2)
            elif "scale" not in call.facts:
                continue
            elif not call.training:
                off = min(max(f["shift"] / shift, f["scale"] / scale, 1 / (f["scale"] * scale)) for f in facts)
                if off > 1 and all(p.layer != call.layer for p in step.parameters.values()):  # else: `training_mode`
                    what = "distance of the batch from the frozen statistics, in units of what is allowed"
                    yield ALIEN.broken(step, call.layer, what, off, 1)
            elif (call.facts["momentum"] if call.facts["momentum"] is not None else 1.0) < momentum:
                what = "momentum of the running statistics"
                yield STANDING.broken(step, call.layer, what, call.facts["momentum"], momentum)
            elif _is_settled(call) and min(f["scale"] for f in facts) > lag:
                what = "variance of the batch, as a ratio to the running one"
                yield DIVERGING.broken(step, call.layer, what, min(f["scale"] for f in facts), lag)

    return Check("BatchNorm", judge, (_FORWARD,), window)


def _norms(step: Step) -> list[CallRecord]:
    return [call for call in calls_of(step) if "batch" in call.facts]


def _is_settled(call: CallRecord) -> bool:
    """Whether at least half of the running statistics comes from this training."""
    momentum = call.facts["momentum"]
    steps = call.facts["tracked"]
    return bool(steps >= 1 if momentum is None or momentum >= 0.5 else steps > math.log(0.5) / math.log1p(-momentum))
