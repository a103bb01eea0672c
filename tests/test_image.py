"""Picture maths: grids equal to torchvision's where that is right, right where it is not; colour maps; kernels."""

from __future__ import annotations

import builtins
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.utils import make_grid

from probe import image

MAGENTA = torch.tensor([1.0, 0.0, 1.0])
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def tiles_of(picture, count, nrow, size, padding):
    """Cut a grid into its tiles again."""
    height, width = size
    for k in range(count):
        top = padding + k // nrow * (height + padding)
        left = padding + k % nrow * (width + padding)
        yield picture[:, top : top + height, left : left + width]


@given(
    dtype=st.sampled_from([*FLOATS, torch.uint8]),
    count=st.integers(2, 12),
    channels=st.sampled_from([1, 3]),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    nrow=st.integers(1, 8),
    padding=st.integers(0, 3),
    normalize=st.booleans(),
    scale_each=st.booleans(),
    value_range=st.sampled_from([None, (-0.3, 0.7), (0, 1)]),
    pad_value=st.sampled_from([0.0, 1.0]),
    magnitude=st.integers(-2, 3),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_grid_is_make_grid_bit_for_bit(
    dtype, count, channels, size, nrow, padding, normalize, scale_each, value_range, pad_value, magnitude, seed
):
    """For several finite images of 1 or 3 channels the pixels are exactly torchvision's, in the same dtype."""
    x = torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    spread = (x.amax((1, 2, 3)) - x.amin((1, 2, 3))).min() if scale_each else x.max() - x.min()
    if normalize and value_range is None and spread < 1e-3:
        x = x + torch.linspace(0, 1, x[0].numel()).reshape(x[0].shape)
    x = x.to(dtype)
    options = {"nrow": nrow, "padding": padding, "pad_value": pad_value, "scale_each": scale_each}
    options |= {"value_range": value_range, "normalize": normalize and dtype.is_floating_point}
    expected, found = make_grid(x, **options), image.grid(x, **options)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_a_map_of_one_value_or_one_pixel_is_black_as_in_make_grid():
    x = torch.full((2, 1, 1, 1), 3.0)
    assert torch.equal(image.grid(x, normalize=True), make_grid(x, normalize=True))


@pytest.mark.parametrize("shape", [(5, 6), (1, 5, 6), (3, 5, 6), (1, 3, 5, 6)])
def test_a_single_image_has_its_border(shape):
    found = image.grid(torch.ones(shape), padding=2, pad_value=0.5)
    assert found.shape == (3, 9, 10)
    assert (found[:, 2:-2, 2:-2] == 1).all()
    assert found.sum() == 3 * (30 + 0.5 * 60)


@pytest.mark.parametrize("channels", [2, 4, 5, 64])
def test_other_channel_counts_become_a_tile_each(channels):
    x = torch.rand(2, channels, 4, 3)
    found = image.grid(x, nrow=5)
    for tile, expected in zip(tiles_of(found, 2 * channels, 5, (4, 3), 2), x.flatten(0, 1), strict=True):
        assert torch.equal(tile, expected.expand(3, -1, -1))
    assert torch.equal(image.grid(x[0]), image.grid(x[0, :, None]))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale_each", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_magenta_and_changes_nothing_else(normalize, scale_each, dtype):
    """A map with NaN leaves the others as they would be without it, and keeps its own finite pixels."""
    clean = torch.rand(6, 1, 4, 4, dtype=torch.float64).to(dtype)
    clean[0, 0, 0, 0], clean[0, 0, 0, 1] = 0, 1  # the range is there with and without the NaN
    clean[4, 0, 0, 0], clean[4, 0, 0, 1] = 0, 1
    dirty = clean.clone()
    dirty[2] = math.nan
    dirty[4, 0, 1, 2] = math.nan
    options = {"nrow": 3, "normalize": normalize, "scale_each": scale_each}
    expected = list(tiles_of(image.grid(clean, **options), 6, 3, (4, 4), 2))
    found = list(tiles_of(image.grid(dirty, **options), 6, 3, (4, 4), 2))
    for k in (0, 1, 3, 5):
        assert torch.equal(found[k], expected[k])
    assert (found[2] == MAGENTA[:, None, None]).all()
    assert (found[4][:, 1, 2] == MAGENTA).all()
    expected[4][:, 1, 2] = found[4][:, 1, 2]
    assert torch.equal(found[4], expected[4])


def test_infinite_values_are_the_ends_of_the_range():
    x = torch.tensor([[math.inf, -math.inf, 0.0, 1.0, 4.0]])
    assert image.grid(x, normalize=True, padding=0)[0].tolist() == [[1, 0, 0, 0.25, 1]]
    only = torch.tensor([[math.inf, -math.inf]])
    assert image.grid(only, normalize=True, padding=0)[0].tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (0, 1e-9, torch.float32),
        (1e-44, 4e-44, torch.float32),
        (-3e38, 3e38, torch.float32),
        (-1.7e308, 1.7e308, torch.float64),
        (-65504, 65504, torch.float16),
        (0, 6e-8, torch.float16),
    ],
)
def test_every_range_is_stretched_to_0_and_1(low, high, dtype):
    """make_grid shows a range below 1e-5 as black and overflows at a wide one."""
    found = image.grid(torch.tensor([[low, high]], dtype=dtype), normalize=True, padding=0)
    assert found[0].tolist() == [[0, 1]]


