"""What ``p.log`` does where there are several ranks: who holds which part, an agreement on what is logged, one sum.

A step's statistics are merged over the default process group of ``torch.distributed``, in one ``all_reduce``. It needs
a buffer of the same layout on every rank, so the ranks first meet at the group's key-value store and compare what they
are about to add up. There, unlike in a collective, nobody waits for ever: a rank that logs something else, that left
because of an exception, or that does not come, is an error on all ranks. A meeting is three or four messages (0.2 ms
on one machine); it waits for the other ranks' Python, not for any device.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import sys
import weakref
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from probe import sketch
from probe.sketch import Sketch

Key = tuple[str, str]
"""Mode and tag."""

_ADVICE = (
    "Every rank must log the same layers in the same steps: a layer that is not called, or an evaluation or a p.log on "
    "one rank only, will not do. p.log(..., per_rank=True) merges nothing and writes a run for each rank"
)


def rank() -> int:
    """This process's rank, 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def several() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# Who holds what


class Part(enum.Enum):
    """What a rank's tensor is of the whole."""

    OWN = enum.auto()
    """A part that no other rank has: parts add up."""
    COPY = enum.auto()
    """A part that another rank has too, and counts."""
    WHOLE = enum.auto()
    """All of it, as every rank has: there is nothing to add up."""


def part(tensor: Tensor, *, replicated: bool = False) -> tuple[Tensor, Part]:
    """What this rank has of a tensor, as a plain tensor, and what it is of the whole.

    A plain tensor is this rank's share of a batch, or, if `replicated`, the same on every rank: a parameter. Of a
    DTensor it is the local shard; of a replica the first rank's counts. A DTensor of partial sums is summed first,
    which is a collective of its own.
    """
    module = None if type(tensor) is Tensor else sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(tensor, module.DTensor):
        return tensor, Part.WHOLE if replicated else Part.OWN
    shared: Any = tensor
    with torch.no_grad():  # without a graph `to_local` is the shard itself
        if any(each.is_partial() for each in shared.placements):
            summed = [module.Replicate() if each.is_partial() else each for each in shared.placements]
            shared = shared.redistribute(placements=summed)
        local = shared.to_local()
    if replicated and all(each.is_replicate() for each in shared.placements):
        return local, Part.WHOLE
    place = shared.device_mesh.get_coordinate()  # None where this rank has nothing of it
    first = place is not None and not any(
        at for at, each in zip(place, shared.placements, strict=True) if each.is_replicate()
    )
    if replicated:  # other meshes, without rank 0, hold other replicas
        first = first and 0 in shared.device_mesh.mesh
    return local, Part.OWN if first else Part.COPY


class Norm(NamedTuple):
    """The root of a sum of squares, of which the ranks may hold parts, perhaps divided by another such root."""

    squares: Tensor
    over: Tensor | None = None

    def value(self) -> Tensor:
        """The norm, or the ratio of norms: 0-dim, on their device."""
        return self.squares.sqrt() if self.over is None else self.squares.sqrt() / self.over.sqrt()


def norm_of(tensors: Iterable[Tensor], *, merged: bool) -> tuple[Norm, Part]:
    """The L2 norm of parameters or gradients, all together, and what this rank has of it; not `merged`: of its own."""
    parts = [part(tensor, replicated=True) for tensor in tensors]
    if not merged or all(what is Part.WHOLE for _, what in parts):
        return Norm(squares(tensor for tensor, _ in parts)), Part.WHOLE
    counted = [Part.OWN, Part.WHOLE] if rank() == 0 else [Part.OWN]
    return Norm(squares(tensor for tensor, what in parts if what in counted)), Part.OWN


def squares(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of all elements: 0-dim, on the tensors' device, in float64 where that has it."""
    dense = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    dense = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in dense]
    if not dense:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack([norm.to(dense[0].device) for norm in torch._foreach_norm(dense)])
    return norms.to(torch.float32 if norms.device.type == "mps" else torch.float64).square().sum()


def refuse_flat(parameters: Iterable[Tensor]) -> None:
    """Raises:
    TypeError: the ranks would merge shards of the older FSDP, which nothing tells from whole parameters.
    """
    if several() and any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters):
        raise TypeError(
            "shards of FullyShardedDataParallel cannot be merged: shard with torch.distributed.fsdp.fully_shard, or "
            "leave parameters out with p.log(..., kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT), or log with per_rank=True"
        )


# One step of all ranks


class Gathered(Protocol):
    """What a log gathered in one step, by mode and tag."""

    scalars: dict[Key, tuple[Any, int]]
    statistics: dict[Key, tuple[Sketch, str]]
    histograms: dict[Key, Sketch]
    norms: dict[Key, Norm]
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


