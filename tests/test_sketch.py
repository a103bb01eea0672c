"""Sketches: they say what NumPy says, they add, they take any tensor, and nothing in them waits for a device."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from probe import _sketch_rows as layout
from probe import sketch
from probe.sketch import Sketch

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
EXACT = [dtype for dtype in (*FLOATS, *FLOAT8, *SIGNED, *UNSIGNED) if dtype.itemsize < 4 or dtype is torch.float32]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
ROOT = Path(__file__).resolve().parent.parent


def given_values(test: Callable[..., None]) -> Callable[..., None]:
    return settings(deadline=None, max_examples=60)(given(x=tensors())(test))


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype] = [*FLOATS, *FLOAT8, *SIGNED, *UNSIGNED]) -> Tensor:  # noqa: B006
    """Tensors of 0 to 40 elements: integers, data at many scales and offsets, with NaN, Inf and zeros among them."""
    dtype = draw(st.sampled_from(dtypes))
    size = draw(st.integers(0, 40))
    if not dtype.is_floating_point:
        low, high = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        numbers = draw(st.lists(st.integers(low, high) | st.integers(0, min(high, 3)), min_size=size, max_size=size))
        return torch.tensor(numbers, dtype=dtype)
    scale, offset = (
        draw(st.sampled_from([0.0, 1e-42, 1e-30, 1e-3, 1.0, 1e4])),
        draw(st.sampled_from([0.0, 0.0, 1.0, -1e4])),
    )
    noise = draw(st.lists(st.floats(-4, 4, width=32), min_size=size, max_size=size))
    extremes = [math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, -3e38, 6.0]
    if dtype is torch.float64:
        extremes += [1e60, -1e60, 1e-60, -1e-60]
    special = draw(st.lists(st.sampled_from([None, None, *extremes]), min_size=size, max_size=size))
    numbers = [scale * n + offset if s is None else s for n, s in zip(noise, special, strict=True)]
    return torch.tensor(numbers, dtype=torch.float64).to(dtype)


def numpy(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def made(tensor: Tensor, **options: Any) -> Sketch:
    found = sketch.of(tensor, **options)
    assert found is not None
    return found


def plainly(x: Tensor, histogram: bool = True) -> Sketch:
    """By plain operators, as on a device without Triton and in traced code."""
    flat = layout.flatten(x)
    assert flat is not None
    return Sketch(layout.measure_plain(flat, histogram))


def near(got: float, want: float, scale: float, tolerance: float = 1e-9) -> bool:
    return got == want or (math.isnan(got) and math.isnan(want)) or abs(got - want) <= tolerance * scale


def assert_says(s: Sketch, x: np.ndarray, tolerance: float = 1e-9) -> None:
    """That `s` has the numbers NumPy has for float64 `x`."""
    finite = x[np.isfinite(x)]
    counts = (s.count, s.zeros, s.nan, s.posinf, s.neginf, s.finite)
    assert counts == (x.size, (x == 0).sum(), np.isnan(x).sum(), (x == np.inf).sum(), (x == -np.inf).sum(), finite.size)
    size = np.abs(finite).max(initial=0)
    assert near(s.sum, finite.sum(), finite.size * size, tolerance)
    assert near(s.norm, np.sqrt((finite**2).sum()), math.sqrt(finite.size) * size, tolerance)
    assert near(s.sum_squares, (finite**2).sum(), finite.size * size**2, tolerance)
    if not finite.size:
        assert all(math.isnan(each) for each in (s.mean, s.std, s.rms, s.min, s.max))
        return
    assert (s.min, s.max) == (finite.min(), finite.max())
    assert near(s.mean, finite.mean(), size, tolerance)
    assert near(s.rms, np.sqrt((finite**2).mean()), size, tolerance)
    assert near(s.std, finite.std(), finite.std() + 1e-9 * size, max(tolerance, 1e-6))


# Numbers


@given_values
def test_numbers_equal_numpys(x: Tensor) -> None:
    """Every number of a sketch equals NumPy's in float64, for every dtype."""
    assert_says(made(x), numpy(x))


