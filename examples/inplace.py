"""`ReLU(inplace=True)` against `ReLU(inplace=False)`: what a plain hook sees of AlexNet's first convolution.

What to look for, in the picture (TensorBoard's Images tab, or ``--png``): a row is one channel of the convolution,
mid-grey is zero. Left what a plain forward hook kept, in the middle the truth, right the difference. Left there is
nothing darker than mid-grey: the in-place ReLU that came next wrote its own output into the tensor that the hook had
kept. The middle is what `Probe` captured, and what the hook sees as well once the ReLU is not in place.
"""

from __future__ import annotations

from typing import Any

import torch
from _alexnet import arguments, load, photograph
from torch import Tensor, nn
from torchvision.utils import save_image

from probe import Board, Probe, image


def plain_hook(model: nn.Module, layer: nn.Module, photo: Tensor) -> Tensor:
    """The layer's output as most scripts take it, ``[C, H, W]``."""
    kept: dict[str, Any] = {}
    handle = layer.register_forward_hook(lambda module, args, output: kept.update(output=output.detach()))
    model(photo)
    handle.remove()
    return kept["output"][0]


if __name__ == "__main__":
    parser = arguments("inplace", __doc__)
    parser.add_argument("--png", help="write the picture into this file too")
    args = parser.parse_args()
    model, photo = load(args.quick), photograph(args.photo, args.quick)
    torch.set_grad_enabled(False)
    naive = plain_hook(model, model.features[0], photo)
    with Probe(model) as p:
        model(photo)
    true = p["features.0"].output[0]
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    out_of_place = plain_hook(model, model.features[0], photo)

    chosen = (true - naive).abs().mean((1, 2)).topk(2).indices  # the channels that lost most
    rows = torch.stack([naive[chosen], true[chosen], true[chosen] - naive[chosen]], 1).flatten(0, 1)[:, None]
    limit = rows.abs().max().item()
    picture = image.grid(rows, nrow=3, padding=4, normalize=True, value_range=(-limit, limit), pad_value=1)
    picture = picture.repeat_interleave(3, -1).repeat_interleave(3, -2)
    with Board(args.logdir, purge_step=0) as board:
        board.add_image("features.0/plain_hook_truth_difference", picture, 0)
        board.add_histogram("features.0/plain_hook", naive, 0)
        board.add_histogram("features.0/truth", true, 0)
    if args.png:
        save_image(picture, args.png)
    print(f"smallest value: {naive.min():.2f} by a plain hook, {true.min():.2f} in truth")
    print(f"the probe's capture equals what a hook sees without in-place ReLUs: {torch.equal(true, out_of_place)}")
    print(f"\noverwritten after the layer returned it:\n{p.overwritten}")
