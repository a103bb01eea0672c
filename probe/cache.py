"""`StepCache`: the sketches and updates of a step's tensors, made once, whoever asks."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from probe import sketch
from probe.calls import Call
from probe.capture import Kind
from probe.graph import version
from probe.sketch import Sketch
from probe.tree import local

FLOWING = 16
"""Of so many activations and gradients the sketches are remembered, the latest ones."""

_FORWARD = Kind.INPUT | Kind.OUTPUT

Made = TypeVar("Made")


class StepCache:
    """What the receivers of a probe would else compute each for itself; of the tensors it holds none but updates.

    A sketch is found again by the very tensor that it was made of, as long as nobody has written to that. Where torch
    counts no writes (inference mode, ``vmap``) nothing is found again. Nor is that of an activation anywhere but in the
    hook where it was made: ``x.data.clamp_(0)`` between two layers is not counted either.
    """

    def __init__(self) -> None:
        self.users = 0  # receivers that share it: of what flows, one alone asks for each sketch once
        self.binned = False  # whether a sketch of this step's activations and gradients is to have its histogram anyway
        self._pools = {binned: sketch.Pool(histogram=binned) for binned in (True, False)}
        self._flowing: Known[Sketch] = Known(FLOWING)
        self._parameters: Known[Sketch] = Known()
        self._copies: Known[weakref.ref[Tensor]] = Known()
        self._updates: dict[int, Tensor] = {}

    def sketch(
        self, tensor: Tensor, place: tuple[Call, Kind], copy: Tensor | None = None, *, histogram: bool
    ) -> Sketch | None:
        """The sketch of an activation or a gradient; small ones are read together, when one of them is.

        Arguments:
            tensor: by which it is known.
            place: where it flows.
            copy: the same values in memory that nobody writes to, where there is one.
            histogram: whether there is to be one.
        """
        value, fixed = (tensor, False) if copy is None else (copy, True)
        if self.users < 2:
            return self._pools[histogram].of(value, fixed=fixed)
        call, kind = place
        hook = (weakref.ref(call), kind) if kind in _FORWARD else None
        made = self._flowing.find(tensor, hook)
        if made is None or (histogram and not made.binned):
            made = self._pools[histogram or self.binned].of(value, fixed=fixed)
            self._flowing.keep(tensor, made, hook)
        return made if histogram or made is None else made.moments()

    def fresh(self, value: Tensor) -> Sketch | None:
        """The sketch, with its histogram, of a value that nobody writes to, and that is not to be found again."""
        return self._pools[True].of(value, fixed=True)

    def sketches(
        self, tensors: Sequence[Tensor], values: Sequence[Tensor], *, histogram: bool | None
    ) -> list[Sketch | None]:
        """The sketches of parameters, their gradients or updates, those that are not known in few launches.

        Arguments:
            tensors: by which they are known.
            values: what there is to read of each.
            histogram: as of `sketch`; None: with one where it is known already.
        """
        found = [self._parameters.find(tensor) for tensor in tensors]
        new = [i for i, made in enumerate(found) if made is None or (histogram and not made.binned)]
        if new:
            more = sketch.of_many([values[i] for i in new], histogram=bool(histogram))
            for i, made in zip(new, more, strict=True):
                found[i] = made
                self._parameters.keep(tensors[i], made)
        return found if histogram is not False else [made and made.moments() for made in found]

    def copy(self, parameter: Tensor) -> Tensor:
        """This rank's values of a parameter as they are now, not to be written to; the same as long as one is held."""
        held = self._copies.find(parameter)
        copied = None if held is None else held()
        if copied is None:
            # a clone, not copy-on-write: the parameter's own memory must stay where it is
            copied = local(parameter.detach()).clone()
            self._updates.clear()  # of the optimizer before
            self._copies.keep(parameter, weakref.ref(copied))
        return copied

    def update(self, parameter: Tensor, before: Tensor) -> Tensor:
        """What was added to a parameter since `copy` gave `before`: that very tensor, which becomes it.

        It is held until the next copy, or the step's end.
        """
        if id(before) not in self._updates:
            torch.sub(local(parameter.detach()), before, out=before)  # fresh memory would cost as much again
            self._updates[id(before)] = before
            self._copies.pop(id(parameter), None)
        return before

    def forget(self) -> None:
        """Let go of everything: users say so at the end of a step that they observed."""
        self.binned = False
        for each in (self._flowing, self._parameters, self._copies, self._updates):
            each.clear()


class Known(OrderedDict[int, tuple[weakref.ref[Tensor], int, Any, Made | None]], Generic[Made]):
    """What was made of the very tensors, until somebody writes to them.

    Arguments:
        most: so many are kept, the latest ones; None for all.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self._most = most

    def find(self, tensor: Tensor, place: Any = None) -> Made | None:
        """What was kept of the tensor at that place; None where it was written to since, or that can't be known."""
        entry = self.get(id(tensor))
        if entry is None or entry[0]() is not tensor or entry[1] != version(tensor) or entry[1] < 0:
            return None
        return entry[3] if entry[2] == place else None

    def keep(self, tensor: Tensor, made: Made | None, place: Any = None) -> None:
        """Remember what was made of the tensor."""
        self[id(tensor)] = weakref.ref(tensor), version(tensor), place, made
        if self._most is not None and len(self) > self._most:
            self.popitem(last=False)
