"""``python -m probe``, the README and the package: what somebody types first works as typed."""

from __future__ import annotations

import configparser
import contextlib
import functools
import io
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import probe
from probe import Probe, demo
from probe.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run_python(*arguments: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard reads from a folder."""
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    return accumulator.Reload()


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a command that fails: one line on stderr and no traceback."""
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1, shown.err
    assert shown.err.startswith(f"python -m probe {arguments[0]}: error: ")
    return shown.err


# -- the demo ----------------------------------------------------------------------------------------------------------


class Demo(NamedTuple):
    logdir: Path
    out: str
    err: str
    seconds: float


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """One demo as the README has it, in another folder."""
    logdir = tmp_path_factory.mktemp("runs") / "demo"
    out, err, started = io.StringIO(), io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), torch.random.fork_rng():
        assert main(["demo", "--logdir", str(logdir)]) == 0
    return Demo(logdir, out.getvalue(), err.getvalue(), time.perf_counter() - started)


def test_the_demo_reads_held_out_digits_within_a_minute(shown: Demo) -> None:
    """Well over 95 % of at least 300 digits."""
    found = re.search(r"([\d.]+)% of (\d+) held-out digits are read right", shown.out)
    assert found is not None, shown.out
    assert float(found[1]) > 97
    assert int(found[2]) > 300
    assert shown.seconds < 60


def test_the_demo_prints_the_table_what_was_overwritten_and_what_to_type_next(shown: Demo) -> None:
    """A row a layer; the ReLU that overwrote each convolution; the command for TensorBoard; the bar on stderr."""
    lines = shown.out.splitlines()
    assert [line.split()[0] for line in lines[2:9]] == ["conv1", "relu1", "conv2", "relu2", "pool", "flatten", "fc"]
    assert re.search(r"^conv1 +relu1 +\d+\.\d%$", shown.out, re.MULTILINE)
    assert re.search(r"^conv2 +relu2 +\d+\.\d%$", shown.out, re.MULTILINE)
    assert lines[-1].endswith(f"python -m probe open {shown.logdir}")
    assert "540/540" in shown.err
    assert "Error" not in shown.err
    assert "Warning" not in shown.err


def test_the_demo_writes_training_and_validation_into_one_chart(shown: Demo) -> None:
    """The same tags in two runs of one folder, a value an epoch."""
    for phase in ("train", "valid"):
        read = events(shown.logdir / phase)
        assert {"loss", "accuracy"} <= set(read.Tags()["scalars"])
        assert [event.step for event in read.Scalars("accuracy")] == list(range(45, 541, 45))
        losses = [event.value for event in read.Scalars("loss")]
        assert losses[-1] < losses[0] / 4


def test_the_demo_logs_every_layer_and_parameter_once_an_epoch(shown: Demo) -> None:
    """Histograms and statistics of outputs, gradients, parameters and updates, with the convolution's negative half."""
    read = events(shown.logdir)
    layers = {f"{name}/{what}" for name, _ in demo.network().named_children() for what in ("output", "grad_output")}
    parameters = {
        f"{name}/{what}" for name, _ in demo.network().named_parameters() for what in ("value", "grad", "update")
    }
    assert set(read.Tags()["histograms"]) == {f"{each}/histogram" for each in layers | parameters}
    assert {f"{each}/std" for each in layers | parameters} < set(read.Tags()["scalars"])
    for each in layers | parameters:
        assert [event.step for event in read.Histograms(f"{each}/histogram")] == list(range(0, 540, 45))
    assert read.Scalars("conv1/output/min")[-1].value < 0
    assert read.Scalars("relu1/output/min")[-1].value == 0
    assert max(event.value for event in read.Scalars("lr/group0")) > 2 * read.Scalars("lr/group0")[0].value


def test_the_demo_writes_kernels_feature_maps_and_inputs_as_pictures(shown: Demo) -> None:
    """16 kernels of 5 × 5 and 16 maps of 8 × 8 in squares of four, 32 digits, all eight times enlarged; and Grad-CAM of
    eight digits in a row, also of the validation's passes."""
    read = events(shown.logdir)
    sizes = {tag: (image.width, image.height) for tag in read.Tags()["images"] for image in read.Images(tag)[-1:]}
    assert sizes == {
        "conv1/input/images": (8 * (8 * 10 + 2), 8 * (4 * 10 + 2)),
        "conv1.weight/value/kernels": (8 * (4 * 6 + 1), 8 * (4 * 6 + 1)),
        "conv1/output/feature_maps": (8 * (4 * 10 + 2), 8 * (4 * 10 + 2)),
        "relu2/output/grad_cam": (8 * (64 + 2) + 2, 64 + 2 + 2),
    }
    assert len(read.Images("relu2/output/grad_cam")) == 12
    assert len(read.Images("conv1.weight/value/kernels")) == 12


