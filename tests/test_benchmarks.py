"""The benchmarks: what they count is right and does not grow, what goes wrong is told, the report is what is kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from benchmarks import apart, cam, command, counts, libraries, limits, overhead, peers, report, scaling, timing
from benchmarks.arms import ARMS, Arm
from benchmarks.work import Work
from probe import Probe

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]


def layered() -> tuple[nn.Module, torch.Tensor]:
    """Forty layers that are called once each."""
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(40)]), torch.randn(4, 8)


def inplace() -> tuple[nn.Module, torch.Tensor]:
    """A model two of whose outputs are overwritten, and one of whose layers is called twice."""
    relu = nn.ReLU(inplace=True)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers), torch.randn(2, 3, 8, 8)


def broken() -> Any:
    """A model's function that forgot its inputs."""
    return layered()[0]


def unparameterized() -> Any:
    """Nothing to train."""
    return nn.ReLU(), torch.randn(2, 3)


def unreadable() -> Any:
    """Raises what a wrong call would."""
    return len(3)  # type: ignore[arg-type]


def untrainable() -> Any:
    """Frozen."""
    return nn.Linear(3, 3).requires_grad_(False), torch.randn(2, 3)


@pytest.fixture(autouse=True)
def _no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands bound the memory of their process, which here is the tests'."""
    monkeypatch.setattr(command, "_bound_memory", lambda: None)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int | None], Row]:
    """What ``benchmarks.overhead`` keeps of forty layers in training, in its quickest setting."""
    out = tmp_path_factory.mktemp("benchmarks") / "overhead.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_bound_memory", lambda: None)
        words = ["--quick", "--seconds", "0.001", "--every", "1,3", "--model", f"{__name__}:layered"]
        overhead.main([*words, "--threads", str(torch.get_num_threads()), "--device", "cpu", "--out", str(out)])
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert kept["complete"]
    assert kept["settings"]["calls"] == 40
    return {(row["arm"], row["every"]): row for row in kept["rows"] if row["against"] == "bare"}


# -- the guard: what can be counted does not grow ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "most"),
    [
        ("empty hook", 4),
        ("reference", 5),
        ("output", 5),
        ("input", 15),
        ("grad_output", 18),
        ("grad_input", 37),
        ("all but grad_input", 30),
        ("all four", 52),
    ],
)
def test_python_calls_a_hooked_call(rows: dict[tuple[str, int | None], Row], arm: str, most: float) -> None:
    """How many Python functions one hooked call runs, forward and backward together, does not grow."""
    assert 0 < rows[arm, None]["python_calls"] / 40 <= most


@pytest.mark.parametrize(("arm", "least"), [("reference", 40), ("output", 40), ("input", 40), ("all four", 80)])
def test_hooks_attached(rows: dict[tuple[str, int | None], Row], arm: str, least: int) -> None:
    """A hook or two a layer, and two on the root of a probe's model."""
    assert least <= rows[arm, None]["hooks"] <= 2 * 40 + 2


@pytest.mark.parametrize("arm", ["output", "input", "grad_output", "grad_input", "all four"])
def test_captures_cross_to_no_host_and_copy_nothing(rows: dict[tuple[str, int | None], Row], arm: str) -> None:
    """No capture is a transfer, and where nothing is overwritten none takes memory beyond what it keeps alive."""
    assert rows[arm, None]["transfers"] == 0
    assert rows[arm, None]["allocations"] == 0
    kinds = 2 if arm == "all four" else 1
    assert rows[arm, None]["held"] <= kinds * rows["clone", None]["held"]


@pytest.mark.parametrize("arm", ["stats", "stats+histogram", "full log"])
def test_one_transfer_an_observed_step_and_nothing_in_between(
    rows: dict[tuple[str, int | None], Row], arm: str
) -> None:
    """Everything of an observed step crosses at once; in a step that is not observed no layer has a hook."""
    assert rows[arm, 1]["transfers"] == 1
    between = rows[arm, 3]
    assert (between["hooks"], between["transfers"], between["allocations"], between["held"]) == (0, 0, 0, 0)
    assert between["python_calls"] <= 60  # of the whole step: a few a step, none a layer


