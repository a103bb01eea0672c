"""Every method against an oracle: ``torch.autograd.grad`` on networks cut in two by hand, without a hook anywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from probe import cam

TOLERANCE = 1e-5

Halves = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""The trunk, from the input to the layer's output as the layer lays it out, and the head, from there to the logits."""

# Oracles: A and g are [B, C, *S].


def _sum(x: Tensor, keepdim: bool = False) -> Tensor:
    return x.sum(tuple(range(2, x.dim())), keepdim=keepdim)


def _spread(weights: Tensor, a: Tensor) -> Tensor:
    return (weights.view(*weights.shape, *[1] * (a.dim() - 2)) * a).sum(1)


def grad_cam(a: Tensor, g: Tensor) -> Tensor:
    return _spread(_sum(g) / a[0, 0].numel(), a)


def grad_cam_pp(a: Tensor, g: Tensor, official: bool = False) -> Tensor:
    a, g = a.double(), g.double()
    alpha = g**2 / torch.where(g == 0, 1.0, 2 * g**2 + _sum(a, True) * g**3)
    if official:
        total = _sum(torch.where(g > 0, alpha, 0.0), True)
        alpha = alpha / torch.where(total == 0, 1.0, total)
    return _spread(_sum(alpha * g.relu()), a)


def xgrad_cam(a: Tensor, g: Tensor) -> Tensor:
    a, g = a.double(), g.double()
    total = _sum(a)
    return _spread(torch.where(total == 0, 0.0, _sum(g * a) / total), a)


def layer_cam(a: Tensor, g: Tensor) -> Tensor:
    return (g.relu() * a).sum(1)


def hires_cam(a: Tensor, g: Tensor) -> Tensor:
    return (g * a).sum(1)


def grad_cam_elementwise(a: Tensor, g: Tensor) -> Tensor:
    return (g * a).relu().sum(1)


def eigen_cam(a: Tensor, g: Tensor) -> Tensor:
    matrix = a.double().flatten(2).transpose(1, 2)
    _, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (matrix @ vh[:, 0, :, None])[..., 0].view(len(a), *a.shape[2:])


METHODS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "grad_cam": (cam.grad_cam, grad_cam),
    "grad_cam_pp": (cam.grad_cam_pp, grad_cam_pp),
    "grad_cam_pp official": (partial(cam.grad_cam_pp, official=True), partial(grad_cam_pp, official=True)),
    "xgrad_cam": (cam.xgrad_cam, xgrad_cam),
    "layer_cam": (cam.layer_cam, layer_cam),
    "hires_cam": (cam.hires_cam, hires_cam),
    "grad_cam_elementwise": (cam.grad_cam_elementwise, grad_cam_elementwise),
    "eigen_cam": (cam.eigen_cam, eigen_cam),
}

# Networks, cut by hand.


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """A network with cheap random weights: torchvision's own initialisation takes longer than the test."""
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not value.is_floating_point():
            continue
        fan = max(1, value[0].numel()) if value.dim() > 1 else 1
        positive = name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight"))
        if name.endswith("layer_scale"):
            value.data.fill_(0.5)
        elif positive:
            value.data.uniform_(0.7, 1.3, generator=generator)
        else:
            scale = 0.1 if value.dim() == 1 else (2 / fan) ** 0.5
            value.data.normal_(0, scale, generator=generator)
    return model


def relative_positions(model: nn.Module) -> nn.Module:
    """Swin's table of relative positions is made in the constructor, where the meta device lost it."""
    for module in model.modules():
        if hasattr(module, "define_relative_position_index"):
            del module._buffers["relative_position_index"]
            module.define_relative_position_index()
    return model


@cache
def resnet18() -> nn.Module:
    return built(lambda: torchvision.models.resnet18(weights=None))


def resnet_stem(m: nn.Module, x: Tensor) -> Tensor:
    x = m.maxpool(F.relu(m.bn1(m.conv1(x))))
    return m.layer2(m.layer1(x))


