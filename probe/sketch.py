"""One tensor -> one fixed-size sketch on the tensor's own device: counts, moments and a histogram that add.

    s = sketch.of(x)                    # on a GPU: one kernel, nothing is waited for
    s.mean, s.std, s.max, s.nan         # on the host: waits for the device, once
    s.quantile(0.99), s.buckets()       # within a bin's width; as TensorBoard wants them
    s + sketch.of(y)                    # the sketch of x and y together

    rows = sketch.of_many(parameters)   # many tensors in few launches
    s = pool.of(x)                      # sketch.Pool: in few launches too, of tensors that come one by one
    later = sketch.fetch(rows)          # one copy per device, asynchronous on CUDA
    later.done(), later.result()        # poll; or wait, in a background thread

**The row.** A sketch is one int64 tensor of `ROW` elements: ten header words and the histogram. Header words 0-4 are
counts (elements, zeros, NaN, +Inf, -Inf); 5 and 6 are the maximum and the negated minimum as *order-preserving
unsigned keys*, so that both merge by an unsigned maximum and an untouched word (zero) is their neutral element; 7-9 are
the bits of three float64 numbers: a shift ``k``, ``sum(x - k)`` and ``sum((x - k)**2)``. The shift is the number
nearest to 0 between the least and the greatest value of (a part of) the data: sums about it lose no digits to an offset
(Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983). Rows with different shifts are brought to
a common one when they are added.

**The histogram.** An element's bin is the top bits of its float32 value: sign, 8 exponent bits, `MANTISSA` mantissa
bits. The bins depend on no data, so no range has to be known first, every dtype shares them and histograms add.
Elements of other dtypes are counted in the bin of their nearest float32 (finite float64 beyond its range in the last
finite bin); moments, minimum and maximum use the exact value in float64. Memory and resolution per choice of
`MANTISSA`, for an int64 count a bin:

    ========  ====  ===========  ==========================
    MANTISSA  bins  bytes a row  a bin's width / lower edge
    ========  ====  ===========  ==========================
    0          512         4176  100 %
    1         1024         8272  33 to 50 %
    2         2048        16464  14 to 25 %
    3         4096        32848  7 to 13 %
    ========  ====  ===========  ==========================

**Over ranks.** Everything merges by a sum but the two keys and the shifted moments. `all_reduce` therefore sums one
buffer in which the histograms lie as they are and each rank's headers lie in a slot of that rank's own, zero elsewhere:
one collective of integers, after which every rank folds the same headers in the same order.
"""

from __future__ import annotations

import contextlib
import math
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probe import _sketch_rows as layout
from probe._sketch_rows import BINS, HEAD, MANTISSA, ROW, Array, Flat, flatten, fold, measure, unkeys, unseen

__all__ = [
    "BINS",
    "HEAD",
    "MANTISSA",
    "NUMBERS",
    "ROW",
    "Buckets",
    "Fetch",
    "Pool",
    "Sketch",
    "all_reduce",
    "buckets",
    "fetch",
    "of",
    "of_many",
    "square_sums",
]


NUMBERS = ("mean", "std", "min", "max", "norm", "rms", "sum", "count", "zeros", "nan", "inf")
"""What `Sketch.numbers` knows."""


class Buckets(NamedTuple):
    """A histogram as TensorBoard's ``HistogramProto`` holds it.

    `limits` are the right edges, strictly increasing, the last one the maximum (the first bucket begins at the
    minimum); `counts` are as many integers whose sum is the number of finite values. Both are empty when there is none.
    """

    limits: list[float]
    counts: list[int]


@cache
def _edges() -> tuple[Array, Array]:
    """The left and the right edge of each bin, in the order of the row; NaN for those that stay empty."""
    edges = layout.edges()
    found = np.full((2, BINS), math.nan)
    for i in (0, 1):
        positive = edges[layout.INFINITE + i :][: layout.INFINITE]
        found[i, : layout.INFINITE] = positive
        found[i, layout.NEGATIVE : layout.LOWEST + 1] = -edges[layout.INFINITE + 1 - i :][: layout.INFINITE]
    return found[0], found[1]