def test_nothing_is_left_after_a_probe(rows: dict[tuple[str, int | None], Row]) -> None:
    """Once a probe has left, a step does what it did before."""
    left = rows["after a probe", None]
    assert [left[key] for key in counts.Counts._fields] == [0] * len(counts.Counts._fields)


def test_every_arm_was_measured(rows: dict[tuple[str, int | None], Row]) -> None:
    """No arm that makes sense in training failed."""
    assert {arm for arm, _ in rows} == {arm.name for arm in ARMS if "train" in arm.modes and not arm.compiled}
    assert all("failed" not in row and row["ratio"]["median"] > 0 for row in rows.values())


# -- counting ----------------------------------------------------------------------------------------------------------


def test_counted_transfers_are_those_that_a_device_would_see() -> None:
    """``.item()``, ``.cpu()``, ``.to("cpu")``, ``if tensor`` are counted; moving to where a tensor is, is not."""
    x = torch.ones(3)

    def run() -> None:
        x.sum().item()
        x.cpu()
        x.to("cpu")
        assert x.sum() > 0
        x.to(x.device).add(1).float()

    assert counts.count(nn.Identity(), run, "cpu").transfers == 4


def test_counted_memory_is_what_was_allocated() -> None:
    """Held, peak and allocations, to the byte; what was there before and is freed in the step does not count."""
    before = [torch.ones(5000)]
    kept: list[torch.Tensor] = []

    def run() -> None:
        before.clear()
        passing = torch.ones(1000)
        kept.append(torch.ones(100))
        del passing

    found = counts.count(nn.Identity(), run, "cpu")
    assert (found.allocations, found.held, found.peak) == (2, 400, 4400)


def test_python_calls_are_counted_and_the_profiler_is_put_back() -> None:
    """Exactly the calls of Python functions; whoever profiles goes on to."""

    def inner() -> None:
        len("builtin functions do not count")

    def run() -> None:
        inner()
        inner()

    before = sys.getprofile()
    assert counts.python_calls(run) == 3
    assert sys.getprofile() is before


def test_a_twin_does_the_same_work() -> None:
    """With an optimizer that is set as the first one, and without hooks: else a ratio compares two things."""
    model = nn.Linear(2, 2)
    work = Work(model, torch.ones(1, 2), torch.optim.SGD(model.parameters(), lr=1e-6, nesterov=True, momentum=0.5))
    twin = work.twin()
    assert twin.optimizer is not None
    assert twin.optimizer.defaults == work.optimizer.defaults  # type: ignore[union-attr]
    assert twin.optimizer.param_groups[0]["params"] == list(twin.model.parameters())
    for each in (work, twin):
        each.step()
    assert torch.equal(model.weight, twin.model.weight)
    with Probe(model), pytest.raises(ValueError, match="before hooks are put on it"):
        work.twin()


# -- timing ------------------------------------------------------------------------------------------------------------


