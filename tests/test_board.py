"""What a `Board` writes, read back through TensorBoard's own reader: every kind of value, every fault mended."""

from __future__ import annotations

import copy
import inspect
import io
import math
import os
import pickle
import warnings
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from probe import board as board_module
from probe import image, sketch
from probe.board import Board
from probe.capture import Histogram, Image, Scalar, Statistics
from tests.processes import fork, wait
from tests.reading import events, frames, histogram, pixels, read, scalars, steps

META = torch.zeros(3, 4, 4, device="meta")


@pytest.fixture
def board(tmp_path):
    with Board(tmp_path) as board:
        yield board


def test_a_board_is_a_summary_writer_with_the_same_arguments():
    """Each method takes what SummaryWriter's takes, in the same order, and may take more after it."""
    assert issubclass(Board, SummaryWriter)
    for name, method in inspect.getmembers(SummaryWriter, inspect.isfunction):
        if not name.startswith("_") or name == "__init__":
            theirs = list(inspect.signature(method).parameters)
            ours = list(inspect.signature(getattr(Board, name)).parameters)
            assert ours[: len(theirs)] == theirs, name


# Histograms


@given(
    values=st.lists(st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1e-9, 1e6])), min_size=1, max_size=40),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
@settings(deadline=None, max_examples=30)
def test_a_histogram_holds_the_finite_values_and_counts_the_others(tmp_path_factory, values, dtype):
    """Sum of bucket counts = number of finite values; extremes and sums are theirs; NaN and Inf are counted apart."""
    folder = tmp_path_factory.mktemp("run")
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    with Board(folder) as board:
        board.add_histogram("x", x, 0)
    finite = x[x.isfinite()].double()
    found = read(folder)
    if len(finite):
        proto = found.Histograms("x")[0].histogram_value
        assert proto.num == sum(proto.bucket) == len(finite)
        assert (proto.min, proto.max) == (finite.min(), finite.max())
        assert math.isclose(proto.sum, finite.sum(), rel_tol=1e-9, abs_tol=1e-9 * finite.abs().sum())
        assert math.isclose(proto.sum_squares, (finite**2).sum(), rel_tol=1e-9)
        assert proto.bucket_limit == sorted(set(proto.bucket_limit))
        assert proto.bucket_limit[-1] == proto.max
    else:
        assert found.Tags()["histograms"] == []
    counts = {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]}
    expected = {"x/nan": x.isnan().sum().item(), "x/inf": x.isinf().sum().item()}
    assert counts == {tag: count for tag, count in expected.items() if count}


def test_bfloat16_is_not_squeezed_through_float16(tmp_path, board):
    """1e-9 stays 1e-9 and 1e6 stays 1e6, each in a bucket of its own scale."""
    board.add_histogram("x", torch.tensor([1e-9] * 3 + [1e6] * 2, dtype=torch.bfloat16))
    board.flush()
    proto = histogram(tmp_path, "x")
    assert math.isclose(proto.min, 1e-9, rel_tol=0.01)
    assert math.isclose(proto.max, 1e6, rel_tol=0.01)
    assert proto.bucket[0] == 3
    assert proto.bucket_limit[0] < 2e-9
    assert proto.bucket[-1] == 2


