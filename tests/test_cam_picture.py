"""Overlays, grids, fused maps, comparisons, and Grad-CAM in a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import pytest
import torch
from torch import Tensor, nn

from probe import Capture, Image, Kind, cam
from probe.cam.picture import IMAGENET_MEAN, IMAGENET_STD, displayable, unit

MEAN, STD = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("form", ["uint8", "unit", "imagenet"])
def test_overlay_shows_the_image_whatever_way_it_was_normalised(form: str) -> None:
    """uint8, 0..1 and ImageNet-normalised images give the same picture."""
    raw = torch.randint(0, 256, (2, 3, 8, 10), dtype=torch.uint8)
    raw[:, :, 0, 0], raw[:, :, 0, 1] = 0, 255
    images = {"uint8": raw, "unit": raw / 255, "imagenet": (raw / 255 - MEAN) / STD}[form]
    assert torch.equal(cam.overlay(images, torch.rand(2, 2, 2), alpha=0.0), raw)


def test_overlay_blends_opencvs_colours_of_the_positive_part() -> None:
    image = torch.full((1, 1, 1, 4), 0.5)
    maps = torch.tensor([[[-3.0, 0.0, 1.0, 2.0]]])
    found = cam.overlay(image, maps, colormap="turbo", alpha=0.25)
    heat = (torch.tensor([[0.0, 0.0, 0.5, 1.0]]) * 255).round().byte().numpy()
    colours = torch.from_numpy(cv2.applyColorMap(heat, cv2.COLORMAP_TURBO)[..., ::-1].copy()).permute(2, 0, 1)
    expected = (0.75 * 127.5 + 0.25 * colours.float()).round()
    assert found.shape == (1, 3, 1, 4)
    assert found.dtype == torch.uint8
    assert float((found[0].float() - expected).abs().max()) <= 1


def test_overlay_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match="overlay needs"):
        cam.overlay(torch.rand(2, 3, 4, 4), torch.rand(3, 2, 2))
    with pytest.raises(ValueError, match="no colour map"):
        cam.overlay(torch.rand(1, 3, 4, 4), torch.rand(1, 2, 2), colormap="mud")
    with pytest.raises(ValueError, match="alpha"):
        cam.overlay(torch.rand(1, 3, 4, 4), torch.rand(1, 2, 2), alpha=2)


def test_images_of_another_normalisation_are_left_to_be_stretched() -> None:
    odd = torch.randn(2, 3, 4, 4) * 40
    assert torch.equal(displayable(odd), odd)


def test_fuse_joins_maps_of_several_sizes() -> None:
    maps = [torch.randn(2, 3, 5), torch.randn(2, 6, 10)]
    large = [nn.functional.interpolate(unit(each)[:, None], (6, 10), mode="bilinear")[:, 0] for each in maps]
    torch.testing.assert_close(cam.fuse(maps), (large[0] + large[1]) / 2)
    torch.testing.assert_close(cam.fuse(maps, how="max"), torch.maximum(*large))
    torch.testing.assert_close(cam.fuse(maps, how="product"), large[0] * large[1])
    torch.testing.assert_close(cam.fuse(maps, how=lambda stack: stack.sum(0)), large[0] + large[1])
    assert cam.fuse(maps, size=(12, 20)).shape == (2, 12, 20)
    assert cam.fuse([torch.rand(2, 7), torch.rand(2, 5)]).shape == (2, 7)
    for wrong, text in [([], "several layers"), ([maps[0], maps[1][:1]], "several layers")]:
        with pytest.raises(ValueError, match=text):
            cam.fuse(wrong)
    with pytest.raises(ValueError, match="'median'"):
        cam.fuse(maps, how="median")
    assert not cam.fuse([-maps[0].abs()]).any()


def test_grid_sets_image_map_and_overlay_side_by_side() -> None:
    images, maps = torch.rand(2, 3, 40, 80), torch.rand(2, 5, 5)
    picture = cam.grid(images, maps, labels=["a dog", "a cat"])
    scale, strip = 2, 22
    height, width = scale * 40 + 4, scale * 80 + 4
    assert picture.shape == (3, strip + 2 * (strip + height), 3 * width)
    assert picture.dtype == torch.uint8
    first = picture[:, 2 * strip + 2 : 2 * strip + height - 2]
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    assert torch.equal(first[:, :, 2 : width - 2], cam.overlay(large, maps, alpha=0.0)[0])
    assert torch.equal(first[:, :, 2 * width + 2 : 3 * width - 2], cam.overlay(large, maps)[0])
    assert int(picture[:, :strip].min()) < 100  # the headings are written
    several = cam.grid(images, {"one": maps, "two": -maps})
    assert several.shape == (3, strip + 2 * height, 3 * width)
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        cam.grid(images, maps, labels=["one"])


@pytest.mark.filterwarnings("ignore:.*nowhere positive.*:UserWarning", "ignore:layer=None.*:UserWarning")
def test_compare_puts_methods_into_a_table_and_a_picture() -> None:
    model, images = network(), torch.rand(2, 3, 12, 16)
    found = cam.compare(model, images, None, [cam.grad_cam, cam.layer_cam, cam.attention_rollout], steps=4)
    assert [row.method for row in found.rows] == ["grad_cam", "layer_cam", "attention_rollout"]
    assert list(found.maps) == ["grad_cam", "layer_cam"]
    assert "ran no self-attention" in found.rows[2].error
    lines = str(found).splitlines()
    assert lines[0].split() == ["method", "ms", "deletion", "insertion", "drop", "increase"]
    assert len(lines) == 4
    classes = model(images).argmax(1)
    torch.testing.assert_close(found.maps["layer_cam"], cam.explain(model, images, layer="1", target=classes,
                                                                  method=cam.layer_cam))  # fmt: skip
    expected = cam.deletion(model, images, found.maps["layer_cam"], classes, steps=4).area.mean()
    assert found.rows[1].deletion == pytest.approx(float(expected))
    assert found.picture.shape[0] == 3
    with pytest.raises(ValueError, match="at least one method"):
        cam.compare(model, images, "1", [])


def capture(step: int, value: Tensor | None = None) -> Capture:
    return Capture("1", Kind.OUTPUT, torch.zeros(1) if value is None else value, step=step)


@pytest.mark.parametrize("layer", [lambda m: "1", lambda m: m[1], lambda m: cam.At(m[1]), lambda m: None])
def test_the_summary_explains_a_fixed_batch_once_a_step_without_disturbing_the_training(
    layer: Callable[[nn.Module], Any],
) -> None:
    model, images = network().train(), torch.rand(3, 3, 12, 16)
    summary = cam.grad_cam_summary(model, images, layer=layer(model), target=2, nrow=2)
    model(images).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    (shown,) = summary(capture(5))
    assert isinstance(shown, Image)
    assert shown.tag == "grad_cam"
    assert shown.value.shape == (3, 2 * 4 * 12 + 6, 2 * 4 * 16 + 6)  # four times as large, so as to be seen
    assert shown.value.dtype == torch.uint8
    (same,) = summary(capture(6))
    assert torch.equal(same.value, shown.value)
    with torch.no_grad():
        model[0].weight.normal_()
        model[4].weight.normal_()
    (other,) = summary(capture(7))
    assert not torch.equal(other.value, shown.value)
    with torch.no_grad():
        model[0].weight.normal_()
    (kept,) = summary(capture(7))  # a pass in eval mode of the same step, or a micro-batch: the picture is the step's
    assert kept.value is other.value
    assert model.training
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
