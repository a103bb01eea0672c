"""Small trainings, sound ones and ones with a planted fault, on which the health checks are measured.

    python -m tests.corpus --seeds 10        # more seeds than the suite has time for; prints the tables

Real data: scikit-learn's handwritten digits, and the text of Python's own licence, character by character.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
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


# -- faults ------------------------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """A fault of one kind: what it is called in the table, and how it is planted.

    Arguments:
        name: in the table.
        check: the name that the finding must have.
        plant: changes a training; returns the layer or group that the finding must name.
        on: models it is planted in.
        options: of the `Training`.
    """

    name: str
    check: str
    plant: Callable[[Training], str]
    on: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


class Wrong(nn.Module):
    """A module with a fault, in place of a sound one."""

    def __init__(self, inner: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


class RootOfZero(torch.autograd.Function):
    """The identity, the derivative of which is not a number: what a norm at zero does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * torch.nan


class Scaled(torch.autograd.Function):
    """The identity, the derivative of which is a million times too small or too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


class Applied(nn.Module):
    """A leaf module of a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def some(t: Training, *types: type[nn.Module], but: tuple[str, ...] = ()) -> tuple[str, Any]:
    """A random layer of one of the types."""
    wanted = types or (nn.Linear, nn.Conv2d)
    found = [(n, m) for n, m in t.model.named_modules() if isinstance(m, wanted) and n not in but]
    return t.random.choice(found)


def put(t: Training, name: str, module: nn.Module) -> str:
    """Replace a layer; the optimizer is made anew."""
    parent, _, key = name.rpartition(".")
    setattr(t.model.get_submodule(parent), key, module)
    t.optimizers = [t.optimizer(t.model.parameters())]
    return name


@torch.no_grad()
def set_(tensor: Tensor, value: Any) -> None:
    tensor.copy_(torch.as_tensor(value).expand_as(tensor))


def nan_weight(t: Training) -> str:
    name, module = some(t)
    when = t.random.randrange(8)
    t.before.append(lambda step: step == when and set_(module.weight.view(-1)[3:4], torch.nan))
    return name


def overflow(t: Training) -> str:
    name, module = some(t)
    t.before.append(lambda step: step == 3 and set_(module.weight, 3e38))
    return name


def log_of_negative(t: Training) -> str:
    name, _ = some(t, nn.ReLU, nn.GELU)
    return put(t, name, Applied(lambda x: torch.log(x)))


def bad_data(t: Training) -> str:
    data = t.data
    t.data = lambda size, g: (lambda x, y: (torch.where(x > 0.9, torch.nan, x), y))(*data(size, g))
    return ""


def bad_loss(t: Training) -> str:
    t.loss = lambda out, y: (out.softmax(-1).gather(1, y[:, None]) - 1).log().mean()
    return "loss"


def nan_backward(t: Training) -> str:
    name, _ = some(t, nn.ReLU, nn.GELU)
    return put(t, name, Applied(lambda x: RootOfZero.apply(F.relu(x))))


def half_overflow(t: Training) -> str:
    name, module = some(t, nn.Linear, but=("7",))
    set_(module.bias, 0.0)
    with Probe(t.model, name) as p:
        t.model(digits()[0][0])
    set_(module.weight, module.weight * (36000 / p[name].output.abs().amax(1).median()))
    t.optimizers = [torch.optim.SGD(t.model.parameters(), 1e-9)]
    return name


def half_underflow(t: Training) -> str:
    t.loss = lambda out, y: 1e-4 * cross_entropy(out, y)
    return "*"


def dead_relu(t: Training) -> str:
    return negative_bias(t, some(t, nn.ReLU)[0], 1.0)


def negative_bias(t: Training, relu: str, share: float) -> str:
    """A large negative bias before a ReLU: of the layer that feeds it."""
    names = [name for name, m in t.model.named_modules() if not len(m._modules)]
    feeder = t.model.get_submodule(names[names.index(relu) - 1])
    count = int(len(feeder.bias) * share)
    set_(feeder.bias[:count], -1000.0)
    return relu


def dead_channels(t: Training) -> str:
    return negative_bias(t, some(t, nn.ReLU)[0], 0.75)


def saturated(t: Training) -> str:
    name, _ = some(t, nn.Tanh, nn.Sigmoid)
    names = [name for name, m in t.model.named_modules() if not len(m._modules)]
    feeder = t.model.get_submodule(names[names.index(name) - 1])
    set_(feeder.weight, feeder.weight * 300)
    return name