def test_nonfinite_counts_go_on_once_they_have_begun(tmp_path, board):
    for step, values in enumerate([[1.0], [1.0, math.nan, math.inf, -math.inf], [1.0], [math.nan]]):
        board.add_histogram("x", values, step)
    board.flush()
    assert scalars(tmp_path, "x/nan") == [(1, 1), (2, 0), (3, 1)]
    assert scalars(tmp_path, "x/inf") == [(1, 2), (2, 0), (3, 0)]
    assert [each.step for each in read(tmp_path).Histograms("x")] == [0, 1, 2]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates them; they exist
    QUANTIZED = torch.quantize_per_tensor(torch.tensor([0.0, 1.0]), 0.5, 0, torch.quint8)
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.full((3,), 4.0)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("value", "low", "high", "count"),
    [
        (torch.tensor([3, -4, 2**40]), -4, 2**40, 3),
        (torch.tensor([1, 255], dtype=torch.uint8), 1, 255, 2),
        (torch.tensor([True, False]), 0, 1, 2),
        (torch.tensor([3 + 4j, 0]), 0, 5, 2),
        (torch.tensor([0.0, 0.0, 7.0]).to_sparse(), 0, 7, 3),
        (QUANTIZED, 0, 1, 2),
        (torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn), 0.5, 2, 2),
        (torch.tensor([1j, 2j]).conj().imag, -2, -1, 2),
        (NESTED, 1, 4, 5),
        (torch.tensor([-1e30, 1e30]), np.float32(-1e30), np.float32(1e30), 2),
        (torch.tensor([1e300, 2e300], dtype=torch.float64), 1e300, 2e300, 2),
        (torch.tensor(5.0), 5, 5, 1),
        (torch.ones(2, requires_grad=True), 1, 1, 2),
        (np.arange(4.0)[::-1], 0, 3, 4),
        (np.float16([1, 2]), 1, 2, 2),
        (np.arange(3, dtype=">i4"), 0, 2, 3),
        (np.arange(3, dtype=np.longdouble), 0, 2, 3),
        ([torch.tensor(1.0), 2], 1, 2, 2),
        ([1, 2.5], 1, 2.5, 2),
        (range(3), 0, 2, 3),
        (4.0, 4, 4, 1),
        (sketch.of(torch.arange(5.0)), 0, 4, 5),
    ],
)
def test_a_histogram_of_anything_with_numbers(tmp_path, board, value, low, high, count):
    board.add_histogram("x", value)
    board.flush()
    proto = histogram(tmp_path, "x")
    assert (proto.min, proto.max, sum(proto.bucket)) == (low, high, count)


@pytest.mark.parametrize("value", [torch.empty(0), torch.tensor([]), [], torch.empty(0, 3).to_sparse(), META])
def test_nothing_is_written_where_there_is_nothing_to_say(tmp_path, board, value):
    board.add_histogram("x", value)
    board.flush()
    assert events(tmp_path) == []


def test_chosen_bins_are_taken_as_given(tmp_path, board):
    board.add_histogram("x", torch.tensor([0.5, 1.5, 1.7, math.nan]), bins=[0, 1, 2])
    board.add_histogram("rule", torch.rand(100), bins="sqrt")
    board.add_histogram("float8", torch.tensor([0.5, 1.5, math.nan]).to(torch.float8_e4m3fn), bins=[0, 1, 2])
    board.flush()
    assert histogram(tmp_path, "float8").bucket == [0, 1, 1]
    proto = histogram(tmp_path, "x")
    assert (proto.bucket_limit, proto.bucket) == ([0, 1, 2], [0, 1, 2])
    assert len(histogram(tmp_path, "rule").bucket) == 11
    assert sum(histogram(tmp_path, "rule").bucket) == 100


def test_max_bins_joins_neighbours(tmp_path, board):
    x = torch.randn(1000)
    board.add_histogram("fine", x)
    for most in (1, 2, 7, 30):
        board.add_histogram(f"coarse{most}", x, max_bins=most)
    board.flush()
    fine = histogram(tmp_path, "fine")
    totals = dict(zip(fine.bucket_limit, np.cumsum(fine.bucket), strict=True))
    for most in (1, 2, 7, 30):
        coarse = histogram(tmp_path, f"coarse{most}")
        assert len(coarse.bucket) <= most
        for limit, total in zip(coarse.bucket_limit, np.cumsum(coarse.bucket), strict=True):
            assert totals[limit] == total
        assert coarse.bucket_limit[-1] == fine.max


def test_max_bins_is_at_least_one(board):
    with pytest.raises(ValueError, match="max_bins=0"):
        board.add_histogram("x", [1.0, 2.0], max_bins=0)


