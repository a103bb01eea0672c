"""Nested values: every tensor is found, the structure is the same, snapshots are true and hold nothing else alive."""

from __future__ import annotations

import collections
import gc
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from probe.tree import Opaque, data_address, fill, input_leaves, inputs, leaves, rebuild, shape, snapshot, storage_of
from tests import zoo

ONE, TWO = torch.ones(1), torch.ones(2)


class Point(NamedTuple):
    x: Any
    y: Any = None


class Strict(tuple[Any, ...]):
    """A tuple whose constructor takes something else."""

    def __new__(cls, first: Any, second: Any) -> Strict:
        return super().__new__(cls, (first, second))


@dataclass
class Plain:
    a: Any
    b: Any = None
    rest: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any = None


@dataclass(slots=True)
class Slotted:
    a: Any


@dataclass
class Picky:
    """A dataclass that checks what it is given, and refuses to be copied."""

    a: Any

    def __post_init__(self) -> None:
        assert isinstance(self.a, torch.Tensor)

    def __copy__(self) -> Picky:
        raise TypeError("no copies")


class Config(Mapping[str, Any]):
    """A mapping that cannot be written to."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


STRUCTURES: dict[str, tuple[Any, list[str]]] = {
    "tensor": (ONE, [""]),
    "tuple": ((ONE, None, TWO, 3, "text"), ["[0]", "[2]"]),
    "empty": ((), []),
    "list": ([ONE, [TWO]], ["[0]", "[1][0]"]),
    "dict": ({"a": ONE, 3: TWO, "b": {"c": ONE}}, [".a", "[3]", ".b.c"]),
    "named tuple": (Point(ONE, (TWO,)), [".x", ".y[0]"]),
    "tuple subclass": (Strict(ONE, TWO), ["[0]", "[1]"]),
    "dataclass": (Plain(ONE, "text", [TWO]), [".a", ".rest[0]"]),
    "frozen dataclass": (Frozen({"k": ONE}), [".a.k"]),
    "dataclass with slots": (Slotted(ONE), [".a"]),
    "namespace": (types.SimpleNamespace(a=ONE, b=[TWO]), [".a", ".b[0]"]),
    "ordered dict": (collections.OrderedDict(b=ONE, a=TWO), [".b", ".a"]),
    "default dict": (collections.defaultdict(list, a=[ONE]), [".a[0]"]),
    "model output": (zoo.ModelOutput(logits=ONE, hidden=(TWO, None)), [".logits", ".hidden[0]"]),
    "packed sequence": (pack_sequence([TWO, ONE]), [".data", ".batch_sizes"]),
    "return type": (torch.max(torch.ones(2, 2), 1), ["[0]", "[1]"]),
    "parameter": (nn.Parameter(ONE), [""]),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_keep_their_type(name: str) -> None:
    """Same type, same places, every tensor replaced and everything else as it was; the original is untouched."""
    value, paths = STRUCTURES[name]
    assert [path for path, _ in leaves(value)] == paths
    before = [tensor for _, tensor in leaves(value)]
    doubled = rebuild(value, lambda path, tensor: tensor * 2)
    assert type(doubled) is (torch.Tensor if name == "parameter" else type(value))
    assert [path for path, _ in leaves(doubled)] == paths
    for (_, new), old in zip(leaves(doubled), before, strict=True):
        assert torch.equal(new, old * 2)
    assert all(now is then for (_, now), then in zip(leaves(value), before, strict=True))


@pytest.mark.parametrize("name", STRUCTURES)
def test_shapes_fill_by_path(name: str) -> None:
    """A shape holds no tensor, and filled with some of them has None for the others."""
    value, paths = STRUCTURES[name]
    mould = shape(value)
    assert not any(isinstance(slot, torch.Tensor) for _, slot in leaves(mould))
    full = fill(mould, dict(leaves(value)))
    assert [path for path, _ in leaves(full)] == paths
    assert leaves(fill(mould, {})) == []
    assert [path for path, _ in leaves(fill(mould, dict(leaves(value)[:1])))] == paths[:1]
    assert type(full) is type(value)


def test_attributes_of_mappings_and_namespaces() -> None:
    """What a rebuilt value is read by works as on the original."""
    out = rebuild(zoo.ModelOutput(logits=ONE), lambda path, tensor: tensor + 1)
    assert out.logits is out["logits"]
    assert rebuild(types.SimpleNamespace(a=ONE), lambda path, tensor: path).a == ".a"
    made = rebuild(collections.defaultdict(list, a=ONE), lambda path, tensor: tensor)
    assert made["new"] == []


def test_mappings_that_cannot_be_written_become_dicts() -> None:
    """Read-only mappings and such as raise on being copied are shown as plain dicts."""
    assert rebuild(Config(a=ONE), lambda path, tensor: path) == {"a": ".a"}
    assert rebuild(types.MappingProxyType({"a": ONE}), lambda path, tensor: path) == {"a": ".a"}


def test_dataclasses_that_cannot_be_copied_become_namespaces() -> None:
    """Their fields are still right, by name."""
    made = rebuild(Picky(ONE), lambda path, tensor: None)
    assert made == types.SimpleNamespace(a=None)
    assert rebuild(Frozen(ONE), lambda path, tensor: None) == Frozen(None)  # a check in __init__ is not run again


def test_fields_that_are_not_set() -> None:
    """``field(init=False)`` without a value is left out."""

    @dataclass
    class Late:
        a: Any
        cache: Any = field(init=False)

    assert [path for path, _ in leaves(Late(ONE))] == [".a"]


class Store(MutableMapping[str, Any]):
    """A mapping that is no dict; a shallow copy of it shares its content."""

    def __init__(self, **content: Any) -> None:
        self.content = content

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.content[key] = value

    def __delitem__(self, key: str) -> None:
        del self.content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)


class Sole(dict[str, Any]):
    """Its own copy."""

    def __copy__(self) -> Sole:
        return self


@pytest.mark.parametrize("kind", [Store, Sole, collections.UserDict])
def test_the_users_container_is_never_written_to(kind: type[Any]) -> None:
    """What it holds stays; where no copy of its class can be had, records show a dict, and what flows on is itself."""
    value = kind(a=ONE)
    made = rebuild(value, lambda path, tensor: path)
    assert made == {"a": ".a"}
    assert value["a"] is ONE
    flows = rebuild(value, lambda path, tensor: tensor * 2, opaque=lambda each: each)
    assert type(flows) is kind
    assert value["a"] is ONE
    assert (flows is value) == (kind is not collections.UserDict)


def test_what_a_container_keeps_beside_its_content() -> None:
    """Might hold a live graph: records have a stand-in, what flows on has the thing itself, and it is no leaf."""

    class Extended(dict[str, Any]):
        pass

    class Listed(list[Any]):
        pass

    @dataclass
    class Derived:
        a: Any

    live = ONE.clone().requires_grad_().exp()
    for value in (Extended(a=ONE), Listed([ONE]), Derived(ONE)):
        value.cache, value.scale = {"k": [live]}, 2.0  # type: ignore[union-attr]
        assert len(leaves(value)) == 1
        made = rebuild(value, lambda path, tensor: tensor.detach())
        assert isinstance(made.cache["k"][0], Opaque)
        assert made.scale == 2.0
        assert rebuild(value, lambda path, tensor: tensor, opaque=lambda each: each).cache["k"][0] is live
        assert value.cache["k"][0] is live  # type: ignore[union-attr]


def test_what_is_not_looked_into() -> None:
    """Other objects might hold a live graph: a stand-in says what was there, and stands for itself again."""

    class Cache:
        tensor = ONE

    made = rebuild([Cache(), ONE], lambda path, tensor: tensor)
    assert repr(made[0]).endswith("Cache, not looked into>")
    again = rebuild(made, lambda path, tensor: tensor)
    assert again[0] is made[0]
    for value in (iter([ONE]), {1, 2}, np.ones(1), nn.Linear(1, 1), lambda: ONE):
        assert isinstance(rebuild(value, lambda path, tensor: tensor), Opaque)
    assert rebuild([cache := Cache()], lambda path, tensor: tensor, opaque=lambda value: value) == [cache]


def test_iterators_are_not_used_up() -> None:
    """A generator that a module returns is still whole afterwards."""
    generator = (tensor for tensor in (ONE, TWO))
    assert leaves(generator) == []
    assert len(list(generator)) == 2


@pytest.mark.parametrize("kind", [list, dict, types.SimpleNamespace])
def test_what_contains_itself(kind: type) -> None:
    """Ends where the circle closes; a container that merely comes twice is walked twice."""
    if kind is list:
        loop: Any = [ONE]
        loop.append(loop)
    elif kind is dict:
        loop = {"a": ONE}
        loop["loop"] = loop
    else:
        loop = types.SimpleNamespace(a=ONE)
        loop.loop = loop
    assert len(leaves(loop)) == 1
    twice = [ONE]
    assert [path for path, _ in leaves([twice, twice])] == ["[0][0]", "[1][0]"]


def test_depth_is_bounded() -> None:
    """A structure deeper than any sane one ends in a stand-in, not in a RecursionError."""
    deep: Any = ONE
    for _ in range(5000):
        deep = [deep]
    assert leaves(deep) == []
    shallow: Any = ONE
    for _ in range(50):
        shallow = [shallow]
    assert len(leaves(shallow)) == 1


def test_inputs_read_as_the_caller_wrote_them() -> None:
    """The sole argument, the tuple of positional ones, or the keywords; paths follow."""
    assert inputs((ONE,), {}) is ONE
    assert inputs((ONE,), {"mask": TWO}) is ONE
    assert inputs((ONE, TWO), {}) == (ONE, TWO)
    assert inputs((), {}) == ()
    assert inputs((), {"a": 1}) == {"a": 1}
    assert [path for path, _ in input_leaves((ONE,), {"mask": [TWO]})] == ["", "kwargs.mask[0]"]
    assert [path for path, _ in input_leaves((), {"mask": TWO})] == [".mask"]
    assert [path for path, _ in input_leaves((ONE, {"mask": TWO}), {})] == ["[0]", "[1].mask"]


# -- snapshots ---------------------------------------------------------------------------------------------------------


def write(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.zero_()


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: torch.ones(3, 4),
    "graph": lambda: torch.ones(3, 4, requires_grad=True) * 1,
    "leaf": lambda: torch.ones(3, 4, requires_grad=True),
    "parameter": lambda: nn.Parameter(torch.ones(3, 4)),
    "view": lambda: torch.ones(3, 8)[:, ::2],
    "small view": lambda: torch.ones(5000, 4)[7],
    "transposed": lambda: torch.ones(4, 3).T,
    "channels last": lambda: torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "empty": lambda: torch.ones(0, 4),
    "scalar": lambda: torch.ones(()),
    "integer": lambda: torch.ones(3, dtype=torch.int64),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "bfloat16": lambda: torch.ones(3, dtype=torch.bfloat16),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "conjugate": lambda: torch.full((3,), 1 + 2j).conj(),
    "negative": lambda: torch.full((3,), 1 + 2j).conj().imag,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
    "numpy": lambda: torch.from_numpy(np.ones(3, np.float32)),
    "shared": lambda: torch.ones(3).share_memory_(),
    "subclass": lambda: torch.ones(3).as_subclass(Tagged),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


class Tagged(torch.Tensor):
    """A tensor subclass of the user's."""


