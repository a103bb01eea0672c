"""The models that are timed, with random weights and random inputs."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A small GPT: token and position embeddings, `depth` blocks, a head."""

    def __init__(self, depth: int = 6, width: int = 256, heads: int = 8) -> None:
        super().__init__()
        vocabulary = length = 512
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def gpt(batch: int = 4, size: int = 128) -> tuple[nn.Module, torch.Tensor]:
    """A GPT of 6 layers, width 256, on sequences of `size` (at most 512) tokens."""
    if size > 512:
        raise SystemExit(f"--size {size}: gpt has positions for 512 tokens at most")
    return GPT(), torch.randint(0, 512, (batch, size))


def mlp200(batch: int = 8) -> tuple[nn.Module, torch.Tensor]:
    """200 layers of Linear(64, 64): nothing but the cost of calling modules.

    Orthogonal weights, so that gradients do not fade into denormal numbers, which CPUs are slow at.
    """
    layers = [nn.Linear(64, 64) for _ in range(200)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*layers), torch.randn(batch, 64)


def resnet18(batch: int = 1, size: int = 224) -> tuple[nn.Module, torch.Tensor]:
    """torchvision's resnet18, on pictures of `size` pixels a side."""
    from torchvision.models import resnet18

    return resnet18(), torch.randn(batch, 3, size, size)


def resnet50(batch: int = 1, size: int = 224) -> tuple[nn.Module, torch.Tensor]:
    """torchvision's resnet50, on pictures of `size` pixels a side."""
    from torchvision.models import resnet50

    return resnet50(), torch.randn(batch, 3, size, size)


def vit_b_16(batch: int = 1) -> tuple[nn.Module, torch.Tensor]:
    """torchvision's vit_b_16, with a head that is not all zeros, as which torchvision begins it."""
    from torchvision.models import vit_b_16

    model = vit_b_16()
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model, torch.randn(batch, 3, 224, 224)


MODELS: dict[str, Callable[..., tuple[nn.Module, Any]]] = {
    "gpt": gpt,
    "mlp200": mlp200,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vit_b_16": vit_b_16,
}


def build(spec: str, **settings: Any) -> tuple[nn.Module, Any]:
    """The model and the inputs that `spec` names: one of `MODELS`, or ``module:function``, a function of your own.

    The function returns ``(model, inputs)``; the inputs are a tensor, a tuple of arguments or a dict of keywords.

    Arguments:
        spec: the name.
        settings: what the function is called with (``batch=``, ``size=``).

    Raises:
        SystemExit: there is no such model, or it can't be made so; the message says what there is.
    """
    if spec in MODELS:
        function: Any = MODELS[spec]
    elif ":" in spec:
        module, _, name = spec.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise SystemExit(f"--model {spec}: {error}") from error
        finally:
            sys.path.remove(os.getcwd())
    else:
        known = ", ".join(MODELS)
        raise SystemExit(f"--model {spec}: there are {known}; your own: --model package.module:function")
    try:
        inspect.signature(function).bind(**settings)
    except TypeError as error:
        raise SystemExit(f"--model {spec}: {error}") from error
    made = function(**settings)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise SystemExit(f"--model {spec}: the function must return (model, inputs), not {type(made).__name__}")
    return made