def test_integers_can_be_normalized_and_stay_integers_otherwise():
    x = torch.arange(6).reshape(1, 2, 3)
    assert image.grid(x).dtype == torch.int64
    assert torch.allclose(image.grid(x, normalize=True, padding=0)[0], torch.arange(6).reshape(2, 3) / 5)


def test_grid_takes_lists_and_kinds_of_tensors():
    x = torch.rand(3, 1, 4, 4)
    expected = image.grid(x)
    assert torch.equal(image.grid(list(x)), expected)
    assert torch.equal(image.grid([each[0] for each in x]), expected)
    assert torch.equal(image.grid(x.to_sparse()), expected)
    assert torch.equal(image.grid(x.requires_grad_()), expected)
    assert not image.grid(x, normalize=True).requires_grad
    eighth = x.to(torch.float8_e4m3fn)
    assert torch.equal(image.grid(eighth), image.grid(eighth.float()))


def test_normalizing_leaves_the_input_alone():
    x = torch.rand(3, 1, 4, 4)
    before = x.clone()
    image.grid(x, normalize=True, scale_each=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: image.grid(torch.empty(0, 3, 4, 4)), "no images.*0, 3, 4, 4"),
        (lambda: image.grid([]), "no images"),
        (lambda: image.grid(torch.empty(2, 3, 0, 4)), "no images"),
        (lambda: image.grid(torch.rand(2, 2, 3, 4, 4)), r"\[B, C, H, W\].*\(2, 2, 3, 4, 4\)"),
        (lambda: image.grid([torch.rand(1, 2, 2), torch.rand(1, 3, 3)]), "one size"),
        (lambda: image.grid(torch.rand(2, 2), nrow=0), "nrow=0"),
        (lambda: image.grid(torch.rand(2, 2), normalize=True, value_range=(1, 0)), "low < high"),
        (lambda: image.grid(torch.rand(2, 2), normalize=True, value_range=(0, math.nan)), "low < high"),
        (lambda: image.colorize(torch.rand(3)), r"\[..., H, W\]"),
        (lambda: image.colorize(torch.rand(3, 3), "no such"), "no such.*viridis"),
        (lambda: image.colorize(torch.rand(3, 3), 999), "999.*jet"),
        (lambda: image.overlay(torch.rand(2, 3, 4, 4), torch.rand(3, 4, 4)), r"\(2, 3, 4, 4\) and \(3, 4, 4\)"),
        (lambda: image.overlay(torch.rand(3, 4, 4), torch.rand(4, 4), alpha=2), "alpha"),
        (lambda: image.kernels(torch.rand(3, 4)), "convolution"),
        (lambda: image.kernels(torch.rand(0, 3, 3, 3)), "convolution"),
        (lambda: image.kernels(torch.rand(5, 3, 3, 3), transposed=True, groups=2), "5 input channels"),
    ],
)
def test_bad_input_is_a_clear_value_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_complex_is_refused_with_a_way_out():
    with pytest.raises(TypeError, match=r"\.abs\(\)"):
        image.grid(torch.rand(2, 2, dtype=torch.complex64))


# Colours


@pytest.mark.parametrize("name", ["jet", "VIRIDIS", "turbo"])
def test_colorize_is_opencv(name):
    import cv2

    levels = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    expected = cv2.applyColorMap(levels.numpy(), getattr(cv2, f"COLORMAP_{name.upper()}"))[..., ::-1].copy()
    found = image.colorize(levels, name)
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1))