@given_values
def test_every_way_makes_the_same_row(x: Tensor) -> None:
    """Alone, among many, in chunks, by plain operators: counts, extremes and bins are equal bit by bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_CHUNK", 7)
        patch.setattr(layout, "SMALL", 5)
        chunked = made(x)
        among = sketch.of_many([torch.ones(3, dtype=torch.float32).to(x.dtype), x[:3], x, x[:5]])[2]
        patch.setattr(layout, "_LARGE", 9)
        plain = plainly(x)
    glued = sketch.of_many([torch.ones(3, dtype=torch.float32).to(x.dtype), x])[1]
    for other in (chunked, among, plain, glued):
        assert_says(other, numpy(x))
        assert torch.equal(other.row[: layout.MAX], made(x).row[: layout.MAX])
        assert torch.equal(other.row[sketch.HEAD :], made(x).row[sketch.HEAD :])


@given_values
def test_without_histogram_the_numbers_are_the_same(x: Tensor) -> None:
    """``histogram=False`` changes no number, and what needs the histogram says so."""
    for bare in (
        made(x, histogram=False),
        *sketch.of_many([x, x], histogram=False),
        plainly(x, histogram=False),
    ):
        assert_says(bare, numpy(x))
        assert bare.row.shape == (sketch.HEAD,)
        with pytest.raises(ValueError, match="histogram=False"):
            bare.quantile(0.5)
        with pytest.raises(ValueError, match=r"sketch.of\(tensor\)"):
            bare.buckets()


@pytest.mark.parametrize("make", [made, plainly, lambda x: sketch.of_many([x, x])[0]])
@pytest.mark.parametrize("size", [100, 5000, 70000])
def test_an_offset_takes_no_digits(make: Callable[[Tensor], Sketch], size: int) -> None:
    """Of mean 1e4 and standard deviation 1e-2 the latter is right to 1e-6, also after adding parts of it."""
    x = 1e4 + 1e-2 * torch.randn(size, dtype=torch.float64)
    assert make(x).std == pytest.approx(numpy(x).std(), rel=1e-6)
    narrow = x.float()
    assert make(narrow).std == pytest.approx(numpy(narrow).std(), rel=1e-6)
    assert sum(make(part) for part in x.split(size // 7)).std == pytest.approx(numpy(x).std(), rel=1e-6)


def test_constants_have_no_spread() -> None:
    for value in (0.0, 1.0, 0.1, -3e38, 1e-45):
        assert made(torch.full((1000,), value)).std == 0


def test_a_tensor_larger_than_a_chunk() -> None:
    x = torch.randn(layout._CHUNK + 1000) * 3 + 1
    x[5], x[-5], x[-9:-6] = math.nan, math.inf, 0.0
    assert_says(made(x), numpy(x))


def test_float64_overflows_as_numpys_sums_do() -> None:
    s = made(torch.tensor([1e300, -1e300, 1e300], dtype=torch.float64))
    assert (s.finite, s.max, s.std, s.norm) == (3, 1e300, math.inf, math.inf)
    limits, counts = s.buckets()
    assert (limits[-1], counts[0], counts[-1]) == (1e300, 1, 2)
    parts = [made(torch.tensor([value], dtype=torch.float64)) for value in (1e300, -1e300, 1e-300)]
    assert (sum(parts).std, sum(parts).norm) == (math.inf, math.inf)


def test_zero_has_no_sign() -> None:
    for x in (torch.tensor([-0.0]), torch.zeros(3), torch.zeros(2, 2).to_sparse()):
        assert "min=0, max=0, zeros=" in repr(made(x))


# Addition


@settings(deadline=None, max_examples=60)
@given(x=tensors(), data=st.data())
def test_parts_add_up_to_the_whole(x: Tensor, data: st.DataObject) -> None:
    """Counts, extremes and histogram of a sum of parts are the whole's exactly, moments to 1e-6, in any grouping."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), min_size=2, max_size=2)))
    a, b, c = (made(part) for part in torch.tensor_split(x, cuts))
    whole = made(x)
    for total in (a + b + c, a + (b + c), c + a + b, sum([a, b, c])):
        assert_says(total, numpy(x), 1e-6)
        assert torch.equal(total.row[: layout.MAX], whole.row[: layout.MAX])
        assert torch.equal(total.row[sketch.HEAD :], whole.row[sketch.HEAD :])


def test_histograms_are_shared_between_dtypes() -> None:
    """Small whole numbers fall into the same bins whatever dtype holds them."""
    numbers = torch.tensor([0, 1, 2, 3, 5, 7, 100])
    rows = [made(numbers.to(dtype)).row for dtype in (*FLOATS, *SIGNED, torch.uint8, torch.uint16)]
    assert all(torch.equal(row, rows[0]) for row in rows)


def test_adding_to_a_sketch_without_a_histogram_leaves_none() -> None:
    total = made(torch.ones(3)) + made(torch.zeros(2), histogram=False)
    assert (total.count, total.mean, total.row.shape) == (5, 0.6, (sketch.HEAD,))


