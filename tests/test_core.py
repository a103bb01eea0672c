"""`Probe` from entry to exit: edits, stops, steps, copies, and that nothing is left behind whatever happens."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import types
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from probe import Kind, NoSuchLayer, Probe
from tests import zoo

BACKWARDS = pytest.mark.parametrize("backward", ["tensor", "module"])


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), nn.Linear(4, 2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, requires_grad=True)


def gradients(model: nn.Module, x: torch.Tensor, function: Any = lambda model, x: model(x)) -> list[torch.Tensor]:
    """The gradients of all parameters and of the input of a run, which are then reset."""
    model.zero_grad()
    x.grad = None
    zoo.loss(function(model, x)).backward()
    found = [parameter.grad for parameter in model.parameters()] + [x.grad]
    model.zero_grad()
    x.grad = None
    return found


def equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all((s is None and t is None) or torch.equal(s, t) for s, t in zip(a, b, strict=True))


# -- asking for something that cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backward": "full"}, ValueError, "use 'tensor'.* or 'module'"),
        ({"keep": -1}, ValueError, "keep=-1: give the number of passes to keep"),
        ({"keep": 1.5}, ValueError, "keep=1.5"),
        ({"kinds": "output"}, TypeError, r"kinds='output': combine Kind.INPUT, OUTPUT"),
        ({"kinds": Kind(0)}, TypeError, "combine Kind"),
        ({"observers": [3]}, TypeError, "3 is no observer"),
        ({"scaler": True}, TypeError, r"scaler= takes a torch\.amp\.GradScaler, not a bool"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_touched(
    options: dict[str, Any], error: type[Exception], message: str, net: nn.Module
) -> None:
    """The message has the value that was given and the ones that can be."""
    before = zoo.fingerprint(net)
    with pytest.raises(error, match=message):
        Probe(net, **options)
    assert zoo.fingerprint(net) == before


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_model_is_refused(net: nn.Module) -> None:
    """With the order of things that works."""
    with pytest.raises(TypeError, match=r"torch puts no hooks on it; probe it before torch\.jit\.script"):
        Probe(torch.jit.script(net))


def test_entering_twice(net: nn.Module, x: torch.Tensor) -> None:
    """A probe that is attached cannot be entered again; one that was left can, and goes on."""
    p = Probe(net)
    before = zoo.fingerprint(net)
    with p:
        with pytest.raises(RuntimeError, match="already attached"):
            p.__enter__()
        net(x)
    assert zoo.fingerprint(net) == before
    with p:
        net(x + 1)
    assert torch.equal(p["0"].input, x.detach() + 1)
    p.__exit__(None, None, None)
    assert zoo.fingerprint(net) == before


# -- nothing left behind -----------------------------------------------------------------------------------------------


class Interrupts(nn.Module):
    """Raises at its nth call, or sends itself the signal of Ctrl-C."""

    error: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is signal.SIGINT:
            signal.raise_signal(signal.SIGINT)
        elif self.error is not None:
            raise self.error
        return x


@BACKWARDS
@pytest.mark.parametrize("where", ["block", "forward", "backward", "loss", "signal", "exit"])
def test_exceptions_anywhere(where: str, backward: str, x: torch.Tensor) -> None:
    """Whatever raises, wherever: the exception is the user's, the model is what it was, later passes are right."""
    model = nn.Sequential(nn.Linear(4, 4), Interrupts(), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
    before = zoo.fingerprint(model)

    class Stop(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Stop

    expected = KeyboardInterrupt if where == "signal" else Stop
    with pytest.raises(expected), Probe(model, "*", backward=backward):  # noqa: PT012
        if where == "block":
            raise Stop
        if where in ("forward", "signal"):
            model[1].error = Stop() if where == "forward" else signal.SIGINT
        out = model(x)
        if where == "backward":
            out.register_hook(fail)
        if where == "exit":
            out.sum().backward()
            raise Stop
        zoo.loss(fail() if where == "loss" else out).backward()
    model[1].__dict__.pop("error", None)
    model.zero_grad()
    assert zoo.fingerprint(model) == before
    assert x._backward_hooks is None
    with Probe(model, "*", backward=backward) as p:
        zoo.loss(model(x)).backward()
    assert all(p[name].grad_output is not None for name in p)


def test_interrupted_passes_do_not_swallow_the_next(x: torch.Tensor) -> None:
    """KeyboardInterrupt runs no hook; if the user catches it and goes on, each later call is a pass of its own."""
    model = nn.Sequential(nn.Linear(4, 4), Interrupts(), nn.Linear(4, 2))
    part = nn.Sequential(model, nn.Linear(2, 2))
    with Probe(part, "*") as p:
        for target in (part, model):
            model[1].error = KeyboardInterrupt()
            with contextlib.suppress(KeyboardInterrupt):
                target(x)
            del model[1].error
            for k in range(2):
                zoo.loss(target(x + k)).backward()
                assert [len(p[name].calls) for name in ("0", "0.0", "0.2")] == [1, 1, 1]
                assert torch.equal(p["0.0"].input, x.detach() + k)
                assert p["0.2"].grad_output is not None


def test_users_own_hooks_stay(net: nn.Module, x: torch.Tensor) -> None:
    """Hooks of others, put on or taken off before, inside and after the block, live on as if no probe had been."""
    log: list[str] = []
    early = net[0].register_forward_hook(lambda *_: log.append("early"))
    gone = net[0].register_forward_hook(lambda *_: log.append("gone"))
    with Probe(net) as p:
        inside = net[0].register_forward_hook(lambda *_: log.append("inside"))
        kept = net[3].register_full_backward_hook(lambda *_: log.append("backward"))
        gone.remove()
        net(x).sum().backward()
    net(x).sum().backward()
    assert log == ["early", "inside", "backward"] * 2
    assert len(p["0"].calls) == 1
    for handle in (early, inside, kept):
        handle.remove()
    assert not net[0]._forward_hooks
    assert net[3]._is_full_backward_hook is True


def test_what_the_user_changes_inside_the_block_stays_changed(net: nn.Module, x: torch.Tensor) -> None:
    """Modes, flags, weights and submodules are the user's."""
    with Probe(net, "*"):
        net.eval()
        net[0].requires_grad_(False)
        net[2].append(nn.Tanh())
        net(x)
    assert not net.training
    assert not net[0].weight.requires_grad
    assert len(net[2]) == 3


@BACKWARDS
def test_left_inside_a_forward_by_another_thread(backward: str, net: nn.Module, x: torch.Tensor) -> None:
    """Exit while a forward is under way elsewhere: that forward ends well, and nothing more is captured."""
    reached, go_on = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            reached.set()
            go_on.wait(20)
            return x * 1

    net.insert(1, Waits())
    before = zoo.fingerprint(net)
    out: list[torch.Tensor] = []
    p = Probe(net, "*", backward=backward)
    with p:
        thread = threading.Thread(target=lambda: out.append(net(x)))
        thread.start()
        assert reached.wait(20)
    go_on.set()
    thread.join(20)
    out[0].sum().backward()
    assert p["0"].output is not None
    assert p["4"].calls == []
    assert p["0"].backwards == []
    net.zero_grad()
    assert zoo.fingerprint(net) == before


@pytest.mark.parametrize("kinds", [Kind.OUTPUT, Kind.all()], ids=["short", "all"])
def test_entered_again_while_another_thread_goes_on(kinds: Kind, x: torch.Tensor) -> None:
    """That thread's pass was interrupted by the exit: what it calls next, be it a mere part, begins a new one."""
    reached, left, ended, again = (threading.Event() for _ in range(4))

    class Waits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            reached.set()
            left.wait(20)
            return x

    def work() -> None:
        model(x)
        ended.set()
        again.wait(20)
        model[1](x + 1)

    model = nn.Sequential(Waits(), nn.Tanh())
    thread = threading.Thread(target=work)
    p = Probe(model, "1", kinds=kinds)
    with p:
        thread.start()
        assert reached.wait(20)
    left.set()
    assert ended.wait(20)
    with p:
        again.set()
        thread.join(20)
    assert torch.equal(p["1"].output, torch.tanh(x + 1).detach())


def test_nested_probes_of_a_model_and_its_parts(net: nn.Module, x: torch.Tensor) -> None:
    """Each sees its own selection with its own names, and all agree."""
    with Probe(net) as whole, Probe(net[2]) as part, Probe(net, "2", kinds=Kind.OUTPUT) as one:
        zoo.loss(net(x)).backward()
    assert list(part) == ["0", "1"]
    assert torch.equal(part["1"].output, whole["2.1"].output)
    assert torch.equal(part["0"].grad_input, whole["2.0"].grad_input)
    assert torch.equal(one["2"].output, whole["2.1"].output)


@pytest.mark.parametrize("keep", [1, 3])
def test_memory_is_bounded_by_keep(keep: int, net: nn.Module, x: torch.Tensor) -> None:
    """Captures of older passes are gone at once, without the garbage collector."""
    alive: list[weakref.ref[torch.Tensor]] = []
    gc.disable()
    try:
        with Probe(net, keep=keep) as p:
            for _ in range(8):
                net(x).sum().backward()
                alive.append(weakref.ref(p["1"].output))
                alive.append(weakref.ref(p["1"].grad_output))
                assert sum(ref() is not None for ref in alive) <= 2 * keep
        assert sum(ref() is not None for ref in alive) == 2 * keep
        del p
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()


# -- odd modules -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "prune", "parametrize", "lazy"])
def test_modules_that_live_in_their_own_hooks(how: str) -> None:
    """Weight norm, pruning and lazy layers keep theirs in the same dictionaries: they work on, during and after."""
    layer: nn.Module = nn.LazyLinear(4) if how == "lazy" else nn.Linear(4, 4)
    if how == "weight_norm":
        nn.utils.weight_norm(layer)
    elif how == "spectral_norm":
        nn.utils.spectral_norm(layer)
    elif how == "prune":
        prune.l1_unstructured(layer, "weight", amount=0.5)
    elif how == "parametrize":
        nn.utils.parametrizations.orthogonal(layer)
    model, x = nn.Sequential(layer).eval(), torch.randn(2, 4)
    with Probe(model) as p:
        out = model(x)
        zoo.loss(out).backward()
    assert torch.equal(p["0"].output, out.detach())
    assert p["0"].grad_output is not None
    got = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert torch.equal(model(x), out)
    zoo.loss(model(x)).backward()
    assert equal([parameter.grad for parameter in model.parameters()], got)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_transforms_of_torch_func(net: nn.Module, x: torch.Tensor) -> None:
    """Over a probed model they work; captured is the full batch, without tangent, and it outlives the transform."""
    rows = x.detach()
    wanted = net(rows).detach()

    def total(x: torch.Tensor) -> torch.Tensor:
        return net(x).sum()

    for transform in (
        torch.vmap(net),
        torch.func.grad(total),
        torch.vmap(torch.func.grad(total)),
        lambda rows: torch.func.jvp(net, (rows,), (rows,)),
        lambda rows: torch.func.functional_call(net, dict(net.named_parameters()), (rows,)),
    ):
        with Probe(net) as p:
            transform(rows)
        torch.testing.assert_close(p["3"].output, wanted)
        torch.testing.assert_close(p["0"].input, rows)
        assert forward_ad_tangent(p["3"].output) is None


def forward_ad_tangent(tensor: torch.Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(tensor).tangent


def test_gradients_of_many_at_once(x: torch.Tensor) -> None:
    """Under ``is_grads_batched`` the gradients of the whole batch of backward passes are captured, shares included."""
    model = zoo.Shortcut()
    with Probe(model) as p:
        out = model(x)
        (got,) = torch.autograd.grad(out, x, torch.eye(12).view(12, 3, 4), is_grads_batched=True, retain_graph=True)
        rows = [torch.autograd.grad(out, x, each, retain_graph=True) for each in torch.eye(12).view(12, 3, 4)]
    torch.testing.assert_close(got, torch.stack([each for (each,) in rows]))
    batched, *single = p["swish"].backwards
    torch.testing.assert_close(batched.grad_output, torch.stack([each.grad_output for each in single]))
    torch.testing.assert_close(batched.grad_input, torch.stack([each.grad_input for each in single]))


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("how", ["trace", "export", "fake"])
def test_values_that_are_none_do_not_get_into_records(how: str, net: nn.Module, x: torch.Tensor) -> None:
    """Tracing, exporting and fake tensors run the hooks with stand-ins: they leave no trace, nor are hooks exported."""
    with torch.no_grad(), Probe(net, kinds=Kind.OUTPUT) as p:
        net(x)
        wanted = p["3"].output
        if how == "export":
            exported = torch.export.export(net, (x.detach(),)).module()
            assert torch.equal(exported(x.detach()), net(x))
        elif how == "trace":
            traced = torch.jit.trace(net, x.detach(), check_trace=False)
            assert torch.equal(traced(x.detach()), net(x))
        else:
            with FakeTensorMode(allow_non_fake_inputs=True):
                fake = net(torch.ones(3, 4))
            assert p["3"].output is None
            assert fake.shape == (3, 2)
        net(x)
    assert torch.equal(p["3"].output, wanted)


@pytest.mark.parametrize("how", ["anomaly", "allow_mutation", "save_on_cpu", "selective", "meta"])
def test_other_modes_of_torch(how: str) -> None:
    """Anomaly detection, saved-tensor hooks, selective checkpoints, meta tensors: all kinds are captured as ever."""
    model: nn.Module = zoo.ConvNet()
    image = torch.randn(2, 3, 8, 8, requires_grad=True)
    if how == "selective":  # which refuses models that write in place
        model, image = zoo.Shortcut(), torch.randn(3, 4, requires_grad=True)
    wanted = gradients(copy.deepcopy(model), image)
    context: Any = contextlib.nullcontext()
    if how == "anomaly":
        context = torch.autograd.set_detect_anomaly(True, check_nan=False)
    elif how == "allow_mutation":
        context = torch.autograd.graph.allow_mutation_on_saved_tensors()
    elif how == "save_on_cpu":
        context = torch.autograd.graph.save_on_cpu()
    elif how == "meta":
        model, image = model.to("meta"), torch.randn(2, 3, 8, 8, device="meta", requires_grad=True)

    def run(model: nn.Module, image: torch.Tensor) -> Any:
        if how != "selective":
            return model(image)
        policy = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_SAVE)
        return checkpoint(model, image, use_reentrant=False, context_fn=policy)

    with warnings.catch_warnings(), context, Probe(model) as p:
        warnings.simplefilter("ignore", UserWarning)  # anomaly mode announces itself
        got = gradients(model, image, run)
    assert p.report() == []
    assert all(p[name].grad_output.shape == p[name].output.shape for name in p)
    assert how == "meta" or equal(got, wanted)
    assert len(str(p).splitlines()) == 2 + len(p)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_of_the_fused_transformer() -> None:
    """In eval with a padding mask the encoder's layers hand NestedTensors on: they are captured as such."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    x, mask = torch.randn(2, 4, 8), torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]]).bool()
    with torch.no_grad(), Probe(model, "", nn.TransformerEncoderLayer) as p:
        out = model(x, src_key_padding_mask=mask)
    assert torch.equal(p[""].output, out)
    assert p["layers.0"].output.is_nested
    assert [len(row) for row in p["layers.0"].output.unbind()] == [4, 2]
    assert p.overwritten == []
    assert len(str(p).splitlines()) == 5


class Table(nn.Module):
    """Hands on what is its own: slices and aliases of a parameter and a buffer."""

    HOW = ("parameter", "slice", "transposed", "detached", "buffer", "part of the buffer", "state")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 2))
        self.register_buffer("table", torch.ones(4, 2))

    def forward(self, how: str) -> torch.Tensor:
        return {
            "parameter": lambda: self.weight,
            "slice": lambda: self.weight[:3],
            "transposed": lambda: self.weight.T,
            "detached": lambda: self.weight.detach(),
            "buffer": lambda: self.table,
            "part of the buffer": lambda: self.table[1:],
            "state": lambda: next(iter(self.state_dict().values())),
        }[how]()


@pytest.mark.parametrize("kinds", [Kind.all(), Kind.OUTPUT], ids=["all", "output"])
@pytest.mark.parametrize("how", Table.HOW)
def test_parameters_and_buffers_stay_where_they_are(how: str, kinds: Kind) -> None:
    """Their memory does not move when they are written to after a capture: others may hold the address."""
    model = nn.Sequential(Table(), nn.Identity())
    own = (model[0].weight, model[0].table)
    addresses, arrays = [t.data_ptr() for t in own], [t.detach().numpy() for t in own]
    captures: list[Any] = []
    for observers in ((), captures.append):
        with Probe(model, kinds=kinds, observers=observers, keep=1) as p:
            for _ in range(2):
                before = model[0](how).detach().clone()
                model(how)
                with torch.no_grad():
                    for tensor in own:
                        tensor.add_(1)
                assert torch.equal(p["0"].output, before)
        assert [t.data_ptr() for t in own] == addresses
        assert all(tensor[0, 0] == array[0, 0] for tensor, array in zip(own, arrays, strict=True))


def test_a_parameter_stays_where_it_is_also_when_its_layer_gave_other_tensors_before() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() else self.weight.detach()[:3]

    model = nn.Sequential(nn.Linear(2, 2, bias=False), Gate())
    address = model[1].weight.data_ptr()
    with Probe(model, kinds=Kind.OUTPUT) as p:
        for x in (torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3, 2)):
            model(x)
        with torch.no_grad():
            model[1].weight.add_(1)
        assert model[1].weight.data_ptr() == address
        assert p["1"].output.tolist() == [[1.0] * 2] * 3


# -- copies and files --------------------------------------------------------------------------------------------------

LOADS = """
import pickle, sys, torch
sys.modules["probe"] = None  # any import of it, or of a part of it, is an ImportError, also where it is installed
for path in sys.argv[1:]:
    model = torch.load(path, weights_only=False) if path.endswith(".pt") else pickle.load(open(path, "rb"))
    model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
print("loaded", len(sys.argv) - 1)
"""


def test_files_written_while_attached_need_no_probe(net: nn.Module, x: torch.Tensor, tmp_path: Any) -> None:
    """A model saved inside the block, after a backward, with edits on, loads where `probe` is not installed."""
    paths = []
    for backward in ("tensor", "module"):
        with Probe(net, "*", backward=backward, observers=lambda capture: None, keep=1) as p:
            p.edit("0", lambda value: value * 2)
            net(x).sum().backward()
            for name, save in (
                ("pickle", lambda file: pickle.dump(net, file)),
                ("pt", lambda file: torch.save(net, file)),
            ):
                path = tmp_path / f"{backward}.{name}"
                with path.open("wb") as file:
                    save(file)
                assert b"probe" not in path.read_bytes()
                paths.append(str(path))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *paths],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "loaded 4", done.stderr


@BACKWARDS
def test_copies_are_inert_wherever_they_are_made(backward: str, x: torch.Tensor) -> None:
    """Also from inside a forward, and of a part: the copy works, captures nothing, and holds no probe alive."""
    copies: list[nn.Module] = []

    class Copies(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            copies.append(copy.deepcopy(model))
            copies.append(pickle.loads(pickle.dumps(model[0])))
            return x * 1

    Copies.__qualname__ = "Copies"  # pickle finds it by name
    model = nn.Sequential(nn.Linear(4, 4), Copies())
    globals()["Copies"] = Copies
    try:
        p = Probe(model, "*", backward=backward)
        with p:
            zoo.loss(model(x)).backward()
        calls = [len(p[name].calls) for name in p]
        for each in copies[:2]:
            zoo.loss(each(x)).backward()
        assert [len(p[name].calls) for name in p] == calls == [1, 1, 1]
        session = weakref.ref(p._session)
        del p
        gc.collect()
        assert session() is None
    finally:
        del globals()["Copies"]


def test_state_and_leaves_can_be_saved_while_attached(net: nn.Module) -> None:
    """state_dict, optimizer state, and tensors that the model handed on, without a warning."""
    model = nn.Sequential(nn.Identity(), net)
    optimizer = torch.optim.Adam(net.parameters())
    leaf = torch.randn(3, 4, requires_grad=True)
    with Probe(model, optimizer=optimizer):
        model(leaf).sum().backward()
        optimizer.step()
        for value in (model.state_dict(), optimizer.state_dict(), leaf, net[0].weight):
            file = io.BytesIO()
            torch.save(value, file)
            assert b"probe" not in file.getvalue()
            file.seek(0)
            torch.load(file)
        copy.deepcopy(optimizer)
        copy.deepcopy(leaf)


# -- edits -------------------------------------------------------------------------------------------------------------


def double(value: torch.Tensor) -> torch.Tensor:
    return value * 2


def by_hand(kind: Kind, layer: int) -> Any:
    """The net with the values at one place doubled, written out."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * 2

    def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for k, module in enumerate(model):
            if k == layer and kind is Kind.INPUT:
                x = x * 2
            if k == layer and kind is Kind.GRAD_INPUT:
                x = Doubled.apply(x)
            x = module(x)
            if k == layer and kind is Kind.OUTPUT:
                x = x * 2
            if k == layer and kind is Kind.GRAD_OUTPUT:
                x = Doubled.apply(x)
        return x

    return run


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.label)
def test_edits_change_what_flows(kind: Kind, layer: int, net: nn.Module, x: torch.Tensor) -> None:
    """For all four kinds, of leaves and containers: outputs and all gradients as if the change were in the model."""
    wanted = gradients(net, x, by_hand(kind, layer))
    out = by_hand(kind, layer)(net, x)
    with Probe(net, "*") as p:
        p.edit(str(layer), double, on=kind)
        assert torch.equal(net(x), out)
        got = gradients(net, x)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert equal(gradients(net, x), gradients(copy.deepcopy(net), x))


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.label)
def test_what_is_captured_is_what_flows_on(kind: Kind, net: nn.Module, x: torch.Tensor) -> None:
    """After the edit; neighbours see the edited value, on the far side of it."""
    with Probe(net) as plain:
        zoo.loss(net(x)).backward()
    with Probe(net) as p:
        p.edit("1", lambda value: value * 0 + 1, on=kind)
        zoo.loss(net(x)).backward()
    ones = torch.ones(3, 4)
    assert torch.equal(getattr(p["1"], kind.label), ones)
    if kind is Kind.OUTPUT:
        assert torch.equal(p["2.0"].input, ones)
        assert torch.equal(p["1"].input, plain["1"].input)
    elif kind is Kind.INPUT:
        assert torch.equal(p["1"].output, ones.tanh())
        assert torch.equal(p["0"].output, plain["0"].output)
    elif kind is Kind.GRAD_OUTPUT:
        torch.testing.assert_close(p["1"].grad_input, 1 - plain["1"].output ** 2)
        assert torch.equal(p["2.0"].grad_input, plain["2.0"].grad_input)
    else:
        assert torch.equal(p["0"].grad_output, ones)
        assert torch.equal(p["1"].grad_output, plain["1"].grad_output)


