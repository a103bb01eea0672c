"""Methods that ask how the score changes when a channel is masked or taken out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from probe.cam.methods.arithmetic import checked, combine, ratio, resize

Rows = Callable[[slice], Tensor]
"""Makes a slice of perturbed rows when they are needed, ``[B, len(slice), ...]``: all of them at once would not fit."""


def score_cam(
    activation: Tensor,
    size: tuple[int, ...],
    masked_score: Callable[..., Tensor],
    *,
    official: bool = False,
) -> Tensor:
    """Score-CAM: Σ_k w_k A_k with w = softmax over k of the score of the input masked by channel k.

    Wang et al., "Score-CAM", CVPR workshops 2020 (arXiv:1910.01279). The mask is A_k enlarged to the input and then
    scaled to 0..1 (in this order, as in paper and code; torch-cam scales first; pytorch-grad-cam enlarges with
    aligned corners). The paper subtracts a baseline score, the same for every k, which the softmax cancels. A
    constant channel's mask is 0.

    Arguments:
        activation: ``[B, C, *spatial]``.
        size: spatial size of the input.
        masked_score: ``(masks, count)`` to ``[B, count]``: scores of the input times each mask; ``masks(slice)`` makes
            ``[B, len(slice), *size]`` of them. With ``probability=True`` the softmax probability of the class.
        official: as the authors' code: w is the class's probability, without a softmax over k, and a constant channel
            has weight 0.

    Returns:
        ``[B, *spatial]``.
    """
    activation = checked(activation, "activation")
    masks = _masks(activation, size)
    if not official:
        return combine(masked_score(masks, activation.shape[1]).softmax(1), activation)
    weights = masked_score(masks, activation.shape[1], probability=True)
    flat = activation.flatten(2)
    return combine(weights.masked_fill(flat.amax(2) == flat.amin(2), 0), activation)


def ss_cam(
    activation: Tensor,
    size: tuple[int, ...],
    masked_score: Callable[..., Tensor],
    *,
    samples: int = 10,
    noise: float = 0.2,
) -> Tensor:
    """SS-CAM: Score-CAM whose scores are averaged over noisy masks.

    Wang et al., "SS-CAM: Smoothed Score-CAM for Sharper Visual Feature Localization" (arXiv:2006.14255), the variant
    that smooths the feature maps. The noise is Gaussian on the mask, which is within 0..1; torch-cam's default
    deviation of 2 drowns that mask.

    Arguments:
        activation, size, masked_score: as for `score_cam`.
        samples: noisy masks a channel; the cost is that of so many Score-CAMs.
        noise: standard deviation.

    Returns:
        ``[B, *spatial]``.
    """
    activation = checked(activation, "activation")
    channels, clean = activation.shape[1], _masks(activation, size)

    def masks(rows: slice) -> Tensor:
        chunk = clean([row % channels for row in range(rows.start, rows.stop)])
        return chunk + noise * torch.randn_like(chunk)

    scores = masked_score(masks, channels * samples)
    return combine(scores.view(-1, samples, channels).mean(1).softmax(1), activation)


def is_cam(
    activation: Tensor, size: tuple[int, ...], masked_score: Callable[..., Tensor], *, steps: int = 10
) -> Tensor:
    """IS-CAM: Score-CAM whose scores are integrated while the mask fades in.

    The score of channel k is the mean over i = 1..N of that of the input times (i / N) mask_k. Naidu et al., "IS-CAM:
    Integrated Score-CAM for axiomatic-based explanations" (arXiv:2010.03023). torch-cam accumulates the factor instead:
    it ends at 5.5 for N = 10, far outside the range of images.

    Arguments:
        activation, size, masked_score: as for `score_cam`.
        steps: N; the cost is that of so many Score-CAMs.

    Returns:
        ``[B, *spatial]``.
    """
    activation = checked(activation, "activation")
    channels, clean = activation.shape[1], _masks(activation, size)

    def masks(rows: slice) -> Tensor:
        index = torch.arange(rows.start, rows.stop, device=activation.device)
        share = (index // channels + 1) / steps
        return clean(index % channels) * share.view(-1, *[1] * len(size))

    scores = masked_score(masks, channels * steps)
    return combine(scores.view(-1, steps, channels).mean(1).softmax(1), activation)


def ablation_cam(activation: Tensor, score: Tensor, replaced_score: Callable[[Rows, int], Tensor]) -> Tensor:
    """Ablation-CAM: Σ_k w_k A_k with w = (y - y_k) / y, where y_k is the score with channel k set to 0.

    Desai and Ramaswamy, "Ablation-CAM", WACV 2020. A negative y turns the signs around, as the formula says.
    pytorch-grad-cam sets the channel to the layer's minimum minus 1e7 instead of 0.

    Arguments:
        activation: ``[B, C, *spatial]``.
        score: y, ``[B]``.
        replaced_score: ``(activations, count)`` to ``[B, count]``: scores when the layer returns another activation;
            ``activations(slice)`` makes ``[B, len(slice), C, *spatial]`` of them.

    Returns:
        ``[B, *spatial]``.
    """
    activation = checked(activation, "activation")

    def ablated(channels: slice) -> Tensor:
        count = channels.stop - channels.start
        rows = activation.unsqueeze(1).repeat(1, count, *[1] * (activation.dim() - 1))
        rows.diagonal(offset=channels.start, dim1=1, dim2=2).zero_()
        return rows

    score = score.to(activation.dtype)[:, None]
    drop = score - replaced_score(ablated, activation.shape[1])
    return combine(ratio(drop, score), activation)


def _masks(activation: Tensor, size: tuple[int, ...]) -> Callable[[Any], Tensor]:
    def masks(channels: Any) -> Tensor:
        enlarged = resize(activation[:, channels], size)
        flat = enlarged.flatten(2)
        low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
        return ratio(flat - low, high - low).view_as(enlarged)

    return masks
