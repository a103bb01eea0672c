"""See inside a PyTorch model while it runs: activations, gradients, learning rates, and which pixels decided."""

from typing import TYPE_CHECKING, Any

from probe import schedule
from probe.capture import Capture, Embedding, Histogram, Image, Kind, ParameterKind, Scalar
from probe.core import Probe, ProbeWarning
from probe.select import NoSuchLayer
from probe.summary import dead_units, embedding, feature_maps, histogram, input_images, kernels, stats

if TYPE_CHECKING:
    from probe.board import Board

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
    "dead_units",
    "embedding",
    "feature_maps",
    "histogram",
    "input_images",
    "kernels",
    "schedule",
    "stats",
]


def __getattr__(name: str) -> Any:
    if name == "Board":  # on first use, because it imports TensorBoard
        from probe.board import Board

        globals()["Board"] = Board
        return Board
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
