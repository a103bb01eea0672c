"""What is measured of one tensor, on its own device: `Vitals`, and the functions that measure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from probe.sketch import Sketch
from probe.tree import is_fake

COMPARED = 4  # samples of a batch that are compared with each other


class Vitals:
    """What was measured of one tensor; of several, where a layer is called very often. Plain numbers once `settle` ran.

    `count`, `nan`, `posinf`, `neginf` and `zeros` count elements; `norm` (L2), `rms` and `largest` (absolute value) are
    of the finite ones, 0 when there is none.

    Arguments:
        head: the tensor's `Sketch`, without a histogram.
        dtype: of the tensor.
        shape: of the tensor.
        extra: further numbers, 0-dim or ``[units]`` tensors, by name: ``spread`` is the largest difference between the
            first samples of the batch, relative to the largest value; ``alive`` says of every unit whether it was ever
            unlike zero; ``subnormal`` is the share of the non-zero values that are too small for full precision.
    """

    count = nan = posinf = neginf = zeros = 0
    norm = rms = largest = 0.0

    def __init__(self, head: Sketch, dtype: torch.dtype, shape: tuple[int, ...], extra: dict[str, Any]) -> None:
        self.head: Sketch | None = head
        self.dtype = dtype
        self.shape = shape
        self.extra = extra

    def settle(self, head: Sketch) -> None:
        """Read the numbers of a sketch that is on the host."""
        self.head = None
        self.count, self.zeros = head.count, head.zeros
        self.nan, self.posinf, self.neginf = head.nan, head.posinf, head.neginf
        finite = self.count - self.nonfinite
        if finite:
            self.norm = head.norm
            self.rms = self.norm / math.sqrt(finite)
            self.largest = max(abs(head.min), abs(head.max))

    @property
    def nonfinite(self) -> int:
        """How many elements are NaN or Inf."""
        return self.nan + self.posinf + self.neginf

    def get(self, name: str) -> Any:
        """One of `extra`: a float, or a bool array ``[units]``; None where it was not measured."""
        return self.extra.get(name)


def of(tensor: torch.Tensor, extra: Mapping[str, Any], head: Sketch | None) -> Vitals | None:
    """The vitals of a tensor and its sketch; None where there are no numbers to read."""
    if head is None:
        return None
    return Vitals(head, tensor.dtype, () if tensor.is_nested else tuple(tensor.shape), dict(extra))


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether ordinary operations can read it: strided, with values, not empty, and not wrapped by torch.func."""
    strided = not tensor.is_nested and tensor.layout == torch.strided and not tensor.is_quantized
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return strided and not wrapped and tensor.device.type != "meta" and tensor.numel() > 0 and not is_fake(tensor)


def spread(tensor: torch.Tensor) -> dict[str, Any]:
    """How much the first samples differ, as a share of the largest value; nothing for a batch of one."""
    if not is_plain(tensor) or tensor.dim() == 0 or len(tensor) < 2 or tensor.is_complex():
        return {}
    few = tensor[:COMPARED]
    few = few if few.dtype == torch.float64 else few.float()  # not every device has float64
    high, low = few.amax(0), few.amin(0)
    largest = torch.maximum(high, -low).amax()
    return {"spread": (high - low).amax() / largest.clamp_min(torch.finfo(few.dtype).tiny)}


def alive(tensor: torch.Tensor, head: Sketch | None, channels_first: bool = False) -> dict[str, Any]:
    """Which units, along dimension 1 (the last one for ``[B, T, F]``), are unlike zero anywhere."""
    if not is_plain(tensor) or tensor.dim() < 2 or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return {}
    unit = tensor.dim() - 1 if tensor.dim() == 3 and not channels_first else 1
    if head is not None and head.ready and not head.zeros:
        return {"alive": torch.ones(tensor.shape[unit], dtype=torch.bool)}
    others = [dim for dim in range(tensor.dim()) if dim != unit]
    # on the CPU many times quicker than `any`, and than `abs`, which would ask for memory
    return {"alive": (tensor.amax(dim=others) != 0) | (tensor.amin(dim=others) != 0)}


def subnormal(tensor: torch.Tensor) -> dict[str, Any]:
    """Of float16 values that are not zero, the share below the smallest normal number."""
    if tensor.dtype != torch.float16 or not is_plain(tensor):
        return {}
    size = tensor.abs()
    small = (size < torch.finfo(torch.float16).smallest_normal).sum() - (size == 0).sum()
    return {"subnormal": small / (size != 0).sum().clamp_min(1)}


def finite(values: Iterable[Vitals]) -> bool:
    """Whether no element of any of the tensors is NaN or Inf."""
    return not any(each.nonfinite for each in values)


def total_norm(values: Iterable[Vitals]) -> float:
    """The L2 norm of all of the tensors together."""
    return math.hypot(*(each.norm for each in values))
