"""Hypothesis strategies: module trees with every trait that hooks get wrong."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from tests.zoo import Swish

WIDTH = 4


class Plus(nn.Module):
    """A body with a shortcut added in place, then an in-place ReLU."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.last = nn.Linear(WIDTH, WIDTH)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.last(self.body(x))
        out += x
        return self.relu(out)


class Often(nn.Module):
    """Calls its body several times: shared, or recurrent."""

    def __init__(self, body: nn.Module, times: int) -> None:
        super().__init__()
        self.body = body
        self.alias = body
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = self.body(x)
        return self.alias(x)


class Parts(nn.Module):
    """Returns a nested structure around its body's output."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *, x: torch.Tensor) -> dict[str, Any]:
        return {"hidden": [self.body(x), x * 2], "none": None, "count": 3}


class Joined(nn.Module):
    """Calls `Parts` by keyword and puts the parts together again."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.parts = Parts(body)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.parts(x=x)
        return out["hidden"][0] + out["hidden"][1]


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def _inplace() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))


_leaves = st.sampled_from(
    [
        lambda: nn.Linear(WIDTH, WIDTH),
        lambda: _frozen(nn.Linear(WIDTH, WIDTH)),
        lambda: nn.LayerNorm(WIDTH),
        _inplace,
        nn.Tanh,
        Swish,
        nn.Identity,
    ]
).map(lambda make: make())

trees = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: nn.Sequential(*parts)),
        inner.map(Plus),
        st.tuples(inner, st.integers(1, 2)).map(lambda args: Often(*args)),
        inner.map(Joined),
    ),
    max_leaves=6,
)
"""Modules from ``[B, 4]`` to ``[B, 4]``: in-place, shared, recurrent, nested outputs, keywords, frozen parts."""

batches = st.integers(1, 3)
