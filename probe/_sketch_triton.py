"""The Triton kernel that fills sketches' rows on a GPU: each tensor is read once. Imported when it is first needed.

Every program reads one span of a tensor block by block, counts in registers and shared memory (``tl.histogram``), and
at the end adds what it has found to the tensor's row, one atomic operation per header word and filled bin. A row starts
as zeros, the neutral element of each of its words, so the programs need no order and the host has nothing to wait for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from probe import _sketch_rows as layout

_BLOCK = 1024
_PROGRAMS = 2048  # of a launch, about; at least one a tensor
_SAMPLE = 128

_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    torch.bool: tl.uint8,
    torch.uint8: tl.uint8,
    torch.uint16: tl.uint16,
    torch.uint32: tl.uint32,
    torch.uint64: tl.uint64,
}
_HEAD, _BINS = tl.constexpr(layout.HEAD), tl.constexpr(layout.BINS)
_DROP, _INFINITE = tl.constexpr(layout.DROP), tl.constexpr(layout.INFINITE)
_COUNT, _ZEROS, _NAN = tl.constexpr(layout.COUNT), tl.constexpr(layout.ZEROS), tl.constexpr(layout.NAN)
_POSINF, _NEGINF = tl.constexpr(layout.POSINF), tl.constexpr(layout.NEGINF)
_MAX, _MIN, _TOP = tl.constexpr(layout.MAX), tl.constexpr(layout.MIN), tl.constexpr(layout.TOP)
_SHIFT, _SUM, _SQUARES = tl.constexpr(layout.SHIFT), tl.constexpr(layout.SUM), tl.constexpr(layout.SQUARES)
_LIMIT = tl.constexpr(torch.finfo(torch.float32).max)


def rows(values: Sequence[Tensor], times: Sequence[int], histogram: bool) -> Tensor:
    """The rows ``[len(values), ROW or HEAD]`` of flat tensors, by one launch per dtype; nothing is waited for.

    Arguments:
        values: 1-D contiguous tensors on one device, of real dtypes.
        times: how often the elements of each tensor count.
        histogram: False leaves the bins out.
    """
    device = values[0].device
    out = torch.zeros(len(values), layout.ROW if histogram else layout.HEAD, dtype=torch.int64, device=device)
    values = [(x if x.dtype in _TYPES else x.float()).resolve_neg() for x in values]
    groups: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(values):
        if x.numel():
            groups.setdefault(x.dtype, []).append(i)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A replayed graph would read a table that is long gone from the pinned memory it was copied from.
            runs = [(dtype, [i]) for dtype, indices in groups.items() for i in indices]
        else:
            runs = list(groups.items())
        for dtype, indices in runs:
            _launch(out, [(i, _address(values[i]), values[i].numel(), times[i]) for i in indices], dtype, histogram)
    return out


def _address(x: Tensor) -> int:
    """Where the elements are; `Tensor.data_ptr` would make a copy-on-write tensor copy itself."""
    if hasattr(x, "const_data_ptr"):
        return int(x.const_data_ptr())
    return int(torch._C._data_address(x))  # type: ignore[attr-defined]  # until torch 2.12


def _launch(out: Tensor, items: list[tuple[int, int, int, int]], dtype: torch.dtype, histogram: bool) -> None:
    """Fill the rows of `out` for items ``(row, address, size, times)`` of one dtype."""
    blocks = sum(-(-size // _BLOCK) for _, _, size, _ in items)
    span = _BLOCK * -(-blocks // _PROGRAMS)
    starts = [(*item, start) for item in items for start in range(0, item[2], span)]
    row, address, size, times = items[0]
    table = out
    if len(items) > 1:
        table = torch.tensor(starts, dtype=torch.int64, device="cpu", pin_memory=out.is_cuda)
        table = table.to(out.device, non_blocking=True)
    _sketch[len(starts),](
        table,
        row,
        address,
        size,
        times,
        span,
        out,
        TYPE=_TYPES[dtype],
        MANY=len(items) > 1,
        HISTOGRAM=histogram,
        WIDTH=out.shape[1],
        BLOCK=_BLOCK,
        SAMPLE=_SAMPLE,
        num_warps=8,
        enable_fp_fusion=True,
    )


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    """As `probe._sketch_rows.keys`, from float64."""
    bits = x.to(tl.int64, bitcast=True)
    return (bits ^ ((bits >> 63) | _TOP)).to(tl.uint64, bitcast=True)


@triton.jit(do_not_specialize=["row", "address", "size", "times", "span"])  # type: ignore[untyped-decorator]
def _sketch(  # type: ignore[no-untyped-def]
    table, row, address, size, times, span, out,
    TYPE: tl.constexpr, MANY: tl.constexpr, HISTOGRAM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,
):  # fmt: skip
    """One span of one tensor. With MANY the program's line of `table` says which; else it is the program's id."""
    start = tl.program_id(0).to(tl.int64) * span
    if MANY:
        line = table + tl.program_id(0).to(tl.int64) * 5
        row, address, size = tl.load(line), tl.load(line + 1), tl.load(line + 2)
        times, start = tl.load(line + 3), tl.load(line + 4)
    values = address.to(tl.pointer_type(TYPE))
    words = out + row * WIDTH
    floats = words.to(tl.pointer_type(tl.float64), bitcast=True)
    unsigned = words.to(tl.pointer_type(tl.uint64), bitcast=True)

    # All programs of a tensor see the same sample, and so agree on a shift that lies within its data.
    picks = tl.arange(0, SAMPLE).to(tl.int64) * tl.maximum(size // SAMPLE, 1)
    sample = tl.load(values + picks, mask=picks < size, other=0).to(tl.float64)
    usable = (tl.abs(sample) < float("inf")) & (picks < size)
    least = tl.min(tl.where(usable, sample, float("inf")))
    greatest = tl.max(tl.where(usable, sample, -float("inf")))
    shift = tl.where(least <= greatest, tl.minimum(tl.maximum(least, 0.0), greatest), 0.0)

    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    low = tl.full([BLOCK], float("inf"), tl.float64)
    high = tl.full([BLOCK], -float("inf"), tl.float64)
    zeros = tl.zeros([BLOCK], tl.int32)
    nan = tl.zeros([BLOCK], tl.int32)
    posinf = tl.zeros([BLOCK], tl.int32)
    neginf = tl.zeros([BLOCK], tl.int32)
    bins = tl.zeros([_BINS], tl.int32)
    for at in range(start, tl.minimum(start + span, size), BLOCK):
        places = at + tl.arange(0, BLOCK)
        inside = places < size
        x = tl.load(values + places, mask=inside, other=0).to(tl.float64)
        finite = (tl.abs(x) < float("inf")) & inside
        d = tl.where(finite, x - shift, 0.0)
        total += d
        squares += d * d
        low = tl.minimum(low, tl.where(finite, x, float("inf")))
        high = tl.maximum(high, tl.where(finite, x, -float("inf")))
        zeros += ((x == 0) & inside).to(tl.int32)
        nan += (x != x).to(tl.int32)
        posinf += (x == float("inf")).to(tl.int32)
        neginf += (x == -float("inf")).to(tl.int32)
        if HISTOGRAM:
            narrow = tl.minimum(tl.maximum(x, -_LIMIT), _LIMIT).to(tl.float32)
            index = (narrow.to(tl.uint32, bitcast=True) >> _DROP).to(tl.int32)
            index = tl.where(x == 0, 0, index)
            bins += tl.histogram(tl.where(finite, index, _INFINITE), _BINS)

    weight = times.to(tl.float64)
    if start == 0:
        tl.store(words + _COUNT, size.to(tl.int64) * times)
        tl.store(floats + _SHIFT, shift)
    tl.atomic_add(words + _ZEROS, tl.sum(zeros).to(tl.int64) * times, sem="relaxed")
    tl.atomic_add(words + _NAN, tl.sum(nan).to(tl.int64) * times, sem="relaxed")
    tl.atomic_add(words + _POSINF, tl.sum(posinf).to(tl.int64) * times, sem="relaxed")
    tl.atomic_add(words + _NEGINF, tl.sum(neginf).to(tl.int64) * times, sem="relaxed")
    tl.atomic_max(unsigned + _MAX, _key(tl.max(high)), sem="relaxed")
    tl.atomic_max(unsigned + _MIN, _key(-tl.min(low)), sem="relaxed")
    tl.atomic_add(floats + _SUM, tl.sum(total) * weight, sem="relaxed")
    tl.atomic_add(floats + _SQUARES, tl.sum(squares) * weight, sem="relaxed")
    if HISTOGRAM:
        bin = tl.arange(0, _BINS)
        filled = (bins > 0) & (bin % (_BINS // 2) < _INFINITE)
        tl.atomic_add(words + _HEAD + bin, bins.to(tl.int64) * times, mask=filled, sem="relaxed")
