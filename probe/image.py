"""Pure picture maths on tensors: grids of tiles, colour maps, overlays, convolution kernels.

Everything here is a function from tensors to a picture ``[C, H, W]`` on the tensors' own device. Nothing waits for that
device but `to_uint8`, and a colour map when it first gets there. A NaN is always painted in `NAN_COLOR`, a colour that
no grey picture has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAN_COLOR = (1.0, 0.0, 1.0)
"""Magenta: the colour of a pixel that is NaN in any channel (RGB in 0..1)."""


@torch.no_grad()
def grid(
    images: Tensor | Sequence[Tensor],
    nrow: int = 8,
    padding: int = 2,
    normalize: bool = False,
    value_range: tuple[float, float] | None = None,
    scale_each: bool = False,
    pad_value: float = 0.0,
) -> Tensor:
    """Lay images out as tiles of one picture.

    The arguments are those of ``torchvision.utils.make_grid`` and so are the pixels, bit for bit, wherever that
    function does what it says. It differs where that one does not: tiles are normalised all at once instead of in a
    Python loop; the range is that of the finite values, so a NaN or Inf spoils neither its own tile nor the others; a
    single tile has its border too; a range below 1e-5 is stretched like any other; integer images can be normalised; a
    channel count other than 1 and 3 is shown, one tile a channel.

    Arguments:
        images: ``[B, C, H, W]``, ``[C, H, W]``, ``[H, W]``, or a sequence of equally large ``[C, H, W]`` or ``[H, W]``.
            Unless C is 1 or 3, image b's channel c becomes tile ``b * C + c``.
        nrow: tiles in a row.
        padding: pixels between and around the tiles.
        normalize: map the range to 0..1. Values outside the range are clamped to it, +Inf is 1 and -Inf is 0.
        value_range: ``(low, high)`` of that mapping; by default the smallest and largest finite value. Only read with
            ``normalize=True``, like `scale_each`.
        scale_each: take the range of each image (each tile) by itself instead of that of all.
        pad_value: value of the padding.

    Returns:
        ``[3, H', W']`` in the dtype of the images (float32 for integers with ``normalize=True``, and for float8).

    Raises:
        ValueError: there are no images or no pixels, or `nrow`, `padding` or `value_range` make no sense.
        TypeError: not real numbers.
    """
    if nrow < 1 or padding < 0:
        raise ValueError(f"grid needs nrow >= 1 and padding >= 0, not nrow={nrow}, padding={padding}")
    tiles = _tiles(images)
    if normalize:
        tiles = _stretch(tiles, value_range, dims=(1, 2, 3) if scale_each else (0, 1, 2, 3))
    tiles = _paint_nan(tiles.expand(-1, 3, -1, -1), tiles)

    count, channels, height, width = tiles.shape
    columns = min(nrow, count)
    rows = math.ceil(count / columns)
    cell_h, cell_w = height + padding, width + padding
    canvas = tiles.new_full((channels, cell_h * rows + padding, cell_w * columns + padding), pad_value)
    cells = canvas[:, padding:, padding:].view(channels, rows, cell_h, columns, cell_w)
    cells = cells.permute(1, 3, 0, 2, 4)[..., :height, :width]  # [rows, columns, C, H, W], a view of the canvas
    full = count // columns
    cells[:full] = tiles[: full * columns].view(full, columns, channels, height, width)
    if full < rows:
        cells[full, : count - full * columns] = tiles[full * columns :]
    return canvas


@torch.no_grad()
def colorize(maps: Tensor, colormap: str | int = "viridis", value_range: tuple[float, float] | None = None) -> Tensor:
    """Paint numbers with one of OpenCV's colour maps.

    Arguments:
        maps: ``[..., H, W]``, any real dtype.
        colormap: the end of one of OpenCV's ``COLORMAP_`` names in any case (``"jet"``, ``"turbo"``, ``"magma"``), or
            its number.
        value_range: the values that get the first and the last colour; by default each map's smallest and largest
            finite value.

    Returns:
        uint8 RGB ``[..., 3, H, W]``; NaN is magenta.

    Raises:
        ImportError: OpenCV is missing or can't be loaded.
        ValueError: unknown colour map, or `value_range` is not ``(low, high)`` with low < high.
    """
    if maps.dim() < 2:
        raise ValueError(f"colorize needs maps [..., H, W], not a tensor of shape {tuple(maps.shape)}")
    table = _color_table(colormap, maps.device)
    unit = _stretch(_real(maps), value_range, dims=(-2, -1)).float()
    nan = unit.isnan()
    colors = table[(unit.masked_fill(nan, 0) * 255).round().long()]
    colors = torch.where(nan[..., None], _nan_color(colors), colors)
    return colors.movedim(-1, -3).contiguous()


@torch.no_grad()
def overlay(
    images: Tensor, maps: Tensor, alpha: float = 0.5, colormap: str | int = "jet", positive: bool = True
) -> Tensor:
    """Blend heat maps over the images they belong to.

    Arguments:
        images: ``[B, C, H, W]`` or ``[C, H, W]`` with 1 or 3 channels. Integers as for `to_uint8`; a float image with
            values outside 0..1 (a model's normalised input) is stretched to 0..1 first.
        maps: ``[B, h, w]`` or ``[h, w]``, raw: they are enlarged to the images bilinearly, each is scaled by itself.
        alpha: weight of the heat, from 0 (image only) to 1 (heat only).
        colormap: as for `colorize`.
        positive: show evidence *for* the class, as class activation maps are usually drawn: what is negative counts
            as 0 and the scale is 0..max. Otherwise min..max.

    Returns:
        uint8 RGB ``[B, 3, H, W]``, or ``[3, H, W]`` for a single image.

    Raises:
        ImportError: OpenCV is missing or can't be loaded.
        ValueError: shapes that don't belong together, or `alpha` outside 0..1.
    """
    single = images.dim() == 3
    batch, heat = (images[None] if single else images), (maps[None] if maps.dim() == 2 else maps)
    if batch.dim() != 4 or batch.shape[1] not in (1, 3) or heat.dim() != 3 or len(batch) != len(heat):
        raise ValueError(
            "overlay needs images [B, 1 or 3, H, W] and maps [B, h, w], "
            f"not {tuple(images.shape)} and {tuple(maps.shape)}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"overlay needs an alpha from 0 to 1, not {alpha}")
    heat = F.interpolate(_real(heat).float()[:, None], batch.shape[-2:], mode="bilinear")[:, 0]
    if positive:
        heat = heat.clamp_min(0)
        top = _range(heat, (1, 2))[1]
        heat = heat / torch.where(top > 0, top, 1).float()
    colors = colorize(heat, colormap, value_range=(0, 1) if positive else None).to(batch.device)
    batch = _real(batch)
    background = _viewable(batch.float()) if batch.is_floating_point() else to_uint8(batch).float() / 255
    background = _paint_nan(background.expand(-1, 3, -1, -1), background)
    blended = ((1 - alpha) * background + alpha * (colors.float() / 255)).mul(255).round()
    picture = blended.clamp(0, 255).to(torch.uint8)
    return picture[0] if single else picture


@torch.no_grad()
def kernels(
    weight: Tensor,
    transposed: bool = False,
    groups: int = 1,
    max_outputs: int = 64,
    max_inputs: int = 16,
    padding: int = 1,
) -> Tensor:
    """Draw the kernels of a convolution without pretending that channels are colours.

    Grey means 0.5 + w / (2 · max|w|): mid-grey is a weight of zero, and the scale is that of one output channel, so
    that the tiles of one row can be compared.

    - One input channel a group (grey images, depthwise): one tile an output channel, in a square grid.
    - Three input channels in a single group (2-D and 3-D): the same, in RGB.
    - Anything else: one *row* an output channel, one tile an input channel.

    A 1-D kernel is a tile whose rows are the input channels and whose columns are time; a 3-D kernel is its depth
    slices, side by side.

    Arguments:
        weight: ``[out, in / groups, *kernel]`` as in ``ConvNd``, or ``[in, out / groups, *kernel]`` as in
            ``ConvTransposeNd``, with 1 to 3 kernel dimensions.
        transposed: it is the weight of a ``ConvTransposeNd``.
        groups: of the module; needed for a transposed weight and to know that three channels are not RGB.
        max_outputs: draw only the first so many output channels.
        max_inputs: draw only the first so many input channels of each.
        padding: pixels between tiles.

    Returns:
        float32 ``[3, H, W]`` in 0..1.

    Raises:
        ValueError: no weight of a convolution, or one without elements.
    """
    if not 3 <= weight.dim() <= 5 or 0 in weight.shape:
        raise ValueError(
            "kernels draws the weight of a convolution, [out, in, *kernel] with 1 to 3 kernel dimensions, "
            f"not a tensor of shape {tuple(weight.shape)}"
        )
    weight = _real(weight)
    if transposed:
        if weight.shape[0] % groups:
            raise ValueError(f"kernels: {weight.shape[0]} input channels can't be {groups} groups")
        weight = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    weight = weight[:max_outputs].float()
    inputs = weight.shape[1]
    is_rgb = inputs == 3 and groups == 1 and weight.dim() > 3
    weight = weight[:, :max_inputs]
    peak = torch.where(weight.isfinite(), weight.abs(), 0).flatten(1).amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    gray = weight / peak.reshape(-1, *[1] * (weight.dim() - 1)) / 2 + 0.5

    outputs, shown = gray.shape[:2]
    if gray.dim() == 3:  # 1-D: [O, I, K], a tile is I x K
        return grid(gray[:, None], nrow=math.ceil(math.sqrt(outputs)), padding=padding)
    slices = gray[:, :, None] if gray.dim() == 4 else gray  # [O, I, D, H, W]
    depth = slices.shape[2]
    if is_rgb:
        tiles, tiles_per_output = slices.transpose(1, 2).flatten(0, 1), depth
    else:
        tiles, tiles_per_output = slices.flatten(0, 2)[:, None], shown * depth
    nrow = math.ceil(math.sqrt(outputs)) if tiles_per_output == 1 else tiles_per_output
    return grid(tiles, nrow=nrow, padding=padding)


@torch.no_grad()
def to_uint8(pictures: Tensor) -> Tensor:
    """The bytes that show a picture.

    uint8 stays as it is, bool is black and white, uint16 is scaled from 0..65535, any other integer holds 0..255, a
    float holds 0..1. What lies outside is clamped, +Inf to white and -Inf to black.

    Arguments:
        pictures: ``[..., C, H, W]`` with C = 1 (grey), 3 (RGB) or 4 (RGB and opacity, which is laid on white).

    Returns:
        uint8 ``[..., 1 or 3, H, W]``. Grey becomes RGB if there is a NaN, because NaN is magenta.
    """
    bytes_ = _to_bytes(_real(pictures))
    if bytes_.shape[-3] != 4:
        return bytes_
    color, opacity = bytes_[..., :3, :, :].int(), bytes_[..., 3:, :, :].int()
    return ((color * opacity + 255 * (255 - opacity) + 127) // 255).to(torch.uint8)


def _to_bytes(x: Tensor) -> Tensor:
    if x.dtype == torch.uint8:
        return x
    if x.dtype == torch.bool:
        return x.to(torch.uint8) * 255
    if x.dtype == torch.uint16:
        return (x.to(torch.int32) // 257).to(torch.uint8)
    if not x.is_floating_point():
        return x.to(torch.int64).clamp(0, 255).to(torch.uint8)
    nan = x.isnan().any(-3, keepdim=True)
    shown = (x.float().nan_to_num(1.0).clamp(0, 1) * 255).round().to(torch.uint8)
    if not bool(nan.any()):
        return shown
    color = shown[..., :3, :, :] if shown.shape[-3] > 1 else shown.expand(*shown.shape[:-3], 3, -1, -1)
    return torch.cat([torch.where(nan, _nan_color(color)[:, None, None], color), shown[..., 3:, :, :]], -3)


def _real(x: Tensor) -> Tensor:
    """`x` detached and dense, in a dtype that has arithmetic."""
    x = x.detach()
    if x.is_complex():
        raise TypeError("a complex tensor is no picture: give its modulus, x.abs(), or x.real and x.imag apart")
    if x.is_quantized:
        x = x.dequantize()
    if x.layout is not torch.strided:
        x = x.to_dense()
    if x.is_floating_point() and x.itemsize == 1:
        x = x.float()
    return x


def _tiles(images: Tensor | Sequence[Tensor]) -> Tensor:
    """The images as ``[N, 1 or 3, H, W]``."""
    if not isinstance(images, Tensor):
        images = list(images)
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise ValueError(f"grid needs images of one size, not {sorted(shapes)}")
        if not images:
            raise ValueError("grid was given no images")
        images = torch.stack([_real(image) for image in images])
        if images.dim() == 3:
            images = images[:, None]
    images = _real(images)
    if images.dim() in (2, 3):
        images = images[(None,) * (4 - images.dim())]
    if images.dim() != 4:
        raise ValueError(f"grid needs images [B, C, H, W], [C, H, W] or [H, W], not a shape {tuple(images.shape)}")
    if images.numel() == 0:
        raise ValueError(f"grid was given no images: the shape is {tuple(images.shape)}")
    return images if images.shape[1] in (1, 3) else images.flatten(0, 1)[:, None]


def _wide(x: Tensor) -> torch.dtype:
    """The widest float there is on the tensor's device."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _range(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Smallest and largest finite value along `dims` (kept), in `_wide`; 0 and 1 where there is none."""
    finite = x.isfinite()
    low = torch.where(finite, x, math.inf).amin(dims, keepdim=True).to(_wide(x))
    high = torch.where(finite, x, -math.inf).amax(dims, keepdim=True).to(_wide(x))
    empty = low > high
    return low.masked_fill(empty, 0), high.masked_fill(empty, 1)


def _stretch(x: Tensor, value_range: tuple[float, float] | None, dims: tuple[int, ...]) -> Tensor:
    """Map the range (given, or of the finite values along `dims`) to 0..1, clamping; NaN stays NaN.

    Operation by operation this is what ``make_grid`` does to one image with its range in Python floats: the width of
    the range is a difference in double precision, and half types are divided by it in float32.
    """
    if not x.is_floating_point():
        return _stretch(x.to(_wide(x)), value_range, dims).float()
    if value_range is None:
        low, high = _range(x, dims)
    else:
        first, last = value_range
        if not (math.isfinite(first) and math.isfinite(last) and first < last):
            raise ValueError(f"value_range must be (low, high) with low < high, not {value_range}")
        low, high = (torch.full((), bound, dtype=_wide(x), device=x.device) for bound in (first, last))
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    info = torch.finfo(x.dtype)
    subnormal = (high > low) & (high - low < info.tiny)
    # 1, but for a range that overflows the dtype or is subnormal in it: both would lose all digits.
    factor = torch.where(high - low > info.max, 0.25, torch.where(subnormal, 1 / info.eps, 1.0))
    scale = high * factor - low * factor
    scale = torch.where(scale > 0, scale, 1).to(compute)
    floor, ceiling, power = low.to(x.dtype), high.to(x.dtype), factor.to(x.dtype)
    unit = ((x.clamp(floor, ceiling) * power - floor * power).to(compute) / scale).to(x.dtype)
    return torch.where(x == math.inf, 1, unit)


def _viewable(images: Tensor) -> Tensor:
    """Float images ``[B, C, H, W]``: as they are when within 0..1, else each stretched to it."""
    low, high = _range(images, (1, 2, 3))
    return torch.where((low < 0) | (high > 1), _stretch(images, None, (1, 2, 3)), images)


def _nan_color(like: Tensor) -> Tensor:
    """`NAN_COLOR` in the dtype of a picture: 0..1 for floats, 0..255 for uint8."""
    scale = 1 if like.is_floating_point() else 255
    # filled, not copied from the host: a copy would wait for the device
    return torch.stack([torch.full((), channel * scale, dtype=like.dtype, device=like.device) for channel in NAN_COLOR])


def _paint_nan(rgb: Tensor, values: Tensor) -> Tensor:
    """`rgb` ``[N, 3, H, W]`` with magenta wherever any channel of `values` ``[N, C, H, W]`` is NaN."""
    if not values.is_floating_point():
        return rgb
    return torch.where(values.isnan().any(1, keepdim=True), _nan_color(rgb)[:, None, None], rgb)


@functools.cache
def _color_table(colormap: str | int, device: torch.device) -> Tensor:
    """OpenCV's colour map as a uint8 RGB table ``[256, 3]``."""
    cv2 = opencv()
    known = {name.removeprefix("COLORMAP_").lower(): getattr(cv2, name) for name in dir(cv2) if "COLORMAP_" in name}
    number = known.get(colormap.lower()) if isinstance(colormap, str) else colormap
    if number is None or number not in known.values():
        raise ValueError(f"OpenCV has no colour map {colormap!r}; it has {', '.join(sorted(known))}")
    ramp = torch.arange(256, dtype=torch.uint8)[:, None].numpy()
    return torch.from_numpy(cv2.applyColorMap(ramp, number)[:, 0, ::-1].copy()).to(device)


def opencv() -> Any:
    """The module ``cv2``.

    Raises:
        ImportError: it is missing or can't be loaded; the message names both cures.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            f"this picture is drawn with OpenCV, which can't be imported ({error}). If it is missing: "
            "pip install opencv-python-headless. If it is opencv-python that misses libGL: install that library "
            "(apt-get install libgl1), or the headless package in its place."
        ) from error
    return cv2
