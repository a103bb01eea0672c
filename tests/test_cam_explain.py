"""`cam.explain`: right on any model, leaves it alone, says what is wrong."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from probe import Kind, NoSuchLayer, Probe, cam

LAYER_METHODS: dict[str, Callable[..., Tensor]] = {
    "cam": cam.cam,
    "grad_cam": cam.grad_cam,
    "grad_cam_pp": cam.grad_cam_pp,
    "grad_cam_pp official": partial(cam.grad_cam_pp, official=True),
    "smooth_grad_cam_pp": partial(cam.smooth_grad_cam_pp, samples=2),
    "xgrad_cam": cam.xgrad_cam,
    "layer_cam": cam.layer_cam,
    "hires_cam": cam.hires_cam,
    "grad_cam_elementwise": cam.grad_cam_elementwise,
    "score_cam": cam.score_cam,
    "score_cam official": partial(cam.score_cam, official=True),
    "ss_cam": partial(cam.ss_cam, samples=2),
    "is_cam": partial(cam.is_cam, steps=2),
    "ablation_cam": cam.ablation_cam,
    "eigen_cam": cam.eigen_cam,
    "eigen_grad_cam": cam.eigen_grad_cam,
    "kpca_cam": cam.kpca_cam,
    "fem": cam.fem,
    "shapley_cam": cam.shapley_cam,
    "finer_cam": cam.finer_cam,
    "full_grad": cam.full_grad,
    "guided_grad_cam": cam.guided_grad_cam,
}
ATTENTION_METHODS = {"attention_rollout": cam.attention_rollout, "legrad": cam.legrad}
ALL_METHODS = LAYER_METHODS | ATTENTION_METHODS
RANDOM = {"smooth_grad_cam_pp", "ss_cam"}

quiet = pytest.mark.filterwarnings(
    "ignore:.*nowhere positive.*:UserWarning",
    "ignore:.*is zero (for|everywhere).*:UserWarning",
    "ignore:.*train mode.*:UserWarning",
    "ignore:.*is not the average.*:UserWarning",
    "ignore:FullGrad.*train mode.*:UserWarning",
)


class Net(nn.Module):
    """A CNN with everything that goes wrong elsewhere: in-place ReLUs, batch norm, dropout, pooling by function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.bn(self.conv1(x))), 2)
        return self.fc(self.drop(self.act(self.conv2(x)).mean((2, 3))))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A tiny vision transformer with a class token."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.ModuleList([Block(8) for _ in range(depth)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def model_for(method: str) -> tuple[nn.Module, Tensor, str | None]:
    if method in ATTENTION_METHODS:
        return Vit().eval(), torch.randn(3, 2, 12, 8), None
    return Net().eval(), torch.randn(3, 2, 8, 6), "act"


def fingerprint(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook")
    return {
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "cache": torch.is_autocast_cache_enabled(),
        "attributes": [
            {key: id(value) for key, value in vars(m).items() if key != "_buffers"} for m in model.modules()
        ],
        "training": [m.training for m in model.modules()],
        "hooks": [[dict(h) if isinstance(h := getattr(m, key), dict) else h for key in hooks] for m in model.modules()],
        "buffers": [(name, id(b), b.tolist()) for name, b in model.named_buffers()],
        "parameters": [
            (name, id(p), p.requires_grad, p.tolist(), None if p.grad is None else (id(p.grad), p.grad.tolist()))
            for name, p in model.named_parameters()
        ],
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = fingerprint(model)
    try:
        yield
    finally:
        after = fingerprint(model)
        changed = [key for key in before if before[key] != after[key]]
        assert not changed


def unsettle(model: nn.Module) -> None:
    """Give the model what explaining it might disturb: gradients, a frozen half, a mixture of modes, user hooks."""
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn_like(parameter)
        parameter.requires_grad_(i % 3 != 0)
    list(model.modules())[-1].register_forward_hook(lambda module, args, output: None)


# -- the model is left alone -------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_model_is_the_same_after_every_method(method: str, mode: str) -> None:
    """Gradients, flags, modes, buffers, hooks, attributes and random numbers are those from before."""
    model, x, layer = model_for(method)
    unsettle(model)
    model.train(mode == "train")
    with unchanged(model):
        cam.explain(model, x, layer=layer, target=1, method=ALL_METHODS[method])


@quiet
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_model_is_the_same_when_the_forward_raises(method: str, after: int) -> None:
    """Also when the forward raises, at the first run or a later one."""
    model, x, layer = model_for(method)
    unsettle(model)
    model.train()
    runs = 0

    def explode(module: nn.Module, args: Any) -> None:
        nonlocal runs
        runs += 1
        if runs > after:
            raise KeyboardInterrupt

    list(model.children())[-1].register_forward_pre_hook(explode)
    with unchanged(model):
        try:
            cam.explain(model, x, layer=layer, target=1, method=ALL_METHODS[method], batch_size=2)
        except KeyboardInterrupt:
            assert runs == after + 1
        else:
            assert runs <= after


def test_the_model_is_the_same_when_the_target_or_the_method_raises() -> None:
    model, x, _ = model_for("grad_cam")

    def method(activation: Tensor, gradient: Tensor) -> Tensor:
        raise RuntimeError("mine")

    for options in ({"target": lambda output: 1 / 0}, {"method": method}, {"target": 99}, {"layer": "nowhere"}):
        with unchanged(model), pytest.raises((ZeroDivisionError, RuntimeError, IndexError, NoSuchLayer)):
            cam.explain(model, x, **{"layer": "act", **options})


@quiet
def test_a_training_step_under_way_is_not_disturbed() -> None:
    """Explaining between forward and backward leaves the graph valid and its gradients the same."""
    model, x, _ = model_for("grad_cam")
    model.train()
    loss = model(x).square().sum()
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    cam.explain(model, x, layer="act", target=0)
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True) if p.grad is not None)


