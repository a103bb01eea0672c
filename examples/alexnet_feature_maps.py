"""What AlexNet's five convolutions make of a photograph.

What to look for, in TensorBoard's Images tab, a picture a layer: each tile is one channel, stretched to its own range.

- ``features.0/output``: 64 maps, eight a row. The photograph can still be recognised in each; some answer to edges of
  one direction, some to a colour.
- Deeper, the maps get smaller and coarser: where and how strongly a feature is there, and nothing of how it looks.

These are the convolutions' own outputs, below zero too. A plain hook would show them after the in-place ReLU that
follows each: all that is negative gone (the script ``inplace.py`` shows the two beside each other).
"""

from __future__ import annotations

import torch
from _alexnet import arguments, load, photograph
from torch import nn
from torchvision.utils import save_image

from probe import Board, Kind, Probe, image


def main() -> None:
    """Run AlexNet once, and draw what the probe kept."""
    parser = arguments("alexnet_feature_maps", __doc__)
    parser.add_argument("--png", help="write 16 maps of the first layer into this file too")
    args = parser.parse_args()
    model, photo = load(args.quick), photograph(args.photo, args.quick)
    with Probe(model, nn.Conv2d, kinds=Kind.OUTPUT) as p, torch.no_grad():
        model(photo)
    with Board(args.logdir, purge_step=0) as board:
        board.add_image("photograph", image.grid(photo, normalize=True), 0)
        for name in p:
            maps = p[name].output[0]  # [channels, h, w]
            columns = 8 if len(maps) <= 64 else 16
            picture = image.grid(maps[:, None], nrow=columns, normalize=True, scale_each=True)
            board.add_image(f"{name}/output", picture, 0)
            print(f"{name:12} {len(maps):3} maps of {maps.shape[1]} × {maps.shape[2]}, {columns} a row")
    if args.png:
        maps = p["features.0"].output[0][:16, None]
        save_image(image.grid(maps, normalize=True, scale_each=True), args.png)
    print(f"See them: python -m probe open {args.logdir}")


if __name__ == "__main__":
    main()
