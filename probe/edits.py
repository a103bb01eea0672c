"""Changing what flows: the handle of an edit, and the check of what the user's function returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from probe.capture import Kind, Layer
from probe.tree import leaves


class Edit:
    """The handle of one edit: ``remove()`` takes it back; as a context manager it lasts for the block."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Take the edit back. Again is harmless."""
        undo, self._undo = self._undo, _nothing
        undo()

    def __enter__(self) -> Edit:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()


def _nothing() -> None:
    pass


def checked(function: Callable[[Any], Any], layer: Layer, kind: Kind, same_shape: bool) -> Callable[[Any], Any]:
    """The user's edit, with errors that name the layer."""
    where = f"the edit of {layer.name!r} on {kind.label}"

    def edit(value: Any) -> Any:
        before = {path: (tuple(t.shape), t.dtype) for path, t in leaves(value)}
        try:
            new = function(value)
        except Exception as error:
            error.add_note(f"raised by {where}")
            raise
        if new is None and value is not None:
            raise TypeError(f"{where} returned None; return the value that is to flow on")
        if not same_shape:
            return new
        after = {path: (tuple(t.shape), t.dtype) for path, t in leaves(new)}
        if before.keys() != after.keys():
            raise TypeError(f"{where} returned tensors at {list(after)}, but the value has them at {list(before)}")
        for path, (shape, dtype) in before.items():
            if after[path] != (shape, dtype):
                raise ValueError(
                    f"{where} returned {list(after[path][0])} {after[path][1]}{f' at {path}' if path else ''}, "
                    f"but {list(shape)} {dtype} flows there; return the same shape and dtype"
                )
        return new

    return edit
