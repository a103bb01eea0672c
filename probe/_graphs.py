"""The graph of a model for TensorBoard, from one ordinary forward: `record` runs it, `graph_def` draws what it saw.

Data flow is followed by the identity of storages: whoever wrote a storage last produced what the next one reads there.
So an in-place operation is a step of its own, a view needs no node, and functions between modules (``x + shortcut``,
``torch.cat``) are seen as well as modules, because all operators pass by.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from probe.calls import Call, Receiver
from probe.capture import Kind, Layer
from probe.core import Probe, ProbeWarning
from probe.hooks import ours
from probe.observers import Scene
from probe.select import wrapped_attribute
from probe.tree import input_leaves, leaves, storage_of

if TYPE_CHECKING:
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.node_def_pb2 import NodeDef


class Value(NamedTuple):
    """A tensor as the graph knows it. Two with the same `key` share memory."""

    key: int
    shape: tuple[int, ...]
    dtype: str
    device: str = ""
    path: str = ""


class Enter(NamedTuple):
    """A call of a module begins. `layer` is its dotted name, ``""`` the root; `call` counts its calls from 0."""

    layer: str
    call: int
    type: str
    inputs: tuple[Value, ...]
    attributes: tuple[tuple[str, str], ...] = ()


class Leave(NamedTuple):
    """That call returns."""

    layer: str
    call: int
    outputs: tuple[Value, ...]


class Op(NamedTuple):
    """An operator ran, within the call entered last. What it writes in place is among its outputs."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


Event = Enter | Leave | Op


def graph_def(events: Iterable[Event]) -> GraphDef:
    """Draw what a forward did.

    A call of a module in which no other module was called is one node; any other is a scope (a box to open) that
    contains the calls below it and, as nodes, the operators it ran itself. Further calls of the same module are nodes
    of their own, with a number. Parameters and constants, and what is computed from them alone, are not drawn.

    Arguments:
        events: of one forward, in order, as `record` returns them.

    Returns:
        the proto, nodes in the order in which they ran, each with its output shapes, dtypes and device, and for modules
        their ``extra_repr`` and parameters.
    """
    drawing = _Drawing()
    for event in events:
        match event:
            case Enter():
                drawing.enter(event)
            case Leave():
                drawing.leave(event)
            case Op():
                drawing.operate(event)
    return drawing.finish()


@dataclass
class _Frame:
    """A call that has not returned yet."""

    enter: Enter
    path: str
    sources: dict[str, None]  # what it reads from others, in order
    ops: list[Op] = field(default_factory=list)
    is_scope: bool = False


