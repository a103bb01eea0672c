"""What the summaries yielded in one step, merged by tag until it is fetched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from probe import sketch
from probe.capture import Embedding, Histogram, Image, Scalar, Shown, Statistics, nothing_to_show
from probe.ranks import Norm, Part, roots
from probe.sketch import Sketch


class Tally:
    """What the summaries yielded in one step, by mode and tag; what has the same tag is merged.

    A step may last long (a whole evaluation): what is kept does not grow with what is added.
    """

    SUMS = 8

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, str], tuple[Any, int]] = {}  # sum and count
        self.statistics: dict[tuple[str, str], tuple[Sketch, tuple[str, ...]]] = {}  # tagged by all names
        self.histograms: dict[tuple[str, str], Sketch] = {}
        self.norms: dict[tuple[str, str], Norm] = {}
        self.images: dict[tuple[str, str], torch.Tensor] = {}
        self.embeddings: dict[tuple[str, str], Embedding] = {}
        self.parts: dict[tuple[str, str], Part] = {}  # what ranks hold of it; OWN where nothing is said
        self._sums: dict[tuple[int, int], tuple[Sketch, Sketch, Sketch]] = {}

    def __bool__(self) -> bool:
        return any((self.scalars, self.statistics, self.histograms, self.norms, self.images, self.embeddings))

    def add(self, mode: str, prefix: str, item: Shown, part: Part = Part.OWN) -> None:
        """Merge what a summary yielded.

        Raises:
            TypeError, ValueError: it can't be shown.
        """
        tag = getattr(item, "tag", "")
        if isinstance(item, Statistics):
            tag = "/".join(filter(None, (tag, ", ".join(item.names))))
        key = (mode, f"{prefix}/{tag}")
        if part is not Part.OWN:
            self.parts[key] = part
        match item:
            case Statistics():
                if not _NUMBERS.issuperset(item.names):
                    raise ValueError(f"Statistics(names={item.names!r}): use {', '.join(sketch.NUMBERS)}")
                drawn = _sketched(item)
                if drawn is not None:
                    before = self.statistics.get(key)
                    self.statistics[key] = drawn if before is None else self._plus(before[0], drawn), item.names
            case Histogram():
                drawn = _sketched(item)
                if drawn is not None:
                    held = self.histograms.get(key)
                    self.histograms[key] = drawn if held is None else self._plus(held, drawn)
            case Scalar(value=Norm() as norm):
                self.norms[key] = norm
            case Scalar():
                number, (total, count) = _number(item), self.scalars.get(key, (None, 0))
                self.scalars[key] = (number if total is None else _sum(total, number), count + 1)
            case Image():
                if not _real(item.value) or not 2 <= item.value.dim() <= 4 or not item.value.numel():
                    raise TypeError(f"Image({item.tag!r}, ...) takes a tensor [C, H, W], not {described(item.value)}")
                self.images[key] = item.value
            case Embedding():
                if not _real(item.value) or item.value.dim() != 2 or not item.value.numel():
                    raise TypeError(f"Embedding({item.tag!r}, ...) takes a tensor [N, F], not {described(item.value)}")
                if item.labels is not None and len(item.labels) != len(item.value):
                    raise ValueError(f"Embedding({item.tag!r}): {len(item.value)} points, {len(item.labels)} labels")
                self.embeddings[key] = item
            case _:
                raise nothing_to_show(described(item))

    def _plus(self, a: Sketch, b: Sketch) -> Sketch:
        """``a + b``, once for all tags that share the two sketches; these come soon after one another."""
        pair = (id(a), id(b))
        if pair not in self._sums:
            if len(self._sums) == self.SUMS:
                del self._sums[next(iter(self._sums))]
            self._sums[pair] = (a, b, a + b)  # a and b are held, so that their ids stay theirs
        return self._sums[pair][2]

    def fetch(self) -> Callable[[], dict[str, list[Any]]]:
        """Start one copy of everything to the host; the function waits for it and gives the items by mode."""
        plain = {key: total if count == 1 else total / count for key, (total, count) in self.scalars.items()}
        plain.update(zip(self.norms, roots([*self.norms.values()]), strict=True))
        drawn = {id(each): each for each in [*(s for s, _ in self.statistics.values()), *self.histograms.values()]}
        values: list[Any] = [*plain.values(), *self.images.values(), *drawn.values()]
        values += [each.value for each in self.embeddings.values()]
        copy = sketch.fetch(values)

        def items() -> dict[str, list[Any]]:
            host = iter(copy.result())
            found: dict[str, list[Any]] = {}
            for mode, tag in plain:
                found.setdefault(mode, []).append(Scalar(tag, next(host)))
            pictures = [(mode, Image(tag, next(host))) for mode, tag in self.images]
            here = {key: next(host) for key in drawn}
            for (mode, tag), (each, names) in self.statistics.items():
                stem = tag.rpartition("/")[0]
                found.setdefault(mode, []).append(Statistics(here[id(each)], names, stem))
            for (mode, tag), each in self.histograms.items():
                found.setdefault(mode, []).append(Histogram(tag, here[id(each)]))
            for mode, picture in pictures:
                found.setdefault(mode, []).append(picture)
            for (mode, tag), point in self.embeddings.items():
                found.setdefault(mode, []).append(Embedding(tag, next(host), point.labels))
            return found

        return items


def _real(value: Any) -> bool:
    """Whether it is a tensor that can be drawn: what can't would fail where nobody knows who yielded it."""
    return isinstance(value, torch.Tensor) and not value.is_complex() and not value.is_nested


def _number(item: Scalar) -> Any:
    """The number of a scalar as it is now: a float, or a 0-dim tensor where it is."""
    value = item.value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(f"Scalar({item.tag!r}, ...) is one real number, not {described(value)}")
        return value.detach().reshape(()).clone()  # it is read later, and may be somebody's running total, or a weight
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"Scalar({item.tag!r}, ...) is one real number, not {described(value)}") from None


_NUMBERS = frozenset(sketch.NUMBERS)


def _sketched(item: Histogram | Statistics) -> Sketch | None:
    if isinstance(item.value, Sketch):
        if isinstance(item, Histogram) and not item.value.binned:
            raise ValueError(f"Histogram({item.tag!r}, ...) takes a sketch with a histogram: sketch.of(tensor)")
        return item.value
    try:
        numbers = torch.as_tensor(item.value)
    except (TypeError, ValueError, RuntimeError):
        what = f"Histogram({item.tag!r}, ...)" if isinstance(item, Histogram) else "Statistics(...)"
        raise TypeError(f"{what} takes a tensor, numbers or a Sketch, not {described(item.value)}") from None
    return sketch.of(numbers)


def described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{value!r:.80} ({type(value).__name__})"


def _sum(a: Any, b: Any) -> Any:
    """``a + b`` in double precision, on the device where a tensor among them is."""
    if not isinstance(a, torch.Tensor) or (isinstance(b, torch.Tensor) and a.device.type == "cpu"):
        a, b = b, a
    if not isinstance(a, torch.Tensor):
        return a + b
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    return a.to(wide) + (b.to(a.device, wide) if isinstance(b, torch.Tensor) else b)