def resnet_layer3() -> tuple[nn.Module, str, Tensor, Halves]:
    m = resnet18()
    halves = (
        lambda x: m.layer3(resnet_stem(m, x)),
        lambda a: m.fc(m.layer4(a).mean((2, 3))),
    )
    return m, "layer3", torch.randn(2, 3, 64, 96), halves


def resnet_layer4() -> tuple[nn.Module, str, Tensor, Halves]:
    m = resnet18()
    halves = (lambda x: m.layer4(m.layer3(resnet_stem(m, x))), lambda a: m.fc(a.mean((2, 3))))
    return m, "layer4", torch.randn(2, 3, 96, 96), halves


@cache
def alexnet() -> nn.Module:
    return built(lambda: torchvision.models.alexnet(weights=None))


def alexnet_cut(index: int) -> tuple[nn.Module, str, Tensor, Halves]:
    m = alexnet()

    def run(x: Tensor, modules: list[nn.Module]) -> Tensor:
        for module in modules:  # its ReLUs work in place: here they don't
            x = F.relu(x) if isinstance(module, nn.ReLU) else module(x)
        return x

    layers = list(m.features)
    halves = (
        lambda x: run(x, layers[: index + 1]),
        lambda a: run(m.avgpool(run(a, layers[index + 1 :])).flatten(1), list(m.classifier)),
    )
    return m, f"features.{index}", torch.randn(2, 3, 95, 95), halves


def densenet() -> tuple[nn.Module, str, Tensor, Halves]:
    m = built(lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=11))
    return m, "features", torch.randn(2, 3, 64, 64), (m.features, lambda a: m.classifier(F.relu(a).mean((2, 3))))


def densenet121() -> tuple[nn.Module, str, Tensor, Halves]:
    m = built(lambda: torchvision.models.densenet121(weights=None))
    return m, "features", torch.randn(2, 3, 64, 64), (m.features, lambda a: m.classifier(F.relu(a).mean((2, 3))))


def convnext_tiny() -> tuple[nn.Module, str, Tensor, Halves]:
    m = built(lambda: torchvision.models.convnext_tiny(weights=None))
    halves = (m.features, lambda a: m.classifier(a.mean((2, 3), keepdim=True)))
    return m, "features", torch.randn(2, 3, 64, 64), halves


def convnext_block() -> tuple[nn.Module, str, Tensor, Halves]:
    m = built(lambda: torchvision.models.convnext_tiny(weights=None))
    halves = (
        lambda x: m.features[:6](x),
        lambda a: m.classifier(m.features[6:](a).mean((2, 3), keepdim=True)),
    )
    return m, "features.5", torch.randn(2, 3, 96, 64), halves


def mobilenet_v3() -> tuple[nn.Module, str, Tensor, Halves]:
    m = built(lambda: torchvision.models.mobilenet_v3_small(weights=None))
    return m, "features", torch.randn(2, 3, 96, 64), (m.features, lambda a: m.classifier(a.mean((2, 3))))


def vit_b_16() -> tuple[nn.Module, str, Tensor, Halves]:
    m = built(lambda: torchvision.models.vit_b_16(weights=None, image_size=64))
    last = m.encoder.layers[-1]
    kept: list[Tensor] = []

    def trunk(x: Tensor) -> Tensor:
        x = m._process_input(x)
        x = torch.cat([m.class_token.expand(len(x), -1, -1), x], 1) + m.encoder.pos_embedding
        kept.append(m.encoder.layers[:-1](x))
        return last.ln_1(kept[-1])

    def head(a: Tensor) -> Tensor:
        x = kept[-1] + last.self_attention(a, a, a, need_weights=False)[0]
        return m.heads(m.encoder.ln(x + last.mlp(last.ln_2(x)))[:, 0])

    return m, "encoder.layers.encoder_layer_11.ln_1", torch.randn(2, 3, 64, 64), (trunk, head)