@quiet
def test_autocast_weights_cached_while_explaining_do_not_starve_the_training_step() -> None:
    model, x, _ = model_for("grad_cam")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cam.explain(model, x, layer="act", target=0)
        model(x).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# -- properties --------------------------------------------------------------------------------------------------------


@quiet
@settings(deadline=None, max_examples=25)
@given(st.permutations(range(3)), st.sampled_from(sorted(set(ALL_METHODS) - RANDOM)))
def test_maps_follow_the_order_of_the_batch(order: list[int], method: str) -> None:
    model, x, layer = model_for(method)
    target = torch.tensor([0, 2, 1])
    maps = cam.explain(model, x, layer=layer, target=target, method=ALL_METHODS[method])
    again = cam.explain(model, x[order], layer=layer, target=target[order], method=ALL_METHODS[method])
    torch.testing.assert_close(again, maps[order], rtol=1e-4, atol=1e-5)


@quiet
@pytest.mark.parametrize("method", sorted(set(ALL_METHODS) - RANDOM))
def test_a_batch_is_its_samples_one_by_one(method: str) -> None:
    model, x, layer = model_for(method)
    maps = cam.explain(model, x, layer=layer, target=[0, 1, 2], method=ALL_METHODS[method])
    for i in range(3):
        alone = cam.explain(model, x[i : i + 1], layer=layer, target=i, method=ALL_METHODS[method])
        torch.testing.assert_close(alone[0], maps[i], rtol=1e-4, atol=1e-5)


@quiet
@settings(deadline=None, max_examples=25)
@given(st.floats(-8, 8).filter(lambda factor: abs(factor) > 1e-3))
def test_scaling_the_score_scales_grad_cam(factor: float) -> None:
    model, x, layer = model_for("grad_cam")
    maps = cam.explain(model, x, layer=layer, target=lambda output: output[:, 1])
    scaled = cam.explain(model, x, layer=layer, target=lambda output: factor * output[:, 1])
    torch.testing.assert_close(scaled, factor * maps, rtol=1e-4, atol=1e-6)


@quiet
@pytest.mark.parametrize("method", sorted(RANDOM))
def test_methods_that_draw_give_the_same_map_from_the_same_seed(method: str) -> None:
    model, x, _ = model_for(method)
    one, two = (cam.explain(model, x, layer="relu", target=1, method=ALL_METHODS[method]) for _ in range(2))
    assert torch.equal(one, two)
    torch.rand(1)
    assert not torch.equal(one, cam.explain(model, x, layer="relu", target=1, method=ALL_METHODS[method]))


@quiet
@pytest.mark.parametrize("method", ALL_METHODS)
def test_maps_have_the_layers_size_in_float32_and_no_graph(method: str) -> None:
    model, x, layer = model_for(method)
    maps = cam.explain(model, x, layer=layer, target=1, method=ALL_METHODS[method])
    size = {"full_grad": (8, 6), "guided_grad_cam": (8, 6)}.get(method, (3, 2) if layer is None else (4, 3))
    assert maps.shape == (3, *size)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad


# -- perturbation, against loops written out ---------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_score_cam_is_a_loop_over_masked_inputs(batch_size: int) -> None:
    model, x, layer = model_for("score_cam")
    with torch.no_grad():
        a = F.relu(model.conv2(F.max_pool2d(F.relu(model.bn(model.conv1(x))), 2)))
        logits, probabilities = torch.zeros(3, 5), torch.zeros(3, 5)
        for b in range(3):
            for k in range(5):
                mask = F.interpolate(a[b : b + 1, k : k + 1], x.shape[2:], mode="bilinear", align_corners=False)
                span = mask.max() - mask.min()
                mask = (mask - mask.min()) / span if span else mask * 0
                output = model(x[b : b + 1] * mask)[0]
                logits[b, k], probabilities[b, k] = output[b], output.softmax(0)[b] if span else 0.0
        paper = (logits.softmax(1)[:, :, None, None] * a).sum(1)
        official = (probabilities[:, :, None, None] * a).sum(1)
    options = {"layer": layer, "target": [0, 1, 2], "batch_size": batch_size}
    torch.testing.assert_close(cam.explain(model, x, method=cam.score_cam, **options), paper)
    torch.testing.assert_close(cam.explain(model, x, method=partial(cam.score_cam, official=True), **options), official)


@quiet
@pytest.mark.parametrize("method", [cam.score_cam, cam.ablation_cam])
def test_of_one_chunk_nothing_is_left_when_the_next_one_runs(method: Callable[..., Tensor]) -> None:
    model, x, layer = model_for(method.__name__)
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        alive.append(sum(each() is not None for each in seen))
        seen.extend(weakref.ref(each) for each in (args[0], output) if each is not x)

    model.register_forward_hook(note)
    cam.explain(model, x, layer=layer, target=1, method=method, batch_size=2)
    assert len(alive) > 6
    assert max(alive) <= 1  # the logits of the first run, unchanged


