"""From a tensor of any kind to a sketch's row, and rows to one row; `probe.sketch` says what a row holds.

Three ways lead to the same row: NumPy and torch on the CPU, where the number of calls is what costs and values may be
looked at; one Triton kernel on CUDA; plain torch operators anywhere else and in traced code. The last two never wait
for the device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import _disable_current_modes

from probe import image

Array: TypeAlias = np.ndarray[Any, Any]

MANTISSA = 2
"""Mantissa bits of a bin: each power of two is cut into ``2 ** MANTISSA`` bins."""
BINS = 1 << (9 + MANTISSA)
"""Bins of the histogram, those of NaN and Inf included, which stay empty."""
HEAD = 10
"""Header words of a row."""
ROW = HEAD + BINS
"""Length of a row with a histogram, int64; without one it is `HEAD`."""

COUNT, ZEROS, NAN, POSINF, NEGINF, MAX, MIN, SHIFT, SUM, SQUARES = range(HEAD)
DROP = 23 - MANTISSA  # the low bits of a float32, which make no difference to its bin
NEGATIVE = BINS // 2  # the first bin of negative values: those next to 0
INFINITE = 255 << MANTISSA  # the first bin of Inf and NaN, counted from the first one of its sign
LOWEST = NEGATIVE + INFINITE - 1  # the bin of the lowest finite values
TOP = -(1 << 63)

_CHUNK = 1 << 19  # elements; as float32 they fill two megabytes
_PIECE = 30_000  # elements; as float64 they fit a level 2 cache, and torch keeps to one thread: see `_host_row`
SMALL = (
    10_000  # elements; up to here NumPy's calls cost less than torch's, its BLAS keeps to one thread, and gluing pays
)
GLUED = _PIECE  # elements of small tensors that are glued together at most
_ROWS = 64  # small tensors glued together at most; their rows fill a megabyte
_LARGE = 1 << 22  # elements; the plain operators' temporaries take up to 60 bytes each


# A tensor of any kind -> flat values


class Flat(NamedTuple):
    """What a tensor of any kind comes down to."""

    values: Tensor
    """1-D, contiguous, detached, real, of a dtype that converts to float64; its negative bit may be set."""
    times: int = 1
    """How often each value counts: dimensions of stride 0 are read once."""
    zeros: int = 0
    """Zeros beside the values, which a sparse tensor does not store."""


_FLOAT8 = {
    dtype
    for name in dir(torch)
    if name.startswith("float8_") and isinstance(dtype := getattr(torch, name), torch.dtype)
}
_READABLE = _FLOAT8 | {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}

_is_copy_on_write = torch._C._is_cow_tensor  # type: ignore[attr-defined]
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # by vmap, grad, jvp


def flatten(tensor: Tensor) -> Flat | None:
    """The numbers of a tensor of any kind, or None where there are none to read; TypeError for what is no tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"A sketch is made of a torch.Tensor, not of {type(tensor).__name__}.")
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        plain = _unwrap(tensor)
        return None if plain is None else flatten(plain)
    traced = torch.compiler.is_compiling()
    if not traced and _is_wrapped(tensor):
        return flatten(torch._C._functorch.get_unwrapped(tensor))
    t = tensor.detach()
    if not t.is_cpu:
        if t.is_meta:
            return None
        if t.is_mps:
            t = t.cpu()
    if t.layout is not torch.strided:
        return _flatten_sparse(t)
    if t.is_nested:
        return flatten(t.values() if t.is_contiguous() else _joined(t))
    if t.dtype not in _READABLE:
        if t.is_quantized:
            t = t.dequantize()
        elif t.is_complex():
            t = t.to(torch.complex128).abs()
        else:
            return None
    if not traced and t.numel() and not t.untyped_storage().nbytes():
        return None
    if t.is_contiguous():
        return Flat(t if t.dim() == 1 else t.view(-1))
    times = math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if not stride)
    t = t[tuple(slice(None) if stride else 0 for stride in t.stride())]
    # Elements may come in any order: in the memory's own, a transposed or channels-last tensor needs no copy.
    return Flat(t.permute(sorted(range(t.dim()), key=t.stride, reverse=True)).reshape(-1), times)


