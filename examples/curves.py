"""Loss and accuracy, training and validation in the same chart; parameters and their gradients as histograms.

What to look for in TensorBoard:

- Scalars: ``loss`` and ``accuracy`` have two lines each, ``train`` and ``valid``. The training loss goes on falling
  where the validation loss has stopped: from there on the network learns its examples by heart.
- Histograms and Distributions: ``<parameter>/value`` spreads out from its start as it is trained, ``<parameter>/grad``
  narrows around zero as there is less left to learn.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from probe import Board


def main() -> None:
    """Train a small network on half of scikit-learn's digits, and log every epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/curves", help="folder of the TensorBoard run (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    pictures, labels = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    x_train, x_valid = (pictures.float() / 16).chunk(2)
    y_train, y_valid = labels.long().chunk(2)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    with Board(args.logdir, purge_step=0) as board:
        for epoch in range(args.epochs):
            for rows in torch.randperm(len(y_train)).split(32):
                optimizer.zero_grad()
                cross_entropy(model(x_train[rows]), y_train[rows]).backward()
                optimizer.step()
            for name, parameter in model.named_parameters():
                board.add_histogram(f"{name}/value", parameter, epoch)
                board.add_histogram(f"{name}/grad", parameter.grad, epoch)
            with torch.no_grad():
                train, valid = model(x_train), model(x_valid)
            losses = {"train": cross_entropy(train, y_train), "valid": cross_entropy(valid, y_valid)}
            hits = {"train": train.argmax(1) == y_train, "valid": valid.argmax(1) == y_valid}
            board.curves("loss", step=epoch, **losses)
            board.curves("accuracy", step=epoch, **{phase: hit.float().mean() for phase, hit in hits.items()})
    print(f"after {args.epochs} epochs: " + ", ".join(f"{phase} loss {loss:.3f}" for phase, loss in losses.items()))
    print(f"See the run: python -m probe open {args.logdir}")


if __name__ == "__main__":
    main()