@quiet
def test_is_cam_averages_scores_of_masks_that_fade_in() -> None:
    model, x, layer = model_for("is_cam")
    with torch.no_grad():
        a = F.relu(model.conv2(F.max_pool2d(F.relu(model.bn(model.conv1(x))), 2)))
        masks = F.interpolate(a, x.shape[2:], mode="bilinear", align_corners=False)
        low, high = masks.flatten(2).amin(2)[..., None, None], masks.flatten(2).amax(2)[..., None, None]
        masks = (masks - low) / torch.where(high > low, high - low, 1)
        scores = torch.stack(
            [sum(model(x * (i / 4) * masks[:, k : k + 1])[:, 1] for i in (1, 2, 3, 4)) / 4 for k in range(5)], 1
        )
        expected = (scores.softmax(1)[:, :, None, None] * a).sum(1)
    found = cam.explain(model, x, layer=layer, target=1, method=partial(cam.is_cam, steps=4))
    torch.testing.assert_close(found, expected)


def ablated_by_hand(head: Callable[[Tensor], Tensor], a: Tensor, target: list[int]) -> Tensor:
    rows = torch.arange(len(a))
    y = head(a)[rows, target]
    weights = torch.zeros(a.shape[:2])
    for k in range(a.shape[1]):
        without = a.clone()
        without[:, k] = 0
        weights[:, k] = (y - head(without)[rows, target]) / y
    return (weights[:, :, None, None] * a).sum(1)