class _Reading(NamedTuple):
    """The header of a row: counts, the extremes, and the shift with the sums about it."""

    size: int
    zeros: int
    nan: int
    posinf: int
    neginf: int
    finite: int
    high: float
    low: float
    shift: float
    total: float
    squares: float


class Sketch:
    """Counts, moments and a histogram of one tensor, or of several after ``a + b``.

    Reading any number waits for the row to be computed if it is still on a device; `fetch` brings many to the host in
    one copy first. ``a + b`` stays on the device of `a`, waits for nothing and costs next to nothing: terms are kept
    and folded together, at the latest when there are `TERMS` of them. ``sum(sketches)`` works as well.

    Arguments:
        row: int64 ``[ROW]``, or ``[HEAD]`` without a histogram: a sketch's `row`, or a copy of one.
    """

    TERMS = 16

    def __init__(self, row: Tensor) -> None:
        self._terms: list[Tensor | _Promise] = [row]

    @property
    def row(self) -> Tensor:
        """int64 ``[ROW]``, or ``[HEAD]`` without a histogram, on the sketch's device: see the module's docstring."""
        row = self._terms[0]
        if len(self._terms) == 1 and isinstance(row, Tensor):
            return row
        _settle([self])
        return self._rows()[0]

    def _rows(self) -> list[Tensor]:
        """The terms, the promised ones too."""
        return [term.row() if isinstance(term, _Promise) else term for term in self._terms]

    @property
    def device(self) -> torch.device:
        """Where the row is, or will be."""
        return self._terms[0].device

    @property
    def binned(self) -> bool:
        """Whether it has a histogram."""
        return all(len(term) == ROW for term in self._terms)

    @property
    def ready(self) -> bool:
        """Whether its numbers can be read without waiting for a device, or for others of its pool."""
        return all(isinstance(term, Tensor) and term.is_cpu for term in self._terms)

    def moments(self) -> Sketch:
        """The same without the histogram."""
        return self._with([_Head(term) if isinstance(term, _Promise) else term[:HEAD] for term in self._terms])

    def nothing(self) -> Sketch:
        """The sketch of no element, there and of that size: what changes nothing when it is added."""
        return Sketch(torch.zeros(min(map(len, self._terms)), dtype=torch.int64, device=self.device))

    @cached_property
    def _words(self) -> Array:
        return self.row.cpu().numpy()

    @cached_property
    def _read(self) -> _Reading:
        size, zeros, nan, posinf, neginf, high, low, *rest = self._words[:HEAD].tolist()
        high, low, *sums = struct.unpack("5d", struct.pack("5q", unkeys(high), unkeys(low), *rest))
        finite = size - nan - posinf - neginf
        return _Reading(size, zeros, nan, posinf, neginf, finite, high + 0.0, 0.0 - low, *sums)  # never -0.0

    @property
    def count(self) -> int:
        """Number of elements, NaN and Inf included."""
        return self._read.size

    @property
    def zeros(self) -> int:
        """Number of elements that are exactly 0 or -0."""
        return self._read.zeros

    @property
    def nan(self) -> int:
        """Number of NaN."""
        return self._read.nan

    @property
    def posinf(self) -> int:
        """Number of +Inf."""
        return self._read.posinf

    @property
    def neginf(self) -> int:
        """Number of -Inf."""
        return self._read.neginf

    @property
    def finite(self) -> int:
        """Number of elements that are neither NaN nor Inf: those that the moments and the histogram are about."""
        return self._read.finite

    @property
    def sum(self) -> float:
        """Sum of the finite values; 0 when there is none."""
        read = self._read
        return read.total + read.finite * read.shift

    @property
    def sum_squares(self) -> float:
        """Sum of the squares of the finite values; 0 when there is none."""
        read = self._read
        return max(0.0, read.squares + read.shift * (2 * read.total + read.finite * read.shift))

    @property
    def mean(self) -> float:
        """Mean of the finite values; NaN when there is none."""
        read = self._read
        return read.shift + read.total / read.finite if read.finite else math.nan

    @property
    def std(self) -> float:
        """Standard deviation of the finite values, the population's (over n, not n - 1); NaN when there is none."""
        read = self._read
        n = read.finite
        if not n or not math.isfinite(read.squares):
            return math.inf if n else math.nan
        return math.sqrt(max(0.0, read.squares / n - (read.total / n) * (read.total / n)))

    @property
    def rms(self) -> float:
        """Root of the mean square of the finite values; NaN when there is none."""
        return math.sqrt(self.sum_squares / self.finite) if self.finite else math.nan

    @property
    def norm(self) -> float:
        """Euclidean norm of the finite values; 0 when there is none."""
        return math.sqrt(self.sum_squares)

    @property
    def min(self) -> float:
        """The smallest finite value, exact (as a float64); NaN when there is none."""
        return self._read.low if self._read.finite else math.nan

    @property
    def max(self) -> float:
        """The largest finite value, exact (as a float64); NaN when there is none."""
        return self._read.high if self._read.finite else math.nan

    def numbers(self, names: Iterable[str]) -> list[float]:
        """Several of its numbers, as floats.

        Arguments:
            names: of `NUMBERS`: its properties, but zeros is a share (0 to 1, NaN for an empty tensor), and inf counts
                both infinities.
        """
        return [self._number(name) for name in names]

    def _number(self, name: str) -> float:
        if name == "zeros":
            return self.zeros / self.count if self.count else math.nan
        return float(self.posinf + self.neginf if name == "inf" else getattr(self, name))

    def _counts(self) -> Array:
        """The histogram as it lies in the row."""
        if len(self._words) == HEAD:
            raise ValueError(
                "This sketch has no histogram: it was made with histogram=False (or added to one that was). "
                "Make it with sketch.of(tensor) to read quantiles and buckets."
            )
        return self._words[HEAD:]

    def _bins(self) -> tuple[Array, Array, Array]:
        """Left edges, right edges and counts of the bins that are not empty, from the lowest to the highest."""
        bins = self._counts()
        (filled,) = bins.nonzero()
        positive = int(filled.searchsorted(layout.NEGATIVE))
        filled = np.concatenate([filled[positive:][::-1], filled[:positive]])
        left, right = _edges()
        return left[filled], right[filled], bins[filled]

    def quantile(self, q: float) -> float:
        """The q-quantile of the finite values, wrong by at most the width of the bins it falls into.

        As ``numpy.quantile``'s default it lies between the two order statistics next to rank ``q * (n - 1)``; each of
        these is read off its bin, in which values are taken to be evenly spread. The extremes are exact, and so is 0.

        Arguments:
            q: between 0 and 1.

        Returns:
            the quantile; NaN when there is no finite value.

        Raises:
            ValueError: `q` is not between 0 and 1, or the sketch was made with ``histogram=False``.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"quantile(q) takes q between 0 and 1, not {q!r}; the 99th percentile is quantile(0.99).")
        left, right, counts = self._bins()
        if not len(counts):
            return math.nan
        if self.zeros:
            at = int(np.searchsorted(left, 0.0))
            left, right = np.insert(left, at, 0.0), np.insert(right, at, 0.0)
            counts = np.insert(counts, at, self.zeros)
            counts[at + 1] -= self.zeros
        ends = np.cumsum(counts)
        last = int(ends[-1]) - 1

        def value(rank: int) -> float:
            if rank in (0, last):
                return self.min if rank == 0 else self.max
            i = int(np.searchsorted(ends, rank, side="right"))
            share = (rank - int(ends[i] - counts[i]) + 0.5) / int(counts[i])
            return float(np.clip(left[i] + share * (right[i] - left[i]), self.min, self.max))

        rank = q * last
        low, part = int(rank), rank - int(rank)
        return value(low) if not part else (1 - part) * value(low) + part * value(low + 1)

    def buckets(self) -> Buckets:
        """The histogram as TensorBoard wants it: see `Buckets`.

        A gap between filled bins is one empty bucket. Where values lie at the very maximum (a clipped activation),
        their bucket begins just below it, so that they are not smeared over the bin before.

        Returns:
            limits and counts; as many buckets as bins that hold values, and one for each gap between them.

        Raises:
            ValueError: the sketch was made with ``histogram=False``.
        """
        ((limits, counts),) = buckets([self])
        return Buckets(limits.tolist(), counts.tolist())

    def __add__(self, other: Sketch) -> Sketch:
        """The sketch of both tensors together: counts are exact, moments right to float64's rounding."""
        if not isinstance(other, Sketch):
            return NotImplemented
        total = self._with([*self._terms, *other._terms])
        width, device = min(map(len, total._terms)), self.device
        if any(len(term) > width or term.device != device for term in total._terms):
            total = self._with([_moved(row[:width], device) for row in total._rows()])
        if len(total._terms) >= self.TERMS:
            _settle([total])
        return total

    @staticmethod
    def _with(terms: Iterable[Tensor | _Promise]) -> Sketch:
        made = Sketch.__new__(Sketch)
        made._terms = list(terms)
        return made

    def __radd__(self, other: object) -> Sketch:
        return self if other == 0 else NotImplemented  # what sum() begins with

    def __reduce__(self) -> tuple[Any, ...]:
        return Sketch, (self.row.clone(),)  # the row may lie among others, all of which would be pickled

    def __repr__(self) -> str:
        if self.device.type != "cpu":
            return f"Sketch(on {self.device}; fetch it to read it)"
        fields = ("count", "mean", "std", "min", "max", "zeros", "nan", "posinf", "neginf")
        values = {name: getattr(self, name) for name in fields}
        return f"Sketch({', '.join(f'{k}={v:.6g}' if isinstance(v, float) else f'{k}={v}' for k, v in values.items())})"