def attention(t: Training) -> str:
    if t.name == "Encoder":
        name, module = some(t, nn.MultiheadAttention)
        weight = module.in_proj_weight
    else:
        name, module = t.random.choice([(n, m) for n, m in t.model.named_modules() if n.endswith("qkv")])
        weight = module.weight
    width = weight.shape[1]
    set_(weight[: 2 * width], weight[: 2 * width] * (60 if t.name == "ViT" else 300))
    return name


def deep(activation: type[nn.Module], scale: float) -> Callable[[Training], str]:
    def plant(t: Training) -> str:
        torch.manual_seed(t.seed)
        t.model = mlp(activation, depth=14)
        for module in t.model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=scale / module.in_features**0.5)
        t.optimizers = [torch.optim.SGD(t.model.parameters(), 1e-6)]
        return "1"

    return plant


def gradient_scale(factor: float) -> Callable[[Training], str]:
    def plant(t: Training) -> str:
        name, _ = some(t, nn.ReLU, but=("2", "relu1"))
        put(t, name, Applied(lambda x: F.relu(Scaled.apply(x, factor))))
        t.optimizers = [torch.optim.Adam(t.model.parameters(), 1e-3)]
        return name

    return plant


def rate(value: float, group: str = "group0") -> Callable[[Training], str]:
    def plant(t: Training) -> str:
        for each in t.optimizers[0].param_groups:
            each["lr"] = value
        return group

    return plant


def layer_rate(value: float) -> Callable[[Training], str]:
    def plant(t: Training) -> str:
        name, module = some(t)
        rest = [p for p in t.model.parameters() if all(p is not own for own in module.parameters())]
        t.optimizers = [t.optimizer([{"params": rest}, {"params": list(module.parameters()), "lr": value}])]
        return name if value else "group1"

    return plant


def detached(t: Training) -> str:
    name, module = some(t, nn.Linear, nn.Conv2d, but=("fc", "head", "7"))
    put(t, name, Wrong(module, lambda x: x.detach()))
    return f"{name}.inner"


def unused(t: Training) -> str:
    name = f"spare{t.random.randrange(9)}"
    t.model.add_module(name, nn.Linear(4, 4))
    if isinstance(t.model, nn.Sequential):
        raise ValueError("it would be called")
    t.optimizers = [t.optimizer(t.model.parameters())]
    return name


def replaced(t: Training) -> str:
    name, module = some(t)
    fresh = type(module)(*_arguments(module))
    parent, _, key = name.rpartition(".")
    setattr(t.model.get_submodule(parent), key, fresh)
    return name


def _arguments(module: nn.Module) -> tuple[Any, ...]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, module.bias is not None
    assert isinstance(module, nn.Conv2d)
    return module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding


def in_two(t: Training) -> str:
    name, module = some(t)
    t.optimizers.append(torch.optim.SGD(module.parameters(), 1e-3))
    return name


def written_back(t: Training) -> str:
    name, module = some(t)
    before: list[Tensor] = []
    handles = [
        lambda *_: before.__setitem__(slice(None), [module.weight.detach().clone()]),
        lambda *_: set_(module.weight, before[0]),
    ]
    t.optimizers[0].register_step_pre_hook(handles[0])
    t.optimizers[0].register_step_post_hook(handles[1])
    return name


def rounded(t: Training) -> str:
    t.model = t.model.bfloat16()
    data = t.data
    t.data = lambda size, g: (lambda x, y: (x.bfloat16(), y))(*data(size, g))
    name, module = some(t)
    rest = [p for p in t.model.parameters() if all(p is not own for own in module.parameters())]
    t.optimizers = [torch.optim.SGD([{"params": rest, "lr": 0.5}, {"params": list(module.parameters()), "lr": 1e-5}])]
    return name


def one_sample(t: Training) -> str:
    t.size = 1
    return "*"


def momentum(t: Training) -> str:
    name, module = some(t, nn.BatchNorm2d)
    module.momentum = 0.0
    return name


def running_away(t: Training) -> str:
    name, _ = some(t, nn.BatchNorm2d)
    before = {"bn": "conv", "bn1": "conv1", "bn2": "conv2"}
    parent, _, key = name.rpartition(".")
    conv = t.model.get_submodule(f"{parent}.{before[key]}".strip("."))
    t.before.append(lambda step: set_(conv.weight, conv.weight * 1.6))
    return name


def alien_statistics(t: Training) -> str:
    name, module = some(t, nn.BatchNorm2d)
    module.running_mean += 30
    module.eval().requires_grad_(False)
    return name


