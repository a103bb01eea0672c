"""The gallery: every script in examples/ runs, and what it wrote is read back from the event files."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import pytest
import torch

from tests.reading import pixels, read

EXAMPLES = Path(__file__).parent.parent / "examples"
TOOLS = {"distributed", "explain", "screenshots"}  # tests of their own: these write no run, or need two processes
SCRIPTS = sorted({path.stem for path in EXAMPLES.glob("[!_]*.py")} - TOOLS)


def on(*steps: int, tags: Iterable[str]) -> dict[str, list[int]]:
    """Several tags with the same steps."""
    return {tag: list(steps) for tag in tags}


def tiles(rows: int, columns: int, height: int, width: int, padding: int = 2, times: int = 1) -> tuple[int, int]:
    """Size of a picture made of tiles with padding around each, all of it enlarged."""
    return times * (rows * (height + padding) + padding), times * (columns * (width + padding) + padding)


@dataclass(frozen=True)
class Run:
    """What TensorBoard must find in one folder: tag -> steps for each kind, the pictures' sizes, the plugins' tags."""

    scalars: dict[str, list[int]] = field(default_factory=dict)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    images: dict[str, list[int]] = field(default_factory=dict)
    audio: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=dict)
    graph: bool = False


def schedules(names: list[str], moving: set[str], two_groups: set[str]) -> dict[str, Run]:
    """A run for each schedule, and their chart in the folder above."""
    steps = range(12)
    charts = ["rates", "rates, logarithmic"]
    runs = {
        name: Run(
            on(
                *steps,
                tags=["lr/group0"] + ["lr/group1"] * (name in two_groups) + ["momentum/group0"] * (name in moving),
            )
        )
        for name in names
    }
    return {"": Run(images=on(0, tags=charts), sizes=dict.fromkeys(charts, (480, 900))), **runs}


CLASSICS = ["StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR", "ReduceLROnPlateau", "LambdaLR"]
OTHERS = [
    "MultiplicativeLR", "ConstantLR", "LinearLR", "PolynomialLR", "CosineAnnealingWarmRestarts", "CyclicLR",
    "OneCycleLR", "SequentialLR", "ChainedScheduler", "SWALR",
]  # fmt: skip
CONVOLUTIONS = {  # of AlexNet: kernels, inputs, size
    "features.0": (64, 3, 11),
    "features.3": (192, 64, 5),
    "features.6": (384, 192, 3),
    "features.8": (256, 384, 3),
    "features.10": (256, 256, 3),
}

OPTIONS = {
    "alexnet_feature_maps": ["--quick"],
    "alexnet_kernels": ["--quick", "--channels", "2"],
    "curves": ["--epochs", "2"],
    "grad_cam": ["--epochs", "1"],
    "hooks": [],
    "image_grids": ["--batches", "2", "--batch-size", "6"],
    "inplace": ["--quick"],
    "schedules": ["--epochs", "12"],
    "tensorboard_basics": ["--steps", "4"],
}

EXPECTED: dict[str, dict[str, Run]] = {
    "alexnet_feature_maps": {
        "": Run(
            images=on(0, tags=["photograph", *(f"{name}/output" for name in CONVOLUTIONS)]),
            sizes={
                "photograph": tiles(1, 1, 64, 64),
                "features.0/output": tiles(8, 8, 15, 15),
                "features.3/output": tiles(12, 16, 7, 7),
                "features.6/output": tiles(24, 16, 3, 3),
                "features.8/output": tiles(16, 16, 3, 3),
                "features.10/output": tiles(16, 16, 3, 3),
            },
        )
    },
    "alexnet_kernels": {
        "": Run(
            images={
                **on(0, tags=[f"{name}/kernels" for name in CONVOLUTIONS]),
                **on(0, 1, tags=[f"{name}/one_kernel" for name in CONVOLUTIONS]),
            },
            sizes={
                "features.0/kernels": tiles(8, 8, 11, 11, 1, 3),
                "features.0/one_kernel": tiles(1, 1, 11, 11, 1, 8),
                **{f"{name}/kernels": tiles(64, 16, k, k, 1, 3) for name, (_, n, k) in CONVOLUTIONS.items() if n != 3},
                **{
                    f"{name}/one_kernel": tiles(n // 16, 16, k, k, 1, 8)
                    for name, (_, n, k) in CONVOLUTIONS.items()
                    if n != 3
                },
            },
        )
    },
    "curves": {
        "": Run(
            histograms=on(
                0,
                1,
                tags=[
                    f"{i}.{name}/{kind}" for i in (0, 2) for name in ("weight", "bias") for kind in ("value", "grad")
                ],
            )
        ),
        "train": Run(on(0, 1, tags=["loss", "accuracy"])),
        "valid": Run(on(0, 1, tags=["loss", "accuracy"])),
    },
    "grad_cam": {
        "": Run(
            scalars=on(0, tags=["lr/group0"]),
            images={"relu2/output/grad_cam": [0]},
            sizes={"relu2/output/grad_cam": tiles(1, 8, 64, 64)},
        )
    },
    "hooks": {
        "": Run(
            histograms=on(
                0,
                tags=[
                    f"{tag}/{by}"
                    for tag in ("conv/input", "conv/output", "conv/grad_output", "fc/grad_input")
                    for by in ("by_hand", "by_probe")
                ],
            )
        )
    },
    "image_grids": {
        "": Run(
            images=on(0, 1, tags=[f"digits/{kind}" for kind in ("four_a_row", "normalized", "each_by_itself")]),
            sizes={f"digits/{kind}": tiles(2, 4, 48, 48) for kind in ("four_a_row", "normalized", "each_by_itself")},
            plugins={"digits/labels/text_summary": "text"},
        )
    },
    "inplace": {
        "": Run(
            histograms=on(0, tags=["features.0/plain_hook", "features.0/truth"]),
            images={"features.0/plain_hook_truth_difference": [0]},
            sizes={"features.0/plain_hook_truth_difference": tiles(2, 3, 15, 15, 4, 3)},
        )
    },
    "schedules": {
        f"{title}/{name}".rstrip("/"): run
        for title, names in {"classics": CLASSICS, "others": OTHERS}.items()
        for name, run in schedules(names, {"OneCycleLR", "CyclicLR"}, {"LambdaLR"}).items()
    },
    "tensorboard_basics": {
        "": Run(
            scalars={**on(*range(4), tags=["y/2x", "y/2^x"]), "last": [0]},
            histograms=on(*range(5), tags=["uniform", "normal"]),
            images=on(0, tags=["chw", "hw", "hwc", "ones", "1.1 x ones", "batch"]),
            audio={"octave": [0]},
            sizes={**dict.fromkeys(["chw", "hw", "hwc", "ones", "1.1 x ones"], (48, 64)), "batch": (8, 64)},
            plugins={
                "custom_scalars__config__": "custom_scalars",
                "is it odd?": "pr_curves",
                "note/text_summary": "text",
                "triangle_FACE": "mesh",
                "triangle_VERTEX": "mesh",
            },
            graph=True,
        ),
        **{name: Run({"three": [0, 1, 2, 3]}) for name in ("x_sin_x", "x_cos_x", "arctan_x")},
    },
}


@pytest.fixture(autouse=True)
def _global_state_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A script of its own may switch gradients off and import its neighbours; the test session must not notice."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    enabled = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(enabled)


def run(name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """``python examples/<name>.py`` with options, in this process: an interpreter and its imports take seconds."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def found(folder: Path) -> Run:
    """What there is in a folder, in the terms of what is expected."""
    events = read(folder)
    tags = events.Tags()
    plugins = {tag: events.SummaryMetadata(tag).plugin_data.plugin_name for tag in tags["tensors"]}
    return Run(
        {tag: [each.step for each in events.Scalars(tag)] for tag in tags["scalars"]},
        {tag: [each.step for each in events.Histograms(tag)] for tag in tags["histograms"]},
        {tag: [each.step for each in events.Images(tag)] for tag in tags["images"]},
        {tag: [each.step for each in events.Audio(tag)] for tag in tags["audio"]},
        {tag: pixels(folder, tag).shape[:2] for tag in tags["images"]},
        plugins,
        tags["graph"],
    )