def dense(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_nested:
        return torch.cat([each.flatten() for each in tensor.unbind()]).detach().clone()
    return tensor.detach().to_dense().resolve_conj().resolve_neg().clone()


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors).*:UserWarning")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", TENSORS)
def test_snapshots_are_true(name: str, mode: Any) -> None:
    """Same values, dtype, layout; detached; whoever writes to the original or to the snapshot changes one alone."""
    with mode():
        live = TENSORS[name]()
        before = dense(live)
        kept = snapshot(live)
        assert kept is not None
        assert not kept.requires_grad
        assert (kept.dtype, kept.layout, kept.device) == (live.dtype, live.layout, live.device)
        if not live.is_nested:
            assert kept.shape == live.shape
        if name != "sparse csr":
            write(live)
        assert torch.equal(dense(kept), before)
        other = snapshot(kept)
        assert other is not None
        if name != "sparse csr":
            write(kept)
        assert torch.equal(dense(other), before)


@pytest.mark.parametrize("name", ["plain", "graph", "view", "transposed", "channels last", "bfloat16", "integer"])
def test_snapshots_share_memory_until_somebody_writes(name: str) -> None:
    """The price of a reference, where nothing is overwritten."""
    live = TENSORS[name]()
    kept = snapshot(live)
    assert kept is not None
    assert data_address(kept) == data_address(live)
    assert kept.stride() == live.stride()
    write(live)
    assert data_address(kept) != data_address(live)


