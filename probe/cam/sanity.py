"""The sanity check: a map that explains the model must change with its weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from probe.cam.explain import LayerSpec, Method, Target, explain, fixed_layer
from probe.cam.methods.gradient import grad_cam
from probe.cam.state import silent, untouched
from probe.cam.targets import Classes, resolve


class SanityCheck(list[tuple[str, float]]):
    """Rows ``(module, correlation)``: what is left of the map once everything from the output down to it is random."""

    def __str__(self) -> str:
        width = max((len(name) for name, _ in self), default=0)
        return "\n".join(f"{name:<{width}}  {value:+.3f}" for name, value in self)


def sanity_check(
    model: nn.Module,
    images: Tensor,
    *,
    layer: LayerSpec | None = None,
    target: Target = None,
    method: Method = grad_cam,
    seed: int = 0,
) -> SanityCheck:
    """The sanity check by cascading randomisation: a map that explains the model must change with its weights.

    Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018 (arXiv:1810.03292). Layer by layer from the output
    to the input, weights are drawn anew in a copy of the model; each time the map's rank correlation (Spearman's, of
    its absolute values, mean over samples) with the original map is taken. It should fall towards 0; a method whose
    correlation stays high draws the image and not the model.

    Arguments:
        model: left alone.
        images: ``[B, C, *size]``.
        layer, target, method: as for `explain`; with ``target=None`` the original model's top classes.
        seed: of the random weights.

    Returns:
        one row for every module with weights, in the order in which they became random.
    """
    with untouched(model, [images]):
        chosen = resolve(target, model(images), len(images))
    fixed = chosen.index if isinstance(chosen, Classes) else target
    layer = fixed_layer(model, images, layer, fixed)
    original = explain(model, images, layer=layer, target=fixed, method=method)
    twin = copy.deepcopy(model)
    found = SanityCheck()
    owners = [(name, module) for name, module in twin.named_modules() if list(module.parameters(recurse=False))]
    with torch.random.fork_rng(range(torch.cuda.device_count())), silent():
        torch.manual_seed(seed)
        for name, module in reversed(owners):
            _randomise(module)
            maps = explain(twin, images, layer=layer, target=fixed, method=method)
            found.append((name, float(rank_correlation(maps.abs(), original.abs()).mean())))
    return found


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each sample's values, ``[B]``; ties share their mean rank."""
    ranked = [_mean_ranks(each.flatten(1)) for each in (a, b)]
    centred = [each - each.mean(1, keepdim=True) for each in ranked]
    norm: Tensor = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    return (centred[0] * centred[1]).sum(1) / norm.masked_fill(norm == 0, 1)


def _mean_ranks(values: Tensor) -> Tensor:
    values = values.contiguous()
    ordered = values.sort(1).values
    low, high = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    ranked: Tensor = (low + high - 1).double() / 2
    return ranked


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for parameter in module.parameters(recurse=False):
        deviation = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
        parameter.normal_(0, deviation or 0.02)
