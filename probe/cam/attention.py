"""See and change what a model computes in functions, where no module's hook reaches: attention weights, and ReLUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_SOFTMAX: tuple[Callable[..., Any], ...] = (F.softmax, torch.softmax, Tensor.softmax)
_RELU: tuple[Callable[..., Any], ...] = (F.relu, torch.relu, Tensor.relu)
_RELU_INPLACE: tuple[Callable[..., Any], ...] = (F.relu_, torch.relu_, Tensor.relu_)


class AttentionWeights(TorchFunctionMode):
    """Collects the attention weights of every self-attention that runs inside, ``[B, heads, N, N]``, in ``weights``.

    Sees ``nn.MultiheadAttention``, ``scaled_dot_product_attention`` (timm, Hugging Face), and a softmax over the last
    dimension of a square score matrix. With gradients enabled the weights are part of the graph: fused attention is
    then computed in steps, so that there is something to differentiate by.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.weights: list[Tensor] = []
        self.edges: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._scaled_dot_product(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _SOFTMAX and result.dim() in (3, 4) and result.shape[-1] == result.shape[-2]:
            self._note(result)
        return result

    def _note(self, weights: Tensor, edge: Any = None) -> None:
        self.edges.append(weights if edge is None else edge)
        heads = weights.detach()
        self.weights.append(heads.reshape(self.batch, -1, *heads.shape[-2:]) if len(heads) % self.batch == 0 else heads)

    def _multi_head(self, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("need_weights", True)
        averaged = kwargs.get("average_attn_weights", True)
        output, weights = F.multi_head_attention_forward(
            *args, **{**kwargs, "need_weights": True, "average_attn_weights": False}
        )
        assert weights is not None
        # What comes back is a view of the weights that the output was computed from; the gradient is at its parent.
        parent, number = (None, 0) if weights.grad_fn is None else weights.grad_fn.next_functions[0]
        self._note(weights, None if parent is None else torch.autograd.graph.GradientEdge(parent, number))
        if not wanted:
            return output, None
        return output, weights.mean(1) if averaged else weights

    def _scaled_dot_product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        logits = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        weights = logits.softmax(-1)
        if query.shape[-2] == key.shape[-2]:
            self._note(weights)
        return F.dropout(weights, dropout_p) @ value


def checked_attention(weights: Sequence[Tensor], batch: int) -> list[Tensor]:
    """The weights, if they are self-attention over one set of tokens in every layer.

    Raises:
        ValueError: the model has no attention, or attends within windows or between sets of different sizes.
    """
    if not weights:
        raise ValueError(
            "this model ran no self-attention that can be seen (nn.MultiheadAttention, "
            "scaled_dot_product_attention, or a softmax over a square score matrix); use a method on activations"
        )
    shapes = {tuple(each.shape) for each in weights}
    if any(len(shape) != 4 or shape[0] != batch for shape in shapes) or len({shape[-1] for shape in shapes}) > 1:
        raise ValueError(
            f"the attention weights have shapes {sorted(shapes)}: rollout and LeGrad need every layer to attend over "
            "the same tokens (no windows, no merging, as in Swin); use a method on activations"
        )
    return list(weights)


class GuidedReLU(TorchFunctionMode):
    """Guided back-propagation: every ReLU that runs inside also stops negative gradients. Counts them in ``found``.

    Springenberg et al., "Striving for Simplicity" (arXiv:1412.6806). It catches ``nn.ReLU`` and the functions, in place
    or not; no module is replaced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RELU or func in _RELU_INPLACE:
            self.found += 1
            values = [*args, *kwargs.values()]
            inplace = func in _RELU_INPLACE or any(value is True for value in values)
            return _Guided.apply(values[0], inplace)
        return func(*args, **kwargs)


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y = x.relu_() if inplace else x.relu()
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y > 0)  # not y: another ReLU may overwrite that
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (active,) = ctx.saved_tensors
        return gradients[0].clamp_min(0) * active, None
