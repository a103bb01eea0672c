"""What can go wrong in a training (`FAULTS`), and how it is planted in one, at a random layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe import Probe
from tests.trainings import Training, cross_entropy, digits, mlp


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