def _settle(sketches: Iterable[Sketch]) -> None:
    """Fold the terms of each sketch into one row, of as many sketches as possible at once."""
    groups: dict[tuple[Any, ...], list[Sketch]] = {}
    for sketch in sketches:
        sketch._terms = [*sketch._rows()]
        if len(sketch._terms) > 1:
            key = sketch.device, len(sketch._terms), len(sketch._terms[0])
            groups.setdefault(key, []).append(sketch)
    for group in groups.values():
        rows = fold(torch.stack([torch.stack(terms) for terms in zip(*(s._rows() for s in group), strict=True)]))
        for sketch, row in zip(group, rows, strict=True):
            sketch._terms = [row]


def buckets(sketches: Sequence[Sketch]) -> list[tuple[Array, Array]]:
    """`Sketch.buckets` of many, in as few calls of NumPy as of one: limits (float64) and counts (int64) of each."""
    if not sketches:
        return []
    found = [each._bins() for each in sketches]
    left, limits, counts = (np.concatenate(each) for each in zip(*found, strict=True))
    which = np.repeat(np.arange(len(found)), [len(each[2]) for each in found])
    lows, highs = (np.array(ends)[which] for ends in zip(*((each.min, each.max) for each in sketches), strict=True))
    np.clip(limits, lows, highs, out=limits)
    last = np.append(which[1:] != which[:-1], True)[: len(which)]
    at_top = np.flatnonzero(last & (left >= highs))
    left[at_top] = np.nextafter(highs[at_top], -math.inf)
    before = at_top[at_top > 0] - 1
    before = before[~last[before]]
    limits[before] = np.minimum(limits[before], left[before + 1])
    limits[last] = highs[last]
    gap = (
        np.flatnonzero(~last[:-1] & (left[1:] > limits[:-1])) + 1
    )  # before these, an empty bucket up to their left edge
    after = np.zeros(len(left), np.int64)
    after[gap] = 1
    at = np.arange(len(left)) + after.cumsum()
    all_limits, all_counts = np.empty(len(left) + len(gap)), np.zeros(len(left) + len(gap), np.int64)
    all_limits[at], all_counts[at] = limits, counts
    all_limits[at[gap] - 1] = left[gap]
    ends = np.bincount(np.concatenate([which, which[gap]]), minlength=len(sketches)).cumsum().tolist()
    return [(all_limits[i:j], all_counts[i:j]) for i, j in zip([0, *ends], ends, strict=False)]


