"""Methods that look at the activation alone: its first component, or where it is unusually strong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from probe.cam.methods.arithmetic import checked, checked_pair, double, first_component, signed
from probe.tree import full_precision


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
    activation = checked(activation, "activation")
    return first_component(activation, centered, toward=activation.square().sum(1))


def eigen_grad_cam(activation: Tensor, gradient: Tensor, *, centered: bool = False) -> Tensor:
    """Eigen-Grad-CAM: `eigen_cam` of gA; the sign is that of HiResCAM's Σ_k g_k A_k, so that it speaks for the class.

    A variant of Eigen-CAM from pytorch-grad-cam (which centres, and leaves the sign to chance).

    Arguments:
        activation, gradient: ``[B, C, *spatial]``.
        centered: subtract each channel's mean of gA first.

    Returns:
        ``[B, *spatial]``.
    """
    activation, gradient = checked_pair(activation, gradient)
    product = gradient * activation
    return first_component(product, centered, toward=product.sum(1))


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
    activation = checked(activation, "activation")
    with full_precision([activation.device.type]):
        points = double(activation.flatten(2).transpose(1, 2))
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
    return signed(component.to(activation.dtype).view(-1, *activation.shape[2:]), activation.square().sum(1))


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
    activation = checked(activation, "activation")
    flat = activation.flatten(2)
    mean, deviation = flat.mean(2, keepdim=True), flat.std(2, correction=0, keepdim=True)
    strong = (flat > mean + k * deviation).to(flat.dtype)
    return (mean * strong).sum(1).view(-1, *activation.shape[2:])
