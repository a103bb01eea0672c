"""The methods: one function each, pure maths on tensors or on a scoring function.

A method's required parameters *are* its requirements: `explain` looks at their names and hands it exactly those (the
names are the public attributes of `probe.cam.ingredients.Ingredients`). A new method is one more function like these.
Everything after the ``*`` is an option, given as ``functools.partial(cam.score_cam, official=True)``.

Throughout, A is the layer's output and g = ∂y/∂A the gradient of the explained score y, both ``[B, C, *spatial]``
with any number of spatial dimensions. Σ runs over positions, Σ_k over channels. Sums run in float32 at least,
whatever the dtypes.

Maps are raw and signed, ``[B, *spatial]``: the ReLU that most papers end with is for whoever shows the map (`overlay`
applies it), because it destroys the evidence against the class and cannot be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from probe.cam.layout import Layout
from probe.cam.targets import contrast_score

Rows = Callable[[slice], Tensor]
"""Makes a slice of perturbed rows when they are needed, ``[B, len(slice), ...]``: all of them at once would not fit."""


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
    activation = _full(activation, "activation")
    if tuple(weight.shape) != tuple(activation.shape[:2]):
        raise ValueError(f"cam needs a weight [B, C] = {tuple(activation.shape[:2])}, not {tuple(weight.shape)}")
    return _combine(weight, activation)


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM: Σ_k mean(g_k) A_k.

    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017
    (arXiv:1610.02391), before its ReLU.

    Arguments:
        activation, gradient: ``[B, C, *spatial]``; what a `Probe` stored will do: ``p["layer4"].output``,
            ``p["layer4"].grad_output``.

    Returns:
        ``[B, *spatial]``.

    Raises:
        ValueError: shapes that differ, or no gradient (None): nothing was back-propagated.
    """
    activation, gradient = _pair(activation, gradient)
    return _combine(_mean(gradient), activation)


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
    activation, gradient = _pair(activation, gradient)
    gradient = _double(gradient)  # where A takes both signs, the denominator passes near 0
    alpha = _ratio(torch.ones_like(gradient), 2 + gradient * _sum(activation, keepdim=True))
    alpha = alpha.masked_fill(gradient == 0, 0)
    positive = gradient.clamp_min(0)
    if official:
        total = _sum(alpha.masked_fill(positive == 0, 0), keepdim=True)
        alpha = alpha / total.masked_fill(total == 0, 1)
    return _combine(_sum(alpha * positive), activation)


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
    activation = _full(activation, "activation")
    first, second, third = (_double(torch.zeros_like(activation)) for _ in range(3))
    scale: Tensor | None = None
    for _ in range(samples):
        gradient = _double(_full(noisy_gradient(noise), "gradient"))
        if scale is None:  # powers of deep gradients underflow: measure them in units of the first sample's maximum
            scale = gradient.abs().amax(tuple(range(1, gradient.dim())), keepdim=True)
            scale = scale.masked_fill(scale == 0, 1)
        unit = gradient / scale
        first += unit / samples
        second += unit**2 / samples
        third += unit**3 / samples
    if scale is None:
        raise ValueError(f"smooth_grad_cam_pp needs at least one sample, not samples={samples}")
    alpha = _ratio(second, 2 * second + scale * third * _sum(activation, keepdim=True))
    return _combine(_sum(alpha * first.clamp_min(0) * scale), activation)


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
    activation, gradient = _pair(activation, gradient)
    return _combine(_ratio(_sum(gradient * activation), _sum(activation) + eps), activation)


def layer_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """LayerCAM: Σ_k relu(g_k) A_k, position by position.

    Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", IEEE TIP 2021.

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.

    Returns:
        ``[B, *spatial]``.
    """
    activation, gradient = _pair(activation, gradient)
    return (gradient.clamp_min(0) * activation).sum(1)


def hires_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """HiResCAM: Σ_k g_k A_k, position by position.

    Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations" (arXiv:2011.08891).

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.

    Returns:
        ``[B, *spatial]``.
    """
    activation, gradient = _pair(activation, gradient)
    return (gradient * activation).sum(1)


