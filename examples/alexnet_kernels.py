"""The kernels of AlexNet's five convolutions: one output channel at a time, and all together.

What to look for, in TensorBoard's Images tab:

- ``<layer>/kernels``: mid-grey is a weight of zero. The first layer takes RGB, so each of its 64 kernels is a colour
  picture: with pretrained weights edges of all directions on the one hand, blobs of colour on the other; untrained,
  noise. From the second layer on the inputs are no colours but 64 and more channels: then a row is one output channel
  and a tile one of its inputs.
- ``<layer>/one_kernel``: all of one kernel, 16 inputs a row; the slider's step is the output channel.
"""

from __future__ import annotations

from _alexnet import arguments, load
from torch import Tensor, nn

from probe import Board, image


def enlarge(picture: Tensor, times: int) -> Tensor:
    """Every pixel as a square."""
    return picture.repeat_interleave(times, -1).repeat_interleave(times, -2)


def main() -> None:
    """Draw the weights; the model never runs."""
    parser = arguments("alexnet_kernels", __doc__)
    parser.add_argument("--channels", type=int, default=16, help="output channels on the slider (default: 16)")
    args = parser.parse_args()
    convolutions = {name: module for name, module in load(args.quick).named_modules() if isinstance(module, nn.Conv2d)}
    with Board(args.logdir, purge_step=0) as board:
        for name, convolution in convolutions.items():
            weight = convolution.weight
            is_rgb = weight.shape[1] == 3
            board.add_image(f"{name}/kernels", enlarge(image.kernels(weight, max_outputs=64), 3), 0)
            for channel in range(min(args.channels, len(weight))):
                tiles = weight[channel][None] if is_rgb else weight[channel][:, None]
                peak = tiles.abs().max().item()
                one = image.grid(tiles, nrow=16, padding=1, normalize=True, value_range=(-peak, peak))
                board.add_image(f"{name}/one_kernel", enlarge(one, 8), channel)
            shown = "64 colour pictures" if is_rgb else f"64 rows of 16 of its {weight.shape[1]} inputs"
            print(f"{name:12} {'×'.join(map(str, weight.shape)):12} {shown}")
    print(f"See them: python -m probe open {args.logdir}")


if __name__ == "__main__":
    main()