class _Drawing:
    def __init__(self) -> None:
        from tensorboard.compat.proto.graph_pb2 import GraphDef
        from tensorboard.compat.proto.versions_pb2 import VersionDef

        self.proto = GraphDef(versions=VersionDef(producer=22))
        self.frames: list[_Frame] = []
        self.producers: dict[int, str] = {}  # storage -> "node" or "node:output"
        self.names: Counter[str] = Counter()
        self.root = ""

    def enter(self, event: Enter) -> None:
        if not self.frames and not self.root:
            self.root = _clean(event.type)
            for value in event.inputs:
                if value.key not in self.producers:
                    self.produce([value], self.node(f"input{_suffix(value.path)}", "input", [], [value]))
        for frame in self.frames[-1:]:
            self.open(frame)
        path = "/".join([self.root, *map(_clean, event.layer.split("."))]) if event.layer else self.root
        self.frames.append(_Frame(event, path, dict.fromkeys(self.sources(event.inputs))))

    def leave(self, event: Leave) -> None:
        while self.frames:  # those above it were left by an exception that the model caught
            frame = self.frames.pop()
            if (frame.enter.layer, frame.enter.call) == (event.layer, event.call):
                break
        else:
            return
        if not frame.is_scope:
            written = [value for op in frame.ops for value in op.outputs]
            attributes = {**dict(frame.enter.attributes), "inputs": ", ".join(map(_describe, frame.enter.inputs))}
            number = f"-{frame.enter.call + 1}" if frame.enter.call else ""
            name = self.node(frame.path + number, frame.enter.type, [*frame.sources], event.outputs, attributes)
            self.produce(written, name)
            self.produce(event.outputs, name)
        if not event.layer and not self.frames:
            for value in event.outputs:
                self.node(f"output{_suffix(value.path)}", "output", self.sources([value]), [value])

    def operate(self, event: Op) -> None:
        if not self.frames:
            return
        frame = self.frames[-1]
        if frame.is_scope:
            self.draw(frame, event)
            return
        frame.sources.update(dict.fromkeys(self.sources(event.inputs)))
        frame.ops.append(event)

    def open(self, frame: _Frame) -> None:
        """Another module is called within it: what it ran so far become nodes of their own."""
        frame.is_scope = True
        ops, frame.ops = frame.ops, []
        for op in ops:
            self.draw(frame, op)

    def draw(self, frame: _Frame, op: Op) -> None:
        if sources := self.sources(op.inputs):
            self.produce(op.outputs, self.node(f"{frame.path}/{_clean(op.name)}", op.name, sources, op.outputs))

    def sources(self, values: Iterable[Value]) -> list[str]:
        return list(dict.fromkeys(self.producers[value.key] for value in values if value.key in self.producers))

    def produce(self, values: Iterable[Value], name: str) -> None:
        """From now on what these hold comes from that node; the first one with a storage says from which output."""
        outputs: dict[int, str] = {}
        for index, value in enumerate(values):
            outputs.setdefault(value.key, f"{name}:{index}" if index else name)
        self.producers.update(outputs)

    def node(
        self,
        path: str,
        op: str,
        sources: list[str],
        outputs: Iterable[Value],
        attributes: dict[str, str] | None = None,
    ) -> str:
        from tensorboard.compat.proto.attr_value_pb2 import AttrValue
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        outputs = list(outputs)
        self.names[path] += 1
        name = path if self.names[path] == 1 else f"{path}-{self.names[path]}"
        node: NodeDef = self.proto.node.add(name=name, op=op, input=sources)
        if outputs:
            shapes = [
                TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in value.shape]) for value in outputs
            ]
            node.attr["_output_shapes"].CopyFrom(AttrValue(list=AttrValue.ListValue(shape=shapes)))
            node.attr["outputs"].s = ", ".join(map(_describe, outputs)).encode()
            node.device = outputs[0].device
        for key, text in (attributes or {}).items():
            if text:
                node.attr[key].s = text.encode()
        return name

    def finish(self) -> GraphDef:
        return self.proto


def _clean(name: str) -> str:
    """`name` as part of a node's name: ``/`` opens a scope there, and ``:`` and ``^`` mean something to readers."""
    return re.sub(r"[^\w.\-]", "_", name)


def _suffix(path: str) -> str:
    """Where in a nested value: ``[0].hidden`` becomes ``.0.hidden``."""
    return _clean(path.replace("[", ".").replace("]", ""))


def _describe(value: Value) -> str:
    return f"{value.dtype}{list(value.shape)}"


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Event]:
    """Run ``model(*args, **kwargs)`` once, in the mode the model is in, and say what happened.

    The random number generators (torch's on the CPU and on the CUDA devices in use, Python's, NumPy's), buffers and
    attributes of the modules are put back. Compiled parts run eagerly. DistributedDataParallel and DataParallel are
    looked through, so that no other process has to take part. Probes that are attached to the model see nothing of it.

    Raises:
        ValueError: a lazy layer has not been initialised yet.
        Exception: what the model raises, with a note.
    """
    while wrapped_attribute(model) in ("module", "_orig_mod"):
        model = getattr(model, str(wrapped_attribute(model)))
    if isinstance(model, nn.Module) and any(map(nn.parameter.is_lazy, [*model.parameters(), *model.buffers()])):
        raise ValueError(
            "the model has lazy layers whose shapes are not known yet; call it once before drawing its graph"
        )
    tracer = _Tracer()
    with warnings.catch_warnings():
        # A graph is of the eager model, and of what is called in it: neither needs to be said.
        warnings.simplefilter("ignore", ProbeWarning)
        probe = Probe(model, "*", kinds=Kind.INPUT | Kind.OUTPUT, observers=tracer)
        with _other_probes_off(model), _left_as_it_was(model, args, kwargs), probe, tracer:
            try:
                model(*args, **kwargs)
            except Exception as error:
                error.add_note("(raised by the one forward that Board.graph runs: model(*inputs, **kwargs))")
                raise
    return tracer.events


