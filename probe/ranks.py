"""Where there are several ranks: which of them this is, and what it holds of a tensor."""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


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


class Addend(NamedTuple):
    """What a rank has of a DTensor of partial sums: the whole is known to nobody before these are added up."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    replicated: bool

    def summed(self, own: Tensor) -> tuple[Tensor, Part]:
        """What this rank has of the sum, see `part`. A collective: every rank of the mesh must call."""
        module: Any = sys.modules["torch.distributed.tensor"]
        shared = module.DTensor.from_local(
            own, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )
        placed = [module.Replicate() if each.is_partial() else each for each in self.placements]
        local, what = part(shared.redistribute(placements=placed), replicated=self.replicated)
        assert isinstance(what, Part)
        return local, what


def part(tensor: Tensor, *, replicated: bool = False) -> tuple[Tensor, Part | Addend]:
    """What this rank has of a tensor, as a plain tensor, and what it is of the whole; never a collective.

    A plain tensor is this rank's share of a batch, or, if `replicated`, the same on every rank: a parameter. Of a
    DTensor it is the local shard, or addend; of a replica the first rank's counts.
    """
    module = None if type(tensor) is Tensor else sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(tensor, module.DTensor):
        return tensor, Part.WHOLE if replicated else Part.OWN
    shared: Any = tensor
    with torch.no_grad():  # without a graph `to_local` is the shard itself
        local = shared.to_local()
    if any(each.is_partial() for each in shared.placements):
        return local, Addend(shared.device_mesh, shared.placements, shared.shape, shared.stride(), replicated)
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
    addends: tuple[tuple[Tensor, Addend], ...] = ()
    """Of tensors whose squares are not in the sum yet."""


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
    addends = tuple((tensor.clone(), what) for tensor, what in parts if isinstance(what, Addend))
    return Norm(squares(tensor for tensor, what in parts if counts(what)), addends=addends), Part.OWN


def counts(what: Part | Addend) -> bool:
    """Whether this rank's part is to be added to those of the others."""
    return what is Part.OWN or (what is Part.WHOLE and rank() == 0)


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