def evaluated(t: Training) -> str:
    t.evaluates = False

    @torch.no_grad()
    def evaluate(step: int) -> None:
        if step % 5 == 4:
            for _ in range(3):
                t.model(t.batch(torch.Generator().manual_seed(step))[0])

    t.after.append(evaluate)
    return ""


def whole_eval(t: Training) -> str:
    t.model.eval()
    return ""


def one_eval(t: Training) -> str:
    name, module = some(t, nn.Dropout, nn.BatchNorm2d)
    module.eval()
    return name


def stays_train(t: Training) -> str:
    """One module that ``eval()`` does not reach."""
    name, module = some(t, nn.Dropout, nn.BatchNorm2d)
    module.train = lambda mode=True: module  # type: ignore[method-assign]
    return name


def batch_mean(t: Training) -> str:
    name, _ = some(t, nn.ReLU)
    return put(t, name, Applied(lambda x: F.relu(x).mean(0, keepdim=True).expand_as(x).contiguous() + 1.0))


def zero_weight(t: Training) -> str:
    name, module = some(t, nn.Linear, nn.Conv2d, but=("conv1",))
    set_(module.weight, 0.0)
    set_(module.bias, 0.5)
    module.requires_grad_(False)
    t.optimizers = [t.optimizer([p for p in t.model.parameters() if p.requires_grad])]
    return name


def alike(t: Training) -> str:
    name, module = some(t, nn.Linear, nn.Conv2d, but=("fc", "head", "7"))
    set_(module.weight, 0.05)
    if module.bias is not None:
        set_(module.bias, 0.0)
    parts = [each for each in t.model.modules() if isinstance(each, (nn.Linear, nn.Conv2d))]
    if module in parts[:-1]:  # what comes after must treat the units alike for their gradients to be alike
        after = parts[parts.index(module) + 1]
        set_(after.weight, after.weight.mean(1, keepdim=True) if after.weight.dim() == 2 else 0.03)
        if isinstance(after, nn.Linear) and after is parts[-1]:
            set_(after.weight, torch.randn(len(after.weight), 1).expand_as(after.weight) * 0.1)
    return name


def other_output(t: Training) -> str:
    t.loss = lambda out, y: cross_entropy(out.detach().requires_grad_(), y)
    return ""


def drowned(t: Training) -> str:
    """A last layer that says the same of all."""
    last = [name for name, m in t.model.named_modules() if isinstance(m, nn.Linear)][-1]
    put(t, last, Wrong(t.model.get_submodule(last), lambda x: 0 * x + torch.arange(x.shape[-1])))
    return ""


def kick(t: Training) -> str:
    name, module = some(t)
    when = 9 + t.random.randrange(6)
    t.before.append(lambda step: step == when and set_(module.weight, module.weight * -400))
    return name


def rate_spike(t: Training) -> str:
    when = 9 + t.random.randrange(6)
    group = t.optimizers[0].param_groups[0]
    usual = group["lr"]
    t.before.append(lambda step: group.__setitem__("lr", usual * 100 if step == when else usual))
    return "group0"


def bad_targets(t: Training) -> str:
    when = 9 + t.random.randrange(6)
    scale = [1.0]
    t.before.append(lambda step: scale.__setitem__(0, 40.0 if step == when else 1.0))
    t.loss = lambda out, y: cross_entropy(scale[0] * out, y)
    return "loss"


def naive_hook(t: Training) -> str:
    name, module = t.random.choice([(n, m) for n, m in t.model.named_modules() if n in ("conv1", "conv2")])
    kept: dict[str, Tensor] = {}
    module.register_forward_hook(lambda m, args, output: kept.__setitem__(name, output.detach()))
    return name


_IMAGES = ("CNN", "ResNet", "ViT", "MLP")

