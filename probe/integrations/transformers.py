"""`ProbeCallback` for the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from probe.capture import Summary
from probe.core import Probe
from probe.integrations.training import Training

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(f"this needs transformers ({error}): pip install transformers accelerate") from error


class ProbeCallback(TrainerCallback):  # type: ignore[misc]  # of type Any where the library is not installed
    """Logs a training of ``transformers.Trainer``: ``callbacks=[ProbeCallback("runs/bert", stats, every=100)]``.

    A probe is attached from the beginning of ``train()`` to its end; its steps are the trainer's global steps. Whatever
    an evaluation shows goes to the sub-run ``eval``.

    Arguments:
        writer: a `Board` or ``SummaryWriter``, or the folder of a run.
        summaries: as of ``Probe.log``.
        options: as of ``Probe.log``: ``every``, ``layers``, ``kinds``, ``on_error``, ``per_rank``.
    """

    probe: Probe | None = None
    """Of the last training."""

    def __init__(self, writer: Any, *summaries: Summary, **options: Any) -> None:
        self._training = Training(writer, summaries, options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Attach."""
        scaler = getattr(objects["optimizer"], "scaler", None)  # of accelerate's wrapper, under float16
        self.probe = self._training.begin(objects["model"], objects["optimizer"], scaler, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Detach, and write what is open."""
        self.close()

    def close(self) -> None:
        """The same, after an exception left ``train()``, of which the trainer tells no callback."""
        self._training.end()