def test_an_edit_of_a_containers_gradient_reaches_its_last_child(net: nn.Module, x: torch.Tensor) -> None:
    """Both names are one tensor: the gradient is edited on its way in, and the child captures what it gets."""
    with Probe(net, "*") as p:
        p.edit("2", double, on=Kind.GRAD_OUTPUT)
        zoo.loss(net(x)).backward()
    assert torch.equal(p["2"].grad_output, 2 * p["3"].grad_input)
    assert torch.equal(p["2.1"].grad_output, p["2"].grad_output)


@pytest.mark.parametrize("how", ["swish", "fc"])
def test_an_edit_of_grad_input_touches_this_modules_share_alone(how: str) -> None:
    """Beside a shortcut the other consumers' gradients stay; a module with two consumers inside is edited in sum."""
    model, x = zoo.Shortcut(), torch.randn(3, 4, requires_grad=True)
    with Probe(model) as plain:
        zoo.loss(model(x)).backward()
    whole, x.grad = x.grad, None
    with Probe(model) as p:
        p.edit(how, double, on=Kind.GRAD_INPUT)
        zoo.loss(model(x)).backward()
    torch.testing.assert_close(p[how].grad_input, 2 * plain[how].grad_input)
    if how == "fc":
        torch.testing.assert_close(x.grad, whole + plain["fc"].grad_input)
    else:
        torch.testing.assert_close(p["fc"].grad_output, plain["fc"].grad_output + plain["swish"].grad_input)