FAULTS = (
    Fault("NaN in a weight", "NaN or Inf", nan_weight, ("CNN", "ResNet", "ViT", "GPT", "LSTM")),
    Fault("weights that overflow", "NaN or Inf", overflow, ("CNN", "MLP", "GPT")),
    Fault("logarithm of a negative number", "NaN or Inf", log_of_negative, ("CNN", "MLP", "ViT")),
    Fault("NaN in the data", "NaN or Inf", bad_data, ("CNN", "ResNet", "ViT")),
    Fault("a loss that takes log(0)", "NaN or Inf", bad_loss, ("CNN", "ViT")),
    Fault("NaN made in backward", "NaN or Inf in gradients", nan_backward, ("CNN", "MLP", "ViT")),
    Fault("float16 activations near overflow", "float16 overflow", half_overflow, ("MLP",), {"half": torch.float16}),
    Fault("float16 gradients too small", "float16 underflow", half_underflow, ("MLP",), {"half": torch.float16}),
    Fault("dead ReLU", "dead units", dead_relu, ("CNN", "MLP")),
    Fault("three quarters of the channels dead", "dead units", dead_channels, ("CNN", "MLP")),
    Fault("saturated tanh or sigmoid", "saturated", saturated, ("tanh", "sigmoid")),
    Fault("attention on one place", "attention collapsed", attention, ("ViT", "GPT", "Encoder")),
    Fault("14 sigmoids deep", "gradients vanishing", deep(nn.Sigmoid, 1.0), ("MLP",)),
    Fault("14 layers of weights too large", "gradients exploding", deep(nn.ReLU, 4.0), ("MLP",)),
    Fault("a layer that cuts gradients to 1e-6", "gradients vanishing", gradient_scale(1e-6), ("CNN", "MLP")),
    Fault("a layer that blows gradients up 1e6 times", "gradients exploding", gradient_scale(1e6), ("CNN", "MLP")),
    Fault("learning rate far too high", "updates too large", rate(1.0), ("CNN", "ViT", "GPT")),
    Fault("learning rate far too high in one layer", "updates too large", layer_rate(2.0), ("CNN", "ViT")),
    Fault("learning rate far too low", "updates too small", rate(1e-11), ("CNN", "GPT", "LSTM")),
    Fault("learning rate zero", "learning rate is zero", rate(0.0), ("CNN", "LSTM")),
    Fault("learning rate zero in one group", "learning rate is zero", layer_rate(0.0), ("CNN", "ViT")),
    Fault("output detached", "no gradient", detached, ("CNN", "ResNet", "MLP")),
    Fault("layer never used", "no gradient", unused, ("ResNet", "ViT", "GPT", "LSTM")),
    Fault("layer replaced after the optimizer was made", "in no optimizer", replaced, ("CNN", "ViT", "LSTM")),
    Fault("layer in two optimizers", "in two optimizers", in_two, ("CNN", "ViT", "GPT")),
    Fault("weight written back after each step", "never moves", written_back, ("CNN", "ResNet", "LSTM")),
    Fault("bfloat16 weights, updates rounded away", "updates lost", rounded, ("CNN", "MLP")),
    Fault("BatchNorm with batch 1", "BatchNorm with batch 1", one_sample, ("ResNet",)),
    Fault("BatchNorm with momentum 0", "BatchNorm statistics frozen", momentum, ("ResNet",)),
    Fault(
        "BatchNorm frozen with other data's statistics", "BatchNorm statistics frozen", alien_statistics, ("ResNet",)
    ),
    Fault("BatchNorm whose input grows each step", "BatchNorm statistics diverge", running_away, ("ResNet",)),
    Fault("evaluated in train mode", "train mode in evaluation", evaluated, ("ResNet", "ViT", "GPT")),
    Fault("one layer left in train mode in evaluation", "train mode in evaluation", stays_train, ("ResNet", "ViT")),
    Fault("trained in eval mode", "eval mode in training", whole_eval, ("ResNet", "ViT", "GPT")),
    Fault("one layer left in eval mode in training", "eval mode in training", one_eval, ("ResNet", "ViT")),
    Fault("mean over the batch in a layer", "constant output", batch_mean, ("CNN", "MLP")),
    Fault("weights zero, frozen", "constant output", zero_weight, ("CNN", "MLP")),
    Fault("weights all alike", "symmetry", alike, ("MLP", "CNN")),
    Fault("loss of a detached output", "loss ignores the input", other_output, ("CNN", "ViT")),
    Fault("same output for all samples", "loss ignores the input", drowned, ("CNN", "LSTM")),
    Fault("weights thrown off at one step", "loss spike", kick, ("CNN", "LSTM", "MLP")),
    Fault("learning rate spikes for one step", "loss spike", rate_spike, ("CNN", "LSTM", "MLP")),
    Fault("loss of the wrong scale at one step", "loss spike", bad_targets, ("CNN", "LSTM")),
    Fault("hook that keeps what an in-place ReLU overwrites", "overwritten capture", naive_hook, ("CNN",)),
)


