"""One of each kind of thing that TensorBoard shows.

What to look for, tab by tab:

- Scalars: ``y/2x`` is a straight line, ``y/2^x`` becomes one on a logarithmic axis; ``three`` has three lines.
- Custom Scalars: both functions in one chart, in one run and one colour.
- Images: ``chw`` and ``hwc`` are the same coloured ramp, ``hw`` is its red part; ``ones`` and ``1.1 x ones`` are the
  same white, because values outside 0..1 are clamped; ``batch`` is several pictures side by side.
- Histograms and Distributions: ``uniform`` stays a box, ``normal`` a bell that wanders to the right.
- Audio: a tone that rises an octave. Text: markdown. PR Curves: better than chance, worse than perfect.
- Projector: the digits' 64 pixels in three dimensions; colour by label, and search for the clusters.
- Mesh: a triangle to turn. HParams: the run's settings beside its result. Graphs: a small network to open.
"""

from __future__ import annotations

import argparse
import math

import torch
from sklearn.datasets import load_digits
from torch import nn

from probe import Board

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/tensorboard_basics", help="folder of the run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="at most 128 (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    digits = load_digits()
    pixels, labels = torch.from_numpy(digits.data[:300]).float() / 16, torch.from_numpy(digits.target[:300])
    ramp = torch.linspace(0, 1, 64).expand(3, 48, 64) * torch.tensor([1.0, 0.5, 0.2])[:, None, None]
    time = torch.arange(22050) / 22050

    with Board(args.logdir, purge_step=0) as board:
        for x in range(args.steps):
            board.add_scalar("y/2x", 2 * x, x)
            board.add_scalar("y/2^x", 2.0**x, x)
            board.curves("three", step=x, x_sin_x=x * math.sin(x), x_cos_x=x * math.cos(x), arctan_x=math.atan(x))
        for step in range(5):
            board.add_histogram("uniform", torch.rand(1000), step)
            board.add_histogram("normal", torch.randn(1000) + step, step)
        board.add_custom_scalars({"functions": {"2x and 2^x": ["Multiline", ["y/2x", r"y/2\^x"]]}})
        board.add_image("chw", ramp, 0)
        board.add_image("hw", ramp[0], 0, dataformats="HW")
        board.add_image("hwc", ramp.permute(1, 2, 0), 0, dataformats="HWC")
        board.add_image("ones", torch.ones(3, 48, 64), 0)
        board.add_image("1.1 x ones", 1.1 * torch.ones(3, 48, 64), 0)
        board.add_images("batch", pixels[:8].view(8, 1, 8, 8), 0)
        board.add_audio("octave", torch.sin(2 * math.pi * 220 * (time + time**2 / 2)), 0, sample_rate=22050)
        board.add_text("note", "Text is *markdown*: `code`, **bold**, [links](https://pytorch.org).", 0)
        board.add_pr_curve("is it odd?", labels % 2, torch.sigmoid(labels % 2 + torch.randn(300)), 0)
        board.add_embedding(pixels, labels.tolist(), pixels.view(-1, 1, 8, 8), 0, "digits")
        board.add_mesh("triangle", torch.eye(3)[None], faces=torch.tensor([[[0, 1, 2]]]), global_step=0)
        board.add_hparams({"steps": args.steps}, {"last": float(2 * args.steps - 2)})
        board.graph(nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), pixels)
    print(f"See the run: python -m probe open {args.logdir}")