def test_many_terms_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms are folded together when there are many of them or when they cross to the host, all sums at once."""
    folds: list[Tensor] = []
    fold = layout.fold
    monkeypatch.setattr(sketch, "fold", lambda rows: (folds.append(rows), fold(rows))[1])
    xs = torch.randn(40, 7) + torch.arange(40)[:, None]
    total = sum(made(x) for x in xs)
    assert len(folds) == 2
    assert_says(total, numpy(xs).ravel())
    sums = [made(xs[i]) + made(xs[i + 1]) + made(xs[i + 2]) for i in range(10)]
    del folds[:]
    host = sketch.fetch(sums).result()
    assert len(folds) == 1
    for i in range(10):
        assert_says(host[i], numpy(xs[i : i + 3]).ravel())


def test_a_sum_leaves_its_terms_as_they_were() -> None:
    a, b = made(torch.ones(3)), made(torch.zeros(2))
    total = a + b
    assert (total.count, (total + a).count, a.count, b.count, total.count) == (5, 8, 3, 2, 5)


@settings(deadline=None, max_examples=40)
@given(xs=st.lists(tensors(), max_size=8), waiting=st.integers(1, 4), data=st.data())
def test_a_pool_makes_the_sketches_that_are_made_one_by_one(
    xs: list[Tensor], waiting: int, data: st.DataObject
) -> None:
    """In whatever order they are read, added and fetched, and however many wait together."""
    pool = sketch.Pool()
    pool.WAITING = waiting
    promised = [pool.of(x) for x in xs]
    for i in data.draw(st.permutations(range(len(xs)))):
        found, x = promised[i], xs[i]
        assert found is not None
        assert (found.device, found.binned) == (x.device, True)
        how = data.draw(st.sampled_from(["read", "add", "moments", "nothing", "fetch"]))
        if how == "add":
            total, both = found + made(x), made(torch.cat([x, x]))
            assert torch.equal(total.row[: layout.MAX], both.row[: layout.MAX])
            assert torch.equal(total.row[sketch.HEAD :], both.row[sketch.HEAD :])
        elif how == "moments":
            found = found.moments()
        elif how == "nothing":
            assert torch.equal((found + found.nothing()).row[sketch.HEAD :], made(x).row[sketch.HEAD :])
        elif how == "fetch":
            (found,) = sketch.fetch([found]).result()
        assert_says(found, numpy(x))


def test_a_pool_reads_small_tensors_together_and_lets_few_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones, and those without elements, are sketched at once; what cannot be sketched is nothing."""
    sizes: list[int] = []
    measure = layout.measure
    monkeypatch.setattr(sketch, "measure", lambda flats, bins: sizes.append(len(flats)) or measure(flats, bins))
    pool = sketch.Pool()
    some = [pool.of(torch.full((8,), float(i))) for i in range(pool.WAITING + 3)]
    assert sizes == [pool.WAITING]
    last = some[-1]
    assert last is not None
    assert last.mean == pool.WAITING + 2
    assert sizes == [pool.WAITING, 3]
    pool.of(torch.ones(layout.SMALL + 1))
    pool.of(torch.ones(0))
    assert pool.of(torch.ones(3, device="meta")) is None
    assert sizes == [pool.WAITING, 3, 1, 1]
    for _ in range(5):
        pool.of(torch.ones(layout.SMALL))
    assert sizes[4:] == [pool.ELEMENTS // layout.SMALL]


def test_a_pool_reads_what_a_tensor_held_when_it_came() -> None:
    """Whatever is written to it before the sketch is made, unless it was promised to stay."""
    pool, x = sketch.Pool(), torch.ones(2, 3)
    copied, promised = pool.of(x), pool.of(x, fixed=True)
    x.mul_(5)
    assert copied is not None
    assert promised is not None
    assert (copied.mean, promised.mean) == (1.0, 5.0)


def test_a_pool_without_histograms() -> None:
    """Its sketches are those of ``histogram=False``."""
    found = sketch.Pool(histogram=False).of(torch.tensor([3.0, 4.0]))
    assert found is not None
    assert (found.norm, found.binned, len((found + made(torch.ones(2))).row)) == (5.0, False, sketch.HEAD)


def test_a_pool_serves_several_threads() -> None:
    """Who reads makes the sketches of all; nobody meets one that is half made."""
    pool, wrong = sketch.Pool(), []

    def work(number: int) -> None:
        for i in range(150):
            found = pool.of(torch.full((3,), float(number * 1000 + i)))
            if i % (number + 2) == 0 and found is not None and found.mean != number * 1000 + i:
                wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_a_sketch_adds_to_sketches_only() -> None:
    with pytest.raises(TypeError):
        made(torch.ones(3)) + 1.0


# Quantiles and buckets


def width(x: float) -> float:
    """Width of the bin of `x`."""
    edges = layout.edges()
    i = int(np.clip(np.searchsorted(edges, np.float32(abs(x)), side="right") - 1, 0, len(edges) - 2))
    return float(edges[i + 1] - edges[i]) * (1 + 1e-6)


@given_values
def test_quantiles_are_right_to_a_bins_width(x: Tensor) -> None:
    """A quantile differs from NumPy's by at most the width of the bins of the order statistics it lies between."""
    finite = np.sort(numpy(x)[np.isfinite(numpy(x))])
    finite = finite[np.abs(finite) < 3e38]
    s = made(torch.from_numpy(finite))
    if not finite.size:
        assert math.isnan(s.quantile(0.5))
        return
    for q in (0, 0.01, 0.25, 0.5, 0.9, 1):
        rank = q * (finite.size - 1)
        bound = max(width(finite[math.floor(rank)]), width(finite[math.ceil(rank)]))
        assert abs(s.quantile(q) - np.quantile(finite, q)) <= bound
    assert (s.quantile(0), s.quantile(1)) == (finite[0], finite[-1])


def test_quantiles_find_zeros_exactly() -> None:
    x = torch.randn(1001).relu()
    assert (made(x).quantile(0.25), made(-x).quantile(0.75)) == (0, 0)
    assert made(torch.randn(100_000)).quantile(0.84134) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan, 99])
def test_quantile_of_what_is_no_share_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1.*quantile\(0.99\)"):
        made(torch.ones(3)).quantile(q)


@given_values
def test_buckets_hold_every_finite_value_once(x: Tensor) -> None:
    """Limits rise, counts add up to the finite values, the ends are the extremes, and no empty bucket is spare."""
    s, finite = made(x), numpy(x)[np.isfinite(numpy(x))]
    limits, counts = s.buckets()
    assert sum(counts) == finite.size
    assert all(a < b for a, b in itertools.pairwise(limits))
    assert all(a or b for a, b in itertools.pairwise(counts))
    if finite.size:
        assert counts[0]
        assert counts[-1]
        assert limits[0] >= finite.min()
        assert limits[-1] == finite.max()
    assert all(isinstance(each, float) for each in limits)
    assert all(isinstance(each, int) for each in counts)


@settings(deadline=None, max_examples=60)
@given(x=tensors(EXACT))
def test_bucket_limits_are_where_the_values_are(x: Tensor) -> None:
    """Up to each limit a histogram counts the values below it, and of those at it none or all."""
    finite = numpy(x)[np.isfinite(numpy(x))]
    limits, counts = made(x).buckets()
    for limit, below in zip(limits, np.cumsum(counts), strict=True):
        assert (finite < limit).sum() <= below <= (finite <= limit).sum()


