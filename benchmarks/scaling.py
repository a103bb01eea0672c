"""Does the cost grow faster than the work? ``python -m benchmarks.scaling``.

Four sweeps: the number of layers, the number of elements, the calls of one shared module in a pass, and the steps of a
run. For the first three the cost is the time beyond the bare model's, by interleaved pairs. *Growth* is its exponent in
the upper half of the sizes, where the bare model's own is 1: the slope of log(ratio - 1) over log(size), and 1. So 1
means that the cost grows as the work does, and less is less. For the steps it is the memory that the process and
Python's objects hold, and the time a step takes, late in the run against early.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import command
from benchmarks.command import Results, progress
from benchmarks.timing import Ratio, compare, seconds_of
from benchmarks.work import Work
from probe import Board, Kind, Probe, histogram, sketch, stats

LINEAR = 1.15
"""The exponent up to which growth counts as linear: timing alone moves it by a tenth."""


class Shared(nn.Module):
    """One layer, called again and again."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.calls = calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.calls):
            x = self.layer(x).tanh()
        return x


class Wide(nn.Module):
    """One layer whose output has as many elements as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.layer = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * self.scale)


def main(words: Sequence[str] | None = None) -> None:
    parser = command.arguments(__doc__)
    parser.add_argument("--steps", type=command.positive, help="of the longest run; 10000 by default")
    options = parser.parse_args(words)
    command.start(options)
    quick, device = options.quick, options.device
    seconds = 0.2 if quick else 1.0
    layers = (10, 30, 100, 300) if quick else (10, 30, 100, 300, 1000)
    elements = (10**3, 10**4, 10**5, 10**6, 10**7) + (() if quick else (10**8,))
    sweeps: list[tuple[str, str, Callable[[int], Work], Sequence[int]]] = [
        *(("layers", how, lambda n: _deep(n, device), layers) for how in ("output", "all four", "stats+histogram")),
        *(("calls", how, lambda n: _shared(n, device), layers) for how in ("output", "all four", "stats+histogram")),
        ("elements", "stats+histogram", lambda n: _wide(n, device), elements),
    ]
    steps = options.steps or (600 if quick else 10_000)
    with Results("scaling", options, device=device, steps=steps) as found:
        for what, how, build, sizes in progress(sweeps, len(sweeps)):
            sweep(found, what, how, build, sizes, seconds)
        sketches(found, device, elements, seconds)
        for how in ("output", "all four", "stats+histogram"):
            long_run(found, how, _deep(10, device), steps)


# -- what grows --------------------------------------------------------------------------------------------------------


def _deep(layers: int, device: str) -> Work:
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(layers)]).to(device)
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    return _training(model, torch.randn(8, 16, device=device))


def _shared(calls: int, device: str) -> Work:
    return _training(Shared(calls).to(device), torch.randn(8, 64, device=device))


def _wide(size: int, device: str) -> Work:
    return _training(Wide().to(device), torch.randn(size, device=device))


def _training(model: nn.Module, x: torch.Tensor) -> Work:
    return Work(model, x, torch.optim.SGD(model.parameters(), lr=1e-6))


@contextlib.contextmanager
def _attached(how: str, work: Work) -> Any:
    """A step of `work` under a probe; for logs one that ends when everything is written."""
    if how == "stats+histogram":
        with tempfile.TemporaryDirectory() as folder, Board(folder) as board, Probe(work.model) as p:
            p.log(board, stats, histogram, kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT)

            def step() -> None:
                work.step()
                p.step()
                board.flush()

            yield step
    else:
        with Probe(work.model, kinds=Kind.OUTPUT if how == "output" else Kind.all()):
            yield work.step


# -- sweeps ------------------------------------------------------------------------------------------------------------


def sweep(
    found: Results, what: str, how: str, build: Callable[[int], Work], sizes: Sequence[int], seconds: float
) -> None:
    """One row a size, and one with the exponent."""
    costs: dict[int, float] = {}
    for size in sizes:
        row: dict[str, Any] = {"sweep": what, "how": how, "size": size}
        try:
            work = build(size)
            bare = work.twin()
            with _attached(how, work) as step:
                ratio = compare(step, bare.step, seconds=seconds, least=5)
        except (RuntimeError, MemoryError) as error:
            if not command.out_of_memory(error):
                raise
            found.add(f"{what:9} {how:16} {size:>11,}  too little memory", **row, failed="too little memory")
            break
        costs[size] = (ratio.median - 1) * size
        _one(found, row, ratio)
    _growth(found, what, how, costs)


def _one(found: Results, row: dict[str, Any], ratio: Ratio) -> None:
    each = 1e9 * ratio.beyond / row["size"]
    text = (
        f"{row['sweep']:9} {row['how']:16} {row['size']:>11,}  {each:12.3f} ns each beyond bare, {ratio.median:.2f} x"
    )
    found.add(text, **row, ratio=ratio, nanoseconds=each)


def _growth(found: Results, what: str, how: str, costs: dict[int, float]) -> None:
    upper = {size: cost for size, cost in list(costs.items())[len(costs) // 2 - 1 :] if cost > 0}
    if len(upper) < 2:
        found.add(
            f"{what:9} {how:16} growth not known: the cost is lost in the noise", sweep=what, how=how, growth=None
        )
        return
    growth = exponent(upper)
    verdict = "linear, or less" if growth <= LINEAR else "FASTER THAN THE WORK"
    text = f"{what:9} {how:16} growth {growth:.2f}: {verdict}"
    found.add(text, sweep=what, how=how, growth=growth, linear=growth <= LINEAR)


def exponent(costs: dict[int, float]) -> float:
    """The slope of log(cost) over log(size), by least squares."""
    slope, _ = statistics.linear_regression([math.log(n) for n in costs], [math.log(cost) for cost in costs.values()])
    return slope


def sketches(found: Results, device: str, sizes: Sequence[int], seconds: float) -> None:
    """The time of one sketch alone."""
    costs: dict[int, float] = {}
    for size in sizes:
        row = {"sweep": "elements", "how": "sketch.of", "size": size}
        try:
            x = torch.randn(size, device=device)
            costs[size] = seconds_of(lambda: sketch.of(x), seconds=seconds)  # noqa: B023
        except (RuntimeError, MemoryError) as error:
            if not command.out_of_memory(error):
                raise
            found.add(f"elements  sketch.of {size:>18,}  too little memory", **row, failed="too little memory")
            break
        each = 1e9 * costs[size] / size
        found.add(f"elements  sketch.of        {size:>11,}  {each:12.3f} ns each", **row, nanoseconds=each)
    _growth(found, "elements", "sketch.of", costs)


# -- a long run --------------------------------------------------------------------------------------------------------


def long_run(found: Results, how: str, work: Work, steps: int) -> None:
    """Memory and time of a step in the last tenth of a run, against its second tenth; the first warms up."""
    tenth = max(steps // 10, 1)
    with _attached(how, work) as step:
        for _ in range(tenth):
            step()
        early = _stretch(step, tenth, work.device)
        for _ in range(7 * tenth):
            step()
        late = _stretch(step, tenth, work.device)
    row = {
        "sweep": "steps",
        "how": how,
        "size": 10 * tenth,
        "bytes_a_step": (late["memory"] - early["memory"]) / (8 * tenth),
        "objects": late["objects"] - early["objects"],
        "time": late["seconds"] / early["seconds"],
    }
    text = (
        f"steps     {how:16} {10 * tenth:>11,}  {row['bytes_a_step']:+8.1f} bytes a step, {row['objects']:+} objects, "
        f"a late step takes {row['time']:.2f} x an early one"
    )
    found.add(text, **row)


def _stretch(step: Callable[[], object], steps: int, device: str) -> dict[str, Any]:
    """The median time of a step, and what is held after the last one."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    gc.collect()
    return {"seconds": statistics.median(times), "objects": len(gc.get_objects()), "memory": _memory(device)}


def _memory(device: str) -> int:
    """Bytes that the device's allocator has handed out; on the CPU those that are resident in the process."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return 0


if __name__ == "__main__":
    command.run(main)
