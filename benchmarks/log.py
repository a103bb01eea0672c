"""What logging costs: ``python -m benchmarks.log``.

An observed step of resnet18 in training, on which ``stats`` and ``histogram`` of all leaf outputs, their gradients, all
parameters and all their gradients go into TensorBoard, against the same by hand: hooks, ``SummaryWriter.add_histogram``
and ``.item()``; and where it is installed against ``wandb.watch(log="all")``, which sees parameters and their gradients
alone, and writes in another process, whose work is not counted. And steps of which every 100th is observed, against
bare ones: 99 of one that is not, and one that is. Costs are the time beyond the bare step, by interleaved pairs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from benchmarks import command
from benchmarks.apart import version
from benchmarks.libraries import wandb_watch
from benchmarks.timing import Ratio, compare, machine, steady
from benchmarks.work import Work, prepare
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
    parser.add_argument("--quick", action="store_true", help="under a minute, and so less exact")
    parser.add_argument("--batch", type=command.positive, help="samples; 8 by default, 1 with --quick")
    parser.add_argument("--size", type=command.positive, default=64, help="pixels")
    parser.add_argument("--threads", type=command.positive, default=1)
    options = parser.parse_args()
    batch = options.batch or (1 if options.quick else 8)
    steady(options.threads)
    print(f"{machine('cpu')}; batch {batch}")
    with tempfile.TemporaryDirectory() as folder:
        observed(folder, batch, options.size, 1 if options.quick else 10)
        every(folder, batch, options.size, 3 if options.quick else 30)


def observed(folder: str, batch: int, size: int, seconds: float) -> None:
    """The cost of one observed step beyond a bare one, by hand over by probe."""
    bare, probed, watched = (_training(batch, size) for _ in range(3))
    handmade = _training(batch, size)
    with SummaryWriter(f"{folder}/hand") as writer:
        by_hand = ByHand(handmade.model, writer)

        def with_hand() -> None:
            handmade.step()
            by_hand.parameters()

        hand = compare(with_hand, bare.step, seconds=seconds, least=3)
    kinds = [Kind.OUTPUT | Kind.GRAD_OUTPUT, ParameterKind.VALUE | ParameterKind.GRAD]
    with Board(f"{folder}/probe") as board, Probe(probed.model, optimizer=probed.optimizer) as p:
        p.log(board, stats, histogram, kinds=kinds)

        def written() -> None:
            probed.step()
            board.flush()  # so that the background thread's work is counted too

        whole = compare(written, bare.step, seconds=seconds, least=5)
        thread = compare(probed.step, bare.step, seconds=seconds, least=5)
    print(f"observed step, cost by hand / cost by probe, writing included: {hand.beyond / whole.beyond:.1f}")
    print(f"observed step, cost by hand / cost by probe in the training thread: {hand.beyond / thread.beyond:.1f}")
    if version("wandb") is None:
        print("observed step, cost of wandb.watch: not installed: pip install wandb")
        return
    with wandb_watch(watched) as job:
        theirs = compare(job.run, bare.step, seconds=seconds, least=3)
    what = "observed step, cost of wandb.watch / cost by probe"
    print(f"{what}, writing included: {theirs.beyond / whole.beyond:.1f}")
    print(f"{what} in the training thread: {theirs.beyond / thread.beyond:.1f}")


def every(folder: str, batch: int, size: int, seconds: float) -> None:
    """What a step costs on the average where every 100th is observed: the others' ratio, and an observed one's."""
    bare, probed = _training(batch, size), _training(batch, size)
    with Board(f"{folder}/others") as board, Probe(probed.model, optimizer=probed.optimizer) as p:
        p.log(board, stats, histogram, every=10**9)
        probed.step()  # step 0 is observed
        board.flush()
        others = compare(probed.step, bare.step, seconds=2 * seconds)
    with Board(f"{folder}/every") as board, Probe(probed.model, optimizer=probed.optimizer) as p:
        p.log(board, stats, histogram)

        def written() -> None:
            probed.step()
            board.flush()

        one = compare(written, bare.step, seconds=seconds)
    print(f"an observed step, updates included, and its writing / bare: {one}")
    print(f"a step that is not observed / bare: {others}")
    low, mean, high = ((99 * u + o) / 100 for u, o in zip(_quartiles(others), _quartiles(one), strict=True))
    print(f"steps of which every 100th is observed / bare: {mean:.3f} ({low:.3f} to {high:.3f})")


def _quartiles(ratio: Ratio) -> tuple[float, float, float]:
    return ratio.low, ratio.median, ratio.high


def _training(batch: int, size: int) -> Work:
    return prepare("resnet18", "train", "cpu", torch.float32, False, {"batch": batch, "size": size})


if __name__ == "__main__":
    command.run(main)
