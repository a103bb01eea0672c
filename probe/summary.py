"""Summaries: functions from a capture to things to show. Each is one function; options are arguments of a factory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from probe import image, sketch
from probe.capture import Capture, Embedding, Histogram, Image, Kind, ParameterKind, Scalar, Shown, Statistics, Summary
from probe.sketch import Sketch

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_TRANSPOSED = (nn.modules.conv._ConvTransposeNd,)


class _Drawn(threading.local):
    """The latest captures and their sketches. Captures are held, so that the id is not given to another."""

    def __init__(self) -> None:
        self.captures: list[Capture] = []
        self.known: dict[int, Sketch | None] = {}
        self.make: Callable[[torch.Tensor], Sketch | None] | None = None
        self.make_all: Callable[[], Sequence[Sketch | None]] | None = None  # of those captures, not yet asked for
        self.several = False


_drawn = _Drawn()


def drawn(capture: Capture) -> Sketch | None:
    """The sketch of a capture's value, computed once for all summaries that ask; None for a tensor without values."""
    if id(capture) not in _drawn.known and _drawn.make_all is not None:
        make_all, _drawn.make_all = _drawn.make_all, None
        _drawn.known = {id(each): made for each, made in zip(_drawn.captures, make_all(), strict=True)}
    if id(capture) not in _drawn.known:
        if not _drawn.several:
            forget_drawn()
        _drawn.known[id(capture)] = (_drawn.make or sketch.of)(capture.value)
        _drawn.captures.append(capture)
    return _drawn.known[id(capture)]


@contextlib.contextmanager
def drawing(make: Callable[[torch.Tensor], Sketch | None]) -> Iterator[None]:
    """Inside, this thread's `drawn` sketches by `make`."""
    before, _drawn.make = _drawn.make, make
    try:
        yield
    finally:
        _drawn.make = before


def draw_all(captures: Sequence[Capture], make: Callable[[], Sequence[Sketch | None]]) -> None:
    """Have `drawn` find the sketches of these until `forget_drawn`: `make` gives all, once one is asked for."""
    _drawn.known, _drawn.captures, _drawn.make_all, _drawn.several = {}, list(captures), make, True


def forget_drawn() -> None:
    """Let go of the sketches and captures that `drawn` holds."""
    _drawn.known, _drawn.captures, _drawn.make_all, _drawn.several = {}, [], None, False


def stats(c: Capture) -> Iterator[Shown]:
    """mean, std, min, max, norm (L2), zeros (a share), nan and inf (counts) of the finite values of any capture."""
    found = drawn(c)
    if found is not None:
        yield Statistics(found)


def curves(item: Statistics) -> list[tuple[str, float]]:
    """The tags and the numbers of its curves; nothing for a tensor without data."""
    drawn = item.value if isinstance(item.value, sketch.Sketch) else sketch.of(item.value)
    if drawn is None:
        return []
    stem = f"{item.tag}/" if item.tag else ""
    return [(stem + name, number) for name, number in zip(item.names, drawn.numbers(item.names), strict=True)]


def histogram(c: Capture) -> Iterator[Shown]:
    """The distribution of the finite values of any capture.

    Its bins are 14 to 25 % of their lower edge wide, wherever that lies, and drawn flat: of values like 1e4 ± 0.01, all
    in one bin, the picture shows the range alone. `stats` has their mean and std to all digits.
    """
    found = drawn(c)
    if found is not None:
        yield Histogram("histogram", found)


def dead_units(c: Capture) -> Iterator[Shown]:
    """Share of units (channels) whose output is exactly zero for every sample and position, to spot dying ReLUs.

    Units lie along dimension 1, or along the last one for outputs ``[B, T, F]``; empty outputs yield nothing.
    """
    value = _dense(c, Kind.OUTPUT)
    if value is not None and value.dim() >= 2:
        units = value.movedim(-1 if value.dim() == 3 else 1, 0).flatten(1)
        yield Scalar("dead_units", (units == 0).all(1).double().mean())


