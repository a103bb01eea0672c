"""A plain training loop, everything at module level, data from a DataLoader with workers."""

import random
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset


class Blobs(Dataset):
    def __init__(self, n=96):
        rng = np.random.default_rng(0)
        self.y = rng.integers(0, 4, n)
        self.x = (rng.normal(size=(n, 6)) + self.y[:, None]).astype(np.float32)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return torch.from_numpy(self.x[i]) + 0.1 * random.random(), int(self.y[i])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 16)
        self.bn = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.2)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc2(self.drop(F.relu_(self.bn(self.fc1(x)))))


if __name__ == "__main__":
    workers, epochs = (sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else ("fork", 2)
    random.seed(1)
    torch.manual_seed(1)
    loader = DataLoader(Blobs(), batch_size=16, shuffle=True, num_workers=1, multiprocessing_context=workers)
    net = Net()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for epoch in range(epochs):
        net.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(net(x), y)
            loss.backward()
            optimizer.step()
        scheduler.step()
        net.eval()
        with torch.no_grad():
            accuracy = (net(torch.from_numpy(loader.dataset.x)).argmax(1).numpy() == loader.dataset.y).mean()
        print(
            f"epoch {epoch}: loss {loss.item():.6f}, accuracy {accuracy:.3f}, {torch.rand(1).item()}, {random.random()}"
        )
    torch.save(net.state_dict(), "net.pt")
