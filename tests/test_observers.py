"""Observers: plain functions of a capture and objects with ``bind``, what they get, and what becomes of errors."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from probe import Capture, Kind, Probe, Scalar
from probe.observers import Site
from tests import zoo

EACH = pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.label)


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, requires_grad=True)


class Binds:
    """Binds a function to every site, and remembers sites and tensors."""

    def __init__(self, function: Callable[[torch.Tensor], Any] | None = None) -> None:
        self.sites: list[Site] = []
        self.seen: list[tuple[Site, torch.Tensor]] = []
        self.function = function

    def bind(self, site: Site) -> Callable[[torch.Tensor], Any]:
        self.sites.append(site)

        def function(tensor: torch.Tensor) -> Any:
            self.seen.append((site, tensor.clone()))
            return None if self.function is None else self.function(tensor)

        return function


# -- what they get -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["function", "bind"])
def test_observers_get_what_a_store_keeps(form: str, net: nn.Module, x: torch.Tensor) -> None:
    """The same values, layer for layer and kind for kind, detached."""
    captures: list[Capture] = []
    binds = Binds()
    with Probe(net, observers=captures.append if form == "function" else binds, keep=1) as p:
        zoo.loss(net(x)).backward()
    if form == "function":
        got = [(c.name, c.kind, c.value) for c in captures]
    else:
        got = [(site.name, site.kind, tensor) for site, tensor in binds.seen]
    assert len(got) == 12
    assert {(name, kind) for name, kind, _ in got} == {(name, kind) for name in p for kind in Kind}
    for name, kind, value in got:
        assert torch.equal(value, getattr(p[name], kind.label)), (name, kind)
        assert not value.requires_grad


def test_a_capture_says_where_it_is_from(x: torch.Tensor) -> None:
    """Name, kind, step, call, path and module type."""
    model = nn.ModuleDict({"a": zoo.Shared(), "b": zoo.Structured("nested")})
    captures: list[Capture] = []
    with Probe(model, "a.first", "b.inner", kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT, observers=captures.append) as p:
        p.step()
        model["a"](x)
        zoo.loss(model["b"](x)).backward()
    places = [(c.name, c.kind, c.step, c.call, c.path, c.module_type) for c in captures]
    assert places[:3] == [("a.first", Kind.OUTPUT, 1, k, "", nn.Linear) for k in range(3)]
    assert places[3:5] == [("b.inner", Kind.OUTPUT, 1, 0, path, zoo.Structuring) for path in ("[0].a[0]", "[1].logits")]
    assert sorted(places[5:], key=str) == [
        ("b.inner", Kind.GRAD_OUTPUT, 1, 0, path, zoo.Structuring) for path in ("[0].a[0]", "[1].logits")
    ]


def test_captured_values_stay_true(net: nn.Module, x: torch.Tensor) -> None:
    """A plain function may keep what it gets: an in-place operation that follows does not reach it."""
    captures: list[Capture] = []
    with Probe(net, "0", observers=captures.append, kinds=Kind.OUTPUT):
        net(x)
    assert (captures[0].value < 0).any()


def test_bound_functions_get_the_live_tensor(net: nn.Module, x: torch.Tensor) -> None:
    """For the hot path: no copy is made; who keeps the tensor sees it overwritten."""
    kept: list[torch.Tensor] = []

    class Keeps:
        def bind(self, site: Site) -> Any:
            return kept.append

    with Probe(net, "0", observers=Keeps(), kinds=Kind.OUTPUT):
        net(x)
    assert (kept[0] >= 0).all()
    assert not kept[0].requires_grad


def test_bind_is_asked_once_a_site(x: torch.Tensor) -> None:
    """Not once a pass: later passes cost one closure. Another call of the pass and another mode are other sites."""
    model = zoo.Shared()
    binds = Binds()
    with Probe(model, "first", kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT, observers=binds):
        for _ in range(3):
            model(x).sum().backward()
        assert len(binds.sites) == 6
        model.eval()
        model(x)
    assert len(binds.sites) == 9
    assert binds.sites[0] == Site("first", Kind.OUTPUT, "", 0, "train", nn.Linear)
    assert {site.call for site in binds.sites} == {0, 1, 2}
    assert {site.mode for site in binds.sites} == {"train", "eval"}


def test_sites_of_no_interest(net: nn.Module, x: torch.Tensor) -> None:
    """``bind`` returns None: nothing is called there."""
    seen: list[torch.Tensor] = []

    class Picks:
        def bind(self, site: Site) -> Any:
            return seen.append if site.name == "2" and site.kind is Kind.OUTPUT else None

    with Probe(net, observers=Picks()):
        net(x).sum().backward()
    assert len(seen) == 1


@EACH
def test_only_what_is_asked_for_is_hooked(kind: Kind, net: nn.Module, x: torch.Tensor) -> None:
    """An attribute ``kinds`` of the observer decides which hooks there are at all."""

    class Wants(Binds):
        kinds = kind

    wants = Wants()
    with Probe(net, "0", observers=wants):
        pre, post = len(net[0]._forward_pre_hooks), len(net[0]._forward_hooks)
        out = net(x)
        before = len(wants.seen)
        out.sum().backward()
    assert [site.kind for site, _ in wants.seen] == [kind]
    assert before == (kind in Kind.INPUT | Kind.OUTPUT)
    assert pre == (kind in Kind.INPUT | Kind.GRAD_INPUT)
    assert post == (1 if kind is not Kind.INPUT else post)


def test_several_observers_and_a_store(net: nn.Module, x: torch.Tensor) -> None:
    """All are served, each by its own wishes; a probe with observers keeps values only if asked to."""
    first: list[Capture] = []
    second = Binds()
    second.kinds = Kind.GRAD_OUTPUT
    with Probe(net, observers=[first.append, second]) as p:
        net(x).sum().backward()
    assert len(first) == 12
    assert len(second.seen) == 3
    with pytest.raises(AttributeError, match="keep=1"):
        _ = p["0"].output


def test_observers_see_edited_values(net: nn.Module, x: torch.Tensor) -> None:
    """What flows on, after the edit."""
    captures: list[Capture] = []
    with Probe(net, "1", observers=captures.append) as p:
        p.edit("1", lambda value: value * 0)
        p.edit("1", torch.ones_like, on=Kind.GRAD_OUTPUT)
        net(x).sum().backward()
    values = {c.kind: c.value for c in captures}
    assert not values[Kind.OUTPUT].any()
    assert torch.equal(values[Kind.GRAD_OUTPUT], torch.ones(3, 4))


def test_generator_functions_run(net: nn.Module, x: torch.Tensor) -> None:
    """A summary that yields is run to its end, though nobody takes what it yields."""
    ran: list[str] = []

    def summary(c: Capture) -> Iterator[Scalar]:
        yield Scalar("mean", c.value.mean())
        ran.append(c.name)

    with Probe(net, observers=summary, kinds=Kind.OUTPUT):
        net(x)
    assert ran == ["0", "1", "2"]


@pytest.mark.parametrize("form", ["function", "bind"])
def test_their_maths_is_without_graph_and_autocast(form: str, net: nn.Module, x: torch.Tensor) -> None:
    """Where the model runs under autocast with gradients, a product of float32 is float32 and needs no gradient."""
    weight = torch.randn(2, 2, requires_grad=True)
    found: list[tuple[torch.dtype, bool]] = []

    def measure(tensor: torch.Tensor) -> None:
        product = tensor.float() @ weight
        found.append((product.dtype, product.requires_grad))

    observer = (lambda c: measure(c.value)) if form == "function" else Binds(measure)
    with Probe(net, "2", observers=observer, kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    assert found == [(torch.float32, False)] * 2
    assert weight.grad is None


def test_gradients_come_once_a_backward(x: torch.Tensor) -> None:
    """Also under both modes of checkpointing, and once more for a second backward."""
    for how in ({}, {"use_reentrant": True}, {"use_reentrant": False}):
        block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        model = nn.Sequential(block, nn.Linear(4, 2))
        if how:
            model.forward = lambda x, how=how, block=block, model=model: model[1](checkpoint(block, x, **how))
        captures: list[Capture] = []
        with Probe(model, observers=captures.append):
            out = model(x)
            out.sum().backward(retain_graph=True)
            count = {kind: sum(c.kind is kind for c in captures) for kind in Kind}
            assert set(count.values()) == {3}, how
            out.sum().backward()
        assert sum(c.kind is Kind.GRAD_OUTPUT for c in captures) == 6
        assert sum(c.kind is Kind.OUTPUT for c in captures) == 3
        model.__dict__.pop("forward", None)


def test_observers_in_threads(net: nn.Module) -> None:
    """Each capture comes in the thread whose pass it belongs to, also in backward."""
    found: list[tuple[threading.Thread, int]] = []  # no identifiers: a new thread may get that of one which has ended

    def observe(c: Capture) -> None:
        found.append((threading.current_thread(), len(c.value)))

    with Probe(net, observers=observe):

        def work(rows: int) -> None:
            mine = threading.current_thread()
            for _ in range(10):
                net(torch.randn(rows, 4, requires_grad=True)).sum().backward()
            assert all(rows == size for thread, size in found if thread is mine)
            assert sum(thread is mine for thread, _ in found) == 120
            done.append(rows)

        done: list[int] = []
        threads = [threading.Thread(target=work, args=(rows,)) for rows in (2, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert sorted(done) == [2, 5]


# -- what becomes of their errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["function", "generator", "bind"])
@EACH
def test_errors_come_through_at_once_with_a_note(kind: Kind, form: str, net: nn.Module, x: torch.Tensor) -> None:
    """The user's own exception, forward or backward, noted with layer and kind; the model is what it was."""

    class Mine(Exception):
        pass

    def fail(c: Any = None) -> None:
        raise Mine("text")

    def generate(c: Capture) -> Iterator[Scalar]:
        fail()
        yield Scalar("never", 0)

    observer = {"function": fail, "generator": generate, "bind": Binds(fail)}[form]
    before = zoo.fingerprint(net)
    with pytest.raises(Mine, match="text") as caught, Probe(net, "1", observers=observer, kinds=kind):
        net(x).sum().backward()
    (note,) = caught.value.__notes__
    assert "'1'" in note
    assert kind.label in note
    net.zero_grad()
    assert zoo.fingerprint(net) == before
    with Probe(net) as p:
        net(x).sum().backward()
    assert p.report() == []