def merge(number: int, step: Gathered) -> None:
    """Put what all ranks gathered in place of what this one did: sketches added up, numbers averaged, norms joined.

    One ``all_reduce`` carries all of it, and nothing waits for a device. Where there is nothing to add up none is made.

    Raises:
        RuntimeError: on every rank, where one logs something else, left with an exception, or does not come in time.
    """
    sites, scalars, norms = _sites(step), _shared(step, step.scalars), _shared(step, step.norms)
    sketches = [site.sent(step) for site in sites]
    pairs: list[tuple[Any, Any]] = [step.scalars[key] for key in scalars]
    pairs += [(norm.squares, 0.0 if norm.over is None else norm.over) for norm in map(step.norms.__getitem__, norms)]
    copies = [step.parts.get(key) is Part.COPY for key in (*scalars, *norms)]
    addends = [0.0 if copy else each for copy, pair in zip(copies, pairs, strict=True) for each in pair]
    if not (sketches or addends):
        return
    device = _device([each.device for each in (*sketches, *addends) if isinstance(each, (Sketch, Tensor))])
    lines = [f"the end of step {number}", f"tensors on {device.type}"]
    lines += [_line(site, each) for site, each in zip(sites, sketches, strict=True)]
    lines += [f"{mode}: {tag}" for mode, tag in (*scalars, *norms)]
    _meeting().agree(lines)
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
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "_probe_told_ranks", False):
            return
        cause = cause.__cause__ or cause.__context__
    with contextlib.suppress(Exception):  # another exception is on its way, and the store may be gone
        _note_told(error)
        _meeting().leave(f"rank {rank()} left its probe with {type(error).__name__}: {error}")


def _note_told(error: BaseException) -> None:
    error._probe_told_ranks = True  # type: ignore[attr-defined]


class Meeting:
    """Where ranks meet, again and again, to compare what they are about to do; through a store that they share.

    Arguments:
        store: the store of the process group. Its time-out is the group's, of which a meeting waits half.
        rank: this one.
        size: how many ranks there are.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store = store.clone()  # a connection of its own: whoever waits at one blocks its other users
        self._rank = rank
        self._size = size
        self._at = 0

    def agree(self, lines: list[str]) -> None:
        """Return when all ranks have come with the same lines; the first says where this rank is.

        Raises:
            RuntimeError: on every rank, with what differs, who left or who did not come.
        """
        lines_of = f"probe/{self._at}/lines"
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        verdict, *differing = self._verdict(digest, lines[0]).split("\n")
        if differing:
            if str(self._rank) in differing:
                self._store.set(lines_of + str(self._rank), "\n".join(lines))
            self._store.wait([lines_of + each for each in differing], self._timeout)
            first, other = (self._store.get(lines_of + each).decode().split("\n") for each in differing)
            verdict = f"{verdict}{_difference(first, other, *differing)}. {_ADVICE}"
        self._at += 1
        if verdict != "agreed":
            error = RuntimeError(verdict)
            _note_told(error)
            raise error

    def leave(self, reason: str) -> None:
        """Have the others raise at the meeting that this rank would have come to next."""
        self._decide(reason)
        self._at += 1

    @property
    def _timeout(self) -> timedelta:
        timeout: timedelta = self._store.timeout
        return timeout / 2

    def _verdict(self, digest: str, where: str) -> str:
        """``"agreed"``, or what is wrong; with two ranks to compare, one a line, where that is a difference."""
        store, here = self._store, f"probe/{self._at}"
        ranks = [f"{here}/rank{each}" for each in range(self._size)]
        store.set(ranks[self._rank], digest)
        if store.add(f"{here}/come", 1) == self._size:
            digests = store.multi_get(ranks)
            others = [each for each in range(self._size) if digests[each] != digests[0]]
            self._decide(f"the ranks log different things\n0\n{others[0]}" if others else "agreed")
            if self._at:
                self._forget(self._at - 1)
        try:
            store.wait([f"{here}/verdict"], self._timeout)
        except RuntimeError:
            absent = [str(each) for each, key in enumerate(ranks) if not store.check([key])]
            seconds = self._timeout.total_seconds()
            who = f"rank {absent[0]}" if len(absent) == 1 else f"ranks {', '.join(absent)}"
            text = f"{who} did not come within {seconds:.0f} s to {where}, where rank {self._rank} waits. {_ADVICE}"
            self._decide(text)
        verdict: str = store.get(f"{here}/verdict").decode()
        return verdict

    def _decide(self, verdict: str) -> None:
        """Set the verdict of the present meeting, unless somebody has."""
        if self._store.add(f"probe/{self._at}/decided", 1) == 1:
            self._store.set(f"probe/{self._at}/verdict", verdict)

    def _forget(self, at: int) -> None:
        """Clear away a meeting that all ranks have left, which they have when they are at the next one."""
        for key in ("come", "decided", "verdict", *(f"rank{each}" for each in range(self._size))):
            self._store.delete_key(f"probe/{at}/{key}")


def _difference(first: list[str], other: list[str], *ranks: str) -> str:
    """What one rank has and the other lacks, in words."""
    if first[0] != other[0]:
        return f": rank {ranks[0]} is at {first[0]}, rank {ranks[1]} at {other[0]}"
    text = ""
    for rank_, extra in zip(ranks, (set(first) - set(other), set(other) - set(first)), strict=True):
        if extra:
            more = f" and {len(extra) - 4} more" if len(extra) > 4 else ""
            text += f"; only rank {rank_} has {', '.join(sorted(extra)[:4])}{more}"
    return f" at {first[0]}{text}"


_meetings: weakref.WeakKeyDictionary[Any, Meeting] = weakref.WeakKeyDictionary()


def _meeting() -> Meeting:
    """That of the default process group."""
    group = dist.group.WORLD
    if group not in _meetings:
        store = dist.distributed_c10d._get_default_store()
        _meetings[group] = Meeting(store, dist.get_rank(), dist.get_world_size())
    return _meetings[group]
