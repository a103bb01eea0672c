"""PyTorch's hook functions by hand, and the same values by a `Probe`.

What to look for: it prints "same" everywhere but at the convolution's output. The plain forward hook kept a tensor
that the in-place ReLU then overwrote, which TensorBoard's histograms show too: ``conv/output/by_hand`` begins at zero,
``conv/output/by_probe`` has its negative half. (The module backward hook could not be put on ``conv`` at all.)
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from probe import Board, Kind, Probe


def by_hand(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Each hook function once; one that changes what flows; and all of them removed."""
    kept: dict[str, Tensor] = {}

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        kept["conv/output"] = output.detach()
        output.register_hook(lambda grad: kept.update({"conv/grad_output": grad}))

    handles = [
        model.conv.register_forward_pre_hook(lambda module, args: kept.update({"conv/input": args[0]})),
        model.conv.register_forward_hook(after),
        model.fc.register_full_backward_hook(lambda module, grads, _: kept.update({"fc/grad_input": grads[0]})),
        model.fc.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 2 * 3,)),
    ]
    model(x).square().sum().backward()
    for handle in handles:
        handle.remove()
    return kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/hooks", help="folder of the TensorBoard run (default: runs/hooks)")
    logdir = parser.parse_args().logdir
    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(1, 4, 3), "relu": nn.ReLU(inplace=True), "flat": nn.Flatten(), "fc": nn.Linear(144, 2)}
    model, x = nn.Sequential(OrderedDict(parts)), torch.randn(8, 1, 8, 8)
    hand = by_hand(model, x)
    with Probe(model) as p:
        for factor in (2, 3):
            p.edit("fc", lambda grad, factor=factor: grad * factor, on=Kind.GRAD_OUTPUT)
        model(x).square().sum().backward()
    with Board(logdir, purge_step=0) as board:
        for tag, value in hand.items():
            layer, field = tag.split("/")
            differ = (value != (probed := getattr(p[layer], field))).float().mean().item()
            print(f"{tag:16} {f'{differ:.0%} differ' if differ else 'same'}")
            board.add_histogram(f"{tag}/by_hand", value, 0)
            board.add_histogram(f"{tag}/by_probe", probed, 0)
