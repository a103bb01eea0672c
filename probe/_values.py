"""Values of any kind as TensorBoard's protocol buffers, truthfully. No function here writes anything."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import wave
from collections.abc import Iterable, MutableSet
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from probe import image, sketch
from probe.capture import Histogram, Image, Scalar, Shown, Statistics, nothing_to_show
from probe.summary import curves

Values = list["Summary.Value"]
_Array = NDArray[Any]


def shown(items: Iterable[Shown], seen: MutableSet[str]) -> Values:
    """The values of one event. `seen`: see `histogram`.

    Raises:
        TypeError: an item is nothing to show, or an Embedding, which is no value of an event: it is files.
    """
    items = list(items)
    drawn = [item.value for item in items if isinstance(item, Histogram) and isinstance(item.value, sketch.Sketch)]
    made = iter(sketch.buckets(drawn))
    values: Values = []
    for item in items:
        match item:
            case Scalar():
                values += scalar(item.tag, item.value)
            case Statistics():
                values += [Summary.Value(tag=tag, simple_value=number) for tag, number in curves(item)]
            case Histogram(value=sketch.Sketch() as found):
                values += _histogram(item.tag, found, *next(made), seen)
            case Histogram():
                values += histogram(item.tag, item.value, seen)
            case Image():
                values += picture(item.tag, item.value, "NCHW"[-item.value.dim() :])
            case _:
                raise nothing_to_show(type(item).__name__)
    return values


def scalar(tag: str, value: Any) -> Values:
    """A number; nothing for a tensor without data (meta).

    Raises:
        TypeError: not a number, or a complex one.
        ValueError: not exactly one.
    """
    if isinstance(value, int | float):
        return [Summary.Value(tag=tag, simple_value=value)]
    try:
        x = tensor(value)
    except TypeError:
        raise TypeError(f"a scalar is one number: {tag!r} was given {value!r:.80} ({type(value).__name__})") from None
    if x is None:
        return []
    if x.numel() != 1:
        raise ValueError(f"a scalar is one number: {tag!r} was given {x.numel()}, in a shape {tuple(x.shape)}")
    if x.is_complex():
        raise TypeError(f"a scalar is a real number: give the modulus of {tag!r}, .abs(), or .real and .imag apart")
    return [Summary.Value(tag=tag, simple_value=float(x))]


def histogram(tag: str, value: Any, seen: MutableSet[str], bins: Any = None, max_bins: int | None = None) -> Values:
    """The distribution of the finite values; how many are not finite, as scalars ``<tag>/nan`` and ``<tag>/inf``.

    Such a scalar appears when its count is first not zero, and from then on with every histogram: `seen` remembers.

    Arguments:
        value: a tensor of any kind, an array, numbers, or a `Sketch`. A DTensor counts as a whole, so that every rank
            of its mesh must take part.
        bins: edges, or the name of a rule, as ``numpy.histogram`` takes them; None for the bins of the sketch, which
            follow the data at every scale.
        max_bins: join neighbouring buckets until there are no more than this.

    Returns:
        nothing where there is nothing to say (meta tensors), no histogram where no value is finite.
    """
    if max_bins is not None and max_bins < 1:
        raise ValueError(f"a histogram has at least one bin, not max_bins={max_bins}")
    if isinstance(value, sketch.Sketch):
        numbers, found = None, value
    else:
        numbers = tensor(value, on_host=bins is not None)
        made = None if numbers is None else sketch.of(numbers)
        if numbers is None or made is None:
            return []
        found = made
    if bins is None or not found.finite:
        ((limits, counts),) = sketch.buckets([found])
    elif numbers is None:
        raise ValueError("a Sketch has its bins already: give add_histogram the tensor to choose others")
    else:
        limits, counts = _binned(numbers, bins)
    if max_bins is not None and len(counts) > max_bins:
        each = math.ceil(len(counts) / max_bins)
        limits = np.append(limits[each - 1 : -1 : each], limits[-1])
        counts = np.add.reduceat(counts, range(0, len(counts), each))
    return _histogram(tag, found, limits, counts, seen)


def _histogram(tag: str, found: sketch.Sketch, limits: _Array, counts: _Array, seen: MutableSet[str]) -> Values:
    values: Values = []
    if found.finite:
        value = Summary.Value(tag=tag)
        value.histo.MergeFromString(_histogram_proto(found, limits, counts))
        values.append(value)
    for name, count in (("nan", found.nan), ("inf", found.posinf + found.neginf)):
        beside = f"{tag}/{name}"
        if count or beside in seen:
            seen.add(beside)
            values.append(Summary.Value(tag=beside, simple_value=count))
    return values


def _histogram_proto(found: sketch.Sketch, limits: _Array, counts: _Array) -> bytes:
    """A serialized HistogramProto: its two packed fields are arrays as they lie in memory; lists take 9 x as long."""
    moments = (found.min, found.max, found.finite, found.sum, found.sum_squares)
    numbers = struct.pack("<BdBdBdBdBd", *(each for field in zip(_MOMENTS, moments, strict=True) for each in field))
    length = _varint(8 * len(limits))
    packed = (_LIMITS, length, limits.astype("<f8").tobytes(), _COUNTS, length, counts.astype("<f8").tobytes())
    return b"".join((numbers, *packed))


_fields = HistogramProto.DESCRIPTOR.fields_by_name
# In protocol buffers' wire format a field begins with its number and how it is written: 1 for 8 bytes, 2 for a length.
_MOMENTS = [_fields[name].number << 3 | 1 for name in ("min", "max", "num", "sum", "sum_squares")]
_LIMITS, _COUNTS = (bytes([_fields[name].number << 3 | 2]) for name in ("bucket_limit", "bucket"))


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the eighth bit set."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _binned(numbers: Tensor, bins: Any) -> tuple[_Array, _Array]:
    """Right edges and counts of the finite numbers in the bins asked for, and an empty bucket to their left."""
    flat = (numbers.abs() if numbers.is_complex() else dense(numbers)).double()
    counts, edges = np.histogram(flat[flat.isfinite()].numpy(), bins=bins)
    return edges, np.append(0, counts)


def picture(tag: str, value: Any, dataformats: str) -> Values:
    """A still picture, as PNG: see `pixels`."""
    bytes_ = pixels(value, dataformats)
    if bytes_ is None:
        return []
    return _encoded(tag, [bytes_], "PNG")


def video(tag: str, value: Any, fps: float) -> Values:
    """A moving picture, as GIF.

    Arguments:
        value: ``[N, T, C, H, W]``: N clips side by side, T frames; channels and ranges as for `pixels`.
        fps: frames a second. A GIF counts in hundredths of a second, and browsers show no more than 50 frames in one.
    """
    if not fps > 0:
        raise ValueError(f"a video needs fps > 0, not {fps}")
    clips = tensor(value)
    if clips is None:
        return []
    if clips.dim() != 5 or 0 in clips.shape:
        raise ValueError(f"a video is [N, T, C, H, W] with at least one frame, not a shape {tuple(clips.shape)}")
    clip_count, frame_count = clips.shape[:2]
    still = _tiles(clips.flatten(0, 1))
    still = still.reshape(clip_count, frame_count, -1, *still.shape[1:]).transpose(0, 1).flatten(1, 2)
    frames = [_layout(frame, math.ceil(math.sqrt(len(frame))), padding=0) for frame in still]
    return _encoded(tag, frames, "GIF", save_all=True, duration=max(20, round(1000 / fps)), loop=0)


def _encoded(tag: str, frames: list[NDArray[np.uint8]], encoding: str, **options: Any) -> Values:
    from PIL import Image as Pillow

    height, width, channels = frames[0].shape
    first, *rest = (Pillow.fromarray(frame.squeeze(2) if channels == 1 else frame) for frame in frames)
    with io.BytesIO() as buffer:
        first.save(buffer, encoding, **options, **({"append_images": rest} if rest else {}))
        encoded = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=buffer.getvalue())
    return [Summary.Value(tag=tag, image=encoded)]


def pixels(value: Any, dataformats: str) -> NDArray[np.uint8] | None:
    """What a picture or a batch of pictures looks like.

    Ranges are those of `image.to_uint8`. One channel is grey, three are RGB, four RGB and opacity; of any other number
    each becomes a tile of its own. Several pictures are laid side by side, eight in a row.

    Arguments:
        value: tensor, array or nested lists.
        dataformats: a letter for each dimension, of ``NCHW``, in any order and case; N and C may be missing.

    Returns:
        ``[H, W, 1 or 3]``; None where there is no data (meta).

    Raises:
        ValueError: `dataformats` does not fit the shape, or there are no pixels.
    """
    x = tensor(value)
    if x is None:
        return None
    letters = dataformats.upper()
    if len(set(letters)) != len(letters) or not {"H", "W"} <= set(letters) <= set("NCHW") or len(letters) != x.dim():
        raise ValueError(
            f"dataformats={dataformats!r} does not fit an image of shape {tuple(x.shape)}: it takes one letter of NCHW "
            "for each dimension, as in 'CHW', 'HWC', 'HW', 'NCHW'"
        )
    if x.numel() == 0:
        raise ValueError(f"an image of shape {tuple(x.shape)} has no pixels")
    x = x.permute([letters.index(letter) for letter in "NCHW" if letter in letters])
    x = x if "C" in letters else x.unsqueeze(-3)
    x = x if "N" in letters else x.unsqueeze(0)
    tiles = _tiles(x)
    if len(tiles) == len(x):
        return _layout(tiles, 8, padding=0)
    return _layout(tiles, math.ceil(math.sqrt(len(tiles))), padding=1)


def _tiles(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` of any range as uint8 ``[N or N * C, 1 or 3, H, W]``."""
    return image.to_uint8(x if x.shape[1] in (1, 3, 4) else x.flatten(0, 1)[:, None])