def test_the_demo_fills_the_other_tabs(shown: Demo) -> None:
    """The graph, the table as text, and the held-out digits as points for the projector."""
    read = events(shown.logdir)
    assert read.Tags()["graph"]
    assert b"relu2" in read.Tensors("layers/text_summary")[0].tensor_proto.string_val[0]
    (points,) = shown.logdir.rglob("tensors.tsv")
    assert points.read_text().count("\n") == 360


def test_a_second_demo_in_the_same_folder_hides_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two epochs, then one: TensorBoard shows one."""
    for epochs in ("2", "1"):
        assert main(["demo", "--logdir", str(tmp_path), "--epochs", epochs]) == 0
    assert [event.step for event in events(tmp_path / "valid").Scalars("loss")] == [45]
    assert [event.step for event in events(tmp_path).Histograms("fc/output/histogram")] == [0]


def test_an_interrupted_demo_keeps_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second epoch: status 130, a word, and the first epoch can be read."""
    fit, calls = demo.fit, iter([False, True])

    def interrupted(*arguments: object) -> tuple[float, float]:
        if next(calls):
            raise KeyboardInterrupt
        return fit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "fit", interrupted)
    assert main(["demo", "--logdir", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert [event.step for event in events(tmp_path / "train").Scalars("loss")] == [45]
    assert [event.step for event in events(tmp_path).Histograms("fc/output/histogram")] == [0]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "command"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["demo", "--epoch-count", "3"], "unrecognized arguments: --epoch-count"),
        (["demo", "--epochs", "0"], "1 or more, not '0'"),
        (["demo", "--epochs", "many"], "1 or more, not 'many'"),
        (["open"], "logdir"),
        (["open", ".", "--port", "http"], "--port"),
    ],
)
def test_arguments_that_make_no_sense_are_told(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usage and the reason on stderr, status 2."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: python -m probe")
    assert says in err


def test_a_folder_that_cannot_be_written_to_is_told_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder and the system's reason."""
    monkeypatch.setattr(demo, "fit", None)
    (tmp_path / "file").write_text("")
    said = failure(capsys, "demo", "--logdir", str(tmp_path / "file" / "run"))
    assert str(tmp_path / "file" / "run") in said
    assert "Not a directory" in said


