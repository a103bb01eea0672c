"""What stands where pixels were taken away: a value, the blurred image, or what the neighbours suggest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def baseline_of(images: Tensor, baseline: float | str | Tensor) -> Tensor:
    """What every pixel of `images` becomes: a number, a tensor, or the image blurred (``"blur"``)."""
    if isinstance(baseline, Tensor):
        return baseline.to(images).expand_as(images)
    if isinstance(baseline, str):
        if baseline != "blur":
            raise ValueError(f'a baseline is a number, a tensor or "blur", not {baseline!r}')
        return blur(images)
    return torch.full_like(images, baseline)


def blur(images: Tensor, sigma: float = 5.0, radius: int = 5) -> Tensor:
    """Gaussian blur in every spatial dimension, as RISE uses it (11 taps of deviation 5)."""
    taps = torch.exp(-((torch.arange(-radius, radius + 1, device=images.device).float() / sigma) ** 2) / 2)
    taps = (taps / taps.sum()).to(images.dtype)
    blurred = images.clone()
    for dim in range(2, images.dim()):
        length = images.shape[dim]
        index = torch.arange(-radius, length + radius, device=images.device).clamp(0, length - 1)
        blurred = torch.matmul(blurred.index_select(dim, index).unfold(dim, 2 * radius + 1, 1), taps)
    return blurred


def impute(images: Tensor, hole: Tensor, noise: float = 0.0) -> Tensor:
    """Fill holes so that each missing pixel is the weighted mean of its eight neighbours (1/6 beside, 1/12 diagonal).

    Solves the linear equations by conjugate gradients on the images' device; at the border the weights that fall
    outside are left out.

    Arguments:
        images: ``[B, C, H, W]``.
        hole: bool ``[B, H, W]``, True where a pixel is missing.
        noise: deviation of Gaussian noise added to what is filled in.
    """
    weights = torch.tensor(
        [[1 / 12, 1 / 6, 1 / 12], [1 / 6, 0.0, 1 / 6], [1 / 12, 1 / 6, 1 / 12]], device=images.device
    )
    values, missing = images.float(), hole[:, None].float()
    channels = values.shape[1]
    kernel = weights.expand(channels, 1, 3, 3)

    def neighbours(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, padding=1, groups=channels)

    degree = neighbours(torch.ones_like(values[:1]))

    def laplacian(x: Tensor) -> Tensor:
        return missing * (degree * x - neighbours(x))

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(2).sum(2)[..., None, None]

    known = values * (1 - missing)
    total, count = (each.flatten(2).sum(2)[..., None, None] for each in (known, 1 - missing))
    solution = missing * total / count.clamp_min(1)  # starts from the mean of what is known
    residual = missing * neighbours(known) - laplacian(solution)
    direction, size = residual, dot(residual, residual)
    goal = 1e-10 * size.amax().clamp_min(1e-20)
    for step in range(2000):
        if step % 16 == 0 and bool((size <= goal).all()):  # asking costs a wait for the device
            break
        image = laplacian(direction)
        length = size / dot(direction, image).clamp_min(1e-30)
        solution = solution + length * direction
        residual = residual - length * image
        size, before = dot(residual, residual), size
        direction = residual + size / before.clamp_min(1e-30) * direction
    filled = solution + noise * torch.randn_like(solution)
    return torch.where(hole[:, None], filled, values).to(images.dtype)