def test_edits_of_structured_values() -> None:
    """The function gets what ``.output`` or ``.input`` shows, live, and returns the same structure."""
    model, x = zoo.HFModel().eval(), torch.randint(0, 11, (2, 5))
    given: list[Any] = []

    def mask(value: Any) -> Any:
        given.append(type(value))
        value["logits"] = value["logits"] * 0
        return value

    def keywords(value: dict[str, Any]) -> dict[str, Any]:
        return {**value, "hidden_states": value["hidden_states"] * 0}

    with Probe(model, "", "layers.1") as p:
        p.edit("", mask)
        p.edit("layers.1", keywords, on=Kind.INPUT)
        out = model(input_ids=x)
        zoo.loss(out["hidden_states"]).backward()
    assert given == [zoo.ModelOutput]
    assert type(out) is zoo.ModelOutput
    assert not out.logits.any()
    assert not p[""].output.logits.any()
    assert not p["layers.1"].input["hidden_states"].any()
    for how in zoo.Structuring.HOW:
        structured = zoo.Structured(how)
        seen: list[Any] = []
        with Probe(structured, "inner") as p:
            p.edit("inner", lambda value, seen=seen: seen.append(value) or value)
            p.edit("inner", double, on=Kind.GRAD_OUTPUT | Kind.GRAD_INPUT)
            out = structured(torch.ones(2, 4))
            zoo.loss(out).backward()
        assert seen[0] is out
        assert type(p["inner"].output) is type(out)