def test_what_is_cloned_at_once() -> None:
    """Parameters keep their address though they are written to later; small views leave their base alone."""
    parameter = nn.Parameter(torch.ones(4))
    address = parameter.data_ptr()
    kept = snapshot(parameter)
    with torch.no_grad():
        parameter.add_(1)
    assert parameter.data_ptr() == address
    assert kept is not None
    assert kept.tolist() == [1.0] * 4
    row = snapshot(torch.ones(5000, 4)[7])
    assert row is not None
    assert row.untyped_storage().nbytes() == 16


def test_snapshots_hold_no_graph() -> None:
    """The tensor and its graph are gone when the user lets go."""
    gc.disable()
    try:
        live = torch.ones(3, requires_grad=True).exp()
        dead = weakref.ref(live)
        kept = snapshot(live)
        del live
        assert dead() is None
        assert kept is not None
    finally:
        gc.enable()


def test_snapshots_of_tensors_without_values() -> None:
    """A FakeTensor has none to keep: None. A meta tensor is itself."""
    with FakeTensorMode():
        fake = torch.ones(3)
    assert snapshot(fake) is None
    meta = snapshot(torch.ones(3, device="meta"))
    assert meta is not None
    assert meta.is_meta


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_snapshots_under_torch_func() -> None:
    """The full batch, unwrapped, valid after the transform has ended, also nested."""
    kept: list[torch.Tensor | None] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        kept.append(snapshot(x * 2))
        return (x**2).sum()

    x = torch.randn(4, 3)
    torch.vmap(function)(x)
    torch.func.grad(function)(x)
    torch.vmap(torch.func.grad(function))(x)
    torch.vmap(torch.vmap(function))(x[None])
    torch.func.jvp(function, (x,), (x,))
    for value in kept:
        assert value is not None
        assert type(value) is torch.Tensor
        assert torch.equal(value.reshape(4, 3), x * 2)