def test_every_script_is_tested() -> None:
    """And has a docstring that says what to look for, and fits on a screen."""
    assert set(SCRIPTS) == set(EXPECTED) == set(OPTIONS)
    for name in SCRIPTS:
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert "What to look for" in source.partition("from __future__")[0], name
        assert len(source.splitlines()) < 60, name


@pytest.mark.filterwarnings("ignore:the grad_cam map:UserWarning")  # after one epoch some maps are still blank
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_writes_what_it_should(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Tags, steps, kinds and picture sizes in every folder it made, and no folder more."""
    run(name, monkeypatch, "--logdir", str(tmp_path), *OPTIONS[name])
    capsys.readouterr()
    folders = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*.tfevents.*")}
    assert {folder.removeprefix(".") for folder in folders} == set(EXPECTED[name])
    for folder, expected in EXPECTED[name].items():
        assert found(tmp_path / folder) == expected, folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_to_look_for_and_where_the_run_goes(name: str, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, monkeypatch, "--help")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "What to look for" in told
    assert f"runs/{name}" in told


def test_an_example_runs_from_the_shell_in_any_folder(tmp_path: Path) -> None:
    """Into runs/<name> of the folder where one stands."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    script = [sys.executable, "-W", "error", str(EXAMPLES / "schedules.py"), "--epochs", "3"]
    subprocess.run(script, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "runs" / "schedules" / "classics" / "StepLR").is_dir()


@pytest.mark.filterwarnings("ignore:layer=None:UserWarning", "ignore:the grad_cam:UserWarning")
@pytest.mark.parametrize(("model", "rows", "size"), [("digits", 6, 160), ("alexnet", 2, 224)])
def test_explain_draws_a_row_an_image_and_a_column_a_method(
    model: str, rows: int, size: int, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The digits are 20 times as large, the photographs as they are; the table has a line a method."""
    out = tmp_path / "maps" / "explain.png"
    run("explain", monkeypatch, "--model", model, "--quick", "--out", str(out))
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["grad_cam", "grad_cam_pp", "layer_cam", "hires_cam", "eigen_cam"]
    assert cv2.imread(str(out)).shape == (22 + rows * (22 + size + 4), 6 * (size + 4), 3)


def test_the_values_in_the_basics_are_those_of_the_functions(tmp_path: Path, monkeypatch, capsys) -> None:
    """Not only the tags: the numbers, the orders of dimensions, and the clamping."""
    run("tensorboard_basics", monkeypatch, "--logdir", str(tmp_path), "--steps", "4")
    capsys.readouterr()
    events = read(tmp_path)
    assert [each.value for each in events.Scalars("y/2x")] == [0, 2, 4, 6]
    assert [each.value for each in events.Scalars("y/2^x")] == [1, 2, 4, 8]
    assert [each.value for each in read(tmp_path / "x_sin_x").Scalars("three")] == pytest.approx(
        [0, math.sin(1), 2 * math.sin(2), 3 * math.sin(3)]
    )
    assert (pixels(tmp_path, "chw") == pixels(tmp_path, "hwc")).all()
    assert (pixels(tmp_path, "hw")[..., 0] == pixels(tmp_path, "chw")[..., 0]).all()
    assert (pixels(tmp_path, "ones") == 255).all()
    assert (pixels(tmp_path, "1.1 x ones") == 255).all()
    assert (tmp_path / "projector_config.pbtxt").is_file()


def test_the_naive_hook_s_map_in_the_picture_has_lost_its_negative_half(tmp_path: Path, monkeypatch, capsys) -> None:
    """Left nothing is darker than mid-grey; in the middle a good part is."""
    run("inplace", monkeypatch, "--logdir", str(tmp_path), "--quick")
    capsys.readouterr()
    picture = pixels(tmp_path, "features.0/plain_hook_truth_difference")[..., 0]
    naive, true = picture[12:57, 12:57], picture[12:57, 69:114]
    assert naive.min() >= 127
    assert (true < 120).mean() > 0.1