def of(tensor: Tensor, *, histogram: bool = True) -> Sketch | None:
    """The sketch of one tensor, on its own device.

    Never waits for the device, never touches the graph, is not seen by dispatch modes, raises for no tensor. Complex
    numbers count by their modulus, a sparse tensor as the dense one it stands for, a nested one by its values without
    padding, a quantized one dequantized, a DTensor by this rank's local shard. Two kinds do wait: a tensor on MPS,
    which has no float64, is read on the host, and of a jagged tensor with holes (``lengths``) the host asks where.

    In code that ``torch.compile`` traces it becomes plain operators of the graph, without a break: there
    ``buffer[i].copy_(sketch.of(x).row)`` records a value, and ``Sketch(buffer[i].clone())`` reads it later.

    Arguments:
        tensor: any shape, dtype, layout and device.
        histogram: False leaves the histogram out, which is most of the cost and nearly all of the memory; `quantile`
            and `buckets` then raise.

    Returns:
        the sketch, or None where there are no numbers to read: meta and fake tensors, parameters that are not yet
        initialised, storage that was freed (a resharded FSDP parameter), sub-byte dtypes that torch itself cannot
        convert, and wrapper subclasses that offer none of ``to_local``, ``wait``, ``dequantize``.

    Raises:
        TypeError: `tensor` is not a tensor.
    """
    with unseen():
        flat = flatten(tensor)
        return None if flat is None else Sketch(measure([flat], histogram)[0])


