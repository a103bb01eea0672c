"""What raw hooks of torch do to their user, row by row of the project's list of facts, and that `Probe` does better.

Every docstring begins with the row's id. Where it is cheap the raw behaviour is shown first, so that a test tells when
torch changes; then comes the right value, or the right report, through `Probe`.
"""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import threading
import time
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.modules import module as registry
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from probe import Board, Capture, Kind, Probe, ProbeWarning, histogram, stats
from probe.tree import leaves
from tests import reading, zoo

GRADS = Kind.GRAD_INPUT | Kind.GRAD_OUTPUT


def conv_relu(inplace: bool = True) -> nn.Sequential:
    """A convolution whose output the next module overwrites."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=inplace))


def twin_of(model: nn.Module) -> nn.Module:
    """The same model with every module's ``inplace`` switched off."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return twin


def reasons(p: Probe, name: str) -> str:
    """What the report says about one layer, in one string."""
    return "; ".join(reason for layer, reason in p.report() if layer == name)


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


def same(a: Any, b: Any) -> bool:
    """Bit-identical lists of tensors and Nones."""
    return len(a) == len(b) and all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


MODES = pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=["grad", "no_grad", "inference"]
)


# -- 1 in-place overwrites of what a forward hook captured -------------------------------------------------------------


@MODES
def test_output_overwritten_by_the_next_module_is_captured_as_it_was(mode: Any, image: torch.Tensor) -> None:
    """F1.1 a stored reference shows the values after the in-place op, the probe those before it, in every mode."""
    model = conv_relu()
    stored: list[torch.Tensor] = []
    handle = model[0].register_forward_hook(lambda m, a, o: stored.append(o.detach()))
    with mode(), Probe(model) as p:
        model(image)
        truth = F.conv2d(image, model[0].weight, model[0].bias)
    handle.remove()
    assert (stored[0] >= 0).all()
    torch.testing.assert_close(p["0"].output, truth.detach(), rtol=0, atol=1e-6)
    assert (p["0"].output < 0).any()


def test_overwritten_is_known_whatever_the_version_at_the_start(image: torch.Tensor) -> None:
    """F1.2 an in-place ReLU's own output starts at version 1: it is not called overwritten, the one before it is."""
    model = conv_relu()
    with Probe(model) as p:
        out = model(image)
    assert out._version == 1
    assert out.data._version == 0
    assert [row.name for row in p.overwritten] == ["0"]
    share = (p["0"].output < 0).double().mean().item()
    assert p.overwritten[0].by == "1"
    assert p.overwritten[0].share == pytest.approx(share)


def test_overwritten_in_inference_mode(image: torch.Tensor) -> None:
    """F1.3 inference tensors count no versions; what was overwritten is known all the same."""
    model = conv_relu()
    with torch.inference_mode(), Probe(model) as p:
        out = model(image)
        with pytest.raises(RuntimeError, match="version counter"):
            _ = out._version
    assert [row.name for row in p.overwritten] == ["0"]
    assert (p["0"].output < 0).any()


def test_writes_that_torch_does_not_count(image: torch.Tensor) -> None:
    """F1.4 writes through ``.data`` and a NumPy view raise no version; the capture and `overwritten` see them."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    for write in (lambda o: o.data.mul_(2), lambda o: o.detach().numpy().__imul__(2)):
        with Probe(model) as p:
            out = model(image)
            before = out.detach().clone()
            write(out)
        assert out._version == 0
        assert torch.equal(p["0"].output, before)
        assert [row.name for row in p.overwritten] == ["0"]


def test_write_through_a_later_view(image: torch.Tensor) -> None:
    """F1.5 a write to a slice of the output, taken after the capture, does not reach it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with Probe(model, kinds=Kind.OUTPUT) as p:
        out = model(image)
        before = out.detach().clone()
        out[:, 0].zero_()
    assert torch.equal(p["0"].output, before)
    assert p.overwritten[0].share == pytest.approx(0.25)


def test_residual_block_whose_layers_share_one_tensor_object(image: torch.Tensor) -> None:
    """F1.6 bn's and relu's outputs are one object, written twice: each record has its own values."""
    block = zoo.Residual(3)
    with Probe(block) as p:
        block(image)
    shift = p["bn"].output + image
    assert torch.equal(p["relu"].input, shift)
    assert torch.equal(p["relu"].output, shift.relu())
    assert "bn" in [row.name for row in p.overwritten]


def test_inplace_dropout_in_train_mode_only() -> None:
    """F1.7 Dropout(inplace=True) overwrites in train and not in eval; right in both, and only train is reported."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5, inplace=True))
    x = torch.randn(4, 8)
    for train in (True, False):
        model.train(train)
        with Probe(model) as p:
            model(x)
        assert torch.equal(p["0"].output, model[0](x).detach())
        assert [row.name for row in p.overwritten] == (["0"] if train else [])


def test_input_of_an_inplace_module_is_what_went_in(image: torch.Tensor) -> None:
    """F1.8 in a forward hook of an in-place module the argument is already the result; ``.input`` is from before."""
    model = conv_relu()
    seen: list[bool] = []
    handle = model[1].register_forward_hook(lambda m, args, output: seen.append(args[0] is output))
    with Probe(model, "1") as p:
        model(image)
    handle.remove()
    assert seen == [True]
    assert (p["1"].input < 0).any()
    assert torch.equal(p["1"].input.relu(), p["1"].output)


def test_modules_that_return_their_input_object() -> None:
    """F1.9 Identity, Dropout in eval and a Flatten without work hand on one tensor under several names."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Dropout(0.3), nn.Flatten()).eval()
    with Probe(model) as p:
        out = model(torch.randn(2, 4))
    assert all(torch.equal(p[name].output, out.detach()) for name in p)
    assert p.overwritten == []


@pytest.mark.parametrize("source", ["numpy", "shared", "mmap", "sparse", "expanded"])
def test_storages_that_cannot_be_lazily_cloned(source: str, tmp_path: Any) -> None:
    """F1.10 NumPy-backed, shared, mapped, sparse and expanded values are captured by value as well."""
    values = torch.arange(6.0).view(2, 3)
    if source == "numpy":
        x = torch.from_numpy(values.numpy().copy())
    elif source == "shared":
        x = values.clone().share_memory_()
    elif source == "mmap":
        torch.save(values, tmp_path / "x.pt")
        x = torch.load(tmp_path / "x.pt", mmap=True)
    elif source == "sparse":
        x = values.to_sparse()
    else:
        x = torch.ones(1).expand(1000, 1000)
    model = nn.Sequential(nn.Identity())
    with torch.no_grad(), Probe(model) as p:
        model(x)
        before = x.to_dense().clone()
        if source != "expanded":
            x.mul_(3)
    assert torch.equal(p["0"].output.to_dense(), before)
    assert torch.equal(p["0"].input.to_dense(), before)


def test_a_small_view_does_not_pin_its_large_base() -> None:
    """F1.10 a lazy clone of one row keeps the whole base alive; the capture of such a view holds its row alone."""

    class Row(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[0]

    model = Row()
    with torch.no_grad(), Probe(model, kinds=Kind.OUTPUT) as p:
        for _ in range(3):
            model(torch.randn(5000, 8))
    assert p[""].output.untyped_storage().nbytes() < 10_000


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "squeezenet1_1"])
def test_every_module_of_a_torchvision_model(name: str) -> None:
    """F1.11 every module's output is what the same model computes without in-place writes."""
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 32, 32)
    truth = zoo.references(model, x, backward=False)
    stored: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        with Probe(model, "*", kinds=Kind.OUTPUT) as p:
            handles = [
                module.register_forward_hook(lambda m, a, o, key=key: stored.__setitem__(key, o.detach()))
                for key, module in model.named_modules()
            ]
            model(x)
        for handle in handles:
            handle.remove()
    wrong = [key for key, calls in truth.items() if not torch.equal(p[key].output, calls[-1][0])]
    naive = [key for key, calls in truth.items() if not torch.equal(stored[key], calls[-1][0])]
    assert wrong == []
    assert naive  # a plain hook with detach() is wrong on this model
    assert set(truth) == {key for key in p if p[key].calls}


def test_caller_reuses_its_input_buffer() -> None:
    """F1.12 a caller who refills one buffer for every batch does not change what was captured of the last."""
    model = nn.Sequential(nn.Linear(4, 4))
    buffer = torch.randn(2, 4)
    before = buffer.clone()
    with Probe(model) as p:
        model(buffer)
        buffer.normal_()
    assert torch.equal(p["0"].input, before)


def test_parameter_as_output_is_a_snapshot() -> None:
    """F1.13 a module that returns its weight: the optimizer's next step does not change the capture."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self) -> torch.Tensor:
            return self.weight

    model = Table()
    address = model.weight.data_ptr()
    with Probe(model) as p:
        (model() * 2).sum().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(p[""].output, torch.ones(3))
    assert torch.equal(p[""].grad_output, torch.full((3,), 2.0))
    assert model.weight.tolist() == [-1.0, -1.0, -1.0]
    assert model.weight.data_ptr() == address


def test_user_edits_a_captured_value() -> None:
    """F1.14 writing to a captured value neither breaks the backward pass nor changes its gradients."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(3, 4)
    model(x).sum().backward()
    wanted = [g.clone() for g in gradients(model) if g is not None]
    model.zero_grad()
    with Probe(model) as p:
        out = model(x)
        for name in p:
            p[name].output.zero_()
            p[name].input.fill_(9)
        out.sum().backward()
        for name in p:
            p[name].grad_output.zero_()
    assert same(gradients(model), wanted)


