"""How everything here is timed: two ways of doing the same work, run in turn, compared as a ratio pair by pair."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Ratio(NamedTuple):
    """Median and quartiles of the ratio of one way's time to another's, over interleaved pairs.

    `beyond` is the median of the differences, in seconds a run: what one way takes more than the other.
    """

    median: float
    low: float
    high: float
    pairs: int
    beyond: float = 0.0

    @property
    def differs(self) -> bool:
        """Whether the ratio is told from 1: the quartiles lie on one side of it."""
        return not self.low <= 1 <= self.high

    def __str__(self) -> str:
        spread = f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f}, {self.pairs} pairs)"
        return spread if self.differs else f"{spread}, no difference beyond the noise"


def steady(threads: int) -> None:
    """Have the time of a run depend on nothing that ran before it: the threads of the CPU, and where memory comes from.

    glibc hands freed memory back to the kernel, or keeps it, by the sizes of what the process ever freed. A step that
    holds its outputs then pays for fresh pages or does not: a quarter of resnet18's forward, by chance.
    """
    torch.set_num_threads(threads)
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def returning() -> None:
    """The contrary, for peaks of memory: freed blocks go back to the kernel at once, so that what is resident is live.

    Else a peak depends, by a third, on what glibc keeps between blocks that are in use.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_MAX, 2**16)
        mallopt(_MMAP_THRESHOLD, 2**16)


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of malloc.h


def compare(work: Callable[[], object], base: Callable[[], object], *, seconds: float = 3.0, least: int = 15) -> Ratio:
    """The ratio of `work`'s time to `base`'s, measured in interleaved pairs for about `seconds`, `least` pairs or more.

    The two run strictly in turn, a run shorter than 5 ms repeated to that length, so that each begins with the caches
    as the other left them. Were the order to alternate, every second run would follow one of its own kind, and be up to
    40 % faster where a model fits into a cache: the median would fall anywhere between two clusters of ratios. Both are
    warmed up first, three times where that is quick. On a GPU a run begins on an idle device and ends when the last
    kernel of its stream has: CUDA events tell the time, so that neither the launches nor the kernels are left out.
    """
    start = time.perf_counter()
    for _ in range(3):
        work()
        base()
        if time.perf_counter() - start > seconds:
            break
    repeat = max(1, round(0.005 / max(_time(base, 3) / 3, 1e-9))) if time.perf_counter() - start < seconds else 1
    ratios: list[float] = []
    beyond: list[float] = []
    end = time.perf_counter() + seconds
    while len(ratios) < max(least, 2) or time.perf_counter() < end:
        a, b = _time(work, repeat), _time(base, repeat)
        ratios.append(a / b)
        beyond.append((a - b) / repeat)
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high, len(ratios), statistics.median(beyond))


def seconds_of(run: Callable[[], object], *, seconds: float = 1.0) -> float:
    """The median time of one run, in seconds: for limits of a machine, never to compare two ways with."""
    for _ in range(3):
        run()
    repeat = max(1, round(0.005 / max(_time(run, 3) / 3, 1e-9)))
    times = [_time(run, repeat)]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(_time(run, repeat))
    return statistics.median(times) / repeat


def _time(run: Callable[[], object], repeat: int) -> float:
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeat):
        run()
    end.record()  # by the host when it has done its part, reached by the device when that has done its own
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def environment(device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions, as they are kept beside results."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["clocks"] = _clocks()
    return found


def machine(device: str) -> str:
    """One line about where this runs."""
    found = environment(device)
    clocks = f" ({found['clocks']})" if found.get("clocks") else ""
    name = f"{found['gpu']}{clocks}" if device == "cuda" else found["cpu"]
    versions = f"torch {found['torch']}, Python {found['python']}, {found['system']}"
    return f"{name}, {found['threads']} of {found['cores']} cores, {versions}"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _clocks() -> str | None:
    """What nvidia-smi says of the clocks now, and of their limits; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = {"clocks.sm": "SM", "clocks.max.sm": "at most", "clocks.mem": "memory"}
    index = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id=GPU-{index}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    values = done.stdout.strip().split(", ")
    if done.returncode or len(values) != len(fields):
        return None
    return ", ".join(f"{name} {value}" for name, value in zip(fields.values(), values, strict=True))
