"""Targets: one score a sample, from outputs of every shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from probe import cam
from probe.cam import targets


def score(target: object, output: object, batch: int = 2) -> Tensor:
    return targets.resolve(target, output, batch)(output)


def test_classes_are_given_in_every_usual_way() -> None:
    y = torch.randn(2, 5)
    for target, expected in [
        (3, [y[0, 3], y[1, 3]]),
        (np.int64(3), [y[0, 3], y[1, 3]]),
        ([4, 0], [y[0, 4], y[1, 0]]),
        ((4, 0), [y[0, 4], y[1, 0]]),
        (torch.tensor([4, 0]), [y[0, 4], y[1, 0]]),
        (torch.tensor(2, dtype=torch.uint8), [y[0, 2], y[1, 2]]),
        (np.array([4, 0]), [y[0, 4], y[1, 0]]),
        ([torch.tensor(4), torch.tensor(0)], [y[0, 4], y[1, 0]]),
        (None, [y[0].max(), y[1].max()]),
    ]:
        assert torch.equal(score(target, y), torch.stack(expected)), target


def test_logits_of_any_rank() -> None:
    dense = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(score(1, dense), dense[:, 1].sum((1, 2)))
    torch.testing.assert_close(score(None, dense), dense.sum((2, 3)).amax(1))
    single = torch.randn(2)
    assert torch.equal(score(0, single), single)
    assert torch.equal(score(1, torch.tensor([5.0, 7.0]), batch=1), torch.tensor([7.0]))
    assert torch.equal(score(None, torch.tensor(3.0), batch=1), torch.tensor([3.0]))
    with pytest.raises(IndexError, match="classes 0 to 0"):
        score(1, single)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) for a batch of 2"):
        score(0, torch.randn(3, 4))
    with pytest.raises(ValueError, match="holds no logits"):
        score(0, [{"boxes": single}])
    with pytest.raises(ValueError, match="holds no logits"):
        score(0, {"ids": torch.zeros(2, 3, dtype=torch.long)})


def test_probability_and_residual_softmax() -> None:
    y = torch.randn(2, 5)
    p = y.softmax(1)
    torch.testing.assert_close(targets.probability(3)(y), p[:, 3])
    torch.testing.assert_close(targets.probability([1, 2])(y), p[[0, 1], [1, 2]])
    torch.testing.assert_close(targets.residual_softmax(3)(y), y[:, 3] + p[:, 3].log())


def test_contrast_is_with_the_nearest_logits() -> None:
    y = torch.tensor([[0.0, 1.0, 5.0, 3.0], [2.0, 2.5, -4.0, 9.0]])
    torch.testing.assert_close(targets.contrast([1, 0], alpha=0.5, similar=2)(y),
                               torch.tensor([1 - 0.5 * (0 + 3) / 2, 2 - 0.5 * (2.5 - 4) / 2]))  # fmt: skip
    torch.testing.assert_close(targets.contrast(1, alpha=0.0)(y), y[:, 1])
    torch.testing.assert_close(targets.contrast(1, alpha=1.0, similar=99)(y)[0], torch.tensor(1 - 8 / 3))
    with pytest.raises(ValueError, match="nothing to compare with"):
        targets.contrast(0)(torch.randn(2, 1))


@pytest.mark.filterwarnings("ignore:.*nowhere positive.*:UserWarning")
def test_finer_cam_is_grad_cam_of_the_contrast() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6)).eval()
    x = torch.randn(3, 1, 6, 6)
    finer = cam.explain(model, x, layer="1", target=[0, 1, 2], method=cam.finer_cam)
    torch.testing.assert_close(finer, cam.explain(model, x, layer="1", target=targets.contrast([0, 1, 2])))
    with pytest.raises(ValueError, match="target= as an int"):
        cam.explain(model, x, layer="1", target=lambda output: output[:, 0], method=cam.finer_cam)


@pytest.mark.filterwarnings("ignore:.*nowhere positive.*:UserWarning")
def test_shapley_cam_sees_the_curvature_of_a_probability() -> None:
    """H A by double back-propagation agrees with the Hessian written out."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double().eval()
    x = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    a = model[0](x).detach()

    def score(a: Tensor) -> Tensor:
        return targets.residual_softmax(1)(model[1:](a)).sum()

    g = torch.autograd.functional.jacobian(score, a)
    h = torch.autograd.functional.hessian(score, a).reshape(18, 18)
    expected = cam.grad_cam(a, g - (h @ a.flatten()).view_as(a) / 2)
    found = cam.explain(model, x, layer="0", target=targets.residual_softmax(1), method=cam.shapley_cam)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, cam.grad_cam(a, g))


