"""``python -m probe run``: a script does what it does without, bit for bit, and what it trains is on a board."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from probe import watch
from probe.__main__ import main
from probe.watched import alive
from tests.processes import fork, wait
from tests.reading import read

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "scripts"
PLAIN = ("fc1", "bn", "drop", "fc2")


class Run(NamedTuple):
    """What a script left: its words on both channels, its status, its weights, and the runs in the board's folder."""

    out: str
    err: str
    status: Any
    weights: dict[str, Any]
    board: Path


def equal(a: Any, b: Any) -> bool:
    """Whether nested values are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def weights(folder: Path) -> dict[str, Any]:
    return {path.name: torch.load(path) for path in folder.glob("*.pt")}


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Run]]:
    """Runs a script in this process, in a folder of its own: probed with the options of ``run``, bare with None."""
    count = 0

    def run(options: str | None, script: str | Path, *arguments: str) -> Run:
        nonlocal count
        count += 1
        folder = tmp_path / str(count)
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.setattr(sys, "path", ["", *sys.path])
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        if isinstance(script, str):
            Path("script.py").write_text(textwrap.dedent(script))
            script = folder / "script.py"
        torch.manual_seed(0)
        capsys.readouterr()
        status: Any = 0
        try:
            if options is None:
                runpy.run_path(str(script), run_name="__main__")
            else:
                main(["run", *options.split(), "--logdir", "board", str(script), *arguments])
        except BaseException as error:
            status = repr(error)
        out, err = capsys.readouterr()
        assert not torch.nn.modules.module._global_forward_pre_hooks
        assert not sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks
        return Run(out, err, status, weights(folder), folder / "board")

    yield run
    gc.collect()


def layers_of(run: Run, name: str) -> set[str]:
    """The layers whose outputs and gradients are on a model's board."""
    tags = read(run.board / name).Tags()["scalars"]
    outputs, gradients = (
        {found[1] for tag in tags if (found := re.fullmatch(rf"(.+)/{kind}(\[0\])?/mean", tag))}
        for kind in ("output", "grad_output")
    )
    assert outputs == gradients
    return outputs


def steps_of(run: Run, name: str, tag: str) -> list[int]:
    return [event.step for event in read(run.board / name).Scalars(tag)]


def told(run: Run) -> list[str]:
    """The lines that the command added to what the script says."""
    return [line for line in run.err.splitlines() if line.startswith("probe: ")]


# -- the same results, and a board -------------------------------------------------------------------------------------


def same(bare: Run, probed: Run) -> None:
    assert bare.out == probed.out
    assert bare.status == probed.status
    assert bare.weights
    assert equal(bare.weights, probed.weights)


def test_a_plain_loop(start: Callable[..., Run]) -> None:
    """With a DataLoader that forks; every layer, parameter and rate is on the board, at every fourth step from 0."""
    bare, probed = start(None, SCRIPTS / "plain.py"), start("--every 4", SCRIPTS / "plain.py")
    same(bare, probed)
    assert layers_of(probed, "net") == set(PLAIN)
    assert steps_of(probed, "net", "fc1/output/mean") == steps_of(probed, "net", "fc1/grad_output/mean") == [0, 4, 8]
    for tag in ("fc1.weight/value/mean", "bn.weight/grad/mean", "fc2.bias/update/mean", "lr/group0"):
        assert steps_of(probed, "net", tag) == [0, 4, 8]
    rows = [line.split() for line in probed.err.splitlines()]
    assert [row[:4] for row in rows if row and row[0] in PLAIN] == [
        ["fc1", "Linear", "16×16", "float32"],
        ["bn", "BatchNorm1d", "16×16", "float32"],
        ["drop", "Dropout", "16×16", "float32"],
        ["fc2", "Linear", "16×4", "float32"],
    ]
    assert told(probed)[0] == "probe: net (Net): 12 steps, 3 of them observed; below the last one, step 8"
    assert told(probed)[-1] == "probe: see it in TensorBoard:  python -m probe open board"


