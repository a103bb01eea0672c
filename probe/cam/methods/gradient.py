"""Methods on an activation and its gradient, or on a class's weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from probe.cam.methods.arithmetic import checked, checked_pair, combine, double, ratio, spatial_mean, spatial_sum
from probe.cam.targets import contrast_score


def cam(activation: Tensor, weight: Tensor) -> Tensor:
    """CAM: Σ_k W_k A_k.

    Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016 (arXiv:1512.04150), for networks
    that end in global average pooling and one linear layer; the map's mean plus the bias is the score.

    Arguments:
        activation: ``[B, C, *spatial]``.
        weight: the linear layer's row of each sample's class, ``[B, C]``.

    Returns:
        ``[B, *spatial]``.
    """
    activation = checked(activation, "activation")
    if tuple(weight.shape) != tuple(activation.shape[:2]):
        raise ValueError(f"cam needs a weight [B, C] = {tuple(activation.shape[:2])}, not {tuple(weight.shape)}")
    return combine(weight, activation)


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM: Σ_k mean(g_k) A_k.

    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017
    (arXiv:1610.02391), before its ReLU; captum leaves that out by default too. Where an in-place operation follows the
    layer, grad-cam and torch-cam read the overwritten activation.

    Arguments:
        activation, gradient: ``[B, C, *spatial]``; what a `Probe` stored will do: ``p["layer4"].output``,
            ``p["layer4"].grad_output`` (tokens through ``cam.Layout("tokens", ...).channels_first`` first).

    Returns:
        ``[B, *spatial]``.

    Raises:
        ValueError: shapes that differ, or no gradient (None): nothing was back-propagated.
    """
    activation, gradient = checked_pair(activation, gradient)
    return combine(spatial_mean(gradient), activation)


def grad_cam_pp(activation: Tensor, gradient: Tensor, *, official: bool = False) -> Tensor:
    """Grad-CAM++: Σ_k w_k A_k with w = Σ α relu(g) and α = g² / (2 g² + g³ ΣA).

    Chattopadhay et al., "Grad-CAM++", WACV 2018 (arXiv:1710.11063), equation 19. Where g is 0, α relu(g) is 0;
    elsewhere α is 1 / (2 + g ΣA), which is how it is computed: g² and g³ underflow for the gradients of deep
    networks. The paper's derivation assumes the score exp(y), whose factor is the same for every channel and position
    of a sample; it is left out.

    torch-cam's division has no effect (α = g²), and pytorch-grad-cam adds an eps of 1e-6 to a denominator of the
    order of g², far below it: both differ from the paper by up to the size of the map.

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.
        official: divide each channel's α by its sum over the positions with g > 0, as the authors' code does.

    Returns:
        ``[B, *spatial]``.
    """
    activation, gradient = checked_pair(activation, gradient)
    gradient = double(gradient)  # where A takes both signs, the denominator passes near 0
    alpha = ratio(torch.ones_like(gradient), 2 + gradient * spatial_sum(activation, keepdim=True))
    alpha = alpha.masked_fill(gradient == 0, 0)
    positive = gradient.clamp_min(0)
    if official:
        total = spatial_sum(alpha.masked_fill(positive == 0, 0), keepdim=True)
        alpha = alpha / total.masked_fill(total == 0, 1)
    return combine(spatial_sum(alpha * positive), activation)


def smooth_grad_cam_pp(
    activation: Tensor, noisy_gradient: Callable[[float], Tensor], *, samples: int = 8, noise: float = 0.15
) -> Tensor:
    """Smooth Grad-CAM++: Grad-CAM++ on powers of the gradient averaged over noisy inputs.

    D_p is the mean of g^p over the samples; α = D_2 / (2 D_2 + D_3 ΣA), w = Σ α relu(D_1), map = Σ_k w_k A_k, with A
    from the clean input. Omeiza et al., "Smooth Grad-CAM++" (arXiv:1908.01224); the paper prints D_1 in α's
    numerator, which contradicts the Grad-CAM++ it builds on. torch-cam takes relu(g) from the last noisy pass and A
    from it too.

    Arguments:
        activation: ``[B, C, *spatial]``, of the clean input.
        noisy_gradient: gives the gradient at the layer for the input plus Gaussian noise, whose standard deviation is
            its argument times the input's range.
        samples: how many noisy inputs.
        noise: standard deviation of the noise, as a share of each sample's range (max - min).

    Returns:
        ``[B, *spatial]``.
    """
    activation = checked(activation, "activation")
    first, second, third = (double(torch.zeros_like(activation)) for _ in range(3))
    scale: Tensor | None = None
    for _ in range(samples):
        gradient = double(checked(noisy_gradient(noise), "gradient"))
        if scale is None:  # powers of deep gradients underflow: measure them in units of the first sample's maximum
            scale = gradient.abs().amax(tuple(range(1, gradient.dim())), keepdim=True)
            scale = scale.masked_fill(scale == 0, 1)
        unit = gradient / scale
        first += unit / samples
        second += unit**2 / samples
        third += unit**3 / samples
    if scale is None:
        raise ValueError(f"smooth_grad_cam_pp needs at least one sample, not samples={samples}")
    alpha = ratio(second, 2 * second + scale * third * spatial_sum(activation, keepdim=True))
    return combine(spatial_sum(alpha * first.clamp_min(0) * scale), activation)