@pytest.mark.parametrize("value", [None, "text", object(), [object()], [1.0, None], b"text", ["1"]])
def test_what_holds_no_numbers_is_refused(board, value):
    with pytest.raises(TypeError, match="numbers are needed"):
        board.add_histogram("x", value)


def test_a_sketch_cannot_be_binned_anew(board):
    with pytest.raises(ValueError, match="give add_histogram the tensor"):
        board.add_histogram("x", sketch.of(torch.ones(2)), bins=[0, 1])


# Scalars


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        torch.tensor(0.5, dtype=torch.bfloat16),
        torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True),
        torch.tensor(0.5).to(torch.float8_e4m3fn),
        np.float64(0.5),
        np.array([0.5]),
        [0.5],
    ],
)
def test_a_scalar_of_any_kind_of_number(tmp_path, board, value):
    board.add_scalar("x", value, 3)
    board.add_scalar("new", value, 3, new_style=True, double_precision=True)
    board.flush()
    assert scalars(tmp_path, "x") == [(3, 0.5)]
    (new,) = read(tmp_path).Tensors("new")
    assert (new.step, list(new.tensor_proto.double_val)) == (3, [0.5])


def test_bfloat16_scalars_keep_their_scale(tmp_path, board):
    board.add_scalar("x", torch.tensor(1e-9, dtype=torch.bfloat16))
    board.add_scalar("x", torch.tensor(1e6, dtype=torch.bfloat16))
    board.add_scalar("x", math.nan)
    board.flush()
    small, large, nan = (value for _, value in scalars(tmp_path, "x"))
    assert math.isclose(small, 1e-9, rel_tol=0.01)
    assert math.isclose(large, 1e6, rel_tol=0.01)
    assert math.isnan(nan)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (torch.ones(2), ValueError, r"'x' was given 2.*\(2,\)"),
        (torch.empty(0), ValueError, "given 0"),
        (torch.tensor(1j), TypeError, r"\.abs\(\)"),
        (1j, TypeError, r"\.abs\(\)"),
        (None, TypeError, "NoneType"),
        ("0.5", TypeError, r"'x' was given '0.5' \(str\)"),
    ],
)
def test_what_is_no_scalar_is_refused_and_nothing_is_written(tmp_path, board, value, error, words):
    with pytest.raises(error, match=words):
        board.add_scalar("x", value)
    board.flush()
    assert events(tmp_path) == []


def test_add_scalars_makes_its_runs_without_a_thread_each(tmp_path, board):
    import threading

    before = threading.active_count()
    board.add_scalars("a/b", {"one": 1, "two": torch.tensor(2.0)}, 5)
    board.flush()
    assert threading.active_count() <= before + 1
    assert scalars(tmp_path / "a_b_one", "a/b") == [(5, 1)]
    assert scalars(tmp_path / "a_b_two", "a/b") == [(5, 2)]


@pytest.mark.filterwarnings("ignore")
def test_a_dtensor_counts_as_a_whole(tmp_path):
    """Two ranks hold half of (2, 2, 2, 2) each: both see the norm of the whole, 4, where the local one is 2.83."""

    def rank(number):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=number, world_size=2)
        whole = distribute_tensor(torch.full((4,), 2.0), init_device_mesh("cpu", (2,)), [Shard(0)])
        with Board(tmp_path / str(number)) as board:
            board.add_scalar("norm", whole.norm())
            board.add_histogram("x", whole)
        dist.destroy_process_group()

    children = [fork(lambda number=number: rank(number)) for number in range(2)]
    assert [wait(child, 60) for child in children] == [0, 0]
    for number in range(2):
        assert scalars(tmp_path / str(number), "norm") == [(0, 4)]
        assert histogram(tmp_path / str(number), "x").num == 4


