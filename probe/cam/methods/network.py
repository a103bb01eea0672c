"""Methods that look at the whole network: its input, all its biases, all its attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probe.cam.layout import Layout
from probe.cam.methods.arithmetic import checked, ratio, resize
from probe.cam.methods.gradient import grad_cam
from probe.tree import full_precision


def guided_grad_cam(activation: Tensor, gradient: Tensor, guided_gradient: Tensor, *, channels: bool = False) -> Tensor:
    """Guided Grad-CAM: guided back-propagation times the enlarged Grad-CAM map (after its ReLU).

    Selvaraju et al. (see `grad_cam`), section 3.2, with Springenberg et al., "Striving for Simplicity"
    (arXiv:1412.6806). Guided back-propagation reconstructs edges whatever the class (Adebayo et al., "Sanity Checks
    for Saliency Maps"): sharp, and not to be trusted for *why*. Others replace the model's ReLU modules for it, and
    miss those that are called as functions.

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.
        guided_gradient: gradient at the input with negative gradients stopped at every ReLU, ``[B, C_in, *size]``.
        channels: keep the input's channels, as in the paper's pictures, instead of summing them.

    Returns:
        ``[B, *size]``; with `channels` ``[B, C_in, *size]``.
    """
    guided = checked(guided_gradient, "guided_gradient")
    coarse = resize(grad_cam(activation, gradient).clamp_min(0)[:, None], tuple(guided.shape[2:]))
    product = guided * coarse
    return product if channels else product.sum(1)


def full_grad(full_gradients: Sequence[Tensor], size: tuple[int, ...]) -> Tensor:
    """FullGrad: Σ ψ(x ⊙ ∂y/∂x) + Σ over layers and channels of ψ(b ⊙ ∂y/∂z), with b the layers' biases.

    Srinivas and Fleuret, "Full-Gradient Representation for Neural Network Visualization", NeurIPS 2019
    (arXiv:1905.00780). ψ is the authors': absolute value, min-max over each sample, bilinear enlargement to the
    input; pytorch-grad-cam scales every channel by itself, so that weak ones count in full. In a network of ReLUs the
    terms themselves (before ψ) add up to the score exactly.

    Arguments:
        full_gradients: the terms, ``[B, C, *spatial]`` each: input times gradient, then bias times gradient of every
            layer.
        size: spatial size of the input.

    Returns:
        ``[B, *size]``, nowhere negative.
    """

    def postprocess(term: Tensor) -> Tensor:
        flat = checked(term, "full_gradients").abs().flatten(1)
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        return resize(ratio(flat - low, high - low).view_as(term), size).sum(1)

    if not full_gradients:
        raise ValueError("full_grad needs at least one term, input times gradient")
    return torch.stack([postprocess(term) for term in full_gradients]).sum(0)


def attention_rollout(
    attention: Sequence[Tensor], layout: Layout, *, heads: str = "mean", residual: float = 0.5
) -> Tensor:
    """Attention rollout: the product over layers of (1 - r) W + r I, W the attention joined over heads.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020 (arXiv:2005.00928). It does not depend
    on the class. Read in the class token's row; without one, the mean over all rows.

    Arguments:
        attention: every layer's attention weights, first to last, ``[B, heads, N, N]`` each.
        layout: of the tokens: how many stand in front, and the grid of the others.
        heads: ``"mean"``, ``"max"`` or ``"min"``.
        residual: r, the share of the skip connection.

    Returns:
        ``[B, *grid]``, nowhere negative.
    """
    if heads not in ("mean", "max", "min"):
        raise ValueError(f'attention_rollout joins heads by "mean", "max" or "min", not {heads!r}')
    rollout: Tensor | None = None
    for weights in attention:
        weights = checked(weights, "attention")
        joined = weights.mean(1) if heads == "mean" else weights.amax(1) if heads == "max" else weights.amin(1)
        joined = (1 - residual) * joined + residual * torch.eye(joined.shape[-1]).to(joined)
        joined = joined / joined.sum(-1, keepdim=True)
        with full_precision([joined.device.type]):
            rollout = joined if rollout is None else joined @ rollout
    if rollout is None:
        raise ValueError("attention_rollout was given no attention weights")
    return layout.spatial(rollout[:, 0] if layout.prefix else rollout.mean(1))


def legrad(attention_gradients: Sequence[Tensor], layout: Layout) -> Tensor:
    """LeGrad: Σ over layers of the mean over heads and queries of relu(∂y_l / ∂W_l).

    Bousselham et al., "LeGrad: An Explainability Method for Vision Transformers via Feature Formation Sensitivity",
    ICCV 2025 (arXiv:2404.03214). y_l is the score read off the tokens after layer l, as though the network ended
    there.

    Arguments:
        attention_gradients: ∂y_l/∂W_l of every layer, ``[B, heads, N, N]`` each.
        layout: as for `attention_rollout`.

    Returns:
        ``[B, *grid]``, nowhere negative.
    """
    if not attention_gradients:
        raise ValueError("legrad was given no attention gradients")
    layers = [checked(each, "attention_gradients").clamp_min(0).mean((1, 2)) for each in attention_gradients]
    return layout.spatial(torch.stack(layers).sum(0))
