"""Health checks: each on a training that has the fault, on a sound one, and on the way to the board."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from probe import Probe, health


def mlp(depth: int = 3, act: type[nn.Module] = nn.ReLU, width: int = 16) -> nn.Sequential:
    """``[B, 8]`` to three classes; layers ``"0"``, ``"2"``, ... are linear, the ones between them activations."""
    layers: list[nn.Module] = [nn.Linear(8, width), act()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), act()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def batch(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 8), torch.randint(0, 3, (size,))


def train(model: nn.Module, optimizer: Any, steps: int = 10, observers: Any = None, **options: Any) -> health.Findings:
    """The findings of a short training on random data."""
    checks = health.checks() if observers is None else observers
    with Probe(model, optimizer=optimizer, observers=checks, **options) as p:
        for _ in range(steps):
            x, y = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return p.findings


def names(found: health.Findings) -> list[tuple[str, str]]:
    return [(each.check, each.layer) for each in found]


def test_silence_when_all_is_well() -> None:
    """A sound training has no finding, and the report says so."""
    model = mlp()
    found = train(model, torch.optim.SGD(model.parameters(), 0.1))
    assert found == []
    assert str(found) == "nothing found (10 steps examined)"


def test_findings_without_checks_are_refused() -> None:
    """An empty list would look like a clean bill of health."""
    with pytest.raises(AttributeError, match=r"health\.checks"):
        _ = Probe(mlp()).findings


@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_nan_is_named_where_it_began(layer: str) -> None:
    """Not where it is passed on."""
    model = mlp()
    with torch.no_grad():
        model.get_submodule(layer).weight[0, 0] = torch.nan
    found = train(model, torch.optim.SGD(model.parameters(), 0.1))
    assert names(found) == [("NaN or Inf", layer)]


def test_check_leaves_the_model_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters, gradients, optimizer state and random numbers."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    health.check(model, F.cross_entropy, *batch(), optimizer=optimizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state
    x, _ = batch()
    torch.set_rng_state(rng)
    batch()
    assert torch.equal(x, batch()[0])
    assert "nothing found" in capsys.readouterr().out
