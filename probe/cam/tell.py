"""Warn of maps that show nothing, and say why."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from probe.cam.ingredients import layout_of
from probe.cam.run import Run
from probe.cam.spot import Spot
from probe.cam.state import warn


def tell(maps: Tensor, method: str, run: Run, spot: Spot | None, gradient: Tensor | None) -> None:
    """Warn of samples whose map is not finite, nowhere positive, or zero everywhere.

    Arguments:
        maps: ``[B, *spatial]``.
        method: its name.
        run, spot, gradient: what they were made from, as far as the method has them.
    """
    low, high = torch.stack(torch.aminmax(maps.flatten(1), dim=1)).tolist()  # one wait for the device
    ranges = list(enumerate(zip(low, high, strict=True)))
    broken = [i for i, (a, b) in ranges if not (math.isfinite(a) and math.isfinite(b))]
    dark = [i for i, (a, b) in ranges if a < 0 and b <= 0]
    blank = [i for i, (a, b) in ranges if a == b == 0]
    if broken:
        warn(f"the map of sample {_some(broken)} is not finite: look for NaN or Inf in the model's activations")
    if dark:
        warn(
            f"the {method} map of sample {_some(dark)} is nowhere positive and would be drawn blank: all it shows is "
            "evidence against the target. Take another target or layer, or draw -maps"
        )
    if blank and spot is not None:
        _tell_blank(blank, method, run, spot, gradient)


def _tell_blank(blank: list[int], method: str, run: Run, spot: Spot, gradient: Tensor | None) -> None:
    flat: list[int] = []
    if gradient is not None:
        any_gradient = bool(gradient.any())
        layout = layout_of(run, spot)
        front = layout.channels_first(gradient.detach()).flatten(1)
        zero = (front[blank] == 0).all(1).tolist()
        flat = [i for i, each in zip(blank, zero, strict=True) if each]
    if flat:
        behind_attention = layout.kind == "tokens" and any_gradient
        cause = (
            "from here on only the tokens in front feed the output: choose the first norm of the last block"
            if behind_attention
            else "the score is flat there (weights that are zero, dead ReLUs, a saturated probability): choose another "
            "layer or target"
        )
        warn(f"the gradient at layer {spot.name!r} is zero for sample {_some(flat)}, and so is the map; {cause}")
    rest = [i for i in blank if i not in flat]
    if rest:
        warn(
            f"the {method} map of sample {_some(rest)} is zero everywhere: all of layer {spot.name!r} is zero (dead "
            "ReLUs), or nothing in it speaks for the target; choose another layer or target"
        )


def _some(samples: Sequence[int]) -> str:
    shown = ", ".join(map(str, samples[:5]))
    return shown if len(samples) <= 5 else f"{shown} and {len(samples) - 5} more"
