"""Nested values: walk the tensors in whatever a module takes or returns, rebuild the same structure, take snapshots."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import enum
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

Visit = Callable[[str, Any], Any]

_ATOMS = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, enum.Enum, type)


class Opaque:
    """Stands in a record for an object that the walker does not look into (it might hold a live graph)."""

    __slots__ = ("type",)

    def __init__(self, type_: type) -> None:
        self.type = type_

    def __repr__(self) -> str:
        return f"<{self.type.__qualname__}, not looked into>"


def _unseen(value: Any) -> Opaque:
    return value if isinstance(value, Opaque) else Opaque(type(value))


def rebuild(value: Any, visit: Visit, *, opaque: Callable[[Any], Any] | None = None) -> Any:
    """The same structure with every tensor replaced by ``visit(path, tensor)``.

    Walks tuples, named tuples (`PackedSequence` too), lists, mappings (Hugging Face's ``ModelOutput`` too), dataclasses
    and ``SimpleNamespace``; a mapping that is no kind of ``dict`` becomes one. Numbers, strings and None stay; any
    other object becomes `Opaque`, and so does a container that contains itself, and what a container's class keeps in
    attributes beside its content; ``opaque=`` says what else to put there. Paths read like Python: ``""``, ``"[0]"``,
    ``".logits"``, ``"[0].hidden"``.
    """
    if isinstance(value, torch.Tensor):
        return visit("", value)  # by far the most common
    return _rebuild(value, visit, opaque or _unseen, "", ())


class Leaves(list[tuple[str, torch.Tensor]]):
    """The `leaves` of a value that is not there itself."""


def leaves(value: Any) -> list[tuple[str, torch.Tensor]]:
    """``(path, tensor)`` of every tensor in a nested value, in order."""
    if type(value) is torch.Tensor:
        return [("", value)]
    if type(value) is Leaves:
        return value
    found: list[tuple[str, torch.Tensor]] = []
    rebuild(value, lambda path, tensor: found.append((path, tensor)))
    return found


def inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What ``record.input`` shows: the sole argument, the tuple of positional ones, or the dict of keywords."""
    if len(args) == 1:
        return args[0]
    return dict(kwargs) if kwargs and not args else args


def input_leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """`leaves` of a call's arguments, with the paths of `inputs`; keywords beside positionals are ``"kwargs.name"``."""
    if not kwargs or not args:
        return leaves(args[0] if len(args) == 1 else inputs(args, kwargs))
    named = [(f"kwargs{path}", tensor) for path, tensor in leaves(dict(kwargs))]
    return leaves(inputs(args, {})) + named


class Slot:
    """The place of a tensor in a `shape`."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path


SOLE = Slot("")
"""The `shape` of a single tensor."""


def shape(value: Any) -> Any:
    """The structure of `value` with a `Slot` in place of every tensor."""
    if type(value) is torch.Tensor or isinstance(value, torch.Tensor):  # isinstance of a tensor is slow
        return SOLE
    return rebuild(value, lambda path, _: Slot(path))


def fill(shape_: Any, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> Any:
    """A `shape` filled by path; None where there is no tensor."""
    return rebuild(shape_, lambda _, slot: tensors.get(prefix + slot.path))


def _rebuild(value: Any, visit: Visit, opaque: Callable[[Any], Any], path: str, above: tuple[Any, ...]) -> Any:
    if isinstance(value, (torch.Tensor, Slot)):
        return visit(path, value)
    if value is None or isinstance(value, _ATOMS):
        return value
    if any(value is each for each in above) or len(above) > 64:
        return opaque(value)
    above = (*above, value)
    if isinstance(value, tuple):
        return _tuple(value, visit, opaque, path, above)
    if isinstance(value, list):
        return _list(value, visit, opaque, path, above)
    if isinstance(value, Mapping):
        return _mapping(value, visit, opaque, path, above)
    if isinstance(value, types.SimpleNamespace):
        return types.SimpleNamespace(
            **{k: _rebuild(v, visit, opaque, f"{path}.{k}", above) for k, v in vars(value).items()}
        )
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _dataclass(value, visit, opaque, path, above)
    return opaque(value)


def _dataclass(value: Any, visit: Visit, opaque: Callable[[Any], Any], path: str, above: tuple[Any, ...]) -> Any:
    names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    items = {name: _rebuild(getattr(value, name), visit, opaque, f"{path}.{name}", above) for name in names}

    def put(new: Any) -> None:
        for name, item in items.items():
            object.__setattr__(new, name, item)  # a frozen dataclass refuses setattr

    return _of_its_class(value, items, put, lambda: types.SimpleNamespace(**items), opaque)


def _list(value: list[Any], visit: Visit, opaque: Callable[[Any], Any], path: str, above: tuple[Any, ...]) -> Any:
    items = [_rebuild(item, visit, opaque, f"{path}[{i}]", above) for i, item in enumerate(value)]
    if type(value) is list:
        return items
    return _of_its_class(value, {}, lambda new: new.__setitem__(slice(None), items), lambda: items, opaque)


def _tuple(
    value: tuple[Any, ...], visit: Visit, opaque: Callable[[Any], Any], path: str, above: tuple[Any, ...]
) -> Any:
    fields: tuple[str, ...] = getattr(value, "_fields", ())
    names = [f".{name}" for name in fields] or [f"[{i}]" for i in range(len(value))]
    items = [_rebuild(item, visit, opaque, path + name, above) for name, item in zip(names, value, strict=True)]
    if type(value).__module__ == "torch.return_types":
        return type(value)(items)
    # tuple.__new__ because a subclass's own may check or convert: PackedSequence refuses None in place of data.
    return tuple.__new__(type(value), items)


def _mapping(
    value: Mapping[Any, Any], visit: Visit, opaque: Callable[[Any], Any], path: str, above: tuple[Any, ...]
) -> Any:
    items = {
        key: _rebuild(item, visit, opaque, f"{path}.{key}" if isinstance(key, str) else f"{path}[{key!r}]", above)
        for key, item in value.items()
    }
    if type(value) is dict:
        return items
    if not isinstance(value, (dict, collections.UserDict)):  # a copy might share the content with the original
        return items if opaque is _unseen else opaque(value)

    def put(new: Any) -> None:
        for key, item in items.items():
            new[key] = item

    return _of_its_class(value, items, put, lambda: items, opaque)


def _of_its_class(
    value: Any,
    items: Mapping[Any, Any],
    put: Callable[[Any], None],
    plain: Callable[[], Any],
    opaque: Callable[[Any], Any],
) -> Any:
    """A copy of a container of a foreign class with other content, or a `plain` one where it cannot be copied.

    Attributes of the same name follow the content. Any other (a cached property, say) might hold a live graph: what is
    in it becomes `opaque`. Where `opaque` says to keep what cannot be rebuilt, that holds for the container too.
    """
    try:
        new = copy.copy(value)
        if new is value:
            raise TypeError("it is its own copy")
        put(new)
        attributes = getattr(new, "__dict__", {})
        for key, old in list(attributes.items()):
            if key in items:
                attributes[key] = items[key]
            elif key != "data" or not isinstance(value, collections.UserDict):
                attributes[key] = _rebuild(old, lambda _, tensor: opaque(tensor), opaque, "", ())
    except Exception:  # whatever a foreign class raises on being copied
        return plain() if opaque is _unseen else opaque(value)
    return new


def snapshot(tensor: torch.Tensor, fixed: Collection[int] = ()) -> torch.Tensor | None:
    """A detached copy that later writes to `tensor` cannot reach; None for a tensor without values (FakeTensor).

    Copy-on-write where torch can (``torch._lazy_clone``: shares the memory until somebody writes), else a clone:
    storages from NumPy, shared or mapped memory, sparse and nested layouts. Also cloned are small views of a large
    storage (which would keep all of it alive), parameters and their views (whose memory FSDP frees in a way that a
    copy-on-write storage does not survive), and what shares a storage with the `fixed` ones (by ``_cdata``): the next
    write to a shared one would move it to another address. Tensors of ``torch.func`` transforms
    come out unwrapped, at full batch; of a DTensor it is this rank's shard.
    """
    if type(tensor) is torch.Tensor:  # nearly always; isinstance(tensor, Parameter) alone costs more than all of this
        try:
            storage = tensor.untyped_storage()  # refused where there is none, and by wrappers of torch.func
            small = storage.nbytes() <= 4 * tensor.nbytes + 4096
            detached = tensor.data if tensor.requires_grad else tensor
            own = not (fixed and storage._cdata in fixed)
            if small and own and type(tensor._base) is not torch.nn.Parameter:
                return detached._lazy_clone()  # the method costs less than the function
            return detached.clone()
        except (RuntimeError, NotImplementedError):
            pass
    elif (shard := local(tensor)) is not tensor:
        return snapshot(shard, fixed)
    if torch._C._functorch.is_legacy_batchedtensor(tensor):  # in autograd.grad(..., is_grads_batched=True)
        value, level = tensor, 0
        while torch._C._functorch.is_legacy_batchedtensor(value):
            level += 1
            value = torch._remove_batch_dim(value, level, 1, 0)
        return value.detach().clone()
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        with untransformed():  # which would wrap again what is made of it, in a wrapper that is dead afterwards
            return unwrapped(tensor).detach().clone()
    return None if is_fake(tensor) else tensor.detach().clone()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    if type(tensor) is torch.Tensor or not hasattr(type(tensor), "to_local"):
        return tensor
    with torch.no_grad():  # with a graph it would be a node of it
        shard: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """What the transforms of ``torch.func`` have wrapped, at full batch; any other tensor as it is."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def full_precision(devices: Iterable[str]) -> contextlib.AbstractContextManager[object]:
    """No autocast on devices of these types, where there is any now."""
    casting = [device for device in devices if torch.is_autocast_enabled(device)]
    return _uncast(casting) if casting else contextlib.nullcontext()


@contextlib.contextmanager
def _uncast(devices: list[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def untransformed() -> Iterator[None]:
    """Inside, operations are plain ones, whatever transforms of ``torch.func`` are running."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether the tensor only pretends to hold values: torch.export, fake mode, FunctionalTensor while tracing."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    if module is not None and isinstance(tensor, module.FakeTensor):
        return True
    return type(tensor) is not torch.Tensor and type(tensor).__name__ == "FunctionalTensor"


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The tensor's storage, or None where it has none (sparse, nested, wrapped by torch.func, uninitialised)."""
    try:
        return None if tensor.is_nested else tensor.untyped_storage()
    except (RuntimeError, NotImplementedError, ValueError):
        return None


data_address: Callable[[torch.Tensor], int] = torch._C._data_address  # type: ignore[attr-defined]
"""Where the first element lies. Unlike ``data_ptr()`` this does not count as a write to a copy-on-write tensor."""
