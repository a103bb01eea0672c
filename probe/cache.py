"""`StepCache`: the sketches and updates of a step's tensors, made once, whoever asks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from probe import sketch
from probe.calls import Call, Receiver
from probe.capture import Kind
from probe.graph import version
from probe.sketch import Sketch
from probe.tree import local


class StepCache(Receiver):
    """What the receivers of a probe would else compute each for itself; of the tensors it holds none but updates.

    A sketch is found again by the very tensor that it was made of, as long as nobody has written to that. Where torch
    counts no writes (inference mode, ``vmap``) nothing is found again. Nor is that of an activation anywhere but in the
    hook where it was made: ``x.data.clamp_(0)`` between two layers is not counted either.
    """

    def __init__(self) -> None:
        self.binned = False  # whether a sketch of this step's activations and gradients is to have its histogram anyway
        self._pools = {binned: sketch.Pool(histogram=binned) for binned in (True, False)}
        self._sketches: dict[int, tuple[weakref.ref[Tensor], int, Any, Sketch | None]] = {}
        self._copies: dict[int, tuple[weakref.ref[Tensor], int, None, weakref.ref[Tensor]]] = {}
        self._updates: dict[int, tuple[weakref.ref[Tensor], int, None, Tensor]] = {}

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
        call, kind = place
        hook = (weakref.ref(call), kind) if kind in Kind.INPUT | Kind.OUTPUT else None
        made: Sketch | None = _find(self._sketches, tensor, hook)
        if made is None or (histogram and not made.binned):
            made = self.fresh(tensor if copy is None else copy, fixed=copy is not None, histogram=histogram)
            self._sketches[id(tensor)] = weakref.ref(tensor), version(tensor), hook, made
        return made if histogram or made is None else made.moments()

    def fresh(self, value: Tensor, *, fixed: bool, histogram: bool) -> Sketch | None:
        """The sketch of what is not to be found again; `fixed`: nobody writes to it."""
        return self._pools[histogram or self.binned].of(value, fixed=fixed)

    def sketches(self, tensors: Sequence[Tensor], values: Sequence[Tensor], *, histogram: bool) -> list[Sketch | None]:
        """The sketches of many tensors, those that are not known in few launches.

        Arguments:
            tensors: by which they are known.
            values: what there is to read of each.
            histogram: as of `sketch`.
        """
        found = [_find(self._sketches, tensor) for tensor in tensors]
        new = [i for i, made in enumerate(found) if made is None or (histogram and not made.binned)]
        for i, made in zip(new, sketch.of_many([values[i] for i in new], histogram=histogram), strict=True):
            found[i] = made
            self._sketches[id(tensors[i])] = weakref.ref(tensors[i]), version(tensors[i]), None, made
        return [made if histogram or made is None else made.moments() for made in found]

    def copy(self, parameter: Tensor) -> Tensor:
        """This rank's values of a parameter as they are now, not to be written to; the same as long as one is held."""
        held = _find(self._copies, parameter)
        copied: Tensor | None = None if held is None else held()
        if copied is None:
            # a clone, not copy-on-write: the parameter's own memory must stay where it is
            copied = local(parameter.detach()).clone()
            self._copies[id(parameter)] = weakref.ref(parameter), version(parameter), None, weakref.ref(copied)
        return copied

    def update(self, parameter: Tensor, before: Tensor) -> Tensor:
        """What was added to a parameter since `copy` gave `before`; held until the next optimizer or step."""
        update: Tensor | None = _find(self._updates, parameter)
        if update is None:
            update = local(parameter.detach()) - before
            self._updates[id(parameter)] = weakref.ref(parameter), version(parameter), None, update
        return update

    def active(self, step: int) -> bool:
        """It wants nothing."""
        return False

    def before_step(self, optimizer: Any, step: int) -> None:
        """Let go of the updates of another optimizer."""
        self._updates.clear()

    def end_step(self, step: int, *, stepped: bool) -> None:
        """Let go of everything."""
        self.binned = False
        self._sketches.clear()
        self._copies.clear()
        self._updates.clear()


def _find(known: dict[int, tuple[weakref.ref[Tensor], int, Any, Any]], tensor: Tensor, hook: Any = None) -> Any:
    """What is known of the very tensor, unless somebody wrote to it since."""
    entry = known.get(id(tensor))
    if entry is None or entry[0]() is not tensor or entry[1] != version(tensor) or entry[1] < 0 or entry[2] != hook:
        return None
    return entry[3]