@EACH
def test_interrupts_in_an_observer(kind: Kind, net: nn.Module, x: torch.Tensor) -> None:
    """KeyboardInterrupt in a hook ends the block like anywhere else; if it is caught inside, later passes are right."""
    fuse = [True]

    def interrupt(c: Capture) -> None:
        if fuse and c.name == "1":
            fuse.pop()
            raise KeyboardInterrupt

    before = zoo.fingerprint(net)
    with Probe(net, observers=interrupt, kinds=kind, keep=1) as p:
        with pytest.raises(KeyboardInterrupt):
            net(x).sum().backward()
        net(x).sum().backward()
    assert [len(p[name].calls) for name in p] == [1, 1, 1]
    assert all(getattr(p[name], kind.label) is not None for name in p)
    net.zero_grad()
    assert zoo.fingerprint(net) == before
    fuse.append(True)
    with pytest.raises(KeyboardInterrupt), Probe(net, observers=interrupt, kinds=kind):
        net(x).sum().backward()
    net.zero_grad()
    assert zoo.fingerprint(net) == before


def test_errors_of_bind(net: nn.Module, x: torch.Tensor) -> None:
    """What ``bind`` itself raises is noted as well."""

    class Bad:
        def bind(self, site: Site) -> Any:
            raise LookupError("no such site")

    with pytest.raises(LookupError, match="no such site") as caught, Probe(net, observers=Bad()):
        net(x)
    assert "'0'" in caught.value.__notes__[0]


