"""Leave the model as it was while it is run: buffers, random numbers, gradient mode, autocast's cache."""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from probe import select
from probe.capture import Layer

_HERE = os.path.dirname(__file__)


_muted: contextvars.ContextVar[bool] = contextvars.ContextVar("muted", default=False)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """`warn` says nothing inside; unlike ``warnings.catch_warnings``, other threads hear theirs."""
    token = _muted.set(True)
    try:
        yield
    finally:
        _muted.reset(token)


def warn(message: str) -> None:
    """Warn at the line outside this package that led here."""
    if _muted.get():
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and os.path.dirname(frame.f_code.co_filename) == _HERE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def warn_if_training(every: Iterable[Layer], what: str) -> None:
    """One warning if any of a model's layers is in train mode."""
    training = next((layer for layer in every if layer.module.training), None)
    if training is not None:
        warn(
            f"{what} a model in train mode ({training.name or 'the model'}): dropout draws at random and batch norm "
            "mixes the samples; call model.eval() first unless that is what you want"
        )


@contextlib.contextmanager
def untouched(model: nn.Module, tensors: list[Tensor]) -> Iterator[list[nn.Module]]:
    """Run the model inside, and find its buffers and all random number generators as they were, whatever was raised.

    As the context's value, every module of it.

    Inside there is no graph and no inference mode, and autocast does not cache: weights that it cast under ``no_grad``
    would stay in the cache of the caller's autocast block and have no gradient there.
    """
    cached, modules = torch.is_autocast_cache_enabled(), select.modules(model)
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(_cuda_devices(model, tensors)):
        kept = [
            (module, name, buffer, buffer.clone(), _version(buffer))
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        torch.set_autocast_cache_enabled(False)
        try:
            yield modules
        finally:
            torch.set_autocast_cache_enabled(cached)
            for module, name, buffer, value, version in kept:
                module._buffers[name] = buffer
                if module.training or version is None or buffer._version != version:
                    _write(buffer, value)


def _write(buffer: Tensor, value: Tensor) -> None:
    """Write the old value back without a trace: batch norm updates its statistics without counting a version, and a
    version more would make the caller's backward pass refuse them."""
    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
        buffer.data.copy_(value)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _cuda_devices(model: nn.Module, tensors: list[Tensor]) -> list[int]:
    if not torch.cuda.is_initialized():
        return []
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers(), *tensors)}
    return sorted({device.index or 0 for device in devices if device.type == "cuda"})