def test_a_module_and_its_trainer(start: Callable[..., Run]) -> None:
    """Gradients accumulated, two optimizers, an averaged copy, a transformer that evaluates on its fused path."""
    bare, probed = start(None, SCRIPTS / "trainer.py"), start("--every 5", SCRIPTS / "trainer.py")
    same(bare, probed)
    assert os.listdir(probed.board) == ["Module"]
    parts = ("self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2")
    inner = {f"encoder.layers.{i}.{part}" for i in range(2) for part in parts}
    assert layers_of(probed, "Module") == {"embed", "head", "loss", *inner}
    for tag in ("head/output/mean", "head.weight/update/mean", "embed.weight/update/mean"):
        assert steps_of(probed, "Module", tag) == [0, 5]


def test_a_gan(start: Callable[..., Run]) -> None:
    """Both models, by their variables' names, each with its own steps."""
    bare, probed = start(None, SCRIPTS / "gan.py"), start("--every 3", SCRIPTS / "gan.py")
    same(bare, probed)
    assert layers_of(probed, "netG") == set("01234")
    assert layers_of(probed, "netD") == set("0123")
    for name in ("netG", "netD"):
        assert steps_of(probed, name, "0.weight/update/mean") == [0, 3, 6, 9]


def test_pytorchs_example(start: Callable[..., Run]) -> None:
    """It parses its own arguments, evaluates, and saves."""
    arguments = ["--epochs", "2", "--log-interval", "3", "--save-model"]
    bare, probed = start(None, SCRIPTS / "mnist.py", *arguments), start("--every 5", SCRIPTS / "mnist.py", *arguments)
    same(bare, probed)
    assert layers_of(probed, "Net") == {"conv1", "conv2", "dropout1", "dropout2", "fc1", "fc2"}
    assert steps_of(probed, "Net", "conv1/output/std") == [0, 5, 10]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
RUN = [sys.executable, "-m", "probe", "run"]


def process(folder: Path, *command: str, environment: dict[str, str] = ENVIRONMENT) -> Run:
    """What a process leaves in a folder of its own."""
    folder.mkdir()
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    return Run(ran.stdout, ran.stderr, ran.returncode, weights(folder), folder / "board")


def test_workers_are_spawned(start: Callable[..., Run], tmp_path: Path) -> None:
    """A spawned worker imports the script again, as it would without."""
    bare = start(None, SCRIPTS / "plain.py", "fork", "1")
    script = [str(SCRIPTS / "plain.py"), "spawn", "1"]
    probed = process(tmp_path / "spawned", *RUN, "--every=4", "--logdir=board", *script)
    same(bare, probed)
    assert layers_of(probed, "net") == set(PLAIN)
    assert sum(line.startswith("probe: net") for line in told(probed)) == 1
    assert "Error" not in probed.err