@pytest.mark.parametrize("observer", [3, "stats", object()])
def test_what_is_no_observer(observer: Any, net: nn.Module) -> None:
    """Refused when the probe is made."""
    with pytest.raises(
        TypeError, match=r"is no observer: give a function of a Capture, or an object with bind\(site\)"
    ):
        Probe(net, observers=observer)


# -- what they may do --------------------------------------------------------------------------------------------------


@EACH
def test_an_observer_may_read_the_probe_and_leave_it(kind: Kind, x: torch.Tensor) -> None:
    """Records of earlier layers are there; leaving from inside stops everything, and no hook stays on any graph."""
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Identity())
    seen: list[Any] = []

    def leave_at(name: str) -> Callable[[Capture], None]:
        def observe(c: Capture) -> None:
            if c.kind is kind and c.name == name:
                seen.append(torch.equal(p[name].input, c.value) if kind is Kind.INPUT else p[name].input)
                p.__exit__(None, None, None)

        return observe

    before = zoo.fingerprint(model)
    for name in ("0", "1", "2", "3"):
        with Probe(model, observers=leave_at(name), keep=1) as p:
            out = model(x)
            out.sum().backward()
        assert len(seen) == 1
        assert seen.pop() is not False
        assert x._backward_hooks is None
        assert not out._backward_hooks
        model.zero_grad()
        assert zoo.fingerprint(model) == before


def test_an_observer_may_change_the_probe(net: nn.Module, x: torch.Tensor) -> None:
    """Edits made and taken back from inside a hook hold from the next layer on."""
    handles: list[Any] = []

    def observe(c: Capture) -> None:
        if c.name == "1" and c.kind is Kind.OUTPUT:
            if handles:
                handles.pop().remove()
            else:
                handles.append(p.edit("2", torch.zeros_like))

    with Probe(net, observers=observe) as p:
        assert not net(x).any()
        assert net(x).any()
        assert not net(x).any()


def test_an_observer_may_run_the_model(net: nn.Module, x: torch.Tensor) -> None:
    """A forward inside a hook, of the model or of a part, is no endless loop if the observer sees to that."""
    depth: list[int] = []

    def observe(c: Capture) -> None:
        if c.name == "2" and not depth:
            depth.append(1)
            net[0](x)

    with Probe(net, observers=observe, kinds=Kind.OUTPUT, keep=1) as p:
        net(x)
    assert len(p["0"].calls) == 2


def test_bound_observers_hold_nothing_alive(net: nn.Module, x: torch.Tensor) -> None:
    """After the block the observer is the user's alone: model and probe know it no more."""

    class Sees:
        def __call__(self, c: Capture) -> None: ...

    observer = Sees()
    ref = weakref.ref(observer)
    with Probe(net, observers=observer) as p:
        net(x).sum().backward()
    del observer, p
    gc.collect()
    assert ref() is None