@quiet
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_ablation_cam_is_a_loop_over_channels(batch_size: int) -> None:
    model, x, _ = model_for("ablation_cam")
    with torch.no_grad():
        a = model.conv2(F.max_pool2d(F.relu(model.bn(model.conv1(x))), 2))
        expected = ablated_by_hand(lambda a: model.fc(F.relu(a).mean((2, 3))), a, [0, 1, 2])
    found = cam.explain(model, x, layer="conv2", target=[0, 1, 2], method=cam.ablation_cam, batch_size=batch_size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class Residual(nn.Module):
    """The layer sits in a residual branch: part of the trunk goes around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.branch(x)
        y += x
        return self.fc(y.mean((2, 3)))


class Concatenated(Residual):
    """What goes around the layer is concatenated: it can't be broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(torch.cat([self.branch(x), x], 1).mean((2, 3)))


@quiet
@pytest.mark.parametrize(
    ("model", "layer", "trunk_rows"),
    [(Net, "conv2", 3 + 0), (Residual, "branch", 3 + 1 + 3), (Concatenated, "branch", 3 + 1 + 3 * 4)],
)
def test_ablation_runs_as_little_of_the_trunk_as_is_right(
    model: Callable[[], nn.Module], layer: str, trunk_rows: int
) -> None:
    """Nothing behind a cut, one sample a chunk around a residual branch, everything where tensors are concatenated."""
    m, x = model().eval(), torch.randn(3, 2, 8, 6)
    counted = 0

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal counted
        counted += len(output)

    handle = next(m.children()).register_forward_hook(count)
    found = cam.explain(m, x, layer=layer, target=1, method=cam.ablation_cam)
    handle.remove()
    assert counted == trunk_rows
    a: list[Tensor] = []
    m.get_submodule(layer).register_forward_hook(lambda module, args, output: a.append(output.clone()) or None)
    with torch.no_grad():
        m(x)
        values = a[0]

        def head(value: Tensor) -> Tensor:
            handle = m.get_submodule(layer).register_forward_hook(lambda module, args, output: value.clone())
            try:
                return m(x)
            finally:
                handle.remove()

        expected = ablated_by_hand(head, values, [1, 1, 1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@quiet
def test_no_forward_has_more_rows_than_batch_size() -> None:
    model, x, layer = model_for("score_cam")
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    cam.explain(model, x[:1], layer=layer, method=cam.score_cam, batch_size=2)
    assert rows == [1, 2, 2, 1]


@quiet
def test_a_function_as_target_always_gets_whole_batches() -> None:
    model, x, layer = model_for("score_cam")
    shapes: set[tuple[int, ...]] = set()

    def target(output: Tensor) -> Tensor:
        shapes.add(tuple(output.shape))
        return output[range(3), [0, 1, 2]]

    for method in (cam.score_cam, cam.ablation_cam):
        found = cam.explain(model, x, layer=layer, target=target, method=method, batch_size=7)
        torch.testing.assert_close(found, cam.explain(model, x, layer=layer, target=[0, 1, 2], method=method))
    assert shapes == {(3, 3)}


@quiet
def test_methods_that_compare_scores_need_one_for_each_sample() -> None:
    model, x, layer = model_for("score_cam")
    for method in (cam.score_cam, cam.ablation_cam):
        with pytest.raises(ValueError, match=r"return \[B\] scores"):
            cam.explain(model, x, layer=layer, target=lambda output: output.sum(), method=method)
    with pytest.raises(ValueError, match="target= as an int"):
        cam.explain(
            model, x, layer=layer, target=lambda output: output[:, 0], method=partial(cam.score_cam, official=True)
        )


@quiet
def test_progress_shows_a_bar_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model, x, layer = model_for("score_cam")
    cam.explain(model, x[:1], layer=layer, method=cam.score_cam, progress=True)
    assert "score_cam" in capsys.readouterr().err
    cam.explain(model, x[:1], layer=layer, method=cam.score_cam)
    assert capsys.readouterr().err == ""


# -- speed and memory --------------------------------------------------------------------------------------------------


@quiet
def test_one_forward_is_enough_and_nothing_before_the_layer_is_saved_for_backward() -> None:
    model, x, _ = model_for("grad_cam")
    runs: list[int] = []
    model.conv1.register_forward_hook(lambda module, args, output: runs.append(1))
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        cam.explain(model, x, layer="conv2", target=0)
    assert runs == [1]
    assert saved
    assert not [shape for shape in saved if shape in ((3, 4, 8, 6), (3, 4, 4, 3), (3, 2, 8, 6))]


# -- gradient modes, precision, compilation ----------------------------------------------------------------------------


@quiet
def test_frozen_parameters_no_grad_and_inference_mode_give_the_same_maps() -> None:
    model, x, layer = model_for("grad_cam")
    expected = cam.explain(model, x, layer=layer, target=1)
    model.requires_grad_(False)
    assert torch.equal(cam.explain(model, x, layer=layer, target=1), expected)
    with torch.no_grad():
        assert torch.equal(cam.explain(model, x, layer=layer, target=1), expected)
    with torch.inference_mode():
        assert torch.equal(cam.explain(model, x.clone(), layer=layer, target=1), expected)


@quiet
@pytest.mark.parametrize("method", sorted(set(LAYER_METHODS) - {"kpca_cam"}))
def test_half_precision_models_are_explained_in_float32(method: str) -> None:
    """bfloat16 weights, and autocast: the sums run in float32, so the maps are near those of the float32 model."""
    model, x, layer = model_for(method)
    twin = copy.deepcopy(model).bfloat16()
    maps = cam.explain(twin, x.bfloat16(), layer=layer, target=1, method=LAYER_METHODS[method])
    assert maps.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = cam.explain(model, x, layer=layer, target=1, method=LAYER_METHODS[method])
    assert automatic.dtype == torch.float32
    expected = cam.explain(model, x, layer=layer, target=1, method=LAYER_METHODS[method])
    if method not in RANDOM | {"fem", "eigen_cam", "eigen_grad_cam", "ss_cam"}:  # a threshold or a sign may flip
        for found in (maps, automatic):
            assert float((found - expected).abs().max()) < 0.1 * float(expected.abs().max()) + 1e-3


def test_maths_under_autocast_is_exact_on_stored_tensors() -> None:
    a, g = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4)
    for method in (cam.grad_cam, cam.grad_cam_pp, cam.eigen_grad_cam):
        expected = method(a, g)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(method(a, g), expected)


@quiet
def test_a_function_inside_the_model_that_is_compiled_runs_eagerly() -> None:
    """The model's own modules are not compiled, and nothing is said: but hooks would not fire in that function."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(2, 3, 8, 8)
    expected = cam.explain(model, x, layer="0", target=1)
    forward = torch.compile(model.forward, backend="eager")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    outer = Outer()
    outer(x)
    torch.testing.assert_close(cam.explain(outer, x, layer="inner.0", target=1), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_layer_is_refused() -> None:
    model = nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(TypeError, match="'0': torch puts no hooks on ScriptModules"):
        cam.explain(model, torch.randn(2, 3, 8, 8), layer="0", target=1)


@quiet
@pytest.mark.parametrize("method", [cam.grad_cam, cam.ablation_cam, cam.score_cam, cam.guided_grad_cam])
def test_a_compiled_model_runs_eagerly_and_says_so_once(method: Callable[..., Tensor]) -> None:
    model, x, layer = model_for("grad_cam")
    expected = cam.explain(model, x, layer=layer, target=1, method=method)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    with pytest.warns(UserWarning, match="compiled; it runs eagerly") as caught:
        found = cam.explain(compiled, x, layer=layer, target=1, method=method, batch_size=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    said = [each for each in caught if "compiled" in str(each.message)]
    assert [each.filename for each in said] == [__file__]


class Backbone(nn.Module):
    """Switches gradients off for its own trunk, the layer to explain included."""

    def __init__(self, net: Net, guard: Callable[[], Any]) -> None:
        super().__init__()
        self.net, self.guard = net, guard

    def forward(self, x: Tensor) -> Tensor:
        with self.guard():
            x = F.max_pool2d(self.net.relu(self.net.bn(self.net.conv1(x))), 2)
            x = self.net.conv2(x)
        return self.net.fc(self.net.act(x).mean((2, 3)))


@quiet
def test_a_model_that_switches_gradients_off_in_its_trunk_is_explained() -> None:
    model, x, _ = model_for("grad_cam")
    expected = cam.explain(model, x, layer="conv2", target=1)
    found = cam.explain(Backbone(model, torch.no_grad).eval(), x, layer="net.conv2", target=1)
    torch.testing.assert_close(found, expected)


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(checkpoint(self.body, x, use_reentrant=False).mean((2, 3)))

    def body(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(F.max_pool2d(self.relu(self.bn(self.conv1(x))), 2)))


@quiet
def test_activation_checkpointing_around_the_layer() -> None:
    plain = Net().eval()
    model = Checkpointed().eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(3, 2, 8, 6)
    expected = cam.explain(plain, x, layer="conv2", target=1)
    torch.testing.assert_close(cam.explain(model, x, layer="conv2", target=1), expected)


# -- layers ------------------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("method", ["grad_cam", "ablation_cam", "shapley_cam"])
def test_several_layers_are_explained_by_one_run_as_each_alone(method: str) -> None:
    model, x, _ = model_for(method)
    layers = ["conv2", "conv1", "act"]
    runs: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    several = cam.explain(model, x, layer=layers, target=1, method=LAYER_METHODS[method])
    handle.remove()
    assert isinstance(several, list)
    assert method == "ablation_cam" or runs == [3]
    for layer, maps in zip(layers, several, strict=True):
        alone = cam.explain(model, x, layer=layer, target=1, method=LAYER_METHODS[method])
        torch.testing.assert_close(maps, alone, rtol=1e-4, atol=1e-6)


@quiet
def test_layers_are_given_by_name_module_or_at() -> None:
    model, x, _ = model_for("grad_cam")
    maps = [cam.explain(model, x, layer=layer, target=1) for layer in ("conv2", model.conv2, cam.At("conv2"))]
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


def test_an_unknown_layer_is_an_error_with_the_nearest_name() -> None:
    model, x, _ = model_for("grad_cam")
    with pytest.raises(NoSuchLayer, match=r"conv3.*did you mean 'conv[12]'"):
        cam.explain(model, x, layer="conv3")
    with pytest.raises(ValueError, match="matches 2 layers"):
        cam.explain(model, x, layer="conv*")
    with pytest.raises(TypeError, match=r"a layer is a name, a module or cam\.At"):
        cam.explain(model, x, layer=3)
    with pytest.raises(ValueError, match="names no layer"):
        cam.explain(model, x, layer=[])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused, self.fc = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.conv(x))
        return self.fc(x.mean((2, 3)))


@quiet
def test_a_layer_called_several_times_needs_call() -> None:
    model, x = Recurrent().eval(), torch.randn(2, 2, 5, 5)
    with pytest.raises(ValueError, match=r"'conv' was called 3 times.*call=0 to call=2"):
        cam.explain(model, x, layer="conv", target=0)
    with pytest.raises(ValueError, match="call=3 of layer 'conv': it was called 3 times"):
        cam.explain(model, x, layer="conv", target=0, call=3)
    value = model.conv(torch.tanh(model.conv(x))).detach().requires_grad_()
    y = model.fc(torch.tanh(model.conv(torch.tanh(value))).mean((2, 3)))[:, 0].sum()
    expected = cam.grad_cam(value.detach(), torch.autograd.grad(y, value)[0])
    torch.testing.assert_close(cam.explain(model, x, layer="conv", target=0, call=1), expected)
    with torch.no_grad():
        expected = ablated_by_hand(
            lambda a: model.fc(torch.tanh(model.conv(torch.tanh(a))).mean((2, 3))), value.detach(), [0, 0]
        )
    found = cam.explain(model, x, layer="conv", target=0, call=1, method=cam.ablation_cam)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_layer_that_is_not_called_or_has_no_influence_is_an_error() -> None:
    model, x = Recurrent().eval(), torch.randn(2, 2, 5, 5)
    with pytest.raises(ValueError, match="'unused' was not called"):
        cam.explain(model, x, layer="unused", target=0)
    with pytest.raises(ValueError, match=r"does not depend on layer 'conv2'.*cut"):
        cam.explain(Net().eval(), torch.randn(2, 2, 8, 6), layer="conv2", target=lambda output: output.detach()[:, 0])


def test_no_layer_chooses_the_last_one_with_space_and_says_which() -> None:
    model, x, _ = model_for("grad_cam")
    with pytest.warns(UserWarning, match="explaining 'act'"):
        found = cam.explain(model, x, target=1, method=cam.layer_cam)
    assert torch.equal(found, cam.explain(model, x, layer="act", target=1, method=cam.layer_cam))


@quiet
def test_no_layer_passes_over_a_container_that_ends_in_a_pooling() -> None:
    """Whether the convolutions stand in a container or not, the map is that from before the pooling."""
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    model = nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    with pytest.warns(UserWarning, match=r"explaining '0\.1'"):
        assert cam.explain(model, torch.randn(2, 2, 8, 8), target=1).shape == (2, 6, 6)


def test_no_layer_of_a_vit_is_the_last_blocks_first_norm() -> None:
    model, x = Vit().eval(), torch.randn(3, 2, 12, 8)
    with pytest.warns(UserWarning, match=r"explaining 'blocks\.1\.norm1'"):
        cam.explain(model, x, target=1, method=cam.layer_cam)


def test_no_layer_passes_over_one_whose_gradient_is_zero() -> None:
    class Dead(Net):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(5, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.conv2(self.conv1(x)))
            return self.fc((x + 0 * self.last(x)).mean((2, 3)))

    with pytest.warns(UserWarning, match="explaining 'act'"):
        cam.explain(Dead().eval(), torch.randn(2, 2, 8, 6), target=1, method=cam.layer_cam)


def test_warnings_point_at_the_callers_line() -> None:
    model, x, _ = model_for("grad_cam")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cam.explain(model.train(), x, target=1, method=cam.layer_cam)
    assert {warning.filename for warning in caught} == {__file__}
    assert len([w for w in caught if "train mode" in str(w.message)]) == 1


# -- nested outputs ----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    hidden: Tensor
    logits: Tensor


class Nested(nn.Module):
    """A layer and a model that return more than a tensor."""

    def __init__(self, layer_output: Callable[[Tensor], Any], output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = Wrap(layer_output)
        self.fc, self.output = nn.Linear(5, 3), output

    def forward(self, x: Tensor) -> Any:
        value = self.layer(x)
        for step in ("maps", 0):
            if not isinstance(value, Tensor):
                try:
                    value = value[step]
                except (KeyError, TypeError):
                    continue
        return self.output(self.fc(torch.relu(value).mean((2, 3))))


class Wrap(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(2, 5, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.conv(x))


@quiet
@pytest.mark.parametrize(
    "layer_output", [lambda a: a, lambda a: (a, None, "kept"), lambda a: {"maps": a, "other": 3}, lambda a: [a]]
)
@pytest.mark.parametrize(
    "output",
    [
        lambda y: y,
        lambda y: (y, y[:, :1]),
        lambda y: {"logits": y, "aux": y * 2},
        lambda y: {"aux": y * 2, "out": y},
        lambda y: Result(torch.zeros(len(y), 7), y),
    ],
)
def test_layers_and_models_may_return_nested_values(layer_output: Callable, output: Callable) -> None:
    x = torch.randn(2, 2, 6, 6)
    plain = Nested(lambda a: a, lambda y: y).eval()
    nested = Nested(layer_output, output).eval()
    nested.load_state_dict(plain.state_dict())
    for method in (cam.grad_cam, cam.ablation_cam):
        expected = cam.explain(plain, x, layer="layer", target=[2, 1], method=method)
        torch.testing.assert_close(cam.explain(nested, x, layer="layer", target=[2, 1], method=method), expected)


@quiet
def test_which_of_several_tensors_is_said_by_path() -> None:
    model = Nested(lambda a: {"maps": a, "half": a[:, :, ::2, ::2]}, lambda y: y).eval()
    x = torch.randn(2, 2, 6, 6)
    with pytest.raises(ValueError, match=r"several tensors.*path='\.maps'"):
        cam.explain(model, x, layer="layer", target=0)
    assert cam.explain(model, x, layer=cam.At("layer", path=".maps"), target=0).shape == (2, 4, 4)
    with pytest.raises(ValueError, match=r"no float tensor at '\.map'"):
        cam.explain(model, x, layer=cam.At("layer", path=".map"), target=0)


@quiet
def test_inputs_by_name_and_several_inputs() -> None:
    class Two(Net):
        def forward(self, image: Tensor, scale: Tensor, *, shift: float = 0.0) -> Tensor:  # type: ignore[override]
            return super().forward(image * scale[:, None, None, None] + shift)

    model, x, scale = Two().eval(), torch.randn(3, 2, 8, 6), torch.rand(3) + 0.5
    plain = Net().eval()
    plain.load_state_dict(model.state_dict())
    expected = cam.explain(plain, x * scale[:, None, None, None] + 0.5, layer="act", target=1)
    torch.testing.assert_close(cam.explain(model, x, scale, shift=0.5, layer="act", target=1), expected)
    torch.testing.assert_close(cam.explain(model, image=x, scale=scale, shift=0.5, layer="act", target=1), expected)
    expected = cam.explain(plain, x * scale[:, None, None, None], layer="act", target=1, method=cam.ablation_cam)
    found = cam.explain(model, x, scale=scale, layer="act", target=1, method=cam.ablation_cam)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# -- loud --------------------------------------------------------------------------------------------------------------


@quiet
def test_targets_that_make_no_sense_are_errors() -> None:
    model, x, layer = model_for("grad_cam")
    for target, error, text in [
        (3, IndexError, "class 3 is out of range.*classes 0 to 2"),
        (-1, IndexError, "class -1 is out of range"),
        ([0, 1], ValueError, "2 targets for a batch of 3"),
        (torch.tensor([0, 1, 2, 0]), ValueError, "4 targets for a batch of 3"),
        ("dog", TypeError, "'dog'"),
        (True, TypeError, "True"),
        ([0.5, 1, 2], TypeError, "0.5"),
        (torch.zeros(3), TypeError, "float32"),
        (lambda output: 3.0, TypeError, "not float"),
        (lambda output: output, ValueError, r"returned \(3, 3\)"),
    ]:
        with pytest.raises(error, match=text):
            cam.explain(model, x, layer=layer, target=target)


def test_a_zero_gradient_names_cause_and_cure() -> None:
    model, x = Vit().eval(), torch.randn(3, 2, 12, 8)
    with pytest.warns(UserWarning, match=r"zero for sample 0, 1, 2.*tokens in front.*first norm of the last block"):
        maps = cam.explain(model, x, layer="blocks.1", target=0)
    assert not maps.any()
    net = Net().eval()
    with pytest.warns(UserWarning, match="the score is flat"):
        cam.explain(net, x, layer="act", target=lambda output: output[:, 0] * 0)


def test_a_map_of_a_dead_layer_is_told() -> None:
    model, x, _ = model_for("grad_cam")
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.conv2.bias.zero_()
    with pytest.warns(UserWarning, match="map of sample 0, 1, 2 is zero everywhere: all of layer 'conv2' is zero"):
        cam.explain(model, x, layer="conv2", target=0, method=cam.fem)


def test_a_map_without_anything_positive_is_told() -> None:
    model, x, _ = model_for("grad_cam")
    with pytest.warns(UserWarning, match="nowhere positive"):
        cam.explain(model, x, layer="act", target=0, method=lambda activation: -activation.sum(1) - 1)


def test_a_map_that_is_not_finite_is_told() -> None:
    model, x, _ = model_for("grad_cam")
    x[1, 0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="sample 1 is not finite"):
        cam.explain(model, x, layer="act", target=0, method=cam.layer_cam)


def test_a_model_in_train_mode_is_told_once_and_explained_as_it_is() -> None:
    model, x, _ = model_for("grad_cam")
    model.drop.p = 0.0
    model.train()
    with pytest.warns(UserWarning, match="train mode") as caught:
        found = cam.explain(model, x, layer="act", target=0, method=cam.layer_cam)
    assert len(caught) == 1
    value = (
        F.relu(model.conv2(F.max_pool2d(F.relu(copy.deepcopy(model.bn)(model.conv1(x))), 2))).detach().requires_grad_()
    )
    g = torch.autograd.grad(model.fc(value.mean((2, 3)))[:, 0].sum(), value)[0]
    torch.testing.assert_close(found, cam.layer_cam(value.detach(), g))


def test_a_method_says_what_it_needs_by_its_parameters() -> None:
    model, x, layer = model_for("grad_cam")

    def mine(activation: Tensor, gradient: Tensor, *, power: float = 2.0) -> Tensor:
        return (activation * gradient.abs() ** power).sum(1)

    assert cam.explain(model, x, layer=layer, method=partial(mine, power=3.0)).shape == (3, 4, 3)
    with pytest.raises(TypeError, match=r"asks for 'weights'; the parameters of a method are among activation"):
        cam.explain(model, x, layer=layer, method=lambda weights: weights)
    with pytest.raises(TypeError, match="not 'grad_cam'"):
        cam.explain(model, x, layer=layer, method="grad_cam")


def test_wrong_calls_are_told_before_anything_runs() -> None:
    model, x, layer = model_for("grad_cam")
    model.register_forward_pre_hook(lambda module, args: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match="batch_size=0"):
        cam.explain(model, x, layer=layer, batch_size=0)
    with pytest.raises(TypeError, match=r"explain takes an nn\.Module"):
        cam.explain(lambda x: x, x)
    with pytest.raises(ValueError, match="needs the model's inputs"):
        cam.explain(model, layer=layer)


def test_cam_says_where_it_does_not_apply() -> None:
    model, x, _ = model_for("cam")
    with torch.no_grad():
        expected = (model.fc.weight[2][None, :, None, None] * F.relu(model.conv2(F.max_pool2d(
            F.relu(model.bn(model.conv1(x))), 2)))).sum(1)  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nowhere positive.*")
        torch.testing.assert_close(cam.explain(model, x, layer="act", target=2, method=cam.cam), expected)
        with pytest.warns(UserWarning, match="not the average of 'conv2'"):
            cam.explain(model, x, layer="conv2", target=2, method=cam.cam)
    with pytest.raises(ValueError, match="from the 4 channels of 'relu'"):
        cam.explain(model, x, layer="relu", target=2, method=cam.cam)


# -- a probe's own tensors ---------------------------------------------------------------------------------------------


@quiet
def test_methods_work_on_what_a_probe_stored() -> None:
    """In-place operations after the layer included: no second run is needed."""
    model, x, _ = model_for("grad_cam")
    with Probe(model, "conv2", kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT) as p:
        model(x)[:, 1].sum().backward()
    for method in (cam.grad_cam, cam.grad_cam_pp, cam.layer_cam, cam.xgrad_cam, cam.eigen_grad_cam):
        stored = method(p["conv2"].output, p["conv2"].grad_output)
        torch.testing.assert_close(stored, cam.explain(model, x, layer="conv2", target=1, method=method))


@quiet
def test_a_probe_around_an_explanation_and_one_inside() -> None:
    model, x, layer = model_for("grad_cam")
    expected = cam.explain(model, x, layer=layer, target=1)
    with Probe(model, "conv1") as p:
        assert torch.equal(cam.explain(model, x, layer=layer, target=1), expected)
    assert p["conv1"].output.shape == (3, 4, 8, 6)


# -- the whole model: FullGrad, guided back-propagation, attention -----------------------------------------------------


class Completed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_full_gradients_add_up_to_the_score() -> None:
    """Completeness: in a network of ReLUs, input and bias terms together are the score exactly."""
    model, x = Completed().eval(), torch.randn(3, 2, 8, 8)
    model.body[1].running_mean.normal_()
    model.body[1].running_var.uniform_(0.5, 2)
    terms: list[Tensor] = []

    def method(full_gradients: list[Tensor], size: tuple[int, ...]) -> Tensor:
        terms.extend(full_gradients)
        return torch.ones(3, *size)

    cam.explain(model, x, target=1, method=method)
    assert [term.shape[1] for term in terms] == [2, 4, 4, 6]
    total = sum(term.flatten(1).sum(1) for term in terms)
    torch.testing.assert_close(total, model(x)[:, 1].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inplace", [True, False])
def test_guided_backpropagation_stops_negative_gradients_at_every_relu(inplace: bool) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3), nn.ReLU(inplace)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.b(F.relu(self.relu(self.a(x)), inplace=inplace))).mean((2, 3))

    model, x = Functional().eval(), torch.randn(2, 2, 7, 7)
    seen: list[Tensor] = []

    def method(guided_gradient: Tensor, activation: Tensor) -> Tensor:
        seen.append(guided_gradient)
        return activation.sum(1)

    cam.explain(model, x, layer="a", target=1, method=method)
    z1 = model.a(x).detach().requires_grad_()
    z2 = model.b(z1.detach().relu()).detach().requires_grad_()
    g2 = torch.autograd.grad(z2.relu().mean((2, 3))[:, 1].sum(), z2)[0].relu() * (z2 > 0)
    g1 = F.conv_transpose2d(g2, model.b.weight).relu() * (z1 > 0)
    torch.testing.assert_close(seen[0], F.conv_transpose2d(g1, model.a.weight).detach())
    with pytest.raises(ValueError, match="this model has none"):
        cam.explain(nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(75, 2)).eval(), x, layer="0",
                    method=cam.guided_grad_cam)  # fmt: skip


class Attention(nn.Module):
    """Self-attention written three ways: fused, in steps, and as nn.MultiheadAttention."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "module":
            return self.inner(x, x, x, need_weights=False)[0]
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (2, 4)).transpose(1, 2)
            for w, b in zip(self.inner.in_proj_weight.chunk(3), self.inner.in_proj_bias.chunk(3), strict=True)
        )
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.inner.out_proj(y.transpose(1, 2).flatten(2))