def test_under_torchrun_one_rank_writes(tmp_path: Path) -> None:
    """Both ranks end with the weights of a bare run; there is one run, of rank 0."""
    (tmp_path / "bare").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def train(rank: int) -> None:
        os.chdir(tmp_path / "bare")
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
        os.environ.update(address)
        with open(f"out{rank}", "w") as out, contextlib.redirect_stdout(out):
            runpy.run_path(str(SCRIPTS / "ddp.py"), run_name="__main__")

    children = [fork(functools.partial(train, rank)) for rank in (0, 1)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--every", "4", "--logdir", "board"]
    probed = process(tmp_path / "probed", *launch, *RUN[1:], *options, str(SCRIPTS / "ddp.py"))
    assert [wait(child, 60) for child in children] == [0, 0]
    assert probed.status == 0, probed.err
    assert probed.out == (tmp_path / "bare" / "out0").read_text()
    assert set(probed.weights) == {"ddp0.pt", "ddp1.pt"}
    assert equal(weights(tmp_path / "bare"), probed.weights)
    assert layers_of(probed, "ToyModel/rank0") == {"net1", "relu", "net2"}
    assert steps_of(probed, "ToyModel/rank0", "net1/output/mean") == [0, 4]
    assert not list((probed.board / "ToyModel").glob("**/rank1"))
    assert len([line for line in told(probed) if "ToyModel" in line]) == 1


# -- the script is its own master --------------------------------------------------------------------------------------


def both(tmp_path: Path, script: str, *arguments: str) -> tuple[Run, Run]:
    """A script in its own process, bare and probed."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    return (
        process(tmp_path / "bare", sys.executable, str(path), *arguments),
        process(tmp_path / "probed", *RUN, "--every=2", str(path), *arguments),
    )


def test_a_script_without_torch_is_left_alone(tmp_path: Path) -> None:
    """It sees its own arguments, path and main module; torch is not imported; a line says why there is no board."""
    script = """
        import sys, threading
        main = sys.modules["__main__"]
        print(sys.argv, __name__, __file__, __spec__, __package__, sys.path[0], main.__dict__ is globals())
        print("torch" in sys.modules, "numpy" in sys.modules, threading.active_count(), sorted(globals()))
        sys.stderr.write("mine\\n")
        sys.exit(3)
    """
    bare, probed = both(tmp_path, script, "--every", "7", "-m", "x")
    assert (bare.out, bare.status) == (probed.out, probed.status) == (bare.out, 3)
    assert probed.err == bare.err + "probe: the script did not import torch: there was nothing to probe\n"
    assert os.listdir(tmp_path / "probed") == []


def test_garbage_is_collected_as_before(tmp_path: Path) -> None:
    script = """
        import gc, weakref, torch
        class Node: pass
        node = Node()
        node.itself, seen = node, weakref.ref(node)
        print(any(each is node for each in gc.get_objects()), gc.isenabled(), gc.get_threshold(), gc.get_freeze_count())
        del node
        gc.collect()
        print(seen())
    """
    bare, probed = both(tmp_path, script)
    assert bare.out == probed.out


@pytest.mark.parametrize(
    ("ending", "status"),
    [("1 / 0", 1), ("sys.exit('bye')", 1), ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT), ("def f(:", 1)],
)
def test_the_end_of_a_script_is_its_own(tmp_path: Path, ending: str, status: int) -> None:
    """Status, traceback and message; no frame of this package in it."""
    bare, probed = both(tmp_path, f"import os, signal, sys\nprint('one')\n{ending}\n")
    assert (probed.out, probed.status) == (bare.out, bare.status) == (bare.out, status)
    lines = [line for line in probed.err.splitlines() if not line.startswith("probe: ")]
    assert lines == bare.err.splitlines()


def test_a_script_has_its_own_excepthook(tmp_path: Path) -> None:
    """It is called with the traceback as it would be without."""
    script = """
        import sys, traceback
        def hook(kind, error, trace):
            print([frame.name for frame in traceback.extract_tb(trace)], error.__traceback__ is trace)
        sys.excepthook = hook
        def fail():
            raise ValueError
        fail()
    """
    bare, probed = both(tmp_path, script)
    assert probed.out == bare.out == "['<module>', 'fail'] True\n"
    assert probed.status == bare.status == 1


def test_a_module_is_run_as_one(tmp_path: Path) -> None:
    """``-m`` takes a module or a package, whose arguments follow; one that is not there ends as Python does."""
    folder = tmp_path / "pkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "__main__.py").write_text(
        "import sys; print(sys.argv, __spec__.name, __package__, __file__, sys.path[0] == sys.argv[1])"
    )
    results = []
    for command in ([], ["probe", "run", "--every", "3", "-m"]):
        words = [sys.executable, "-m", *command, "pkg", str(tmp_path), "--every", "5"]
        results.append(subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True))
    assert results[0].stdout == results[1].stdout
    assert results[0].returncode == results[1].returncode == 0
    words = [sys.executable, "-m", "probe", "run", "-m", "nothing.here"]
    missing = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert missing.returncode == 1
    assert "nothing.here" in missing.stderr
    assert missing.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "name a script"),
        (["run", "nothing.py"], "can't open file"),
        (["run", "."], "-m"),
        (["run", "--every", "0", "script.py"], "1 or more"),
        (["run", "--kinds", "output,weights", "script.py"], "grad_output"),
        (["run", "--logdir", f"{__file__}/board", __file__], "--logdir"),
    ],
)
def test_what_cannot_be_run_is_told(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With status 2, before anything runs."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


# -- what is found -----------------------------------------------------------------------------------------------------

HEAD = """
import copy
import torch
from torch import nn
def mlp(i=4, o=2):
    return nn.Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, o))