def test_colorize_scales_each_map_by_itself_and_paints_nan():
    maps = torch.stack([torch.tensor([[0.0, 1.0], [math.nan, 0.5]]), torch.tensor([[0.0, 100.0], [50.0, math.inf]])])
    found = image.colorize(maps)
    assert found.shape == (2, 3, 2, 2)
    assert torch.equal(found[0, :, 0], found[1, :, 0])
    assert found[0, :, 1, 0].tolist() == [255, 0, 255]
    assert torch.equal(found[1, :, 1, 1], found[1, :, 0, 1])
    assert torch.equal(found[0, :, 1, 1], found[1, :, 1, 0])


def test_colorize_with_a_range_clamps():
    found = image.colorize(torch.tensor([[-5.0, 0.0, 2.0, 9.0]]), value_range=(0, 2))
    assert torch.equal(found[..., 0], found[..., 1])
    assert torch.equal(found[..., 2], found[..., 3])


def test_overlay_keeps_the_image_at_alpha_0_and_is_the_heat_at_alpha_1():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    maps = torch.rand(2, 8, 8)
    assert torch.equal(image.overlay(images, maps, alpha=0), images)
    scaled = maps / maps.amax((1, 2), keepdim=True)
    expected = image.colorize(scaled, "jet", value_range=(0, 1))
    assert torch.equal(image.overlay(images, maps, alpha=1), expected)
    assert torch.equal(image.overlay(images[0], maps[0]), image.overlay(images, maps)[0])


def test_overlay_finds_the_place():
    """A hot corner of a coarse map reddens that corner of the image, and only that one."""
    maps = torch.zeros(1, 4, 4)
    maps[0, 0, 3] = 2.0
    found = image.overlay(torch.full((1, 1, 16, 16), 0.5), maps).float()[0]
    hot, cold = found[:, :2, -2:].mean((1, 2)), found[:, -2:, :2].mean((1, 2))
    assert hot[0] > hot[2]
    assert cold[2] > cold[0]


def test_overlay_ignores_negative_evidence_unless_told():
    images, maps = torch.zeros(1, 3, 2, 2), torch.tensor([[[-5.0, 0.0], [0.0, 1.0]]])
    found = image.overlay(images, maps, alpha=1)
    assert torch.equal(found[..., 0, 0], found[..., 0, 1])
    signed = image.overlay(images, maps, alpha=1, positive=False)
    assert not torch.equal(signed[..., 0, 0], signed[..., 0, 1])


def test_overlay_of_a_map_without_evidence_is_the_lowest_colour():
    found = image.overlay(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), -1.0), alpha=1)
    assert torch.equal(found, image.colorize(torch.zeros(1, 2, 2), "jet", value_range=(0, 1)))


def test_overlay_makes_a_normalized_image_viewable():
    images = torch.randn(1, 3, 8, 8)
    found = image.overlay(images, torch.zeros(1, 8, 8), alpha=0).float()
    low, high = images.min(), images.max()
    assert (found / 255 - (images - low) / (high - low)).abs().max() < 1 / 255


@pytest.mark.parametrize("reason", ["No module named 'cv2'", "libGL.so.1: cannot open shared object file"])
def test_without_opencv_the_error_names_both_cures(monkeypatch, reason):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "cv2":
            raise ImportError(reason)
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    image._color_table.cache_clear()
    with pytest.raises(ImportError, match="pip install opencv-python-headless") as caught:
        image.colorize(torch.rand(2, 2))
    assert "libgl1" in str(caught.value)
    assert reason in str(caught.value)


# Kernels


def gray(weight, peak):
    return weight / peak / 2 + 0.5


def test_kernels_of_rgb_input_are_coloured_tiles():
    weight = nn.Conv2d(3, 6, 5).weight
    found = image.kernels(weight, padding=1)
    for tile, kernel in zip(tiles_of(found, 6, 3, (5, 5), 1), weight.detach(), strict=True):
        assert torch.allclose(tile, gray(kernel, kernel.abs().max()))
    assert found.shape == (3, 2 * 6 + 1, 3 * 6 + 1)