def test_values_at_the_maximum_are_not_smeared() -> None:
    """What a clipped activation piles up at its limit stays there: the bucket before it ends just below."""
    limits, counts = made(torch.tensor([1.0, 5.5, 6.0, 6.0, 6.0])).buckets()
    assert (limits[-1], counts[-1], counts[-2]) == (6, 3, 1)
    assert limits[-2] == math.nextafter(6, 0)
    limits, counts = made(torch.tensor([-1.0, 0.0, 0.0])).buckets()
    assert (limits[-1], counts[-1], counts[-2]) == (0, 2, 0)


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([1e-9, 1e6, -1e-9, 0.0], dtype=torch.bfloat16),
        torch.tensor([math.nan, 1.0, math.inf, -math.inf, 2.0]),
        torch.randn(1000) * 1e-30,
        torch.tensor([3e38, 1e-45]),
        torch.tensor([[7, 7], [7, 8]]),
        torch.ones(5),
    ],
)
def test_tensorboard_reads_back_what_a_sketch_says(x: Tensor, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    s = made(x)
    limits, counts = s.buckets()
    with SummaryWriter(tmp_path) as writer:
        writer.add_histogram_raw("x", s.min, s.max, s.finite, s.sum, s.sum_squares, limits, counts, 3)
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Histograms("x")
    read = event.histogram_value
    finite = numpy(x)[np.isfinite(numpy(x))]
    assert (event.step, read.num, sum(read.bucket)) == (3, finite.size, finite.size)
    assert (read.min, read.max, read.bucket_limit[-1]) == (finite.min(), finite.max(), finite.max())
    assert read.sum == pytest.approx(finite.sum())
    assert (list(read.bucket_limit), list(read.bucket)) == (limits, counts)


# Every kind of tensor


class Named(Tensor):
    """A subclass without data of its own."""


class Loud(Tensor):
    """A subclass whose every function raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called on it")


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.arange(6.0).view(2, 3), torch.ones(1, 3)], layout=layout)


def coo(values: Tensor) -> Tensor:
    """``[5]`` uncoalesced: values 0 and 1 add up at index 2, value 2 is at index 4."""
    return torch.sparse_coo_tensor(torch.tensor([[2, 2, 4]]), values, (5,), check_invariants=True)


M = torch.tensor([[0.0, 1.5], [-2.0, 0.0]])
KINDS: dict[str, tuple[Callable[[], Tensor], list[float]]] = {
    "empty": (lambda: torch.empty(0, 3), []),
    "empty int": (lambda: torch.empty(0, dtype=torch.int64), []),
    "0-dim": (lambda: torch.tensor(2.5), [2.5]),
    "parameter": (lambda: nn.Parameter(M), [0, 1.5, -2, 0]),
    "requires grad, not a leaf": (lambda: nn.Parameter(M) * 2, [0, 3, -4, 0]),
    "transposed": (lambda: torch.arange(6.0).view(2, 3).t(), [0, 1, 2, 3, 4, 5]),
    "strided with holes": (lambda: torch.arange(10.0)[::3], [0, 3, 6, 9]),
    "flipped channels-last": (
        lambda: torch.arange(8.0).view(1, 2, 2, 2).to(memory_format=torch.channels_last),
        [*range(8)],
    ),
    "expanded": (lambda: torch.tensor([1.0, 0.0]).expand(3, 2), [1, 0] * 3),
    "expanded 0-dim": (lambda: torch.tensor(-1.0).expand(2, 3), [-1] * 6),
    "expanded to nothing": (lambda: torch.tensor(1.0).expand(0, 3), []),
    "NaN expanded": (lambda: torch.tensor([math.nan, math.inf]).expand(3, 2), [math.nan, math.inf] * 3),
    "coo": (lambda: M.to_sparse(), [0, 1.5, -2, 0]),
    "coo uncoalesced": (lambda: coo(torch.tensor([1.0, 2.0, -1.0])), [0, 0, 3, 0, -1]),
    "coo bool": (lambda: coo(torch.ones(3, dtype=torch.bool)), [0, 0, 1, 0, 1]),
    "coo float8": (lambda: coo(torch.ones(3).to(torch.float8_e5m2)), [0, 0, 2, 0, 1]),
    "coo complex": (lambda: coo(torch.tensor([3 + 0j, 4j, 1])), [0, 0, 5, 0, 1]),
    "coo hybrid": (lambda: torch.sparse_coo_tensor([[1]], [[3.0, 4.0]], (2, 2)), [0, 0, 3, 4]),
    "coo without values": (lambda: torch.sparse_coo_tensor(size=(2, 2)), [0, 0, 0, 0]),
    "csr": (lambda: M.to_sparse_csr(), [0, 1.5, -2, 0]),
    "csc": (lambda: M.to_sparse_csc(), [0, 1.5, -2, 0]),
    "bsr": (lambda: M.to_sparse_bsr((1, 1)), [0, 1.5, -2, 0]),
    "bsc": (lambda: M.to_sparse_bsc((2, 2)), [0, 1.5, -2, 0]),
    "mkldnn": (lambda: M.to_mkldnn(), [0, 1.5, -2, 0]),
    "nested": (lambda: nested(torch.strided), [0, 1, 2, 3, 4, 5, 1, 1, 1]),
    "nested, a part": (lambda: nested(torch.strided).chunk(3, -1)[1], [1, 4, 1]),
    "jagged": (lambda: nested(torch.jagged), [0, 1, 2, 3, 4, 5, 1, 1, 1]),
    "jagged with holes": (
        lambda: torch.nested.narrow(M, 1, torch.tensor([1, 0]), torch.tensor([1, 1]), layout=torch.jagged),
        [1.5, -2],
    ),
    "complex": (
        lambda: torch.tensor([3 + 4j, 0, complex(math.nan, 1), complex(1, -math.inf)]),
        [5, 0, math.nan, math.inf],
    ),
    "complex, large": (
        lambda: torch.tensor([3e38 + 3e38j]),
        [math.hypot(float(np.float32(3e38)), float(np.float32(3e38)))],
    ),
    "complex half": (lambda: torch.tensor([3e4 + 4e4j]).to(torch.complex32), [float(np.hypot(30000.0, 40000.0))]),
    "conjugate": (lambda: torch.tensor([3 + 4j]).conj(), [5]),
    "negative bit": (lambda: torch.tensor([3 + 4j]).conj().imag, [-4]),
    "quantized": (lambda: torch.quantize_per_tensor(M, 0.5, 1, torch.qint8), [0, 1.5, -2, 0]),
    "quantized by channel": (
        lambda: torch.quantize_per_channel(M, torch.tensor([0.5, 1.0]), torch.zeros(2), 0, torch.quint8),
        [0, 1.5, 0, 0],
    ),
    "subclass": (lambda: M.as_subclass(Named), [0, 1.5, -2, 0]),
    "subclass whose functions raise": (lambda: M.as_subclass(Loud), [0, 1.5, -2, 0]),
    "beyond 2**53": (lambda: torch.tensor([2**53 + 1, -(2**63), 2**63 - 1]), [2.0**53, -(2.0**63), 2.0**63]),
    "e8m0": (lambda: torch.tensor([1.0, 2.0**-127]).to(torch.float8_e8m0fnu), [1, 2.0**-127]),
    "copy on write": (lambda: torch._lazy_clone(M), [0, 1.5, -2, 0]),
    "read-only": (lambda: torch.frombuffer(bytearray(8), dtype=torch.float32), [0, 0]),
    "of vmap": (lambda: inside(lambda f: torch.vmap(f)(M)), [0, 1.5, -2, 0]),
    "of grad": (lambda: inside(lambda f: torch.func.grad(lambda x: f(x).sum())(M)), [0, 1.5, -2, 0]),
}


def inside(transform: Callable[[Callable[[Tensor], Tensor]], Any]) -> Tensor:
    """What a function under a functorch transform is given."""
    seen: list[Tensor] = []
    transform(lambda x: (seen.append(x), x)[1])
    return seen[0]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: prototypes of nested and sparse tensors, quantization
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_tensor(kind: str) -> None:
    """Nothing raises, alone, among others or by plain operators, and the numbers are those of the dense values."""
    make, values = KINDS[kind]
    x = make()
    version = None if type(x) is Loud else x._version
    for s in (
        sketch.of(x),
        sketch.of_many([x, torch.ones(1)])[0],
        plainly(x),
        sketch.of(x, histogram=False),
    ):
        assert s is not None
        assert_says(s, np.array(values, dtype=np.float64))
    assert version is None or x._version == version


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_to_say() -> None:
    """None for what holds no numbers, without an error and without touching it."""
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    with FakeTensorMode():
        fake = torch.ones(3)
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    silent = [
        torch.empty(3, device="meta"),
        nn.Parameter(torch.empty(3, device="meta")),
        fake,
        freed,
        nn.LazyLinear(3).weight,
        torch.empty(3, dtype=torch.bits8),
        torch.empty(3, dtype=torch.uint4),
        two_tensor.TwoTensor(torch.ones(3), torch.ones(3)),
    ]
    assert [sketch.of(x) for x in silent] == [None] * len(silent)
    assert sketch.of_many(silent) == [None] * len(silent)


@pytest.mark.parametrize("value", [None, 1.0, [1.0], np.ones(3), nn.Linear(1, 1)])
def test_what_is_no_tensor_is_refused(value: Any) -> None:
    for function in (sketch.of, lambda x: sketch.of_many([x])):
        with pytest.raises(TypeError, match=f"torch.Tensor, not of {type(value).__name__}"):
            function(value)


@pytest.fixture
def ranks() -> Iterator[None]:
    """A process group of two ranks in which collectives do nothing."""
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("ranks")
@pytest.mark.filterwarnings("ignore")
def test_distributed_tensors() -> None:
    """A DTensor counts by its local shard, a tensor whose collective is under way by its result."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    shard = DTensor.from_local(M, init_device_mesh("cpu", (2,)), [Shard(0)], run_check=False)
    assert made(shard).count == 4
    assert made(nn.Parameter(shard)).max == 1.5
    assert made(AsyncCollectiveTensor(M)).min == -2


def test_a_jagged_tensor_without_holes_is_read_whole() -> None:
    assert_says(made(nested(torch.jagged).transpose(1, 2)), np.array([0, 1, 2, 3, 4, 5, 1, 1, 1.0]))


# What it leaves alone


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
    ],
)
def test_it_works_under_any_mode(context: Callable[[], Any]) -> None:
    """The numbers are the same, and a sketch made inside can be used, added and pickled outside."""
    x = torch.randn(200) * 3 + 1e3
    with context():
        s = made(x) + made(x)
        many = sketch.of_many([x, x])
        plain = plainly(x)
    both = np.concatenate([numpy(x)] * 2)
    assert_says(pickle.loads(pickle.dumps(s)), both)
    assert_says(many[0] + plain, both)