def test_cam_from_an_overwritten_convolution(image: torch.Tensor) -> None:
    """F1.15 gradient times activation of a conv before an in-place ReLU is that of the out-of-place model."""
    model = nn.Sequential(*conv_relu(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    twin = twin_of(model)
    cams = []
    for each in (model, twin):
        with Probe(each, "0") as p:
            each(image)[:, 1].sum().backward()
        weights = p["0"].grad_output.mean((2, 3), keepdim=True)
        cams.append((weights * p["0"].output).sum(1))
    assert torch.equal(cams[0], cams[1])
    assert cams[0].abs().max() > 0


# -- 2 full backward hooks and in-place operations; where gradients are right ------------------------------------------


@pytest.mark.parametrize("how", ["relu", "+="])
def test_full_backward_hook_forbids_inplace_and_the_probe_does_not(how: str, image: torch.Tensor) -> None:
    """F2.1 torch's module hook raises at forward time; the default reads the gradients, "module" says what to type."""
    model: nn.Module = conv_relu() if how == "relu" else zoo.Residual(3)
    layer = "0" if how == "relu" else "bn"
    handle = model.get_submodule(layer).register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"BackwardHookFunction(Backward)? is a view and is being modified inplace"):
        model(image)
    handle.remove()
    model.get_submodule(layer)._is_full_backward_hook = None
    with (
        pytest.raises(RuntimeError, match=rf"the output of '{layer}' is modified in place.*Probe\(model\)"),
        Probe(model, backward="module"),
    ):
        model(image)
    truth = zoo.references(copy.deepcopy(model), image)
    with Probe(model) as p:
        zoo.loss(model(image)).backward()
    assert all(torch.equal(p[name].grad_output, truth[name][-1][1]) for name in p)


def test_gradients_of_overwritten_outputs(image: torch.Tensor) -> None:
    """F2.2 the gradient at an output that was overwritten afterwards is that of the out-of-place model."""
    model = zoo.ConvNet()
    truth = zoo.references(copy.deepcopy(model), image)
    with Probe(model, "*") as p:
        zoo.loss(model(image)).backward()
    assert {row.name for row in p.overwritten} >= {"features.0", "block.bn"}
    for name, calls in truth.items():
        assert torch.equal(p[name].output, calls[-1][0]), name
        assert torch.equal(p[name].grad_output, calls[-1][1]), name


def test_gradient_is_not_that_after_the_inplace_op() -> None:
    """F2.3 retain_grad() moves to the tensor after the in-place op; the probe's gradient stays with the layer."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True))
    x = torch.randn(5, 4)
    kept: list[torch.Tensor] = []

    def retain(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = model[0].register_forward_hook(retain)
    with Probe(model) as p:
        model(x).sum().backward()
    handle.remove()
    assert torch.equal(kept[0].grad, torch.ones(5, 6))
    alive = (F.linear(x, model[0].weight, model[0].bias) > 0).float()
    assert torch.equal(p["0"].grad_output, alive)
    assert torch.equal(p["1"].grad_output, torch.ones(5, 6))


def test_hooks_that_come_after_the_write_are_told_apart() -> None:
    """F2.4 a probe entered between forward and backward sees no gradient, and says that nothing was called."""
    model = conv_relu()
    x = torch.randn(1, 3, 8, 8)
    out = model(x)
    with Probe(model) as p:
        out.sum().backward()
    assert "was not called while the probe was attached" in reasons(p, "")
    with pytest.raises(AttributeError, match="was not called while the probe was attached"):
        _ = p["0"].grad_output


def test_lost_gradient_of_an_overwritten_view_is_reported(image: torch.Tensor) -> None:
    """F2.5 the hook on a view that is written to in place never fires: the report says so and what to type."""
    model = zoo.ViewThenWrite()
    fired: list[torch.Tensor] = []
    handle = model.norm.register_forward_hook(lambda m, a, o: o.register_hook(fired.append) and None)
    with Probe(model) as p:
        zoo.loss(model(image)).backward()
    handle.remove()
    assert fired == []
    assert "lost" in reasons(p, "norm")
    assert "copy_views=True" in reasons(p, "norm")
    with pytest.raises(AttributeError, match=r"lost.*copy_views=True"):
        _ = p["norm"].grad_output
    assert torch.equal(p["norm"].output, p["relu"].input)


Builtin = tuple[Callable[[], nn.Module], tuple[int, ...]]
OWN_VIEWS: dict[str, Builtin] = {
    "InstanceNorm1d, unbatched": (lambda: nn.InstanceNorm1d(4), (4, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (2, 4, 3, 3)),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), (2, 4, 6)),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), (2, 4, 6)),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(2), (2, 4, 6)),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(2), (2, 4, 6)),
    "Conv2d, unbatched": (lambda: nn.Conv2d(4, 4, 1), (4, 3, 3)),
    "ConvTranspose2d, unbatched": (lambda: nn.ConvTranspose2d(4, 4, 2), (4, 3, 3)),
}
VIEWS_OF_INPUT: dict[str, Builtin] = {
    "Flatten": (lambda: nn.Flatten(), (2, 4, 3)),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 2)), (2, 4)),
}
NO_VIEWS: dict[str, Builtin] = {
    "Linear": (lambda: nn.Linear(4, 4), (2, 4)),
    "Linear, 3-D": (lambda: nn.Linear(4, 4), (2, 3, 4)),  # a view up to torch 2.14
    "Conv2d": (lambda: nn.Conv2d(4, 4, 1), (2, 4, 3, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (2, 4, 3, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (2, 3, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), (2, 4, 4, 4)),
}


class Scaled(nn.Module):
    """Scales the input, calls a layer, and applies ReLU to its output."""

    def __init__(self, layer: nn.Module, inplace: bool) -> None:
        super().__init__()
        self.layer = layer
        self.inplace = inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.layer(x * 1.5), inplace=self.inplace)


@pytest.mark.parametrize("copies", [False, True], ids=["default", "copy_views"])
@pytest.mark.parametrize("kind", [*OWN_VIEWS, *VIEWS_OF_INPUT, *NO_VIEWS])
def test_which_builtin_outputs_are_views(kind: str, copies: bool) -> None:
    """F2.6 an overwritten view of the input is reported as lost, or right by copy_views; all others are just right."""
    make, shape = {**OWN_VIEWS, **VIEWS_OF_INPUT, **NO_VIEWS}[kind]
    layer = make()
    model = Scaled(layer, inplace=True)
    x = torch.randn(shape, requires_grad=True)
    truth = twin_of(model)
    with Probe(truth, "layer") as wanted:
        out = truth(x)
        zoo.loss(out).backward()
    with Probe(model, "layer", copy_views=copies) as p:
        zoo.loss(model(x)).backward()
    assert same(gradients(model), gradients(truth))
    assert torch.equal(p["layer"].output, wanted["layer"].output)
    if kind in VIEWS_OF_INPUT and not copies:
        assert "lost" in reasons(p, "layer")
        with pytest.raises(AttributeError, match="lost"):
            _ = p["layer"].grad_output
    else:
        assert "lost" not in reasons(p, "layer")
        assert torch.equal(p["layer"].grad_output, wanted["layer"].grad_output)
    if kind in VIEWS_OF_INPUT and not copies:  # its gradient is lost as well
        with pytest.raises(AttributeError, match=r"grad_input of 'layer': lost.*copy_views=True"):
            _ = p["layer"].grad_input
    else:
        assert torch.equal(p["layer"].grad_input, wanted["layer"].grad_input)


class Written(nn.Module):
    """Writes to what the layer returned, which it may have used before; a twin that writes to a copy is the truth."""

    def __init__(self, layer: nn.Module, inplace: bool, before: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.inplace = inplace
        self.before = before

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        out = leaves(self.layer(*args))[0][1]
        used = out * 3 if self.before else 0
        return used + F.relu(out, inplace=self.inplace)


@pytest.mark.parametrize("before", [False, True], ids=["only written", "used before"])
@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (nn.MultiheadAttention(8, 2, batch_first=True), [(2, 3, 8)] * 3),
        (nn.RNN(8, 4, batch_first=True), [(2, 3, 8)]),
        (nn.LSTM(8, 4, num_layers=2, bidirectional=True), [(3, 8)]),
        (nn.GRU(8, 4, batch_first=True), [(2, 3, 8)]),
        (nn.LSTMCell(8, 4), [(8,)]),
        (nn.InstanceNorm2d(2), [(2, 2, 3, 3)]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_builtin_layer_whose_output_is_an_overwritten_view(
    layer: nn.Module, shapes: list[tuple[int, ...]], before: bool
) -> None:
    """F2.6 the gradient at the base that only the layer itself ever sees is the whole gradient at the view."""
    args = [torch.randn(shape, requires_grad=True) for shape in shapes]
    truth, model = (Written(copy.deepcopy(layer), inplace, before) for inplace in (False, True))
    found = []
    for each in (truth, model):
        with Probe(each, "layer", kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT) as p:
            zoo.loss(each(*args)).backward()
        assert "lost" not in reasons(p, "layer")
        found.append(leaves(p["layer"].grad_output)[0][1])
    assert torch.equal(found[1], found[0])
    assert same(gradients(model), gradients(truth))


def test_an_edit_reaches_the_gradient_at_an_overwritten_view() -> None:
    """F2.6 what the edit returns flows on, where the hook on the view itself is gone."""
    layer, x = nn.InstanceNorm2d(2, affine=True), torch.randn(2, 2, 3, 3)
    found = []
    for inplace in (False, True):
        model = Written(copy.deepcopy(layer), inplace)
        with Probe(model, "layer") as p:
            p.edit("layer", lambda gradient: gradient * 2, on=Kind.GRAD_OUTPUT)
            zoo.loss(model(x)).backward()
        found.append([p["layer"].grad_output, *gradients(model)])
    assert same(*found)


def test_a_part_of_a_gradient_is_called_one(image: torch.Tensor) -> None:
    """F2.5 a hook on a view that was used before it was overwritten gets the gradient of that use alone."""
    model = Written(zoo.Gain(), inplace=True, before=True)
    with Probe(model, "layer") as p:
        model(image).sum().backward()
    assert (p["layer"].grad_output == 3).all()  # without that of the ReLU
    assert "can be a part" in reasons(p, "layer")


def test_copy_views_gives_the_gradient_and_changes_aliasing(image: torch.Tensor) -> None:
    """F2.7 with copy_views the gradient at the view is right; what is written no longer reaches the view's base."""
    model = zoo.ViewThenWrite()
    truth = zoo.references(copy.deepcopy(model), image)
    with Probe(model, copy_views=True) as p:
        zoo.loss(model(image)).backward()
    assert torch.equal(p["norm"].grad_output, truth["norm"][-1][1])
    assert torch.equal(p["relu"].grad_input, truth["norm"][-1][1])
    assert p.report() == []

    class WritesToBase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flatten = nn.Flatten()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            base = x * 1.0
            self.flatten(base).zero_()
            return base

    x = torch.ones(1, 2, 2, requires_grad=True)
    sums = []
    for copies in (False, True):
        with Probe(aliased := WritesToBase(), copy_views=copies):
            sums.append(aliased(x).sum().item())
    assert sums == [0.0, 4.0]


def test_copy_views_of_a_tensor_subclass() -> None:
    """F2.7 every operation on a subclass returns a view of a plain tensor; the copy is none, and of the subclass."""

    class Named(torch.Tensor):
        pass

    model = nn.Sequential(zoo.Swish(), nn.ReLU(inplace=True))
    x = torch.randn(2, 3, requires_grad=True).as_subclass(Named)
    with Probe(model) as p:
        model(x).sum().backward()
    assert "copy_views=True" in reasons(p, "0")
    with Probe(model, copy_views=True) as p:
        out = model(x)
        out.sum().backward()
    assert type(out) is type(p["0"].output) is Named
    assert torch.equal(p["0"].grad_output, (p["0"].output > 0).float())


def test_gradients_equal_those_at_gradient_edges(image: torch.Tensor) -> None:
    """F2.8 ``autograd.grad`` at the edges noted in a forward hook is a second road to the same values."""
    model = zoo.ConvNet()
    edges: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(
            lambda m, a, o, name=name: edges.__setitem__(name, torch.autograd.graph.get_gradient_edge(o))
        )
        for name, module in model.named_modules()
    ]
    with Probe(model, "*") as p:
        total = zoo.loss(model(image))
        wanted = torch.autograd.grad(total, list(edges.values()), retain_graph=True)
        total.backward()
    for handle in handles:
        handle.remove()
    for name, gradient in zip(edges, wanted, strict=True):
        assert torch.equal(p[name].grad_output, gradient), name