def test_compare_is_the_median_of_interleaved_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: the ratio, its quartiles, what a run takes beyond; strictly in turn."""
    clock = [0.0]
    order: list[str] = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def taking(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock[0] += seconds

        return run

    ratio = timing.compare(taking("a", 0.03), taking("b", 0.02), seconds=0.5, least=4)
    assert ratio.median == pytest.approx(1.5)
    assert (ratio.low, ratio.high, ratio.beyond) == pytest.approx((1.5, 1.5, 0.01))
    assert ratio.differs
    assert "".join(order[-8:]) == "abababab"
    assert not timing.Ratio(1.1, 0.9, 1.2, 9).differs


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "words", "expected"),
    [
        (overhead.main, ["--model", "lenet"], "there are gpt, mlp200, resnet18"),
        (overhead.main, ["--model", "no.such:model"], "No module named 'no'"),
        (overhead.main, ["--model", f"{__name__}:absent"], "has no attribute 'absent'"),
        (overhead.main, ["--model", f"{__name__}:broken"], r"must return \(model, inputs\), not Sequential"),
        (overhead.main, ["--model", f"{__name__}:layered", "--batch", "3"], "unexpected keyword argument 'batch'"),
        (overhead.main, ["--arms", "nothing"], "in mode train without --compile there are bare, empty hook"),
        (overhead.main, ["--arms", "output,ouput"], "'ouput' is no arm here"),
        (overhead.main, ["--model", "gpt", "--size", "513"], "positions for 512 tokens at most"),
        (overhead.main, ["--model", f"{__name__}:unparameterized"], "no parameters; there is --mode forward"),
        (overhead.main, ["--every", "0"], "whole numbers of at least 1"),
        (overhead.main, ["--out", "/no/such/folder/file.json"], "there is no folder /no/such/folder"),
        (overhead.main, ["--out", "/"], "that is a folder; give a file"),
        (peers.main, ["--peers", "tensorflow"], "no 'tensorflow' here; there are probe"),
        (peers.main, ["--models", "lenet"], "no 'lenet' here; there are resnet18, gpt"),
        (cam.main, ["--models", "lenet"], "no 'lenet' here; there are resnet18, alexnet"),
    ],
)
def test_what_cannot_be_had_is_said(main: Callable[[list[str]], None], words: list[str], expected: str) -> None:
    """One line that says what was asked, and what there is."""
    with pytest.raises(SystemExit, match=expected):
        main(words)


@pytest.mark.parametrize(
    ("main", "words", "expected"),
    [
        (overhead.main, ["--batch", "0"], "argument --batch: 0 is less than 1"),
        (overhead.main, ["--seconds", "0"], "argument --seconds: 0 is no time to measure for"),
        (overhead.main, ["--seconds", "inf"], "argument --seconds: inf is no time to measure for"),
        (peers.main, ["--limit", "-1"], "argument --limit: -1 is no time to measure for"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    main: Callable[[list[str]], None], words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the option's name."""
    with pytest.raises(SystemExit):
        main(words)
    assert expected in capsys.readouterr().err


def test_no_permission_is_said_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(SystemExit, match="no permission to write there"):
        limits.main(["--device", "cpu", "--out", str(tmp_path / "kept.json")])


@pytest.mark.parametrize(
    ("function", "mode", "error", "expected"),
    [
        ("unreadable", "forward", TypeError, "object of type 'int' has no len"),
        ("untrainable", "train", ValueError, "no tensor that a gradient goes through"),
    ],
)
def test_what_a_model_raises_is_its_own(function: str, mode: str, error: type[Exception], expected: str) -> None:
    """With its traceback, which a line of ours would hide, and a note of where it comes from."""
    with pytest.raises(error, match=expected) as raised:
        overhead.main(["--device", "cpu", "--mode", mode, "--model", f"{__name__}:{function}"])
    assert raised.value.__notes__ == [
        f"--model {__name__}:{function}, --mode {mode}: raised before anything was measured"
    ]


def test_a_model_without_parameters_has_its_inputs_device() -> None:
    assert Work(*unparameterized()).device == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said() -> None:
    """So is a device that is not there."""
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        limits.main(["--device", "cuda"])


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows before it are in the file, which says that it is not complete."""
    out = tmp_path / "kept.json"
    attach = ARMS[0].attach

    def interrupted(work: Work, every: int) -> Any:
        raise KeyboardInterrupt

    arms = (Arm("first", "", attach), Arm("second", "", interrupted), Arm("third", "", attach))
    monkeypatch.setattr(overhead, "ARMS", (*arms, *ARMS[:1]))
    words = ["--quick", "--seconds", "0.001", "--mode", "forward", "--arms", "first,second,third"]
    with pytest.raises(SystemExit) as stopped:
        overhead.main([*words, "--model", f"{__name__}:layered", "--device", "cpu", "--out", str(out)])
    assert stopped.value.code == 130
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert [row["arm"] for row in kept["rows"]] == ["first"]
    assert not kept["complete"]
    assert "the 1 rows above" in capsys.readouterr().err


def test_ctrl_c_before_the_first_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line and the status of an interrupted command; results that were kept before are not lost."""
    out = tmp_path / "kept.json"
    out.write_text("of a whole night")

    def main() -> None:
        with command.Results("limits", command.arguments("").parse_args(["--device", "cpu", "--out", str(out)])):
            raise KeyboardInterrupt

    def early() -> None:
        raise KeyboardInterrupt

    for each in (main, early):
        with pytest.raises(SystemExit) as stopped:
            command.run(each)
        assert stopped.value.code == 130
        assert "interrupted" in capsys.readouterr().err
    assert out.read_text() == "of a whole night"


