"""TensorBoard's own page, in a real browser, on a run that a `Board` wrote: each tab is filled with what was logged."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from probe.board import Board
from tests import zoo

_spec = importlib.util.spec_from_file_location("screenshots", Path(__file__).parents[1] / "examples" / "screenshots.py")
screenshots = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(screenshots)

pytestmark = [
    pytest.mark.skipif(screenshots.missing() is not None, reason=str(screenshots.missing())),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium's own
]

POINTS = 23


def write(folder):
    with Board(folder) as board:
        board.graph(zoo.ConvNet(), torch.rand(2, 3, 8, 8))
        for step in range(10):
            board.curves("accuracy", train=1 - math.exp(-step), valid=1 - math.exp(-step / 2), step=step)
            board.add_histogram("conv/output", torch.randn(500).bfloat16() * 1e-6, step)
        board.add_image("maps", torch.rand(9, 8, 8))
        board.add_video("clip", torch.rand(1, 4, 3, 16, 16))
        board.add_audio("tone", torch.sin(torch.arange(8000) / 8), sample_rate=8000)
        board.add_text("note", "**Hello** from a board")
        board.add_embedding(torch.randn(POINTS, 4), metadata=[str(n) for n in range(POINTS)])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write(folder)
    with screenshots.Pages(folder) as pages:
        yield pages


def test_train_and_valid_are_lines_of_one_chart(pages):
    pages.open("timeseries")
    (card,) = pages.wait(lambda: pages.find("scalar-card"))
    pages.wait(lambda: {"accuracy", "train", "valid"} <= set(card.text.split()))


def test_scalars(pages):
    pages.open("scalars")
    (chart,) = pages.find("vz-line-chart2", "path.line")
    colors = {line.value_of_css_property("stroke") for line in chart if line.get_attribute("d")}
    assert len(colors) == 2


def test_histograms_have_an_outline_a_step(pages):
    pages.open("histograms")
    (chart,) = pages.find("vz-histogram-timeseries", "path.outline")
    assert len([line for line in chart if line.get_attribute("d")]) == 10


def test_distributions(pages):
    pages.open("distributions")
    (chart,) = pages.find("vz-distribution-chart", "path.area")
    assert len([area for area in chart if "NaN" not in area.get_attribute("d")]) >= 5


def test_images_and_video_are_decoded(pages):
    pages.open("images")
    width = "return arguments[0].naturalWidth"
    pages.wait(
        lambda: {pages.driver.execute_script(width, img) for (img,) in pages.find("tf-image-loader", "img")} == {16, 28}
    )


def test_graph_opens_to_the_modules(pages):
    pages.open("graphs")
    pages.open_graph()
    expected = {"input", "ConvNet", "output", "ConvNet/features", "ConvNet/block", "ConvNet/fc"}
    pages.wait(lambda: expected <= {node.get_attribute("data-name") for node in pages.find("g.node")})


def test_text_is_rendered(pages):
    pages.open("text")
    (loader,) = pages.find("tf-text-loader")
    assert "Hello from a board" in loader.text
    assert [bold.text for bold in pages.find("tf-text-loader", "strong")[0]] == ["Hello"]


def test_audio_plays(pages):
    pages.open("audio")
    ((audio,),) = pages.find("tf-audio-loader", "audio")
    pages.wait(lambda: pages.driver.execute_script("return arguments[0].duration", audio) == 1)


def test_projector_has_every_point(pages):
    pages.open("projector")
    assert pages.find("vz-projector", "span.numDataPoints")[0][0].text == str(POINTS)


def test_pictures_are_small_pngs(pages, tmp_path):
    pages.open("text")
    pages.picture(tmp_path / "text.png", settle=0)
    data = (tmp_path / "text.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 100_000
