"""Gradients at a module's input and output equal those of a graph that was split by hand around the module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from probe import Kind, Probe
from probe.tree import input_leaves, inputs, leaves, rebuild
from tests import zoo

Gradients = dict[str, torch.Tensor]


def hand_split(model: nn.Module, layer: nn.Module, run: Callable[[], Any]) -> list[tuple[Gradients, Gradients]]:
    """The oracle: per call of `layer` the gradients at its inputs and its outputs, by path.

    The layer works on copies of its inputs that are leaves, the rest of the model on copies of its outputs that are
    leaves. Backward goes by hand from the last call to the first: from the outputs of the layer to its inputs, and from
    there on into what came before.
    """
    calls: list[tuple[Any, Any, Any, Any]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        given: dict[str, torch.Tensor] = {}

        def cut(path: str, tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                return tensor
            given[path] = tensor.detach().clone().requires_grad_()
            return given[path].clone()  # an in-place module writes to this, no leaf

        came = dict(input_leaves(args, kwargs))
        new = rebuild(inputs(args, kwargs), cut, opaque=lambda value: value)
        if args:
            kwargs = rebuild(kwargs, lambda path, tensor: cut(f"kwargs{path}", tensor), opaque=lambda value: value)
            args = (new,) if len(args) == 1 else new
        else:
            kwargs = new
        calls.append((came, given, {}, {}))
        return args, kwargs

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        _, _, made, handed = calls[-1]

        def cut(path: str, tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                return tensor
            made[path] = tensor
            handed[path] = tensor.detach().clone().requires_grad_()
            return handed[path].clone()

        return rebuild(output, cut, opaque=lambda value: value)

    handles = [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after),
    ]
    zoo.loss(run()).backward(retain_graph=True)
    for handle in handles:
        handle.remove()
    found = []
    for came, given, made, handed in reversed(calls):
        at_output = {path: leaf.grad for path, leaf in handed.items() if leaf.grad is not None}
        used = [path for path in made if path in at_output]
        at_input: Gradients = {}
        if used:
            torch.autograd.backward(
                [made[path] for path in used], [at_output[path] for path in used], retain_graph=True
            )
            at_input = {path: leaf.grad for path, leaf in given.items() if leaf.grad is not None}
        for path, gradient in at_input.items():
            came[path].backward(gradient, retain_graph=True)
        found.append((at_input, at_output))
    return found[::-1]


def captured(p: Probe, name: str) -> list[tuple[Gradients, Gradients]]:
    """The same, as the probe tells it."""
    found = []
    for call in p[name].calls:
        at_input = dict(leaves(call.grad_input))
        if call.args and call.kwargs:
            at_input |= {f"kwargs{path}": g for path, g in leaves(call.grad_kwargs)}
        found.append((at_input, dict(leaves(call.grad_output))))
    return found


class Calls(nn.Module):
    """Calls one module in a way of its own."""

    def __init__(self, module: nn.Module, how: Callable[..., Any]) -> None:
        super().__init__()
        self.pre = nn.Linear(4, 4)
        self.module = module
        self.how = how

    def forward(self, x: torch.Tensor) -> Any:
        return self.how(self.module, self.pre(x), x)


class Function(nn.Module):
    """A module made of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.fc, *args, **kwargs)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def once(module: nn.Module, h: torch.Tensor, x: torch.Tensor) -> Any:
    return module(h)