def grad_cam_elementwise(activation: Tensor, gradient: Tensor) -> Tensor:
    """Element-wise Grad-CAM: Σ_k relu(g_k A_k), position by position.

    Pillai and Pirsiavash, "Explainable Models with Consistent Interpretations", AAAI 2021.

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.

    Returns:
        ``[B, *spatial]``, nowhere negative.
    """
    activation, gradient = _pair(activation, gradient)
    return (gradient * activation).clamp_min(0).sum(1)


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
    activation = _full(activation, "activation")
    masks = _masks(activation, size)
    if not official:
        return _combine(masked_score(masks, activation.shape[1]).softmax(1), activation)
    weights = masked_score(masks, activation.shape[1], probability=True)
    flat = activation.flatten(2)
    return _combine(weights.masked_fill(flat.amax(2) == flat.amin(2), 0), activation)


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
    activation = _full(activation, "activation")
    channels, clean = activation.shape[1], _masks(activation, size)

    def masks(rows: slice) -> Tensor:
        chunk = clean([row % channels for row in range(rows.start, rows.stop)])
        return chunk + noise * torch.randn_like(chunk)

    scores = masked_score(masks, channels * samples)
    return _combine(scores.view(-1, samples, channels).mean(1).softmax(1), activation)


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
    activation = _full(activation, "activation")
    channels, clean = activation.shape[1], _masks(activation, size)

    def masks(rows: slice) -> Tensor:
        index = torch.arange(rows.start, rows.stop, device=activation.device)
        share = (index // channels + 1) / steps
        return clean(index % channels) * share.view(-1, *[1] * len(size))

    scores = masked_score(masks, channels * steps)
    return _combine(scores.view(-1, steps, channels).mean(1).softmax(1), activation)


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
    activation = _full(activation, "activation")

    def ablated(channels: slice) -> Tensor:
        count = channels.stop - channels.start
        rows = activation.unsqueeze(1).repeat(1, count, *[1] * (activation.dim() - 1))
        rows.diagonal(offset=channels.start, dim1=1, dim2=2).zero_()
        return rows

    score = score.to(activation.dtype)[:, None]
    drop = score - replaced_score(ablated, activation.shape[1])
    return _combine(_ratio(drop, score), activation)


def eigen_cam(activation: Tensor, *, centered: bool = False) -> Tensor:
    """Eigen-CAM: A projected on the first right singular vector of A as a ``[positions, C]`` matrix.

    Muhammad and Yeasin, "Eigen-CAM", IJCNN 2020 (arXiv:2008.00299). It does not depend on the class. The sign of a
    singular vector is arbitrary; here the map is positive where the activation is strong (it correlates with Σ_k
    A_k²). Computed from the smaller of the two Gram matrices in float64, hundreds of times faster than a full SVD.

    Arguments:
        activation: ``[B, C, *spatial]``.
        centered: subtract each channel's mean first (principal component analysis), as pytorch-grad-cam does.

    Returns:
        ``[B, *spatial]``.
    """
    activation = _full(activation, "activation")
    return _first_component(activation, centered, toward=activation.square().sum(1))


def eigen_grad_cam(activation: Tensor, gradient: Tensor, *, centered: bool = False) -> Tensor:
    """Eigen-Grad-CAM: `eigen_cam` of gA; the sign is that of HiResCAM's Σ_k g_k A_k, so that it speaks for the class.

    A variant of Eigen-CAM from pytorch-grad-cam (which centres, and leaves the sign to chance).

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.
        centered: subtract each channel's mean of gA first.

    Returns:
        ``[B, *spatial]``.
    """
    activation, gradient = _pair(activation, gradient)
    product = gradient * activation
    return _first_component(product, centered, toward=product.sum(1))


def kpca_cam(
    activation: Tensor,
    *,
    kernel: str | Callable[[Tensor, Tensor], Tensor] = "sigmoid",
    gamma: float | None = None,
    coef0: float = 1.0,
) -> Tensor:
    """KPCA-CAM: the first component of kernel PCA of A's positions.

    Karmani et al., "KPCA-CAM: Visual Explainability of Deep Computer Vision Models using Kernel PCA", MMSP 2024
    (arXiv:2410.00267). As in pytorch-grad-cam, the channels are centred first, and the kernels and their defaults are
    those of scikit-learn's KernelPCA. The sign is fixed as in `eigen_cam`. Costs the cube of the number of positions.

    Arguments:
        activation: ``[B, C, *spatial]``.
        kernel: ``"sigmoid"``, ``"rbf"``, ``"linear"``, or a function of two ``[B, N, C]`` tensors to ``[B, N, N]``.
        gamma: scale of the kernel; 1 / C by default.
        coef0: constant of the sigmoid kernel.

    Returns:
        ``[B, *spatial]``.
    """
    activation = _full(activation, "activation")
    with torch.autocast(activation.device.type, enabled=False):
        points = _double(activation.flatten(2).transpose(1, 2))
        points = points - points.mean(1, keepdim=True)
        scale = 1 / points.shape[2] if gamma is None else gamma
        if callable(kernel):
            matrix = kernel(points, points)
        elif kernel == "sigmoid":
            matrix = (scale * points @ points.mT + coef0).tanh()
        elif kernel == "rbf":
            matrix = (-scale * torch.cdist(points, points).square()).exp()
        elif kernel == "linear":
            matrix = points @ points.mT
        else:
            raise ValueError(f'kpca_cam knows the kernels "sigmoid", "rbf" and "linear", or a function; not {kernel!r}')
        rows, columns = matrix.mean(1, keepdim=True), matrix.mean(2, keepdim=True)
        centred = matrix - rows - columns + matrix.mean((1, 2), keepdim=True)
        values, vectors = torch.linalg.eigh(centred)
        component = vectors[..., -1] * values[:, -1:].clamp_min(0).sqrt()
    return _signed(component.to(activation.dtype).view(-1, *activation.shape[2:]), activation.square().sum(1))


def fem(activation: Tensor, *, k: float = 2.0) -> Tensor:
    """FEM, the feature explanation method: Σ_k μ_k [A_k > μ_k + k σ_k], where a channel is unusually strong.

    Fuad et al., "Features Understanding in 3D CNNs for Actions Recognition in Video", IPTA 2020. μ and σ are a
    channel's mean and (population) deviation over positions. It does not depend on the class. pytorch-grad-cam
    weights the activation with the share of strong positions instead.

    Arguments:
        activation: ``[B, C, *spatial]``.
        k: how many deviations above the mean count as unusual.

    Returns:
        ``[B, *spatial]``.
    """
    activation = _full(activation, "activation")
    flat = activation.flatten(2)
    mean, deviation = flat.mean(2, keepdim=True), flat.std(2, correction=0, keepdim=True)
    strong = (flat > mean + k * deviation).to(flat.dtype)
    return (mean * strong).sum(1).view(-1, *activation.shape[2:])


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
    activation, gradient = _pair(activation, gradient)
    return _combine(_mean(gradient - _full(hessian_product, "hessian_product") / 2), activation)


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


def full_grad(full_gradients: Sequence[Tensor], size: tuple[int, ...]) -> Tensor:
    """FullGrad: Σ ψ(x ⊙ ∂y/∂x) + Σ over layers and channels of ψ(b ⊙ ∂y/∂z), with b the layers' biases.

    Srinivas and Fleuret, "Full-Gradient Representation for Neural Network Visualization", NeurIPS 2019
    (arXiv:1905.00780). ψ is the authors': absolute value, min-max over each sample, bilinear enlargement to the
    input. In a network of ReLUs the terms themselves (before ψ) add up to the score exactly.

    Arguments:
        full_gradients: the terms, ``[B, C, *spatial]`` each: input times gradient, then bias times gradient of every
            layer.
        size: spatial size of the input.

    Returns:
        ``[B, *size]``, nowhere negative.
    """

    def postprocess(term: Tensor) -> Tensor:
        flat = _full(term, "full_gradients").abs().flatten(1)
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        return resize(_ratio(flat - low, high - low).view_as(term), size).sum(1)

    if not full_gradients:
        raise ValueError("full_grad needs at least one term, input times gradient")
    return torch.stack([postprocess(term) for term in full_gradients]).sum(0)


def guided_grad_cam(activation: Tensor, gradient: Tensor, guided_gradient: Tensor, *, channels: bool = False) -> Tensor:
    """Guided Grad-CAM: guided back-propagation times the enlarged Grad-CAM map (after its ReLU).

    Selvaraju et al. (see `grad_cam`), section 3.2, with Springenberg et al., "Striving for Simplicity"
    (arXiv:1412.6806). Guided back-propagation reconstructs edges whatever the class (Adebayo et al., "Sanity Checks
    for Saliency Maps"): sharp, and not to be trusted for *why*.

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.
        guided_gradient: gradient at the input with negative gradients stopped at every ReLU, ``[B, C_in, *size]``.
        channels: keep the input's channels, as in the paper's pictures, instead of summing them.

    Returns:
        ``[B, *size]``; with `channels` ``[B, C_in, *size]``.
    """
    guided = _full(guided_gradient, "guided_gradient")
    coarse = resize(grad_cam(activation, gradient).clamp_min(0)[:, None], tuple(guided.shape[2:]))
    product = guided * coarse
    return product if channels else product.sum(1)


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
        weights = _full(weights, "attention")
        joined = weights.mean(1) if heads == "mean" else weights.amax(1) if heads == "max" else weights.amin(1)
        joined = (1 - residual) * joined + residual * torch.eye(joined.shape[-1]).to(joined)
        joined = joined / joined.sum(-1, keepdim=True)
        with torch.autocast(joined.device.type, enabled=False):
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
    layers = [_full(each, "attention_gradients").clamp_min(0).mean((1, 2)) for each in attention_gradients]
    return layout.spatial(torch.stack(layers).sum(0))


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Enlarge ``[B, C, *spatial]`` to `size` linearly in every dimension (corners not aligned)."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    modes = {1: "linear", 2: "bilinear", 3: "trilinear"}
    if len(size) not in modes or maps.dim() - 2 != len(size):
        raise ValueError(f"maps with spatial size {tuple(maps.shape[2:])} cannot be enlarged to {tuple(size)}")
    return F.interpolate(maps, size, mode=modes[len(size)], align_corners=False)


def _full(tensor: Tensor, what: str) -> Tensor:
    """`tensor` in float32 or float64, or an error that says what is wrong with it."""
    if not isinstance(tensor, Tensor):
        cure = (
            "run the backward pass while the probe is attached, with Kind.GRAD_OUTPUT"
            if tensor is None
            else "take the tensor out of what the layer returned"
        )
        raise ValueError(f"{what} must be a tensor [B, C, *spatial], not {type(tensor).__name__}: {cure}")
    if not tensor.is_floating_point():
        raise ValueError(f"{what} must be floating point, not {tensor.dtype}")
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _pair(activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    activation, gradient = _full(activation, "activation"), _full(gradient, "gradient")
    if activation.shape != gradient.shape or activation.dim() < 3:
        raise ValueError(
            "activation and gradient must have the same shape [B, C, *spatial], "
            f"not {tuple(activation.shape)} and {tuple(gradient.shape)}"
        )
    return activation, gradient


def _sum(x: Tensor, keepdim: bool = False) -> Tensor:
    """Sum over positions, in float64 where the device has it: ΣA of both signs cancels, and it is a denominator."""
    precise = x.dtype if x.device.type == "mps" else torch.float64
    return x.sum(tuple(range(2, x.dim())), keepdim=keepdim, dtype=precise)


def _mean(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())))


