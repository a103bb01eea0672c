"""Which dimension of an activation means what: channels first, channels last, or tokens with some in front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

KINDS = ("channels_first", "channels_last", "tokens")

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)
_MOST_PREFIX = 16


class AmbiguousLayout(ValueError):
    """The shape of an activation does not tell which dimensions are space; the message says what to pass."""


@dataclass(frozen=True)
class Layout:
    """How a layer's output is laid out.

    Arguments:
        kind: ``"channels_first"`` ``[B, C, *spatial]``, ``"channels_last"`` ``[B, *spatial, C]``, or ``"tokens"``
            ``[B, prefix + positions, C]``.
        grid: the spatial size, for tokens.
        prefix: how many tokens (class, distillation, registers) stand before those of the grid.
        batch: the dimension that is the batch: 1 for sequence-first ``[N, B, C]`` tokens.
    """

    kind: str
    grid: tuple[int, ...] = ()
    prefix: int = 0
    batch: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a layout is {', '.join(map(repr, KINDS))}, not {self.kind!r}")
        if self.kind == "tokens" and not self.grid:
            raise ValueError('Layout("tokens") needs the grid of the tokens: Layout("tokens", grid=(14, 14), prefix=1)')

    def channels_first(self, tensor: Tensor) -> Tensor:
        """``[B, C, *spatial]``, without the tokens in front.

        Raises:
            ValueError: the tensor does not have this layout.
        """
        if self.kind == "channels_first":
            return tensor
        if self.kind == "channels_last":
            return tensor.movedim(-1, 1)
        tokens = tensor.movedim(self.batch, 0)
        if tokens.dim() != 3 or tokens.shape[1] != self.prefix + _count(self.grid):
            raise ValueError(
                f"{tuple(tensor.shape)} are not {self.prefix} + {' x '.join(map(str, self.grid))} tokens [B, N, C]"
            )
        kept = tokens[:, self.prefix :].transpose(1, 2)
        return kept.reshape(*kept.shape[:2], *self.grid)

    def restore(self, value: Tensor, like: Tensor) -> Tensor:
        """The inverse of `channels_first`, with the tokens in front taken from `like` (which has this layout)."""
        if self.kind == "channels_first":
            return value
        if self.kind == "channels_last":
            return value.movedim(1, -1)
        front = like.movedim(self.batch, 0)[:, : self.prefix]
        return torch.cat([front, value.flatten(2).transpose(1, 2)], 1).movedim(0, self.batch)

    def spatial(self, relevance: Tensor) -> Tensor:
        """Relevance of each token ``[B, N]`` to a map ``[B, *grid]``."""
        if relevance.shape[1] != self.prefix + _count(self.grid):
            raise ValueError(f"{relevance.shape[1]} tokens are not {self.prefix} + {' x '.join(map(str, self.grid))}")
        return relevance[:, self.prefix :].reshape(-1, *self.grid)


def infer(
    shape: Sequence[int], *, inputs: Iterable[Tensor], batch: int, module: nn.Module, model: nn.Module, name: str
) -> Layout:
    """The layout of a layer's output, from its shape, the model's inputs, and what kind of layer it is.

    Convolutions and linear layers have theirs by definition. For all others: space keeps the input's aspect ratio and
    channels do not; where that does not decide, the width of the layer's last weights does (or of those before it, for
    a layer without any). The grid of tokens comes from the input's size and the patch embedding.

    Arguments:
        shape: of the activation.
        inputs: the tensors that the model was called with.
        batch: the batch size.
        module: the layer.
        model: where the patch embedding is looked for.
        name: of the layer, for the error.

    Raises:
        AmbiguousLayout: more than one layout fits, or none.
    """
    shape = tuple(shape)
    if len(shape) < 3:
        raise AmbiguousLayout(
            f"the output of layer {name!r} has shape {shape}, without space to draw a map on: choose an earlier layer, "
            "before the pooling or flattening"
        )
    kind = _kind(module)
    if kind is not None and shape[0] == batch and (len(shape) > 3 or kind == "channels_first"):
        return Layout(kind)
    sizes = [size for tensor in inputs if (size := input_size(tensor, batch))]
    same_rank = [size for size in sizes if len(size) == len(shape) - 2]
    if same_rank and (found := _by_aspect(shape, same_rank[0])):
        return found
    if len(shape) == 3:
        order = 0 if shape[0] == batch or shape[1] != batch else 1
        images = [size for size in sizes if len(size) >= 2]
        if images:
            grid = token_grid(shape[1 - order], images[0], model)
            if grid:
                return replace(grid, batch=order)
            raise _ambiguous(name, shape, f"tokens of an input of size {_times(images[0])}")
        lengths = {tensor.shape[1] for tensor in inputs if tensor.dim() >= 2 and not tensor.is_floating_point()}
        if shape[1 - order] in lengths or order == 1:
            return Layout("tokens", grid=(shape[1 - order],), batch=order)
    for each in (module, *_before(module, model)):
        width = _width(each)
        if width is not None and (shape[1] == width) != (shape[-1] == width):
            return Layout("channels_first" if shape[1] == width else "channels_last")
    kinds = {_kind(leaf) for each in (module, *_before(module, model)) for leaf in each.modules()} - {None}
    if len(shape) > 3 and kinds == {"channels_first"}:
        return Layout("channels_first")
    raise _ambiguous(name, shape, "a map" if not sizes else f"an input of size {_times(sizes[0])}")


def _ambiguous(name: str, shape: tuple[int, ...], what: str) -> AmbiguousLayout:
    example = 'Layout("tokens", grid=(14, 14), prefix=1)' if len(shape) == 3 else 'Layout("channels_last")'
    return AmbiguousLayout(
        f"the output of layer {name!r} has shape {shape}, and more than one layout, or none, makes that {what}. "
        f"Say which: layer=cam.At({name!r}, cam.{example}); the kinds are {', '.join(map(repr, KINDS))}"
    )


def _count(grid: Sequence[int]) -> int:
    return math.prod(grid)


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def input_size(tensor: Tensor, batch: int) -> tuple[int, ...]:
    """Spatial size of an input ``[B, C, *spatial]``, or channels last where the last dimension looks like colour."""
    if not tensor.is_floating_point() and tensor.dtype != torch.uint8:
        return ()
    shape = tuple(tensor.shape)
    if len(shape) == 3 and shape[0] != batch and shape[0] in (1, 3):  # one image of a list
        return shape[1:]
    if len(shape) < 3:
        return ()
    return shape[1:-1] if len(shape) > 3 and shape[-1] in (1, 3, 4) and shape[1] > 4 else shape[2:]


def _by_aspect(shape: tuple[int, ...], size: tuple[int, ...]) -> Layout | None:
    """The one layout whose spatial dimensions are the input's, scaled alike; None if both or neither fits."""
    # of a volume or a video only height and width: time and depth are scaled as they like
    first, last = (_stretch(space[-2:], size[-2:]) for space in (shape[2:], shape[1:-1]))
    tolerance = 0.3
    if len(size) == 1:  # a single dimension has no aspect: only its exact length tells
        first, last = (abs(math.log(space / size[0])) for space in (shape[2], shape[1]))
        tolerance = 0.0
    if first <= tolerance < last and last - first > 0.2:
        return Layout("channels_first")
    if last <= tolerance < first and first - last > 0.2:
        return Layout("channels_last")
    exact = [_exact(space[-2:], size[-2:]) for space in (shape[2:], shape[1:-1])]
    if len(size) > 1 and exact[0] != exact[1]:
        return Layout("channels_first" if exact[0] else "channels_last")
    return None


