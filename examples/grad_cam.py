"""Grad-CAM of a network that reads handwritten digits, while it learns and when it has learned (seconds, no download).

    python examples/grad_cam.py && python -m probe open runs/grad_cam

What to look for: in TensorBoard's images (``relu2/output/grad_cam``) the heat of the same eight digits settles on their
strokes as training goes on. In the picture at the end each row is a held-out digit, its map, and both together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torchvision.utils import save_image

from probe import Board, Probe, cam
from probe.demo import digits, network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("runs/grad_cam"), help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    (images, labels), (held_out, truth) = digits()
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    shown = cam.grad_cam_summary(model, held_out[:8], layer="relu2", target=truth[:8])
    with Board(options.logdir, purge_step=0) as board, Probe(model, "relu2", optimizer=optimizer) as p:
        p.log(board, shown, every=45)
        for _ in range(options.epochs):
            for rows in torch.randperm(len(labels)).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
    maps = cam.explain(model.eval(), held_out, layer="relu2", target=truth)
    ink = held_out[:, 0] > 0
    print(f"{(model(held_out).argmax(1) == truth).float().mean():.1%} of the held-out digits are read right.")
    print(f"{cam.pointing_game(maps, ink).float().mean():.0%} of the maps are hottest on the stroke.")
    picture = cam.grid(held_out[:3], maps[:3], [f"a {digit}" for digit in truth[:3]])
    save_image(picture / 255, options.logdir / "digits.png")
    print(options.logdir / "digits.png")


if __name__ == "__main__":
    main()