def test_too_little_memory_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm that runs out of memory is told, and the next ones are measured."""
    out = tmp_path / "kept.json"

    def greedy(work: Work, every: int) -> Any:
        torch.empty(1 << 60)

    monkeypatch.setattr(overhead, "ARMS", (Arm("greedy", "", greedy), *ARMS[:1]))
    words = ["--quick", "--seconds", "0.001", "--mode", "forward", "--device", "cpu", "--out", str(out)]
    overhead.main([*words, "--model", f"{__name__}:layered"])
    first, second = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert first["failed"].startswith("greedy: too little memory; take a smaller --batch")
    assert second["ratio"]["pairs"] >= 2


# -- peers -------------------------------------------------------------------------------------------------------------


def _right(adapter: libraries.Adapter, work: Work) -> int:
    with adapter(work.twin()) as job:
        job.run()
        values = job.values()
    truth = libraries.true_outputs(work)
    return sum(key in values and peers._same("outputs", values[key], each) for key, each in truth.items())


def test_true_values_are_told_from_overwritten_ones() -> None:
    """References are wrong where an in-place operation follows, and probe's captures are not."""
    model, x = inplace()
    work = Work(model.eval(), x)
    assert len(libraries.true_outputs(work)) == 7
    assert _right(libraries.by_hand, work) == 5
    assert _right(libraries.probe_attached, work) == _right(libraries.probe_anew, work) == 7
    assert _right(libraries.torchvision_extractor, work) < 7


@pytest.mark.parametrize("adapter", [libraries.probe_log, libraries.summary_writer])
def test_true_histograms(adapter: libraries.Adapter) -> None:
    """What TensorBoard reads back agrees with the parameters and gradients of that step."""
    model, x = inplace()
    work = Work(model, x, torch.optim.SGD(model.parameters(), lr=0.1))
    with adapter(work.twin()) as job:
        job.run()
        values = job.values()
    truth = libraries.true_histograms(work.twin())
    assert len(truth) == 2 * len(list(model.parameters()))
    assert all(peers._same("histograms", values[key], each) for key, each in truth.items())
    wrong = {key: (count + 1, low, high) for key, (count, low, high) in truth.items()}
    assert not any(peers._same("histograms", values[key], each) for key, each in wrong.items())


def test_wandb_names_of_the_second_model_of_a_process() -> None:
    """What it puts before each of them is no part of the name, and no reason to call a value wrong."""
    first = {("0.weight", "value"): 1, ("10.weight", "grad"): 2}
    second = {("graph_10.weight", "value"): 1, ("graph_110.weight", "grad"): 2}
    assert libraries._of_wandb(first, "0.weight") == libraries._of_wandb(second, "0.weight") == first
    assert libraries._of_wandb({}, "0.weight") == {}


def test_every_peer_can_be_asked_for() -> None:
    """Names are separated by commas, so that none has one."""
    assert not any("," in peer.name for peer in peers.PEERS)


def test_a_missing_peer_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to install, also where a folder of its name could be imported."""
    out = tmp_path / "kept.json"
    (tmp_path / "absent").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers, "PEERS", (peers.Peer("absent", "outputs", libraries.by_hand, "absent"),))
    peers.main(["--quick", "--out", str(out)])
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["failed"] == "not installed: pip install absent"


def test_nothing_to_measure_is_said() -> None:
    """A library that runs on no model that was asked for."""
    with pytest.raises(SystemExit, match="of TransformerLens none has a way to do outputs on resnet18"):
        peers.main(["--peers", "TransformerLens", "--quick"])


WORKER = """
import json, os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
from benchmarks import apart

def measure(task):
    print("a library that talks")
    os.system("echo and its child")
    if task == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "ends":
        sys.exit("out of luck")
    if task == "hangs":
        time.sleep(60)
    if task == "is greedy":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    return {{"did": 1 / task}}