def test_grad_input_is_the_modules_share_and_not_the_whole() -> None:
    """F2.10 beside a shortcut ``x.register_hook`` sees everybody's gradient; grad_input is this module's part."""
    model, x = zoo.Shortcut(), torch.randn(3, 4, requires_grad=True)
    totals: list[torch.Tensor] = []
    handle = model.swish.register_forward_pre_hook(lambda m, args: args[0].register_hook(totals.append) and None)
    with Probe(model) as p:
        zoo.loss(model(x)).backward()
    handle.remove()
    given = p["swish"].input.requires_grad_()
    (share,) = torch.autograd.grad(model.swish(given), given, p["swish"].grad_output)
    torch.testing.assert_close(p["swish"].grad_input, share, rtol=0, atol=1e-6)
    torch.testing.assert_close(totals[0] - p["swish"].grad_input, 10 * p["swish"].grad_output)
    assert torch.equal(p["fc"].grad_output, totals[0])


def test_inplace_and_pass_through_modules_keep_their_hooks() -> None:
    """F2.11 Dropout in eval, Identity and in-place modules deliver grad_output and grad_input, and say pass-through."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), nn.Linear(4, 2)).eval()
    x = torch.randn(3, 4)
    with Probe(model) as p:
        zoo.loss(model(x)).backward()
    total = p["3"].grad_output @ model[3].weight.detach()
    for name in ("1", "2"):
        assert torch.equal(p[name].grad_output, total)
    assert torch.equal(p["2"].grad_input, total)
    assert torch.equal(p["1"].grad_input, p["0"].grad_output)
    assert "pass-through" in reasons(p, "2")
    assert reasons(p, "1") == ""


def test_objects_keep_their_identity() -> None:
    """F2.12 the full hook replaces the output by a view; under the probe the caller gets the very object."""
    model = nn.Sequential(nn.Identity())
    x = torch.randn(2, 2, requires_grad=True)
    doubled = x * 2
    with Probe(model):
        assert model(doubled) is doubled
    with Probe(model, backward="module"):
        replaced = model(doubled)
    assert replaced is not doubled
    assert replaced._is_view()


def test_cloning_in_a_forward_hook_does_not_rescue_the_full_hook(image: torch.Tensor) -> None:
    """F2.13 torch wraps after the forward hooks: an edit that clones the output does not cure backward="module"."""
    model = conv_relu()
    p = Probe(model, backward="module")
    p.edit("0", torch.clone)
    with pytest.raises(RuntimeError, match="the output of '0' is modified in place"), p:
        model(image)
    with Probe(model) as p:
        p.edit("0", torch.clone)
        model(image).sum().backward()
    assert p["0"].grad_output.shape == p["0"].output.shape


def test_view_whose_base_was_written_through_an_alias() -> None:
    """F2.14 hooking a view whose base was written to before the module returned it does no harm."""

    class Aliased(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            base = x * 1.0
            view = base.view(-1)
            base.mul_(3)
            return view

    model, x = Aliased(), torch.ones(2, 2, requires_grad=True)
    with Probe(model) as p:
        (model(x) * 2).sum().backward()
    assert torch.equal(p[""].grad_output, torch.full((4,), 2.0))
    assert torch.equal(p[""].grad_input, torch.full((2, 2), 6.0))
    assert torch.equal(p[""].output, torch.full((4,), 3.0))


# -- 3 many calls ------------------------------------------------------------------------------------------------------


def test_recurrent_calls_are_kept_apart() -> None:
    """F3.1 an RNNCell in a loop: every call has its own input, output and gradients, in the order of the calls."""
    model, x = zoo.Recurrent(), torch.randn(2, 4, 3, requires_grad=True)
    with Probe(model) as p:
        zoo.loss(model(x)).backward()
    calls = p["cell"].calls
    assert len(calls) == 4
    hidden = torch.zeros(2, 4)
    for t, call in enumerate(calls):
        assert torch.equal(call.args[0], x.detach()[:, t])
        assert torch.equal(call.args[1], hidden)
        hidden = call.output
    for earlier, later in itertools.pairwise(calls):
        assert torch.equal(earlier.grad_output, later.grad_input[1])
    assert torch.equal(p["cell"].grad_output, calls[3].grad_output)
    assert torch.equal(torch.stack([call.grad_input[0] for call in calls], 1), x.grad)


def test_shared_module_answers_to_all_its_names() -> None:
    """F3.2 a module under two names is hooked once and read by either name."""
    model = zoo.Shared()
    with Probe(model) as p:
        model(torch.randn(2, 4)).sum().backward()
    assert list(p) == ["first", "act"]
    assert "second" in p
    assert len(p["first"].calls) == len(p["second"].calls) == 3
    assert torch.equal(p["second"].grad_output, p["first"].grad_output)


@pytest.mark.parametrize("kinds", [Kind.all(), Kind.OUTPUT], ids=["all", "output"])
@pytest.mark.parametrize("leaf", [True, False], ids=["root", "inner"])
def test_recursion(kinds: Kind, leaf: bool) -> None:
    """F3.3 a module that calls itself: one pass, calls in the order they began (with outputs alone: ended)."""

    class Recursive(nn.Module):
        def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
            return x + depth if depth == 0 else self(x * 2, depth - 1) + 10 * depth

    model: nn.Module = Recursive() if leaf else nn.Sequential(Recursive())
    with Probe(model, Recursive, kinds=kinds) as p:
        model(torch.ones(1, requires_grad=True))
    (name,) = p
    began = [34.0, 14.0, 4.0]
    assert [call.output.item() for call in p[name].calls] == (began[::-1] if kinds is Kind.OUTPUT else began)
    if Kind.INPUT in kinds:
        assert [call.args[0].item() for call in p[name].calls] == [1.0, 2.0, 4.0]


def test_tied_weights() -> None:
    """F3.4 two layers that share a Parameter are two layers: each has its own gradients, the Parameter their sum."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    x = torch.randn(3, 4)
    with Probe(model) as p:
        zoo.loss(model(x)).backward()
    parts = [p[name].grad_output.T @ p[name].input for name in p]
    torch.testing.assert_close(model[0].weight.grad, parts[0] + parts[1])


def test_containers_that_return_their_childs_output() -> None:
    """F3.5 three names share one tensor object: each gets the output and the gradient."""
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    with Probe(model, "*") as p:
        zoo.loss(model(torch.randn(3, 2))).backward()
    assert list(p) == ["", "0", "0.0"]
    assert all(torch.equal(p[name].output, p[""].output) for name in p)
    assert all(torch.equal(p[name].grad_output, p[""].grad_output) for name in p)


# -- 4 outputs that are not tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", zoo.Structuring.HOW)
def test_gradients_come_to_tensors_in_any_structure(how: str) -> None:
    """F4.1 the full hook never fires for dict, list, dataclass or nested outputs; tensor hooks at the leaves do."""
    model, x = zoo.Structured(how), torch.randn(3, 4)
    with Probe(model, "inner", "fc") as p:
        zoo.loss(model(x)).backward()
    record = p["inner"]
    assert type(record.grad_output) is type(record.output)
    from probe.tree import leaves

    gradients_ = leaves(record.grad_output)
    assert len(gradients_) == 2
    weight = torch.linspace(0.5, 1.5, 12).view(3, 4)
    assert all(torch.equal(g, weight) for _, g in gradients_)
    assert {path for path, _ in gradients_} <= {path for path, _ in leaves(record.output)}
    torch.testing.assert_close(p["fc"].grad_output, 2 * weight + weight * record.input.exp())


@pytest.mark.parametrize("loss_of", ["output", "h_n", "c_n"])
def test_lstm_gradients_whatever_the_loss_uses(loss_of: str) -> None:
    """F4.2 the loss may come from any part of the LSTM's output: that part has a gradient, the others are None."""
    model, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    with Probe(model) as p:
        output, (h_n, c_n) = model(x)
        zoo.loss({"output": output, "h_n": h_n, "c_n": c_n}[loss_of]).backward()
    came = p[""].grad_output
    present = {"output": came[0], "h_n": came[1][0], "c_n": came[1][1]}
    assert [name for name, gradient in present.items() if gradient is not None] == [loss_of]
    assert torch.equal(p[""].output[1][0], h_n.detach())


def test_packed_sequence() -> None:
    """F4.3 a PackedSequence goes in and comes out as one, its None leaves stay None, its data has gradients."""
    packed = pack_padded_sequence(torch.randn(3, 4, 2), torch.tensor([4, 2, 1]), batch_first=True)
    packed.data.requires_grad_()
    model = nn.GRU(2, 3)
    with Probe(model) as p:
        output, _ = model(packed)
        zoo.loss(output.data).backward()
    record = p[""]
    assert isinstance(record.output[0], PackedSequence)
    assert isinstance(record.input, PackedSequence)
    assert record.output[0].sorted_indices is None
    assert torch.equal(record.input.data, packed.data.detach())
    assert torch.equal(record.output[0].batch_sizes, packed.batch_sizes)
    assert record.grad_output[0].data.shape == output.data.shape
    assert record.grad_output[1] is None
    torch.testing.assert_close(record.grad_input.data, packed.data.grad)


def test_structures_that_pytree_does_not_look_into() -> None:
    """F4.4 plain dataclass, SimpleNamespace, dict subclass, and a list that contains itself."""

    @dataclass(frozen=True)
    class Frozen:
        a: torch.Tensor

    class Output(OrderedDict):  # type: ignore[type-arg]
        pass

    def endless(x: torch.Tensor) -> list[Any]:
        loop: list[Any] = [x]
        loop.append(loop)
        return loop

    class Model(nn.Module):
        make: Any = None

        def forward(self, x: torch.Tensor) -> Any:
            return type(self).make(x * 2)

    for make, read in (
        (lambda x: Frozen(x), lambda v: v.a),
        (lambda x: types.SimpleNamespace(a=x), lambda v: v.a),
        (lambda x: Output(a=x), lambda v: v["a"]),
        (endless, lambda v: v[0]),
    ):
        Model.make = staticmethod(make)
        model, x = Model(), torch.randn(3, requires_grad=True)
        with Probe(model) as p:
            read(model(x)).sum().backward()
        assert torch.equal(read(p[""].output), x.detach() * 2)
        assert torch.equal(read(p[""].grad_output), torch.ones(3))
        assert torch.equal(p[""].grad_input, torch.full((3,), 2.0))


