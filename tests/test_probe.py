"""True values and untouched models, on every family of torchvision and on the zoo."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from probe import Kind, Probe
from probe.tree import leaves
from tests import zoo

# One of every family that torchvision has for classification, at 64 px where it allows that.
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (64, {}),
    "convnext_tiny": (64, {}),
    "densenet121": (64, {}),
    "efficientnet_b0": (64, {}),
    "googlenet": (64, {"init_weights": False}),
    "inception_v3": (80, {"init_weights": False, "aux_logits": False}),
    "maxvit": (64, {}),
    "mnasnet0_5": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "regnet_x_400mf": (64, {}),
    "regnet_y_400mf": (64, {}),
    "resnet18": (64, {}),
    "resnext50_32x4d": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "squeezenet1_1": (64, {}),
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    "vgg11_bn": (64, {}),
    "vit_b_16": (64, {"image_size": 64}),
}


def _build(family: str) -> tuple[nn.Module, torch.Tensor]:
    size, options = FAMILIES[family]
    if family == "maxvit":  # maxvit_t itself takes no less than 224 px
        blocks = {"block_channels": [16, 32], "block_layers": [1, 1], "head_dim": 8, "stochastic_depth_prob": 0.2}
        model = torchvision.models.MaxVit((64, 64), 16, 4, **blocks, num_classes=7)
    else:
        model = getattr(torchvision.models, family)(weights=None, num_classes=7, **options)
    for i, layer in enumerate(model.classifier if family in ("alexnet", "vgg11_bn") else ()):
        if isinstance(layer, nn.Linear):  # nine tenths of the time would go into copying their 100 million weights
            model.classifier[i] = nn.Linear(layer.in_features if i < 2 else 32, 32 if i < 6 else 7)
    return model, torch.randn(2, 3, size, size)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    torch.manual_seed(1)  # dropout and stochastic depth draw the same numbers in every run
    out = model(*args, **kwargs)
    zoo.loss(out).backward()
    return out


def check_against_twin(model: nn.Module, *args: Any, lost: frozenset[str] = frozenset(), **kwargs: Any) -> None:
    """Bit-identical outputs, parameter gradients and buffers under all four kinds; captures equal an out-of-place twin.

    `lost` names layers whose output gradient torch itself drops; the probe must say so.
    """
    bare, twin = copy.deepcopy(model), copy.deepcopy(model)
    expected = _run(bare, args, kwargs)
    torch.manual_seed(1)
    truth = zoo.references(twin, *args, **kwargs)
    with Probe(model, lambda name, module: type(module).forward is not nn.Module.forward) as p:
        out = _run(model, args, kwargs)
    for (_, mine), (_, other) in zip(leaves(out), leaves(expected), strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(model.parameters(), bare.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, other.grad)
    assert all(map(torch.equal, model.buffers(), bare.buffers()))
    for name, calls in truth.items():
        assert len(p[name].calls) == len(calls)
        for record, (output, gradient) in zip(p[name].calls, calls, strict=True):
            assert torch.equal(record.output, output), name
            if name in lost:
                with pytest.raises(AttributeError, match="lost"):
                    _ = record.grad_output
            elif gradient is not None:
                # the twin adds gradients in another order where an in-place write is a copy, hence not bit-equal
                torch.testing.assert_close(record.grad_output, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::probe.ProbeWarning")
def test_every_torchvision_family_in_training(family: str) -> None:
    """Outputs and parameter gradients are bit-identical, captures true."""
    model, x = _build(family)
    check_against_twin(model.train(), x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["alexnet", "densenet121", "googlenet", "mobilenet_v3_small", "resnet18"])
@pytest.mark.filterwarnings("ignore::probe.ProbeWarning")
def test_outputs_are_true_in_eval_without_gradients(family: str, mode: Callable[[], Any]) -> None:
    """In eval mode, under no_grad and inference_mode, over two passes (the second takes the short way)."""
    model, x = _build(family)
    model.eval()
    with mode():
        truth = zoo.references(copy.deepcopy(model), x, backward=False)
        for kinds in (Kind.OUTPUT, Kind.INPUT | Kind.OUTPUT):
            with Probe(model, lambda name, module: name in truth, kinds=kinds) as p:
                model(x)
                model(x)
            assert all(
                torch.equal(record.output, output)
                for name, calls in truth.items()
                for record, (output, _) in zip(p[name].calls, calls, strict=True)
            )


def test_resnet18_has_17_overwritten_outputs_of_52() -> None:
    """A naive hook would have read 17 leaf outputs wrongly; the probe names them, and who wrote."""
    model = torchvision.models.resnet18(weights=None).train()
    with Probe(model) as p:
        model(torch.randn(2, 3, 64, 64))
    rows = {row.name: row for row in p.overwritten}
    assert len(p) == 52
    assert len(rows) == 17
    assert rows["bn1"].by == "relu"
    assert rows["layer1.0.bn2"].by == "an in-place operation before 'layer1.0.relu'"
    assert 0.3 < rows["bn1"].share < 0.7


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.LSTM(3, 4, num_layers=2), (5, 2, 3)),
        (nn.GRU(3, 4, bidirectional=True), (5, 2, 3)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2), (2, 5, 8)),
        (zoo.Attention(), (2, 5, 8)),
        (zoo.ConvNet(), (2, 3, 8, 8)),
        (zoo.Shared(), (2, 4)),
        (zoo.Recurrent(), (2, 3, 3)),
        (zoo.Shortcut(), (2, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore::probe.ProbeWarning")
def test_the_zoo_in_training(model: nn.Module, inputs: tuple[int, ...]) -> None:
    """Recurrent, attending, shared and residual modules."""
    check_against_twin(model.train(), torch.randn(inputs))


def test_a_hugging_face_style_model() -> None:
    """Keyword-only inputs and dict outputs."""
    ids, mask = torch.randint(0, 11, (2, 5)), torch.ones(2, 5)
    check_against_twin(zoo.HFModel().train(), input_ids=ids, attention_mask=mask)


def test_a_lost_gradient_is_told() -> None:
    """A view that is written to in place loses its hook in torch; reading it says so, and what to type."""
    check_against_twin(zoo.ViewThenWrite(), torch.randn(2, 3, 4, 4), lost=frozenset({"norm"}))


def test_exited_models_take_torchs_fast_path() -> None:
    """After the block every hook dictionary is empty, so ``Module.__call__`` skips all of its hook code."""
    model = zoo.ConvNet()
    with Probe(model):
        model(torch.randn(1, 3, 8, 8)).sum().backward()
    for module in model.modules():
        for key, value in vars(module).items():
            assert not ("hook" in key and value), key


def _objects() -> int:
    gc.collect()
    # a weak reference a probe is the fixture's that looks for leaks
    return sum(type(each) is not weakref.ref for each in gc.get_objects())


def test_a_thousand_blocks_leave_nothing() -> None:
    """Neither hooks nor objects."""
    model, x = zoo.Shared(), torch.randn(1, 4)
    before = zoo.fingerprint(model)
    for _ in range(20):
        with Probe(model):
            model(x).sum().backward()
    count = _objects()
    for _ in range(1000):
        with Probe(model):
            model(x)
    assert abs(_objects() - count) < 100
    model.zero_grad()
    assert zoo.fingerprint(model) == before


def test_memory_is_flat_over_steps() -> None:
    """With the probe attached, step after step holds as many objects as the first few."""
    model, x = zoo.ConvNet(), torch.randn(1, 3, 8, 8)
    counts = []
    with Probe(model):
        for step in range(120):
            model(x).sum().backward()
            if step in (40, 80, 119):
                counts.append(_objects())
    assert max(counts) - min(counts) < 1500  # handles of a pass or two more or less, no growth