def test_an_edit_of_a_gradient_at_a_tensor_returned_twice(x: torch.Tensor) -> None:
    """As Hugging Face's models return their last hidden state: one gradient, edited once, shown in both places."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            out = self.fc(x)
            return out, {"again": out}

    model = Twice()
    with Probe(model, "*") as p:
        p.edit("*", lambda gradient: gradient * 10, on=Kind.GRAD_OUTPUT)
        first, rest = model(x)
        (first + 2 * rest["again"]).sum().backward()
    assert torch.equal(p[""].grad_output[0], torch.full((3, 4), 30.0))
    assert torch.equal(p[""].grad_output[1]["again"], torch.full((3, 4), 30.0))
    assert torch.equal(p["fc"].grad_output, torch.full((3, 4), 300.0))


@pytest.mark.parametrize(
    ("on", "at_output", "at_input"),
    [(Kind.GRAD_INPUT, 1, 10), (Kind.GRAD_OUTPUT, 10, 10), (Kind.GRAD_INPUT | Kind.GRAD_OUTPUT, 10, 100)],
    ids=lambda value: getattr(value, "label", ""),
)
def test_edits_of_the_gradients_of_a_pass_through(on: Kind, at_output: int, at_input: int, x: torch.Tensor) -> None:
    """Its output is its input, one tensor with one gradient: that at the output comes first, and so is seen."""
    model = nn.Sequential(nn.Tanh(), nn.Identity(), nn.Tanh())
    with Probe(model) as p:
        p.edit("1", lambda gradient: gradient * 10, on=on)
        model(x).sum().backward()
    came = p["2"].grad_input
    torch.testing.assert_close(p["1"].grad_output, came * at_output)
    torch.testing.assert_close(p["1"].grad_input, came * at_input)
    torch.testing.assert_close(p["0"].grad_output, came * at_input)


def test_an_edit_may_change_the_shape_where_it_says_so(net: nn.Module, x: torch.Tensor) -> None:
    """Another batch flows on; what is captured is what flows."""
    with Probe(net, "1") as p:
        p.edit("1", lambda value: value[:1], same_shape=False)
        y = net(x)
    assert len(y) == len(p["1"].output) == 1
    with Probe(net, "1") as p:
        p.edit("1", lambda value: None, same_shape=False)
        with pytest.raises(TypeError, match="returned None"):
            net(x)


def test_edits_of_every_call_of_a_shared_module() -> None:
    """A module that is called three times is edited three times."""
    model, x = zoo.Shared(), torch.randn(2, 4)
    with Probe(model) as p:
        p.edit("second", torch.zeros_like)
        model(x)
    assert [bool(call.output.any()) for call in p["first"].calls] == [False] * 3


def test_several_edits_run_in_order(net: nn.Module, x: torch.Tensor) -> None:
    """Later ones see what earlier ones made, whatever the kinds of the probe and its selection."""
    with Probe(net, "3", kinds=Kind.OUTPUT) as p:
        p.edit("0", lambda value: value * 0 + 3)
        p.edit(nn.Linear, lambda value: value * 2)
        p.edit("1", lambda value: value + 1, on=Kind.INPUT)
        seen: list[torch.Tensor] = []
        p.edit("1", lambda value: seen.append(value) or value, on=Kind.INPUT)
        net(x)
    assert torch.equal(seen[0], torch.full((3, 4), 7.0))
    assert list(p) == ["3"]


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.label)
def test_edits_can_be_taken_back(kind: Kind, net: nn.Module, x: torch.Tensor) -> None:
    """By ``remove()`` (twice is harmless), by the end of a block, and by leaving the probe."""
    wanted = gradients(net, x)
    before = zoo.fingerprint(net)
    p = Probe(net)
    early = p.edit("0", double, on=kind)
    assert equal(gradients(net, x), wanted)  # not attached yet
    with p:
        assert not equal(gradients(net, x), wanted)
        early.remove()
        early.remove()
        assert equal(gradients(net, x), wanted)
        with p.edit("0", double, on=kind), p.edit("1", double, on=kind) as second:
            second.remove()
            assert not equal(gradients(net, x), wanted)
        assert equal(gradients(net, x), wanted)
        p.edit("2", double, on=kind)
    assert equal(gradients(net, x), wanted)
    assert zoo.fingerprint(net) == before


def test_edits_that_change_nothing_change_nothing(net: nn.Module, x: torch.Tensor) -> None:
    """Identity edits of all kinds leave every bit as it was."""
    wanted, out = gradients(net, x), net(x)
    with Probe(net) as p:
        p.edit("*", lambda value: value, on=Kind.all())
        assert torch.equal(net(x), out)
        assert equal(gradients(net, x), wanted)


def test_edits_in_place(x: torch.Tensor) -> None:
    """A function that writes to what it is given and returns it is an edit like any other."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with Probe(model) as p:
        p.edit("0", lambda value: value.mul_(0).add_(1))
        model(x).sum().backward()
    assert torch.equal(p["0"].output, torch.ones(3, 4))
    assert torch.equal(p["2"].input, torch.ones(3, 4))