apart.answer(measure, json.loads(sys.argv[-1])["tasks"])
"""


@pytest.fixture
def _worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `worker` that answers tasks."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT)))


@pytest.mark.usefixtures("_worker")
def test_a_library_that_dies_or_raises_is_a_row() -> None:
    """Each with its reason; the tasks before and after it have their rows."""
    assert list(apart.rows("worker", [1, "is greedy", "dies", 2, 0, "ends", 4], 60.0)) == [
        {"did": 1.0},
        {"failed": "too little memory: RuntimeError: DefaultCPUAllocator: can't allocate memory"},
        {"failed": "its process was ended by SIGKILL (too little memory?)"},
        {"did": 0.5},
        {"failed": "ZeroDivisionError: division by zero"},
        {"failed": "out of luck"},
        {"did": 0.25},
    ]


@pytest.mark.usefixtures("_worker")
def test_a_library_that_hangs_is_a_row() -> None:
    """It is ended when its time is over."""
    assert list(apart.rows("worker", ["hangs"], 0.3)) == [{"failed": "took longer than 0.3 s"}]


# -- class activation maps ---------------------------------------------------------------------------------------------

SMALL = cam.Work("resnet18", "layer4", 1, 32, ("grad_cam",), ("hires_cam",))


@pytest.mark.filterwarnings(
    "ignore:explaining a model in train mode:UserWarning", "ignore:the grad_cam map:UserWarning"
)
def test_maps_are_held_to_the_network_cut_by_hand_and_the_model_to_itself() -> None:
    timed, only_error = (cam.measure("probe", method, SMALL, 0.0, 2) for method in ("grad_cam", "hires_cam"))
    assert timed is not None
    assert only_error is not None
    assert max(timed["error"], only_error["error"]) < 1e-5
    assert timed["ratio"]["pairs"] == 2
    assert timed["left"] == "nothing"
    assert "ratio" not in only_error
    assert "left" not in only_error


def test_quick_maps_are_of_every_model_that_was_asked_for() -> None:
    """Each once, and a ViT at the only size that it takes."""
    quick = [(work.model, work.size, work.methods) for work in cam._quick(list(cam.WORKS))]
    sizes = {"resnet18": 64, "alexnet": 64, "convnext_tiny": 64, "vit_b_16": 224}
    assert quick == [(model, size, ("grad_cam",)) for model, size in sizes.items()]


def test_what_is_left_behind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(library: str, method: str, work: cam.Work, model: nn.Module, *rest: Any) -> Callable[[], object]:
        return lambda: model.eval().zero_grad()

    monkeypatch.setattr(cam, "explainer", careless)
    assert cam.left_behind("careless", "grad_cam", SMALL) == "modes, .grad"


def test_the_table_of_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing library and one that fails are rows; the report shows what was kept."""
    out = tmp_path / "kept.json"
    monkeypatch.setattr(cam, "version", lambda library: {"probe": "", "grad-cam": "1.5"}.get(library))

    def answer(work: cam.Work, methods: list[str], *, what: str, library: str, **order: Any) -> list[Row]:
        if library == "grad-cam":
            return [{"failed": "ValueError: because"} for _ in methods]
        ratio = {"median": 1.0, "low": 0.9, "high": 1.1, "pairs": 5, "beyond": 0.0}
        found = {"measure": {"error": 1e-7, "ratio": ratio, "left": "nothing"}, "memory": {"peak": 52_000_000}}
        return [found[what] for _ in methods]

    monkeypatch.setattr(cam, "ask", answer)
    threads = str(torch.get_num_threads())
    cam.main(["--quick", "--models", "resnet18", "--threads", threads, "--out", str(out)])
    (tmp_path / "README.md").write_text(f"{report.BEGIN}{report.END}")
    text = report.written(report.load(tmp_path), tmp_path)[tmp_path / "benchmarks" / "RESULTS.md"]
    assert "| grad_cam | **probe** | 1e-07 | *1.00 (0.90–1.10) ~* | 52 | nothing |" in text
    assert "| grad_cam | grad-cam 1.5 | ValueError: because |" in text
    assert "not installed: pip install captum" in text
    assert "|  | forward |  |  | 52 |  |" in text


# -- scaling -----------------------------------------------------------------------------------------------------------


def test_the_exponent_of_a_power() -> None:
    """Of 7 n**1.5 it is 1.5."""
    assert scaling.exponent({n: 7 * n**1.5 for n in (10, 100, 1000)}) == pytest.approx(1.5)


def _long_run(tmp_path: Path, how: str, work: Work) -> Row:
    words = ["--quick", "--device", "cpu", "--out", str(tmp_path / "kept.json")]
    with command.Results("scaling", command.arguments("").parse_args(words)) as found:
        scaling.long_run(found, how, work, 100)
    return found.kept["rows"][0]