@pytest.mark.parametrize("value", ["text", None, 3, ("text", 1)])
def test_outputs_without_tensors(value: Any) -> None:
    """F4.5 torch's legacy hook hangs for ever on a str and fails on None: the probe shows the value."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> Any:
            self.fc(x).sum().backward()
            return value

    model = Model()
    with Probe(model, "", "fc") as p:
        model(torch.randn(1, 2))
    assert p[""].output == value
    assert p[""].grad_output == value
    assert p["fc"].grad_output is not None


def test_keyword_only_models_and_functional_use() -> None:
    """F4.6 a model in Hugging Face's manner: kwargs by name, "never called" and "no gradient" are told apart."""

    class WithPooler(zoo.HFModel):
        def __init__(self) -> None:
            super().__init__()
            self.pooler = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 8)

        def forward(self, **kwargs: Any) -> Any:
            out = super().forward(**kwargs)
            out["pooled"] = self.pooler(out["hidden_states"][0])
            return out

    model = WithPooler()
    ids = torch.randint(0, 11, (2, 5))
    with pytest.warns(ProbeWarning, match="'unused'"), Probe(model, zoo.HFBlock, nn.Linear, "layers") as p:
        model(input_ids=ids).logits.sum().backward()
    assert "never called" in reasons(p, "unused")
    assert "only holds other modules" in reasons(p, "layers")
    assert "no gradient was asked back" in reasons(p, "pooler")
    record = p["layers.1"]
    assert record.args == ()
    assert set(record.input) == {"hidden_states", "attention_mask"}
    assert torch.equal(record.kwargs["hidden_states"], p["layers.0"].output[0])
    assert torch.equal(record.grad_kwargs["hidden_states"], p["layers.0"].grad_output[0])
    assert record.grad_input["attention_mask"] is None


def test_hooks_return_none_and_do_not_freeze_the_output(image: torch.Tensor) -> None:
    """F4.7 whatever a hook returns replaces the output: with the probe the caller's object is the module's own."""
    model = conv_relu()
    made: list[torch.Tensor] = []
    handle = model[1].register_forward_hook(lambda m, a, o: made.append(o))
    with Probe(model):
        first, second = model(image), model(image + 1)
    handle.remove()
    assert first is made[0]
    assert second is made[1]
    assert not torch.equal(first, second)


def test_observers_return_values_replace_nothing(image: torch.Tensor) -> None:
    """F4.7 what an observer returns is thrown away, in the forward and in the backward pass."""
    model = conv_relu()
    model(image).sum().backward()
    wanted, out = [g.clone() for g in gradients(model) if g is not None], model(image)
    model.zero_grad()
    with Probe(model, observers=[lambda capture: False]):
        got = model(image)
        got.sum().backward()
    assert torch.equal(got, out)
    assert same(gradients(model), wanted)


def test_detection_model_outputs() -> None:
    """F4.8 nested OrderedDict, list and tuple outputs keep their types."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)

        def forward(self, images: list[torch.Tensor]) -> Any:
            features = OrderedDict((str(i), self.body(image)) for i, image in enumerate(images))
            return [{"boxes": f.mean((1, 2)), "labels": torch.zeros(1).long()} for f in features.values()], features

    model = Detector()
    with Probe(model, "", "body") as p:
        found, _ = model([torch.randn(3, 4, 4), torch.randn(3, 5, 5)])
        found[1]["boxes"].sum().backward()
    output, gradient = p[""].output, p[""].grad_output
    assert type(output[1]) is OrderedDict
    assert [t.shape for t in p[""].input] == [(3, 4, 4), (3, 5, 5)]
    assert gradient[0][0] == {"boxes": None, "labels": None}
    assert torch.equal(gradient[0][1]["boxes"], torch.ones(4))
    assert p["body"].calls[0].grad_output is None
    assert torch.equal(p["body"].calls[1].grad_output, torch.full((4, 5, 5), 1 / 25))


# -- 5 keyword arguments -----------------------------------------------------------------------------------------------


class ByKeyword(nn.Module):
    def forward(self, *tensors: torch.Tensor, scale: torch.Tensor, **more: Any) -> torch.Tensor:
        return sum(tensors, torch.zeros(3)) + scale * 3 + sum(more.get("rest", ()))


def test_keyword_arguments_are_seen() -> None:
    """F5.1 a plain pre-hook gets an empty tuple for a keyword-only call; the record has the arguments by name."""
    model, scale = ByKeyword(), torch.randn(3)
    with Probe(model) as p:
        model(scale=scale)
    assert p[""].args == ()
    assert torch.equal(p[""].input["scale"], scale)
    assert torch.equal(p[""].kwargs["scale"], scale)


def test_gradients_at_keyword_arguments_and_in_lists() -> None:
    """F5.2 the full hook gives ``()`` for keyword and list inputs; grad_input and grad_kwargs have them by name."""
    model = ByKeyword()
    x, scale, a, b = (torch.randn(3, requires_grad=True) for _ in range(4))
    with Probe(model) as p:
        model(scale=scale, rest=[a, b]).sum().backward()
        record = p[""]
        assert torch.equal(record.grad_input["scale"], torch.full((3,), 3.0))
        assert torch.equal(record.grad_kwargs["rest"][1], torch.ones(3))
        model(x, scale=scale).sum().backward()
        record = p[""]
        assert torch.equal(record.grad_input, torch.ones(3))
        assert torch.equal(record.grad_kwargs["scale"], torch.full((3,), 3.0))


def test_edit_of_keyword_inputs_reaches_the_module() -> None:
    """F5.3 a pre-hook with kwargs must return a pair; an edit of the inputs returns what ``.input`` shows."""
    model = ByKeyword()
    with Probe(model) as p:
        p.edit("", lambda given: {**given, "scale": given["scale"] * 0}, on=Kind.INPUT)
        assert torch.equal(model(scale=torch.ones(3)), torch.zeros(3))
    assert torch.equal(p[""].input["scale"], torch.zeros(3))


# -- 6 exceptions ------------------------------------------------------------------------------------------------------


class Fails(nn.Module):
    """Raises what it is told to, or passes its input on."""

    error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return x * 1.0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_forward_raises_anything(error: type[BaseException]) -> None:
    """F6.1 no hook runs on KeyboardInterrupt and SystemExit: the probe leaves nothing, and the next call is right."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), Fails()), nn.Linear(2, 2))
    x = torch.randn(3, 2)
    before = zoo.fingerprint(model)
    model[1][1].error = error("stop")
    with pytest.raises(error), Probe(model, "*"):
        model(x)
    del model[1][1].error
    assert zoo.fingerprint(model) == before

    with Probe(model, "*") as p:
        model[1][1].error = error("stop")
        for _ in range(2):
            with pytest.raises(error):
                model(x)
        del model[1][1].error
        zoo.loss(model(x)).backward()
    assert [len(p[name].calls) for name in p] == [1] * len(p)
    assert all(p[name].grad_output is not None and p[name].output is not None for name in p)
    model.zero_grad()
    assert zoo.fingerprint(model) == before


def test_an_exception_in_forward_is_the_users_own() -> None:
    """F6.2 a hook that fails on the missing output is silenced to a warning: ours gives none, and the report tells."""
    model = nn.Sequential(nn.Linear(2, 2), Fails())
    model[1].error = ValueError("mine")
    with Probe(model, "*") as p:
        with pytest.raises(ValueError, match=r"^mine$") as caught:
            model(torch.randn(1, 2))
        assert not hasattr(caught.value, "__notes__")
        assert p["0"].output.shape == (1, 2)
        with pytest.raises(AttributeError, match="its forward raised an exception"):
            _ = p["1"].output
        assert reasons(p, "1") == "its forward raised an exception"
        assert p["1"].input.shape == (1, 2)
        with pytest.raises(AttributeError, match="its forward raised an exception"):
            _ = p["1"].grad_output


def test_no_global_hooks_are_used() -> None:
    """F6.3 torch calls a global always_call hook with the wrong arguments on an error: none of ours is global."""

    def global_hooks() -> dict[str, Any]:
        return {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(registry).items()
            if name.startswith("_global_")
        }

    before = global_hooks()
    assert "_global_forward_hooks" in before
    for backward in ("tensor", "module"):
        with Probe(nn.Linear(2, 2), backward=backward):
            assert global_hooks() == before
    assert global_hooks() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_gradient_hook_raises(error: type[BaseException]) -> None:
    """F6.4 an observer that raises during backward: the error propagates at once, and names layer and kind."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    before = zoo.fingerprint(model)

    def observer(capture: Any) -> None:
        if capture.kind is Kind.GRAD_OUTPUT and capture.name == "1":
            raise error("mine")

    with pytest.raises(error, match="mine") as caught, Probe(model, observers=observer):
        model(torch.ones(1, 2)).sum().backward()
    if error is ValueError:
        (note,) = caught.value.__notes__
        assert "'1'" in note
        assert "grad_output" in note
    model.zero_grad()
    assert zoo.fingerprint(model) == before


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("backward", ["tensor", "module"])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_script_module_child(how: str, backward: str) -> None:
    """F6.5 torch puts no hooks on a scripted child: it is left out and reported, and everything else works."""
    x = torch.randn(3, 2, requires_grad=True)
    tanh = nn.Sequential(nn.Tanh())
    scripted = torch.jit.script(tanh) if how == "script" else torch.jit.trace(tanh, x)
    model = nn.Sequential(nn.Linear(2, 2), scripted, nn.Linear(2, 2))
    with Probe(model, backward=backward) as p:
        model(x).sum().backward()
    assert list(p) == ["0", "2"]
    assert "ScriptModule" in reasons(p, "1.0")
    assert p["0"].grad_output.shape == (3, 2)
    with pytest.raises(KeyError, match=r"'1\.0' is a ScriptModule"):
        _ = p["1.0"]
    with pytest.raises(TypeError, match=r"'1\.0': torch puts no hooks on ScriptModules"):
        Probe(model, "1.0")
    with Probe(model) as p:
        for change in (lambda: p.edit("1.0", torch.zeros_like), lambda: p.stop_after("1")):
            with pytest.raises(TypeError, match="torch puts no hooks on ScriptModules"):
                change()
        model(x).sum().backward()
    assert p["2"].grad_output is not None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_registration_fails_half_way(where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """F6.5 an exception inside ``__enter__``, when some hooks are on: all of them are taken off again."""
    model = zoo.ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = zoo.fingerprint(model)
    register = getattr(nn.Module, where)

    def failing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is model.block.bn:
            raise error("no")
        return register(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, where, failing)
    backward = "module" if "full" in where else "tensor"
    with pytest.raises(error, match="no"), Probe(model, optimizer=optimizer, backward=backward):
        pytest.fail("entered")
    assert zoo.fingerprint(model) == before
    assert not optimizer._optimizer_step_post_hooks


def test_gradient_that_is_none() -> None:
    """F6.6 a custom Function that returns None for a gradient does not crash the user's backward."""

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> Any:
            return g, None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Tanh(), nn.Sigmoid()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return NoGradient.apply(self.left(x), self.right(x))

    model, x = Model(), torch.randn(3, requires_grad=True)
    with Probe(model, "*") as p:
        model(x).sum().backward()
    assert torch.equal(p["left"].grad_output, torch.ones(3))
    assert p["right"].grad_output is None
    assert p["right"].grad_input is None
    assert "no gradient" in reasons(p, "right") or "no grad_output" in reasons(p, "right")