def test_storages() -> None:
    """None where there is none."""
    assert storage_of(torch.ones(2)) is not None
    assert storage_of(torch.eye(2).to_sparse()) is None


# -- what always holds -------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.one_of(
        st.integers(0, 3).map(torch.ones),
        st.none(),
        st.integers(),
        st.text(max_size=2),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("ab", min_size=1, max_size=2) | st.integers(0, 3), inner, max_size=3),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
        st.tuples(inner, inner).map(lambda pair: Frozen(*pair)),
        st.tuples(inner, inner).map(lambda pair: Plain(*pair)),
        inner.map(lambda value: zoo.ModelOutput(a=value)),
        inner.map(lambda value: types.SimpleNamespace(a=value)),
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if hasattr(a, "__dict__"):
        return same(vars(a), vars(b))
    return bool(a == b)


@settings(deadline=None, max_examples=150)
@given(VALUES)
def test_rebuilding_with_the_same_tensors_gives_the_same_value(value: Any) -> None:
    """Identity, snapshot, and mould and fill all give a value of the same type, structure and numbers."""
    assert same(rebuild(value, lambda path, tensor: tensor), value)
    assert same(rebuild(value, lambda path, tensor: snapshot(tensor)), value)
    assert same(fill(shape(value), dict(leaves(value))), value)
    paths = [path for path, _ in leaves(value)]
    assert len(paths) == len(set(paths))


@settings(deadline=None, max_examples=80)
@given(VALUES)
def test_paths_read_like_python(value: Any) -> None:
    """A path after the value is an expression for the tensor (mappings by attribute where the key is a word)."""
    for path, tensor in leaves(value):
        found = value
        for step in split(path):
            attribute = isinstance(step, str) and not isinstance(found, Mapping)
            found = getattr(found, step) if attribute else found[step]
        assert found is tensor


def split(path: str) -> list[Any]:
    steps: list[Any] = []
    while path:
        if path[0] == "[":
            inside, path = path[1:].split("]", 1)
            steps.append(int(inside))
        else:
            end = min((path.find(sign, 1) for sign in ".[" if path.find(sign, 1) > 0), default=len(path))
            steps.append(path[1:end])
            path = path[end:]
    return steps


def test_packed_sequences_survive() -> None:
    """A rebuilt PackedSequence works where one is wanted."""
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    made = rebuild(packed, lambda path, tensor: snapshot(tensor))
    assert isinstance(made, PackedSequence)
    assert nn.GRU(2, 2)(made)[0].data.shape == (4, 2)
