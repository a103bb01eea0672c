"""The cache of a step: one sketch a tensor, whoever asks, and never a stale one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probe import Board, Capture, Kind, ParameterKind, Probe, health, histogram, sketch, stats, summary
from probe.cache import FLOWING, StepCache

PLACE: Any = (lambda: None, Kind.GRAD_OUTPUT)


class Counter:
    """The sizes of the tensors that were sketched, with and without a histogram."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: dict[bool, list[int]] = {True: [], False: []}
        measure = sketch.measure

        def counted(flats: Any, binned: bool) -> list[Tensor]:
            self.sizes[binned] += [flat.values.numel() for flat in flats]
            return measure(flats, binned)

        monkeypatch.setattr(sketch, "measure", counted)


def cache_of_two() -> StepCache:
    cache = StepCache()
    cache.users = 2
    return cache


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def test_a_tensor_is_sketched_once_until_somebody_writes_to_it(counter: Counter) -> None:
    cache, x = cache_of_two(), torch.arange(12.0)
    first = cache.sketch(x, PLACE, histogram=True)
    assert first is not None
    assert cache.sketch(x, PLACE, histogram=True) is first
    fewer = cache.sketch(x, PLACE, histogram=False)
    assert fewer is not None
    assert not fewer.binned
    assert (fewer.sum, fewer.count) == (66.0, 12)
    assert counter.sizes == {True: [12], False: []}
    x.add_(1)
    second = cache.sketch(x, PLACE, histogram=True)
    assert second is not None
    assert (first.sum, second.sum) == (66.0, 78.0)


def test_a_sketch_without_a_histogram_is_made_again_for_who_wants_one() -> None:
    cache, x = cache_of_two(), torch.arange(12.0)
    assert not cache.sketch(x, PLACE, histogram=False).binned  # type: ignore[union-attr]
    assert cache.sketch(x, PLACE, histogram=True).binned  # type: ignore[union-attr]
    assert not cache.sketches([x], [x], histogram=False)[0].binned  # type: ignore[union-attr]
    (made,) = cache.sketches([x], [x], histogram=True)
    assert made.binned  # type: ignore[union-attr]
    assert cache.sketches([x, x], [x, x], histogram=True) == [made, made]


def test_the_moments_of_a_sketch_that_waits_wait_with_it(counter: Counter) -> None:
    cache, x = cache_of_two(), torch.arange(12.0)
    cache.binned = True
    moments = cache.sketch(x, PLACE, histogram=False)
    whole = cache.sketch(x, PLACE, histogram=True)
    assert counter.sizes == {True: [], False: []}
    assert moments is not None
    assert whole is not None
    assert len(moments.row) == sketch.HEAD
    assert len(whole.row) == sketch.ROW
    assert torch.equal(moments.row, whole.row[: sketch.HEAD])
    assert counter.sizes == {True: [12], False: []}


