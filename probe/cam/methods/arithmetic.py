"""The arithmetic that the methods share: checked tensors, sums that keep their precision, ratios without 0 / 0."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from probe.tree import full_precision


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Enlarge ``[B, C, *spatial]`` to `size` linearly in every dimension (corners not aligned)."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    modes = {1: "linear", 2: "bilinear", 3: "trilinear"}
    if len(size) not in modes or maps.dim() - 2 != len(size):
        raise ValueError(f"maps with spatial size {tuple(maps.shape[2:])} cannot be enlarged to {tuple(size)}")
    return F.interpolate(maps, size, mode=modes[len(size)], align_corners=False)


def checked(tensor: Tensor, what: str) -> Tensor:
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


def checked_pair(activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    activation, gradient = checked(activation, "activation"), checked(gradient, "gradient")
    if activation.shape != gradient.shape or activation.dim() < 3:
        raise ValueError(
            "activation and gradient must have the same shape [B, C, *spatial], "
            f"not {tuple(activation.shape)} and {tuple(gradient.shape)}"
        )
    return activation, gradient


def spatial_sum(x: Tensor, keepdim: bool = False) -> Tensor:
    """Sum over positions, in float64 where the device has it: ΣA of both signs cancels, and it is a denominator."""
    precise = x.dtype if x.device.type == "mps" else torch.float64
    return x.sum(tuple(range(2, x.dim())), keepdim=keepdim, dtype=precise)


def spatial_mean(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())))


def combine(weights: Tensor, activation: Tensor) -> Tensor:
    """Σ_k w_k A_k of weights ``[B, C]``."""
    with full_precision([activation.device.type]):
        return torch.einsum("bc,bc...->b...", weights.to(activation.dtype), activation)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is 0."""
    zero = denominator == 0
    return (numerator / denominator.masked_fill(zero, 1)).masked_fill(zero, 0)


def double(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # MPS has no float64


def first_component(x: Tensor, centered: bool, toward: Tensor) -> Tensor:
    """x's positions ``[N, C]`` projected on their first right singular vector, ``[B, *spatial]``."""
    with full_precision([x.device.type]):
        points = double(x.flatten(2).transpose(1, 2))
        if centered:
            points = points - points.mean(1, keepdim=True)
        if points.shape[2] <= points.shape[1]:
            component = (points @ torch.linalg.eigh(points.mT @ points)[1][..., -1:])[..., 0]
        else:
            values, vectors = torch.linalg.eigh(points @ points.mT)
            component = vectors[..., -1] * values[:, -1:].clamp_min(0).sqrt()
    return signed(component.to(x.dtype).view(-1, *x.shape[2:]), toward)


def signed(maps: Tensor, toward: Tensor) -> Tensor:
    """`maps` with the sign that makes each agree with `toward`."""
    agreement = double(maps * toward).flatten(1).sum(1)
    sign = torch.where(agreement < 0, -1.0, 1.0).to(maps.dtype)
    return maps * sign.view(-1, *[1] * (maps.dim() - 1))