def test_kernels_of_other_input_are_one_row_an_output_one_tile_an_input():
    weight = nn.Conv2d(5, 4, 3).weight.detach()
    found = image.kernels(weight)
    assert found.shape == (3, 4 * 4 + 1, 5 * 4 + 1)
    for k, tile in enumerate(tiles_of(found, 20, 5, (3, 3), 1)):
        kernel = weight[k // 5]
        assert torch.allclose(tile, gray(kernel[k % 5], kernel.abs().max()).expand(3, -1, -1))


@pytest.mark.parametrize(
    ("weight", "options", "shape"),
    [
        (nn.Conv2d(1, 10, 3).weight, {}, (3, 3 * 4 + 1, 4 * 4 + 1)),  # grey input: a square
        (nn.Conv2d(8, 8, 3, groups=8).weight, {"groups": 8}, (3, 3 * 4 + 1, 3 * 4 + 1)),  # depthwise: a square
        (nn.Conv2d(6, 4, 3, groups=2).weight, {"groups": 2}, (3, 4 * 4 + 1, 3 * 4 + 1)),  # three channels, not colours
        (nn.Conv2d(100, 90, 3).weight, {}, (3, 64 * 4 + 1, 16 * 4 + 1)),  # the limits
        (nn.Conv2d(100, 90, 3).weight, {"max_outputs": 2, "max_inputs": 3}, (3, 2 * 4 + 1, 3 * 4 + 1)),
        (nn.Conv1d(4, 8, 16).weight, {}, (3, 3 * 5 + 1, 3 * 17 + 1)),
        (nn.Conv3d(2, 4, (3, 5, 6)).weight, {}, (3, 4 * 6 + 1, 6 * 7 + 1)),  # 2 inputs x 3 slices
        (nn.Conv3d(3, 4, (2, 5, 6)).weight, {}, (3, 4 * 6 + 1, 2 * 7 + 1)),  # RGB: a tile a slice
        (nn.ConvTranspose2d(6, 8, 3, groups=2).weight, {"transposed": True, "groups": 2}, (3, 8 * 4 + 1, 3 * 4 + 1)),
        (nn.ConvTranspose1d(4, 9, 5).weight, {"transposed": True}, (3, 3 * 5 + 1, 3 * 6 + 1)),
    ],
)
def test_kernels_draw_every_convolution(weight, options, shape):
    found = image.kernels(weight, **options)
    assert found.shape == shape
    assert found.dtype == torch.float32
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_weight_is_drawn_as_the_convolution_it_transposes(groups):
    """Output channel o of group g reads the input channels of g: as in Conv2d's layout, input and output exchanged."""
    weight = torch.randn(6, 4, 3, 3)
    parts = weight.chunk(groups)
    plain = torch.cat([part.transpose(0, 1) for part in parts])
    expected = image.kernels(plain, groups=groups)
    assert torch.equal(image.kernels(weight, transposed=True, groups=groups), expected)


def test_zero_weights_are_mid_grey_and_nan_is_magenta():
    weight = torch.zeros(2, 4, 3, 3)
    weight[1, 0, 0, 0] = math.nan
    first, *_ = tiles_of(image.kernels(weight), 8, 4, (3, 3), 1)
    assert (first == 0.5).all()
    assert (image.kernels(weight)[:, 5, 1] == MAGENTA).all()


# Bytes


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (torch.tensor([0, 7, 255], dtype=torch.uint8), [0, 7, 255]),
        (torch.tensor([0, 7, 255, 300, -4]), [0, 7, 255, 255, 0]),
        (torch.tensor([True, False]), [255, 0]),
        (torch.tensor([0, 257, 65535], dtype=torch.uint16), [0, 1, 255]),
        (torch.tensor([0, 0.5, 1, 1.5, -2, math.inf, -math.inf]), [0, 128, 255, 255, 0, 255, 0]),
        (torch.tensor([0, 0.25, 1], dtype=torch.bfloat16), [0, 64, 255]),
    ],
)
def test_to_uint8_has_one_range_for_each_dtype(picture, expected):
    found = image.to_uint8(picture[None, None])
    assert found.dtype == torch.uint8
    assert found.flatten().tolist() == expected


def test_to_uint8_paints_nan_and_lays_opacity_on_white():
    grey = torch.tensor([[[0.5, math.nan]]])
    assert image.to_uint8(grey)[:, 0].T.tolist() == [[128, 128, 128], [255, 0, 255]]
    color = torch.rand(2, 3, 1, 2)
    color[1, 2, 0, 0] = math.nan
    assert image.to_uint8(color)[1, :, 0, 0].tolist() == [255, 0, 255]
    assert torch.equal(image.to_uint8(color)[0], image.to_uint8(color[0]))
    rgba = torch.tensor([10, 20, 30, 255, 40, 50, 60, 0], dtype=torch.uint8).reshape(2, 4).T[:, None]
    assert image.to_uint8(rgba)[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]