def test_for_one_receiver_alone_nothing_that_flows_is_remembered() -> None:
    cache, x = StepCache(), torch.arange(12.0)
    first, second = (cache.sketch(x, PLACE, histogram=True) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first is not second
    assert first.sum == second.sum == 66
    assert not cache._flowing


def test_another_tensor_at_the_same_id_is_not_taken_for_it() -> None:
    cache = cache_of_two()
    for i in range(50):  # freed at once: ids come again
        made = cache.sketch(torch.full((3,), float(i)), PLACE, histogram=True)
        assert made is not None
        assert made.max == i


def test_where_torch_counts_no_writes_nothing_is_found_again() -> None:
    with torch.inference_mode():
        cache, x = cache_of_two(), torch.ones(3)
        first = cache.sketch(x, PLACE, histogram=True)
        x.add_(1)
        second = cache.sketch(x, PLACE, histogram=True)
    assert first is not None
    assert second is not None
    assert (first.sum, second.sum) == (3.0, 6.0)


def test_under_vmap_an_in_place_module_changes_what_is_sketched(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    least: dict[str, float] = {}

    def note(c: Capture) -> None:
        found = summary.drawn(c)
        assert found is not None
        least[c.name] = found.min

    with Board(tmp_path) as board, Probe(model) as p:
        p.log(board, note, kinds=Kind.OUTPUT)
        torch.vmap(model)(torch.randn(20, 3))
    assert least["0"] < least["1"] == 0


def test_of_activations_few_are_remembered() -> None:
    cache, tensors = cache_of_two(), torch.randn(2 * FLOWING, 3).unbind()
    first = [cache.sketch(tensor, PLACE, histogram=True) for tensor in tensors]
    again = [cache.sketch(tensor, PLACE, histogram=True) for tensor in reversed(tensors)]
    assert [a is b for a, b in zip(first, reversed(again), strict=True)] == [False] * FLOWING + [True] * FLOWING


def test_what_nobody_can_read_is_remembered_as_nothing() -> None:
    cache, x = cache_of_two(), torch.empty(3, device="meta")
    assert cache.sketch(x, PLACE, histogram=True) is None
    assert cache.sketches([x], [x], histogram=False) == [None]


def test_a_parameter_is_copied_once_as_long_as_a_copy_is_held() -> None:
    cache, parameter = cache_of_two(), nn.Parameter(torch.ones(3))
    before = cache.copy(parameter)
    assert cache.copy(parameter) is before
    assert before.data_ptr() != parameter.data_ptr()
    with torch.no_grad():
        parameter.add_(2)
    held = weakref.ref(before)
    del before
    gc.collect()
    assert held() is None


def test_an_update_takes_the_place_of_the_copy_and_is_taken_once() -> None:
    cache, parameter = cache_of_two(), nn.Parameter(torch.ones(3))
    before = cache.copy(parameter)
    with torch.no_grad():
        parameter.add_(2)
        for _ in range(2):  # by each receiver
            assert cache.update(parameter, before) is before
            assert before.tolist() == [2.0] * 3
    assert cache.copy(parameter).tolist() == [3.0] * 3


def test_of_a_parameter_that_an_update_left_alone_the_next_copy_is_none_of_the_update() -> None:
    cache, parameter = cache_of_two(), nn.Parameter(torch.ones(3))
    before = cache.copy(parameter)
    assert cache.update(parameter, before).tolist() == [0.0] * 3  # nothing wrote to it
    assert cache.copy(parameter).tolist() == [1.0] * 3


def test_updates_are_let_go_of_at_the_next_optimizer_and_everything_at_the_end_of_the_step() -> None:
    cache, parameter = cache_of_two(), nn.Parameter(torch.ones(3))
    update = weakref.ref(cache.update(parameter, torch.zeros(3)))
    assert update() is not None
    cache.copy(nn.Parameter(torch.ones(2)))
    assert update() is None
    cache.binned = True
    cache.sketch(parameter, PLACE, histogram=True)
    cache.sketches([parameter], [parameter], histogram=True)
    cache.copy(parameter)
    cache.update(parameter, torch.zeros(3))
    cache.forget()
    assert not cache.binned
    assert not any((cache._flowing, cache._parameters, cache._copies, cache._updates))


def test_logs_share_what_they_sketch_of_parameters(tmp_path: Path, counter: Counter) -> None:
    model = nn.Linear(4, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kinds = list(ParameterKind)
    with Board(tmp_path) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, histogram, kinds=kinds)
        p.log(board, stats, kinds=kinds)
        model(torch.randn(7, 4)).sum().backward()
        optimizer.step()
        assert sorted(counter.sizes[True]) == 3 * [5] + 3 * [20]  # values, gradients, updates


def test_logs_and_health_checks_share_what_they_sketch(tmp_path: Path, counter: Counter) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def sketched(*summaries: Any, observers: Sequence[Any] = ()) -> list[int]:
        folder = tmp_path / f"{len(summaries)} {len(observers)}"
        with Board(folder) as board, Probe(model, optimizer=optimizer, observers=observers) as p:
            p.log(board, *summaries)
            for _ in range(2):  # after the first step the health checks know that histograms are wanted
                counter.sizes.update({True: [], False: []})
                optimizer.zero_grad()
                model(torch.randn(7, 4)).square().sum().backward()
                optimizer.step()
        return sorted(counter.sizes[True])

    alone = sketched(stats, histogram)
    assert alone == sorted(2 * [35, 35, 14] + 3 * [20, 5, 10, 2])  # outputs and gradients; values, gradients, updates
    both = sketched(stats, histogram, *health.checks())
    assert both == sorted([*alone, 28])  # the input of the model; a grad_input is the grad_output of the layer before
    assert sorted(counter.sizes[False]) == [2, 5, 10, 20]  # gradients of parameters, before anybody clips them
    assert sketched(stats, histogram, observers=health.checks()) == both
    assert sorted(counter.sizes[False]) == [2, 5, 10, 20]


def test_a_write_that_torch_does_not_count_between_two_layers_is_seen(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x.data.clamp_(0)
            return self.last(x)

    least: dict[tuple[str, Kind], float] = {}

    def note(c: Capture) -> None:
        found = summary.drawn(c)
        assert found is not None
        assert isinstance(c.kind, Kind)
        least[c.name, c.kind] = found.min

    model = Net()
    with Board(tmp_path) as board, Probe(model) as p:
        p.log(board, note, *health.checks(), kinds=Kind.INPUT | Kind.OUTPUT)
        model(torch.randn(20, 3))
    assert least["first", Kind.OUTPUT] < 0
    assert least["last", Kind.INPUT] == least["last", Kind.OUTPUT] == 0