def test_edits_without_gradients(net: nn.Module, x: torch.Tensor) -> None:
    """Under no_grad and inference_mode edits of values work, edits of gradients wait."""
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Probe(net) as p:
            p.edit("3", torch.zeros_like)
            p.edit("0", double, on=Kind.GRAD_INPUT | Kind.GRAD_OUTPUT)
            assert not net(x).any()
            assert not p["3"].output.any()


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda value: value[:, 1:],
            ValueError,
            r"the edit of '1' on output returned \[3, 3\] torch.float32.*\[3, 4\]",
        ),
        (
            lambda value: value.double(),
            ValueError,
            r"'1' on output returned \[3, 4\] torch.float64, but \[3, 4\] torch.fl",
        ),
        (lambda value: None, TypeError, "'1' on output returned None; return the value that is to flow on"),
        (lambda value: [value], TypeError, "'1' on output returned tensors at"),
        (lambda value: 3, TypeError, "'1' on output returned tensors at"),
    ],
)
def test_edits_of_another_form_are_refused(function: Any, error: Any, message: str, net: nn.Module, x: Any) -> None:
    """Another shape, dtype or structure: the error names layer and kind; nothing is left."""
    before = zoo.fingerprint(net)
    with pytest.raises(error, match=message), Probe(net) as p:  # noqa: PT012
        p.edit("1", function)
        net(x)
    assert zoo.fingerprint(net) == before


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.label)
def test_errors_of_edits(kind: Kind, net: nn.Module, x: torch.Tensor) -> None:
    """For every kind: a wrong shape is refused, the user's own exception comes through with a note."""
    for function, error, text in (
        (lambda value: value[:1], ValueError, f"the edit of '1' on {kind.label}"),
        (lambda value: value / None, TypeError, "unsupported operand"),
    ):
        with pytest.raises(error, match=text) as caught, Probe(net) as p:  # noqa: PT012
            p.edit("1", function, on=kind)
            net(x).sum().backward()
        if error is TypeError:
            assert caught.value.__notes__ == [f"raised by the edit of '1' on {kind.label}"]
    net.zero_grad()
    with Probe(net) as p:
        net(x).sum().backward()
    assert p.report() == []