# -- 7 nesting, removal, copying, saving -------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", ["tensor", "module"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 0, 2, 1, 1)])
def test_overlapping_probes_in_any_order(order: tuple[int, ...], backward: str) -> None:
    """F7.1 probes may be left in any order, and twice; each captures while it is attached, the model ends as it was."""
    model, x = zoo.Shortcut(), torch.randn(2, 4, requires_grad=True)
    before = zoo.fingerprint(model)
    probes = [Probe(model, backward=backward) for _ in range(3)]
    for p in probes:
        p.__enter__()
    for k in order:
        model(x).sum().backward()
        assert probes[k]["fc"].output is not None
        probes[k].__exit__(None, None, None)
    model.zero_grad()
    assert zoo.fingerprint(model) == before
    assert torch.equal(probes[0]["fc"].grad_output, probes[2]["fc"].grad_output)


@pytest.mark.filterwarnings("ignore::probe.ProbeWarning")
@pytest.mark.parametrize("kind", list(Kind))
def test_leaving_and_entering_inside_a_running_hook(kind: Kind) -> None:
    """F7.2 torch runs a snapshot of the hooks: a probe that is left inside a hook captures nothing from then on."""
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), torch.randn(3, 2, requires_grad=True)
    before = zoo.fingerprint(model)
    p, late = Probe(model), Probe(model)
    left: list[str] = []

    def leave(capture: Any) -> None:
        if not left and capture.name == "1":
            left.append(capture.name)
            p.__exit__(None, None, None)
            late.__enter__()

    with Probe(model, observers=leave, kinds=kind), p:
        model(x).sum().backward()
        model(x).sum().backward()
    late.__exit__(None, None, None)
    assert p["0"].output is not None
    assert [bool(p[name].calls) for name in p] == [True, kind is not Kind.INPUT, kind in GRADS]
    assert not any(call.backwards for call in p["0"].calls)
    assert [bool(p["2"].calls and p["2"].grad_output is not None)] == [kind in GRADS]
    assert all(late[name].grad_output is not None and late[name].grad_input is not None for name in late)
    model.zero_grad()
    assert zoo.fingerprint(model) == before


@pytest.mark.parametrize("backward", ["tensor", "module"])
def test_nothing_fires_on_a_graph_that_outlives_the_block(backward: str) -> None:
    """F7.3 torch's hooks still fire after their handles are removed; a probe that was left sees no later backward."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    seen: list[Kind] = []
    with Probe(model, observers=lambda capture: seen.append(capture.kind), backward=backward, keep=1) as p:
        out = model(torch.randn(3, 2, requires_grad=True))
    before = len(seen)
    out.sum().backward()
    assert len(seen) == before == 4
    assert p["0"].backwards == []
    if backward == "tensor":
        assert not out._backward_hooks


@pytest.mark.parametrize("backward", ["tensor", "module"])
def test_deepcopy_of_a_probed_model_is_inert(backward: str) -> None:
    """F7.4 a naive hook lives on in the copy and writes into the original's store: ours does neither."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    x = torch.randn(3, 2, requires_grad=True)
    with Probe(model, backward=backward) as p:
        model(x).sum().backward()
        twin = copy.deepcopy(model)
        (twin(x + 1) * 5).sum().backward()
        assert torch.equal(p["0"].input, x.detach())
        assert torch.equal(p["1"].grad_output, torch.ones(3, 2))
    (twin(x + 1) * 5).sum().backward()
    assert torch.equal(p["0"].input, x.detach())
    with Probe(twin) as other:
        twin(x).sum().backward()
    assert torch.equal(other["0"].output, p["0"].output)


@pytest.mark.parametrize("backward", ["tensor", "module"])
@pytest.mark.parametrize("when", ["fresh", "forward", "backward"])
@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_saving_a_probed_model(save: str, when: str, backward: str) -> None:
    """F7.5 pickle and torch.save work while the probe is attached, and nothing of `probe` gets into the file."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    x = torch.randn(3, 2, requires_grad=True)
    file = io.BytesIO()
    with Probe(model, backward=backward, observers=lambda capture: None), Probe(model, backward=backward) as p:
        if when != "fresh":
            out = model(x)
        if when == "backward":
            out.sum().backward()
        if save == "pickle":
            pickle.dump(model, file)
        else:
            torch.save(model, file)
        assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert b"probe" not in file.getvalue()
    file.seek(0)
    twin = pickle.load(file) if save == "pickle" else torch.load(file, weights_only=False)
    assert torch.equal(twin(x), model(x))
    assert when == "fresh" or torch.equal(p["0"].input, x.detach())


def test_shallow_copy_of_a_module() -> None:
    """F7.6 copy.copy(module) shares the hook dictionaries: calls of the copy are not taken for the original's."""
    model = nn.Sequential(nn.Linear(2, 2))
    x = torch.randn(3, 2)
    with Probe(model) as p:
        twin = copy.copy(model[0])
        model(x)
        twin(x + 1).sum().backward()
    assert torch.equal(p["0"].input, x)
    assert len(p["0"].calls) == 1
    assert p["0"].backwards == []


@pytest.mark.parametrize("leave", [(0, 1), (1, 0)])
def test_full_backward_flag_is_given_back(leave: tuple[int, int]) -> None:
    """F7.7 torch leaves a flag that forbids the user's legacy hook for ever: it is reset, also under overlap."""
    model = nn.Sequential(nn.Linear(2, 2))
    probes = [Probe(model, backward="module") for _ in range(2)]
    for p in probes:
        p.__enter__()
    model(torch.randn(1, 2, requires_grad=True)).sum().backward()
    for k in leave:
        probes[k].__exit__(None, None, None)
    assert model[0]._is_full_backward_hook is None
    model[0].register_backward_hook(lambda *_: None).remove()

    model = nn.Sequential(nn.Linear(2, 2))
    handle = model[0].register_full_backward_hook(lambda *_: None)
    with Probe(model, backward="module"):
        pass
    assert model[0]._is_full_backward_hook is True
    handle.remove()


class Weight(nn.Module):
    """Returns its Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self) -> torch.Tensor:
        return self.weight


def test_parameters_as_outputs_keep_their_hooks() -> None:
    """F7.8 a naive tensor hook on a Parameter stays for ever, once a call: ours fires once and goes, others' stay."""
    model = Weight()
    for own in (False, True):
        fired: list[torch.Tensor] = []
        if own:
            model.weight.register_hook(fired.append)
        before = list(model.weight._backward_hooks or {})
        unused = model.weight._backward_hooks is None
        with Probe(model) as p:
            for _ in range(3):
                out = model()
            assert len(model.weight._backward_hooks) == len(before) + 1
            (out * 2).sum().backward()
            assert len(p[""].backwards) == 1
        assert list(model.weight._backward_hooks or {}) == before
        assert (model.weight._backward_hooks is None) == unused
        assert torch.equal(p[""].grad_output, torch.full((3,), 2.0))
        (model.weight * 7).sum().backward()
        assert len(p[""].backwards) == 1
        assert len(fired) == (2 if own else 0)


def test_user_leaves_as_outputs_keep_their_hooks() -> None:
    """F7.8 Identity hands the user's own leaf on: its hooks are what they were, its gradient is the whole tensor's."""
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    x = torch.randn(3, 2, requires_grad=True)
    with Probe(model) as p:
        zoo.loss(model(x)).backward()
    assert x._backward_hooks is None
    assert torch.equal(p["0"].grad_output, x.grad)
    assert torch.equal(p["0"].grad_input, x.grad)
    assert torch.equal(p["1"].grad_input, x.grad)
    assert "pass-through" in reasons(p, "0")


@pytest.mark.filterwarnings("ignore::probe.ProbeWarning")
def test_modules_and_parameters_that_are_replaced() -> None:
    """F7.9 replaced weights are no matter, ``.double()`` neither; a module that was replaced is reported."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with Probe(model) as p:
        model[0].weight = nn.Parameter(torch.eye(2))
        model.load_state_dict({"0.weight": torch.eye(2), "0.bias": torch.zeros(2)}, assign=True)
        model.double()
        model(torch.ones(1, 2).double()).sum().backward()
        assert p["0"].output.tolist() == [[1.0, 1.0]]
        assert p["0"].grad_output.dtype == torch.float64
    with Probe(model) as p:
        model[1] = nn.Sigmoid()
        model(torch.ones(1, 2).double()).sum().backward()
    assert "it was replaced by another module" in reasons(p, "1")
    with pytest.raises(AttributeError, match="it was replaced by another module"):
        _ = p["1"].output


def test_bypassed_modules_are_listed() -> None:
    """F7.10 a module with its own ``__call__`` and one whose ``.forward`` is called directly: told, and why."""

    class OwnCall(nn.Module):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.direct, self.fine = OwnCall(), nn.Linear(2, 2), nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fine(self.direct.forward(self.own(x)))

    model = Model()
    with pytest.warns(ProbeWarning, match="2 of 3 probed layers were never called: 'own', 'direct'"), Probe(model) as p:
        model(torch.randn(1, 2)).sum().backward()
    assert "OwnCall overrides __call__" in reasons(p, "own")
    assert "calls its .forward directly" in reasons(p, "direct")


def test_modules_that_cannot_be_hashed() -> None:
    """F7.10 a module with ``__eq__`` and no ``__hash__`` is a layer like any other."""

    class Unhashable(nn.Module):
        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.fc = Unhashable(), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.odd(x))

    model, x = Model(), torch.randn(1, 2, requires_grad=True)
    with Probe(model) as p:
        model(x).sum().backward()
        model.fc(x)
        model(x).sum().backward()
    assert torch.equal(p["odd"].output, 2 * x.detach())
    assert torch.equal(p["odd"].grad_input, 2 * p["odd"].grad_output)
    assert p.report() == []
    del p  # the check for hooks that are left walks the modules of probes that are alive, which torch does by hash


# -- 8 activation checkpointing ----------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Two checkpointed blocks, the first one with a checkpoint inside, and a layer without."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how
        self.block1 = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.block2 = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), self.block1[0], nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def nested(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.run(self.block1, x) * 2)

    def run(self, function: Any, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(function, x, **self.how) if self.how else function(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.run(self.nested, x)
        return self.head(self.run(self.block2, x))


CHECKPOINTS = pytest.mark.parametrize(
    "how",
    [{"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "early_stop": False}],
    ids=["reentrant", "early_stop", "no_early_stop"],
)


def checkpoint_twins(how: dict[str, Any]) -> tuple[Probe, Probe, nn.Module]:
    """Probes of the same model run without and with checkpoints, the model with; outputs and gradients agree."""
    model = Checkpointed(**how)
    plain = copy.deepcopy(model)
    plain.how = {}
    x = torch.randn(3, 4, requires_grad=True)
    probes = []
    for each in (plain, model):
        torch.manual_seed(1)
        with Probe(each, "*") as p:
            zoo.loss(each(x)).backward()
        probes.append(p)
    assert same(gradients(model), gradients(plain))
    return probes[0], probes[1], model


@CHECKPOINTS
def test_recomputation_is_no_new_call(how: dict[str, Any]) -> None:
    """F8.1 F8.1b hooks fire again inside backward: that is no new call, and the values are those of the first."""
    wanted, p, _ = checkpoint_twins(how)
    for name in wanted:
        assert len(p[name].calls) == len(wanted[name].calls), name
        for got, want in zip(p[name].calls, wanted[name].calls, strict=True):
            assert torch.equal(got.output, want.output), name
            assert torch.equal(got.input, want.input), name


@CHECKPOINTS
def test_gradients_under_checkpointing(how: dict[str, Any]) -> None:
    """F8.1 F8.1b gradients of checkpointed layers belong to the call they were computed for, nested ones as well."""
    wanted, p, _ = checkpoint_twins(how)
    for name in wanted:
        for k, (got, want) in enumerate(zip(p[name].calls, wanted[name].calls, strict=True)):
            assert torch.equal(got.grad_output, want.grad_output), (name, k)
            if name != "block1.1":
                assert torch.equal(got.grad_input, want.grad_input), (name, k)


@CHECKPOINTS
def test_a_model_that_is_checkpointed_as_a_whole(how: dict[str, Any]) -> None:
    """F8.1b the pass begins within a reentrant checkpoint, where gradients are disabled: they come all the same."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(3, 4, requires_grad=True)
    probes = []
    for run in (lambda: model(x), lambda: checkpoint(model, x, **how)):
        torch.manual_seed(1)
        with Probe(model, keep=2) as p:
            out = run()
            with torch.no_grad():
                model(x)  # another pass, whose calls must not be taken for those
            out.sum().backward()
        probes.append(p.passes[0])
    wanted, got = probes
    for name in wanted:
        assert torch.equal(got[name].output, wanted[name].output), name
        assert torch.equal(got[name].grad_output, wanted[name].grad_output), name
        assert torch.equal(got[name].grad_input, wanted[name].grad_input), name


