"""What logging costs: ``python -m benchmarks.log``.

An observed step of resnet18 in training, on which ``stats`` and ``histogram`` of all leaf outputs, their gradients, all
parameters and all their gradients go into TensorBoard, against the same by hand: hooks, ``SummaryWriter.add_histogram``
and ``.item()``. And a training run that logs every 100th step, against a bare one. Costs are the time beyond the bare
step; ratios are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from benchmarks.models import resnet18
from benchmarks.timing import compare, machine
from probe import Board, Kind, ParameterKind, Probe, histogram, stats


class ByHand:
    """What people write today: a hook a leaf, `add_histogram` and eight `.item()` a tensor."""

    def __init__(self, model: nn.Module, writer: SummaryWriter) -> None:
        self.model, self.writer, self.step = model, writer, 0
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.write(f"{name}/output", output.detach())
            if output.requires_grad:
                output.register_hook(lambda g: self.write(f"{name}/grad_output", g))

        return hook

    def write(self, tag: str, x: torch.Tensor) -> None:
        numbers = {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max(), "norm": x.norm()}
        numbers |= {"zeros": (x == 0).float().mean(), "nan": x.isnan().sum(), "inf": x.isinf().sum()}
        for name, value in numbers.items():
            self.writer.add_scalar(f"{tag}/{name}", value.item(), self.step)
        self.writer.add_histogram(tag, x, self.step)

    def parameters(self) -> None:
        for name, parameter in self.model.named_parameters():
            self.write(f"{name}/value", parameter.detach())
            self.write(f"{name}/grad", parameter.grad)
        self.step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        observed(folder, options.batch, options.size, 3 if options.quick else 9)
        every(folder, options.batch, options.size, 20 if options.quick else 120)


def observed(folder: str, batch: int, size: int, runs: int) -> None:
    """The cost of one observed step beyond a bare one, by hand over by probe."""
    trained = [_training(batch, size) for _ in range(3)]
    (_, _, bare), (model, optimizer, probed), (other, _, hand) = trained
    kinds = [Kind.OUTPUT | Kind.GRAD_OUTPUT, ParameterKind.VALUE | ParameterKind.GRAD]
    by_hand = ByHand(other, SummaryWriter(f"{folder}/hand"))
    with Board(f"{folder}/probe") as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats, histogram, kinds=kinds)

        def with_probe() -> None:
            probed()
            board.flush()  # so that the background thread's work is counted too

        def with_hand() -> None:
            hand()
            by_hand.parameters()

        costs: dict[str, list[float]] = {"probe": [], "step": [], "hand": []}
        for run in range(runs + 1):
            zero = _seconds(bare)
            times = {"step": _seconds(probed), "hand": _seconds(with_hand)}
            board.flush()
            times["probe"] = _seconds(with_probe)
            if run:
                for key, value in times.items():
                    costs[key].append(value - zero)
    by_hand.writer.close()
    middle = {key: statistics.median(values) for key, values in costs.items()}
    print(f"observed step, cost by hand / cost by probe, writing included: {middle['hand'] / middle['probe']:.1f}")
    print(f"observed step, cost by hand / cost by probe in the training thread: {middle['hand'] / middle['step']:.1f}")


def every(folder: str, batch: int, size: int, seconds: float) -> None:
    """A hundred steps, one of them observed, against a hundred bare ones."""
    (_, _, bare), (model, optimizer, probed) = _training(batch, size), _training(batch, size)
    with Board(f"{folder}/every") as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats, histogram, every=100)
        ratio = compare(lambda: _repeat(probed), lambda: _repeat(bare), seconds=seconds, least=3)
    print(f"100 steps, one of them observed / bare: {ratio}")


def _repeat(step: Callable[[], None]) -> None:
    for _ in range(100):
        step()


def _training(batch: int, size: int) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    model, x = resnet18(batch, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return model, optimizer, step


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
