"""Compiled models: run eagerly while they are observed, or observed from inside the graph."""

from __future__ import annotations

import contextlib
import copy
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from probe import Board, Capture, Kind, Probe, ProbeWarning, Scalar, feature_maps, health, histogram, stats
from tests import reading, zoo

pytestmark = [  # of torch 2.11's compiler, about its own doings
    pytest.mark.filterwarnings("ignore:.class 'torch.autograd.function.Function'. should not be:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
OLD = torch.__version__.startswith(
    "2.11."
)  # its compiler can't trace as much: with graph breaks, where others have none
QUIET = pytest.mark.filterwarnings("ignore:.*is compiled. in steps that are observed:probe.ProbeWarning")
WAYS = pytest.mark.parametrize("way", ["torch.compile", "model.compile", "function", "train_step"])


class Backend:
    """A compiler backend that counts the graphs it is given and how often they run."""

    def __init__(self) -> None:
        self.graphs = 0
        self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def loss_of(model: nn.Module, way: str, backend: Any, **how: Any) -> tuple[nn.Module, Callable[[torch.Tensor], Any]]:
    """What to give to the probe, and a function of a batch, compiled in one of the ways, with a backward pass."""

    def of(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().sum()

    def step(x: torch.Tensor) -> None:
        torch.autograd.grad(of(x), [*model.parameters()])

    if way == "torch.compile":
        compiled = torch.compile(model, backend=backend, **how)
        return compiled, lambda x: compiled(x).square().sum().backward()
    if way == "model.compile":
        model.compile(backend=backend, **how)
        return model, lambda x: of(x).backward()
    if way == "function":
        function = torch.compile(of, backend=backend, **how)
        return model, lambda x: function(x).backward()
    function = torch.compile(lambda x: of(x).backward(), backend=backend)  # a graph break at the backward
    return model, function


# -- auto: eagerly in steps that are observed --------------------------------------------------------------------------


def probed_twice(model: nn.Module, run: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Probe:
    with Probe(model) as p:
        run(x)
        run(x)
    return p


@WAYS
def test_a_compiled_model_runs_eagerly_while_it_is_probed(way: str, net: nn.Module) -> None:
    """F11.1 F11.3 hooks added after the first compiled call never fire; all four kinds do in eager mode, said once."""
    backend, x = Backend(), torch.randn(3, 4)
    probed, run = loss_of(net, way, backend)
    run(x)
    graphs, ran = backend.graphs, backend.runs
    with pytest.warns(ProbeWarning, match="is compiled: in steps that are observed it runs eagerly") as told:
        p = probed_twice(probed, run, x)
    assert len(told) == 1
    assert list(p) == ["0", "1", "2"]
    assert (p["0"].output < 0).any()
    assert torch.equal(p["1"].output, p["0"].output.relu())
    assert torch.equal(p["2"].grad_output, 2 * p["2"].output)
    assert torch.equal(p["1"].grad_output, p["2"].grad_input)
    assert (backend.graphs, backend.runs) == (graphs, ran)
    run(x)
    assert (backend.graphs, backend.runs) == (graphs, 2 * ran)


@QUIET
@WAYS
def test_steps_that_are_not_observed_run_compiled(way: str, net: nn.Module, tmp_path: Path) -> None:
    """Of seven steps with ``every=3`` four run compiled, and nothing is compiled anew, then and afterwards."""
    backend, x = Backend(), torch.randn(3, 4)
    probed, run = loss_of(net, way, backend)
    run(x)
    graphs, ran = backend.graphs, backend.runs
    with Board(str(tmp_path)) as board, Probe(probed) as p:
        p.log(board, stats, every=3)
        for _ in range(7):
            run(x)
            p.step()
    assert reading.steps(tmp_path, "0/output/mean") == [0, 3, 6]
    assert reading.steps(tmp_path, "0/grad_output/mean") == [0, 3, 6]
    assert backend.graphs == graphs
    assert backend.runs == 5 * ran
    run(x)
    assert (backend.graphs, backend.runs) == (graphs, 6 * ran)


@QUIET
def test_first_compiled_inside_the_block(net: nn.Module, tmp_path: Path) -> None:
    """A model that is compiled while it is probed: captured all the same, and compiled once, in an un-observed step."""
    backend, x = Backend(), torch.randn(3, 4)
    with Board(str(tmp_path)) as board, Probe(net) as p:
        p.log(board, stats, every=2)
        run = torch.compile(net, backend=backend)
        for _ in range(5):
            run(x)
            p.step()
    assert reading.steps(tmp_path, "0/output/mean") == [0, 2, 4]
    assert (backend.graphs, backend.runs) == (1, 2)


@QUIET
def test_overlapping_probes_and_exceptions_leave_the_stance_alone(net: nn.Module) -> None:
    """Compiled code runs eagerly until the last of several probes is left, in any order, and after an exception."""
    backend, x = Backend(), torch.randn(3, 4)
    compiled = torch.compile(net, backend=backend)
    compiled(x)
    first, second = Probe(compiled), Probe(compiled)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    compiled(x)
    assert backend.runs == 1
    second.__exit__(None, None, None)
    compiled(x)
    assert backend.runs == 2
    with contextlib.suppress(ZeroDivisionError), Probe(compiled):
        raise ZeroDivisionError
    compiled(x)
    assert backend.runs == 3
    with torch.compiler.set_stance("force_eager"):
        with Probe(compiled):
            compiled(x)
        compiled(x)
    assert backend.runs == 3
    compiled(x)
    assert (backend.graphs, backend.runs) == (1, 4)


def test_a_probe_on_a_compiled_model_can_be_refused(net: nn.Module) -> None:
    """``compiled="error"`` says what to type, on ``torch.compile(model)``, ``model.compile()`` and a compiled part."""
    with Probe(net, compiled="error") as p:
        net(torch.randn(3, 4))
    assert p["0"].output is not None
    part = copy.deepcopy(net)
    part[0].compile(backend="eager")
    for model in (torch.compile(net, backend="eager"), part):
        with pytest.raises(RuntimeError, match=r"the model is compiled.*compiled='error'.*compiled='inside'"):
            Probe(model, compiled="error").__enter__()
    with pytest.raises(ValueError, match=r"compiled='always': use 'auto' \(the default\), 'inside' or 'error'"):
        Probe(net, compiled="always")


# -- a training step as one graph --------------------------------------------------------------------------------------


class Plain(torch.optim.Optimizer):
    """SGD that can be in a graph, as torch's own optimizers cannot."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])


@pytest.fixture
def whole_step(net: nn.Module) -> Iterator[tuple[Any, Callable[[torch.Tensor], Any]]]:
    """An optimizer, and forward, backward and update compiled together with ``fullgraph=True``."""
    optimizer = Plain(net.parameters())

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: torch.Tensor) -> torch.Tensor:
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def run(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        step(x)

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield optimizer, run


@QUIET
@pytest.mark.parametrize("compiled", ["auto", "inside"])
def test_a_whole_step_in_one_graph(compiled: str, net: nn.Module, whole_step: Any, tmp_path: Path) -> None:
    """Without ``optimizer=`` it is observed, and counted by `p.step`, with the weights of an eager twin."""
    twin, (_, run) = copy.deepcopy(net), whole_step
    other = Plain(twin.parameters())
    torch.manual_seed(1)
    batches = [torch.randn(3, 4) for _ in range(4)]
    with Board(str(tmp_path)) as board, Probe(net, compiled=compiled) as p:
        p.log(board, stats, every=2)
        for x in batches:
            run(x)
            p.step()
    for x in batches:
        other.zero_grad()
        twin(x).square().mean().backward()
        other.step()
    assert reading.steps(tmp_path, "0/output/mean") == reading.steps(tmp_path, "2/grad_output/mean") == [0, 2]
    torch.testing.assert_close([*net.parameters()], [*twin.parameters()])


@QUIET
@pytest.mark.parametrize(("compiled", "every"), [("auto", 2), ("inside", 1)])
def test_an_optimizer_in_a_whole_graph_is_refused(
    compiled: str, every: int, net: nn.Module, whole_step: Any, tmp_path: Path
) -> None:
    """With what to type, and nothing is left behind; where all steps run eagerly it works."""
    (optimizer, run), x = whole_step, torch.randn(3, 4)
    text = r"leave optimizer= out of Probe\(...\) and call p.step\(\) after each step"
    with (  # noqa: PT012
        Board(str(tmp_path)) as board,
        pytest.raises(RuntimeError, match=text),
        Probe(net, optimizer=optimizer, compiled=compiled) as p,
    ):
        p.log(board, stats, every=every)
        run(x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not optimizer._optimizer_step_pre_hooks
    with Probe(net, optimizer=optimizer) as p:
        run(x)
        run(x)
    assert p.steps == 2
    assert len(p.schedule.lr) == 2
    run(x)


# -- inside ------------------------------------------------------------------------------------------------------------


def logged(
    folder: Path, model: nn.Module, run: Callable[[torch.Tensor], Any], *, steps: int = 6, every: int = 1, **how: Any
) -> dict[str, list[tuple[int, float]]]:
    """All scalars that a probe logs over some steps, with the same batches each time."""
    torch.manual_seed(1)
    with Board(str(folder)) as board, Probe(model, **how) as p:
        p.log(board, stats, histogram, every=every)
        for _ in range(steps):
            run(torch.randn(3, 4))
            p.step()
    events = reading.read(folder)
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in events.Tags()["histograms"]:
        found[tag] = [(event.step, n) for event in events.Histograms(tag) for n in event.histogram_value.bucket]
    return found


def assert_close(got: dict[str, list[tuple[int, float]]], want: dict[str, list[tuple[int, float]]]) -> None:
    assert got.keys() == want.keys()
    for tag, events in want.items():
        assert [step for step, _ in got[tag]] == [step for step, _ in events], tag
        values = [torch.tensor([value for _, value in each]) for each in (got[tag], events)]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m, tag=tag: f"{tag}: {m}")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", ["torch.compile", "model.compile", "function"])
def test_statistics_inside_the_graph(way: str, backend: str, net: nn.Module, tmp_path: Path) -> None:
    """F11.4 F11.5 F11.7 100 steps: one whole graph for observed steps, one for others; all as in eager mode."""
    twin = copy.deepcopy(net)
    whole = not (OLD and way == "model.compile")
    probed, run = loss_of(net, way, backend, fullgraph=whole)
    got = logged(tmp_path / "inside", probed, run, steps=100, every=5, compiled="inside")
    assert not whole or (counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"])
    want = logged(tmp_path / "eager", twin, lambda x: twin(x).square().sum().backward(), steps=100, every=5)
    assert_close(got, want)
    assert [step for step, _ in got["0/output/mean"]] == list(range(0, 100, 5))
    assert {"0/grad_output/std", "1/output/histogram", "2/grad_output/histogram"} <= got.keys()


@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor backend needs g++ on the CPU")
def test_statistics_inside_the_graph_with_inductor(net: nn.Module, tmp_path: Path) -> None:
    """With the default backend: training, in-place operations and all; parameters end as those of an eager twin."""
    twin = copy.deepcopy(net)
    runs = []
    for model, call, how in ((net, torch.compile(net, fullgraph=True), {"compiled": "inside"}), (twin, twin, {})):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def run(x: torch.Tensor, call: Any = call, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            call(x).square().sum().backward()
            optimizer.step()

        runs.append(logged(tmp_path / str(len(runs)), model, run, steps=4, every=2, **how))
    assert_close(*runs)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    torch.testing.assert_close([*net.parameters()], [*twin.parameters()])


@pytest.mark.parametrize("how", [how for how in zoo.Structuring.HOW if how != "nested"])  # whose object() is refused
def test_structured_outputs_inside(how: str, tmp_path: Path) -> None:
    """Tensors anywhere in an output, by their paths; the structure that flows on is the module's own."""
    if OLD and how == "namedtuple":
        pytest.skip("torch 2.11's compiler fails on tuple.__new__ of a named tuple")
    model = zoo.Structured(how)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not OLD)
    kinds: list[type] = []

    def run(x: torch.Tensor, call: Any = compiled) -> None:
        out = call(x)
        kinds.append(type(out))
        zoo.loss(out).backward()

    got = logged(tmp_path / "inside", model, run, steps=2, compiled="inside")
    assert_close(got, logged(tmp_path / "eager", twin, lambda x: run(x, twin), steps=2))
    assert len(set(kinds)) == 1
    assert OLD or not counters["graph_break"]


@pytest.mark.parametrize("kind", [zoo.Shared, zoo.Shortcut])
def test_calls_are_kept_apart_inside(kind: type[nn.Module], tmp_path: Path) -> None:
    """A shared module has a tag a call; micro-batches are merged; gradients of parameters are the same bits."""
    model = kind()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def twice(call: Any) -> Callable[[torch.Tensor], None]:
        return lambda x: [zoo.loss(call(each)).backward() for each in (x, x + 1)]

    got = logged(
        tmp_path / "inside", model, twice(compiled), steps=3, compiled="inside", kinds=Kind.all() & ~Kind.GRAD_INPUT
    )
    want = logged(tmp_path / "eager", twin, twice(twin), steps=3, kinds=Kind.all() & ~Kind.GRAD_INPUT)
    assert_close(got, want)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert counters["stats"]["unique_graphs"] == 1


def test_modes_and_tags_inside(net: nn.Module, tmp_path: Path) -> None:
    """Evaluation and tagged passes are logged apart, as in eager mode."""
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4)
    with Board(str(tmp_path)) as board, Probe(net, compiled="inside") as p:
        p.log(board, stats)
        compiled(x).sum().backward()
        with torch.no_grad():
            with p.tag("valid"):
                compiled(2 * x)
            net.eval()
            compiled(3 * x)
    for run, k in (("", 1), ("valid", 2), ("eval", 3)):
        ((_, norm),) = reading.scalars(tmp_path / run, "0/output/norm")
        assert norm == pytest.approx(float(net[0](k * x).detach().norm()), rel=1e-5)


@pytest.mark.parametrize("dead", [False, True])
def test_health_inside(dead: bool) -> None:
    """Passes of a training are known as such, though a compiled graph runs with gradients disabled."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    if dead:
        nn.init.constant_(model[1].bias, -100.0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Probe(model, optimizer=optimizer, observers=health.checks(), compiled="inside") as p:
        for _ in range(6):
            optimizer.zero_grad()
            nn.functional.cross_entropy(compiled(torch.randn(32, 8)), torch.randint(3, (32,))).backward()
            optimizer.step()
    assert [(each.check, each.layer) for each in p.findings][:1] == ([("dead units", "2")] if dead else [])


def test_observers_and_any_summary_inside(tmp_path: Path) -> None:
    """Observers and summaries get the tensors: pictures, one's own, functions bound to a site, inputs too."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    compiled, image = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(2, 3, 8, 8)
    seen: list[Capture] = []
    bound: list[tuple[str, torch.Tensor]] = []

    class Bound:
        def bind(self, site: Any) -> Any:
            return lambda tensor: bound.append((f"{site.name} {site.kind.label}", tensor.clone()))

    def largest(c: Capture) -> Iterator[Scalar]:
        yield Scalar("largest", c.value.max())

    with (
        Board(str(tmp_path)) as board,
        Probe(model, observers=[seen.append, Bound()], compiled="inside", kinds=Kind.INPUT | Kind.OUTPUT) as p,
    ):
        p.log(board, largest, feature_maps())
        compiled(image)
    wanted = model[0](image).detach()
    values = {f"{c.name} {c.kind.label}": c.value for c in seen}
    for found in (values, dict(bound)):
        assert list(found) == ["0 input", "0 output", "1 input", "1 output"]
        assert torch.equal(found["0 input"], image)
        assert torch.equal(found["0 output"], wanted)
        assert torch.equal(found["1 output"], wanted.relu())
    assert reading.scalars(tmp_path, "0/output/largest") == [(0, pytest.approx(float(wanted.max())))]
    assert reading.read(tmp_path).Tags()["images"] == ["0/output/feature_maps", "1/output/feature_maps"]


def test_errors_of_a_summary_inside(net: nn.Module, tmp_path: Path) -> None:
    """What a summary raises comes through the compiled graph, with the layer's name; the next pass is right."""
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)

    def bad(c: Capture) -> None:
        raise ZeroDivisionError("of the user")

    with Board(str(tmp_path)) as board, Probe(net, compiled="inside") as p:
        handle = p.log(board, bad)
        p.log(board, stats)
        with pytest.raises(ZeroDivisionError, match="of the user") as raised:
            compiled(torch.randn(3, 4))
        assert any("'0', output" in note for note in raised.value.__notes__)
        handle.remove()
        compiled(torch.randn(3, 4))
    assert reading.steps(tmp_path, "2/output/mean") == [0]


@pytest.mark.parametrize("how", ["itself", "twin"])
def test_nothing_captured_is_told_at_once(how: str, net: nn.Module, tmp_path: Path) -> None:
    """F11.1 compiled before the hooks, or a twin of the class was: told after the first step, with what to type."""
    x = torch.randn(3, 4)
    first = net if how == "itself" else copy.deepcopy(net)
    torch.compile(first, backend="eager")(x)
    compiled = torch.compile(net, backend="eager")
    with Board(str(tmp_path)) as board, Probe(net, compiled="inside") as p:
        p.log(board, stats)
        compiled(x)
        with pytest.warns(ProbeWarning, match=r"captured nothing in an observed step.*torch\.compiler\.reset\(\)"):
            p.step()
        compiled(x)
        p.step()
    torch.compiler.reset()
    with Board(str(tmp_path)) as board, Probe(net, compiled="inside") as p:
        p.log(board, stats)
        compiled(x)
    assert reading.steps(tmp_path, "0/output/mean") == [0]


def test_nothing_captured_is_told_on_leaving(net: nn.Module) -> None:
    """Also where no step ended inside the block, and at the line of the user's."""
    x = torch.randn(3, 4)
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    message = "captured nothing in an observed step"
    with pytest.warns(ProbeWarning, match=message) as told, Probe(net, compiled="inside", observers=repr):
        compiled(x)
    assert [each.filename for each in told] == [__file__]


def test_what_cannot_be_had_inside(net: nn.Module, tmp_path: Path) -> None:
    """Every such wish is refused by a sentence that says what to type."""
    for how, message in (
        ({"keep": 1}, "keep=1: values are not kept"),
        ({"kinds": Kind.all()}, "GRAD_INPUT"),
        ({"backward": "module"}, "backward='module'"),
        ({"copy_views": True}, "copy_views"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*leave compiled='inside' out"):
            Probe(net, compiled="inside", **how)
    with Board(str(tmp_path)) as board, Probe(net, "0", compiled="inside") as p:
        with pytest.raises(ValueError, match="GRAD_INPUT"):
            p.log(board, stats, kinds=Kind.GRAD_INPUT)
        with pytest.raises(RuntimeError, match=r"edit cannot change what flows inside.*compiled='auto'"):
            p.edit("0", lambda output: output)
        with pytest.raises(RuntimeError, match="stop_after cannot"):
            p.stop_after("0")
        p.log(board, stats)
        torch.compile(net, backend="eager")(torch.randn(3, 4))
        with pytest.raises(RuntimeError, match="layer '2' comes too late"):
            p.log(board, stats, layers="2")
        p.log(board, histogram)
        with pytest.raises(AttributeError, match="keeps no values"):
            p["0"].output  # noqa: B018


def test_nothing_is_left_of_a_probe_inside(net: nn.Module, tmp_path: Path) -> None:
    """After the block the model is what it was, and graphs that outlive it deliver nothing."""
    backend, x = Backend(), torch.randn(3, 4)
    compiled = torch.compile(net, backend=backend)
    before = zoo.fingerprint(net)
    seen: list[Capture] = []
    with Probe(net, observers=seen.append, compiled="inside"):
        out = compiled(x)
    count = len(seen)
    out.sum().backward()
    net.zero_grad()
    net.load_state_dict(net.state_dict())
    for parameter in net.parameters():
        parameter.grad = None
    assert zoo.fingerprint(net) == before
    assert torch.equal(compiled(x), net(x))
    assert len(seen) == count == 3


def test_uncompiled_and_partly_compiled_models_inside(net: nn.Module) -> None:
    """The hooks work in eager mode too, so that a graph break or a layer that is called alone loses nothing."""
    x = torch.randn(3, 4)
    for run in (
        net,
        lambda x: net[2](net[1](net[0](x))),
        torch.compile(lambda x: net[2](net[1](net[0](x))), backend="eager"),
    ):
        seen: list[str] = []
        with Probe(
            net, observers=lambda c, seen=seen: seen.append(f"{c.name} {c.kind.label} {c.call}"), compiled="inside"
        ):
            run(x).sum().backward()
        outputs = ["0 output 0", "1 output 0", "2 output 0"]
        assert seen == [*outputs, "2 grad_output 0", "1 grad_output 0", "0 grad_output 0"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_checkpoints_inside_the_graph(backend: str, tmp_path: Path) -> None:
    """Recomputation inside a compiled graph is neither counted nor logged twice."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(checkpoint(self.block, x, use_reentrant=False))

    model = Model()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    got = logged(tmp_path / "inside", model, lambda x: compiled(x).sum().backward(), steps=2, compiled="inside")
    assert_close(got, logged(tmp_path / "eager", twin, lambda x: twin(x).sum().backward(), steps=2))


def test_export_of_a_model_probed_inside(net: nn.Module) -> None:
    """F13.3 the exported program has none of the operators in it."""
    x = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Probe(net, observers=lambda c: None, compiled="inside"):
            program = torch.export.export(net, (x,))
    assert "probe" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), net(x))
