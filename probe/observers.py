"""Who receives captures: `Store`, which `Probe` reads, and the protocol for everybody else's observers."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from probe.calls import Call, Pass, Receiver
from probe.capture import Capture, Kind, Layer
from probe.graph import version
from probe.select import modules
from probe.session import Session
from probe.tree import (
    data_address,
    full_precision,
    input_leaves,
    leaves,
    local,
    rebuild,
    snapshot,
    storage_of,
    untransformed,
    unwrapped,
)

if TYPE_CHECKING:
    from probe.cache import StepCache

Taker = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Site:
    """Where an observer's function is bound: one tensor's place in one call of one layer.

    Arguments:
        name: the layer's name.
        kind: exactly one `Kind`.
        path: where in a nested value the tensor sits, as in `Capture`.
        call: which call of the pass, from 0.
        mode: ``"train"``, ``"eval"``, or what ``Probe.tag`` says.
        module_type: the class of the module.
    """

    name: str
    kind: Kind
    path: str
    call: int
    mode: str
    module_type: type


@runtime_checkable
class Observer(Protocol):
    """What ``Probe(observers=[...])`` takes, beside plain functions of a `Capture`: the form for the hot path."""

    def bind(self, site: Site) -> Callable[[torch.Tensor], Any] | None:
        """Called once a site. The function it returns gets each tensor there, detached and live: whoever keeps the
        tensor takes a copy, because an in-place operation may follow. None: this site is of no interest."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a probe knows, for observers that need more than tensors.

    Arguments:
        every: every layer of the model, the root first.
        layers: the ones to observe.
        kinds: what may be hooked.
        optimizers: those that the probe was given.
        scaler: the GradScaler that steps them.
        every_n: steps with ``step % every_n == 0`` are to be observed.
        writer: the `Board` or ``SummaryWriter`` to write to, under ``p.log``.
        cache: what the probe's receivers measure of a step.
    """

    every: Sequence[Layer]
    layers: Sequence[Layer]
    kinds: Kind
    cache: StepCache
    optimizers: Sequence[torch.optim.Optimizer] = ()
    scaler: Any = None
    every_n: int = 1
    writer: Any = None


@runtime_checkable
class Joint(Protocol):
    """Observers, and summaries of ``p.log``, that also want steps and optimizers.

    All of one class that are given together share one `Receiver`, so that they can share what they measure. It may ask
    for the root besides the chosen layers.
    """

    @classmethod
    def receiver(cls, members: Sequence[Any], scene: Scene) -> Receiver:
        """The receiver of these members of the class."""


def joint(observers: Iterable[Any], scene: Scene) -> list[Receiver]:
    """A receiver for each class of `Joint` among the observers."""
    groups: dict[type, list[Any]] = {}
    for each in observers:
        if isinstance(each, Joint):
            groups.setdefault(type(each), []).append(each)
    return [kind.receiver(members, scene) for kind, members in groups.items()]  # type: ignore[attr-defined]


class Adapter(Receiver):
    """Delivers to one observer: an object with ``bind``, or a plain function of a `Capture`.

    An optional attribute ``kinds`` of the observer says which kinds it wants; all by default. What it raises propagates
    with a note that names the layer and the kind.
    """

    def __init__(self, observer: Any, layers: list[Layer], kinds: Kind) -> None:
        if not callable(observer) and not isinstance(observer, Observer):
            raise TypeError(f"{observer!r} is no observer: give a function of a Capture, or an object with bind(site)")
        self.observer = observer
        self.layers = set(layers)
        self.kinds: Kind = getattr(observer, "kinds", Kind.all()) & kinds

    def taker(self, layer: Layer, kind: Kind) -> Taker | None:
        if kind not in self.kinds or layer not in self.layers:
            return None
        emit = self._bound(layer, kind) if isinstance(self.observer, Observer) else self._plain(layer, kind)

        def deliver(call: Call, tensors: list[tuple[str, torch.Tensor]]) -> None:
            try:
                with quiet():
                    for path, tensor in tensors:
                        emit(call, path, tensor)
            except Exception as error:
                error.add_note(f"raised by {self.observer!r} at layer {layer.name!r}, {kind.label}")
                raise

        return tensor_taker(kind, deliver)

    def _bound(self, layer: Layer, kind: Kind) -> Callable[[Call, str, torch.Tensor], None]:
        functions: dict[tuple[int, str, str], Callable[[torch.Tensor], Any] | None] = {}

        def emit(call: Call, path: str, tensor: torch.Tensor) -> None:
            key = (call.index, path, call.info.mode)
            if key not in functions:
                site = Site(layer.name, kind, path, call.index, call.info.mode, layer.module_type)
                functions[key] = self.observer.bind(site)
            function = functions[key]
            if function is not None:
                tensor = unwrapped(tensor)
                function(tensor.detach() if tensor.requires_grad else tensor)

        return emit

    def _plain(self, layer: Layer, kind: Kind) -> Callable[[Call, str, torch.Tensor], None]:
        def emit(call: Call, path: str, tensor: torch.Tensor) -> None:
            value = snapshot(tensor, call.info.fixed)
            if value is not None:
                capture = Capture(layer.name, kind, value, call.info.step, call.index, path, layer.module_type)
                shown = self.observer(capture)
                if isinstance(shown, Iterator):
                    deque(shown, maxlen=0)  # a generator function runs only when it is iterated

        return emit


def tensor_taker(kind: Kind, deliver: Callable[[Call, list[tuple[str, torch.Tensor]]], None]) -> Taker:
    """A taker of one kind that hands on the tensors in what flowed, with their paths."""

    def take_input(pass_: Pass, call: Call, value: Any) -> None:
        deliver(call, input_leaves(*value))

    def take_output(pass_: Pass, call: Call, value: Any) -> None:
        deliver(call, leaves(value))

    def take_gradient(call: Call, path: str, gradient: torch.Tensor, backward: int) -> None:
        deliver(call, [(path, gradient)])

    takers: dict[Kind, Taker] = {Kind.INPUT: take_input, Kind.OUTPUT: take_output}
    return takers.get(kind, take_gradient)


def quiet() -> contextlib.AbstractContextManager[object]:
    """No graph, no autocast (where even ``x.float() @ y`` would be bfloat16), no transform of ``torch.func``."""
    cast = torch._C._is_any_autocast_enabled()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return _all_off(transformed) if cast or transformed else torch.no_grad()


@contextlib.contextmanager
def _all_off(transformed: bool) -> Iterator[None]:
    untransform = untransformed() if transformed else contextlib.nullcontext()
    with torch.no_grad(), full_precision(("cpu", "cuda", "mps", "xpu")), untransform:
        yield


class Seen(NamedTuple):
    """A captured tensor and the storage it was taken from, to tell later whether that was written to.

    A pass keeps their fields one after another in one list: objects that live as long as a pass does are what the
    garbage collector has to look at, again and again.
    """

    kind: Kind
    call: Call
    path: str
    kept: torch.Tensor
    storage: torch.UntypedStorage | None
    version: int
    geometry: tuple[Any, Any] | None  # strides and offset in the storage, where they are not those of `kept`


def seen(pass_: Pass) -> list[Seen]:
    """All that a pass saw, in order of time."""
    fields = iter(pass_.events)
    return list(map(Seen._make, zip(*[fields] * len(Seen._fields), strict=True)))


class Store(Receiver):
    """Keeps true values: copy-on-write snapshots of what went in and came out, and of gradients.

    Arguments:
        session: whose calls these are.
        layers: whose.
        kinds: what to keep.
        keep: how many passes, for each module that is called from outside, and each thread; 0 keeps nothing.
    """

    def __init__(self, session: Session, layers: list[Layer], kinds: Kind, keep: int) -> None:
        self.model = session.model
        self.layers = set(layers)
        self.kinds = kinds
        self.keep = keep
        self._own = threading.local()
        self._latest: dict[int, deque[tuple[int, Pass]]] = {}
        self._count = 0
        self._lock = threading.Lock()

    def active(self, step: int) -> bool:
        """Whenever it keeps anything at all."""
        return self.keep > 0

    def begin(self, pass_: Pass) -> None:
        """Make room for a pass: what an earlier one under the same outermost module held goes now."""
        if not self.keep:
            return
        with self._lock:
            self._count += 1
            for rings in (self._rings(), self._latest):
                self._make_room(rings, pass_.outermost)
                ring = rings.setdefault(id(pass_.outermost), deque(maxlen=self.keep))
                ring.append((self._count, pass_))

    def _rings(self) -> dict[int, deque[tuple[int, Pass]]]:
        if not hasattr(self._own, "rings"):
            self._own.rings = {}
        rings: dict[int, deque[tuple[int, Pass]]] = self._own.rings
        return rings

    def _make_room(self, rings: dict[int, deque[tuple[int, Pass]]], module: nn.Module) -> None:
        if len(rings) - (id(module) in rings) == 0:
            return
        below = None if module is self.model else {id(each) for each in modules(module)}
        for key, ring in list(rings.items()):
            # a call of the whole replaces what was kept of earlier calls of its parts
            if key != id(module) and (below is None or key in below):
                while ring and len(ring) >= self.keep:
                    ring.popleft()
                if not ring:
                    del rings[key]

    def passes(self) -> list[Pass]:
        """The kept passes, the oldest first: this thread's own, or everybody's latest where it has none."""
        with self._lock:
            rings = self._rings() or self._latest
            items = sorted((item for ring in rings.values() for item in ring), key=lambda item: item[0])
            for _, pass_ in items:
                pass_.settle()
            return [pass_ for _, pass_ in items]

    def calls(self, layer: Layer) -> list[Call]:
        """All calls of the layer in the last kept pass that contains it: this thread's own, else the latest."""
        with self._lock:
            for rings in (self._rings(), self._latest):
                kept = [item for ring in rings.values() for item in ring]
                for _, pass_ in kept:
                    pass_.settle()
                found = [(number, pass_.calls[layer]) for number, pass_ in kept if pass_.calls.get(layer)]
                if found:
                    return max(found, key=lambda item: item[0])[1]
        return []

    def taker(self, layer: Layer, kind: Kind) -> Taker | None:
        if not self.keep or kind not in self.kinds or layer not in self.layers:
            return None
        takers: dict[Kind, Taker] = {
            Kind.INPUT: _take_input,
            Kind.GRAD_INPUT: _take_grad_input,
            Kind.GRAD_OUTPUT: _take_grad_output,
        }
        return takers.get(kind) or _Outputs().take


