"""See inside a PyTorch model while it runs: activations, gradients, learning rates, and which pixels decided."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from probe.capture import Capture, Embedding, Histogram, Image, Kind, ParameterKind, Scalar
from probe.core import Probe, ProbeWarning
from probe.select import NoSuchLayer

if TYPE_CHECKING:
    from probe import cam, schedule
    from probe.board import Board
    from probe.summary import dead_units, embedding, feature_maps, histogram, input_images, kernels, stats

__version__ = "0.1.0"

__all__ = [
    "Board",
    "Capture",
    "Embedding",
    "Histogram",
    "Image",
    "Kind",
    "NoSuchLayer",
    "ParameterKind",
    "Probe",
    "ProbeWarning",
    "Scalar",
    "cam",
    "dead_units",
    "embedding",
    "feature_maps",
    "histogram",
    "input_images",
    "kernels",
    "schedule",
    "stats",
]


_LATER = {
    "Board": "probe.board",
    **dict.fromkeys(
        ("dead_units", "embedding", "feature_maps", "histogram", "input_images", "kernels", "stats"), "probe.summary"
    ),
}


def __getattr__(name: str) -> Any:
    """What needs NumPy, TensorBoard or torchvision is imported when it is first asked for."""
    if name in _LATER:
        value = getattr(importlib.import_module(_LATER[name]), name)
    elif name in ("cam", "schedule"):
        value = importlib.import_module(f"probe.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
