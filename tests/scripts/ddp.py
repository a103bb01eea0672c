"""Data-parallel training, for ``torchrun --nproc-per-node 2 ddp.py``."""

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP


class ToyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net1 = nn.Linear(10, 10)
        self.relu = nn.ReLU()
        self.net2 = nn.Linear(10, 5)

    def forward(self, x):
        return self.net2(self.relu(self.net1(x)))


def demo_basic():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(4)
    ddp_model = DDP(ToyModel())
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.05)
    for step in range(8):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(ddp_model(torch.randn(20, 10)), torch.randn(20, 5))
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            print(step, total.item())
    torch.save(ddp_model.module.state_dict(), f"ddp{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    demo_basic()