class _Outputs:
    """Keeps outputs. `shares` says to a short hook, which it is None without, whether the last was copy-on-write."""

    def __init__(self) -> None:
        self.shares: bool | None = None

    def take(self, pass_: Pass, call: Call, value: Any) -> None:
        call.output = _keep(pass_, _OUTPUT, call, value)
        if self.shares is not None:
            plain = type(value) is torch.Tensor and isinstance(call.output, torch.Tensor)
            self.shares = plain and _shares(value, call.output)

    def settle(self, pass_: Pass, call: Call, storage: torch.UntypedStorage, kept: torch.Tensor, count: int) -> None:
        """Take what the short hook logged."""
        call.output = kept
        pass_.events.extend((_OUTPUT, call, "", kept, storage, count, None))


def _shares(live: torch.Tensor, kept: torch.Tensor) -> bool:
    try:
        return data_address(live) == data_address(kept)
    except (RuntimeError, NotImplementedError):
        return False


_INPUT, _OUTPUT = Kind.INPUT, Kind.OUTPUT  # reading a member of a Flag costs more than a global


def _keep(pass_: Pass, kind: Kind, call: Call, value: Any, prefix: str = "") -> Any:
    if type(value) is torch.Tensor:  # nearly always, so the short way is written out
        try:
            storage = value.untyped_storage()
            small = storage.nbytes() <= 4 * value.nbytes + 4096
            if small and storage._cdata not in call.info.fixed and type(value._base) is not nn.Parameter:
                kept = (value.data if value.requires_grad else value)._lazy_clone()
                count = value._version if pass_.versions else -1
                pass_.events.extend((kind, call, prefix, kept, storage, count, None))
                pass_.newest = value, kept, storage, count
                return kept
        except (RuntimeError, NotImplementedError):
            pass
    pass_.newest = None

    def visit(path: str, tensor: torch.Tensor) -> torch.Tensor | None:
        tensor = local(tensor)
        kept = snapshot(tensor, call.info.fixed)
        if kept is not None:
            storage = storage_of(tensor)
            if storage is not None and storage.nbytes() > 4 * tensor.nbytes + 4096 and not _shares(tensor, kept):
                storage = None  # it is worth less than the memory that it would hold
            geometry = None if storage is None else (tensor.stride(), tensor.storage_offset())
            pass_.events.extend((kind, call, prefix + path, kept, storage, version(tensor), geometry))
        return kept

    return rebuild(value, visit)