def test_edits_that_cannot_be(net: nn.Module) -> None:
    """No layer, no function, no kind: refused at once."""
    with Probe(net) as p:
        with pytest.raises(NoSuchLayer, match=r"no layer matches '9'"):
            p.edit("9", double)
        with pytest.raises(TypeError, match="edit takes a function"):
            p.edit("0", 3)
        with pytest.raises(TypeError, match="on='output'"):
            p.edit("0", double, on="output")
        with pytest.raises(NoSuchLayer):
            p.stop_after("9")


def test_module_backward_hooks_edit_inputs_alone(net: nn.Module, x: torch.Tensor) -> None:
    """torch's module hook can replace grad_input; for grad_output the error says what can."""
    wanted = gradients(net, x, by_hand(Kind.GRAD_INPUT, 1))
    with Probe(net, backward="module") as p:
        p.edit("1", double, on=Kind.GRAD_INPUT)
        got = gradients(net, x)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    p = Probe(net, backward="module")
    p.edit("1", double, on=Kind.GRAD_OUTPUT)
    with pytest.raises(RuntimeError, match=r"'1'.*cannot change grad_output; leave backward=.module. out"), p:
        gradients(net, x)


class Checkpointed(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, x, **self.how) if self.how else self.block(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.label)
def test_edits_under_activation_checkpointing(kind: Kind, reentrant: bool, x: torch.Tensor) -> None:
    """Edits hold in the recomputation too: gradients equal those of the edited model without checkpoints."""
    plain = Checkpointed()
    model = copy.deepcopy(plain)
    model.how = {"use_reentrant": reentrant}
    with Probe(plain) as p:
        p.edit("block.1", double, on=kind)
        wanted = gradients(plain, x)
    if reentrant and kind is Kind.GRAD_INPUT:
        p = Probe(model)
        p.edit("block.1", double, on=kind)
        with pytest.raises(RuntimeError, match=r"'block.1'.*use checkpoint\(\.\.\., use_reentrant=False\)"), p:
            gradients(model, x)
        return
    with Probe(model) as p:
        p.edit("block.1", double, on=kind)
        got = gradients(model, x)
        assert len(p["block.1"].calls) == 1
    assert equal(got, wanted)


