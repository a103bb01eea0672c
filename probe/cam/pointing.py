"""Pointing games: does the heat lie on the object?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from probe.cam.methods.arithmetic import resize


def pointing_game(maps: Tensor, regions: Tensor, *, size: tuple[int, int] | None = None, tolerance: int = 0) -> Tensor:
    """Pointing game: whether the map's maximum lies on the object.

    Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016 (arXiv:1608.00507).

    Arguments:
        maps: raw, ``[B, h, w]``.
        regions: masks ``[B, H, W]``, or boxes ``[B, 4]`` as x1, y1, x2, y2 in pixels of an image of `size`.
        size: ``(H, W)``, needed for boxes.
        tolerance: a hit may be so many pixels away (15 in the paper).

    Returns:
        bool ``[B]``.
    """
    inside = _masks(regions, size)
    if tolerance:
        inside = F.max_pool2d(inside[:, None].float(), 2 * tolerance + 1, 1, tolerance)[:, 0] > 0
    large = resize(maps[:, None].float(), tuple(inside.shape[1:]))[:, 0].flatten(1)
    return inside.to(large.device).flatten(1).gather(1, large.argmax(1, keepdim=True))[:, 0]


def energy_pointing_game(maps: Tensor, regions: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
    """Energy-based pointing game: the share of the map's positive part that lies on the object.

    Wang et al., "Score-CAM" (arXiv:1910.01279). The arguments are those of `pointing_game`.

    Returns:
        ``[B]`` in 0..1; 0 for a map without anything positive.
    """
    inside = _masks(regions, size)
    large = resize(maps[:, None].float(), tuple(inside.shape[1:]))[:, 0].clamp_min(0).flatten(1)
    total = large.sum(1)
    return (large * inside.to(large).flatten(1)).sum(1) / total.masked_fill(total == 0, 1)


def _masks(regions: Tensor, size: tuple[int, int] | None) -> Tensor:
    if regions.dim() == 3:
        return regions > 0
    if regions.dim() != 2 or regions.shape[1] != 4 or size is None:
        raise ValueError(
            "regions are masks [B, H, W], or boxes [B, 4] together with size=(H, W); "
            f"not {tuple(regions.shape)} with size={size}"
        )
    rows, columns = (torch.arange(n, device=regions.device) for n in size)
    x1, y1, x2, y2 = (each[:, None] for each in regions.unbind(1))
    inside_y, inside_x = (rows >= y1) & (rows < y2), (columns >= x1) & (columns < x2)
    return inside_y[:, :, None] & inside_x[:, None, :]
