"""``python -m probe demo``: a small CNN learns handwritten digits, probed, and the run goes into TensorBoard."""

from __future__ import annotations

import argparse
import math
import shlex
import textwrap
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from probe import cam, health
from probe.capture import Capture, Image, Shown, Summary
from probe.core import Probe
from probe.findings import Findings
from probe.run import positive
from probe.summary import feature_maps, histogram, input_images, kernels, stats

if TYPE_CHECKING:
    from probe.board import Board

Split = tuple[Tensor, Tensor]
"""Pictures ``[N, 1, 8, 8]`` in 0..1 and labels ``[N]``."""

BATCH = 32


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``demo`` to the commands of a parser; `run` is what it runs, in ``args.run``."""
    parser = subparsers.add_parser(
        "demo",
        help="train a small CNN on handwritten digits, probed, into TensorBoard",
        description="Train a small CNN on scikit-learn's handwritten digits (some seconds, no download), look inside "
        "it with a Probe, and write what was seen as a TensorBoard run.",
    )
    parser.add_argument("--logdir", default="runs/demo", help="folder of the TensorBoard run (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=12, help="passes over the training digits (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the shuffling (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, look at one more batch, and tell what was seen.

    Returns:
        The exit status, 0.

    Raises:
        ImportError: scikit-learn, tqdm or TensorBoard is missing; the message says what to type.
        OSError: the folder can't be written to.
    """
    try:
        from tqdm import tqdm

        data, held_out = digits()
    except ImportError as error:
        raise ImportError(f"the demo needs scikit-learn and tqdm ({error}): pip install scikit-learn tqdm") from error
    from probe.board import Board

    started = time.perf_counter()
    torch.manual_seed(args.seed)
    model, steps = network(), math.ceil(len(data[1]) / BATCH)
    # A second demo in the same folder hides the first one. Epochs of a fraction of a second may wait to be written.
    with Board(args.logdir, purge_step=0, max_jobs=100) as board:
        with tqdm(total=args.epochs * steps, unit="step") as bar:
            accuracy, findings = train(model, data, held_out, board, args.epochs, bar)
        look(model, data, held_out, board)
    print(f"\nHealth of the training: {findings}")
    seconds = time.perf_counter() - started
    print(f"\n{accuracy:.1%} of {len(held_out[1])} held-out digits are read right, after {seconds:.0f} s.")
    print(f"See the run in TensorBoard:  python -m probe open {shlex.quote(args.logdir)}")
    return 0


def digits() -> tuple[Split, Split]:
    """scikit-learn's 1797 handwritten digits: four fifths to train on, one fifth held out."""
    from sklearn import datasets, model_selection

    pictures, labels = datasets.load_digits(return_X_y=True)
    parts = model_selection.train_test_split(pictures, labels, test_size=0.2, stratify=labels, random_state=0)
    x_train, x_valid = (torch.from_numpy(each).float().view(-1, 1, 8, 8) / 16 for each in parts[:2])
    y_train, y_valid = (torch.from_numpy(each).long() for each in parts[2:])
    return (x_train, y_train), (x_valid, y_valid)


def network() -> nn.Sequential:
    """A CNN whose ReLUs work in place, as most published ones do.

    Its convolutions have no bias, so that nothing is active where there is no ink, and all positions are pooled: that
    is what Grad-CAM averages its gradient over.
    """
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(1, 16, 5, padding=2, bias=False),
        "relu1": nn.ReLU(inplace=True),
        "conv2": nn.Conv2d(16, 32, 3, padding=1, bias=False),
        "relu2": nn.ReLU(inplace=True),
        "pool": nn.AdaptiveMaxPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(32, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def train(
    model: nn.Sequential, data: Split, held_out: Split, board: Board, epochs: int, bar: Any
) -> tuple[float, Findings]:
    """Train under a probe, into the board; the accuracy on the held-out digits, and what the health checks found."""
    steps, accuracy = math.ceil(len(data[1]) / BATCH), 0.0
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = OneCycleLR(optimizer, max_lr=0.01, epochs=epochs, steps_per_epoch=steps)
    pictures = [enlarged(each) for each in (input_images(32, nrow=8), kernels, feature_maps(16, nrow=4))]
    heat = cam.grad_cam_summary(model, held_out[0][:8], layer="relu2", target=held_out[1][:8])
    board.graph(model, data[0][:BATCH])
    with Probe(model, optimizer=optimizer) as p:
        p.log(board, stats, histogram, every=steps)
        p.log(board, *pictures, layers="conv1", every=steps)
        p.log(board, heat, layers="relu2", every=steps)
        p.log(board, *health.checks(), every=max(1, steps // 4))
        for _ in range(epochs):
            loss, hits = fit(model, scheduler, data, bar)
            with p.tag("valid"):
                valid_loss, accuracy = evaluate(model, held_out)
            board.curves("loss", train=loss, valid=valid_loss, step=p.steps)
            board.curves("accuracy", train=hits, valid=accuracy, step=p.steps)
            bar.set_postfix(loss=f"{loss:.3f}", valid=f"{accuracy:.1%}")
    return accuracy, p.findings


def look(model: nn.Sequential, data: Split, held_out: Split, board: Board) -> None:
    """Print what one batch does in every layer; show the scores of the held-out digits in the projector."""
    with Probe(model, observers=health.checks(), keep=1) as p:
        nn.functional.cross_entropy(model(data[0][:BATCH]), data[1][:BATCH]).backward()
    print(p)
    print("\nOverwritten in place after the layer returned it; a plain hook that keeps the tensor has these wrong:")
    print(p.overwritten)
    board.add_text("layers", textwrap.indent(str(p), "    "))
    with Probe(model, "fc") as p:
        evaluate(model, held_out)
    board.add_embedding(p["fc"].output, held_out[1].tolist(), held_out[0], tag="scores")


def fit(model: nn.Module, scheduler: LRScheduler, data: Split, bar: Any) -> tuple[float, float]:
    """One epoch of training: mean loss and share of digits that were read right."""
    pictures, labels = data
    losses, hits = 0.0, 0
    model.train()
    for rows in torch.randperm(len(labels)).split(BATCH):
        scores = model(pictures[rows])
        loss = nn.functional.cross_entropy(scores, labels[rows])
        scheduler.optimizer.zero_grad()
        loss.backward()
        scheduler.optimizer.step()
        scheduler.step()
        losses += loss.item() * len(rows)
        hits += int((scores.argmax(1) == labels[rows]).sum())
        bar.update()
    return losses / len(labels), hits / len(labels)


@torch.no_grad()
def evaluate(model: nn.Module, data: Split) -> tuple[float, float]:
    """Loss and share of digits that are read right, nothing trained."""
    pictures, labels = data
    model.eval()
    scores = model(pictures)
    return nn.functional.cross_entropy(scores, labels).item(), float((scores.argmax(1) == labels).float().mean())


def enlarged(summary: Summary, times: int = 8) -> Summary:
    """A summary whose pictures have a square for every pixel: 5 x 5 kernels are hard to see otherwise."""

    def show(c: Capture) -> Iterator[Shown]:
        for item in summary(c) or ():
            if isinstance(item, Image):
                item = Image(item.tag, item.value.repeat_interleave(times, -1).repeat_interleave(times, -2))
            yield item

    show.kinds = summary.kinds  # type: ignore[attr-defined]
    return show
