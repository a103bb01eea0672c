"""Tiny models with every structure that hooks get wrong, and the oracle: the same forward without in-place writes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.data import Dataset


class OutOfPlace(TorchFunctionMode):
    """Inside this mode in-place operations make new tensors; models must use what such an operation returns."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = (resolve_name(func) or "").rsplit(".", 1)[-1]
        if kwargs.get("inplace"):
            kwargs["inplace"] = False
        writes = name.endswith("_") and not name.endswith("__") and isinstance(args[0], torch.Tensor)  # `+=` is add_
        if writes and (args[0].grad_fn or not torch.is_grad_enabled()):  # a tensor of the graph, not a buffer
            # what has no form that returns (zero_) is written for its effect on a tensor of the model's own
            return getattr(torch.Tensor, name[:-1], func)(*args, **kwargs)
        return func(*args, **kwargs)


def references(model: nn.Module, *args: Any, backward: bool = True, **kwargs: Any) -> dict[str, list[tuple[Any, Any]]]:
    """Per module name the ``(output, gradient)`` of each call, by plain hooks on a run without in-place writes."""
    seen: dict[str, list[list[Any]]] = {}
    handles = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                entry = [output.detach(), None]
                seen.setdefault(name, []).append(entry)
                if output.requires_grad:
                    output.register_hook(lambda g: entry.__setitem__(1, g.clone()))

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(remember(name)))
    with OutOfPlace():
        out = model(*args, **kwargs)
        if backward:
            loss(out).backward()
    for handle in handles:
        handle.remove()
    return {name: [(o, g) for o, g in calls] for name, calls in seen.items()}


def loss(value: Any) -> torch.Tensor:
    """A loss that depends on every floating tensor in a nested value, each element with another weight."""
    from probe.tree import leaves

    total = torch.zeros((), dtype=torch.float32)
    for _, tensor in leaves(value):
        if tensor.requires_grad:
            weight = torch.linspace(0.5, 1.5, tensor.numel(), device=tensor.device).view(tensor.shape)
            total = total + (tensor.float() * weight).sum()
    return total


class Residual(nn.Module):
    """``+=`` on a normalised branch and an in-place ReLU after it, as torchvision's residual blocks."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn(self.conv(x))
        out += x
        return self.relu(out)


class ConvNet(nn.Module):
    """Convolutions with in-place ReLUs, a residual block, a head. Input ``[B, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.block = Residual()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(self.pool(self.block(self.features(x))), 1))


class Swish(nn.Module):
    """A hand-written swish: two nodes consume its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class Shortcut(nn.Module):
    """A module beside a shortcut: its share of the input's gradient is not the whole. Input ``[B, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.swish = Swish()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc(x)
        return self.swish(hidden) + 10 * hidden + x


class Shared(nn.Module):
    """One module under two names, called three times. Input ``[B, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.act = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(self.act(self.second(self.act(self.first(x)))))


class Recurrent(nn.Module):
    """An RNNCell in a loop. Input ``[B, T, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return h


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclass
class Out:
    logits: torch.Tensor
    hidden: list[torch.Tensor]
    cache: Any = None


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """A mapping with attribute access, as Hugging Face's."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Structured(nn.Module):
    """Returns one of many structures. Input ``[B, 4]``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = Structuring(how)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(self.fc(x))


class Structuring(nn.Module):
    """Puts two functions of its input into a structure."""

    HOW = ("tuple", "list", "dict", "namedtuple", "dataclass", "modeloutput", "nested")

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> Any:
        a, b = x * 2, x.exp()
        return {
            "tuple": lambda: (a, None, b, 3),
            "list": lambda: [a, b],
            "dict": lambda: {"a": a, "b": b, "n": x.argmax(1)},
            "namedtuple": lambda: Pair(a, b),
            "dataclass": lambda: Out(a, [b]),
            "modeloutput": lambda: ModelOutput(logits=a, hidden=(b,)),
            "nested": lambda: ({"a": [a]}, Out(b, [], cache=object())),
        }[self.how]()


class HFBlock(nn.Module):
    """A transformer layer in Hugging Face's manner: everything by keyword, a tuple out."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[Any, ...]:
        q, k, v = self.query_key_value(self.norm(hidden_states)).chunk(3, -1)
        mask = None if attention_mask is None else attention_mask[:, None].bool()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (hidden_states + self.dropout(self.dense(mixed)), None)


class HFModel(nn.Module):
    """Keyword-only inputs and a ModelOutput, as Hugging Face's. ``input_ids`` ``[B, T]`` of int64 below 11."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([HFBlock(), HFBlock()])
        self.head = nn.Linear(8, 11)

    def forward(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> ModelOutput:
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden_states=hidden, attention_mask=attention_mask)[0]
        return ModelOutput(logits=self.head(hidden), hidden_states=(hidden,))


class PassThrough(nn.Module):
    """Identity and dropout in eval mode return the very tensor they were given. Input ``[B, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.identity = nn.Identity()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        return self.drop(self.identity(h)) + 3 * h


class Gain(nn.Module):
    """Returns a view of what it computed; that nobody else ever sees that, only its author can know."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.gain).view(x.shape)


class ViewThenWrite(nn.Module):
    """A module returns a view; the in-place ReLU after it makes torch forget a hook on that view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = Gain()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm(self.conv(x)))


class Attention(nn.Module):
    """MultiheadAttention, which never calls its ``out_proj``. Input ``[B, T, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.attn(x, x, x, need_weights=False)[0])


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a probe must leave as it was, in a form that compares with ``==``."""
    found: dict[str, Any] = {"rng": torch.get_rng_state().tolist()}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_buffers", "_modules") or (isinstance(value, dict) and "hook" in key):
                found[f"{name}|{key}"] = [(k, id(v)) for k, v in value.items()]
            else:
                found[f"{name}|{key}"] = repr(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else tensor.grad.tolist()
        hooks = None if tensor._backward_hooks is None else list(tensor._backward_hooks)
        found[f"tensor {name}"] = (tensor.tolist(), tensor.requires_grad, grad, tensor.data_ptr(), hooks)
    return found


class Featurised(Dataset):  # type: ignore[type-arg]
    """A data set that runs a (probed) model in its workers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.full((2,), float(index)))
