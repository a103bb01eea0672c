"""See inside a PyTorch model while it runs: activations, gradients, learning rates, and which pixels decided."""

from probe.capture import Capture, Histogram, Image, Kind, Scalar
from probe.core import Probe, ProbeWarning
from probe.select import NoSuchLayer

__version__ = "0.1.0"

__all__ = ["Capture", "Histogram", "Image", "Kind", "NoSuchLayer", "Probe", "ProbeWarning", "Scalar"]