def test_no_mode_sees_it() -> None:
    """Not a mode that watches operators, nor one that turns tensors into fakes."""
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(10)
    with Watch():
        watched = made(x)
    with FakeTensorMode():
        (faked,) = sketch.of_many([x])
    assert seen == []
    for s in (watched, faked):
        assert s is not None
        assert_says(s, numpy(x))


def test_an_inference_tensor_is_like_any_other() -> None:
    with torch.inference_mode():
        x = torch.randn(10)
    assert_says(made(x) + made(x), np.concatenate([numpy(x)] * 2))


def test_the_graph_is_not_touched() -> None:
    w = torch.randn(5, requires_grad=True)
    y = w * 2
    s = made(y)
    assert not s.row.requires_grad
    y.sum().backward()
    assert torch.equal(w.grad, torch.full((5,), 2.0))


@pytest.mark.parametrize("size", [10, 10_000])
def test_a_copy_on_write_tensor_stays_one(size: int) -> None:
    """Reading does not make it copy itself."""
    x = torch.randn(size)
    copy = torch._lazy_clone(x)
    for read in (sketch.of, plainly, lambda x: sketch.of_many([x, x])):
        read(copy)
        assert torch._C._is_cow_tensor(copy)


def test_the_values_are_not_written_to() -> None:
    x = torch.randn(100, dtype=torch.float64) + 5
    before = x.clone()
    made(x), sketch.of_many([x, x]), plainly(x)
    assert torch.equal(x, before)