def _take_input(pass_: Pass, call: Call, value: Any) -> None:
    args, kwargs = value
    newest = pass_.newest
    if len(args) != 1:
        call.args = _keep(pass_, _INPUT, call, args)
    elif newest is not None and newest[0] is args[0] and _unchanged(args[0], newest[1], newest[3]):
        # what the layer before returned: one snapshot serves both, until somebody reads
        _, kept, storage, count = newest
        call.args = (kept,)
        pass_.events.extend((_INPUT, call, "", kept, storage, count, None))
        pass_.sharing.append(call)
    else:  # one argument, nearly always: not walked as a tuple
        call.args = (_keep(pass_, _INPUT, call, args[0]),)
    call.kwargs = _keep(pass_, _INPUT, call, kwargs, "kwargs") if kwargs else {}


def _unchanged(tensor: torch.Tensor, kept: torch.Tensor, count: int) -> bool:
    """Whether a tensor is as it was when it was last captured, also for writes that torch counts no version of."""
    same = count != -1 and count == tensor._version and data_address(tensor) == data_address(kept)
    return same and tensor.stride() == kept.stride() and tensor.shape == kept.shape  # not so after x.data = x.data.t()


def _gradient_taker(kind: Kind) -> Taker:
    def take(call: Call, path: str, gradient: torch.Tensor, number: int) -> None:
        kept = snapshot(gradient)
        if kept is None:
            return
        if call.came is None:
            call.came = [number, kind, path, kept]
        else:
            call.came.extend((number, kind, path, kept))

    return take


_take_grad_input, _take_grad_output = _gradient_taker(Kind.GRAD_INPUT), _gradient_taker(Kind.GRAD_OUTPUT)
