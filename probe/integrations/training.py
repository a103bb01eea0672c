"""`Training`: a probe and its log, for as long as somebody else's loop trains."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from torch import nn

from probe.capture import Summary
from probe.core import Probe


class Training:
    """Attaches a probe that logs when a training begins, and takes it off when that ends.

    Arguments:
        writer: a `Board` or ``SummaryWriter``, which is not closed here; or the folder of a run, for a `Board` that
            lasts as long as the training.
        summaries, options: as ``Probe.log`` takes them.
    """

    def __init__(self, writer: Any, summaries: tuple[Summary, ...], options: dict[str, Any]) -> None:
        self._writer = writer
        self._summaries = summaries
        self._options = options
        self._stack = contextlib.ExitStack()

    def begin(self, model: nn.Module, optimizer: Any, scaler: Any = None, steps: int = 0) -> Probe:
        """A probe that is attached and logs, after `steps` steps of an earlier part of the training."""
        self.end()
        with contextlib.ExitStack() as stack:
            writer = self._writer
            if isinstance(writer, (str, os.PathLike)):
                from probe.board import Board

                writer = stack.enter_context(Board(writer, purge_step=steps))
            probe = Probe(model, optimizer=optimizer, scaler=scaler)
            probe.steps = steps
            probe.log(writer, *self._summaries, **self._options)
            stack.enter_context(probe)
            self._stack = stack.pop_all()
        return probe

    def end(self, error: BaseException | None = None) -> None:
        """Take it off and write what is open; `error`: what ended the training, if something did."""
        stack, self._stack = self._stack, contextlib.ExitStack()
        stack.__exit__(type(error) if error is not None else None, error, getattr(error, "__traceback__", None))
