"""What a model is called with: which dimension is the batch, which tensor is the picture."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from probe import tree
from probe.cam import layout as layouts


class Inputs:
    """Positional and named arguments, the batch first.

    Arguments:
        args, kwargs: as given; inference tensors are copied, so that autograd can work with them.

    Raises:
        ValueError: there is no batch in them.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = tuple(_ordinary(each) for each in args)
        self.kwargs = {name: _ordinary(each) for name, each in kwargs.items()}
        self.tensors = [tensor for _, tensor in tree.input_leaves(self.args, self.kwargs)]
        self.batch = _batch(self.args, self.tensors)

    def of(self, samples: Tensor | slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of some samples: whatever has the batch in front is indexed."""

        args, kwargs = pytree.tree_map_only(Tensor, lambda each: self._rows(each, samples), (self.args, self.kwargs))
        return args, kwargs

    def _rows(self, tensor: Tensor, samples: Tensor | slice) -> Tensor:
        if tensor.dim() == 0 or len(tensor) != self.batch:
            return tensor
        return tensor[samples if isinstance(samples, slice) else samples.to(tensor.device)]

    @property
    def has_image(self) -> bool:
        """Whether one of them has space."""
        return self._image() is not None

    def image(self) -> tuple[Tensor, tuple[int, ...], bool]:
        """The input that masks are laid on: the tensor, its spatial size, and whether its channels come last.

        Raises:
            ValueError: no input has space.
        """
        found = self._image()
        if found is None:
            raise ValueError("this method changes the input image, and no input is a float tensor [B, C, *spatial]")
        tensor, size = found
        return tensor, size, size != tuple(tensor.shape[2:])

    def _image(self) -> tuple[Tensor, tuple[int, ...]] | None:
        for tensor in self.tensors:
            size = layouts.input_size(tensor, self.batch)
            if size and tensor.is_floating_point() and len(tensor) == self.batch:
                return tensor, size
        return None

    def with_image(
        self, image: Tensor, samples: Tensor | slice = slice(None)
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of `samples`, with the image replaced."""
        old, _, _ = self.image()

        def swapped(tensor: Tensor) -> Tensor:
            return image if tensor is old else self._rows(tensor, samples)

        args, kwargs = pytree.tree_map_only(Tensor, swapped, (self.args, self.kwargs))
        return args, kwargs


def _ordinary(value: Any) -> Any:
    """What autograd can work with: inference tensors are copied."""
    if not isinstance(value, Tensor):
        return pytree.tree_map_only(Tensor, _ordinary, value)
    return value.clone() if value.is_inference() else value


def _batch(args: tuple[Any, ...], tensors: list[Tensor]) -> int:
    if args and isinstance(args[0], (list, tuple)) and args[0] and all(isinstance(x, Tensor) for x in args[0]):
        return len(args[0])  # a list of images, as detectors take them
    for tensor in tensors:
        if tensor.dim():
            return len(tensor)
    raise ValueError("explain needs the model's inputs: explain(model, images, ...), with the batch as first dimension")