def test_deterministic_algorithms_are_no_obstacle() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.randn(100)
        assert_says(plainly(x), numpy(x))
        assert_says(made(x), numpy(x))
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_do_not_disturb_each_other() -> None:
    xs = [torch.randn(20_000) + i for i in range(4)]
    means: list[list[float]] = [[] for _ in xs]

    def work(i: int) -> None:
        means[i] += [made(xs[i]).mean for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [set(found) for found in means] == [{made(x).mean} for x in xs]


# No waiting for the device


class NoWaiting(TorchDispatchMode):
    """Fails on every operator that hands a value of a device, or a shape that depends on one, to the host."""

    WAITING = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "bincount",
        "unique",
        "masked_select",
        "equal",
        "histogram",
        "is_nonzero",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.WAITING), f"{name} waits for the device"
        assert name != "_to_copy" or "device" not in (kwargs or {}), "a copy to another device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_the_plain_form_asks_the_host_for_nothing(size: int) -> None:
    """No operator of it reads a value, and its shapes are known on a fake CUDA device, where no value is."""
    x = torch.randn(size)
    x[size // 2 :] = math.nan
    with NoWaiting():
        rows = [plainly(each).row for each in (x, x.expand(3, size), x.to(torch.complex64), x.bfloat16())]
        total = Sketch(rows[0]) + Sketch(rows[1])
        assert repr(total)
    assert_says(total, np.concatenate([numpy(x)] * 4))
    with FakeTensorMode():
        on_cuda = torch.empty(size, device="cuda")
        flats = [layout.Flat(on_cuda), layout.Flat(on_cuda, times=3), layout.Flat(on_cuda, zeros=5)]
        rows = [layout.measure_plain(flat, True) for flat in flats]
        assert layout.fold(torch.stack(rows)).shape == (sketch.ROW,)
        assert {row.device.type for row in rows} == {"cuda"}


def test_the_check_for_waiting_can_fail() -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="_local_scalar_dense waits"):
        torch.ones(3).sum().item()
    with FakeTensorMode(), pytest.raises(Exception, match="bincount"):
        torch.bincount(torch.ones(3, dtype=torch.int64, device="cuda"))


def test_a_row_can_be_recorded_inside_a_compiled_model() -> None:
    """``torch.compile`` takes it into one graph."""
    buffer = torch.zeros(2, sketch.ROW, dtype=torch.int64)

    def model(x: Tensor) -> Tensor:
        y = x.relu()
        buffer[1].copy_(made(y).row)
        return y * 2

    x = torch.randn(50)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()
    assert_says(Sketch(buffer[1].clone()), numpy(x.relu()))


# To the host


def test_what_is_on_the_host_goes_through_untouched() -> None:
    values = [made(torch.ones(3)), None, torch.ones(2), "x"]
    later = sketch.fetch(iter(values))
    assert later.done()
    assert all(a is b for a, b in zip(later.result(), values, strict=True))