def _dense(c: Capture, kind: Kind | ParameterKind) -> torch.Tensor | None:
    """A capture's real numbers, of complex ones the modulus; None of another kind, and where it has none to draw."""
    value = c.value
    if c.kind is not kind or value.is_nested or value.layout is not torch.strided or not value.numel():
        return None
    value = value.dequantize() if value.is_quantized else value
    return value.abs() if value.is_complex() else value


def _of(kinds: Any, function: Callable[[Capture], Iterator[Shown]]) -> Summary:
    function.kinds = kinds  # type: ignore[attr-defined]  # what `p.log` reads to hook no more than is needed
    return function


dead_units.kinds = Kind.OUTPUT  # type: ignore[attr-defined]


def feature_maps(max_channels: int = 64, nrow: int = 8, per_map: bool = True) -> Summary:
    """A grid of the first sample's feature maps, one grey tile a channel.

    Arguments:
        max_channels: show only the first so many channels.
        nrow: tiles in a row.
        per_map: stretch every map to the full range of grey by itself; otherwise all share one range and can be
            compared. NaN is magenta.

    Returns:
        a summary of outputs ``[B, C, H, W]``, complex ones by their modulus; others yield nothing.
    """
    _positive(max_channels=max_channels, nrow=nrow)

    def show(c: Capture) -> Iterator[Shown]:
        value = _dense(c, Kind.OUTPUT)
        if value is not None and value.dim() == 4:
            maps = value[0, :max_channels, None]
            yield Image("feature_maps", image.grid(maps, nrow=nrow, normalize=True, scale_each=per_map))

    return _of(Kind.OUTPUT, show)


def input_images(max_images: int = 16, nrow: int = 4) -> Summary:
    """A grid of the images that go into a layer.

    Arguments:
        max_images: show only the first so many of the batch.
        nrow: tiles in a row.

    Returns:
        a summary of inputs ``[B, C, H, W]``, complex ones by their modulus; others yield nothing. Each image is
        stretched to the full range by itself.
    """
    _positive(max_images=max_images, nrow=nrow)

    def show(c: Capture) -> Iterator[Shown]:
        value = _dense(c, Kind.INPUT)
        if value is not None and value.dim() == 4:
            yield Image("images", image.grid(value[:max_images], nrow=nrow, normalize=True, scale_each=True))

    return _of(Kind.INPUT, show)


def kernels(c: Capture) -> Iterator[Shown]:
    """The kernels of a convolution, honest about channels: RGB only for three input channels, as `image.kernels`."""
    value = _dense(c, ParameterKind.VALUE)
    if value is not None and value.dim() >= 3 and issubclass(c.module_type, _CONVOLUTIONS):
        transposed = issubclass(c.module_type, _TRANSPOSED)
        yield Image("kernels", image.kernels(value, transposed=transposed, groups=c.groups))


kernels.kinds = ParameterKind.VALUE  # type: ignore[attr-defined]


def embedding(max_points: int = 500, labels: Callable[[], Sequence[Any]] | None = None) -> Summary:
    """Outputs as points for TensorBoard's projector, one a sample.

    Arguments:
        max_points: only the first so many samples of a batch.
        labels: called when a batch is captured; gives a label for every sample of it.

    Returns:
        a summary of outputs ``[B, ...]``, flattened to ``[B, F]``, complex ones by their modulus; sparse, nested and
        empty ones yield nothing.
    """
    _positive(max_points=max_points)

    def show(c: Capture) -> Iterator[Shown]:
        value = _dense(c, Kind.OUTPUT)
        if value is not None and value.dim() >= 2:
            points = value[:max_points].flatten(1).float()
            yield Embedding("embedding", points, None if labels is None else list(labels())[: len(points)])

    return _of(Kind.OUTPUT, show)


def _positive(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, Capture):
            raise TypeError("this function makes a summary: write p.log(board, feature_maps()), with the brackets")
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number of at least 1")
