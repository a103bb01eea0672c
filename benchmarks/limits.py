"""What this machine can do at best, and how far from it each technique is: ``python -m benchmarks.limits``.

A statistic can't be had faster than its tensor can be read, nor a capture than a bare hook that stores a reference.
*Read* is ``sum`` and *copy* ``copy_`` (a byte read and a byte written count as two), both by torch on tensors of the
same size in the same run. The last two tables show that distance: of sketches from reading and copying, and of what a
probe does at a module from the bare hook. Machine figures (GB/s, µs) are what they are called; everything else is a
ratio of interleaved pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import command
from benchmarks.arms import ARMS
from benchmarks.command import Results, progress
from benchmarks.timing import compare, seconds_of
from benchmarks.work import prepare
from probe import sketch

SIZES = {"cpu": (10_000, 1_000_000, 10_000_000), "cuda": (10_000, 1_000_000, 10_000_000, 100_000_000)}


def main(words: Sequence[str] | None = None) -> None:
    options = command.arguments(__doc__).parse_args(words)
    command.start(options)
    seconds = 0.3 if options.quick else 2.0
    tasks: list[tuple[Callable[..., None], Any]] = [(launch, ())]
    tasks += [(bandwidth, (size,)) for size in SIZES[options.device]]
    tasks += [(sketches, (size,)) for size in SIZES[options.device]]
    tasks += [(parameters, ()), (capture, ("reference", "empty hook")), (capture, ("output", "reference"))]
    tasks += [(capture, (name, "reference")) for name in ("input", "clone")]
    with Results("limits", options, device=options.device) as found:
        for measure, which in progress(tasks, len(tasks)):
            try:
                measure(found, options.device, seconds, *which)
            except (RuntimeError, MemoryError) as error:
                if not command.out_of_memory(error):
                    raise
                found.add(f"{measure.__name__} {which}: too little memory", what=measure.__name__, failed="memory")


def launch(found: Results, device: str, seconds: float) -> None:
    """The price of one small operator of torch, of one call of a module, and of a hook on it."""
    x, module = torch.zeros(1, device=device), nn.Identity()
    add = seconds_of(lambda: x.add_(1), seconds=seconds)
    plain = seconds_of(lambda: module(x), seconds=seconds)
    with module.register_forward_hook(lambda module, args, output: None):
        hooked = seconds_of(lambda: module(x), seconds=seconds)
    for what, value in {
        "one small operator (add_ of one element)": add,
        "one call of nn.Identity": plain,
        "a forward hook that does nothing": hooked - plain,
    }.items():
        found.add(f"{what:45} {1e6 * value:8.2f} µs", what=what, microseconds=1e6 * value)


def bandwidth(found: Results, device: str, seconds: float, size: int) -> None:
    """Reading and copying float32 tensors."""
    x = torch.randn(size, device=device)
    y = torch.empty_like(x)
    for what, run, times in (("read", x.sum, 1), ("copy", lambda: y.copy_(x), 2)):
        rate = times * x.nbytes / seconds_of(run, seconds=seconds) / 1e9
        found.add(f"{what} float32 [{size:,}]".ljust(45) + f" {rate:8.1f} GB/s", what=what, size=size, gigabytes=rate)


def sketches(found: Results, device: str, seconds: float, size: int) -> None:
    """Sketching against reading, and as a share of the bandwidth of copying."""
    x = torch.randn(size, device=device)
    y = torch.empty_like(x)
    for dtype in (torch.float32, torch.bfloat16):
        values = x.to(dtype)
        name = f"sketch.of, {str(dtype).removeprefix('torch.')} [{size:,}]"
        to_read = compare(lambda: sketch.of(values), values.sum, seconds=seconds)  # noqa: B023
        found.add(f"{name:45} / read   {to_read}", what=name, size=size, against="read", ratio=to_read)
    moments = compare(lambda: sketch.of(x, histogram=False), x.sum, seconds=seconds)
    name = f"sketch.of, no histogram, float32 [{size:,}]"
    found.add(f"{name:45} / read   {moments}", what=name, size=size, against="read", ratio=moments)
    to_copy = compare(lambda: sketch.of(x), lambda: y.copy_(x), seconds=seconds)
    name = f"sketch.of, float32 [{size:,}]"
    # a copy moves every byte twice: as much time as a copy means half of its bandwidth
    share = 0.5 / to_copy.median
    text = f"{name:45} / copy   {to_copy}: {100 * share:.0f} % of its bandwidth"
    found.add(text, what=name, size=size, against="copy", ratio=to_copy, share=share)


def parameters(found: Results, device: str, seconds: float) -> None:
    """All parameters of 200 small layers in one batch, against reading them one by one."""
    tensors: list[Tensor] = [p.detach().to(device) for _ in range(200) for p in nn.Linear(64, 64).parameters()]
    ratio = compare(lambda: sketch.of_many(tensors), lambda: [each.sum() for each in tensors], seconds=seconds)
    name = "sketch.of_many, 400 parameters of Linear(64, 64)"
    found.add(f"{name:45} / read   {ratio}", what=name, against="read", ratio=ratio)


def capture(found: Results, device: str, seconds: float, name: str, against: str) -> None:
    """A way of `benchmarks.overhead` to look into a forward of mlp200, where modules do next to nothing else."""
    arms = {arm.name: arm for arm in ARMS}
    work = prepare("mlp200", "forward", device, torch.float32, False, {})
    twin = work.twin()
    with arms[name].attach(work, 1) as measured, arms[against].attach(twin, 1) as base:
        ratio = compare(measured.step, base.step, seconds=seconds)
    found.add(f"mlp200, forward: {name:28} / {against}   {ratio}", what=name, against=against, ratio=ratio)


if __name__ == "__main__":
    command.run(main)