def xgrad_cam(activation: Tensor, gradient: Tensor, *, eps: float = 0.0) -> Tensor:
    """XGrad-CAM: Σ_k w_k A_k with w = Σ gA / ΣA.

    Fu et al., "Axiom-based Grad-CAM", BMVC 2020 (arXiv:2008.02312). A channel that sums to exactly 0 counts as 0.
    Where A takes both signs, ΣA passes near 0 and the weight is as large as that is small: choose a layer behind a
    ReLU.

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.
        eps: added to ΣA; the authors' code has 1e-6, pytorch-grad-cam 1e-7, torch-cam 1e-8.

    Returns:
        ``[B, *spatial]``.
    """
    activation, gradient = checked_pair(activation, gradient)
    return combine(ratio(spatial_sum(gradient * activation), spatial_sum(activation) + eps), activation)


def layer_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """LayerCAM: Σ_k relu(g_k) A_k, position by position.

    Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", IEEE TIP 2021.

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.

    Returns:
        ``[B, *spatial]``.
    """
    activation, gradient = checked_pair(activation, gradient)
    return (gradient.clamp_min(0) * activation).sum(1)


def hires_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """HiResCAM: Σ_k g_k A_k, position by position.

    Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations" (arXiv:2011.08891).

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.

    Returns:
        ``[B, *spatial]``.
    """
    activation, gradient = checked_pair(activation, gradient)
    return (gradient * activation).sum(1)


def grad_cam_elementwise(activation: Tensor, gradient: Tensor) -> Tensor:
    """Element-wise Grad-CAM: Σ_k relu(g_k A_k), position by position.

    Pillai and Pirsiavash, "Explainable Models with Consistent Interpretations", AAAI 2021.

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.

    Returns:
        ``[B, *spatial]``, nowhere negative.
    """
    activation, gradient = checked_pair(activation, gradient)
    return (gradient * activation).clamp_min(0).sum(1)


def shapley_cam(activation: Tensor, gradient: Tensor, hessian_product: Tensor) -> Tensor:
    """ShapleyCAM: Σ_k w_k A_k with w = mean(g - ½ H A), H the Hessian of the score at A.

    Cai, "CAMs as Shapley Value-based Explainers", The Visual Computer 2025 (arXiv:2501.06261): a second-order
    expansion of the Shapley value. Where the rest of the network is piecewise linear, H is 0 and it is Grad-CAM; the
    paper therefore explains ``cam.targets.residual_softmax(...)``, whose H is not.

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.
        hessian_product: H A, ``[B, C, *spatial]``.

    Returns:
        ``[B, *spatial]``.
    """
    activation, gradient = checked_pair(activation, gradient)
    return combine(spatial_mean(gradient - checked(hessian_product, "hessian_product") / 2), activation)


def finer_cam(
    activation: Tensor,
    gradient_of: Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor],
    *,
    alpha: float = 0.6,
    similar: int = 3,
) -> Tensor:
    """Finer-CAM: Grad-CAM of what sets the class apart from similar ones, y_c - alpha · mean of the nearest y_d.

    Zhang et al., "Finer-CAM: Spotting the Difference Reveals Finer Details for Visual Explanation", CVPR 2025
    (arXiv:2501.11309). Similar classes are those whose logits are nearest to y_c, and their maps are averaged, as in
    the paper; pytorch-grad-cam weights them by probability. The same score with any other method: ``explain(...,
    target=cam.targets.contrast(...), method=cam.layer_cam)``.

    Arguments:
        activation: ``[B, C, *spatial]``.
        gradient_of: gives the gradient at the layer of a score, a function of the logits ``[B, K]`` and the classes
            ``[B]``.
        alpha: strength of the comparison; 0 is Grad-CAM.
        similar: how many classes to compare with.

    Returns:
        ``[B, *spatial]``.
    """
    return grad_cam(activation, gradient_of(lambda logits, index: contrast_score(logits, index, alpha, similar)))
