"""Maps to look at: overlays, labelled grids, and several layers' maps joined into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from probe import image
from probe.cam.methods.arithmetic import resize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CELL = 160
_STRIP = 22


@torch.no_grad()
def overlay(images: Tensor, maps: Tensor, colormap: str | int = "jet", alpha: float = 0.5) -> Tensor:
    """Heat maps over the images they explain.

    Only evidence *for* the target is drawn: what is negative counts as 0, and each map is scaled by its own maximum.

    Arguments:
        images: ``[B, 1 or 3, H, W]``, uint8, or float in 0..1, or normalised with ImageNet's mean and deviation
            (which is seen from the values and undone); any other range is stretched to 0..1.
        maps: raw maps ``[B, h, w]``, enlarged to the images bilinearly.
        colormap: the end of one of OpenCV's ``COLORMAP_`` names in any case (``"jet"``, ``"turbo"``), or its number.
        alpha: weight of the heat, from 0 to 1.

    Returns:
        uint8 RGB ``[B, 3, H, W]`` on the device of the images.

    Raises:
        ImportError: OpenCV is missing.
        ValueError: shapes that don't belong together, an unknown colour map, or `alpha` outside 0..1.
    """
    return image.overlay(displayable(images), maps.to(images.device), alpha=alpha, colormap=colormap)


@torch.no_grad()
def displayable(images: Tensor) -> Tensor:
    """Images as a person would see them: ImageNet's normalisation undone, if the values show that it was applied."""
    if not images.is_floating_point() or images.dim() != 4 or images.shape[1] != 3:
        return images
    images = images.detach().float()
    mean, std = (torch.tensor(each, device=images.device).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    restored = images * std + mean
    outside = (images.amin() < 0) | (images.amax() > 1)
    plausible = (restored.amin() >= -0.02) & (restored.amax() <= 1.02)
    return restored.clamp(0, 1) if bool(outside & plausible) else images


def magnified(images: Tensor, least: int) -> Tensor:
    """Images at least so many pixels wide, each pixel a square: on small ones neither heat nor labels could be seen."""
    times = -(-least // images.shape[-1])
    return images if times <= 1 else images.repeat_interleave(times, -1).repeat_interleave(times, -2)


@torch.no_grad()
def fuse(
    maps: Sequence[Tensor],
    how: str | Callable[[Tensor], Tensor] = "mean",
    size: tuple[int, ...] | None = None,
) -> Tensor:
    """Join the maps of several layers: each is cut off below 0, scaled to its maximum, enlarged, and joined.

    Arguments:
        maps: what `explain` returned for a list of layers, ``[B, *spatial]`` each.
        how: ``"mean"``, ``"max"``, ``"product"``, or a function of the stack ``[layers, B, *size]``.
        size: of the result; by default that of the largest map.

    Returns:
        ``[B, *size]``; within 0..1 for the named ways.
    """
    if not maps or len({(each.dim(), len(each)) for each in maps}) != 1:
        raise ValueError("fuse takes the maps of several layers for the same batch, [B, *spatial] each")
    if size is None:
        size = tuple(max(maps, key=lambda each: each[0].numel()).shape[1:])
    stack = torch.stack([resize(unit(each)[:, None], size)[:, 0] for each in maps])
    if callable(how):
        return how(stack)
    if how == "mean":
        return stack.mean(0)
    if how == "max":
        return stack.amax(0)
    if how == "product":
        return stack.prod(0)
    raise ValueError(f'fuse joins maps by "mean", "max", "product" or a function, not {how!r}')


def unit(maps: Tensor) -> Tensor:
    """The positive part of each map, scaled to a maximum of 1 (a map without any stays 0)."""
    maps = (maps if maps.dtype in (torch.float32, torch.float64) else maps.float()).clamp_min(0)
    top = maps.flatten(1).amax(1).view(-1, *[1] * (maps.dim() - 1))
    return maps / top.masked_fill(top == 0, 1)


@torch.no_grad()
def grid(
    images: Tensor,
    maps: Tensor | Mapping[str, Tensor],
    labels: Sequence[str] | None = None,
    colormap: str | int = "jet",
    alpha: float = 0.5,
) -> Tensor:
    """One labelled picture: a row for each image, with the image, its map, and both together.

    Arguments:
        images: as for `overlay`.
        maps: raw maps ``[B, h, w]``; or several by name, ``{"grad_cam": ..., "layer_cam": ...}``: then a row is the
            image and one overlay a name.
        labels: one a row, such as the class names.
        colormap, alpha: as for `overlay`.

    Returns:
        uint8 RGB ``[3, H', W']`` on the CPU. Small images are enlarged so that the labels can be read.
    """
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images: give one a row")
    images = magnified(displayable(images), _CELL)
    columns: dict[str, Tensor] = {"image": overlay(images, torch.zeros_like(images[:, 0].float()), alpha=0.0)}
    if isinstance(maps, Mapping):
        columns |= {name: overlay(images, each, colormap, alpha) for name, each in maps.items()}
    else:
        enlarged = resize(unit(maps)[:, None], tuple(images.shape[-2:]))[:, 0]
        columns["map"] = image.colorize(enlarged, colormap, value_range=(0, 1))
        columns["overlay"] = overlay(images, maps, colormap, alpha)
    cells = [each.cpu() for each in columns.values()]
    width = cells[0].shape[-1]
    rows = [_strip(list(columns), width)]
    for i in range(len(images)):
        if labels is not None:
            rows.append(_strip([str(labels[i])], width, cells=len(columns)))
        rows.append(torch.cat([F.pad(each[i], (2, 2, 2, 2), value=255) for each in cells], 2))
    return torch.cat(rows, 1)


def _strip(texts: Sequence[str], width: int, cells: int | None = None) -> Tensor:
    """A white strip ``[3, h, cells * (width + 4)]`` with one text a cell, shrunk to fit."""
    cv2 = image.opencv()
    import numpy as np

    count = cells or len(texts)
    canvas = np.full((_STRIP, count * (width + 4), 3), 255, np.uint8)
    room = (width + 4) * (count // len(texts)) - 8
    for i, text in enumerate(texts):
        (length, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
        size = 0.5 * min(1.0, room / max(1, length))
        at = (i * (width + 4) + 4, _STRIP - 7)
        cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 1, cv2.LINE_AA)
    strip: Any = torch.from_numpy(canvas)
    return strip.permute(2, 0, 1)  # type: ignore[no-any-return]
