"""What the logs of all ranks do together: an agreement on what is logged, and one sum.

A step's statistics are merged over the default process group of ``torch.distributed``, in one ``all_reduce``. It needs
a buffer of the same layout on every rank, so the ranks first compare what they are about to add up, at a `Meeting`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from probe import sketch
from probe._meeting import Meeting, is_told, note_told
from probe.ranks import Addend, Norm, Part, counts, rank, squares
from probe.sketch import Sketch

Key = tuple[str, str]
"""Mode and tag."""


class Dropped(Exception):
    """Not all ranks have dropped the same summaries: all drop them, and go on without this step.

    Arguments:
        why: by the summary's number, which rank dropped it and what it raised.
    """

    def __init__(self, why: dict[int, str]) -> None:
        super().__init__(*why.values())
        self.why = why


class Gathered(Protocol):
    """What a log gathered in one step, by mode and tag."""

    scalars: dict[Key, tuple[Any, int]]
    statistics: dict[Key, tuple[Sketch, tuple[str, ...]]]
    histograms: dict[Key, Sketch]
    norms: dict[Key, Norm]
    images: dict[Key, Any]
    embeddings: dict[Key, Any]
    parts: dict[Key, Part]


class _Site(NamedTuple):
    """One sketch of a step, and the tags under which its statistics and its histogram are shown."""

    drawn: Sketch
    statistics: list[Key]
    histograms: list[Key]

    def sent(self, step: Gathered) -> Sketch:
        """What this rank adds for it: only counts and moments, where nobody asked for the histogram."""
        copy = step.parts.get((self.statistics + self.histograms)[0]) is Part.COPY
        drawn = self.drawn if self.histograms else self.drawn.moments()
        return drawn.nothing() if copy else drawn


class Merger:
    """What one log does with its twins on the other ranks, at the end of each step that they observe.

    It comes to the ranks' meeting with nothing as well, because others may have something, unless it is known to be of
    a kind that adds nothing up: such a log may be on one rank only.

    Arguments:
        adds: whether there may be something to add up; False where all ranks have all of it.
    """

    def __init__(self, adds: bool) -> None:
        self._adds = None if adds else False  # not known yet
        self._dropped: dict[int, str] = {}

    def drop(self, number: int, why: str) -> None:
        """A summary is not asked any more: what the others have of it must not be waited for."""
        self._dropped[number] = f"{number} on rank {rank()} {why}"  # the number is taken off again in `_agree`

    def sum_up(
        self, number: int, step: Gathered, sites: Sequence[tuple[str, Tensor, Addend]]
    ) -> list[tuple[Tensor, Part]]:
        """Add up partial sums: those of the named sites, and those that are in norms.

        One collective each, which is why it is done here, where all ranks have agreed on it, and never in a hook.

        Returns:
            what this rank has of the sum at each site, see `part`.

        Raises:
            RuntimeError, Dropped: as `merge`.
        """
        norms = [key for key in sorted(step.norms) if step.norms[key].addends]
        if not (sites or norms):
            return []
        lines = [f"{name} (partial sums)" for name, _, _ in sites] + [f"{mode}: {tag}" for mode, tag in norms]
        self._agree(number, lines)
        for key in norms:
            norm = step.norms[key]
            summed = [addend.summed(own) for own, addend in norm.addends]
            late = squares(tensor for tensor, what in summed if counts(what))
            step.norms[key] = norm._replace(squares=norm.squares + late.to(norm.squares), addends=())
        return [addend.summed(own) for _, own, addend in sites]

    def merge(self, number: int, step: Gathered, *, leaving: bool = False) -> None:
        """Put what all ranks gathered in place of what this one did: sketches added up, numbers averaged, norms joined.

        One ``all_reduce`` carries all of it, and nothing waits for a device.

        Arguments:
            number: of the step.
            step: what was gathered in it.
            leaving: nothing more will come.

        Raises:
            RuntimeError: on every rank, where one logs something else, left with an exception, or does not come in
                time.
            Dropped: on every rank.
        """
        sites, scalars, norms = _sites(step), _shared(step, step.scalars), _shared(step, step.norms)
        sketches = [site.sent(step) for site in sites]
        pairs: list[tuple[Any, Any]] = [step.scalars[key] for key in scalars]
        pairs += [
            (step.norms[key].squares, 0.0 if step.norms[key].over is None else step.norms[key].over) for key in norms
        ]
        copies = [step.parts.get(key) is Part.COPY for key in (*scalars, *norms)]
        addends = [0.0 if copy else each for copy, pair in zip(copies, pairs, strict=True) for each in pair]
        device = _device([each.device for each in (*sketches, *addends) if isinstance(each, (Sketch, Tensor))])
        lines = [_line(site, each) for site, each in zip(sites, sketches, strict=True)]
        lines += [f"{mode}: {tag}" for mode, tag in (*scalars, *norms)]
        if lines:
            lines.insert(0, f"tensors on {device.type}")
            self._adds = True
        elif self._adds is None and (step.images or step.embeddings) and not self._dropped:
            self._adds = False
        if self._adds is False:
            return
        self._agree(number, lines, leaving=leaving)
        self._dropped.clear()
        if not lines:
            return
        merged, numbers = sketch.all_reduce_with(sketches, sketch.column(addends, device))
        for site, drawn in zip(sites, merged, strict=True):
            step.histograms.update(dict.fromkeys(site.histograms, drawn))
            step.statistics.update({key: (drawn, step.statistics[key][1]) for key in site.statistics})
        results = iter(numbers.view(-1, 2))
        for key in scalars:
            sum_, count = next(results)
            step.scalars[key] = sum_ / count, 1
        for key in norms:
            over = step.norms[key].over
            own, other = next(results)
            step.norms[key] = Norm(own, None if over is None else other)

    def _agree(self, number: int, lines: list[str], *, leaving: bool = False) -> None:
        without = [f"no more of summary {each}" for each in sorted(self._dropped)]
        coming = [f"the end of step {number}", *without, *lines]
        told = _meeting().agree(coming, [*self._dropped.values()], leaving=leaving and len(coming) == 1)
        if told:
            self._dropped.clear()
            raise Dropped({int(which): why for which, _, why in (each.partition(" ") for each in told)})


def _shared(step: Gathered, table: dict[Key, Any]) -> list[Key]:
    """The keys of what the ranks hold parts of, in an order that is the same on all of them."""
    return sorted(key for key in table if step.parts.get(key) is not Part.WHOLE)


def _sites(step: Gathered) -> list[_Site]:
    """The sketches that the ranks hold parts of, in an order that is the same on all of them."""
    sites: dict[int, _Site] = {}
    for key in sorted({*_shared(step, step.statistics), *_shared(step, step.histograms)}):
        for table in (step.statistics, step.histograms):
            found: Any = table.get(key)
            if found is not None:
                drawn = found if table is step.histograms else found[0]
                site = sites.setdefault(id(drawn), _Site(drawn, [], []))
                (site.histograms if table is step.histograms else site.statistics).append(key)
    return list(sites.values())


def _line(site: _Site, sent: Sketch) -> str:
    """A site in words that say all that the layout of the buffer depends on."""
    keys = sorted({*site.statistics, *site.histograms})
    mode, first = keys[0]
    stem = first.rpartition("/")[0]
    names = ", ".join(tag.removeprefix(f"{stem}/") for _, tag in keys)
    return f"{mode}: {stem} ({names}{'; with bins' if sent.binned else ''})"


def _device(candidates: Sequence[torch.device]) -> torch.device:
    """Where to add up: the first of the devices that the default group's backends can reduce, else one of theirs."""
    able = [each.partition(":")[0] for each in dist.get_backend_config().split(",")]
    for device in candidates:
        if device.type in able:
            return device
    return torch.device(able[0], 0 if able[0] == "cpu" else torch.accelerator.current_device_index())


# The agreement


def leave(error: BaseException) -> None:
    """Have the other ranks raise when they come to the next meeting: this one will not. Once for each error.

    An error of a meeting, and what is raised because of it, is known to them already.
    """
    if is_told(error):
        return
    with contextlib.suppress(Exception):  # another exception is on its way, and the store may be gone
        note_told(error)
        _meeting().leave(f"rank {rank()} left its probe with {type(error).__name__}: {error}")


_meetings: weakref.WeakKeyDictionary[Any, Meeting] = weakref.WeakKeyDictionary()


def _meeting() -> Meeting:
    """That of the default process group."""
    group = dist.group.WORLD
    if group not in _meetings:
        store = dist.distributed_c10d._get_default_store()
        _meetings[group] = Meeting(store, dist.get_rank(), dist.get_world_size())
    return _meetings[group]