@dataclass
class Case:
    """A fault planted in one training, and what was found."""

    fault: Fault
    model: str
    seed: int
    layer: str = ""
    found: health.Findings = field(default_factory=health.Findings)

    def run(self, *, whole: bool) -> None:
        """Train for 20 steps; unless `whole` no further than to where the fault is named."""
        training = Training(self.model, self.seed, **self.fault.options)
        self.layer = self.fault.plant(training)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some faults are so plain that a probe tells without checks
            self.found = training.run(20, until=None if whole else self.is_right)

    def is_right(self, found: health.Finding) -> bool:
        return found.check == self.fault.check and self.layer in (found.layer, "*")

    @property
    def named(self) -> bool:
        """Whether the fault was named, with the right layer."""
        return any(map(self.is_right, self.found))

    @property
    def first(self) -> bool:
        """Whether the worst finding is the right one."""
        return bool(self.found) and self.is_right(self.found[0])


def sabotaged(seed: int) -> list[Case]:
    """Every fault, in one of its models, at a random layer."""
    return [Case(fault, fault.on[(seed + i) % len(fault.on)], seed) for i, fault in enumerate(FAULTS)]


AREAS = {
    "where NaN and Inf began, forward, backward and in the loss": ("NaN or Inf", "NaN or Inf in gradients"),
    "dead, constant and saturated layers, attention, float16's range, overwritten captures": (
        "dead units",
        "constant output",
        "saturated",
        "attention collapsed",
        "float16 overflow",
        "float16 underflow",
        "overwritten capture",
    ),
    "gradients that vanish, explode, are missing, or are all alike": (
        "gradients vanishing",
        "gradients exploding",
        "no gradient",
        "symmetry",
    ),
    "updates too large, too small or lost; learning rates and optimizers": (
        "updates too large",
        "updates too small",
        "updates lost",
        "never moves",
        "learning rate is zero",
        "in no optimizer",
        "in two optimizers",
    ),
    "train and eval mode, BatchNorm": (
        "train mode in evaluation",
        "eval mode in training",
        "BatchNorm with batch 1",
        "BatchNorm statistics frozen",
        "BatchNorm statistics diverge",
    ),
    "losses that ignore the input, or jump": ("loss ignores the input", "loss spike"),
}
"""What the findings are about, for the short table."""


def short_table(cases: list[Case], alarms: list[health.Findings]) -> str:
    """Hits and false alarms by area, as Markdown."""
    rows = ["| findings about | planted faults | named, with the right layer |", "|---|---:|---:|"]
    for area, checks in AREAS.items():
        own = [case for case in cases if case.fault.check in checks]
        rows.append(f"| {area} | {len(own)} | {sum(case.named for case in own)} |")
    rows.append(f"| all | {len(cases)} | {sum(case.named for case in cases)} |")
    rows.append(f"| any, in {len(alarms)} sound trainings | 0 | {sum(len(found) for found in alarms)} |")
    return "\n".join(rows)


def table(cases: list[Case], alarms: dict[str, health.Findings]) -> str:
    """Hits and false alarms by fault, as Markdown."""
    rows = ["| planted fault | finding | planted | named, with the right layer |", "|---|---|---:|---:|"]
    for fault in FAULTS:
        own = [case for case in cases if case.fault is fault]
        rows.append(f"| {fault.name} | {fault.check} | {len(own)} | {sum(case.named for case in own)} |")
    rows.append(f"| all | | {len(cases)} | {sum(case.named for case in cases)} |")
    rows += ["", "| sound training | trainings | findings |", "|---|---:|---:|"]
    for name in HEALTHY:
        found = [each for label, each in alarms.items() if label.startswith(f"{name},")]
        rows.append(f"| {name} | {len(found)} | {sum(map(len, found))} |")
    rows.append(f"| all | {len(alarms)} | {sum(map(len, alarms.values()))} |")
    return "\n".join(rows)


def measure(seeds: Iterable[int]) -> tuple[list[Case], dict[str, health.Findings]]:
    """Run everything; tell of what went wrong on the way."""
    cases: list[Case] = []
    alarms: dict[str, health.Findings] = {}
    for seed in seeds:
        for case in sabotaged(seed):
            case.run(whole=True)  # whether it comes first is told below
            cases.append(case)
            if not case.first:
                found = [(each.check, each.layer, each.step) for each in case.found[:4]]
                how = "not first" if case.named else "MISSED"
                print(f"{how}: {case.fault.name}, {case.model} {case.layer!r}, seed {seed}: {found}")
        for label, training in healthy(seed):
            alarms[label] = training.run()
            if alarms[label]:
                print(f"FALSE ALARM: {label}: {alarms[label]}")
    return cases, alarms


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the health checks on trainings, sound and sabotaged.")
    parser.add_argument("--seeds", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed; the tests have 0 (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases, alarms = measure(range(args.first, args.first + args.seeds))
    print(short_table(cases, list(alarms.values())), table(cases, alarms), sep="\n\n")


if __name__ == "__main__":
    main()