@pytest.mark.parametrize("how", ["output", "all four", "stats+histogram"])
def test_a_long_run_holds_no_more(tmp_path: Path, how: str) -> None:
    """No object more after a hundred steps than after twenty."""
    assert _long_run(tmp_path, how, scaling._deep(2, "cpu"))["objects"] <= 10


def test_a_leak_is_seen(tmp_path: Path) -> None:
    """One list that is kept a step is found."""
    work = scaling._deep(2, "cpu")
    leaked: list[Any] = []
    work.model.register_forward_hook(lambda *_: leaked.append([]))
    assert _long_run(tmp_path, "output", work)["objects"] >= 60


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_is_what_is_kept() -> None:
    """``RESULTS.md``, its pictures and the README's table are those of the files under ``benchmarks/results``."""
    for path, text in report.written(report.load(ROOT / "benchmarks" / "results"), ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python -m benchmarks.report"


def test_the_report_of_a_run(rows: dict[tuple[str, int | None], Row], tmp_path: Path) -> None:
    """Every row is in the table, with its command, and the README's table has the median and quartiles."""
    options = overhead.command.arguments("").parse_args(["--quick", "--device", "cpu"])
    settings = {"model": "layers", "mode": "train", "device": "cpu", "dtype": "float32", "batch": None, "size": None}
    with command.Results("overhead", options, **settings, compile=False, calls=40) as found:
        for row in rows.values():
            changed = {
                "full backward": {"failed": "RuntimeError: because"},
                "all four": {"ratio": {"median": 2.0, "low": 1.5, "high": 12.3, "differs": True, "pairs": 7}},
            }
            found.add("", **{**row, **changed.get(row["arm"], {})})
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "README.md").write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    (tmp_path / "kept.json").write_text(json.dumps(found.kept))
    written = report.written(report.load(tmp_path), tmp_path)
    readme, text = written[tmp_path / "README.md"], written[tmp_path / "benchmarks" / "RESULTS.md"]
    assert "| training: `Probe(model)`, all four kinds | 2.00 (1.50–12) |" in readme
    assert "| training: torch's full backward hooks alone | raises |" in readme
    assert readme.startswith("above\n")
    assert readme.endswith(f"{report.END}\nbelow\n")
    assert "old" not in readme
    assert all(f"| {arm}{f', every {every}' if every else ''} |" in text for arm, every in rows)
    assert "RuntimeError: because" in text
    assert "| all four | 2.00 (1.50–12) | 7 |" in text
    assert any(path.suffix == ".svg" for path in written)


@pytest.mark.parametrize("rows", [[], [{"arm": "bare", "every": None, "against": "bare", "failed": "why"}]])
def test_the_report_of_a_run_in_which_nothing_was_measured(rows: list[Row], tmp_path: Path) -> None:
    """Interrupted at once, or all failed: no picture, and no error."""
    machine = {"cpu": "a CPU", "gpu": "a GPU", "clocks": None, "threads": 1, "cores": 2, "torch": "2", "python": "3"}
    settings = {
        "model": "m",
        "mode": "train",
        "device": "cuda",
        "dtype": "float32",
        "batch": 1,
        "size": None,
        "compile": False,
    }
    each = {"line": "a line", "date": "a day", "machine": machine, "quick": False, "complete": False}
    overhead = {**each, "command": "overhead", "settings": {**settings, "calls": 1}, "rows": rows}
    (tmp_path / "README.md").write_text(f"{report.BEGIN}{report.END}")
    written = report.written([overhead, {**each, "command": "scaling", "settings": {}, "rows": []}], tmp_path)
    assert not any(path.suffix == ".svg" for path in written)
    assert "a GPU, 1 of 2 cores" in written[tmp_path / "benchmarks" / "RESULTS.md"]


def kept(rows: list[Row], **settings: Any) -> Row:
    """A file of ``benchmarks.overhead``."""
    machine = {"cpu": "a CPU", "threads": 1, "cores": 2, "torch": "2", "python": "3"}
    defaults = {"model": "m", "mode": "train", "device": "cpu", "dtype": "float32", "batch": None, "size": None}
    return {
        "command": "overhead",
        "line": "a line",
        "date": "a day",
        "machine": machine,
        "rows": rows,
        "quick": False,
        "complete": True,
        "settings": {**defaults, "compile": False, "calls": 1, **settings},
    }


