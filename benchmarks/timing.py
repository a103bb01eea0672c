"""How everything here is timed: two ways of doing the same work, run in turn, compared as a ratio pair by pair."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Ratio(NamedTuple):
    """Median and quartiles of the ratio of one way's time to another's, over interleaved pairs."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        spread = f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f}, {self.pairs} pairs)"
        return f"{spread}, no difference beyond the noise" if self.low <= 1 <= self.high else spread


def compare(work: Callable[[], object], base: Callable[[], object], *, seconds: float = 3.0, least: int = 15) -> Ratio:
    """The ratio of `work`'s time to `base`'s, measured in interleaved pairs for about `seconds`.

    The order inside a pair alternates, and a run shorter than 5 ms is repeated to that length. On a GPU each run is
    bracketed by a synchronisation.
    """
    for _ in range(3):
        work()
        base()
    repeat = max(1, round(0.005 / max(_time(base, 3) / 3, 1e-9)))
    ratios: list[float] = []
    end = time.perf_counter() + seconds
    while len(ratios) < least or time.perf_counter() < end:
        if len(ratios) % 2:
            b, a = _time(base, repeat), _time(work, repeat)
        else:
            a, b = _time(work, repeat), _time(base, repeat)
        ratios.append(a / b)
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high, len(ratios))


def _time(run: Callable[[], object], repeat: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def machine() -> str:
    """One line about where this runs."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return (
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}"
    )
