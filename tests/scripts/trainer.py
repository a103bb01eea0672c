"""A class that holds model, loss and optimizers, and a trainer that drives it: what Lightning made usual."""

import copy

import torch
from torch import nn


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 11)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)))

    def training_step(self, tokens):
        return self.loss(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def validation_step(self, tokens):
        return self.training_step(tokens)

    def configure_optimizers(self):
        body = [*self.embed.parameters(), *self.encoder.parameters()]
        return [torch.optim.AdamW(body, lr=1e-2), torch.optim.SGD(self.head.parameters(), lr=0.1)]


class Trainer:
    def __init__(self, steps, accumulate=2):
        self.steps, self.accumulate = steps, accumulate

    def fit(self, module, batches):
        optimizers = module.configure_optimizers()
        averaged = copy.deepcopy(module).requires_grad_(False)
        print("sanity check", self.validate(module, batches))
        module.train()
        for step in range(self.steps):
            for i in range(self.accumulate):
                loss = module.training_step(batches[(step + i) % len(batches)]) / self.accumulate
                loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for mine, theirs in zip(averaged.parameters(), module.parameters()):
                mine.lerp_(theirs, 0.1)
            if step % 5 == 4:
                print(step, loss.item(), norm.item(), self.validate(module, batches), self.validate(averaged, batches))
                module.train()

    @torch.no_grad()
    def validate(self, module, batches):
        module.eval()
        return sum(module.validation_step(batch).item() for batch in batches) / len(batches)


def main():
    torch.manual_seed(2)
    batches = torch.randint(0, 11, (3, 4, 9))
    module = Module()
    Trainer(steps=10).fit(module, batches)
    torch.save(module.state_dict(), "module.pt")


main()