@pytest.mark.parametrize(("number", "files"), [("0", 1), ("1", 0)])
def test_opened_before_the_process_group_is_there(tmp_path, monkeypatch, number, files):
    """What the launcher says tells which rank it is: only the first one's file is there before anything is written."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", number)
    with Board(tmp_path) as board:
        assert len(list(tmp_path.glob("*.tfevents.*"))) == files
        board.add_scalar("x", 1, 0)
    assert scalars(tmp_path, "x") == [(0, 1)]


# Meta tensors


@pytest.mark.parametrize(
    "add",
    [
        lambda board: board.add_scalar("x", META[0, 0, 0]),
        lambda board: board.add_scalar("x", META[0, 0, 0], new_style=True),
        lambda board: board.add_scalars("x", {"a": META[0, 0, 0]}),
        lambda board: board.curves("x", train=META[0, 0, 0]),
        lambda board: board.add_histogram("x", META, bins=[0, 1]),
        lambda board: board.add_image("x", META),
        lambda board: board.add_image_with_boxes("x", META, torch.zeros(1, 4)),
        lambda board: board.add_video("x", META[None, None]),
        lambda board: board.add_audio("x", META[0]),
        lambda board: board.add_pr_curve("x", META, META),
        lambda board: board.add_embedding(META[0]),
        lambda board: board.write(
            0, [Scalar("x", META[0, 0, 0]), Histogram("x", META), Image("x", META), Statistics(META)]
        ),
    ],
)
def test_meta_tensors_log_nothing(tmp_path, board, add):
    add(board)
    board.flush()
    assert [event for folder, _, files in os.walk(tmp_path) if files for event in events(folder)] == []
    assert not list(tmp_path.rglob("tensors.tsv"))


# Pictures


def test_integers_are_levels_and_floats_are_shares(tmp_path, board):
    levels = torch.tensor([[0, 100, 255]])
    board.add_image("int64", levels, dataformats="HW")
    board.add_image("uint8", levels.to(torch.uint8).numpy(), dataformats="HW")
    board.add_image("float", levels / 255, dataformats="HW")
    board.add_image("outside", torch.tensor([[-5.0, math.inf, 7]]), dataformats="HW")
    board.flush()
    for tag in ("int64", "uint8", "float"):
        assert pixels(tmp_path, tag)[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]
    assert pixels(tmp_path, "outside")[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]


def test_nan_is_magenta(tmp_path, board):
    x = torch.rand(3, 2, 2)
    x[1, 0, 1] = math.nan
    board.add_image("rgb", x)
    board.add_image("grey", x[1:2])
    board.flush()
    for tag in ("rgb", "grey"):
        found = pixels(tmp_path, tag)
        assert found[0, 1].tolist() == [255, 0, 255]
        assert (found == [255, 0, 255]).all(-1).sum() == 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 64, 512])
def test_an_image_of_any_channel_count_is_shown(tmp_path, board, channels):
    x = torch.rand(channels, 4, 5)
    board.add_image("x", x)
    board.add_image("bytes", image.to_uint8(x[:, None])[:, 0].to(torch.uint8))
    board.flush()
    found = torch.from_numpy(pixels(tmp_path, "x")).permute(2, 0, 1)
    if channels in (1, 3):
        expected = image.to_uint8(x).expand(3, -1, -1)
    elif channels == 4:
        expected = image.to_uint8(x)
    else:
        expected = image.grid(image.to_uint8(x[:, None]), nrow=math.ceil(math.sqrt(channels)), padding=1)
    assert torch.equal(found, expected)
    assert (pixels(tmp_path, "bytes") == pixels(tmp_path, "x")).all()


@pytest.mark.parametrize(
    ("dataformats", "order"),
    [("CHW", (0, 1, 2)), ("HWC", (1, 2, 0)), ("WHC", (2, 1, 0)), ("hwc", (1, 2, 0)), ("CWH", (0, 2, 1))],
)
def test_dataformats_name_the_dimensions(tmp_path, board, dataformats, order):
    x = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    board.add_image("x", x.permute(order), dataformats=dataformats)
    board.flush()
    assert (pixels(tmp_path, "x") == x.permute(1, 2, 0).numpy()).all()


def test_a_batch_is_laid_out_as_summary_writer_does(tmp_path, board):
    x = torch.randint(0, 256, (10, 3, 4, 5), dtype=torch.uint8)
    board.add_images("x", x)
    board.add_images("last", x.permute(0, 2, 3, 1), dataformats="NHWC")
    board.flush()
    with SummaryWriter(tmp_path / "theirs") as theirs:
        theirs.add_images("x", x)
    expected = pixels(tmp_path / "theirs", "x")
    assert expected.shape == (8, 40, 3)
    assert (pixels(tmp_path, "x") == expected).all()
    assert (pixels(tmp_path, "last") == expected).all()


@pytest.mark.parametrize(
    ("value", "dataformats", "words"),
    [
        (torch.rand(3, 4), "CHW", r"'CHW'.*\(3, 4\).*'HW'"),
        (torch.rand(3, 4, 4), "CCW", "one letter of NCHW"),
        (torch.rand(3, 4, 4), "NCH", "one letter of NCHW"),
        (torch.rand(3, 0, 4), "CHW", "no pixels"),
    ],
)
def test_an_image_that_does_not_fit_its_format_is_refused(board, value, dataformats, words):
    with pytest.raises(ValueError, match=words):
        board.add_image("x", value, dataformats=dataformats)


def test_boxes_are_drawn_on_the_right_colours(tmp_path, board):
    x = torch.full((3, 20, 20), 128)
    board.add_image_with_boxes("x", x, torch.tensor([[2.0, 2, 12, 12]], dtype=torch.bfloat16), labels=["a"])
    board.flush()
    found = pixels(tmp_path, "x")
    assert found[18, 18].tolist() == [128] * 3
    assert found[7, 2].tolist() == [255, 0, 0]


def test_a_figure_is_an_image(tmp_path, board):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1, 1), dpi=50)
    axes.plot([1, 2])
    board.add_figure("x", figure)
    board.flush()
    assert pixels(tmp_path, "x").shape == (50, 50, 3)


def test_a_video_is_a_gif_with_every_frame(tmp_path, board):
    """Two clips side by side, grey levels that a palette holds exactly; without moviepy."""
    x = torch.zeros(2, 5, 1, 6, 8, dtype=torch.uint8)
    for clip in range(2):
        for frame in range(5):
            x[clip, frame] = 100 * clip + 20 * frame
    board.add_video("x", x, fps=5)
    board.add_video("float", x / 255)
    board.flush()
    found = frames(tmp_path, "x")
    assert len(found) == 5
    for frame, pixels_ in enumerate(found):
        assert pixels_.shape == (6, 16, 3)
        assert (pixels_[:, :8] == 20 * frame).all()
        assert (pixels_[:, 8:] == 100 + 20 * frame).all()
    assert all((a == b).all() for a, b in zip(found, frames(tmp_path, "float"), strict=True))
    from PIL import Image as Pillow

    gif = Pillow.open(io.BytesIO(read(tmp_path).Images("x")[0].encoded_image_string))
    assert (gif.format, gif.info["duration"], gif.info["loop"]) == ("GIF", 200, 0)


@pytest.mark.parametrize(("value", "fps"), [(torch.rand(3, 4, 4), 4), (torch.rand(1, 0, 3, 4, 4), 4)])
def test_what_is_no_video_is_refused(board, value, fps):
    with pytest.raises(ValueError, match=r"\[N, T, C, H, W\]"):
        board.add_video("x", value, fps=fps)
    with pytest.raises(ValueError, match="fps"):
        board.add_video("x", torch.rand(1, 2, 3, 4, 4), fps=0)


# Sound, points and the rest


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([0.0, 0.5, -1, 7, math.nan]), [[0], [16384], [-32767], [32767], [0]]),
        (torch.tensor([[0.0, 1.0], [-1.0, 0.5]]), [[0, -32767], [32767, 16384]]),
        (torch.tensor([0, 32767, -32768], dtype=torch.int16), [[0], [32766], [-32767]]),
        (torch.tensor([128, 255, 0], dtype=torch.uint8), [[0], [32511], [-32767]]),
        (torch.tensor([0.5], dtype=torch.bfloat16), [[16384]]),
    ],
)
def test_audio_of_any_channels_and_dtype(tmp_path, board, value, expected):
    board.add_audio("x", value, sample_rate=8000)
    board.flush()
    (sound,) = read(tmp_path).Audio("x")
    with wave.open(io.BytesIO(sound.encoded_audio_string)) as file:
        samples = np.frombuffer(file.readframes(99), "<i2").reshape(-1, file.getnchannels())
        assert file.getframerate() == 8000
    assert samples.tolist() == expected


def test_what_is_no_audio_is_refused(board):
    for value in (torch.rand(2, 2, 2), torch.empty(0), torch.rand(44100, 2)):
        with pytest.raises(ValueError, match=r"\[channels, samples\]"):
            board.add_audio("x", value)
    for value in (torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(TypeError, match=f"not {str(value.dtype).removeprefix('torch.')}"):
            board.add_audio("x", value)


def test_embeddings_and_audio_of_any_layout_but_not_complex(tmp_path, board):
    points = torch.eye(3)
    board.add_embedding(points.to_sparse(), tag="sparse")
    assert (tmp_path / "00000" / "sparse" / "tensors.tsv").read_text().split() == ["1.0", "0.0", "0.0", "0.0"] * 2 + [
        "1.0"
    ]
    with pytest.raises(TypeError, match=r"'z' are complex: give \.abs\(\)"):
        board.add_embedding(points * 1j, tag="z")
    board.add_audio("sparse", points[0].to_sparse())
    board.flush()
    assert read(tmp_path).Audio("sparse")[0].length_frames == 3


def test_embeddings_of_any_dtype_with_true_pictures(tmp_path, board):
    points = torch.tensor([[1e6, 0.5], [1e-9, -2]], dtype=torch.bfloat16)
    sprites = torch.zeros(2, 1, 3, 3, dtype=torch.int64)
    sprites[1] = 200
    board.add_embedding(points, metadata=["a", "b"], label_img=sprites)
    board.add_embedding(points, tag="other")
    board.add_embedding(points)
    rows = (tmp_path / "00000" / "default" / "tensors.tsv").read_text().split()
    assert [float(each) for each in rows] == points.double().flatten().tolist()
    from PIL import Image as Pillow

    sprite = np.array(Pillow.open(tmp_path / "00000" / "default" / "sprite.png"))
    assert (sprite[1, 1].tolist(), sprite[1, 4].tolist()) == ([0] * 3, [200] * 3)
    config = (tmp_path / "projector_config.pbtxt").read_text()
    assert [f'"{name}"' in config for name in ("default:00000", "other:00000", "default:00001")] == [True] * 3


def test_pr_curves_do_not_round_through_half(tmp_path, board):
    labels, predictions = torch.randint(0, 2, (50,)), torch.rand(50)
    board.add_pr_curve("wide", labels, predictions.double())
    board.add_pr_curve("narrow", labels, predictions.bfloat16())
    board.flush()
    with SummaryWriter(tmp_path / "theirs") as theirs:
        theirs.add_pr_curve("wide", labels, predictions.double())
        theirs.add_pr_curve("narrow", labels, predictions.bfloat16().double())
    ours, reference = read(tmp_path), read(tmp_path / "theirs")
    for tag in ("wide", "narrow"):
        assert ours.Tensors(tag)[0].tensor_proto == reference.Tensors(tag)[0].tensor_proto


def test_hparams_belong_to_this_run_unless_named(tmp_path, board):
    board.add_hparams({"lr": 0.1, "name": "x"}, {"metric": torch.tensor(0.5, dtype=torch.bfloat16)})
    board.add_hparams({"lr": 0.2}, {"metric": 0.7}, run_name="second", global_step=4)
    board.flush()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["second"]
    for folder, expected in ((tmp_path, (0, 0.5)), (tmp_path / "second", (4, pytest.approx(0.7)))):
        assert scalars(folder, "metric") == [expected]
        assert "hparams" in read(folder).summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name


def test_text_tensors_charts_and_meshes_pass_through(tmp_path, board):
    board.add_text("text", "**bold**", 1)
    board.add_tensor("tensor", torch.tensor([1.5, 2.0]), 2)
    board.add_custom_scalars({"all": {"both": ["Multiline", ["a", "b"]]}})
    board.add_mesh("mesh", torch.rand(1, 5, 3))
    board.flush()
    found = read(tmp_path)
    assert found.Tensors("text/text_summary")[0].tensor_proto.string_val[0] == b"**bold**"
    assert list(found.Tensors("tensor")[0].tensor_proto.float_val) == [1.5, 2]
    assert {"custom_scalars__config__", "mesh_VERTEX"} <= set(found.Tags()["tensors"])


# Many things at once


def test_write_makes_one_event_of_all_items(tmp_path, board):
    items = [Scalar("s", torch.tensor(2.0)), Histogram("h", torch.arange(4.0)), Image("i", torch.rand(3, 4, 4))]
    items += [Image("grey", torch.rand(4, 4)), Image("batch", torch.rand(2, 1, 4, 4)), Histogram("n", [math.nan])]
    items += [Statistics(torch.arange(4.0), ("mean", "count"), "a")]
    board.write(7, items, wall_time=12.5)
    board.flush()
    (event,) = events(tmp_path)
    assert (event.step, event.wall_time) == (7, 12.5)
    tags = ["s", "h", "i", "grey", "batch", "n/nan", "a/mean", "a/count"]
    assert [value.tag for value in event.summary.value] == tags
    assert [value.simple_value for value in event.summary.value[-2:]] == [1.5, 4]
    assert pixels(tmp_path, "batch").shape == (4, 8, 3)


def test_write_is_all_or_nothing(tmp_path, board):
    for bad in (Scalar("b", torch.ones(2)), "no item"):
        with pytest.raises((TypeError, ValueError)):
            board.write(0, [Scalar("a", 1), bad])
    board.write(0, [])
    board.flush()
    assert events(tmp_path) == []


def test_write_to_a_sub_run(tmp_path, board):
    board.write(1, [Scalar("a", 1)])
    board.write(1, [Scalar("a", 2)], run="valid")
    board.flush()
    assert scalars(tmp_path, "a") == [(1, 1)]
    assert scalars(tmp_path / "valid", "a") == [(1, 2)]


def test_curves_are_sub_runs_with_one_tag(tmp_path, board):
    for step in range(3):
        board.curves("loss", train=step, valid=10 * step, step=step)
        board.curves("accuracy", train=torch.tensor(0.5), step=step)
    board.flush()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["train", "valid"]
    assert scalars(tmp_path / "train", "loss") == [(0, 0), (1, 1), (2, 2)]
    assert scalars(tmp_path / "valid", "loss") == [(0, 0), (1, 10), (2, 20)]
    assert steps(tmp_path / "train", "accuracy") == [0, 1, 2]
    assert all(len(list((tmp_path / phase).iterdir())) == 1 for phase in ("train", "valid"))


def test_curves_without_a_step_stay_side_by_side(tmp_path, board):
    """A phase that skips a step (None) comes back at the step of the others."""
    for valid in (1.0, None, None, 2.0):
        board.curves("loss", train=0.5, valid=valid)
    board.flush()
    assert steps(tmp_path / "train", "loss") == [0, 1, 2, 3]
    assert steps(tmp_path / "valid", "loss") == [0, 3]


@pytest.mark.parametrize("phase", ["../up", "/abs", "a/../../b"])
def test_a_sub_run_stays_below_the_folder(board, phase):
    with pytest.raises(ValueError, match="below"):
        board.curves("loss", **{phase: 1.0}, step=0)


# Steps


def test_without_a_step_a_tag_goes_on_after_its_last_one(tmp_path, board):
    for _ in range(3):
        board.add_scalar("a", 1)
    board.add_scalar("a", 1, 10)
    board.add_scalar("a", 1)
    board.add_text("t", "x")
    board.add_image("i", torch.rand(3, 2, 2))
    board.write(None, [Scalar("a", 1), Scalar("new", 1)])
    board.flush()
    assert steps(tmp_path, "a") == [0, 1, 2, 10, 11, 12]
    assert steps(tmp_path, "new") == [12]
    assert steps(tmp_path, "t/text_summary") == steps(tmp_path, "i") == [0]


def test_steps_that_go_backwards_are_kept(tmp_path, board):
    for step in (5, 3, 4, 3):
        board.add_scalar("a", step, step)
    board.flush()
    assert scalars(tmp_path, "a") == [(5, 5), (3, 3), (4, 4), (3, 3)]


def test_steps_may_be_tensors_and_numpy_integers(tmp_path, board):
    board.add_scalar("a", 1, torch.tensor(3))
    board.add_scalar("a", 1, np.int64(4))
    board.flush()
    assert steps(tmp_path, "a") == [3, 4]


def test_purge_step_hides_what_an_earlier_run_wrote_from_there_on(tmp_path):
    """In the board's own run and in the sub-runs of its curves."""
    for start, value in ((0, 1.0), (3, 2.0)):
        with Board(tmp_path, purge_step=start or None) as board:
            for step in range(start, 6):
                board.add_scalar("a", value, step)
                board.curves("loss", train=value, step=step)
    expected = [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]
    assert scalars(tmp_path, "a") == expected
    assert scalars(tmp_path / "train", "loss") == expected


