"""`ProbeCallback` for the Trainer of Lightning."""

from __future__ import annotations

import sys
from typing import Any

from probe.capture import Summary
from probe.core import Probe
from probe.integrations.training import Training

try:
    if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:  # the same library under an older name
        from pytorch_lightning import Callback
    else:
        from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(f"this needs Lightning ({error}): pip install lightning") from error


class ProbeCallback(Callback):  # type: ignore[misc]  # of type Any where the library is not installed
    """Logs a training of a Lightning ``Trainer``: ``callbacks=[ProbeCallback("runs/gan", stats, every=100)]``.

    A probe is attached from the beginning of the training in ``fit()`` to its end, also where that is an exception. Its
    steps are those of the first optimizer. Whatever a validation shows goes to the sub-run ``eval``.

    Arguments:
        writer: a `Board` or ``SummaryWriter``, or the folder of a run.
        summaries: as of ``Probe.log``.
        options: as of ``Probe.log``: ``every``, ``layers``, ``kinds``, ``on_error``, ``per_rank``.
    """

    probe: Probe | None = None
    """Of the last training."""

    def __init__(self, writer: Any, *summaries: Summary, **options: Any) -> None:
        self._training = Training(writer, summaries, options)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach."""
        steps = trainer.global_step // max(1, len(trainer.optimizers))  # it counts the steps of all optimizers
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.probe = self._training.begin(pl_module, trainer.optimizers, scaler, steps)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach, and write what is open."""
        self._training.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same; with several ranks the others are told."""
        self._training.end(exception)