def _combine(weights: Tensor, activation: Tensor) -> Tensor:
    """Σ_k w_k A_k of weights ``[B, C]``."""
    with torch.autocast(activation.device.type, enabled=False):
        return torch.einsum("bc,bc...->b...", weights.to(activation.dtype), activation)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is 0."""
    zero = denominator == 0
    return (numerator / denominator.masked_fill(zero, 1)).masked_fill(zero, 0)


def _masks(activation: Tensor, size: tuple[int, ...]) -> Callable[[Any], Tensor]:
    def masks(channels: Any) -> Tensor:
        enlarged = resize(activation[:, channels], size)
        flat = enlarged.flatten(2)
        low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
        return _ratio(flat - low, high - low).view_as(enlarged)

    return masks


def _double(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # MPS has no float64


def _first_component(x: Tensor, centered: bool, toward: Tensor) -> Tensor:
    """x's positions ``[N, C]`` projected on their first right singular vector, ``[B, *spatial]``."""
    with torch.autocast(x.device.type, enabled=False):
        points = _double(x.flatten(2).transpose(1, 2))
        if centered:
            points = points - points.mean(1, keepdim=True)
        if points.shape[2] <= points.shape[1]:
            component = (points @ torch.linalg.eigh(points.mT @ points)[1][..., -1:])[..., 0]
        else:
            values, vectors = torch.linalg.eigh(points @ points.mT)
            component = vectors[..., -1] * values[:, -1:].clamp_min(0).sqrt()
    return _signed(component.to(x.dtype).view(-1, *x.shape[2:]), toward)


def _signed(maps: Tensor, toward: Tensor) -> Tensor:
    """`maps` with the sign that makes each agree with `toward`."""
    agreement = _double(maps * toward).flatten(1).sum(1)
    sign = torch.where(agreement < 0, -1.0, 1.0).to(maps.dtype)
    return maps * sign.view(-1, *[1] * (maps.dim() - 1))