@CHECKPOINTS
@pytest.mark.parametrize("kinds", [*Kind, Kind.all()], ids=lambda kinds: kinds.label)
def test_early_stop_leaves_no_open_call(how: dict[str, Any], kinds: Kind) -> None:
    """F8.2 a recomputation that is aborted half way leaves nothing open; later passes are right."""
    model = Checkpointed(**how)
    x = torch.randn(3, 4, requires_grad=True)
    with Probe(model, "*", kinds=kinds) as p:
        for _ in range(3):
            model(x).sum().backward()
            assert p._session.local.replay_stack == ()
            assert p._session.local.current is None
    assert [len(p[name].calls) for name in ("", "block1", "block1.0", "block2.0")] == [1, 1, 2, 1]


@CHECKPOINTS
def test_checkpointed_layers_are_logged_once(how: dict[str, Any], tmp_path: Path) -> None:
    """F8.1 F8.1b what is logged of a step is the same with checkpoints and without: no value counts twice."""
    model = Checkpointed(**how)
    plain = copy.deepcopy(model)
    plain.how = {}
    x = torch.randn(3, 4, requires_grad=True)
    found = []
    for name, each in (("plain", plain), ("checkpointed", model)):
        torch.manual_seed(1)
        with Board(str(tmp_path / name)) as board, Probe(each) as p:
            p.log(board, stats, histogram)
            zoo.loss(each(x)).backward()
        events = reading.read(tmp_path / name)
        drawn = {tag: events.Histograms(tag)[0].histogram_value for tag in events.Tags()["histograms"]}
        found.append({tag: (each.num, each.sum, list(each.bucket)) for tag, each in drawn.items()})
    assert found[0] == found[1]
    assert "block1.0/grad_output#1/histogram" in found[0]


def test_maths_in_observers_does_not_disturb_checkpoints() -> None:
    """F8.3 what an observer computes must save no tensors: non-reentrant checkpoints would count them."""
    model = Checkpointed(use_reentrant=False)
    x = torch.randn(3, 4, requires_grad=True)
    norms: list[torch.Tensor] = []

    class Bound:
        def bind(self, site: Any) -> Any:
            weight = torch.ones(1, requires_grad=True)
            return lambda tensor: norms.append((tensor * weight).exp().norm())

    with Probe(model, observers=[Bound(), lambda c: norms.append((c.value * model.head.weight.sum()).norm())]):
        zoo.loss(model(x)).backward()
    assert norms
    assert not any(norm.requires_grad for norm in norms)


# -- 9 gradient modes --------------------------------------------------------------------------------------------------


@MODES
def test_modes_without_gradients(mode: Any) -> None:
    """F9.1 hooks on tensors that need no gradient raise: outputs are captured, and the report says why no gradients."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    with mode(), Probe(model) as p:
        out = model(torch.tensor([[1, 2]]))
        if out.requires_grad:
            out.sum().backward()
    assert p["0"].output.shape == (1, 2, 4)
    assert p["0"].grad_output is None
    if mode is torch.enable_grad:
        assert "frozen" in reasons(p, "0")
        assert reasons(p, "1") == ""
    else:
        assert reasons(p, "") == "no gradients: the forward ran under no_grad or inference_mode"
        assert p["1"].grad_output is None


def test_frozen_backbone() -> None:
    """F9.2 no gradient reaches a frozen backbone, which is said; it does once the input requires one."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2))
    model[0].requires_grad_(False)
    image = torch.randn(1, 3, 8, 8)
    with Probe(model) as p:
        model(image).sum().backward()
    assert p["0"].grad_output is None
    assert "frozen" in reasons(p, "0")
    with Probe(model) as p:
        model(image.requires_grad_()).sum().backward()
    assert p["0"].grad_output.abs().sum() > 0
    assert model[0].weight.grad is None
    assert torch.equal(p["0"].grad_input, image.grad)


def test_gradient_of_one_weight_only() -> None:
    """F9.3 ``autograd.grad(y, weight)`` runs a part of the graph: layers on that path get gradients, others do not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Linear(2, 1))
    x = torch.randn(3, 2)
    with Probe(model) as p:
        torch.autograd.grad(model(x).sum(), model[2].weight)
    assert torch.equal(p["3"].grad_output, torch.ones(3, 1))
    assert torch.equal(p["2"].grad_output, p["3"].grad_input)
    assert p["1"].grad_output is None
    assert p["2"].grad_input is None
    assert "no gradient was asked back" in reasons(p, "0")
    assert model[2].weight.grad is None


def test_create_graph() -> None:
    """F9.4 gradients under create_graph are captured detached; the second backward is a second entry."""
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.randn(3, 2, requires_grad=True)
    with Probe(model) as p:
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        first = p["1"].grad_output
        assert not first.requires_grad
        assert not p["0"].grad_input.requires_grad
        assert torch.equal(p["0"].grad_input, gradient.detach())
        gradient.pow(2).sum().backward()
    assert len(p["1"].backwards) == 2
    assert torch.equal(p["1"].backwards[0].grad_output, first)
    assert not any(each.grad_output.requires_grad for each in p["0"].backwards)


def test_two_backwards_through_one_graph() -> None:
    """F9.5 retain_graph: each backward pass has its own entry, ``.grad_output`` is the last one's."""
    model = zoo.Shortcut()
    x = torch.randn(3, 4)
    with Probe(model) as p:
        out = model(x)
        out.sum().backward(retain_graph=True)
        (out * 3).sum().backward()
    for name in p:
        once, thrice = p[name].backwards
        torch.testing.assert_close(thrice.grad_output, 3 * once.grad_output)
        assert torch.equal(p[name].grad_output, thrice.grad_output)
    once, thrice = p["swish"].backwards
    torch.testing.assert_close(thrice.grad_input, 3 * once.grad_input)