def beside_shortcut(module: nn.Module, h: torch.Tensor, x: torch.Tensor) -> Any:
    return module(h) * 2 + 10 * h + x


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "chain": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 2), nn.GELU())),
        (3, 4), ("0", "1", "2", "3", "3.0", "3.1"),
    ),
    "shortcut": (zoo.Shortcut, (3, 4), ("fc", "swish", "")),
    "shared": (zoo.Shared, (3, 4), ("first", "act")),
    "recurrent": (zoo.Recurrent, (2, 3, 3), ("cell",)),
    "convnet": (
        zoo.ConvNet, (2, 3, 8, 8), ("features.0", "features.1", "features.2", "block", "block.bn", "block.relu", "fc"),
    ),
    "in-place dropout": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5, inplace=True), nn.ELU(inplace=True)), (3, 4),
        ("0", "1", "2"),
    ),
    "attention": (zoo.Attention, (2, 3, 8), ("norm", "")),
    "query, key, value": (
        lambda: Calls(nn.MultiheadAttention(4, 2), lambda m, h, x: m(h, x * 2, value=x + h)), (3, 2, 4), ("module",),
    ),
    "transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2), (2, 3, 4),
        ("layers.0", "layers.1", "layers.1.linear1", "layers.0.norm1", "layers.1.dropout1"),
    ),
    "transformer, norm first, in eval": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, norm_first=True).eval(), (3, 2, 4),
        ("linear2", "norm2", "dropout"),
    ),
    "lstm": (
        lambda: Calls(nn.LSTM(4, 3, 2), lambda m, h, x: m(h, (h[:2, :, :3] * 2, x[:2, :, 1:]))), (3, 2, 4), ("module",),
    ),
    "packed": (
        lambda: Calls(
            nn.GRU(4, 3, batch_first=True),
            lambda m, h, x: m(pack_padded_sequence(h, torch.tensor([3, 2]), batch_first=True))[0].data,
        ),
        (2, 3, 4), ("module",),
    ),
    "keywords": (
        lambda: Calls(Function(lambda fc, *, a, b=None: fc(a) * b), lambda m, h, x: m(a=h, b=x) + h), (3, 4),
        ("module",),
    ),
    "positional and keyword": (
        lambda: Calls(Function(lambda fc, a, *, b: fc(a) * b["x"]), lambda m, h, x: m(h, b={"x": x + h})), (3, 4),
        ("module", "module.fc"),
    ),
    "a dict beside a keyword of the same name": (
        lambda: Calls(Function(lambda fc, d, *, x: fc(d["x"]) * x), lambda m, h, x: m({"x": h}, x=2 * x)), (3, 4),
        ("module",),
    ),
    "a list": (
        lambda: Calls(Function(lambda fc, xs: sum(map(fc, xs))), lambda m, h, x: m([h, [x, h * 2][0]])), (3, 4),
        ("module", "module.fc"),
    ),
    "two consumers": (lambda: Calls(zoo.Swish(), beside_shortcut), (3, 4), ("module",)),
    "shortcut inside": (lambda: Calls(Function(lambda fc, x: fc(x).relu_() + x), beside_shortcut), (3, 4), ("module",)),
    "three consumers, one of them unused": (
        lambda: Calls(
            Function(lambda fc, x: (fc(x) * x, x.exp())), lambda m, h, x: m(h)[0]
        ), (3, 4), ("module",),
    ),
    "unused input": (lambda: Calls(Function(lambda fc, a, b: fc(a)), lambda m, h, x: m(h, x * 2)), (3, 4), ("module",)),
    "detached input": (lambda: Calls(Function(lambda fc, a: fc(a.detach())), beside_shortcut), (3, 4), ("module",)),
    "views go in": (
        lambda: Calls(nn.Tanh(), lambda m, h, x: [m(part) for part in (*h.chunk(2, -1), h.T, h[:, None])]), (3, 4),
        ("module",),
    ),
    "views come out": (lambda: Calls(Function(lambda fc, x: x.T[1:].reshape(-1)), once), (3, 4), ("module",)),
    "part of the output": (
        lambda: Calls(Function(lambda fc, x: fc(x).unbind(1)), lambda m, h, x: m(h)[2]), (3, 4), ("module",),
    ),
    "custom function": (lambda: Calls(Function(lambda fc, x: Cube.apply(x) + x), beside_shortcut), (3, 4), ("module",)),
    "checkpoint inside": (
        lambda: Calls(Function(lambda fc, x: checkpoint(fc, x, use_reentrant=False) * x), beside_shortcut), (3, 4),
        ("module",),
    ),
    "reentrant checkpoint inside": (
        lambda: Calls(Function(lambda fc, x: checkpoint(fc, x, use_reentrant=True) * x), beside_shortcut), (3, 4),
        ("module",),
    ),
    "in place inside": (
        lambda: Calls(Function(lambda fc, x: F.relu(x.mul(2).add_(1), inplace=True).mul(3)), beside_shortcut), (3, 4),
        ("module",),
    ),
    "in place on the input": (lambda: Calls(Function(lambda fc, x: fc(x.mul_(2).relu_())), once), (3, 4), ("module",)),
    "in place on a slice of the input": (
        lambda: Calls(Function(lambda fc, x: (x[:, 1:].mul_(2), fc(x))[1]), once), (3, 4), ("module",),
    ),
    "overwritten by the caller": (
        lambda: Calls(Function(lambda fc, x: fc(x)), lambda m, h, x: m(h).mul_(3).add_(h).relu_()), (3, 4),
        ("module", "module.fc"),
    ),
    "structured": (lambda: zoo.Structured("nested"), (3, 4), ("fc", "inner")),
    "leaf output of a sum": (lambda: Calls(Function(lambda fc, x: fc.weight + x.mean()), once), (3, 4), ("module",)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::probe.ProbeWarning")
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_a_hand_split_graph(case: str) -> None:
    """grad_input is the module's own share, grad_output the whole, for every call of every layer."""
    make, size, names = CASES[case]
    model = make().double()
    x = torch.randn(size, dtype=torch.float64)
    twin, given = copy.deepcopy(model), x.clone().requires_grad_()
    torch.manual_seed(1)
    with Probe(twin, "*") as p:
        zoo.loss(twin(given)).backward()
    for name in names:
        split, leaf = copy.deepcopy(model), x.clone().requires_grad_()
        torch.manual_seed(1)
        wanted = hand_split(split, split.get_submodule(name), lambda split=split, leaf=leaf: split(leaf))
        got = captured(p, name)
        assert len(got) == len(wanted) > 0
        for (got_in, got_out), (want_in, want_out) in zip(got, wanted, strict=True):
            assert got_in.keys() == want_in.keys(), name
            assert got_out.keys() == want_out.keys(), name
            torch.testing.assert_close(got_in, want_in, msg=lambda text, name=name: f"{name}: {text}")
            torch.testing.assert_close(got_out, want_out, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore::probe.ProbeWarning")
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_of_the_model_do_not_change_by_one_bit(case: str) -> None:
    """With all four kinds on every module, what the model computes is bit-identical, and so is the random state."""
    make, size, _ = CASES[case]
    model, x = make(), torch.randn(size)
    runs = []
    for probed in (False, True):
        each, leaf = copy.deepcopy(model), x.clone().requires_grad_()
        torch.manual_seed(1)
        with Probe(each, "*") if probed else torch.enable_grad():
            out = each(leaf)
            zoo.loss(out).backward()
        runs.append(
            [*(t for _, t in leaves(out)), leaf.grad, *(p.grad for p in each.parameters()), torch.get_rng_state()]
        )
    for plain, probed in zip(*runs, strict=True):
        assert (plain is None) == (probed is None)
        assert plain is None or torch.equal(plain, probed)


def test_hugging_face_style_model() -> None:
    """Inputs by keyword only, a mapping out: every block's share at ``hidden_states``."""
    model = zoo.HFModel().double()
    ids, mask = torch.randint(0, 11, (2, 5)), torch.ones(2, 5)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    with Probe(twin, "*", exclude="layers") as p:
        zoo.loss(twin(input_ids=ids, attention_mask=mask)).backward()
    for name in ("layers.0", "layers.1", "layers.0.norm", "layers.1.query_key_value", "layers.1.dense", "head"):
        split = copy.deepcopy(model)
        torch.manual_seed(1)
        wanted = hand_split(
            split, split.get_submodule(name), lambda split=split: split(input_ids=ids, attention_mask=mask)
        )
        torch.testing.assert_close(captured(p, name), wanted)
    assert p["layers.1"].grad_input["attention_mask"] is None
    assert set(p[""].grad_input) == {"input_ids", "attention_mask"}


def test_one_tensor_as_several_inputs() -> None:
    """One tensor given three times has one edge in the graph: each place shows the gradient of all, which is said."""
    model = Calls(nn.MultiheadAttention(4, 2), lambda m, h, x: m(h, h, h)[0] + h)
    x = torch.randn(3, 2, 4)
    with Probe(model, "module") as p:
        zoo.loss(model(x)).backward()
    query, key, value = p["module"].grad_input
    assert torch.equal(query, key)
    assert torch.equal(key, value)
    leaf = p["module"].args[0].requires_grad_()
    attention = copy.deepcopy(model.module)
    (whole,) = torch.autograd.grad(attention(leaf, leaf, leaf)[0], leaf, p["module"].grad_output[0])
    torch.testing.assert_close(query, whole)
    ((name, reason),) = p.report()
    assert name == "module"
    assert "the same tensor came in as '[0]', '[1]', '[2]'" in reason


def test_output_that_contains_the_input() -> None:
    """A module that hands its input on beside other things: whole gradient, and "pass-through" in the report."""
    model = Calls(Function(lambda fc, x: (x, fc(x))), lambda m, h, x: sum(m(h)))
    leaf = torch.randn(3, 4, requires_grad=True)
    with Probe(model, "pre", "module") as p:
        zoo.loss(model(leaf)).backward()
    assert torch.equal(p["module"].grad_input, p["pre"].grad_output)
    assert torch.equal(p["module"].grad_output[0], p["module"].grad_input)
    assert [name for name, reason in p.report() if "pass-through" in reason] == ["module"]


def test_input_view_that_the_module_overwrites() -> None:
    """A view written to in place loses its edge: said as lost, or right where it still can be had."""
    model = Calls(Function(lambda fc, x: fc(x.mul_(2))), lambda m, h, x: m(h[:, :]))
    with Probe(model, "module") as p:
        zoo.loss(model(torch.randn(3, 4))).backward()
    assert any("grad_input" in reason and "lost" in reason for name, reason in p.report())
    with pytest.raises(AttributeError, match=r"grad_input.*lost"):
        _ = p["module"].grad_input
    assert p["module"].grad_output.shape == (3, 4)


def test_only_what_the_backward_reached() -> None:
    """Two consumers of which one backward pass reaches one: the share of that pass alone, no leftovers in the next."""
    model = Calls(Function(lambda fc, x: (x * 2, x * 5)), once)
    with Probe(model, "module") as p:
        double, quintuple = model(torch.randn(3, 4))
        double.sum().backward(retain_graph=True)
        assert torch.equal(p["module"].grad_input, torch.full((3, 4), 2.0))
        quintuple.sum().backward(retain_graph=True)
        assert torch.equal(p["module"].grad_input, torch.full((3, 4), 5.0))
        (double + quintuple).sum().backward()
        assert torch.equal(p["module"].grad_input, torch.full((3, 4), 7.0))
    assert len(p["module"].backwards) == 3
    assert [each.grad_output[0] is None for each in p["module"].backwards] == [False, True, False]


def test_backward_that_fails_half_way_spoils_no_later_one() -> None:
    """A share that was half collected when the backward raised is not added to that of the next backward."""
    fail = [True]

    def raising(gradient: torch.Tensor) -> None:
        if fail.pop() if fail else False:
            raise ValueError("mine")

    def function(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
        late = x * 2
        late.register_hook(raising)
        return late + x.exp()

    model = Calls(Function(function), once)
    with Probe(model, "module") as p:
        out = model(torch.randn(3, 4)).sum()
        with pytest.raises(ValueError, match="mine"):
            out.backward(retain_graph=True)
        out.backward()
    torch.testing.assert_close(p["module"].grad_input, 2 + p["module"].input.exp())


def test_every_kind_alone() -> None:
    """Each kind delivers the same by itself as with the other three."""
    model, x = zoo.Shortcut(), torch.randn(3, 4, requires_grad=True)
    with Probe(model) as whole:
        zoo.loss(model(x)).backward()
    for kind in Kind:
        with Probe(model, kinds=kind) as p:
            zoo.loss(model(x)).backward()
        for name in p:
            assert torch.equal(getattr(p[name], kind.label), getattr(whole[name], kind.label))
            for other in set(Kind) - {kind}:
                with pytest.raises(
                    AttributeError, match=f"{other.label} of '{name}' was not asked for.*Kind.{kind.name}"
                ):
                    getattr(p[name], other.label)
