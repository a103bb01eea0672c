"""What capturing every output costs, against a bare forward hook: ``python -m benchmarks.capture``.

The bare hook stores a reference. It is the limit: a hook costs at least that, and on models that write in place what it
holds is wrong. Forward only, under no_grad. The other lines are the model after the probe has left it, against before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.models import MODELS
from benchmarks.timing import Ratio, compare, machine
from probe import Kind, Probe


def against_bare_hook(model: nn.Module, x: torch.Tensor, seconds: float) -> Ratio:
    """The ratio of a forward under ``Probe(model, kinds=Kind.OUTPUT)`` to one with bare reference hooks.

    Two models of the same weights, so that neither carries the other's hooks.
    """
    import copy

    twin = copy.deepcopy(model)
    with Probe(model, kinds=Kind.OUTPUT) as p:
        held: dict[str, Any] = {}
        names = set(p)
        handles = [
            module.register_forward_hook(_keeper(held, name)) for name, module in twin.named_modules() if name in names
        ]
        ratio = compare(lambda: model(x), lambda: twin(x), seconds=seconds)
    for handle in handles:
        handle.remove()
    return ratio


def _keeper(held: dict[str, Any], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        held[name] = output

    return keep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds = 1.0 if options.quick else 10.0
    print(machine())
    cases: list[tuple[str, dict[str, int]]] = [
        ("gpt", {}),
        ("resnet18", {"batch": 1}),
        ("resnet18", {"batch": 16}),
        ("mlp200", {"batch": 8}),
    ]
    with torch.no_grad():
        for name, settings in cases:
            model, x = MODELS[name](**settings)
            model.eval()
            label = f"{name} {' '.join(f'{k}={v}' for k, v in settings.items())}".strip()
            print(f"{label:20} capturing all outputs / bare reference hook: {against_bare_hook(model, x, seconds)}")
            twin, _ = MODELS[name](**settings)
            twin.eval()
            after = compare(lambda: model(x), lambda: twin(x), seconds=seconds)  # noqa: B023  # run at once
            print(f"{label:20} after the probe has left / never probed:    {after}")


if __name__ == "__main__":
    main()