def _layout(tiles: Tensor, nrow: int, padding: int) -> NDArray[np.uint8]:
    """uint8 tiles ``[N, C, H, W]`` as one picture ``[H, W, C]``; a single one as it is."""
    whole = tiles[0] if len(tiles) == 1 else image.grid(tiles, nrow=nrow, padding=padding)
    return np.ascontiguousarray(whole.permute(1, 2, 0).numpy())


def audio(tag: str, value: Any, sample_rate: int) -> Values:
    """Sound, as 16-bit WAV.

    Arguments:
        value: ``[L]`` or ``[channels, L]``; floats hold -1..1 (clamped; NaN is silence), integers their dtype's range.
        sample_rate: samples a second.

    Raises:
        TypeError: complex numbers or bools.
        ValueError: another shape.
    """
    x = tensor(value)
    if x is None:
        return []
    x = dense(x)
    x = x.reshape(1, -1) if x.dim() < 2 else x
    if x.dim() != 2 or x.numel() == 0 or x.shape[0] > 32:
        raise ValueError(f"audio is [samples] or [channels, samples], not a shape {tuple(x.shape)}")
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"audio is real numbers, not {str(x.dtype).removeprefix('torch.')}: give floats of -1..1")
    if not x.is_floating_point():
        info = torch.iinfo(x.dtype)
        middle = (info.max + info.min + 1) // 2
        x = (x.double() - middle) / (info.max - middle + 1)
    samples = (x.double().nan_to_num(0.0).clamp(-1, 1) * 32767).round().to(torch.int16)
    with io.BytesIO() as buffer:
        with wave.open(buffer, "wb") as file:
            file.setnchannels(len(samples))
            file.setsampwidth(2)
            file.setframerate(sample_rate)
            file.writeframes(samples.t().contiguous().numpy().astype("<i2").tobytes())
        encoded = buffer.getvalue()
    sound = Summary.Audio(
        sample_rate=sample_rate,
        num_channels=len(samples),
        length_frames=samples.shape[1],
        encoded_audio_string=encoded,
        content_type="audio/wav",
    )
    return [Summary.Value(tag=tag, audio=sound)]


def dense(x: Tensor) -> Tensor:
    """The tensor without a sparse layout, dequantized."""
    return x.dequantize() if x.is_quantized else x.to_dense()


def tensor(value: Any, on_host: bool = True) -> Tensor | None:
    """Whatever holds numbers, as a detached tensor: the whole of a DTensor; None where there is no data (meta, fake).

    Raises:
        TypeError: it holds no numbers.
    """
    if isinstance(value, Tensor):
        if value.is_meta or isinstance(value, FakeTensor):
            return None
        value = value.detach()
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        found: Tensor = value.cpu() if on_host else value
        return found
    array = np.asarray(value)
    if array.dtype.kind in "OV" and not any(each is None for each in array.flat):
        with contextlib.suppress(TypeError, ValueError):
            array = array.astype(np.float64)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"numbers are needed: a tensor, an array, a list or a number, not {type(value).__name__}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
