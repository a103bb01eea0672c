"""Checks of modes: dropout and BatchNorm in training and in evaluation, BatchNorm's statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from probe.capture import Kind, ParameterKind
from probe.findings import Finding
from probe.health.doctor import Check
from probe.health.values import calls_of, every_step, shown
from probe.health.vitals import CallRecord, PassRecord, Step

_FORWARD = Kind.INPUT | Kind.OUTPUT
_SOURCE = "torch.nn docs: Dropout and BatchNorm do one thing under train() and another under eval()"


def _switches(call: CallRecord) -> bool:
    """Whether the module works otherwise in eval mode than in train mode."""
    return issubclass(call.type, nn.modules.batchnorm._BatchNorm) or call.facts.get("dropout", 0.0) > 0


def evaluated_in_train_mode(*, passes: int = 2) -> Check:
    """Passes without a graph, as in evaluation, through dropout or BatchNorm in train mode.

    One such pass between two steps is no finding: that is how a GAN makes samples for its discriminator.

    Arguments:
        passes: so many in a row are an evaluation; one is enough under ``p.tag(...)`` or in eval mode.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        step = seen[-1]
        for pass_ in step.passes:
            named = pass_.mode != "train"
            if pass_.grad or not (named or step.blind_passes >= passes):
                continue
            wrong = [call.layer for call in pass_.calls if call.training and _switches(call)]
            if wrong:
                yield Finding(
                    "" if pass_.training else wrong[0],
                    "train mode in evaluation",
                    f"layers in train mode in a pass without gradients: {shown(wrong)}",
                    len(wrong),
                    0,
                    "dropout still drops, and BatchNorm uses the batch's statistics and updates its own from the "
                    "held-out data",
                    "model.eval() before evaluation, model.train() after it",
                    _SOURCE,
                    step.number,
                )
                return

    return Check("train mode in evaluation", judge, _FORWARD)


def trained_in_eval_mode(*, window: int = 2) -> Check:
    """Training steps in which dropout is off, or BatchNorm uses its stored statistics.

    BatchNorm layers whose own parameters are frozen are meant to be so.

    Arguments:
        window: steps in which it has to be so.
    """

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        if not every_step(seen, window) or not all(each.stepped for each in seen):
            return
        wrong = [_asleep(step) for step in seen]
        common = [layer for layer in wrong[-1] if all(layer in each for each in wrong)]
        if not common:
            return
        whole = all(not pass_.training for pass_ in seen[-1].trained())
        for layer in [""] if whole else common:
            yield Finding(
                layer,
                "eval mode in training",
                f"layers in eval mode in training steps: {shown(common)}",
                len(common),
                0,
                "dropout does nothing, and BatchNorm normalises by stored statistics, which stand still",
                "model.train() before training; freeze the layer's parameters too if this is meant",
                _SOURCE,
                seen[-1].number,
            )

    return Check("eval mode in training", judge, (_FORWARD | Kind.GRAD_OUTPUT, ParameterKind.VALUE), window)


def _asleep(step: Step) -> list[str]:
    trainable = {p.layer for p in step.parameters.values()}
    return [
        call.layer
        for call in calls_of(step)
        if not call.training
        and _switches(call)
        and call.grad_outputs
        and (call.facts.get("dropout", 0.0) > 0 or call.layer in trainable)
    ]


def batch_norm(
    *, momentum: float = 1e-3, lag: float = 4.0, shift: float = 3.0, scale: float = 10.0, window: int = 3
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
    source = "Ioffe & Szegedy 2015, arXiv:1502.03167; Wu & Johnson 2021, arXiv:2105.07576"

    def judge(seen: Sequence[Step]) -> Iterator[Finding]:
        if not every_step(seen, window):
            return
        for call in _norms(seen[-1].trained()):
            past = [
                c for step in seen for c in _norms(step.trained()) if (c.layer, c.index) == (call.layer, call.index)
            ]
            fault = _fault(past, momentum, lag, shift, scale) if len(past) >= window else None
            if fault is not None:
                check, what, measured, limit, meaning, advice = fault
                yield Finding(call.layer, check, what, measured, limit, meaning, advice, source, seen[-1].number)

    return Check("BatchNorm", judge, _FORWARD, window)


def _norms(passes: Iterator[PassRecord]) -> list[CallRecord]:
    return [call for pass_ in passes for call in pass_.calls if "batch" in call.facts]


def _fault(past: list[CallRecord], momentum: float, lag: float, shift: float, scale: float) -> tuple | None:  # type: ignore[type-arg]
    facts = [call.facts for call in past]
    last = facts[-1]
    if all(call.training and call.facts["batch"] == 1 for call in past):
        return (
            "BatchNorm with batch 1",
            "samples in the batch",
            1,
            2,
            "each sample is normalised by itself alone, and the running statistics are of single samples",
            "a larger batch, GroupNorm, LayerNorm, or SyncBatchNorm over several devices",
        )
    if "scale" not in last:
        return None
    own = last.get("momentum")
    if past[-1].training and own is not None and own < momentum:
        return (
            "BatchNorm statistics frozen",
            "momentum of the running statistics",
            own,
            momentum,
            "what evaluation will use never becomes that of the data",
            "momentum=0.1, torch's default",
        )
    if not past[-1].training:
        off = min(max(f["shift"] / shift, f["scale"] / scale, 1 / (f["scale"] * scale)) for f in facts)
        if off > 1:
            return (
                "BatchNorm statistics frozen",
                "distance of the frozen statistics from the batch's, in limits",
                off,
                1,
                "the stored statistics are of other data: what comes out is not normalised",
                "load the statistics with the weights, or train the layer in train mode for a while first",
            )
        return None
    half_life = math.inf if own == 0 else 1 if own is None else math.log(0.5) / math.log(1 - min(own, 0.5))
    if last["tracked"] > half_life and all(f["scale"] > lag for f in facts):
        return (
            "BatchNorm statistics diverge",
            "variance of the batch, as a ratio to the running one",
            min(f["scale"] for f in facts),
            lag,
            "what comes in grows faster than the running statistics follow: evaluation will be wrong",
            "lower the learning rate, weight decay on the layer before; a larger momentum",
        )
    return None