def test_everything_crosses_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sketches and tensors of any dtype and shape cross in one copy and come out in order, as they were."""
    copies: list[Tensor] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: (copies.append(self), cpu(self))[1])
    monkeypatch.setattr(sketch, "_is_remote", lambda value: isinstance(value, Tensor))
    values = [
        torch.tensor(True),
        made(torch.arange(5.0)),
        torch.randn(3, 4).t(),
        None,
        torch.tensor(2.5, dtype=torch.float64),
        made(torch.ones(3), histogram=False),
        torch.randint(0, 9, (2, 3), dtype=torch.uint8),
        torch.randn(2, dtype=torch.complex128).conj(),
        torch.empty(0, 3),
        torch.randn(5, dtype=torch.bfloat16),
    ]
    result = sketch.fetch(values).result()
    assert len(copies) == 1
    for got, want in zip(result, values, strict=True):
        if isinstance(want, Sketch):
            assert torch.equal(got.row, want.row)
        elif want is None:
            assert got is None
        else:
            assert got is not want
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            assert torch.equal(got, want.resolve_conj())


def test_a_pickle_holds_one_sketch() -> None:
    """Not the rows that were made together with it."""
    many = sketch.of_many([torch.randn(5) for _ in range(50)])
    data = pickle.dumps(many[3])
    assert len(data) < 9 * sketch.ROW
    assert torch.equal(pickle.loads(data).row, many[3].row)


def test_repr_shows_numbers() -> None:
    s = made(torch.tensor([0.0, 1.0, math.nan]))
    assert repr(s) == "Sketch(count=3, mean=0.5, std=0.5, min=0, max=1, zeros=1, nan=1, posinf=0, neginf=0)"


# Over ranks


class Ranks:
    """``torch.distributed`` for threads: each is a rank, and its collective really adds up."""

    def __init__(self, size: int) -> None:
        self.size, self.local, self.barrier = size, threading.local(), threading.Barrier(size, timeout=20)
        self.sent: dict[int, Tensor] = {}
        self.collectives = 0

    def get_world_size(self, group: object) -> int:
        return self.size

    def get_rank(self, group: object) -> int:
        return self.local.rank

    def all_reduce(self, buffer: Tensor, group: object) -> None:
        self.sent[self.local.rank] = buffer.clone()
        self.barrier.wait()
        buffer.copy_(sum(self.sent.values()))
        self.collectives += self.local.rank == 0

    def run(self, work: Callable[[int], None]) -> None:
        def main(rank: int) -> None:
            self.local.rank = rank
            work(rank)

        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)


def test_one_all_reduce_merges_all_sketches_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks hold parts of two sites; each gets the same sketch of the whole, from a single collective."""
    ranks = Ranks(3)
    for name in ("get_world_size", "get_rank", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, getattr(ranks, name))
    sites = [
        [torch.randn(30) + 1e3 * rank for rank in range(3)],
        [torch.randn(7), torch.ones(0), torch.full((4,), math.nan)],
    ]
    results: dict[int, list[Sketch]] = {}
    ranks.run(lambda rank: results.update({rank: sketch.all_reduce([made(parts[rank]) for parts in sites])}))
    assert ranks.collectives == 1
    for rank in range(3):
        for site, parts in enumerate(sites):
            assert_says(results[rank][site], np.concatenate([numpy(part) for part in parts]))
            assert torch.equal(results[rank][site].row, results[0][site].row)
    assert sketch.all_reduce([]) == []


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_a_real_process_group_reduces_rows() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        (merged,) = sketch.all_reduce([made(M, histogram=False)])
    finally:
        torch.distributed.destroy_process_group()
    assert_says(merged, numpy(M))


