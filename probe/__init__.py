"""See inside a PyTorch model while it runs: activations, gradients, learning rates, and which pixels decided."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe import cam, health, schedule
    from probe.board import Board
    from probe.capture import Capture, Embedding, Histogram, Image, Kind, ParameterKind, Scalar, Statistics
    from probe.core import Probe, ProbeWarning
    from probe.select import NoSuchLayer
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
    "Statistics",
    "cam",
    "dead_units",
    "embedding",
    "feature_maps",
    "health",
    "histogram",
    "input_images",
    "kernels",
    "schedule",
    "stats",
]


_WHERE = {
    "Board": "probe.board",
    "NoSuchLayer": "probe.select",
    **dict.fromkeys(("Probe", "ProbeWarning"), "probe.core"),
    **dict.fromkeys(
        ("Capture", "Embedding", "Histogram", "Image", "Kind", "ParameterKind", "Scalar", "Statistics"), "probe.capture"
    ),
    **dict.fromkeys(
        ("dead_units", "embedding", "feature_maps", "histogram", "input_images", "kernels", "stats"), "probe.summary"
    ),
}


def __getattr__(name: str) -> Any:
    """Each name is imported when it is first asked for: ``python -m probe run`` must not import torch before the script
    does, and what needs NumPy or TensorBoard would make ``import probe`` slow.
    """
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
    elif name in ("cam", "health", "schedule"):
        value = importlib.import_module(f"probe.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