def of_many(tensors: Iterable[Tensor], *, histogram: bool = True) -> list[Sketch | None]:
    """The sketches of many tensors, each as `of` makes it, in few launches.

    On CUDA it is one launch per dtype and device; on the CPU small tensors are read together, which makes an MLP's
    hundreds of parameters several times as fast as one by one.

    Arguments:
        tensors: as for `of`, on any devices.
        histogram: as for `of`.

    Returns:
        one sketch or None for each tensor, in order.

    Raises:
        TypeError: one of `tensors` is not a tensor.
    """
    with unseen():
        flats = [flatten(tensor) for tensor in tensors]
        places: dict[torch.device, list[int]] = {}
        for i, flat in enumerate(flats):
            if flat is not None:
                places.setdefault(flat.values.device, []).append(i)
        sketches: list[Sketch | None] = [None] * len(flats)
        for indices in places.values():
            rows = measure([flat for i in indices if (flat := flats[i]) is not None], histogram)
            for i, row in zip(indices, rows, strict=True):
                sketches[i] = Sketch(row)
        return sketches


def square_sums(sketches: Sequence[Sketch]) -> Tensor:
    """For each sketch the sum of the squares of all elements, on their device, without waiting for it.

    Arguments:
        sketches: at least one; the result is where the first one is.

    Returns:
        float64 ``[n]``; NaN where an element is NaN or Inf.
    """
    rows = torch.cat(_brought([sketch.row[:HEAD] for sketch in sketches], sketches[0].device)).view(-1, HEAD)
    finite = rows[:, layout.COUNT] - rows[:, layout.NAN : layout.MAX].sum(1)
    shift, total, squares = rows[:, layout.SHIFT :].view(torch.float64).unbind(1)
    found = squares + shift * (2 * total + finite * shift)
    return torch.where(finite == rows[:, layout.COUNT], found.clamp(min=0.0), math.nan)


class Pool:
    """Sketches of small tensors that come one by one, made together: a fifth of the cost, where calls are what costs.

    Few tensors wait at a time (`WAITING`, of `ELEMENTS` elements together; larger ones are sketched at once), and none
    once a sketch of the pool is read, added to 15 others, fetched or merged. Any thread may use it.

    Arguments:
        histogram: as for `of`.
    """

    WAITING = 64
    ELEMENTS = layout.GLUED

    def __init__(self, *, histogram: bool = True) -> None:
        self._histogram = histogram
        self._lock = threading.RLock()
        self._waiting: list[tuple[_Promise, Flat]] = []
        self._elements = 0

    def of(self, tensor: Tensor, *, fixed: bool = False) -> Sketch | None:
        """As the function `of`. A small tensor is copied, to be read later, unless its values are `fixed`."""
        with unseen():
            flat = flatten(tensor)
            if flat is None:
                return None
            size = flat.values.numel()
            if not 0 < size <= layout.SMALL or not _may_wait(flat.values):
                return Sketch(measure([flat], self._histogram)[0])
            if not fixed:
                flat = flat._replace(values=flat.values.clone())
            with self._lock:
                if len(self._waiting) == self.WAITING or self._elements + size > self.ELEMENTS:
                    self.settle()
                promise = _Promise(self, flat.values.device, ROW if self._histogram else HEAD)
                self._waiting.append((promise, flat))
                self._elements += size
            return Sketch._with([promise])

    def settle(self) -> None:
        """Make the sketches that wait."""
        with self._lock, unseen():
            for device in {promise.device for promise, _ in self._waiting}:
                here = [each for each in self._waiting if each[0].device == device]
                with _as_launched(device):
                    rows = measure([flat for _, flat in here], self._histogram)
                for (promise, _), row in zip(here, rows, strict=True):
                    promise.made = row
            self._waiting, self._elements = [], 0