@pytest.mark.parametrize("package", ["sklearn", "tqdm"])
def test_the_demo_says_what_to_install(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The missing package, and the line to type; no folder is left."""
    monkeypatch.setitem(sys.modules, package, None)
    said = failure(capsys, "demo", "--logdir", str(tmp_path / "run"))
    assert package in said
    assert "pip install scikit-learn tqdm" in said
    assert not (tmp_path / "run").exists()


def test_missing_tensorboard_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the demo, which writes a board, and by ``open``, which starts it."""
    monkeypatch.delitem(sys.modules, "probe.board", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    assert "pip install tensorboard" in failure(capsys, "demo", "--logdir", str(tmp_path))
    assert "pip install tensorboard" in failure(capsys, "open", str(tmp_path))


def test_missing_opencv_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chart is drawn by OpenCV."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert main(["schedule", "StepLR(3)", "--steps", "5", "--png", str(tmp_path / "chart.png")]) != 0
    said = capsys.readouterr().err
    assert "cv2" in said
    assert "Traceback" not in said


# -- the other commands ------------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """``--version`` prints the package's."""
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"probe {probe.__version__}\n"


def test_schedule_is_one_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """It previews a schedule."""
    assert main(["schedule", "StepLR(3)", "--steps", "5"]) == 0
    assert "0.01" in capsys.readouterr().out


def test_open_starts_tensorboard_on_the_folder(shown: Demo) -> None:
    """On a free port; the page knows the runs; Ctrl-C ends it with a word and no traceback."""
    command = [sys.executable, "-m", "probe", "open", str(shown.logdir), "--port", "0"]
    # a session of its own, because Ctrl-C in a terminal reaches TensorBoard as well
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"http://localhost:\d+/", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        with urllib.request.urlopen(f"{found[0]}data/environment", timeout=30) as answer:
            assert str(shown.logdir) in answer.read().decode()
        os.killpg(process.pid, signal.SIGINT)
        said += process.communicate(timeout=30)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode in (0, 130)
    assert "Traceback" not in said


def test_open_tells_of_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what would make it."""
    missing = str(tmp_path / "runs")
    assert f"python -m probe demo --logdir {missing}" in failure(capsys, "open", missing)


def test_open_notes_that_there_is_no_run_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard is started all the same: a run may come; its exit status is handed on."""
    started = []
    monkeypatch.setattr(subprocess, "call", lambda command: started.append(command) or 3)
    assert main(["open", str(tmp_path), "--host", "0.0.0.0"]) == 3
    assert "no run" in capsys.readouterr().err
    assert started[0][1:] == [
        "-m",
        "tensorboard.main",
        "--logdir",
        str(tmp_path),
        "--host",
        "0.0.0.0",
        "--port",
        "6006",
    ]


# -- the package -------------------------------------------------------------------------------------------------------


def test_import_probe_loads_nothing_but_itself() -> None:
    """Not even torch: a script under ``python -m probe run`` may set what torch reads when it is imported."""
    code = "import probe, sys; print(dir(probe)); print(*{name.split('.')[0] for name in sys.modules})"
    names, loaded = run_python("-c", code).splitlines()
    assert all(repr(name) in names for name in probe.__all__)
    assert set(loaded.split()) & {"torch", "numpy", "tensorboard", "probe"} == {"probe"}


def test_importing_probes_loads_nothing_but_torch_and_itself_in_100_ms() -> None:
    """What it loads beyond torch is its own files and the standard library; the processor time is the best of five."""
    code = (
        "import sys, time, torch\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "from probe import Kind, Probe\n"
        "print(time.process_time() - start, *{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    seconds = []
    while not seconds or (min(seconds) > 0.1 and len(seconds) < 5):
        taken, *loaded = run_python("-c", code).split()
        assert set(loaded) - sys.stdlib_module_names == {"probe"}
        seconds.append(float(taken))
    assert min(seconds) <= 0.1


def test_the_commands_of_the_readme_are_those_that_ci_runs() -> None:
    """Both install from the clone, with an extra that exists; the second is the last line of ``.ci/run``."""
    commands = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert commands == [
        'pip install ".[demo]" && python -m probe demo --logdir runs/demo',
        'pip install ".[test]" && pytest -n auto',
    ]
    assert {"demo", "test"} <= set(config["options.extras_require"])
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == commands[1]


def test_the_readme_shows_small_pictures_that_exist() -> None:
    """Each under 100 kB."""
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", README)
    assert pictures
    assert all((ROOT / each).stat().st_size < 100_000 for each in pictures)


def test_the_readme_lists_every_file_in_the_order_of_imports() -> None:
    """The layout's rows are the public ones of the import contract, from top to bottom."""
    rows = re.findall(r"^  (\w+)(?:\.py|/) ", README, re.MULTILINE)
    with open(ROOT / "pyproject.toml", "rb") as file:
        contract = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]
    layers = [name for layer in contract["layers"] for name in re.findall(r"\b[^\W_]\w*|__main__", layer)]
    assert rows == [name for name in layers if (ROOT / "probe" / name).exists() or (ROOT / f"probe/{name}.py").exists()]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# torch 2.11 itself makes an autograd.Function as it traces a custom operator
@pytest.mark.filterwarnings("ignore:.class 'torch.autograd.function.Function'. should not be:DeprecationWarning")
def test_the_snippets_of_the_readme_run(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would type them, on a tiny model after the first; and its figure is right."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # no C++ compiler at work
    snippets = [
        (README[: m.start(1)].count("\n"), m[1]) for m in re.finditer(r"```python\n(.*?)```", README, re.DOTALL)
    ]
    assert len(snippets) == README.count("```python") > 5
    names: dict[str, object] = {}
    for index, (line, text) in enumerate(snippets):
        exec(compile("\n" * line + text, str(ROOT / "README.md"), "exec"), names)
        if index == 0:
            p = names["p"]
            assert isinstance(p, Probe)
            assert (len(p.overwritten), len(p)) == (17, 52)
            names.update(shared())
    assert [event.step for event in events(in_folder / "runs" / "first" / "valid").Scalars("loss")] == [4, 8, 12]
    assert 0 < events(in_folder / "runs" / "own" / "eval").Scalars("relu/output/share_of_zeros")[0].value < 1


def shared() -> dict[str, object]:
    """What the README's snippets share."""
    parts = {"conv1": nn.Conv2d(3, 4, 3), "relu": nn.ReLU(inplace=True), "conv2": nn.Conv2d(4, 4, 3)}
    model = nn.Sequential()
    for name, module in {**parts, "flatten": nn.Flatten(), "fc": nn.Linear(64, 5)}.items():
        model.add_module(name, module)
    return {
        "model": model,
        "x": torch.randn(2, 3, 8, 8),
        "y": torch.tensor([1, 3]),
        "loss_fn": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
