"""Summaries, each on captures built by hand: no model, no TensorBoard."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import probe
from probe import Capture, Kind, ParameterKind, sketch


def capture(value: torch.Tensor, kind: Any = Kind.OUTPUT, **options: Any) -> Capture:
    return Capture("layer", kind, value, **options)


def numbers_of(value: torch.Tensor) -> dict[str, float]:
    """What `stats` says."""
    (item,) = probe.stats(capture(value))
    assert isinstance(item, probe.Statistics)
    return dict(zip(item.names, item.value.numbers(item.names), strict=True))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
@settings(max_examples=40, deadline=None)
def test_stats_are_numpys(numbers: list[float]) -> None:
    """mean, std, min, max, norm and the share of zeros equal NumPy's in float64."""
    found = numbers_of(torch.tensor(numbers))
    x = np.array(numbers, np.float32).astype(np.float64)
    expected = {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max(), "norm": np.linalg.norm(x)}
    for name, value in (expected | {"zeros": (x == 0).mean(), "nan": 0, "inf": 0}).items():
        assert found.pop(name) == pytest.approx(value, rel=1e-6, abs=1e-6 * max(1.0, abs(x).max())), name
    assert not found


def test_stats_count_what_is_not_finite() -> None:
    """NaN and Inf are counted, and do not spoil the rest."""
    found = numbers_of(torch.tensor([1.0, math.nan, -math.inf, 3.0]))
    assert (found["mean"], found["nan"], found["inf"]) == (2.0, 1.0, 1.0)


def test_one_sketch_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """`stats` and `histogram` of one capture sketch it once, another capture anew."""
    calls: list[int] = []
    of = sketch.of
    monkeypatch.setattr(sketch, "of", lambda tensor: calls.append(1) or of(tensor))
    for c in (capture(torch.ones(3)), capture(torch.ones(3))):
        list(probe.stats(c))
        list(probe.histogram(c))
    assert len(calls) == 2


def test_nothing_is_said_about_meta_tensors() -> None:
    """A tensor without values yields nothing."""
    c = capture(torch.empty(3, device="meta"))
    assert not list(probe.stats(c))
    assert not list(probe.histogram(c))


def test_dead_units() -> None:
    """Only channels that are zero for all samples and positions count; along the last dimension of [B, T, F]."""
    value = torch.rand(2, 4, 3, 3) + 0.1
    value[:, 1] = 0
    value[0, 2] = 0
    (item,) = probe.dead_units(capture(value))
    assert float(item.value) == 0.25
    (item,) = probe.dead_units(capture(torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])))
    assert float(item.value) == 0.5
    assert not list(probe.dead_units(capture(value, Kind.GRAD_OUTPUT)))
    assert not list(probe.dead_units(capture(value[:0])))


PICTURES = [
    (probe.feature_maps(), Kind.OUTPUT),
    (probe.input_images(), Kind.INPUT),
    (probe.kernels, ParameterKind.VALUE),
    (probe.embedding(), Kind.OUTPUT),
]


@pytest.mark.parametrize(("summary", "kind"), PICTURES)
def test_pictures_of_complex_values_are_of_their_modulus(summary: Any, kind: Any) -> None:
    """Pictures and points are those of the modulus, not of the real part."""
    value = torch.randn(2, 3, 4, 4, dtype=torch.complex64)
    (item,) = summary(capture(value, kind, module_type=nn.Conv2d))
    (expected,) = summary(capture(value.abs(), kind, module_type=nn.Conv2d))
    assert torch.equal(item.value, expected.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(("summary", "kind"), PICTURES)
def test_no_pictures_of_what_has_no_grid(summary: Any, kind: Any) -> None:
    """Sparse, nested and empty tensors yield nothing and stop no training."""
    dense = torch.rand(2, 3, 4, 4)
    nested = torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(2, 4)], layout=torch.jagged)
    for value in (dense.to_sparse(), dense[0, 0].to_sparse_csr(), nested, dense[:0], dense[..., :0]):
        assert not list(summary(capture(value, kind, module_type=nn.Conv2d)))


def test_feature_maps_are_a_grid_of_the_first_sample() -> None:
    """One tile a channel up to the limit, each stretched by itself or all together."""
    value = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    (item,) = probe.feature_maps(max_channels=2, nrow=2)(capture(value))
    assert tuple(item.value.shape) == (3, 4 + 4, 2 * (4 + 2) + 2)
    assert item.value[0, 2:6, 2:6].min() == item.value[0, 2:6, 8:12].min() == 0
    (item,) = probe.feature_maps(per_map=False)(capture(value))
    assert item.value[0, 2:6, 8:12].min() > 0.3
    assert not list(probe.feature_maps()(capture(torch.rand(2, 3))))


def test_input_images_and_kernels() -> None:
    """Pictures of inputs, and of convolution weights only."""
    (item,) = probe.input_images(max_images=2)(capture(torch.rand(3, 3, 4, 4), Kind.INPUT))
    assert tuple(item.value.shape) == (3, 8, 14)
    (item,) = probe.kernels(capture(torch.rand(8, 3, 5, 5), ParameterKind.VALUE, module_type=nn.Conv2d))
    assert item.value.shape[0] == 3
    assert not list(probe.kernels(capture(torch.rand(8, 3), ParameterKind.VALUE, module_type=nn.Linear)))
    assert not list(probe.kernels(capture(torch.rand(8), ParameterKind.VALUE, module_type=nn.Conv2d)))


def test_embedding_gives_points_and_labels() -> None:
    """Samples flattened to rows, with as many labels."""
    (item,) = probe.embedding(max_points=2, labels=lambda: [7, 8, 9])(capture(torch.rand(3, 2, 2)))
    assert (tuple(item.value.shape), item.labels) == ((2, 4), [7, 8])


@pytest.mark.parametrize("factory", [probe.feature_maps, probe.input_images, probe.embedding])
def test_bad_options_are_refused(factory: Any) -> None:
    """At once, not in the middle of a training."""
    with pytest.raises(ValueError, match="at least 1"):
        factory(0)


@pytest.mark.parametrize("factory", [probe.feature_maps, probe.input_images, probe.embedding])
def test_a_factory_is_no_summary(factory: Any) -> None:
    """Who forgets the brackets is told."""
    with pytest.raises(TypeError, match="with the brackets"):
        factory(capture(torch.rand(1, 2, 3, 3)))