def _unwrap(tensor: Tensor) -> Tensor | None:
    """The tensor behind a subclass, or None."""
    kind = type(tensor)
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return None
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return Tensor.as_subclass(tensor, Tensor)
    if tensor.is_nested:
        holes = tensor.lengths() is not None  # type: ignore[attr-defined]
        return _joined(tensor) if holes else tensor.values()
    for name in ("to_local", "wait", "dequantize"):  # DTensor, AsyncCollectiveTensor, torchao's quantized tensors
        if getattr(kind, name, None) is not getattr(Tensor, name, None):
            inner: Tensor = getattr(tensor.detach(), name)()
            return inner
    return None


def _joined(nested: Tensor) -> Tensor:
    return torch.cat([part.reshape(-1) for part in nested.unbind()])


def _flatten_sparse(t: Tensor) -> Flat | None:
    if t.layout is torch.sparse_coo:
        if not t.is_coalesced():
            if t.dtype in _FLOAT8:
                t = torch.sparse_coo_tensor(t._indices(), t._values().float(), t.shape)
            # What is stored twice has to be added up. Beside the dense tensor this takes a count that the device knows.
            t = t.coalesce() if t.device.type == "cpu" else t.to_dense()
        values = t.values() if t.layout is torch.sparse_coo else t
    elif t.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        values = t.values()
    else:
        values = t.to_dense()
    flat = flatten(values)
    return flat and flat._replace(zeros=t.numel() - values.numel())


# Flat values -> rows


def unseen() -> contextlib.AbstractContextManager[object]:
    """Hides what is done inside from the modes that are on: a counter of FLOPs counts none of it."""
    if torch.compiler.is_compiling() or not (_dispatch_modes() or _function_modes()):
        return _NOTHING
    return _modes_off()


@contextlib.contextmanager
def _modes_off() -> Iterator[None]:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


_NOTHING = contextlib.nullcontext()
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack


def measure(flats: Sequence[Flat], histogram: bool) -> list[Tensor]:
    """One row for each of `flats`, which share a device."""
    if torch.compiler.is_compiling():
        return [measure_plain(flat, histogram) for flat in flats]
    if flats[0].values.is_cpu:
        with np.errstate(
            all="ignore"
        ):  # float64 may overflow, to Inf as in NumPy's sums; a NaN may be a signalling one
            return _host_rows(flats, histogram)
    device = flats[0].values.device
    if device.type == "cuda" and _triton_works(device):
        from probe import _sketch_triton

        rows = _sketch_triton.rows([flat.values for flat in flats], [flat.times for flat in flats], histogram)
        return [_complete(row, flat._replace(times=1)) for row, flat in zip(rows, flats, strict=True)]
    return [measure_plain(flat, histogram) for flat in flats]