class _Promise:
    """The row that a pool will make."""

    __slots__ = ("_length", "_pool", "device", "made")

    def __init__(self, pool: Pool, device: torch.device, length: int) -> None:
        self._pool = pool
        self._length = length
        self.device = device
        self.made: Tensor | None = None

    def __len__(self) -> int:
        return self._length

    def row(self) -> Tensor:
        if self.made is None:
            self._pool.settle()
        assert self.made is not None
        return self.made


class _Head(_Promise):
    """The row without the histogram."""

    __slots__ = ("_whole",)

    def __init__(self, whole: _Promise) -> None:
        super().__init__(whole._pool, whole.device, HEAD)
        self._whole = whole

    def row(self) -> Tensor:
        return self._whole.row()[:HEAD]


def _may_wait(values: Tensor) -> bool:
    """Whether a kernel that is launched later still comes after what made the values, and before they are freed."""
    if values.is_cuda:
        return not torch._C._cuda_getCurrentRawStream(values.device.index)  # the default stream, to which we return
    return values.is_cpu


@contextlib.contextmanager
def _as_launched(device: torch.device) -> Iterator[None]:
    """On CUDA, launch on the default stream, and have the current one wait for it."""
    if device.type != "cuda" or not torch._C._cuda_getCurrentRawStream(device.index):
        yield
        return
    default = torch.cuda.default_stream(device)
    with torch.cuda.stream(default):
        yield
    torch.cuda.current_stream(device).wait_stream(default)