class _Tracer(TorchDispatchMode, Receiver):
    """Notes every operator; as a receiver of a probe every call too, also those without tensors."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self._alive: list[Any] = []  # weak references that keep a storage's address from being used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = self._values(tensor for _, tensor in leaves((args, kwargs)))
        written = self._values(_written(func, args, kwargs))
        outputs = self._values(tensor for _, tensor in leaves(result))
        known = {value.key for value in inputs}
        fresh = tuple(value for value in outputs if value.key not in known)
        if fresh or written:
            self.events.append(Op(_operator_name(func), inputs, fresh + written))
        return result

    @classmethod
    def receiver(cls, members: Sequence[_Tracer], scene: Scene) -> Receiver:
        return members[0]

    def taker(self, layer: Layer, kind: Kind) -> Callable[..., None] | None:
        module, name = layer.module, layer.name

        def enter(pass_: Any, call: Call, value: Any) -> None:
            inputs = input_leaves(*value)
            self.events.append(Enter(name, call.index, type(module).__name__, self._named(inputs), _attributes(module)))

        def leave(pass_: Any, call: Call, value: Any) -> None:
            self.events.append(Leave(name, call.index, self._named(leaves(value))))

        return {Kind.INPUT: enter, Kind.OUTPUT: leave}.get(kind)

    def _values(self, tensors: Iterable[Tensor]) -> tuple[Value, ...]:
        return tuple(self._value(tensor, "") for tensor in tensors)

    def _named(self, pairs: Iterable[tuple[str, Tensor]]) -> tuple[Value, ...]:
        return tuple(self._value(tensor, path) for path, tensor in pairs)

    def _value(self, tensor: Tensor, path: str) -> Value:
        storage = storage_of(tensor)
        if storage is None:
            key = id(tensor)
            self._alive.append(tensor)
        else:
            key = storage._cdata
            self._alive.append(StorageWeakRef(storage))
        shape = () if tensor.is_nested else tuple(tensor.shape)
        return Value(key, shape, str(tensor.dtype).removeprefix("torch."), str(tensor.device), path)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that the operator writes to in place, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for index, argument in enumerate(schema.arguments):
        if argument.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [tensor for _, tensor in leaves(given)]
    return found


def _operator_name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    name = str(schema.name if schema is not None else func)
    return name.removeprefix("aten::")


def _attributes(module: nn.Module) -> tuple[tuple[str, str], ...]:
    parameters = ", ".join(f"{name} {list(each.shape)}" for name, each in module.named_parameters())
    return ("type", type(module).__qualname__), ("options", module.extra_repr()), ("parameters", parameters)


@contextlib.contextmanager
def _other_probes_off(model: nn.Module) -> Iterator[None]:
    """Take the hooks of probes around this call out: this forward is none of the passes that they were asked about."""
    taken: list[tuple[dict[int, Any], dict[int, Any]]] = []
    try:
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                if any(map(ours, hooks.values())):
                    taken.append((hooks, dict(hooks)))
                    for key in [key for key, hook in hooks.items() if ours(hook)]:
                        del hooks[key]
        yield
    finally:
        for hooks, before in taken:
            kept = {key: hook for key, hook in before.items() if ours(hook) or key in hooks}
            added = {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update(kept | added)


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Put back the modules' attributes, their buffers and the random number generators.

    Buffers are exchanged for copies rather than restored by writing: that would count as a modification of tensors that
    a graph, waiting for its backward, has saved.
    """
    tensors = [*model.parameters(), *model.buffers(), *(tensor for _, tensor in input_leaves(args, kwargs))]
    cards = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    copies: dict[int, Tensor] = {}
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with contextlib.ExitStack() as stack, torch.random.fork_rng(devices=cards):
        if "torch._dynamo" in sys.modules:  # functions that were compiled by themselves
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in model.modules():
                saved += [(each, dict(each)) for each in (module.__dict__, module._parameters, module._modules)]
                saved.append((module._buffers, dict(module._buffers)))
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        if id(buffer) not in copies:
                            copies[id(buffer)] = buffer.detach().clone().requires_grad_(buffer.requires_grad)
                        module._buffers[name] = copies[id(buffer)]
            yield
        finally:
            for target, content in saved:
                if list(map(id, target.values())) != list(map(id, content.values())) or target.keys() != content.keys():
                    target.clear()
                    target.update(content)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