def train(model, steps, optimizer=None, call=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (call or model)(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
"""


def test_ctrl_c_leaves_what_was_seen(start: Callable[..., Run]) -> None:
    """The step that was open is written too."""
    script = """
import os, signal
model = mlp()
optimizer = torch.optim.Adam(model.parameters())
for step in range(100):
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    if step == 10:
        os.kill(os.getpid(), signal.SIGINT)
    optimizer.step()
"""
    run = start("--every 5", HEAD + script)
    assert run.status == "KeyboardInterrupt()"
    assert steps_of(run, "model", "0/output/mean") == steps_of(run, "model", "0/grad_output/mean") == [0, 5, 10]
    assert steps_of(run, "model", "0.weight/update/mean") == [0, 5]


def found(run: Run) -> dict[str, str]:
    """The models by name, with what is said of their steps."""
    return dict(
        line.removeprefix("probe: ").split(": ", 1) for line in told(run) if " step" in line and "below" in line
    )


@pytest.mark.parametrize(
    ("script", "models"),
    [
        ("for fold in range(3):\n    net = mlp()\n    train(net, 12)", {"net": 12, "net#2": 11, "net#3": 11}),
        ("a, b = mlp(), nn.Linear(4, 4)\ntrain(nn.Sequential(b, a), 6)", {"Sequential": 6}),
        ("net = mlp()\nnet(torch.ones(1, 4))\ntrain(net, 7)\ntrain(net, 7)", {"net": 14}),
        ("net = nn.DataParallel(mlp())\ntrain(net, 6)", {"net": 6}),
        ("whole = nn.ModuleDict({'a': mlp()})\ntrain(whole, 6, call=whole['a'])", {"whole.a": 6}),
        (
            "net = mlp()\nema = copy.deepcopy(net)\nfor _ in range(3):\n    train(net, 4)\n    with torch.no_grad():\n"
            "        ema(torch.ones(1, 4)), net(torch.ones(1, 4))",
            {"net": 12},
        ),
        (
            "class Loss(nn.Module):\n    def forward(self, model, x):\n        return model(x)\n"
            "net, loss = mlp(), Loss()\ntrain(net, 6, call=lambda x: loss(net, x))",
            {"net": 6},
        ),
        (
            "net = nn.LSTMCell(4, 4)\ndef call(x):\n    h = (x, x)\n    for _ in range(3):\n        h = net(x, h)\n"
            "    return h[0]\ntrain(net, 6, call=call)",
            {"net": 6},
        ),
        (
            "net = mlp()\nfirst = torch.optim.SGD([p for p in net.parameters() if p.dim() > 1], lr=0.1)\n"
            "second = torch.optim.Adam([p for p in net.parameters() if p.dim() < 2])\nfor _ in range(6):\n"
            "    net(torch.ones(1, 4)).sum().backward()\n    first.step(), second.step()",
            {"net": 6},
        ),
        (
            "net = mlp()\noptimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)\nfor _ in range(6):\n"
            "    def closure():\n        optimizer.zero_grad()\n        loss = net(torch.ones(2, 4)).square().sum()\n"
            "        loss.backward()\n        return loss\n    optimizer.step(closure)",
            {"net": 5},
        ),
        (
            "net = mlp()\nfor _ in range(80):\n    net(torch.ones(1, 4)).sum().backward()\n    with torch.no_grad():\n"
            "        [p.sub_(0.1 * p.grad) for p in net.parameters()]",
            {"net": 79},
        ),
    ],
    ids=["folds", "container", "twice", "wrapper", "part", "average", "loss", "cell", "two", "closure", "by hand"],
)
def test_whatever_trains_is_found(start: Callable[..., Run], script: str, models: dict[str, int]) -> None:
    """By its variable, else its class; with as many steps as its optimizer made while it was known."""
    run = start("--every 5 --no-findings", HEAD + script)
    assert run.status == 0
    shown = {name.split(" (Seq")[0].split(" (LSTM")[0]: int(text.split()[0]) for name, text in found(run).items()}
    assert shown == models
    for name in models:
        assert steps_of(run, name, outputs(run, name)[0])[0] == 0


def outputs(run: Run, name: str) -> list[str]:
    return sorted(tag for tag in read(run.board / name).Tags()["scalars"] if "/output" in tag and tag.endswith("/mean"))


@pytest.mark.parametrize("how", ["torch.compile(net, backend='eager', fullgraph=True)", "net", "torch.compile(call)"])
def test_a_compiled_model_runs_as_compiled(start: Callable[..., Run], how: str) -> None:
    """It, a model compiled in place, and one in a compiled function: parameters are logged, the graph is left alone.

    Nor is there a warning more, which a script may have made an error.
    """
    script = (
        "import warnings\nwarnings.simplefilter('error')\n"
        "net = mlp()\ncall = lambda x: net(x)\nstate = [0]\n"
        "def backend(graph, inputs):\n    state[0] += 1\n    return graph.forward\n"
        "if HOW == 'net': net.compile(backend=backend, fullgraph=True); call = net\n"
        "elif 'call' in HOW: call = torch.compile(call, backend=backend, fullgraph=True)\n"
        "else: call = torch.compile(net, backend=backend, fullgraph=True)\n"
        "train(net, 11, call=call)\nprint(state)\ntorch.save(net.state_dict(), 'net.pt')"
    )
    torch._dynamo.reset()
    bare = start(None, f"{HEAD}HOW = {how!r}\n{script}")
    torch._dynamo.reset()
    probed = start("--every 5", f"{HEAD}HOW = {how!r}\n{script}")
    torch._dynamo.reset()
    assert equal(bare.weights, probed.weights)
    assert bare.weights
    assert steps_of(probed, "net", "0.weight/update/mean") == [0, 5, 10]
    assert "only its parameters are logged" in probed.err
    if "(net" in how:
        assert bare.out == probed.out  # in the other cases it is compiled once more when the hook on all calls goes


def test_gradients_are_shown_without_a_scalers_scale(start: Callable[..., Run]) -> None:
    """As with ``Probe(scaler=...)``; of a model that no scaler steps they are as they are."""
    script = """
scaler, SCALED = torch.amp.GradScaler("cpu", init_scale=1024.0), {scaled}
torch.manual_seed(1)
net = mlp()
optimizer = torch.optim.SGD(net.parameters(), 0.01)
for _ in range(6):
    optimizer.zero_grad()
    loss = net(torch.randn(8, 4)).square().mean()
    (scaler.scale(loss) if SCALED else loss).backward()
    (scaler.step(optimizer), scaler.update()) if SCALED else optimizer.step()
"""
    runs = [start("--every 2", HEAD + script.format(scaled=scaled)) for scaled in (True, False)]
    norms = [
        {each.step: each.value for each in read(run.board / "net").Scalars(tag)}
        for tag in ("0/grad_output/norm", "0.weight/grad/norm")
        for run in runs
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[2] == pytest.approx(norms[3], rel=1e-6)
    assert list(norms[0]) == [0, 2, 4]


def test_models_that_are_done_with_are_let_go(start: Callable[..., Run]) -> None:
    """A cross-validation's models do not pile up."""
    script = """
import gc, weakref
gone = []
for fold in range(4):
    net = mlp()
    gone.append(weakref.ref(net))
    train(net, 6)
gc.collect()
print([each() is None for each in gone])
"""
    assert start("--every 2", HEAD + script).out == "[True, True, True, False]\n"


def test_what_fails_inside_is_no_trouble_of_the_scripts(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is given up with a note, the training goes on to the same end."""
    script = "torch.manual_seed(1)\nnet = mlp()\ntrain(net, 9)\ntorch.save(net.state_dict(), 'net.pt')"
    bare = start(None, HEAD + script)

    def broken(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken on purpose")

    for name in ("taker", "before_step", "end_step"):
        with monkeypatch.context() as patch:
            patch.setattr("probe.log.Log." + name, broken)
            probed = start("--every 2 --no-findings", HEAD + script)
        assert equal(bare.weights, probed.weights)
        assert probed.status == 0, probed.err
        assert "not probed any more after RuntimeError: broken on purpose" in probed.err


def test_a_forked_child_is_not_probed(start: Callable[..., Run]) -> None:
    """It trains on; the board and the report are the parent's."""
    script = """
import os, sys
net = mlp()
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
train(net, 3, optimizer)
child = os.fork()
train(net, 9, optimizer)
if child == 0:
    os._exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = start("--every 2", HEAD + script)
    assert run.out == "5\n"
    assert len(list((run.board / "net").iterdir())) == 1
    assert steps_of(run, "net", "0/output/mean") == [0, 2, 4, 6, 8, 10]


def test_threads_that_make_tuples_are_not_disturbed_by_a_look_at_all_objects() -> None:
    """A tuple that grows must have no second owner."""
    tuples: list[int] = []
    errors: list[BaseException] = []
    over = threading.Event()

    def make() -> None:
        try:
            while not over.is_set():
                tuples.append(len(tuple(i for i in range(2000))))
        except SystemError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    many: list[Any] = [[] for _ in range(100_000)]  # so that a look takes a while
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        found = [alive(torch.nn.Module) for _ in range(20)]
    finally:
        sys.setswitchinterval(usual)
        over.set()
        thread.join()
    assert set(tuples) == {2000}
    assert not errors, len(many)
    assert all(any(each is part for each in found[0]) for part in (model, model[0]))
    assert not any(isinstance(each, torch.optim.Optimizer) for each in found[0])


def test_threads_train_models_of_their_own(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Found at the same time they have two names, and two folders."""
    together = threading.Barrier(2, timeout=0.3)

    class Meeting(watch.Model):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait()
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(watch, "Model", Meeting)
    script = """
import threading
models = [mlp(), mlp()]
threads = [threading.Thread(target=train, args=(model, 6)) for model in models]
for each in threads:
    each.start()
for each in threads:
    each.join()
"""
    run = start("--every 2", HEAD + script)
    assert found(run).keys() == {"Sequential", "Sequential#2"}, run.err
    for name in ("Sequential", "Sequential#2"):
        assert layers_of(run, name) == {"0", "1", "2"}


def test_a_models_own_attributes_are_not_asked_for(start: Callable[..., Run]) -> None:
    """A module may tell of what it does not have."""
    script = """
class Net(nn.Sequential):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            print(name)
            raise
net = Net(nn.Linear(4, 8), nn.ReLU())
train(net, 4)
"""
    bare, probed = start(None, HEAD + script), start("--every 2", HEAD + script)
    assert bare.out == probed.out
    assert found(probed).keys() == {"net (Net)"}


def test_options_choose(start: Callable[..., Run]) -> None:
    """Layers, kinds, and the last step."""
    run = start(
        "--every 2 --layers 0 --layers 2 --kinds input,update --until-step 5", f"{HEAD}net = mlp()\ntrain(net, 12)"
    )
    tags = read(run.board / "net").Tags()["histograms"]
    names = {tag.split("/")[0] for tag in tags}
    assert {tag.split("/")[1] for tag in tags} == {"input", "update"}
    assert names == {"0", "2", "0.weight", "0.bias", "2.weight", "2.bias"}
    assert steps_of(run, "net", "0/input/mean") == [0, 2, 4]
    other = start("--layers nothing", f"{HEAD}net = mlp()\ntrain(net, 3)")
    assert "no layer matches 'nothing'" in other.err


def test_findings_are_told(start: Callable[..., Run]) -> None:
    """What is wrong is named at the end, and on the board; not with ``--no-findings``."""
    script = "net = mlp()\nwith torch.no_grad():\n    net[0].bias.fill_(-100.0)\ntrain(net, 12)"
    run = start("--every 1", HEAD + script)
    assert "dead" in run.err
    assert "meaning:" in run.err
    assert any(tag.startswith("health/") for tag in read(run.board / "net").Tags()["scalars"])
    assert "meaning:" not in start("--every 1 --no-findings", HEAD + script).err


def test_a_model_that_is_not_trained_is_told_briefly(start: Callable[..., Run]) -> None:
    """Beside one that is: without its table. By itself it has one."""
    script = "other = mlp()\nfor _ in range(3):\n    other(torch.ones(2, 4)).sum().backward()\n"
    alone, beside = start("", HEAD + script), start("", HEAD + script + "net = mlp()\ntrain(net, 6)")
    rows = [[line for line in run.err.splitlines() if "Linear" in line] for run in (alone, beside)]
    assert [len(each) for each in rows] == [2, 2]
    assert "probe: other (Sequential): 2 steps, 1 of them observed" in told(beside)


def test_parts_called_while_the_model_is_being_built_are_no_models_of_their_own(start: Callable[..., Run]) -> None:
    """As a script does to learn what shape a part gives, and torch as it puts a parametrization on."""
    script = """
from torch.nn.utils.parametrizations import spectral_norm
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.head = spectral_norm(nn.Linear(self.body(torch.zeros(1, 4)).shape[1], 3))
    def forward(self, x):
        return self.head(self.body(x))
net = Net()
train(net, 4)
"""
    run = start("--every 2", HEAD + script)
    assert list(found(run)) == ["net (Net)"]
    assert os.listdir(run.board) == ["net"]
    assert layers_of(run, "net") >= {"body.0", "body.1", "head"}


def test_the_options_know_every_kind() -> None:
    """Those of modules and those of parameters, which the parser can't import."""
    from probe import run, watched

    assert set(run.KINDS) == set(watched.KINDS)
    assert set(run.USUAL) < set(run.KINDS)


def test_nothing_trained_is_told(start: Callable[..., Run]) -> None:
    """Where torch is imported and no model is called."""
    assert told(start("", "import torch\nprint(torch.ones(2))")) == [
        "probe: no model was trained in this process (its child processes are not probed)"
    ]


def test_hooks_are_gone_between_observed_steps(start: Callable[..., Run]) -> None:
    """No module has a hook and there is none on all calls; a copy or a pickle is what it would be without."""
    script = """
net = mlp()
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
for step in range(9):
    train(net, 1, optimizer)
    hooks = [len(d) for m in net.modules() for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    print(step, sum(hooks), len(torch.nn.modules.module._global_forward_pre_hooks))
"""
    lines = [line.split() for line in start("--every 4", HEAD + script).out.splitlines()]
    assert all(hooks == "0" for _, hooks, _ in lines)
    assert [int(step) for step, _, everywhere in lines if everywhere == "0"] == [1, 2, 4, 5, 6, 8]