class Fetch:
    """Values on their way to the host; made by `fetch`."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._values = list(values)
        _settle(value for value in self._values if isinstance(value, Sketch))
        remote: dict[torch.device, dict[int, Tensor]] = {}
        for i, value in enumerate(self._values):
            tensor = value.row if isinstance(value, Sketch) else value
            if _is_remote(tensor):
                remote.setdefault(tensor.device, {})[i] = tensor
        self._copies = [_Copy(tensors) for tensors in remote.values()]

    def done(self) -> bool:
        """Whether `result` would return at once (known on CUDA; elsewhere it is `result` that copies)."""
        return all(copy.done() for copy in self._copies)

    def result(self) -> list[Any]:
        """The values on the host, in the order given; waits until they are there. Any thread may call it."""
        values = list(self._values)
        for copy in self._copies:
            for i, tensor in copy.result().items():
                values[i] = Sketch(tensor) if isinstance(values[i], Sketch) else tensor
        return values


def fetch(values: Iterable[Any]) -> Fetch:
    """Start to bring sketches, and tensors that belong with them, to the host: one copy per device for all of them.

    On CUDA the copy goes to pinned memory on a stream of its own, behind the work that is queued at the time of the
    call; the caller does not wait, and may overwrite the tensors at once.

    Arguments:
        values: sketches, and dense tensors of any shape and dtype (scalars, pictures). What is on the host already,
            and any other object (None), goes through untouched.

    Returns:
        a handle to poll with ``done()`` and to wait for with ``result()``, from any thread.
    """
    return Fetch(values)


def _is_remote(value: Any) -> bool:
    """Whether it is a dense tensor on a device."""
    plain = type(value) is Tensor and value.layout is torch.strided and not (value.is_nested or value.is_quantized)
    return plain and value.device.type not in ("cpu", "meta")


class _Copy:
    """Tensors of one device that cross to the host together, as bytes."""

    def __init__(self, tensors: dict[int, Tensor]) -> None:
        # The widest elements come first: each tensor then begins at a multiple of its element's size.
        order = sorted(tensors, key=lambda i: -tensors[i].element_size())
        self._parts = [(i, tensors[i].dtype, tensors[i].shape) for i in order]
        flat = [tensors[i].detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8) for i in order]
        self._sizes = [len(part) for part in flat]
        self._source = torch.cat(flat)
        self._target: Tensor | None = None
        device = self._source.device
        if device.type == "cuda":
            stream = _copy_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            self._target = torch.empty(self._source.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
            self._event = torch.cuda.Event()
            with torch.cuda.stream(stream):
                self._target.copy_(self._source, non_blocking=True)
                self._event.record(stream)

    def done(self) -> bool:
        return self._target is None or bool(self._event.query())

    def result(self) -> dict[int, Tensor]:
        if self._target is None:
            target = self._source.cpu()
        else:
            self._event.synchronize()
            target = self._target
        parts = zip(self._parts, torch.split(target, self._sizes), strict=True)
        return {i: data.view(dtype).view(shape) for (i, dtype, shape), data in parts}


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def all_reduce(sketches: Sequence[Sketch], group: Any = None) -> list[Sketch]:
    """The sketches of all ranks' tensors together, by one ``all_reduce`` for all of them; the host waits for nothing.

    Of activations and of shards this is the sketch of the whole; what every rank holds alike counts once per rank.

    Arguments:
        sketches: the same sites in the same order on every rank; the first one's device is one that `group` can reduce.
        group: a process group; None is the default one.

    Returns:
        the merged sketches, on that device, the same on every rank.
    """
    if not sketches:
        return []
    return all_reduce_with(sketches, column([], sketches[0].device), group)[0]


def all_reduce_with(sketches: Sequence[Sketch], numbers: Tensor, group: Any = None) -> tuple[list[Sketch], Tensor]:
    """`all_reduce`, with numbers to be summed in the same buffer.

    Arguments:
        sketches: as of `all_reduce`, on any devices, and perhaps none.
        numbers: float64 ``[n]``, as many on every rank, on a device that `group` can reduce. See `column`.
        group: a process group; None is the default one.

    Returns:
        the merged sketches and the sums, on the device of `numbers`. Every rank adds the numbers in the same order, so
        that all have the same sums.
    """
    import torch.distributed as dist

    _settle(sketches)
    rows = _brought([sketch.row for sketch in sketches], numbers.device)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]) == HEAD)  # those with a histogram first
    heads = [rows[i][:HEAD] for i in order]
    own = torch.cat([*heads, numbers.view(torch.int64)])
    slots = own.new_zeros(dist.get_world_size(group), len(own))
    slots[dist.get_rank(group)] = own
    buffer = torch.cat([slots.flatten(), *(rows[i][HEAD:] for i in order)])
    dist.all_reduce(buffer, group=group)
    slots, bins = buffer[: slots.numel()].view_as(slots), buffer[slots.numel() :].view(-1, BINS)
    words = HEAD * len(rows)
    sums = slots[:, words:].view(torch.float64).sum(0)
    folded = fold(slots[:, :words].reshape(len(slots), len(rows), HEAD))
    found = [*torch.cat([folded[: len(bins)], bins], 1), *folded[len(bins) :]]
    return [Sketch(row) for _, row in sorted(zip(order, found, strict=True), key=lambda each: each[0])], sums


def column(values: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers, and tensors of one element on any devices, as one float64 ``[n]`` on `device`; waits for no device."""
    kept = [torch.as_tensor(value).detach().reshape(1).double() for value in values]
    return torch.cat(_brought([torch.zeros(0, dtype=torch.float64), *kept], device))


def _brought(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """1-D tensors of one dtype on `device`, those of each other device by one copy that waits for nothing."""
    places: dict[torch.device, list[int]] = {}
    for i, part in enumerate(parts):
        places.setdefault(part.device, []).append(i)
    found = list(parts)
    for source, indices in places.items():
        if source != device:
            flat = torch.cat([parts[i] for i in indices])
            moved = _moved(flat, device).split([len(parts[i]) for i in indices])
            for i, part in zip(indices, moved, strict=True):
                found[i] = part
    return found


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; waits only for what comes to the host, where it might else be read too early."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from pageable memory the copy would wait for the stream
    return tensor.to(device, non_blocking=device.type != "cpu")