def vit(how: str) -> Vit:
    model = Vit(3).eval()
    for block in model.blocks:
        twin = Attention(how)
        twin.inner.load_state_dict(block.attention.state_dict())
        block.attention = twin
        block.forward = partial(_block_forward, block)
    return model.eval()


def _block_forward(block: Any, x: Tensor) -> Tensor:
    x = x + block.attention(block.norm1(x))
    return x + block.mlp(block.norm2(x))


def by_hand(model: Vit, x: Tensor, target: int) -> tuple[list[Tensor], list[Tensor]]:
    """Attention weights of every block, and the gradient at them of the score read off the tokens behind that block."""
    x = torch.cat([model.token.expand(len(x), -1, -1), model.patch(x).flatten(2).transpose(1, 2)], 1)
    weights, gradients = [], []
    for block in model.blocks:
        inner = block.attention.inner
        q, k, v = F.linear(block.norm1(x), inner.in_proj_weight, inner.in_proj_bias).unflatten(-1, (3, 2, 4)).unbind(2)
        w = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / 2).softmax(-1).detach().requires_grad_()
        x = x.detach() + inner.out_proj((w @ v.transpose(1, 2)).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
        y = model.head(model.norm(x)[:, 0])[:, target].sum()
        weights.append(w.detach())
        gradients.append(torch.autograd.grad(y, w)[0])
    return weights, gradients


@pytest.mark.parametrize("how", ["module", "fused", "steps"])
@pytest.mark.parametrize("frozen", [True, False])
def test_attention_methods_agree_with_attention_written_out(how: str, frozen: bool) -> None:
    torch.manual_seed(1)
    model, x = vit(how), torch.randn(2, 2, 12, 8)
    weights, gradients = by_hand(model, x, 1)
    model.requires_grad_(not frozen)
    rollout = torch.eye(7)
    for w in weights:
        mixed = 0.5 * w.mean(1) + 0.5 * torch.eye(7)
        rollout = (mixed / mixed.sum(-1, keepdim=True)) @ rollout
    found = cam.explain(model, x, target=1, method=cam.attention_rollout)
    torch.testing.assert_close(found, rollout[:, 0, 1:].unflatten(1, (3, 2)))
    expected = sum(g.relu().mean((1, 2)) for g in gradients)[:, 1:].unflatten(1, (3, 2))
    torch.testing.assert_close(cam.explain(model, x, target=1, method=cam.legrad), expected)


@quiet
def test_curvature_goes_through_attention() -> None:
    model, x = vit("fused"), torch.randn(2, 2, 12, 8)
    curved = cam.explain(model, x, layer="blocks.1.norm1", target=1, method=cam.shapley_cam)
    assert not torch.allclose(curved, cam.explain(model, x, layer="blocks.1.norm1", target=1))


def test_attention_is_seen_where_torch_would_fuse_the_whole_encoder_layer() -> None:
    """The fast path of nn.TransformerEncoder runs no attention function; the weights are seen all the same."""

    class Encoder(Vit):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.blocks = nn.ModuleList([nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)])

    model, x = Encoder().eval(), torch.randn(2, 2, 12, 8)
    seen: list[Tensor] = []

    def method(attention: list[Tensor], size: tuple[int, ...]) -> Tensor:
        seen.extend(attention)
        return torch.ones(2, *size)

    cam.explain(model, x, target=1, method=method)
    tokens = torch.cat([model.token.expand(2, -1, -1), model.patch(x).flatten(2).transpose(1, 2)], 1)
    for layer, weights in zip(model.blocks[0].layers, seen, strict=True):
        expected = layer.self_attn(tokens, tokens, tokens, average_attn_weights=False)[1]
        torch.testing.assert_close(weights, expected.detach())
        tokens = layer(tokens)