def test_captured_gradients_are_nobodys_buffer() -> None:
    """F9.6 a stored gradient may be the user's own buffer, or what ``.grad`` sums up in: ours is a copy."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with Probe(model) as p:
        buffer = torch.ones(3, 2)
        model(torch.randn(3, 2)).backward(buffer)
        buffer.zero_()
    assert torch.equal(p["1"].grad_output, torch.ones(3, 2))

    model = Weight()
    with Probe(model) as p:
        model().sum().backward()
        model.weight.grad.mul_(5)
        assert torch.equal(p[""].grad_output, torch.ones(3))
        assert torch.equal(model.weight.grad, torch.full((3,), 5.0))


def test_training_is_bit_identical() -> None:
    """F9.7 a hook that returns or changes a gradient changes the training: with all kinds on, not one bit differs."""
    model = zoo.ConvNet()
    twin = copy.deepcopy(model)
    runs = []
    for each, probed in ((twin, False), (model, True)):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        with Probe(each, "*") if probed else torch.enable_grad():
            for _ in range(3):
                optimizer.zero_grad()
                out = each(torch.randn(2, 3, 8, 8))
                zoo.loss(out).backward()
                optimizer.step()
        runs.append([*each.state_dict().values(), out.detach(), torch.rand(1), *gradients(each)])
    assert same(*runs)


def test_unused_and_integer_outputs_are_none() -> None:
    """F9.8 the gradient has None for outputs that the loss did not use, and for integer ones."""

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x * 2, x * 3, x.argmax()

    model, x = Model(), torch.randn(3, requires_grad=True)
    with Probe(model) as p:
        model(x)[1].sum().backward()
    assert p[""].grad_output[0] is None
    assert torch.equal(p[""].grad_output[1], torch.ones(3))
    assert p[""].grad_output[2] is None
    assert torch.equal(p[""].grad_input, torch.full((3,), 3.0))


# -- 10 mixed precision ------------------------------------------------------------------------------------------------


def scaled_training(model: nn.Module, optimizer: Any, scaler: Any, batches: list[torch.Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()


def test_autocast(tmp_path: Path) -> None:
    """F10.1 captures keep bfloat16; statistics, and what observers compute, are in float32 or better."""
    model, x = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 2)), torch.randn(16, 4) * 1000
    products: list[torch.dtype] = []
    with Board(str(tmp_path)) as board, Probe(model, keep=1, observers=lambda c: products.append(multiplied(c))) as p:
        p.log(board, stats)
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()
    for field in ("output", "grad_output", "grad_input"):
        assert getattr(p["1"], field).dtype is torch.bfloat16
    assert model[0].weight.grad.dtype is torch.float32
    assert set(products) == {torch.float32}
    exact = p["0"].output.double()
    (mean,), (norm,) = (reading.scalars(tmp_path, f"0/output/{name}") for name in ("mean", "norm"))
    assert mean[1] == pytest.approx(float(exact.mean()), rel=1e-6)
    assert norm[1] == pytest.approx(float(exact.norm()), rel=1e-6)


def multiplied(c: Capture) -> torch.dtype:
    return (c.value.float() @ c.value.float().T).dtype


def test_gradients_under_a_scaler_are_told_as_scaled() -> None:
    """F10.2 without ``scaler=`` gradients come as they flow, times the scale: the report and a warning say so."""
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    p = Probe(model, "", optimizer=optimizer)
    p.__enter__()
    scaled_training(model, optimizer, scaler, [x])
    with pytest.warns(ProbeWarning, match=r"GradScaler's scale in them; Probe\(..., scaler=scaler\) takes it out"):
        p.__exit__(None, None, None)
    assert torch.equal(p[""].grad_output, 1024 * 2 * p[""].output)
    assert "scaler=scaler" in reasons(p, "")

    with Probe(model, "", optimizer=optimizer) as p:
        scaled_training(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), [x])
    assert torch.equal(p[""].grad_output, 2 * p[""].output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_without_the_scalers_scale(dtype: torch.dtype) -> None:
    """F10.2 with ``scaler=`` the scale is taken out; float16, which would lose small values, becomes float32."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    flowed: list[torch.Tensor] = []
    with Probe(model, scaler=scaler, observers=lambda c: None, keep=1) as p:
        p.edit("1", lambda gradient: flowed.append(gradient) or gradient, on=Kind.GRAD_OUTPUT)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = model(x).float().sum() * 1e-8
        scaler.scale(loss).backward()
    got = p["1"].grad_output
    assert flowed[0].dtype is dtype
    assert got.dtype is (torch.float32 if dtype is torch.float16 else dtype)
    torch.testing.assert_close(got.float(), torch.full((3, 2), 1e-8), rtol=1e-2, atol=0)
    assert p["1"].grad_input.abs().max() < 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_are_marked(fused: bool, tmp_path: Path) -> None:
    """F10.2 the log tells how many updates were skipped, and has the gradients without scale."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(3, 4)
    twin = copy.deepcopy(model)
    twin(x).square().sum().backward()
    norm = float(twin.weight.grad.norm())
    with Board(str(tmp_path)) as board, Probe(model, "", optimizer=optimizer, scaler=scaler) as p:
        p.log(board, stats)
        scaled_training(model, optimizer, scaler, [x, x.clone().fill_(torch.inf), x, x])
    assert p.schedule.skipped == [1]
    skipped, scales = (reading.scalars(tmp_path, f"grad_scaler/{name}") for name in ("skipped", "scale"))
    gradients = reading.scalars(tmp_path, "weight/grad/norm")
    nan, inf = (reading.scalars(tmp_path, f"Linear/output/{name}") for name in ("nan", "inf"))
    bad = [a + b for (_, a), (_, b) in zip(nan, inf, strict=True)]
    if fused:  # the optimizer is called, and skips in its kernel: a step of its own
        assert skipped == [(0, 0), (1, 1), (2, 1), (3, 1)]
        assert [scale for _, scale in scales] == [1024, 1024, 512, 512]
        assert bad == [0, 6, 0, 0]
        del gradients[1]
    else:  # it is not called: the step goes on until an update is made
        assert skipped == [(0, 0), (1, 1), (2, 1)]
        assert [scale for _, scale in scales] == [1024, 512, 512]
        assert bad == [0, 6, 0]
    assert [value for _, value in gradients] == pytest.approx([norm] * 3, rel=1e-5)


# -- 12 wrappers: F12.2 and F12.3 take two processes, and are in tests/ranks.py ----------------------------------------


# -- 13 transforms, exporters, odd tensors -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit")  # jvp scripts its own decompositions
@pytest.mark.parametrize("transform", ["vmap", "grad", "vmap(grad)", "jvp", "functional_call"])
def test_transforms_leave_no_wrappers(transform: str, tmp_path: Path) -> None:
    """F13.1 F13.2 hooks get wrappers that die with the transform: what is captured is the full batch, plain."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3, 4)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().sum()

    run: Callable[[], Any] = {
        "vmap": lambda: torch.vmap(model)(x),
        "grad": lambda: torch.func.grad(loss)(x),
        "vmap(grad)": lambda: torch.vmap(torch.func.grad(loss))(x),
        "jvp": lambda: torch.func.jvp(model, (x,), (torch.ones_like(x),)),
        "functional_call": lambda: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
    }[transform]
    wanted, out = run(), model(x).detach()
    seen: dict[str, torch.Tensor] = {}

    class Bound:
        def bind(self, site: Any) -> Any:
            return lambda tensor: seen.update({f"{site.name} {site.kind.label}": tensor.clone()})

    with Board(str(tmp_path)) as board, Probe(model, observers=Bound(), keep=1) as p:
        p.log(board, stats, histogram)
        got = run()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    values = {"2 output": p["2"].output, "0 input": p["0"].input}
    if "grad" in transform:
        torch.testing.assert_close(p["2"].grad_output, 2 * out)
        values |= {"2 grad_output": p["2"].grad_output, "0 grad_input": p["0"].grad_input}
    torch.testing.assert_close(p["2"].output, out)
    for where, value in values.items():
        assert not torch._C._functorch.is_functorch_wrapped_tensor(value), where
        assert torch.equal(seen[where], value), where
    assert reading.scalars(tmp_path, "2/output/norm") == [(0, pytest.approx(float(out.norm()), rel=1e-5))]


@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # torch 2.11's unflatten
def test_export() -> None:
    """F13.3 exporting bakes in no hook and captures nothing fake; exported programs are refused or told of."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), torch.randn(3, 4)
    with Probe(model) as p:
        model(x).sum().backward()
        before = {name: p[name].output for name in p}
        program = torch.export.export(model, (x,))
        p.edit("0", lambda output: output * 0)
        edited = torch.export.export(model, (x,))
    assert all(p[name].output is before[name] for name in p)
    for each in (program, edited):
        assert torch.equal(each.module()(x), model(x))
    with pytest.raises(TypeError, match=r"ExportedProgram.*torch\.export\.unflatten\(program\)"):
        Probe(program)
    exported = program.module()
    p = Probe(exported, "0", "2").__enter__()
    exported(x)
    with pytest.warns(ProbeWarning, match="2 of 2 probed layers were never called.*the program was exported"):
        p.__exit__(None, None, None)
    assert "unflatten" in reasons(p, "2")
    with Probe(torch.export.unflatten(program)) as p:
        p._session.model(x)
    torch.testing.assert_close(p["0"].output, model[0](x).detach())


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_jit() -> None:
    """F13.4 a traced module is refused by name like a scripted one; tracing a probed model leaves no hook in it."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(3, 4)
    with Probe(model) as p:
        traced = torch.jit.trace(model, x, check_trace=False)
    assert not p._session.taps[next(iter(p._layers))].fired
    for each in (traced, torch.jit.script(model)):
        with pytest.raises(TypeError, match="the model is a ScriptModule: torch puts no hooks on it"):
            Probe(each)
    assert torch.equal(traced(x), model(x))


def test_fx() -> None:
    """F13.5 symbolic tracing hands proxies to hooks: not captured; in the traced graph the shared leaves are live."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2))), torch.randn(3, 4)
    with Probe(model, "*") as p:
        model(x)
        before = p["1"].output
        traced = torch.fx.symbolic_trace(model)
        assert p["1"].output is before
        traced(x)
    assert torch.equal(p["1.1"].output, before)
    with Probe(traced) as p:
        traced(x).sum().backward()
    assert torch.equal(p["1.1"].output, before)
    assert torch.equal(p["1.1"].grad_output, torch.ones(3, 2))


def test_fused_transformer_layers_are_seen() -> None:
    """F13.6 in eval mode torch would fuse the layer: all sublayers are seen; the attention's projection is told of."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)
    model.eval()
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        fused = model(x)
        with Probe(model) as p:
            out = model(x)
    torch.testing.assert_close(out, fused)
    for name in ("self_attn", "linear1", "norm1", "dropout", "linear2", "norm2"):
        assert p[f"layers.0.{name}"].output is not None
    assert "layers.0.self_attn.out_proj" not in p
    layer = model.layers[0]
    torch.testing.assert_close(p["layers.0.linear1"].output, layer.linear1(p["layers.0.norm1"].output).detach())
    with pytest.warns(ProbeWarning, match="out_proj"), torch.no_grad(), Probe(model, "*out_proj", "*linear2") as p:
        model(x)
    assert "uses its weights without calling it" in reasons(p, "layers.0.self_attn.out_proj")


# -- 14 threads and workers --------------------------------------------------------------------------------------------


def in_threads(work: Callable[[int], None], count: int = 2) -> None:
    """Run ``work(0)``, ``work(1)``, ... in threads; an exception in one of them fails the test."""
    errors: list[BaseException] = []

    def run(k: int) -> None:
        try:
            work(k)
        except BaseException as error:
            errors.append(error)
            raise

    previous, threading.excepthook = threading.excepthook, lambda args: None
    try:
        threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        threading.excepthook = previous
    if errors:
        raise errors[0]


@pytest.mark.parametrize("backward", ["tensor", "module", "reentrant"])
def test_threads_do_not_mix(backward: str) -> None:
    """F14.1 two threads through one probed model, in lockstep: each reads its own activations and gradients."""
    how = {"use_reentrant": True} if backward == "reentrant" else {}
    model = Checkpointed(**how).eval()
    model.block1[1].inplace = False  # torch's module hook does not bear it
    meet = threading.Barrier(2, timeout=20)
    with Probe(model, backward="module" if backward == "module" else "tensor") as p:

        def work(k: int) -> None:
            for i in range(8):
                x = torch.full((2 + k, 4), float(10 * k + i), requires_grad=True)
                weight = torch.full((2 + k, 2), float(100 * k + i))
                meet.wait()
                out = model(x)
                meet.wait()
                (out * weight).sum().backward()
                meet.wait()
                assert torch.equal(p["block1.0"].calls[0].input, x.detach())
                assert torch.equal(p["head"].grad_output, weight)
                assert [call.grad_output.shape for call in p["block1.0"].calls] == [(2 + k, 4)] * 2
                assert torch.equal(p["block1.0"].calls[0].grad_input, x.grad)

        in_threads(work)


@pytest.mark.parametrize("how", ["module", "reentrant"])
def test_a_backward_costs_the_same_after_many_calls(how: str) -> None:
    """F8.1b no search through all earlier calls, which made steps of a long training several times as dear."""
    model = nn.Sequential(nn.Linear(2, 2))
    x = torch.randn(1, 2, requires_grad=True)

    def run(times: int = 1) -> torch.Tensor:
        forward = lambda x: [model(x) for _ in range(times)][-1]  # noqa: E731
        return forward(x) if how == "module" else checkpoint(forward, x, use_reentrant=True)

    def step() -> float:
        out, start = run(), time.perf_counter()
        out.sum().backward()
        return time.perf_counter() - start

    with Probe(model, kinds=Kind.GRAD_OUTPUT, backward="module" if how == "module" else "tensor"):
        early = min(step() for _ in range(20))
        run(4096)
        late = min(step() for _ in range(20))
    assert late < 2 * early