# -- stopping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["1", "2", "2.0", nn.Sigmoid])
def test_stop_after_ends_the_forward(selector: Any, net: nn.Module, x: torch.Tensor) -> None:
    """Layers up to there have run and can be read, later ones have not; the block ends without an exception."""
    before = zoo.fingerprint(net)
    reached: list[str] = []
    net[3].register_forward_hook(lambda *_: reached.append("3"))
    with Probe(net, "*", kinds=Kind.OUTPUT) as p:
        p.stop_after(selector)
        net(x)
        reached.append("after")
    assert reached == []
    net[3]._forward_hooks.clear()
    assert zoo.fingerprint(net) == before
    (wanted,) = Probe(net, selector)
    part = net[: int(wanted[0]) + 1] if wanted != "2.0" else nn.Sequential(*net[:2], net[2][0])
    assert torch.equal(p[wanted].output, part(x).detach())
    assert p["3"].calls == []
    with pytest.raises(AttributeError, match="stop_after ended the forward before it"):
        _ = p["3"].output


@pytest.mark.parametrize("kinds", [Kind.OUTPUT, Kind.all()])
def test_stop_after_the_whole_model(kinds: Kind, net: nn.Module, x: torch.Tensor) -> None:
    """The root can be the last layer, too; nothing caught that interruption, so nothing is warned of."""
    reached = False
    with Probe(net, "*", kinds=kinds) as p:
        p.stop_after("")
        net(x)
        reached = True
    assert not reached
    assert torch.equal(p[""].output, net(x).detach())


def test_stop_after_is_reported_as_such(net: nn.Module, x: torch.Tensor) -> None:
    """Those around the stopped layer have no output for that reason, those after it were never reached."""
    with Probe(net, "*") as p:
        p.stop_after("2.0")
        net(x)
    rows = dict(map(tuple, p.report()))
    assert rows["2"] == "stop_after ended its forward"
    assert rows["3"] == rows["2.1"] == "never called: stop_after ended the forward before it"
    assert "2.0" not in rows
    with pytest.raises(AttributeError, match="there is no output of '2': stop_after ended its forward"):
        _ = p["2"].output


def test_stop_after_swallows_nothing_else(net: nn.Module, x: torch.Tensor) -> None:
    """Other exceptions come through, and an outer probe's block does not swallow the inner one's stop."""
    with pytest.raises(ValueError, match="mine"), Probe(net) as p:  # noqa: PT012
        p.stop_after("3")
        raise ValueError("mine")
    went_on: list[str] = []
    with Probe(net) as outer:
        with Probe(net) as inner:
            inner.stop_after("1")
            net(x)
        went_on.append("outer")
    assert went_on == ["outer"]
    with Probe(net) as outer:
        outer.stop_after("1")
        with Probe(net) as inner:
            net(x)
        went_on.append("not reached")
    assert went_on == ["outer"]
    assert outer["1"].output.shape == inner["1"].output.shape == (3, 4)


def test_stop_after_can_be_taken_back(net: nn.Module, x: torch.Tensor) -> None:
    """By its handle; the probe then sees whole passes."""
    with Probe(net) as p:
        handle = p.stop_after("1")
        handle.remove()
        net(x)
        assert p["3"].output.shape == (3, 2)
        with p.stop_after("0"):
            pass
        net(x).sum().backward()
    assert p.report() == []


def test_a_stopped_layer_still_has_its_edit(net: nn.Module, x: torch.Tensor) -> None:
    """The edit runs, is captured, and then the forward ends."""
    with torch.no_grad(), Probe(net) as p:
        p.stop_after("1")
        p.edit("1", torch.zeros_like)
        net(x)
    assert not p["1"].output.any()


# -- steps and tags ----------------------------------------------------------------------------------------------------


def test_steps_advance_with_the_optimizer(net: nn.Module, x: torch.Tensor) -> None:
    """Each ``step()`` of the (first) optimizer, or ``p.step()``; ``step`` itself is not wrapped, hooks go at exit."""
    optimizer, other = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(net[0].parameters(), lr=0.1)
    method = vars(optimizer).get("step")
    steps: list[int] = []
    with Probe(net, optimizer=[optimizer, other], observers=lambda capture: steps.append(capture.step)) as p:
        assert p.steps == 0
        for _ in range(3):
            net(x).sum().backward()
            optimizer.step()
            other.step()
        assert p.steps == 3
        p.step()
        assert p.steps == 4
    assert sorted(set(steps)) == [0, 1, 2]
    assert vars(optimizer).get("step") is method
    for each in (optimizer, other):
        assert not each._optimizer_step_pre_hooks
        assert not each._optimizer_step_post_hooks
    optimizer.step()
    assert p.steps == 4


def test_steps_with_a_closure(net: nn.Module, x: torch.Tensor) -> None:
    """One step, however often the closure runs the model."""
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        return loss

    with Probe(net, optimizer=optimizer) as p:
        optimizer.step(closure)
        assert p.steps == 1
        assert len(p["0"].calls) == 1
        assert p["3"].grad_output is not None


