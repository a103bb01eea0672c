"""The methods on tensors: formulas, corner cases, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from sklearn.decomposition import KernelPCA
from torch import Tensor

from probe import cam
from probe.cam.methods.arithmetic import resize

PAIRS = [
    cam.grad_cam, cam.grad_cam_pp, cam.xgrad_cam, cam.layer_cam, cam.hires_cam, cam.grad_cam_elementwise,
    cam.eigen_grad_cam,
]  # fmt: skip
SINGLES = [cam.eigen_cam, cam.kpca_cam, cam.fem]


def tensors(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("method", PAIRS + SINGLES)
@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 99))
def test_any_number_of_dimensions(method: Callable[..., Tensor], spatial: list[int], channels: int, seed: int) -> None:
    """Maps have the activation's spatial shape, and folding that into one dimension changes nothing else."""
    a, g = tensors(2, channels, *spatial, seed=seed)
    arguments = (a, g) if method in PAIRS else (a,)
    maps = method(*arguments)
    assert maps.shape == (2, *spatial)
    flat = method(*(each.flatten(2) for each in arguments))
    torch.testing.assert_close(maps.flatten(1), flat, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", PAIRS)
@settings(deadline=None, max_examples=15)
@given(st.floats(1e-12, 1e12), st.integers(0, 99))
def test_gradients_of_any_size_give_finite_maps(method: Callable[..., Tensor], scale: float, seed: int) -> None:
    """No power of a tiny gradient underflows to 0 / 0, none of a huge one overflows."""
    a, g = tensors(2, 3, 4, 5, seed=seed)
    assert method(a.relu(), g * scale).isfinite().all()


def test_grad_cam_pp_is_the_paper_s_where_powers_of_the_gradient_underflow() -> None:
    a, g = tensors(2, 6, 4, 4)
    a = a.relu()
    tiny = g * 1e-15  # g ** 3 is 0 in float32
    exact_g, exact_a = tiny.double(), a.double()
    alpha = exact_g**2 / (2 * exact_g**2 + exact_g**3 * exact_a.sum((2, 3), keepdim=True))
    expected = ((alpha * exact_g.relu()).sum((2, 3))[:, :, None, None] * exact_a).sum(1)
    torch.testing.assert_close(cam.grad_cam_pp(a, tiny).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", PAIRS)
def test_zero_gradients_and_zero_activations_give_zero(method: Callable[..., Tensor]) -> None:
    a, g = tensors(2, 3, 4, 5)
    assert torch.equal(method(a, torch.zeros_like(g)), torch.zeros(2, 4, 5))
    assert torch.equal(method(torch.zeros_like(a), g), torch.zeros(2, 4, 5))


def test_xgrad_cam_is_grad_cam_where_the_gradient_is_constant() -> None:
    a, _ = tensors(2, 3, 4, 5)
    g = torch.randn(2, 3, 1, 1).expand_as(a)
    torch.testing.assert_close(cam.xgrad_cam(a, g), cam.grad_cam(a, g), rtol=1e-4, atol=1e-5)
    total = a.sum((2, 3))
    with_eps = ((g * a).sum((2, 3)) / (total + 0.5))[:, :, None, None] * a
    torch.testing.assert_close(cam.xgrad_cam(a, g, eps=0.5), with_eps.sum(1), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12), st.integers(1, 6), st.booleans(), st.integers(0, 999))
def test_eigen_cam_is_the_first_component_of_an_svd(channels: int, side: int, centered: bool, seed: int) -> None:
    """Up to the sign, from either Gram matrix (more positions than channels, or fewer)."""
    a, g = tensors(2, channels, side, side + 1, seed=seed)
    for found, matrix in (
        (cam.eigen_cam(a, centered=centered), a),
        (cam.eigen_grad_cam(a, g, centered=centered), a * g),
    ):
        points = matrix.double().flatten(2).transpose(1, 2)
        points = points - points.mean(1, keepdim=True) if centered else points
        u, s, _ = torch.linalg.svd(points, full_matrices=False)
        if float((s[:, 0] / s[:, 1].clamp_min(1e-9)).min()) < 1.01:
            continue  # two first components: any mixture of them is right
        expected = (u[..., 0] * s[:, :1]).view(2, side, side + 1)
        sign = (found.double() * expected).flatten(1).sum(1).sign().view(2, 1, 1)
        torch.testing.assert_close(found.double(), sign * expected, rtol=1e-4, atol=1e-5)


def test_the_sign_of_components_is_that_of_the_evidence() -> None:
    a, g = tensors(4, 5, 6, 6)
    assert bool((cam.eigen_cam(a.relu()).flatten(1) >= -1e-5).all())  # what is nowhere negative has such a component
    agreement = (cam.eigen_grad_cam(a, g) * cam.hires_cam(a, g)).flatten(1).sum(1)
    assert bool((agreement > 0).all())
    torch.testing.assert_close(cam.eigen_grad_cam(a, -g), -cam.eigen_grad_cam(a, g), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["sigmoid", "rbf", "linear"])
def test_kpca_cam_is_scikit_learns_kernel_pca(kernel: str) -> None:
    a, _ = tensors(2, 7, 4, 5)
    found = cam.kpca_cam(a, kernel=kernel, gamma=0.03)
    for i in range(2):
        points = a[i].flatten(1).T.double()
        points = points - points.mean(0)
        expected = KernelPCA(1, kernel=kernel, gamma=0.03).fit_transform(points.numpy())[:, 0]
        torch.testing.assert_close(
            found[i].flatten().double().abs(), torch.tensor(expected).abs(), rtol=1e-4, atol=1e-4
        )
    own = cam.kpca_cam(a, kernel=lambda x, y: x @ y.mT)
    torch.testing.assert_close(own, cam.kpca_cam(a, kernel="linear"))
    torch.testing.assert_close(own, cam.eigen_cam(a, centered=True) * _agree(own, cam.eigen_cam(a, centered=True)),
                               rtol=1e-3, atol=1e-4)  # fmt: skip
    with pytest.raises(ValueError, match="'cubic'"):
        cam.kpca_cam(a, kernel="cubic")


def _agree(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).flatten(1).sum(1).sign().view(-1, 1, 1)


def test_fem_counts_channels_where_they_are_unusually_strong() -> None:
    a = torch.ones(1, 2, 4, 4)
    a[0, 0, 1, 2] = 9
    a[0, 1] = torch.randn(4, 4).clamp(-1, 1)
    expected = torch.zeros(1, 4, 4)
    expected[0, 1, 2] = a[0, 0].mean()
    torch.testing.assert_close(cam.fem(a, k=2.0), expected)


def test_shapley_cam_subtracts_half_the_curvature() -> None:
    a, g = tensors(2, 3, 4, 5)
    h, _ = tensors(2, 3, 4, 5, seed=1)
    assert torch.equal(cam.shapley_cam(a, g, torch.zeros_like(a)), cam.grad_cam(a, g))
    torch.testing.assert_close(cam.shapley_cam(a, g, h), cam.grad_cam(a, g - h / 2))


def test_full_grad_scales_each_term_and_adds() -> None:
    terms = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
    expected = torch.zeros(2, 8, 8)
    for term in terms:
        for i in range(2):
            size = term[i].abs()
            size = (size - size.min()) / (size.max() - size.min())
            expected[i] += resize(size[None], (8, 8))[0].sum(0)
    torch.testing.assert_close(cam.full_grad(terms, (8, 8)), expected)
    with pytest.raises(ValueError, match="at least one term"):
        cam.full_grad([], (8, 8))


def test_guided_grad_cam_is_the_product() -> None:
    a, g = tensors(2, 3, 4, 4)
    guided = torch.randn(2, 2, 8, 8)
    product = guided * resize(cam.grad_cam(a, g).relu()[:, None], (8, 8))
    torch.testing.assert_close(cam.guided_grad_cam(a, g, guided, channels=True), product)
    torch.testing.assert_close(cam.guided_grad_cam(a, g, guided), product.sum(1))


def test_attention_rollout_reads_the_class_token_or_all_rows() -> None:
    weights = [torch.rand(2, 3, 5, 5).softmax(-1) for _ in range(2)]
    plain, classed = cam.Layout("tokens", grid=(5,)), cam.Layout("tokens", grid=(2, 2), prefix=1)
    for heads, join in (("mean", lambda w: w.mean(1)), ("max", lambda w: w.amax(1)), ("min", lambda w: w.amin(1))):
        rollout = torch.eye(5)
        for w in weights:
            mixed = 0.3 * torch.eye(5) + 0.7 * join(w)
            rollout = (mixed / mixed.sum(-1, keepdim=True)) @ rollout
        found = cam.attention_rollout(weights, classed, heads=heads, residual=0.3)
        torch.testing.assert_close(found, rollout[:, 0, 1:].reshape(2, 2, 2))
        found = cam.attention_rollout(weights, plain, heads=heads, residual=0.3)
        torch.testing.assert_close(found, rollout.mean(1))
    with pytest.raises(ValueError, match="'sum'"):
        cam.attention_rollout(weights, plain, heads="sum")
    with pytest.raises(ValueError, match="no attention weights"):
        cam.attention_rollout([], plain)
    with pytest.raises(ValueError, match="no attention gradients"):
        cam.legrad([], plain)


def test_wrong_tensors_are_told() -> None:
    a, g = tensors(2, 3, 4, 5)
    for arguments, text in [
        ((a, None), "run the backward pass while the probe is attached"),
        ((a, (g,)), "take the tensor out of what the layer returned"),
        ((a, g[:1]), r"\(2, 3, 4, 5\) and \(1, 3, 4, 5\)"),
        ((a[..., 0, 0], g[..., 0, 0]), "same shape"),
        ((a.long(), g), "floating point, not torch.int64"),
    ]:
        with pytest.raises(ValueError, match=text):
            cam.grad_cam(*arguments)
    with pytest.raises(ValueError, match=r"weight \[B, C\] = \(2, 3\), not \(3,\)"):
        cam.cam(a, torch.zeros(3))
    with pytest.raises(ValueError, match="at least one sample"):
        cam.smooth_grad_cam_pp(a, lambda noise: g, samples=0)


def test_half_precision_tensors_are_summed_in_float32() -> None:
    a, g = (each.bfloat16() for each in tensors(2, 64, 8, 8))
    assert cam.grad_cam(a, g).dtype == torch.float32
    torch.testing.assert_close(cam.grad_cam(a, g), cam.grad_cam(a.float(), g.float()))
    assert cam.grad_cam(a.double(), g.double()).dtype == torch.float64


def test_smooth_grad_cam_pp_without_noise_is_grad_cam_pp() -> None:
    a, g = tensors(2, 3, 4, 5)
    asked: list[float] = []

    def gradient(noise: float) -> Tensor:
        asked.append(noise)
        return g

    found = cam.smooth_grad_cam_pp(a.relu(), gradient, samples=3, noise=0.2)
    torch.testing.assert_close(found, cam.grad_cam_pp(a.relu(), g))
    assert asked == [0.2] * 3


def test_smooth_grad_cam_pp_averages_powers() -> None:
    a, _ = tensors(2, 3, 4, 5)
    gradients = [torch.randn_like(a) for _ in range(4)]
    supply = iter(gradients)
    one, two, three = (torch.stack([g**p for g in gradients]).mean(0) for p in (1, 2, 3))
    alpha = two / (2 * two + three * a.relu().sum((2, 3), keepdim=True))
    expected = ((alpha * one.relu()).sum((2, 3))[:, :, None, None] * a.relu()).sum(1)
    found = cam.smooth_grad_cam_pp(a.relu(), lambda noise: next(supply), samples=4)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
