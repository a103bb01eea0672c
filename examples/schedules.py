"""Every learning-rate schedule of torch, simulated ahead of time: six classics in one chart, all others in another.

What to look for in TensorBoard:

- Scalars, ``lr/group0``: a run for each schedule, all in one chart. `StepLR` and `MultiStepLR` fall in stairs,
  `ExponentialLR` smoothly; `CosineAnnealingLR` comes back up after T_max; `ReduceLROnPlateau` falls when the loss has
  not improved for 11 epochs, then every 21 (patience and cooldown); `LambdaLR` has a second group, ``lr/group1``.
- ``momentum/group0``: `OneCycleLR` and `CyclicLR` move it against the rate.
- Images: the same as pictures, linear and logarithmic; only the latter tells small rates apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from probe import Board, schedule

CLASSICS = {
    "StepLR": "StepLR(50)",
    "MultiStepLR": "MultiStepLR([50, 125, 160])",
    "ExponentialLR": "ExponentialLR(0.95)",
    "CosineAnnealingLR": "CosineAnnealingLR(50, eta_min=0)",
    "ReduceLROnPlateau": "ReduceLROnPlateau(factor=0.1, patience=10, cooldown=10, min_lr=1e-4)",
}
TWO_GROUPS = {"LambdaLR": "LambdaLR([lambda epoch: 0.1 ** (epoch // 20), lambda epoch: 0.95 ** epoch])"}
OTHERS = {
    "MultiplicativeLR": "MultiplicativeLR(lambda epoch: 0.99 if epoch < 100 else 0.9)",
    "ConstantLR": "ConstantLR(factor=0.3, total_iters=40)",
    "LinearLR": "LinearLR(start_factor=1.0, end_factor=0.1, total_iters=100)",
    "PolynomialLR": "PolynomialLR(total_iters=180, power=2.0)",
    "CosineAnnealingWarmRestarts": "CosineAnnealingWarmRestarts(T_0=20, T_mult=2)",
    "CyclicLR": "CyclicLR(base_lr=0.01, max_lr=0.1, step_size_up=20, mode='triangular2')",
    "OneCycleLR": "OneCycleLR(max_lr=0.1, total_steps=200)",
    "SequentialLR": "SequentialLR([LinearLR(0.01, total_iters=20), CosineAnnealingLR(180)], milestones=[20])",
    "ChainedScheduler": "ChainedScheduler([ConstantLR(0.1, total_iters=20), ExponentialLR(0.98)])",
    "SWALR": "SWALR(swa_lr=0.05, anneal_epochs=50)",
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/schedules", help="folder for the runs (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=200, help="at most 201, where OneCycleLR ends (default: %(default)s)"
    )
    args = parser.parse_args()
    losses = [0.5] * 5 + [0.4] * args.epochs
    classics = schedule.compare(CLASSICS, args.epochs, losses)
    classics.update(schedule.compare(TWO_GROUPS, args.epochs, lr=[0.1, 0.1]))
    for title, traces in {"classics": classics, "others": schedule.compare(OTHERS, args.epochs)}.items():
        with Board(Path(args.logdir) / title, purge_step=0) as board:
            traces.log(board)
            board.add_image("rates", traces.plot(), 0, dataformats="HWC")
            board.add_image("rates, logarithmic", traces.plot(log=True), 0, dataformats="HWC")
        print(traces, end="\n\n")
    print(f"See the runs: python -m probe open {args.logdir}")
