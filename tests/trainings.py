"""Small models, the data they are trained on, and their trainings under the health checks (`Training`).

Real data: scikit-learn's handwritten digits, and the text of Python's own licence, character by character.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe import Probe, demo, health

STEPS = 25
CONTEXT = 24

# -- models ------------------------------------------------------------------------------------------------------------


def cnn() -> nn.Sequential:
    """Two convolutions, the ReLUs of which work in place. Input ``[B, 1, 8, 8]``."""
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(1, 16, 5, padding=2),
        "relu1": nn.ReLU(inplace=True),
        "conv2": nn.Conv2d(16, 32, 3, padding=1),
        "relu2": nn.ReLU(inplace=True),
        "pool": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(32 * 4 * 4, 10),
    }
    return nn.Sequential(OrderedDict(layers))


class ResNet(nn.Module):
    """Two residual blocks with BatchNorm and in-place ReLUs. Input ``[B, 1, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(Basic(12), Basic(12))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.relu(self.bn(self.conv(x))))).flatten(1))


class Basic(nn.Module):
    """A residual block, the last BatchNorm of which starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class Attention(nn.Module):
    """As in nanoGPT and timm: queries, keys and values of one layer, ``scaled_dot_product_attention``."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Patches of 2 x 2, a class token, two blocks. Input ``[B, 1, 8, 8]``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(Block(width, 4, False), Block(width, 4, False))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPT(nn.Module):
    """Two blocks over characters, tied to no one's weights. Input ``[B, T]``, output ``[B, T, characters]``."""

    def __init__(self, characters: int, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(characters, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(Block(width, 4, True), Block(width, 4, True))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        where = torch.arange(x.shape[1])
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions(where))))


class LSTM(nn.Module):
    """Two recurrent layers over characters. Input ``[B, T]``, output ``[B, T, characters]``."""

    def __init__(self, characters: int, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(characters, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(x))[0])


def mlp(activation: type[nn.Module] = nn.ReLU, depth: int = 4, width: int = 32) -> nn.Sequential:
    """Fully connected; input ``[B, 1, 8, 8]``."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, width), activation()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Encoder(nn.Module):
    """torch's own encoder layers, on the rows of a picture. Input ``[B, 1, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.rows(x.squeeze(1))).flatten(1))


# -- data --------------------------------------------------------------------------------------------------------------


@functools.cache
def text() -> tuple[Tensor, int]:
    """The licence as numbers, and how many characters there are."""
    import _sitebuiltins
    import builtins

    printer = builtins.license
    assert isinstance(printer, _sitebuiltins._Printer)
    printer._Printer__setup()
    body = "\n".join(printer._Printer__lines)
    letters = sorted(set(body))
    return torch.tensor([letters.index(each) for each in body]), len(letters)


digits = functools.cache(demo.digits)


def pictures(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = digits()[0]
    rows = torch.randint(len(x), (size,), generator=generator)
    return x[rows], y[rows]


def characters(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    data, _ = text()
    starts = torch.randint(len(data) - CONTEXT - 1, (size,), generator=generator)
    rows = data[starts[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "CNN": (cnn, pictures),
    "ResNet": (ResNet, pictures),
    "ViT": (ViT, pictures),
    "LSTM": (lambda: LSTM(text()[1]), characters),
    "GPT": (lambda: GPT(text()[1]), characters),
    "MLP": (mlp, pictures),
    "Encoder": (Encoder, pictures),
    "tanh": (lambda: mlp(nn.Tanh), pictures),
    "sigmoid": (lambda: mlp(nn.Sigmoid), pictures),
}
HEALTHY = ("CNN", "ResNet", "ViT", "LSTM", "GPT")

# -- trainings ---------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """A training to run under the checks; a fault changes it before it begins.

    Arguments:
        name: of the model.
        seed: of the weights, of the batches, and of where a fault is planted.
        sgd: SGD with momentum in place of Adam.
        half: the dtype of autocast.
        size: of a batch.
    """

    name: str
    seed: int = 0
    sgd: bool = False
    half: torch.dtype | None = None
    size: int = 32
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    evaluates: bool = True
    before: list[Callable[[int], Any]] = field(default_factory=list)
    after: list[Callable[[int], Any]] = field(default_factory=list)
    model: nn.Module = field(init=False)
    optimizers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        make, self.data = MODELS[self.name]
        self.model = make()
        self.random = random.Random(self.seed)
        self.optimizers = [self.optimizer(self.model.parameters())]

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        if self.sgd:
            return torch.optim.SGD(parameters, 0.05, momentum=0.9)
        return torch.optim.Adam(parameters, 3e-3)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.data(self.size, generator)

    def run(self, steps: int = STEPS, until: Callable[[health.Finding], bool] | None = None) -> health.Findings:
        """Train, and evaluate now and then, until such a finding is there; what was found."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        with Probe(self.model, optimizer=self.optimizers, observers=health.checks()) as p:
            for step in range(steps):
                for function in self.before:
                    function(step)
                self._step(generator)
                for function in self.after:
                    function(step)
                if self.evaluates and step % 10 == 9:
                    self._evaluate(generator)
                if until is not None and any(map(until, p.findings)):
                    break
        return p.findings

    def _step(self, generator: torch.Generator) -> None:
        x, y = self.batch(generator)
        half = contextlib.nullcontext() if self.half is None else torch.autocast("cpu", self.half)
        with half:
            loss = self.loss(self.model(x), y)
        self.model.zero_grad()
        loss.backward()
        for optimizer in reversed(self.optimizers):
            optimizer.step()

    @torch.no_grad()
    def _evaluate(self, generator: torch.Generator) -> None:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        for _ in range(3):
            self.model(self.batch(generator)[0])
        for module, mode in modes.items():
            module.training = mode


def healthy(seed: int) -> Iterator[tuple[str, Training]]:
    """Every model with both optimizers, in float32 and under bfloat16 autocast."""
    for name in HEALTHY:
        for sgd in (False, True):
            for half in (None, torch.bfloat16):
                label = f"{name}, {'SGD' if sgd else 'Adam'}, {'float32' if half is None else 'bfloat16'}, seed {seed}"
                yield label, Training(name, seed, sgd, half)
