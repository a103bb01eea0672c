"""Class activation maps: ``maps = cam.explain(model, images, layer="layer4", target=281)``."""

from __future__ import annotations

from probe.cam import targets
from probe.cam.compare import Comparison, compare, grad_cam_summary
from probe.cam.explain import explain
from probe.cam.layout import AmbiguousLayout, Layout
from probe.cam.methods.component import eigen_cam, eigen_grad_cam, fem, kpca_cam
from probe.cam.methods.gradient import (
    cam,
    finer_cam,
    grad_cam,
    grad_cam_elementwise,
    grad_cam_pp,
    hires_cam,
    layer_cam,
    shapley_cam,
    smooth_grad_cam_pp,
    xgrad_cam,
)
from probe.cam.methods.network import attention_rollout, full_grad, guided_grad_cam, legrad
from probe.cam.methods.score import ablation_cam, is_cam, score_cam, ss_cam
from probe.cam.metrics import (
    average_drop,
    deletion,
    increase_in_confidence,
    infidelity,
    insertion,
    road,
    sensitivity,
)
from probe.cam.picture import IMAGENET_MEAN, IMAGENET_STD, fuse, grid, overlay
from probe.cam.pointing import energy_pointing_game, pointing_game
from probe.cam.sanity import sanity_check
from probe.cam.spot import At

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AmbiguousLayout",
    "At",
    "Comparison",
    "Layout",
    "ablation_cam",
    "attention_rollout",
    "average_drop",
    "cam",
    "compare",
    "deletion",
    "eigen_cam",
    "eigen_grad_cam",
    "energy_pointing_game",
    "explain",
    "fem",
    "finer_cam",
    "full_grad",
    "fuse",
    "grad_cam",
    "grad_cam_elementwise",
    "grad_cam_pp",
    "grad_cam_summary",
    "grid",
    "guided_grad_cam",
    "hires_cam",
    "increase_in_confidence",
    "infidelity",
    "insertion",
    "is_cam",
    "kpca_cam",
    "layer_cam",
    "legrad",
    "overlay",
    "pointing_game",
    "road",
    "sanity_check",
    "score_cam",
    "sensitivity",
    "shapley_cam",
    "smooth_grad_cam_pp",
    "ss_cam",
    "targets",
    "xgrad_cam",
]
