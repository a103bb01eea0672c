"""What is measured of some kinds of modules and parameters only: numbers that stay on their device, by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from probe.capture import Layer
from probe.health.vitals import is_plain
from probe.tree import local

Facts = dict[str, Any]

ROWS = 64  # queries of the first sample whose attention is looked at

_ONE_D = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.MaxPool1d, nn.AvgPool1d)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_DROPOUTS = (nn.modules.dropout._DropoutNd,)

# The outputs between which the function still has a slope; beyond them less than a tenth of its greatest one.
_BOUNDED: dict[type[nn.Module], tuple[float, float]] = {
    nn.Sigmoid: (0.025, 0.975),
    nn.Tanh: (-0.95, 0.95),
    nn.Hardtanh: (-math.inf, math.inf),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Softsign: (-0.69, 0.69),
}


def heads(every: Iterable[Layer]) -> dict[int, int]:
    """By the id of a layer that makes queries, keys and values in one, how many heads its parent has."""
    found = {}
    for layer in every:
        for name in ("qkv", "c_attn"):
            child = layer.module._modules.get(name)
            own = layer.module.__dict__  # a module's own __getattr__ is not to be asked
            number = own.get("num_heads", own.get("n_head"))
            if child is not None and isinstance(number, int) and number > 0:
                found[id(child)] = number
    return found


def is_1d(module: nn.Module) -> bool:
    """Whether values ``[B, C, L]`` have their channels in dimension 1."""
    return isinstance(module, _ONE_D)


def input_facts(module: nn.Module, tensors: list[tuple[str, torch.Tensor]]) -> Facts:
    """What a module is about to be given, beside its inputs' vitals."""
    if isinstance(module, _BATCH_NORMS):
        return _batch_norm(module, tensors[0][1] if tensors else None)
    if isinstance(module, _DROPOUTS):
        facts: Facts = {"dropout": float(module.p)}
        if tensors and tensors[0][1].dim() == 4 and is_plain(tensors[0][1]):
            facts.update(peaked(tensors[0][1][:1, :, :ROWS]))
        return facts
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(module, [tensor for _, tensor in tensors[:2]])
    return {}


def output_facts(module: nn.Module, tensors: list[tuple[str, torch.Tensor]], heads: int | None = None) -> Facts:
    """What a module has returned, beside its outputs' vitals; `heads`: of the attention whose queries it makes."""
    if not tensors or not tensors[0][1].is_floating_point() or not is_plain(tensors[0][1]):
        return {}
    value = tensors[0][1]
    if heads is not None and value.dim() == 3 and value.shape[-1] % (3 * heads) == 0:
        q, k, _ = value[0].chunk(3, -1)
        return _from_queries(q[:ROWS], k, heads)
    if isinstance(module, nn.Softmax) and value.dim() >= 3 and module.dim in (-1, value.dim() - 1):
        return peaked(value[:1])
    if type(module) in _BOUNDED:
        low, high = _BOUNDED[type(module)]
        if isinstance(module, nn.Hardtanh):
            low, high = module.min_val, module.max_val
            return {"saturated": ((value <= low) | (value >= high)).float().mean()}
        return {"saturated": ((value < low) | (value > high)).float().mean()}
    return {}


def peaked(weights: torch.Tensor) -> Facts:
    """Of rows that are distributions over the last dimension: how many have nearly all weight in one place.

    ``peaked`` is the share of rows whose entropy is below a hundredth of the greatest possible one; ``sums`` is the
    largest difference of a row's sum from 1, which tells whether these are distributions at all.
    """
    if not is_plain(weights) or not weights.is_floating_point() or weights.shape[-1] < 2:
        return {}
    rows = weights.float()
    entropy = torch.special.entr(rows).sum(-1) / math.log(rows.shape[-1])
    return {"peaked": (entropy < 0.01).float().mean(), "sums": (rows.sum(-1) - 1).abs().amax()}


def _multihead(module: nn.MultiheadAttention, tensors: list[torch.Tensor]) -> Facts:
    """The attention of the first sample, computed once more from query and key, without masks."""
    weight = module.in_proj_weight
    if weight is None or len(tensors) < 2 or any(each.dim() != 3 for each in tensors):
        return {}
    if not all(map(is_plain, (weight, *tensors))):
        return {}
    width = module.embed_dim
    query, key = (each[0] if module.batch_first else each[:, 0] for each in tensors)
    bias = module.in_proj_bias
    q = nn.functional.linear(query[:ROWS].to(weight.dtype), weight[:width], None if bias is None else bias[:width])
    k = nn.functional.linear(
        key.to(weight.dtype), weight[width : 2 * width], None if bias is None else bias[width : 2 * width]
    )
    return _from_queries(q, k, module.num_heads)


def _from_queries(q: torch.Tensor, k: torch.Tensor, heads: int) -> Facts:
    q, k = (each.detach().float().unflatten(-1, (heads, -1)).transpose(0, 1) for each in (q, k))
    return peaked((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1))


def _batch_norm(module: Any, value: torch.Tensor | None) -> Facts:
    """The batch beside the running statistics: ``shift`` of means in standard deviations, ``scale`` of variances."""
    if value is None or value.dim() < 2 or not is_plain(value):
        return {}
    count = value.numel() // value.shape[1]
    facts: Facts = {"batch": len(value), "momentum": module.momentum}
    if module.running_mean is None or count < 2 or not is_plain(module.running_mean):
        return facts
    others = [dim for dim in range(value.dim()) if dim != 1]
    value = value.float()
    mean = value.mean(dim=others, keepdim=True)
    # the unbiased one, as is running_var; on the CPU many times quicker than `torch.var_mean`
    var = (value - mean).square_().sum(dim=others) / (count - 1)
    running = module.running_var.float() + module.eps
    facts["shift"] = ((mean.flatten() - module.running_mean).abs() / running.sqrt()).median()
    facts["scale"] = ((var + module.eps) / running).median()
    facts["tracked"] = module.num_batches_tracked.clone()
    return facts


def row_facts(name: str, type_: type, rows: torch.Tensor) -> Facts:
    """How unlike the rows of a weight, or of its gradient, are: 0 where all units are the same; NaN where all are 0."""
    if rows.dim() < 2 or len(rows) < 2 or not is_plain(rows) or issubclass(type_, nn.Embedding):
        return {}
    return {name: (rows[1:] - rows[:1]).abs().amax() / rows.abs().amax()}


def rounding_facts(parameter: torch.Tensor, update: torch.Tensor) -> Facts:
    """Of a parameter in half precision: the share of elements with a gradient that the update left as they were."""
    grad = None if parameter.grad is None else local(parameter.grad)
    if parameter.dtype not in (torch.float16, torch.bfloat16) or grad is None or not is_plain(grad):
        return {}
    return {"unmoved": ((update == 0) & (grad != 0)).sum() / (grad != 0).sum()}
