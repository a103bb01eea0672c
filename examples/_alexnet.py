"""AlexNet and a photograph to show it, for the scripts beside this one; no example itself."""

from __future__ import annotations

import argparse
import sys

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.models import AlexNet, AlexNet_Weights, alexnet
from torchvision.transforms import functional


def arguments(name: str, text: str) -> argparse.ArgumentParser:
    """The options that the AlexNet scripts have in common."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default=f"runs/{name}", help="folder of the TensorBoard run (default: %(default)s)")
    parser.add_argument("--photo", choices=["china", "flower"], default="china", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="untrained weights and a small photograph: seconds less")
    return parser


def load(quick: bool) -> AlexNet:
    """AlexNet in eval mode, pretrained on ImageNet where the weights are at hand or can be downloaded (233 MB)."""
    torch.manual_seed(0)
    if not quick:
        try:
            return alexnet(weights=AlexNet_Weights.IMAGENET1K_V1).eval()
        except OSError as error:
            print(f"No pretrained weights ({error}): AlexNet stays untrained, its filters random.", file=sys.stderr)
    return alexnet().eval()


def photograph(name: str, quick: bool) -> Tensor:
    """One of scikit-learn's photographs as AlexNet takes it: ``[1, 3, H, W]``, normalised."""
    pixels = torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).permute(2, 0, 1)
    size = 64 if quick else 224
    pixels = functional.center_crop(functional.resize(pixels, size), [size, size])
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as the weights were trained with
    return functional.normalize(pixels.float() / 255, mean, std)[None]
