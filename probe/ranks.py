"""What ``p.log`` does where there are several ranks: who holds which part, an agreement on what is logged, one sum.

A step's statistics are merged over the default process group of ``torch.distributed``, in one ``all_reduce``. It needs
a buffer of the same layout on every rank, so the ranks first compare what they are about to add up, at a `Meeting`.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from probe import sketch
from probe._meeting import Meeting, is_told, note_told
from probe.sketch import Sketch

Key = tuple[str, str]
"""Mode and tag."""


def rank() -> int:
    """This process's rank; before the process group is there, the one that a launcher gave; 0 in a single process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    given = os.environ.get("RANK", "") if "WORLD_SIZE" in os.environ else ""  # as ``init_process_group`` reads them
    return int(given) if given.isdecimal() else 0


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


def roots(norms: Sequence[Norm]) -> Sequence[Tensor]:
    """The norms, or ratios of norms: 0-dim, on the device of the first one; waits for no device."""
    if not norms:
        return []
    first = norms[0].squares
    one = torch.ones_like(first)
    over = torch.stack([one if norm.over is None else norm.over.to(first) for norm in norms])
    return (torch.stack([norm.squares.to(first) for norm in norms]).sqrt() / over.sqrt()).unbind()


def norm_of(tensors: Iterable[Tensor], *, merged: bool) -> tuple[Norm, Part]:
    """The L2 norm of parameters or gradients, all together, and what this rank has of it; not `merged`: of its own."""
    parts = [part(tensor, replicated=True) for tensor in tensors]
    if not merged or all(what is Part.WHOLE for _, what in parts):
        return Norm(squares(tensor for tensor, _ in parts)), Part.WHOLE
    counted = [Part.OWN, Part.WHOLE] if rank() == 0 else [Part.OWN]
    return Norm(squares(tensor for tensor, what in parts if what in counted)), Part.OWN


def squares(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of all elements: 0-dim, on the tensors' device, in float64 where that has it."""
    each = each_squares(list(tensors))
    return each.sum() if len(each) else torch.zeros((), dtype=torch.float64)


def each_squares(tensors: Sequence[Tensor]) -> Tensor:
    """For each tensor the sum of the squares of its elements: ``[n]``, as of `squares`."""
    dense = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    dense = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in dense]
    if not dense:
        return torch.zeros(0, dtype=torch.float64)
    norms = torch.stack([norm.to(dense[0].device) for norm in torch._foreach_norm(dense)])
    return norms.to(torch.float32 if norms.device.type == "mps" else torch.float64).square()


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
    statistics: dict[Key, tuple[Sketch, tuple[str, ...]]]
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
