"""Reading event files back, through TensorBoard's own classes."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

KINDS = ("scalars", "histograms", "images", "audio", "tensors", "compressedHistograms")


def read(folder: Any) -> EventAccumulator:
    """What TensorBoard knows of a run: nothing sampled, nothing left out."""
    return EventAccumulator(str(folder), size_guidance=dict.fromkeys(KINDS, 0)).Reload()


def events(folder: Any) -> list[Any]:
    """All `Event` protos of a folder with values, in the order of files and records."""
    files = sorted(path for path in Path(folder).iterdir() if "tfevents" in path.name)
    found = [event for path in files for event in LegacyEventFileLoader(os.fspath(path)).Load()]
    return [event for event in found if event.HasField("summary")]


def steps(folder: Any, tag: str) -> list[int]:
    """The steps at which a tag has a value, in the order of files and records."""
    return [event.step for event in events(folder) for value in event.summary.value if value.tag == tag]


def scalars(folder: Any, tag: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in read(folder).Scalars(tag)]


def histogram(folder: Any, tag: str) -> Any:
    """The last histogram of a tag."""
    return read(folder).Histograms(tag)[-1].histogram_value


def frames(folder: Any, tag: str) -> list[np.ndarray[Any, Any]]:
    """The last picture of a tag, decoded: its frames as RGB ``[H, W, 3]``."""
    picture = Image.open(io.BytesIO(read(folder).Images(tag)[-1].encoded_image_string))
    return [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]


def pixels(folder: Any, tag: str) -> np.ndarray[Any, Any]:
    (frame,) = frames(folder, tag)
    return frame
