"""Two processes, one run: statistics of the whole batch, and of parameters, whether they are replicated or sharded.

    torchrun --nproc-per-node 2 examples/distributed.py          # DistributedDataParallel
    torchrun --nproc-per-node 2 examples/distributed.py --shard  # parameters and gradients in shards (FSDP2)

On GPUs where there are any (NCCL), else on the CPU (gloo).

What to look for in TensorBoard:

- Histograms: ``0/output`` counts the elements of both halves of each batch, though only one process writes.
- Scalars: ``grad_norm/after_clipping`` and ``0.weight/grad/norm`` are the averaged gradient's, and the same with and
  without ``--shard``, where each process holds one half of every parameter.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from probe import Board, Probe, histogram, stats


def main() -> None:
    """Train a small network on made-up data, each process on its half of the batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/distributed", help="folder of the run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--shard", action="store_true", help="FSDP2 in place of DistributedDataParallel")
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device.type == "cpu" else None)
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(inplace=True), nn.Linear(64, 4)).to(device)
    model = fully_shard(model) if args.shard else DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with Board(args.logdir, purge_step=0) as board, Probe(model, optimizer=optimizer) as p:  # on every rank
        p.log(board, stats, histogram, every=2)
        for _ in range(args.steps):
            whole = torch.randn(size * 32, 16)
            x, y = (each.chunk(size)[rank].to(device) for each in (whole, whole[:, :4].argmax(1)))
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    if rank == 0:
        print(f"{size} ranks, {p.steps} steps. See the run: python -m probe open {args.logdir}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
