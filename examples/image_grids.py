"""A batch of a data loader as one picture.

What to look for in TensorBoard's Images tab:

- ``digits/four_a_row``: the batch that the network is about to see, each picture a tile; move the step's slider to see
  the next batch. Are they upright, different from each other, and do they match the labels in the Text tab?
- ``digits/normalized``: the same after normalisation, as the network gets it, stretched back to 0..1 to be seen at all.
  All tiles share one range, so a picture that is faint here is faint to the network.
- ``digits/each_by_itself``: a range of its own for each tile: faint ones look like the others, and noise is blown up.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from probe import Board, image


def enlarged(tiles: Tensor, **options: bool) -> Tensor:
    """Tiles ``[B, 1, 8, 8]`` six times as large, four a row."""
    return image.grid(tiles.repeat_interleave(6, -1).repeat_interleave(6, -2), nrow=4, pad_value=0.5, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/image_grids", help="folder of the run (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    pixels, labels = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    pixels = pixels.view(-1, 1, 8, 8).float() / 16
    loader = DataLoader(TensorDataset(pixels, labels), args.batch_size, shuffle=True)

    with Board(args.logdir, purge_step=0) as board:
        for step, (batch, truth) in zip(range(args.batches), loader, strict=False):
            contrast = torch.linspace(0.2, 1, len(batch)).view(-1, 1, 1, 1)
            normalized = (batch * contrast - pixels.mean()) / pixels.std()
            board.add_image("digits/four_a_row", enlarged(batch), step)
            board.add_image("digits/normalized", enlarged(normalized, normalize=True), step)
            board.add_image("digits/each_by_itself", enlarged(normalized, normalize=True, scale_each=True), step)
            board.add_text("digits/labels", ", ".join(map(str, truth.tolist())), step)
    print(f"See the run: python -m probe open {args.logdir}")