def test_no_run_is_dropped_from_the_report() -> None:
    """Runs that differ in anything have columns of their own, and so do those that differ in nothing that is shown."""
    sizes = [{"size": 64}, {"size": 224}, {"size": 224}, {"size": 224, "mode": "forward"}]
    ratios = [{"median": median, "low": 1.1, "high": 9.0, "differs": True} for median in (2.0, 3.0, 4.0, 5.0)]
    rows = [[{"arm": "output", "every": None, "against": "bare", "ratio": ratio}] for ratio in ratios]
    text = report.summary([kept(row, **size) for row, size in zip(rows, sizes, strict=True)])
    assert "| ratio to the bare step | m size 64 | m size 224 | m size 224 (2) |" in text
    assert "| 2.00 (1.10–9.00) | 3.00 (1.10–9.00) | 4.00 (1.10–9.00) |" in text
    assert "|  | 5.00 (1.10–9.00) |  |" in text


def test_runs_of_a_model_stand_together(tmp_path: Path) -> None:
    """Whatever their number of calls or their files' names."""
    runs = [kept([], model=model, calls=calls) for model, calls in (("b", 5), ("a", 60), ("b", 100), ("a", 7))]
    for number, each in enumerate(runs):
        (tmp_path / f"{number}.json").write_text(json.dumps(each))
    assert [each["settings"]["model"] for each in report.load(tmp_path)] == ["a", "a", "b", "b"]


def test_pictures_are_xml() -> None:
    """Whatever a model or an arm is called."""
    ratio = {"median": 2.0, "low": 1.0, "high": 3.0, "differs": True}
    row = {"arm": "a<b & c", "every": None, "against": "bare", "ratio": ratio}
    (picture,) = report.pictures([kept([row], model="mine:<lambda>&")]).values()
    texts = [each.text for each in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert "a<b & c" in texts
    assert "mine:<lambda>&" in texts


def test_a_row_says_where_probe_is_not_first() -> None:
    """Who is cheaper, and who is right throughout as well: from the rows themselves."""

    def row(peer: str, package: str | None, true: int, low: float, high: float) -> Row:
        to_probe = None if peer == "probe" else {"median": (low + high) / 2, "low": low, "high": high}
        start = {"work": "outputs", "model": "m", "peer": peer, "package": package, "note": ""}
        return {**start, "true": true, "all": 9, "to_probe": to_probe}

    rows = [row("probe", None, 9, 1, 1), row("hasty", "hasty", 5, 0.8, 0.9), row("even", "even", 9, 0.9, 1.1)]
    assert report._verdict(rows[0], rows[:1]) == "none is cheaper; no other is right throughout"
    assert [report._verdict(each, rows) for each in rows] == [
        "cheaper: hasty; as right: even",
        "cheaper than probe; not right throughout",
        "not told from probe; right throughout",
    ]


@pytest.mark.parametrize("out", [["--out", "a file"], ["--out=a file"]])
def test_the_line_that_is_kept_can_be_typed(out: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted where a shell wants that, and without the file it went to."""
    monkeypatch.setattr(sys, "argv", ["x", "--arms", "all*, bare", *out, "--quick"])
    found = command.Results("overhead", command.arguments("").parse_args(["--device", "cpu"]))
    assert found.kept["line"] == "python -m benchmarks.overhead --arms 'all*, bare' --quick"


def test_a_file_of_something_else_is_told(tmp_path: Path) -> None:
    """Which file, and what belongs there."""
    for text in ("[]", '{"command": "over', '{"command": "overhead", "rows": [], "machine": {}}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(SystemExit, match=r"other\.json is no file of results"):
            report.load(tmp_path)


def test_a_probe_is_no_part_of_a_bare_step() -> None:
    """The models and steps that everything is measured on carry no hooks of their own."""
    model, x = layered()
    work = Work(model, x, torch.optim.SGD(model.parameters(), lr=0.1))
    assert counts.hooks(work.model) == 0
    with Probe(work.model):
        assert counts.hooks(work.model) >= 40
    assert counts.hooks(work.model) == 0