# Folders, and the end


def test_default_folders_are_new_even_within_a_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(board_module.time, "strftime", lambda format: "Nov23_12-00-00")
    folders = []
    for comment in ("", "", "", "_x"):
        with Board(comment=comment) as board:
            folders.append(board.log_dir)
            board.add_scalar("a", len(folders))
    assert len(set(folders)) == 4
    assert folders[3].endswith("_x")
    assert [scalars(folder, "a") for folder in folders] == [[(0, n)] for n in (1, 2, 3, 4)]


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with Board(Path("run")) as board:
        monkeypatch.chdir(tmp_path / "b")
        board.add_scalar("a", 1)
        board.curves("loss", train=1)
        board.add_embedding(torch.rand(2, 2))
    assert scalars(tmp_path / "a" / "run", "a") == [(0, 1)]
    assert not list((tmp_path / "b").iterdir())


def test_after_close_everything_is_refused(tmp_path):
    board = Board(tmp_path)
    board.close()
    board.close()
    board.flush()
    for add in (
        lambda: board.add_scalar("a", 1),
        lambda: board.add_scalars("a", {"b": 1}),
        lambda: board.add_text("a", "b"),
        lambda: board.add_histogram("a", [1.0]),
        lambda: board.add_embedding(torch.rand(2, 2)),
        lambda: board.curves("a", train=1),
        lambda: board.graph(torch.nn.Linear(1, 1), torch.rand(1, 1)),
        lambda: board.write(0, [Scalar("a", 1)]),
        lambda: board.submit(0, [Scalar("a", 1)]),
    ):
        with pytest.raises(RuntimeError, match=r"is closed.*purge_step"):
            add()
    assert len(list(tmp_path.iterdir())) == 1
    assert repr(board) == f"Board({str(tmp_path)!r}, closed)"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copying_and_pickling_say_what_to_do_instead(board, duplicate):
    with pytest.raises(TypeError, match="open a Board there"):
        duplicate(board)


@pytest.mark.parametrize("options", [{"max_queue": -1}, {"flush_secs": -1}, {"flush_secs": math.nan}, {"max_jobs": 0}])
def test_senseless_limits_are_refused_before_anything_is_made(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Board(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_remote_folder_is_written_through_tensorboard(tmp_path):
    """Where TensorBoard knows a URL (here fsspec's memory), a Board does."""
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://{tmp_path.name}"
    with Board(url) as board:
        board.add_scalar("a", 1)
        board.flush()
        board.add_scalar("a", 2)
        board.curves("loss", train=3)
    assert scalars(url, "a") == [(0, 1), (1, 2)]
    assert scalars(f"{url}/train", "loss") == [(0, 3)]
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