def test_segmentation_sums_over_a_mask() -> None:
    y = torch.randn(2, 3, 4, 5)
    mask = torch.rand(4, 5) > 0.5
    torch.testing.assert_close(targets.segmentation(1, mask)({"out": y}), (y[:, 1] * mask).sum((1, 2)))
    torch.testing.assert_close(targets.segmentation(1, mask.expand(2, 4, 5))(y), (y[:, 1] * mask).sum((1, 2)))
    chosen = y.argmax(1) == 1
    torch.testing.assert_close(targets.segmentation(1)(y), (y[:, 1] * chosen).sum((1, 2)))
    with pytest.raises(ValueError, match=r"mask has shape \(5, 4\)"):
        targets.segmentation(1, mask.T)(y)
    with pytest.raises(IndexError, match="classes 0 to 2"):
        targets.segmentation(3)(y)
    y[0, 1] = -99
    with pytest.raises(ValueError, match="no position is predicted as class 1"):
        targets.segmentation(1)(y)
    with pytest.raises(ValueError, match=r"needs logits \[B, K, \*spatial\]"):
        targets.segmentation(1)(torch.randn(2, 3))


def test_detection_scores_the_best_match_of_each_box() -> None:
    found = [
        {
            "boxes": torch.tensor([[0.0, 0, 10, 10], [0, 0, 8, 10], [20, 20, 30, 30]]),
            "labels": torch.tensor([1, 2, 1]),
            "scores": torch.tensor([0.5, 0.9, 0.7]),
        },
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)},
    ]
    boxes = [torch.tensor([[0.0, 0, 8, 10], [21, 21, 31, 31], [50, 50, 60, 60]]), torch.zeros(1, 4)]
    labels = [torch.tensor([1, 1, 1]), torch.tensor([1])]
    overlap = torchvision.ops.box_iou(boxes[0], found[0]["boxes"])
    expected = overlap[0, 0] + 0.5 + overlap[1, 2] + 0.7
    torch.testing.assert_close(targets.detection(boxes, labels)(found), torch.stack([expected, torch.tensor(0.0)]))
    strict = targets.detection(boxes, labels, iou_threshold=0.7)(found)
    torch.testing.assert_close(strict[0], overlap[0, 0] + 0.5)
    with pytest.raises(ValueError, match="boxes and labels for each sample"):
        targets.detection(boxes, labels[:1])
    with pytest.raises(ValueError, match="boxes for 2 samples, detections for 1"):
        targets.detection(boxes, labels)(found[:1])


def test_similarity_is_the_cosine() -> None:
    y, reference = torch.randn(2, 7), torch.randn(7)
    expected = torch.stack([each @ reference / each.norm() / reference.norm() for each in y])
    torch.testing.assert_close(targets.similarity(reference)(y), expected)
    torch.testing.assert_close(targets.similarity(y * 2)(y), torch.ones(2))


@pytest.mark.filterwarnings("ignore:.*nowhere positive.*:UserWarning", "ignore:.*is zero for.*:UserWarning")
def test_a_detector_with_a_list_of_images_is_explained() -> None:
    """Images of a list, boxes out: a target function is enough, and the maps are those of the batch."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.box = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 5)

        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            y = self.box(self.body(torch.stack(images)).relu().mean((2, 3)))
            corner = y[:, None, :2].sigmoid()
            boxes = torch.cat([corner, corner + 1], 2) * 10
            return [
                {"boxes": box, "scores": row[4:].sigmoid(), "labels": torch.ones(1).long()}
                for box, row in zip(boxes, y, strict=True)
            ]

    model, images = Detector().eval(), [torch.rand(3, 12, 16), torch.rand(3, 12, 16)]
    with torch.no_grad():
        found = model(images)
    target = targets.detection([each["boxes"] for each in found], [each["labels"] for each in found])
    maps = cam.explain(model, images, layer="body", target=target)
    assert maps.shape == (2, 6, 8)
    assert bool(maps.any())
