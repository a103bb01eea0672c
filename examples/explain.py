"""Where does a network look? AlexNet, ResNet-18 or ViT-B/16 on two photographs, or the demo's CNN on digits.

    python examples/explain.py --model resnet18
    python examples/explain.py --model digits

What to look for in the picture: a row is an image and the network's top class, a column a method. The digits' CNN
learns first (some seconds): its heat lies on the stroke. That of the others lies on the pagoda and the flower where
pretrained weights can be had. In the table, a faithful map has a low deletion, a high insertion.
"""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import functional
from torchvision.utils import save_image

from probe import cam
from probe.demo import digits, network


def reader() -> tuple[nn.Module, Tensor, list[str]]:
    """The demo's network, when it has learned to read, six held-out digits, and the names of its classes."""
    torch.manual_seed(0)
    (images, labels), (held_out, _) = digits()
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(8):
        for rows in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval(), held_out[:6], [f"a {digit}" for digit in range(10)]


def load(name: str, quick: bool) -> nn.Module:
    """The network in eval mode, pretrained where the weights can be had."""
    if not quick:
        socket.setdefaulttimeout(10)  # seconds: torchvision waits for ever for a network that does not answer
        try:
            return models.get_model(name, weights="DEFAULT").eval()
        except OSError as error:
            print(f"No pretrained weights ({error}): they are RANDOM, and the maps mean nothing.", file=sys.stderr)
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    nn.init.normal_(list(model.parameters())[-2], std=0.02)  # torchvision starts a ViT's head at zero
    return model


def photographs() -> Tensor:
    """scikit-learn's pagoda and flower, ``[2, 3, 224, 224]``, normalised as ImageNet's networks expect."""
    pixels = torch.stack([torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in load_sample_images().images])
    square = functional.resize(functional.center_crop(pixels, [427, 427]), [224, 224]).float()
    return functional.normalize(square / 255, list(cam.IMAGENET_MEAN), list(cam.IMAGENET_STD))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["alexnet", "resnet18", "vit_b_16", "digits"], default="resnet18")
    parser.add_argument("--out", type=Path, default=Path("runs/explain.png"), help="picture (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="random weights, no download, coarse curves")
    options = parser.parse_args()
    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--out is a picture, .png or .jpg, not {str(options.out)!r}")
    if options.model == "digits":
        model, images, names = reader()
    else:
        model, images = load(options.model, options.quick), photographs()
        names = models.get_model_weights(options.model).DEFAULT.meta["categories"]
    classes = model(images).argmax(1)
    methods = [cam.grad_cam, cam.grad_cam_pp, cam.layer_cam, cam.hires_cam, cam.eigen_cam]
    labels, steps = [names[c] for c in classes], 2 if options.quick else 16
    compared = cam.compare(model, images, None, methods, target=classes, labels=labels, steps=steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_image(compared.picture / 255, options.out)
    print(compared, options.out, sep="\n\n")


if __name__ == "__main__":
    main()