# Triton


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # has to be set before Triton is first imported
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_the_kernel_by_tritons_interpreter")


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_kernel_by_tritons_interpreter() -> None:
    """The tests named ``test_interpreted...`` pass in a process in which Triton interprets kernels on the CPU."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "test_interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stdout:
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@interpreted
@pytest.mark.filterwarnings("ignore")  # NumPy does the arithmetic, NaN and Inf included
@settings(deadline=None, max_examples=25)
@given(xs=st.lists(tensors(), min_size=1, max_size=4), times=st.integers(1, 3), histogram=st.booleans())
def test_interpreted_kernel_fills_the_same_rows(xs: list[Tensor], times: int, histogram: bool) -> None:
    """One tensor or many: counts, extremes and bins equal the plain form's bit by bit, and the numbers NumPy's."""
    from probe import _sketch_triton as kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_BLOCK", 16)
        patch.setattr(kernel, "_PROGRAMS", 3)
        rows = kernel.rows(xs, [times] * len(xs), histogram)
    for row, x in zip(rows, xs, strict=True):
        assert_says(Sketch(row), np.repeat(numpy(x), times))
        plain = layout.measure_plain(layout.Flat(x, times), histogram)
        assert torch.equal(row[: layout.MAX], plain[: layout.MAX])
        assert torch.equal(row[sketch.HEAD :], plain[sketch.HEAD :])
        assert row.shape == plain.shape


@interpreted
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [50, 5000])
def test_interpreted_kernel_loses_no_digits_to_an_offset(size: int) -> None:
    from probe import _sketch_triton as kernel

    x = 1e4 + 1e-2 * torch.randn(size, dtype=torch.float64)
    x[0] = math.nan
    assert_says(Sketch(kernel.rows([x], [1], True)[0]), numpy(x))


@interpreted
@pytest.mark.filterwarnings("ignore")
def test_interpreted_kernel_reads_what_a_tensor_stands_for() -> None:
    """Float64 beyond float32 is binned, a negative bit is minded, and a copy-on-write tensor stays one."""
    from probe import _sketch_triton as kernel

    x = torch.tensor([1e60, -1e60, 1e-60, -1e-60, 0.0], dtype=torch.float64)
    row = kernel.rows([x], [1], True)[0]
    assert torch.equal(row[sketch.HEAD :], plainly(x).row[sketch.HEAD :])
    assert_says(Sketch(row), numpy(x))
    assert Sketch(kernel.rows([torch._neg_view(torch.tensor([1.0, 2.0]))], [1], True)[0]).sum == -3
    copy = torch._lazy_clone(torch.randn(100))
    kernel.rows([copy], [1], True)
    assert torch._C._is_cow_tensor(copy)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="Triton interprets")
@pytest.mark.parametrize("many", [True, False])
def test_the_kernel_compiles_for_a_gpu(many: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For an NVIDIA target, without one at hand; it counts in shared memory and adds to the row atomically."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from probe import _sketch_triton as kernel

    constants: dict[str, Any] = {"TYPE": tl.float32 if many else tl.bfloat16, "MANY": many, "HISTOGRAM": True}
    constants |= {"WIDTH": sketch.ROW, "BLOCK": kernel._BLOCK, "SAMPLE": kernel._SAMPLE}
    numbers = dict.fromkeys(("row", "address", "size", "times", "span"), "i64")
    signature = {"table": "*i64"} | numbers | {"out": "*i64"} | dict.fromkeys(constants, "constexpr")
    places = {(list(signature).index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel._sketch, signature=signature, constexprs=places)
    options = {"num_warps": 8, "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
    for operation in ("add.u64", "add.f64", "max.u64"):
        assert re.search(rf"(atom|red)\.global\S*\.{operation}", ptx)
    assert re.search(r"(atom|red)\S*\.shared\S*\.add\.u32", ptx)


@needs_triton
def test_a_broken_triton_is_one_warning_and_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    from probe import _sketch_triton

    def broken(*args: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(_sketch_triton, "rows", broken)
    layout._triton_works.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"RuntimeError: Failed to find C compiler.*gcc"):
            assert not layout._triton_works(torch.device("cpu"))
        assert not layout._triton_works(torch.device("cpu"))
    finally:
        layout._triton_works.cache_clear()


def test_without_triton_there_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    layout._triton_works.cache_clear()
    assert not layout._triton_works(torch.device("cpu"))
    layout._triton_works.cache_clear()


# On a GPU, where there is one


@needs_cuda
@settings(deadline=None, max_examples=40)
@given(x=tensors())
def test_on_cuda_the_numbers_are_the_same(x: Tensor) -> None:
    y = x.cuda()
    for s in (made(y), *sketch.of_many([y, y]), plainly(y)):
        assert_says(s, numpy(x))


@needs_cuda
def test_on_cuda_nothing_waits() -> None:
    x = torch.randn(100_000, device="cuda")
    kinds = [x, x.half(), x[::3], x.expand(2, -1), x.to(torch.complex64), x.view(100, 1000).to_sparse_csr()]
    sketch.of_many([*kinds, *kinds])
    sketch.fetch([sketch.of(x)]).result()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [sketch.of(x) for x in kinds]
        later = sketch.fetch([*found, *sketch.of_many([*kinds, *kinds]), found[0] + found[1]])
        later.done()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host = later.result()
    assert later.done()
    assert_says(host[0], numpy(x.cpu()))
    assert all(s.row.device.type == "cpu" for s in host)


@needs_cuda
def test_on_cuda_a_graph_can_be_captured() -> None:
    x = torch.randn(1000, device="cuda")
    sketch.of_many([x, x])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sketch.of_many([x, x * 2])
    x.fill_(3)
    graph.replay()
    assert [s.mean for s in found] == [3, 6]


def test_opencv_converts_to_float64_as_it_sums() -> None:
    """A new one that does not is left alone, and this says so."""
    pytest.importorskip("cv2")
    assert layout._opencv() is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 20_000, 700_001])
def test_a_sketch_without_opencv_says_the_same(dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV may be missing, or not be importable where there is no libGL."""
    x = (torch.randn(size, generator=torch.Generator().manual_seed(5)) * 1e4).to(dtype)
    x[1] = math.nan
    with_it = sketch.of(x)
    monkeypatch.setattr(layout, "_opencv", lambda: None)
    without = sketch.of(x)
    assert torch.equal(with_it.row[: layout.SUM], without.row[: layout.SUM])
    assert torch.equal(with_it.row[layout.HEAD :], without.row[layout.HEAD :])
    assert with_it.sum == pytest.approx(without.sum, rel=1e-9)
    assert with_it.sum_squares == pytest.approx(without.sum_squares, rel=1e-13)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists the threads of a process there")
def test_a_sketch_on_the_cpu_uses_one_thread() -> None:
    """Threads would wait for each other in every small operation, and for long where another core is busy."""
    code = """if True:
        import os
        import numpy as np
        import torch
        from probe import image, sketch

        torch.set_num_threads(2)
        image.opencv()  # its BLAS has a pool of its own
        threads = lambda: len(os.listdir("/proc/self/task"))
        x = np.maximum(np.arange(-300_000.0, 300_000.0), 0)
        wide, narrow = torch.from_numpy(x), torch.from_numpy(x.astype(np.float32))
        half = torch.from_numpy(x.astype(np.float16))
        before = threads()
        for each in (wide, narrow, half):
            sketch.of(each)
        sketch.of_many(each[i : i + 9000] for each in (wide, narrow) for i in range(0, 90000, 9000))
        pool = sketch.Pool()
        sketches = [pool.of(narrow[i : i + 9000]) for i in range(0, 90000, 9000)]
        pool.settle()
        after = threads()
        narrow.sum()
        print(before, after, threads())
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    before, after, several = map(int, result.stdout.split())
    assert before == after < several


@needs_cuda
def test_on_cuda_a_pool_knows_streams() -> None:
    """What another stream made is sketched there at once; what the default one made may be read on another."""
    pool, side = sketch.Pool(), torch.cuda.Stream()
    first = pool.of(torch.full((5,), 2.0, device="cuda"))
    with torch.cuda.stream(side):
        second = pool.of(torch.full((5,), 3.0, device="cuda"))
        assert first is not None
        assert first.mean == 2.0
    assert second is not None
    assert second.mean == 3.0