def test_tags_name_passes(net: nn.Module, x: torch.Tensor) -> None:
    """``mode`` of a site is train or eval, or the tag of the block; tags nest, and end with an exception."""
    modes: list[str] = []

    class Modes:
        def bind(self, site: Any) -> Any:
            return lambda tensor: modes.append(site.mode)

    with Probe(net, "0", kinds=Kind.OUTPUT, observers=Modes()) as p:
        net(x)
        net.eval()
        net(x)
        with p.tag("valid"):
            net(x)
            with p.tag("test"):
                net(x)
            net(x)
        with pytest.raises(TypeError, match=r'p.tag\("valid"\), not 3'), p.tag(3):
            pass
        with contextlib.suppress(ValueError), p.tag("broken"):
            raise ValueError
        net(x)
    assert modes == ["train", "eval", "valid", "test", "valid", "eval"]


def test_a_probe_costs_nothing_once_it_is_left(net: nn.Module, x: torch.Tensor) -> None:
    """All hook dictionaries are empty, so that torch takes its fast path."""
    with Probe(net, "*") as p:
        p.edit("*", lambda value: value, on=Kind.all())
        F.mse_loss(net(x), torch.zeros(3, 2)).backward()
    for module in net.modules():
        assert not any(
            value for name, value in vars(module).items() if "hook" in name and name != "_is_full_backward_hook"
        )


def test_two_stops_on_one_layer() -> None:
    """Taking one back leaves the other."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    reached = False
    with Probe(model) as p:
        first, second = p.stop_after("0"), p.stop_after("0")
        first.remove()
        model(torch.ones(1, 2))
        reached = True
    assert not reached
    second.remove()


def test_a_model_that_catches_the_stop_is_told_of() -> None:
    """A forward that swallows every exception goes on: that is said."""

    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.inner(x)
            except Exception:
                return x

    model = Careless()
    with Probe(model) as p:
        p.stop_after("inner")
        with pytest.warns(RuntimeWarning, match=r"caught the interruption of stop_after\('inner'\)"):
            model(torch.ones(1, 2))


def test_containers_that_flow_on_stay_the_users_own() -> None:
    """copy_views replaces a structure only where a tensor in it is a view, and keeps a list's subclass."""

    class Marked(list):  # type: ignore[type-arg]
        mark = 0

    class Listing(nn.Module):
        def __init__(self, view: bool) -> None:
            super().__init__()
            self.view = view

        def forward(self, x: torch.Tensor) -> Marked:
            self.made = Marked([(x * 2)[:1] if self.view else x * 2])
            self.made.mark = 3
            return self.made

    for view in (False, True):
        model = nn.Sequential(Listing(view))
        with Probe(model, copy_views=True):
            out = model(torch.ones(2, 2, requires_grad=True))
        assert (out is model[0].made) == (not view)
        assert (type(out), out.mark) == (Marked, 3)


def test_a_graph_that_leaves_by_an_attribute_counts() -> None:
    """GRAD_INPUT sees an auxiliary loss that a module keeps on itself, as torch's module hook does."""

    class Regularised(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.penalty = x.pow(2).sum()
            return x * 2

    model = nn.Sequential(nn.Linear(2, 2), Regularised())
    for backward in ("tensor", "module"):
        with Probe(model, backward=backward) as p:
            (model(torch.randn(3, 2, requires_grad=True)).sum() + model[1].penalty).backward()
        found = p["1"].grad_input
        found = found[0] if isinstance(found, tuple) else found
        assert torch.allclose(found, 2 + 2 * p["1"].input)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("kinds", [Kind.OUTPUT, Kind.INPUT, Kind.all()])
def test_scripting_a_probed_model_says_what_to_do(kinds: Kind) -> None:
    """torch.jit.script would compile the hooks."""
    model = nn.Sequential(nn.Linear(2, 2))
    with Probe(model, kinds=kinds):
        for part in (model, model[0]):
            with pytest.raises((AttributeError, RuntimeError), match="script outside"):
                torch.jit.script(part)


@pytest.mark.parametrize("kinds", [Kind.OUTPUT, Kind.all()])
def test_hooks_that_are_copied_as_cloudpickle_does_are_inert(kinds: Kind) -> None:
    """It binds the very function to what the object is pickled as."""
    model = nn.Sequential(nn.Linear(2, 2))
    with Probe(model, kinds=kinds) as p:
        found = [*model[0]._forward_pre_hooks.values(), *model[0]._forward_hooks.values()]
        for hook in found:
            copied = types.MethodType(hook.__func__, pickle.loads(pickle.dumps(hook.__self__)))
            assert copied(model[0], (torch.ones(1, 2),), torch.ones(1, 2)) is None
            assert copied(nn.Linear(2, 2), (), {}) is None
        assert len(found) == (1 if kinds is Kind.OUTPUT else 2)
        assert not p["0"].calls


def test_an_output_that_is_a_view_can_be_saved() -> None:
    """Torch warns of tensors with hooks that do not say they stay out of the file."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)))
    with Probe(model):
        torch.save(model(torch.randn(2, 4)), io.BytesIO())


def test_a_record_that_is_read_within_a_pass_has_all_of_it_afterwards() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.seen: list[Any] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fc(x)
            self.seen.append(p["fc"])
            return self.fc(x)

    model = Twice()
    with Probe(model) as p:
        model(torch.randn(1, 2))
        assert len(model.seen[0].calls) == 2


def test_an_empty_selection_is_an_error() -> None:
    """A computed list that came out empty does not silently mean every layer."""
    with pytest.raises(NoSuchLayer, match="selects no layer"):
        Probe(nn.Linear(2, 2), [])
    with pytest.raises(NoSuchLayer, match="no leaf module"):
        Probe(nn.ModuleList())
