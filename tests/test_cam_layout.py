"""Layouts: found from shapes where they tell, an error that says what to pass where they don't."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn

from probe import cam
from probe.cam.layout import infer

COLUMNS = ("channels_first", "channels_last")


def found(
    shape: tuple[int, ...], *inputs: Tensor, module: nn.Module | None = None, model: nn.Module | None = None
) -> cam.Layout:
    module = module or nn.Identity()
    return infer(shape, inputs=inputs, batch=len(inputs[0]), module=module, model=model or module, name="layer")


def image(*size: int, batch: int = 2) -> Tensor:
    return torch.empty(batch, 3, *size)


@settings(deadline=None, max_examples=300)
@given(
    st.tuples(st.integers(2, 16), st.integers(2, 16)),
    st.sampled_from([2, 4, 8, 16, 32]),
    st.sampled_from([32, 48, 64, 96, 192, 256, 512, 768, 1024]),
    st.booleans(),
)
def test_maps_of_images_are_never_laid_out_wrongly(
    grid: tuple[int, int], stride: int, channels: int, channels_last: bool
) -> None:
    """Channels that do not keep the input's aspect ratio are told from space, or it is an error."""
    height, width = grid
    shape = (2, height, width, channels) if channels_last else (2, channels, height, width)
    try:
        layout = found(shape, image(height * stride, width * stride))
    except cam.AmbiguousLayout:
        # only where the other reading has an aspect ratio near the image's too
        other = (width, channels) if channels_last else (channels, height)
        assert 1 / 3 < (other[0] / other[1]) / (height / width) < 3
    else:
        assert layout.kind == COLUMNS[channels_last]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 14), st.integers(1, 14), st.sampled_from([4, 8, 14, 16]), st.integers(0, 9), st.booleans())
def test_tokens_get_their_grid_from_input_and_patch_size(
    height: int, width: int, patch: int, prefix: int, batch_second: bool
) -> None:
    """Also grids that are not square, remainders at the border, class tokens, registers, and sequence-first tokens."""
    count = prefix + height * width
    assume(count != 2)
    model = nn.Sequential(nn.Conv2d(3, 24, patch, patch))
    shape = (count, 2, 24) if batch_second else (2, count, 24)
    layout = found(shape, image(height * patch + 1, width * patch + patch - 1), model=model)
    assert layout == cam.Layout("tokens", grid=(height, width), prefix=prefix, batch=int(batch_second))


def test_known_architectures() -> None:
    vit = nn.Sequential(nn.Conv2d(3, 768, 16, 16))
    for shape, size, model, expected in [
        ((2, 512, 7, 7), (224, 224), None, cam.Layout("channels_first")),
        ((2, 7, 7, 768), (224, 224), None, cam.Layout("channels_last")),
        ((2, 197, 768), (224, 224), vit, cam.Layout("tokens", grid=(14, 14), prefix=1)),
        ((2, 198, 768), (224, 224), vit, cam.Layout("tokens", grid=(14, 14), prefix=2)),
        ((2, 201, 768), (224, 224), vit, cam.Layout("tokens", grid=(14, 14), prefix=5)),
        ((2, 24 * 14 + 1, 768), (384, 224), vit, cam.Layout("tokens", grid=(24, 14), prefix=1)),
        ((2, 49, 512), (224, 224), nn.Conv2d(3, 8, 7, 4), cam.Layout("tokens", grid=(7, 7))),  # merged patches
        ((2, 50, 512), (224, 224), nn.Conv2d(3, 8, 7, 4), cam.Layout("tokens", grid=(7, 7), prefix=1)),
        ((2, 64, 4, 7, 7), (8, 56, 56), None, cam.Layout("channels_first")),
        ((2, 4, 7, 7, 64), (8, 56, 56), None, cam.Layout("channels_last")),
    ]:
        assert found(shape, image(*size), model=model) == expected, shape


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Conv2d(3, 7, 1), "channels_first"),
        (nn.BatchNorm2d(7), "channels_first"),
        (nn.MaxPool2d(2), "channels_first"),
        (nn.Linear(7, 7), "channels_last"),
        (nn.LayerNorm(7), "channels_last"),
    ],
)
def test_what_kind_of_layer_it_is_decides_where_the_shape_cannot(module: nn.Module, kind: str) -> None:
    assert found((2, 7, 7, 7), image(28, 28), module=module).kind == kind


def test_a_layer_without_weights_is_laid_out_like_what_it_works_on() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv1d(3, 6, 5), relu, nn.Flatten(), nn.Linear(90, 15))
    assert found((2, 6, 15), image(19), module=relu, model=model).kind == "channels_first"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), relu)
    assert found((2, 4, 4, 4), image(6, 6), module=relu, model=model).kind == "channels_first"
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    with pytest.raises(cam.AmbiguousLayout):
        found((2, 4, 4, 4), image(6, 6), module=mixed, model=mixed)


def test_text_is_laid_out_by_its_tokens() -> None:
    ids = torch.zeros(2, 11, dtype=torch.long)
    assert found((2, 11, 32), ids) == cam.Layout("tokens", grid=(11,))


@pytest.mark.parametrize(
    ("shape", "size"),
    [((2, 7, 7, 7), (28, 28)), ((2, 100, 64), (224, 224)), ((2, 393, 768), (16, 224, 224)), ((2, 9, 9, 9), (9, 81))],
)
def test_ambiguous_shapes_are_errors_that_say_what_to_pass(shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    with pytest.raises(cam.AmbiguousLayout, match=r"layer=cam\.At\('layer', cam\.Layout\("):
        found(shape, image(*size))
    with pytest.raises(cam.AmbiguousLayout, match="without space"):
        found((2, 10), image(*size))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["channels_first", "channels_last", "tokens"]), st.integers(0, 3), st.integers(0, 1))
def test_restore_inverts_channels_first(kind: str, prefix: int, batch: int) -> None:
    layout = cam.Layout("tokens", grid=(3, 4), prefix=prefix, batch=batch) if kind == "tokens" else cam.Layout(kind)
    value = torch.randn(2, 3, 4, 5)
    if kind == "tokens":
        value = torch.randn(2, prefix + 12, 5).movedim(0, batch)
    front = layout.channels_first(value)
    assert front.shape[0] == 2
    assert torch.equal(layout.restore(front, value), value)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="'columns'"):
        cam.Layout("columns")
    with pytest.raises(ValueError, match="needs the grid"):
        cam.Layout("tokens")
    with pytest.raises(ValueError, match=r"are not 1 \+ 2 x 2 tokens"):
        cam.Layout("tokens", grid=(2, 2), prefix=1).channels_first(torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match=r"4 tokens are not 1 \+ 2 x 2"):
        cam.Layout("tokens", grid=(2, 2), prefix=1).spatial(torch.zeros(1, 4))


def test_what_the_user_says_wins() -> None:
    """A layout given by `At` is used as it is, also where another one would be found."""
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Flatten(), nn.Linear(216, 2)).eval()
    x = torch.randn(2, 1, 6, 6)
    usual = cam.explain(model, x, layer="0", target=0, method=cam.hires_cam)
    assert usual.shape == (2, 6, 6)
    other = cam.explain(model, x, layer=cam.At("0", cam.Layout("channels_last")), target=0, method=cam.hires_cam)
    assert not torch.allclose(other, usual)