def test_attention_methods_say_where_they_do_not_apply() -> None:
    with pytest.raises(ValueError, match="ran no self-attention"):
        cam.explain(Net().eval(), torch.randn(2, 2, 8, 6), method=cam.attention_rollout)

    class Windows(Vit):
        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2)
            return self.head(self.blocks[1](self.blocks[0](x)[:, :4]).mean(1))

    with pytest.raises(ValueError, match="the same tokens"):
        cam.explain(Windows().eval(), torch.randn(2, 2, 12, 8), method=cam.attention_rollout)


class Text(nn.Module):
    """A transformer on whole numbers, which carry no gradient and have no picture's size."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([Block(8), Block(8)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def test_attention_methods_explain_text() -> None:
    model, ids = Text().eval(), torch.randint(0, 20, (2, 7))
    x, rollout = model.embedding(ids), torch.eye(7)
    for block in model.blocks:
        y = block.norm1(x)
        rollout = (0.5 * block.attention(y, y, y)[1] + 0.5 * torch.eye(7)) @ rollout
        x = block(x)
    found = cam.explain(model, ids, target=1, method=cam.attention_rollout)
    torch.testing.assert_close(found, rollout.mean(1).detach())
    relevance = cam.explain(model, ids=ids, target=1, method=cam.legrad)
    assert relevance.shape == (2, 7)
    assert bool(relevance.any())
    with pytest.raises(ValueError, match="they are frozen"):
        cam.explain(model.requires_grad_(False), ids, target=1, method=cam.legrad)