def swin_t() -> tuple[nn.Module, str, Tensor, Halves]:
    m = relative_positions(built(lambda: torchvision.models.swin_t(weights=None)))
    halves = (
        lambda x: m.features[:6](x),
        lambda a: m.head(m.norm(m.features[6:](a)).mean((1, 2))),
    )
    return m, "features.5", torch.randn(2, 3, 128, 64), halves


def one_dimensional() -> tuple[nn.Module, str, Tensor, Halves]:
    m = nn.Sequential(
        nn.Conv1d(2, 6, 5, padding=2), nn.ReLU(inplace=True), nn.Conv1d(6, 8, 3, stride=2), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(24, 4),
    ).eval()  # fmt: skip
    halves = (lambda x: m[2](F.relu(m[0](x))), lambda a: m[4:](F.relu(a)))
    return m, "2", torch.randn(3, 2, 33), halves


def three_dimensional() -> tuple[nn.Module, str, Tensor, Halves]:
    m = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d(2), nn.Conv3d(4, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(48, 3),
    ).eval()  # fmt: skip
    halves = (lambda x: m[3](m[2](F.relu(m[0](x)))), lambda a: m[4:](a))
    return m, "3", torch.randn(2, 1, 8, 12, 10), halves


NETWORKS: list[Callable[[], tuple[nn.Module, str, Tensor, Halves]]] = [
    resnet_layer3,
    resnet_layer4,
    partial(alexnet_cut, 10),
    partial(alexnet_cut, 12),
    densenet,
    densenet121,
    convnext_tiny,
    convnext_block,
    mobilenet_v3,
    vit_b_16,
    swin_t,
    one_dimensional,
    three_dimensional,
]


def channels_first(name: str, value: Tensor, like: Tensor) -> Tensor:
    if name.startswith("encoder"):
        return value[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    return value.movedim(-1, 1) if value.dim() == 4 and value.shape[1:3] == (8, 4) else value


def name_of(network: Callable[..., object]) -> str:
    return f"alexnet.{network.args[0]}" if isinstance(network, partial) else network.__name__


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.filterwarnings("ignore:.*nowhere positive.*:UserWarning")
def test_cam_is_the_classifiers_rows_times_the_activation() -> None:
    """Up to the bias, the mean of the map is the logit."""
    model, layer, x, (trunk, _) = resnet_layer4()
    with torch.no_grad():
        a = trunk(x)
        expected = (model.fc.weight[[7, 3], :, None, None] * a).sum(1)
        logits = model(x)[[0, 1], [7, 3]] - model.fc.bias[[7, 3]]
    found = cam.explain(model, x, layer=layer, target=[7, 3], method=cam.cam)
    assert relative(found, expected) < TOLERANCE
    torch.testing.assert_close(found.mean((1, 2)), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS, ids=name_of)
@pytest.mark.filterwarnings("ignore:.*nowhere positive.*:UserWarning")
def test_raw_maps_agree_with_autograd_on_a_network_cut_by_hand(network: Callable[..., object]) -> None:
    """The raw maps of every method differ from the oracle's by less than 1e-5 of their maximum."""
    model, layer, x, (trunk, head) = network()
    with torch.no_grad():
        value = trunk(x)
    value = value.requires_grad_()
    logits = head(value)
    target = logits.argmax(1)
    gradient = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), value)[0]
    a, g = (channels_first(layer, each.detach(), x) for each in (value, gradient))
    assert bool(g.any())
    with torch.no_grad():
        assert relative(model(x), logits.detach()) < TOLERANCE, "the network is cut wrongly"
    for name, (method, oracle) in METHODS.items():
        found, expected = cam.explain(model, x, layer=layer, target=target, method=method), oracle(a, g)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        if name == "eigen_cam":
            sign = (found.double() * expected).flatten(1).sum(1).sign()
            expected = expected * sign.view(-1, *[1] * (expected.dim() - 1))
        assert relative(found, expected) < TOLERANCE, name