@cache
def _triton_works(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from probe import _sketch_triton

    try:
        _sketch_triton.rows([torch.zeros(1, device=device)], [1], True)
    except Exception as error:  # no C compiler, no driver, a GPU that Triton does not know, ...
        warnings.warn(
            f"Triton does not work on {device} ({type(error).__name__}: {error}); sketches are made by plain torch "
            "operators there, which is slower. Triton needs a C compiler such as gcc at run time.",
            stacklevel=2,
        )
        return False
    return True


def _host_rows(flats: Sequence[Flat], histogram: bool) -> list[Tensor]:
    """Rows on the CPU; small tensors of one dtype are glued together, to share the price of each call."""
    if len(flats) == 1:
        return [_complete(_host_row(flats[0].values, histogram), flats[0])]
    rows: dict[int, Tensor] = {}
    small: dict[torch.dtype, list[int]] = {}
    for i, (values, _, _) in enumerate(flats):
        if 0 < values.numel() <= SMALL:
            small.setdefault(values.dtype, []).append(i)
        else:
            rows[i] = _host_row(values, histogram)
    for indices in small.values():
        for run in _runs(indices, flats):
            rows.update(zip(run, _host_glued([flats[i].values for i in run], histogram), strict=True))
    return [_complete(rows[i], flat) for i, flat in enumerate(flats)]


def _runs(indices: Sequence[int], flats: Sequence[Flat]) -> Iterator[list[int]]:
    """Cut `indices` into runs of few enough tensors and elements to be glued together."""
    run: list[int] = []
    room = GLUED
    for i in indices:
        size = flats[i].values.numel()
        if run and (size > room or len(run) == _ROWS):
            yield run
            run, room = [], GLUED
        run.append(i)
        room -= size
    yield run


def _host_row(values: Tensor, histogram: bool) -> Tensor:
    """The row of a CPU tensor.

    By operations that use one thread each. Several threads would have to wait for each other many times; where another
    core is busy (with the backward pass, a data loader) that takes up to a hundred times as long.
    """
    row = np.zeros(ROW if histogram else HEAD, np.int64)
    row[COUNT] = values.numel()
    low, high, shift, total, squares = math.inf, -math.inf, None, 0.0, 0.0
    for exact, narrow in _chunks(values):
        lowest, highest = _extremes(exact)
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            odd = np.isnan(exact), exact == math.inf, exact == -math.inf
            row[NAN:MAX] += np.array([np.count_nonzero(which) for which in odd])
            finite = np.isfinite(exact)
            exact, narrow = exact[finite], narrow[finite]
            if not len(exact):
                continue
            lowest, highest = _extremes(exact)
        low, high = min(low, lowest), max(high, highest)
        if shift is None:
            shift = min(max(0.0, low), high)
        more, more_squares = _sums(exact, shift)
        total, squares = total + more, squares + more_squares
        row[ZEROS] += _count(exact, narrow, row[HEAD:]) if histogram else np.count_nonzero(exact == 0)
    if shift is not None:
        high_bits, low_bits, *rest = struct.unpack("5q", struct.pack("5d", high, -low, shift, total, squares))
        row[MAX:HEAD] = keys(high_bits), keys(low_bits), *rest
    return torch.from_numpy(row)


class _Buffers(threading.local):
    """Memory kept from call to call, for each thread its own: fresh pages take longer to get than to compute on."""

    def __init__(self) -> None:
        self._kept: dict[str, Array] = {}

    def take(self, dtype: str, size: int) -> Array:
        """An array of `size` elements, the same memory for each `dtype`."""
        kept = self._kept.get(dtype)
        if kept is None or len(kept) < size:
            kept = self._kept[dtype] = np.empty(size, dtype.split()[0])
        return kept[:size]


_buffers = _Buffers()


def _chunks(values: Tensor) -> Iterator[tuple[Array, Array]]:
    """A CPU tensor chunk by chunk: in the narrower of float32 and float64 that holds it exactly, and as float32.

    Neither is to be written to.
    """
    size = values.numel()
    exact_dtype = "f4" if values.dtype is torch.float32 or values.dtype.itemsize < 4 else "f8"
    # Tensor.numpy() refuses a negative bit, and would make a copy-on-write tensor copy itself.
    readable = values.dtype is torch.float32 and not (values.is_neg() or _is_copy_on_write(values))
    floats: Array | None = values.numpy() if readable else None
    for start in range(0, size, _CHUNK):
        if floats is not None:
            exact = floats[start : start + _CHUNK]
        else:
            exact = _buffers.take(exact_dtype, min(size - start, _CHUNK))
            chunk = values[start : start + _CHUNK]
            held = torch.from_numpy(exact)
            for first in range(0, len(exact), _PIECE):
                held[first : first + _PIECE].copy_(chunk[first : first + _PIECE])
        narrow = exact
        if exact_dtype == "f8":
            narrow = _buffers.take("f4", len(exact))
            np.copyto(narrow, exact, casting="same_kind")
        yield exact, narrow


def _piece(most: int) -> int:
    """So many elements at a time: `most`, or where torch has several threads as many as it leaves to one."""
    return _PIECE if torch.get_num_threads() > 1 else most


def _extremes(x: Array) -> tuple[float, float]:
    """The least and the greatest element; NaN where one is."""
    return float(np.minimum.reduce(x)), float(np.maximum.reduce(x))


@cache
def _opencv() -> Any:
    """OpenCV, which converts to float64 as it sums; None where it is missing, or does not."""
    try:
        cv2 = image.opencv()
    except ImportError:
        return None
    x = np.array([2.0**24, *[4097.0] * 63], np.float32)  # float32 holds neither the sum nor any of these squares
    wide = x.astype(np.float64)
    return cv2 if np.allclose(_sums_by(cv2, x), (wide.sum(), wide.dot(wide)), rtol=1e-13, atol=0) else None


def _sums_by(cv2: Any, x: Array) -> tuple[float, float]:
    return cv2.sumElems(x[None])[0], cv2.norm(x[None], cv2.NORM_L2SQR)


def _sums(x: Array, shift: float) -> tuple[float, float]:
    """Sum and sum of squares about `shift`, in float64: in one pass each, or by pieces for the nearest cache."""
    if not shift and (cv2 := _opencv()) is not None:
        return _sums_by(cv2, x)
    total = squares = 0.0
    size = _piece(4 * _PIECE)
    for start in range(0, len(x), size):
        piece = x[start : start + size]
        wide = _buffers.take("f8 piece", len(piece))
        np.copyto(wide, piece)
        if shift:
            wide -= shift
        total += torch.from_numpy(wide).sum().item() if len(wide) > SMALL else float(np.add.reduce(wide))
        for first in range(0, len(wide), SMALL):
            few = wide[first : first + SMALL]
            squares += float(few.dot(few))
    return total, squares


def _count(exact: Array, narrow: Array, bins: Array) -> int:
    """Add the bins of finite values, given exactly and as float32, to `bins`; returns how many are exactly zero."""
    index = _buffers.take("u4", len(narrow))  # no narrower: a shift that casts, and a bincount of int16, take longer
    np.right_shift(narrow.view(np.uint32), DROP, out=index)
    if len(index) > SMALL:
        whole, size = torch.from_numpy(index.view(np.int32)), _piece(len(index))
        counts: Array = torch.bincount(whole[:size], minlength=BINS).numpy()
        for start in range(size, len(whole), size):
            counts += torch.bincount(whole[start : start + size], minlength=BINS).numpy()
    else:
        counts = np.bincount(index, minlength=BINS)
    near = zeros = int(counts[0] + counts[NEGATIVE])
    if near:  # exact zeros, and the least subnormal numbers, which share the bins of 0 and -0
        zeros = int(np.count_nonzero(exact == 0))
        counts[NEGATIVE] = np.count_nonzero((index == NEGATIVE) & (exact < 0)) if zeros < near else 0
        counts[0] = near - counts[NEGATIVE]
    for infinite in (INFINITE, NEGATIVE + INFINITE):  # finite in float64 alone
        if counts[infinite]:
            counts[infinite - 1] += counts[infinite]
            counts[infinite] = 0
    bins += counts
    return zeros


def _host_glued(parts: Sequence[Tensor], histogram: bool) -> Tensor:
    """The rows ``[len(parts), ROW or HEAD]`` of CPU tensors that share a dtype and are not empty, read together."""
    whole = torch.cat(list(parts))
    x: Array = whole.to(torch.float64, copy=True).numpy()
    sizes = np.array([part.numel() for part in parts])
    starts = np.cumsum(sizes) - sizes
    lows, highs = np.minimum.reduceat(x, starts), np.maximum.reduceat(x, starts)
    plain = bool(np.isfinite(lows).all() and np.isfinite(highs).all())
    zeros: Array | int = 0
    if histogram and plain:
        index = whole.float().numpy().view(np.uint32)
        index >>= DROP
        index += np.repeat(np.arange(HEAD, len(parts) * ROW, ROW, dtype=np.uint32), sizes)
        counts = torch.bincount(torch.from_numpy(index.view(np.int32)), minlength=len(parts) * ROW)
        rows: Array = counts.numpy().reshape(len(parts), ROW)
        least = rows[:, HEAD] + rows[:, HEAD + NEGATIVE]
        if least.any():
            zeros = np.add.reduceat(x == 0, starts, dtype=np.int64)
            rows[:, HEAD], rows[:, HEAD + NEGATIVE] = zeros, 0
        plain = bool(np.all(least == zeros)) and not rows[:, [HEAD + INFINITE, HEAD + NEGATIVE + INFINITE]].any()
    elif plain:
        rows = np.zeros((len(parts), HEAD), np.int64)
        zeros = np.add.reduceat(x == 0, starts, dtype=np.int64)
    if not plain:  # NaN, Inf, subnormal numbers, or float64 beyond float32
        return torch.stack([_host_row(part, histogram) for part in parts])
    rows[:, COUNT], rows[:, ZEROS] = sizes, zeros
    floats = rows.view(np.float64)
    shifts = np.clip(0.0, lows, highs)
    floats[:, MAX], floats[:, MIN], floats[:, SHIFT] = highs, -lows, shifts
    rows[:, MAX:SHIFT] = keys(rows[:, MAX:SHIFT])
    if shifts.any():
        x -= np.repeat(shifts, sizes)
    floats[:, SUM] = np.add.reduceat(x, starts)
    x *= x
    floats[:, SQUARES] = np.add.reduceat(x, starts)
    return torch.from_numpy(rows)


def measure_plain(flat: Flat, histogram: bool) -> Tensor:
    """One row by plain operators that neither wait for the device nor have a shape that depends on data."""
    values = flat.values
    size = values.numel()
    if size > _LARGE:
        parts = [measure_plain(Flat(part), histogram) for part in torch.split(values, _LARGE)]
        return _complete(fold(torch.stack(parts)), flat)
    if not size:
        return _complete(values.new_zeros(ROW if histogram else HEAD, dtype=torch.int64), flat)
    x = values.double()
    finite, zero = x.isfinite(), x == 0
    low, high = torch.where(finite, x, math.inf).amin(), torch.where(finite, x, -math.inf).amax()
    shift = torch.where(low <= high, torch.minimum(low.clamp(min=0.0), high), 0.0)
    d = torch.where(finite, x - shift, 0.0)
    floats = torch.stack([high, -low, shift, d.sum(), (d * d).sum()]).view(torch.int64)
    counts = [finite.new_full((), size, dtype=torch.int64), zero.sum(), x.isnan().sum()]
    counts += [(x == math.inf).sum(), (x == -math.inf).sum()]
    words = [torch.stack(counts), keys(floats[:2]), floats[2:]]
    if histogram:
        limit = torch.finfo(torch.float32).max
        index = (x.clamp(-limit, limit).float().view(torch.int32) >> DROP) & (BINS - 1)
        index = torch.where(zero, 0, index).long()
        words.append(index.new_zeros(BINS).scatter_add(0, index, finite.long()))
    return _complete(torch.cat(words), flat)


# Rows -> rows


def keys(bits: Any) -> Any:
    """The bits of float64 as int64 -> unsigned keys in the same order, 0 below all; ints, arrays or tensors."""
    return bits ^ ((bits >> 63) | TOP)


def unkeys(keys: Any) -> Any:
    """The inverse of `keys`."""
    return keys ^ ((~keys >> 63) | TOP)


@cache
def edges() -> Array:
    """Edges of the finite bins from the lowest to the highest, float64 ``[2 * INFINITE + 1]``."""
    magnitudes = (np.arange(INFINITE, dtype=np.uint32) << DROP).view(np.float32).astype(np.float64)
    magnitudes = np.append(magnitudes, 2.0**128)
    return np.concatenate([-magnitudes[:0:-1], magnitudes])


def fold(rows: Tensor) -> Tensor:
    """Merge rows ``[k, ..., ROW or HEAD]`` over the first dimension; waits for nothing."""
    counts, highest = rows[..., :MAX].sum(0), (rows[..., MAX:SHIFT] ^ TOP).amax(0) ^ TOP
    n = (rows[..., COUNT] - rows[..., NAN:MAX].sum(-1)).double()
    shift, total, squares = rows[..., SHIFT:HEAD].view(torch.float64).unbind(-1)
    centre = (n / n.sum(0).clamp(min=1) * shift).sum(0)
    delta = shift - centre
    squares = (squares + delta * (2 * total + n * delta)).sum(0)
    total = (total + n * delta).sum(0)
    floats = torch.stack([centre, total, squares], -1).view(torch.int64)
    return torch.cat([counts, highest, floats, rows[..., HEAD:].sum(0)], -1)


def _complete(row: Tensor, flat: Flat) -> Tensor:
    """The row of ``flat.values`` -> the row of all that `flat` stands for."""
    if flat.times != 1:
        floats = row[SHIFT:HEAD].view(torch.float64)
        sums = torch.cat([floats[:1], floats[1:] * flat.times]).view(torch.int64)
        row = torch.cat([row[:MAX] * flat.times, row[MAX:SHIFT], sums, row[HEAD:] * flat.times])
    if flat.zeros:
        zeros = torch.zeros_like(row)
        zeros[: ZEROS + 1] = flat.zeros
        zeros[MAX:SHIFT] = TOP  # the key of 0.0
        zeros[HEAD : HEAD + 1] = flat.zeros
        row = fold(torch.stack([row, zeros]))
    return row