def _exact(space: Sequence[int], size: Sequence[int]) -> bool:
    """Whether every dimension is the input's divided by the same whole number."""
    return len({n / s for s, n in zip(space, size, strict=True)}) == 1 and size[0] % space[0] == 0


def _stretch(space: Sequence[int], size: Sequence[int]) -> float:
    """How differently the dimensions were scaled: the log of the factor; infinite where one grew more than 4 times."""
    if any(s == 0 or s > 4 * n for s, n in zip(space, size, strict=True)):
        return math.inf
    # half a position of rounding is a large factor where only a few positions are left
    factors = [math.log(n / s) for s, n in zip(space, size, strict=True)]
    rounding = max(math.log((s + 1) / s) for s in space)
    return max(0.0, max(factors) - min(factors) - rounding)


def _kind(module: nn.Module) -> str | None:
    """The layout that a layer has by definition."""
    if isinstance(module, _CHANNELS_FIRST):
        return "channels_first"
    return "channels_last" if type(module) in (nn.Linear, nn.LayerNorm) else None  # subclasses permute as they like


def _before(module: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The nearest module with weights that the model registered before `module`: what a ReLU works on."""
    order = list(model.modules())
    at = next((i for i, each in enumerate(order) if each is module), 0)
    leaves = [each for each in order[:at] if not list(each.children()) and _width(each) is not None]
    return leaves[-1:]


def _width(module: nn.Module) -> int | None:
    """How many channels the last layer with weights inside `module` makes."""
    for each in reversed(list(module.modules())):
        if isinstance(each, nn.modules.conv._ConvNd):
            return each.out_channels
        if isinstance(each, nn.Linear):
            return each.out_features
        if isinstance(each, nn.modules.batchnorm._NormBase):
            return each.num_features
        if isinstance(each, nn.GroupNorm):
            return each.num_channels
        if isinstance(each, nn.LayerNorm) and len(each.normalized_shape) == 1:
            return each.normalized_shape[0]
        if isinstance(each, nn.RNNBase):
            return (each.proj_size or each.hidden_size) * (2 if each.bidirectional else 1)
    return None


def token_grid(tokens: int, size: tuple[int, ...], model: nn.Module) -> Layout | None:
    """The grid that `tokens` tokens of an input of that size make, with the number in front; None if it isn't clear."""
    for patch in _patches(model, len(size)):
        grid: tuple[int, ...] = tuple(n // p for n, p in zip(size, patch, strict=True))
        if 0 <= tokens - _count(grid) <= _MOST_PREFIX and _count(grid):
            return Layout("tokens", grid=grid, prefix=tokens - _count(grid))
    if len(size) > 2:
        return None  # time and space are seldom merged alike
    # Merged patches (hierarchical models) or no known patch embedding: an exact grid, or one behind a class token.
    strides = [s for s in range(1, min(size) + 1) if all(n % s == 0 for n in size) or s & (s - 1) == 0]
    grids = {tuple(math.ceil(n / stride) for n in size) for stride in strides}
    fitting = [grid for grid in grids if 0 <= tokens - _count(grid) <= 1]
    if len(fitting) != 1:
        return None
    return Layout("tokens", grid=fitting[0], prefix=tokens - _count(fitting[0]))


def _patches(model: nn.Module, dims: int) -> list[tuple[int, ...]]:
    """Patch sizes of the model's patch embeddings: convolutions whose stride is their kernel."""
    return [
        tuple(module.stride)
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd)
        and len(module.stride) == dims
        and tuple(module.stride) == tuple(module.kernel_size)
        and max(module.stride) > 1
    ]