def test_threads_reuse_their_identifiers() -> None:
    """F14.1b get_ident() of a thread that ended is given to the next: a new thread has no passes of its own."""
    model = nn.Sequential(nn.Linear(2, 2))
    idents: list[int] = []
    with Probe(model) as p:

        def first(_: int) -> None:
            idents.append(threading.get_ident())
            model(torch.ones(1, 2))

        def second(_: int) -> None:
            idents.append(threading.get_ident())
            assert torch.equal(p["0"].input, torch.zeros(1, 2))

        in_threads(first, 1)
        model(torch.zeros(1, 2))
        in_threads(second, 1)
    assert torch.equal(p["0"].input, torch.zeros(1, 2))


def test_a_thread_reads_the_latest_pass_if_it_has_none() -> None:
    """F14.1 the main thread, which ran nothing itself, reads what the worker threads ran; its own pass comes first."""
    model = nn.Sequential(nn.Linear(2, 2))
    with Probe(model) as p:
        in_threads(lambda k: model(torch.full((1, 2), 7.0)), 1)
        assert torch.equal(p["0"].input, torch.full((1, 2), 7.0))
        model(torch.zeros(1, 2))
        in_threads(lambda k: model(torch.full((1, 2), 8.0)), 1)
        assert torch.equal(p["0"].input, torch.zeros(1, 2))


def test_backward_in_another_thread() -> None:
    """F14.2 CPU backward hooks run in the thread that calls backward: the gradients belong to the forward's call."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with Probe(model) as p:
        out = model(torch.randn(3, 2))
        in_threads(lambda k: out.sum().backward(), 1)
        assert torch.equal(p["1"].grad_output, torch.ones(3, 2))
        assert len(p["0"].backwards) == 1


def test_leaves_of_two_threads() -> None:
    """F14.1 a pass that begins in one thread takes no hook off a leaf that another thread's pass handed on."""
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    meet = threading.Barrier(2, timeout=20)
    with Probe(model) as p:

        def work(k: int) -> None:
            x = torch.randn(2 + k, 2, requires_grad=True)
            for turn in range(2):
                if turn == k:
                    out = model(x)
                meet.wait()
            zoo.loss(out).backward()
            assert torch.equal(p["0"].grad_output, x.grad)

        in_threads(work)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(method: str) -> None:
    """F14.3 a probed model in DataLoader workers works, forked and spawned; their captures stay with them.

    Batches come in shared memory, which cannot be lazily cloned: they are captured as well.
    """
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    wanted = [model(torch.full((1, 2), float(i))).detach() for i in range(3)]
    with Probe(model) as p:
        loader = DataLoader(zoo.Featurised(model), num_workers=1, multiprocessing_context=method)
        batches = list(loader)
        assert same(batches, wanted)
        assert p["0"].calls == []
        assert batches[0].is_shared()
        model(batches[1])
        batches[1].zero_()
    assert torch.equal(p["0"].input, wanted[1])


# -- 15 memory ---------------------------------------------------------------------------------------------------------


class Token:
    """Something a graph node holds, to see whether the node is alive."""


class Traced(torch.autograd.Function):
    """Doubles; its node holds a `Token`."""

    tokens: ClassVar[weakref.WeakSet[Token]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.token = Token()
        Traced.tokens.add(ctx.token)
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * 2


class Graph(nn.Module):
    """A layer whose graph node can be watched, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.inner, self.head = nn.Linear(2, 2), Doubles(), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.fc(x)))


class Doubles(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Traced.apply(x)


@pytest.mark.parametrize("backward", ["tensor", "module"])
@pytest.mark.parametrize("how", ["forward", "backward", "no keep", "edit"])
def test_nothing_undetached_is_kept(how: str, backward: str) -> None:
    """F15.2 the graph dies with the user's last reference to it, inside the block and without the collector."""
    Traced.tokens.clear()
    seen: list[Any] = []
    model, x = Graph(), torch.randn(3, 2, requires_grad=True)
    gc.disable()
    try:
        with Probe(model, "*", keep=0 if how == "no keep" else 2, observers=seen.append, backward=backward) as p:
            if how == "edit":
                p.edit("inner", lambda value: value * 2, on=Kind.OUTPUT | Kind.INPUT)
            for _ in range(3):
                out = model(x).sum()
                if how != "forward":
                    out.backward()
                assert len(Traced.tokens) == 1
                del out
                assert not Traced.tokens
        assert not Traced.tokens
        assert seen
    finally:
        gc.enable()


def test_every_captured_value_is_detached() -> None:
    """F15.1 no value that can be read is part of a graph."""
    from probe.tree import leaves

    model = zoo.Structured("nested")
    with Probe(model, "*") as p:
        zoo.loss(model(torch.randn(3, 4, requires_grad=True))).backward()
    for name in p:
        record = p[name]
        for value in (record.input, record.output, record.grad_input, record.grad_output):
            assert leaves(value)
            assert not any(tensor.requires_grad or tensor.grad_fn for _, tensor in leaves(value))


@pytest.mark.parametrize("backward", ["tensor", "module"])
def test_probe_that_is_dropped_without_exit(backward: str) -> None:
    """F15.3 a forgotten probe is collected while its model lives on, and takes its hooks with it."""
    model, x = zoo.Shortcut(), torch.randn(2, 4, requires_grad=True)
    before = zoo.fingerprint(model)
    p = Probe(model, backward=backward)
    p.__enter__()
    p.edit("fc", lambda value: value * 2)
    out = model(x)
    kept = weakref.ref(p["fc"].output)
    del p
    assert kept() is None  # at once: captured values do not wait for the garbage collector
    assert zoo.fingerprint(model) == before
    out.sum().backward()


def test_a_thousand_blocks_leave_nothing() -> None:
    """F15.4 1000 with-blocks: no hooks, and no more objects than before."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(1, 2)
    before = zoo.fingerprint(model)

    def blocks(count: int) -> int:
        for k in range(count):
            with Probe(model, optimizer=optimizer, backward="tensor") as p:
                out = model(x)
                if k % 2:
                    out.sum().backward()
                assert len(p["0"].calls) == 1
        del p, out
        gc.collect()
        return sum(type(each) is not weakref.ReferenceType for each in gc.get_objects())  # the fixture keeps those

    first = blocks(20)
    assert blocks(1000) - first < 50
    model.zero_grad()
    assert zoo.fingerprint(model) == before
    assert not optimizer._optimizer_step_post_hooks


# -- 16 order, global hooks --------------------------------------------------------------------------------------------


def test_only_the_probed_model_is_seen() -> None:
    """F16.1 a global hook fires for losses and other models too: the probe sees its own model alone."""
    model, other = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    seen: set[str] = set()
    with Probe(model, "*", observers=lambda capture: seen.add(capture.name)):
        nn.MSELoss()(model(other(torch.randn(1, 2))), torch.zeros(1, 2)).backward()
    assert seen == {"", "0"}


def test_hooks_that_change_outputs() -> None:
    """F16.2 what another hook, registered before the probe was entered, makes of a value is what is captured."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    handles = [
        model[0].register_forward_hook(lambda m, a, o: o * 2),
        model[1].register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
    ]
    with Probe(model) as p:
        out = model(torch.randn(3, 2))
        out.sum().backward()
    for handle in handles:
        handle.remove()
    x = p["0"].input
    assert torch.equal(p["0"].output, F.linear(x, model[0].weight, model[0].bias).detach() * 2)
    assert torch.equal(p["1"].input, p["0"].output + 1)
    assert torch.equal(p["1"].output, out.detach())
    torch.testing.assert_close(p["1"].grad_input, 1 - p["1"].output ** 2)
    assert torch.equal(p["0"].grad_output, p["1"].grad_input)


def test_module_backward_hook_replaces_nothing() -> None:
    """F16.3 a full backward hook's return value replaces grad_input: ours returns None."""
    model, x = zoo.Shortcut(), torch.randn(3, 4, requires_grad=True)
    zoo.loss(model(x)).backward()
    wanted = [g.clone() for g in (*gradients(model), x.grad) if g is not None]
    model.zero_grad()
    x.grad = None
    with Probe(model, backward="module") as p:
        zoo.loss(model(x)).backward()
    for got, want in zip([*gradients(model), x.grad], wanted, strict=True):  # torch's hook reorders sums of gradients
        torch.testing.assert_close(got, want)
    model.zero_grad()
    x.grad = None
    with Probe(model) as q:
        zoo.loss(model(x)).backward()
    assert same([*gradients(model), x.grad], wanted)
    for name in p:
        torch.testing.assert_close(p[name].grad_input, q[name].grad_input)
        torch.testing.assert_close(p[name].grad_output, q[name].grad_output)
    assert q.report() == []


# -- 17 the legacy backward hook ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
def test_users_legacy_hooks() -> None:
    """F17.1 torch refuses legacy and full hooks on one module: the default bears the user's legacy hook."""
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.randn(3, 2)
    fired: list[Any] = []
    handle = model[0].register_backward_hook(lambda *given: fired.append(given) and None)
    before = zoo.fingerprint(model)
    with pytest.raises(RuntimeError, match="Cannot use both"), Probe(model, backward="module"):
        pytest.fail("entered")
    assert zoo.fingerprint(model) == before
    with Probe(model) as p:
        model(x).sum().backward()
    assert len(fired) == 1
    assert torch.equal(p["0"].grad_output, fired[0][2][0])
    model.zero_grad()
    assert zoo.fingerprint(model) == before
    handle.remove()


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("backward", ["tensor", "module"])
@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_grad_input_has_the_inputs_shape(shape: tuple[int, ...], backward: str) -> None:
    """F17.2 the legacy hook's grad_input is that of the last autograd node: ours is the gradient at the input."""
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(shape, requires_grad=True)
    legacy: list[Any] = []
    handle = model[0].register_backward_hook(lambda m, grad_input, g: legacy.extend(grad_input) or None)
    model(x).sum().backward()
    handle.remove()
    model[0]._is_full_backward_hook = None
    assert [g.shape for g in legacy] != [x.shape]
    with Probe(model, backward=backward) as p:
        x.grad = None
        zoo.loss(model(x)).backward()
    assert torch.equal(p["0"].grad_input, x.grad)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
def test_legacy_hook_and_inplace() -> None:
    """F17.3 the legacy hook bears in-place operations, and its grad_output agrees with the probe's."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    legacy: list[torch.Tensor] = []
    handle = model[0].register_backward_hook(lambda m, i, grad_output: legacy.append(grad_output[0]) or None)
    with Probe(model) as p:
        model(torch.randn(4, 2)).sum().backward()
    handle.remove()
    assert torch.equal(legacy[0], p["0"].grad_output)
