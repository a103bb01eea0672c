"""What a sketch costs: ``python -m benchmarks.sketch``.

"Limit" is the least that gives a sum, a norm, the extremes and a histogram: ``sum``, ``dot``, ``aminmax`` and a
``bincount`` of the float's top nine bits, the fastest operators of torch for each. ``add_histogram`` makes its event in
full, but the event is dropped: nothing is written on either side. One thread. Not measured here: memory, and what a
whole training step costs (``benchmarks.log``). On a machine that others use as well, ratios to ``add_histogram``
come out too low: it waits for arithmetic, a sketch for the memory that all share.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from benchmarks import command
from benchmarks.timing import Ratio, compare, machine
from probe import sketch


def limit(x: Tensor) -> object:
    """The limit for flat float32 `x`: see above."""
    return x.sum(), x.dot(x), x.aminmax(), torch.bincount((x.view(torch.int32) >> 23).bitwise_and_(511), minlength=512)


class Nowhere(SummaryWriter):  # type: ignore[misc]
    """Makes its events and drops them, so that no thread writes while the other side is timed."""

    def _get_file_writer(self) -> Nowhere:
        return self

    def add_summary(self, *args: object) -> None:
        pass


def show(what: str, ratio: Ratio) -> None:
    print(f"  {what:30} {ratio}", flush=True)


def one_tensor(size: int, seconds: float, writer: SummaryWriter) -> None:
    x = torch.randn(size)
    half, relu = x.bfloat16(), x.relu()

    def of() -> object:
        return sketch.of(x)

    print(f"float32 [{size:,}]")
    show("of / limit", compare(of, lambda: limit(x), seconds=seconds))
    show("of / limit, after a ReLU", compare(lambda: sketch.of(relu), lambda: limit(relu), seconds=seconds))
    show("of, bfloat16 / float32", compare(lambda: sketch.of(half), of, seconds=seconds))
    show("of / of(histogram=False)", compare(of, lambda: sketch.of(x, histogram=False), seconds=seconds))
    if size <= 1_000_000:
        show("add_histogram / of", compare(lambda: writer.add_histogram("x", x), of, seconds=seconds))


def many_tensors(width: int, seconds: float, writer: SummaryWriter) -> None:
    layers = [torch.nn.Linear(width, width) for _ in range(200)]
    parameters = [parameter.detach() for layer in layers for parameter in layer.parameters()]

    def many() -> object:
        return sketch.of_many(parameters)

    print(f"the 400 parameters of 200 Linear({width}, {width})")
    show("of_many / limit", compare(many, lambda: [limit(p.view(-1)) for p in parameters], seconds=seconds))
    show("one by one / of_many", compare(lambda: [sketch.of(p) for p in parameters], many, seconds=seconds))
    each = compare(lambda: [writer.add_histogram("x", p) for p in parameters], many, seconds=seconds, least=7)
    show("add_histogram / of_many", each)


def on_cuda(size: int, seconds: float) -> None:
    x = torch.randn(size, device="cuda")

    def of() -> object:
        return sketch.of(x)

    print(f"CUDA, float32 [{size:,}]")
    show("of / sum", compare(of, x.sum, seconds=seconds))
    show("of / bincount", compare(of, lambda: torch.bincount(x.view(torch.int32) >> 23 & 511), seconds=seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, and two sizes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = 0.5 if options.quick else 5.0
    print(f"{machine('cpu')}, NumPy {np.__version__}")
    with tempfile.TemporaryDirectory() as folder, Nowhere(folder) as writer:
        for size in (512, 1_000_000) if options.quick else (512, 10_000, 100_000, 1_000_000, 10_000_000):
            one_tensor(size, seconds, writer)
        for width in (16, 64):
            many_tensors(width, seconds, writer)
    if torch.cuda.is_available():
        print(machine("cuda"))
        for size in (10_000, 1_000_000, 100_000_000):
            on_cuda(size, seconds)


if __name__ == "__main__":
    command.run(main)
