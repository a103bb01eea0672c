"""Plain data: what a hook delivers (`Capture`) and what a summary makes of it (`Scalar`, `Histogram`, `Image`)."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_args

import torch


class Kind(enum.Flag):
    """Which value of a module's call a capture holds, one per hook function of torch. Members combine with ``|``."""

    INPUT = enum.auto()
    """What went in (``Module.register_forward_pre_hook``)."""
    OUTPUT = enum.auto()
    """What came out (``Module.register_forward_hook``)."""
    GRAD_OUTPUT = enum.auto()
    """Gradient of the loss at the output (``Tensor.register_hook``)."""
    GRAD_INPUT = enum.auto()
    """Gradient at the input, this module's share of it (module backward hook)."""

    @classmethod
    def all(cls) -> Kind:
        """The union of the four kinds."""
        return cls.INPUT | cls.OUTPUT | cls.GRAD_OUTPUT | cls.GRAD_INPUT

    @property
    def label(self) -> str:
        """The lower-case name, as tags and records spell it: ``"grad_output"``."""
        return "|".join(str(member.name).lower() for member in self)


class ParameterKind(enum.Flag):
    """What a capture of a parameter holds; such captures are made around ``optimizer.step()``."""

    VALUE = enum.auto()
    """The parameter itself, as it was during the step's forward."""
    GRAD = enum.auto()
    """Its gradient as the update uses it: accumulated, averaged, unscaled, clipped."""
    UPDATE = enum.auto()
    """What the update added to it."""

    @property
    def label(self) -> str:
        """The lower-case name, as tags spell it: ``"value"``."""
        return "|".join(str(member.name).lower() for member in self)


@dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """One module object of a model.

    Arguments:
        names: every dotted name it goes by, the first registered one first; ``("",)`` is the root.
        module: the module itself.
    """

    names: tuple[str, ...]
    module: torch.nn.Module

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def module_type(self) -> type:
        """The module's class; where ``fully_shard`` put a class of its own in its place, the user's."""
        found = type(self.module)
        fsdp = sys.modules.get("torch.distributed.fsdp")
        return found.__mro__[2] if fsdp is not None and isinstance(self.module, fsdp.FSDPModule) else found


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """One detached tensor that passed a hook, and where it came from.

    Arguments:
        name: the layer's dotted name in the user's model, or the parameter's; ``""`` is the root.
        kind: exactly one `Kind`, or one `ParameterKind`.
        value: a detached tensor, in the dtype and on the device it flowed with.
        step: the probe's step count when it was captured.
        call: which call of the pass this is, from 0 (a shared or recurrent module has several).
        path: where in a nested value the tensor sits: ``""``, ``"[0]"``, ``".logits"``, ``"[0].hidden"``.
        module_type: the class of the module (of a parameter: of the module that owns it).
        groups: of a convolution whose parameter this is.
    """

    name: str
    kind: Kind | ParameterKind
    value: torch.Tensor
    step: int = 0
    call: int = 0
    path: str = ""
    module_type: type = torch.nn.Module
    groups: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """One number to plot. `value` may be a 0-dim tensor on any device: it is not waited for."""

    tag: str
    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Some numbers of a tensor to plot, a curve each, under their names.

    Arguments:
        value: a tensor of any shape, or a `probe.sketch.Sketch`, on any device: it is not waited for. What shares a
            place and a step is added up, so that the numbers of micro-batches are those of the batch.
        names: of ``"mean", "std", "min", "max", "norm", "rms", "sum", "count", "zeros", "nan", "inf"``; zeros is a
            share (0 to 1), nan and inf are counts.
        tag: begins the name of each curve, where it is not empty.
    """

    value: Any
    names: tuple[str, ...] = ("mean", "std", "min", "max", "norm", "zeros", "nan", "inf")
    tag: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """A distribution to plot. `value` is a tensor of any shape, or a `probe.sketch.Sketch`."""

    tag: str
    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A picture to show: a uint8 or float (0..1) tensor ``[C, H, W]`` with 1 or 3 channels."""

    tag: str
    value: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """Points for the projector: a float tensor ``[N, F]``, and a label for each."""

    tag: str
    value: torch.Tensor
    labels: list[Any] | None = None


Shown = Scalar | Statistics | Histogram | Image | Embedding
"""What a summary yields."""


def nothing_to_show(what: str) -> TypeError:
    """The error that says what a summary may yield, and that this is none of it."""
    return TypeError(f"a summary yields {', '.join(kind.__name__ for kind in get_args(Shown))}, not {what}")


Summary = Callable[[Capture], Iterable[Shown] | None]
"""The whole extension interface: a function of one capture that yields things to show."""
