"""What a person reads: values in the structure they flowed in, and for everything absent the reason and the cure."""

from __future__ import annotations

import contextlib
import copy
import gc
import html.parser
import math
import pickle
import re
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from probe import Kind, NoSuchLayer, Probe, ProbeWarning
from probe.observers import seen
from probe.tree import leaves
from tests import zoo


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


class Apply(nn.Module):
    """A module made of a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


# -- structures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", zoo.Structuring.HOW)
def test_output_and_gradient_mirror_what_was_returned(how: str) -> None:
    """Type, keys, None leaves and plain numbers are as the module returned them; gradients sit in the same places."""
    model, x = zoo.Structured(how), torch.randn(3, 4)
    with Probe(model, "inner") as p:
        out = model(x)
        zoo.loss(out).backward()
    record = p["inner"]
    for value in (record.output, record.grad_output):
        assert type(value) is type(out)
        if isinstance(out, dict):
            assert list(value) == list(out)
    for (path, kept), (live_path, live) in zip(leaves(record.output), leaves(out), strict=True):
        assert path == live_path
        assert torch.equal(kept, live.detach())
        assert kept.dtype == live.dtype
    floating = [path for path, tensor in leaves(out) if tensor.requires_grad]
    assert [path for path, _ in leaves(record.grad_output)] == floating


def test_each_structure_reads_like_the_original() -> None:
    """Index, key, attribute: whatever the model's own code uses."""
    read = {}
    for how in zoo.Structuring.HOW:
        model = zoo.Structured(how)
        with Probe(model, "inner") as p:
            zoo.loss(model(torch.ones(2, 4))).backward()
        read[how] = p["inner"]
    a, none, b, number = read["tuple"].output
    assert (none, number) == (None, 3)
    assert a.shape == b.shape == (2, 4)
    assert read["tuple"].grad_output[1] is None
    assert read["dict"].output["n"].dtype == torch.int64
    assert read["dict"].grad_output["n"] is None
    assert read["namedtuple"].output.left is read["namedtuple"].output[0]
    assert read["dataclass"].output.hidden[0].shape == (2, 4)
    assert read["dataclass"].grad_output.cache is None
    assert read["modeloutput"].output.logits is read["modeloutput"].output["logits"]
    assert "object, not looked into" in repr(read["nested"].output[1].cache)
    assert repr(read["nested"].grad_output[1].cache) == repr(read["nested"].output[1].cache)


def test_packed_sequences_in_and_out() -> None:
    """As PackedSequence, with gradients in ``data`` and None elsewhere."""
    model = nn.LSTM(2, 3, bidirectional=True)
    packed = pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    with Probe(model) as p:
        out, _ = model(packed)
        zoo.loss(out.data).backward()
    assert isinstance(p[""].input, PackedSequence)
    assert isinstance(p[""].grad_output[0], PackedSequence)
    assert torch.equal(p[""].output[0].data, out.data.detach())
    assert p[""].grad_output[0].batch_sizes is None
    assert p[""].grad_output[1] == (None, None)


def test_numbers_text_and_unknown_objects_in_an_output() -> None:
    """Plain values stay as they are, other objects become a stand-in that names their type."""
    model = Apply(
        lambda x: {"x": x, "n": 3, "s": "text", "f": 0.5, "none": None, "shape": x.shape, "module": nn.Tanh()}
    )
    with Probe(model) as p:
        model(torch.ones(2))
    output = p[""].output
    assert (output["n"], output["s"], output["f"], output["none"], output["shape"]) == (3, "text", 0.5, None, (2,))
    assert repr(output["module"]) == "<Tanh, not looked into>"


# -- inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "shown"),
    [
        ((1,), {}, "sole"),
        ((1,), {"b": 2}, "sole"),
        ((1, 2), {}, "tuple"),
        ((1, 2), {"b": 2}, "tuple"),
        ((), {"a": 1, "b": 2}, "dict"),
        ((), {}, "nothing"),
    ],
)
def test_input_is_what_the_caller_gave(args: Any, kwargs: Any, shown: str) -> None:
    """``.args`` and ``.kwargs`` always; ``.input`` the sole argument, the tuple of positional ones, or the keywords."""
    args = tuple(torch.full((2,), float(each)) for each in args)
    kwargs = {name: torch.full((2,), float(each)) for name, each in kwargs.items()}
    model = Apply(lambda *a, **k: sum([*a, *k.values()], torch.zeros(2)))
    with Probe(model) as p:
        model(*args, **kwargs)
    record = p[""]
    assert len(record.args) == len(args)
    assert set(record.kwargs) == set(kwargs)
    assert all(torch.equal(kept, given) for kept, given in zip(record.args, args, strict=True))
    assert all(torch.equal(record.kwargs[name], kwargs[name]) for name in kwargs)
    if shown == "sole":
        assert torch.equal(record.input, args[0])
    elif shown == "tuple":
        assert all(map(torch.equal, record.input, args))
    elif shown == "dict":
        assert torch.equal(record.input["b"], kwargs["b"])
    else:
        assert record.input == ()
        assert record.grad_input == ()
        assert record.grad_kwargs == {}


def test_gradients_at_keyword_arguments() -> None:
    """By name in ``grad_kwargs``; ``grad_input`` follows ``input``."""
    model = Apply(lambda a, *rest, scale, mask=None: a * scale["x"] * 2 + sum(rest))
    a, b, s = (torch.full((2,), value, requires_grad=True) for value in (1.0, 2.0, 3.0))
    with Probe(model) as p:
        model(a, b, scale={"x": s}).sum().backward()
    record = p[""]
    assert torch.equal(record.grad_input[0], torch.full((2,), 6.0))
    assert torch.equal(record.grad_input[1], torch.ones(2))
    assert torch.equal(record.grad_kwargs["scale"]["x"], torch.full((2,), 2.0))
    assert torch.equal(record.backwards[0].grad_kwargs["scale"]["x"], torch.full((2,), 2.0))
    with Probe(model) as p:
        model(a=a, scale={"x": s}, mask=None).sum().backward()
    assert p[""].grad_input.keys() == {"a", "scale", "mask"}
    assert p[""].grad_input["mask"] is None
    assert torch.equal(p[""].grad_input["a"], p[""].grad_kwargs["a"])


# -- calls and passes --------------------------------------------------------------------------------------------------


def test_calls_are_those_of_the_last_pass_in_order() -> None:
    """``p[name]`` is the last call; reading an earlier one goes through ``.calls``."""
    model = zoo.Shared()
    with Probe(model) as p:
        model(torch.randn(2, 4)).sum().backward()
        x = torch.randn(2, 4)
        model(x).sum().backward()
    record = p["first"]
    assert len(record.calls) == 3
    assert torch.equal(record.calls[0].input, x)
    assert torch.equal(record.output, record.calls[2].output)
    assert torch.equal(record.calls[1].grad_input @ torch.eye(4), p["act"].calls[0].grad_output)
    assert record.name == "first"
    assert record.module_type is nn.Linear
    assert record.calls[1].name == "first"
    assert p["second"].calls[0].name == "first"


def test_records_stay_as_they_were_read() -> None:
    """A record that the user holds belongs to its pass: the next one does not change it."""
    model = nn.Sequential(nn.Linear(2, 2))
    with Probe(model) as p:
        model(torch.zeros(1, 2)).sum().backward()
        record = p["0"]
        model(torch.ones(1, 2)).sum().backward()
    assert torch.equal(record.input, torch.zeros(1, 2))
    assert torch.equal(p["0"].input, torch.ones(1, 2))
    del p
    gc.collect()
    assert record.grad_output.shape == (1, 2)
    assert len(record.calls) == 1


def test_a_call_of_a_part_is_a_pass_of_its_own() -> None:
    """Reading goes to the last pass that contains the layer; a call of the whole replaces those of its parts."""
    model = zoo.ConvNet()
    x = torch.randn(1, 3, 8, 8)
    with Probe(model) as p:
        model(x)
        hidden = model.features(x + 1)
        assert torch.equal(p["features.0"].input, x + 1)
        assert p["fc"].output.shape == (1, 5)
        assert len(p["features.0"].calls) == 1
        model.block(hidden)
        model.fc(torch.ones(1, 4))
        model.fc(torch.zeros(1, 4))
        assert len(p["fc"].calls) == 1
        assert torch.equal(p["fc"].input, torch.zeros(1, 4))
        model(x)
        assert torch.equal(p["features.0"].input, x)
        assert p["fc"].input.shape == (1, 4)
        assert p["fc"].input.abs().sum() > 0


def test_backwards_lists_every_backward_pass() -> None:
    """The first one first; ``grad_output`` and ``grad_input`` are the last one's."""
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.randn(3, 2, requires_grad=True)
    with Probe(model) as p:
        out = model(x)
        for factor in (1.0, 2.0, 3.0):
            (out * factor).sum().backward(retain_graph=True)
    for name in p:
        assert len(p[name].backwards) == 3
        for factor, each in zip((1.0, 2.0, 3.0), p[name].backwards, strict=True):
            torch.testing.assert_close(each.grad_input, factor * p[name].backwards[0].grad_input)
            torch.testing.assert_close(each.grad_output, factor * p[name].backwards[0].grad_output)
        assert torch.equal(p[name].grad_output, p[name].backwards[2].grad_output)


def test_gradients_of_several_losses_fall_into_place() -> None:
    """A backward that reaches one output only leaves the other's gradient None in that pass."""
    model = Apply(lambda x: (x * 2, x * 3))
    x = torch.ones(2, requires_grad=True)
    with Probe(model) as p:
        double, triple = model(x)
        double.sum().backward()
        triple.sum().backward()
    first, second = p[""].backwards
    assert first.grad_output[1] is None
    assert second.grad_output[0] is None
    assert torch.equal(second.grad_input, torch.full((2,), 3.0))


def test_reading_inside_the_block_between_forward_and_backward() -> None:
    """Activations are there at once; gradients are asked for by name of the missing step."""
    model = nn.Sequential(nn.Linear(2, 2))
    with Probe(model) as p:
        out = model(torch.ones(1, 2))
        assert torch.equal(p["0"].output, out.detach())
        with pytest.raises(
            AttributeError, match=r"there is no grad_output of '0': no backward pass has come back to it"
        ):
            _ = p["0"].grad_output
        assert p["0"].backwards == []
        out.sum().backward()
        assert torch.equal(p["0"].grad_output, torch.ones(1, 2))


def test_reading_while_the_forward_runs() -> None:
    """Layers that have returned can be read from inside the model; the one that runs has an input and no output yet."""
    seen: dict[str, Any] = {}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            seen["first"] = p["first"].output
            seen["input"] = p[""].input
            with pytest.raises(AttributeError, match="there is no output of '': its forward has not returned yet"):
                _ = p[""].output
            with pytest.raises(AttributeError, match="there is no output of 'second'"):
                _ = p["second"].output
            return self.second(hidden)

    model, x = Model(), torch.randn(1, 2)
    with Probe(model, "*") as p:
        model(x)
    assert torch.equal(seen["first"], p["first"].output)
    assert torch.equal(seen["input"], x)


def test_inputs_are_their_own_though_captured_with_the_output_before() -> None:
    """Writing to a record's tensor, as a plot may, changes no other record; also of one that was read in mid-pass."""
    read: list[torch.Tensor] = []
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh()))
    with Probe(model, "*", exclude="") as p:
        model[1].register_forward_pre_hook(lambda module, args: read.append(p["0"].output))
        hidden = model[0](x := torch.randn(1, 2)).detach()
        model(x)
    read[0].zero_()
    assert torch.equal(p["1"].input, hidden)
    p["1"].input.zero_()
    assert torch.equal(p["1.0"].input, hidden)


@pytest.mark.parametrize(
    ("between", "grad"),
    [
        (lambda h: h.add_(1), True),
        (lambda h: h.data.add_(1), True),
        (lambda h: h.t_(), True),
        (lambda h: h.t_(), False),
        (lambda h: h.untyped_storage().fill_(1), True),
        (lambda h: setattr(h, "data", h.data.t()), True),
    ],
    ids=[
        "in place",
        "behind autograd's back",
        "other geometry",
        "other geometry, inference",
        "through the storage",
        "another view as data",
    ],
)
def test_writes_between_an_output_and_the_next_input(between: Callable[[torch.Tensor], Any], grad: bool) -> None:
    """The same tensor is captured twice, and each time as it was."""
    seen: list[torch.Tensor] = []

    def write(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        between(args[0])
        seen.append(args[0].detach().clone())

    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    handle = model[1].register_forward_pre_hook(write)
    with Probe(model) as p, torch.inference_mode(not grad):
        before = model[0](x := torch.randn(2, 2)).detach().clone()
        model(x)
    handle.remove()
    assert torch.equal(p["0"].output, before)
    assert torch.equal(p["1"].input, seen[0])


@pytest.mark.parametrize("raises", [False, True])
def test_no_live_tensor_outlives_the_pass(raises: bool) -> None:
    """Of a graph that the user lets go, nothing is left once the forward is over."""
    graph: list[weakref.ref[Any]] = []

    def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        graph.append(weakref.ref(output))
        if raises:
            raise ValueError

    model = nn.Sequential(nn.Linear(2, 2))
    with Probe(model, "*"):
        handle = model[0].register_forward_hook(note)
        with contextlib.suppress(ValueError):
            model(torch.randn(1, 2))
        assert graph[0]() is None
        handle.remove()


# -- mappings ----------------------------------------------------------------------------------------------------------


def test_a_probe_is_iterated_by_names(image: torch.Tensor) -> None:
    """``list``, ``len``, ``in`` are about the selected layers."""
    p = Probe(zoo.ConvNet(), nn.Conv2d, "fc")
    assert list(p) == ["features.0", "block.conv", "fc"]
    assert len(p) == 3
    assert "fc" in p
    assert "block.bn" not in p
    assert "nothing" not in p
    assert None not in p


@pytest.mark.filterwarnings("ignore::probe.ProbeWarning")
def test_activations_and_gradients_are_mappings(image: torch.Tensor) -> None:
    """Name to output, name to grad_output, of the last calls; layers that have none are left out."""
    model = zoo.ConvNet()
    model.unused = nn.Linear(1, 1)
    model.features[0].requires_grad_(False)
    with Probe(model) as p:
        out = model(image)
        out.sum().backward()
    assert set(p.activations) == set(p) - {"unused"}
    assert torch.equal(p.activations["fc"], out.detach())
    assert set(p.gradients) == set(p) - {"unused", "features.0", "features.1", "features.2"}
    assert torch.equal(p.gradients["fc"], torch.ones(2, 5))
    with Probe(model, kinds=Kind.OUTPUT) as p:
        model(image)
    assert p.gradients == {}
    assert len(p.activations) == len(p) - 1


# -- what is absent, and why -------------------------------------------------------------------------------------------


def absent(p: Probe, name: str, field: str) -> str:
    with pytest.raises(AttributeError) as caught:
        getattr(p[name], field)
    return str(caught.value)


def test_unknown_and_unselected_names() -> None:
    """A KeyError with the nearest names, or with what to type to probe that layer too."""
    p = Probe(zoo.ConvNet(), "features.*")
    with pytest.raises(
        NoSuchLayer, match=r"the model has no layer 'features\.9'; did you mean 'features\.[012]'"
    ) as caught:
        _ = p["features.9"]
    assert isinstance(caught.value, KeyError)
    with pytest.raises(
        NoSuchLayer, match=r"layer 'fc' is not among the probed ones; add it: Probe\(model, \.\.\., 'fc'\)"
    ):
        _ = p["fc"]
    with pytest.raises(NoSuchLayer, match="layers are read by name; 3 is of type int"):
        _ = p[3]


def test_a_kind_that_was_not_asked_for() -> None:
    """Says which kinds there are and what to type for one more."""
    model = nn.Linear(2, 2)
    with Probe(model, kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT) as p:
        model(torch.ones(1, 2)).sum().backward()
    message = absent(p, "", "input")
    assert message.startswith("input of '' was not asked for")
    assert "kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT | Kind.INPUT" in message
    assert "kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT | Kind.GRAD_INPUT" in absent(p, "", "grad_input")
    assert "kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT | Kind.GRAD_INPUT" in absent(p, "", "grad_kwargs")
    assert p[""].output.shape == (1, 2)
    assert not hasattr(p[""], "kwargs")


def test_nothing_was_called() -> None:
    """Before any pass: for a layer, and in the report."""
    p = Probe(nn.Linear(2, 2))
    with p:
        pass
    for field in ("output", "input", "args", "kwargs", "grad_output", "grad_input", "backwards"):
        assert absent(p, "", field).startswith(f"there is no {field} of ''")
        assert "was not called while the probe was attached" in absent(p, "", field)
    assert p[""].calls == []
    ((name, reason),) = p.report()
    assert name == ""
    assert "was not called while the probe was attached" in reason
    assert str(p.overwritten) == f"not known: {reason}"
    assert "not called" in repr(p[""])


def test_a_layer_that_was_never_called() -> None:
    """Told at exit, in the report and on reading; a pass that was cut short by an exception is no reason to tell."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.unused = nn.ModuleList([nn.Linear(1, 1)])
    model.forward = lambda x: model[0](x)
    with (
        pytest.warns(ProbeWarning, match=r"1 of 2 probed layers were never called: 'unused\.0'.*fused"),
        Probe(model) as p,
    ):
        model(torch.ones(1, 2))
    assert "never called" in absent(p, "unused.0", "output")
    assert "never called" in dict(map(tuple, p.report()))["unused.0"]
    model.forward = lambda x: model[0](x) / None
    with pytest.raises(TypeError, match="unsupported operand"), Probe(model):
        model(torch.ones(1, 2))
    with Probe(model), pytest.raises(TypeError, match="unsupported operand"):
        model(torch.ones(1, 2))


def test_containers_that_compute_nothing_are_no_news() -> None:
    """A ModuleList that a glob matched is in the report, not in the warning at exit; one that was named is told."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.unused = nn.ModuleList([nn.Identity()])
    model.forward = lambda x: model.unused[0](model[0](x))
    with Probe(model, "*", exclude="") as p:
        model(torch.ones(1, 2)).sum().backward()
    assert dict(map(tuple, p.report()))["unused"] == "never called: ModuleList only holds other modules"
    with (
        pytest.warns(ProbeWarning, match="1 of 2 probed layers were never called: 'unused'"),
        Probe(model, "unused", "0"),
    ):
        model(torch.ones(1, 2))


def test_layers_behind_an_exception() -> None:
    """Are not said to be skipped by the model; the table says where the forward ended."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 2), nn.Tanh())
    with pytest.raises(TypeError, match="missing"), Probe(model) as p:
        model(torch.ones(1, 2))
    assert "an exception ended the forward before it" in absent(p, "2", "output")
    assert dict(map(tuple, p.report()))["2"] == "never called: an exception ended the forward before it"
    assert [row.mark for row in p.summary()] == ["", "(its forward raised an exception)", "! not called"]


def test_a_pass_that_is_no_longer_kept() -> None:
    """A layer that was called, but not in the kept passes, is told apart from one that never was."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with Probe(model) as p:
        model(torch.ones(1, 2))
        model.forward = lambda x: x
        model(torch.ones(1, 2))
        del model.forward
    reason = "it was called, but not in the passes that are kept (keep= says how many)"
    assert reason in absent(p, "1", "output")
    assert dict(map(tuple, p.report()))["1"] == reason


def test_a_layer_that_was_replaced() -> None:
    """While the probe was attached: its hooks are on the module that left, which the report says."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with Probe(model, kinds=Kind.OUTPUT) as p:
        model(torch.ones(1, 2))
        model[1] = nn.Sigmoid()
        model(torch.ones(1, 2))
    assert [row.name for row in p.report()] == ["1"]
    assert "it was replaced by another module" in p.report()[0].reason
    assert "it was replaced by another module" in absent(p, "1", "output")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_probes_are_not_copied(copied: Any) -> None:
    """The error says what to do instead."""
    with pytest.raises(TypeError, match=r"belongs to one model in one process.*dict\(p.activations\)"):
        copied(Probe(nn.Linear(1, 1)))


@pytest.mark.parametrize("how", ["keep", "observer"])
def test_a_probe_that_keeps_nothing(how: str) -> None:
    """With keep=0, and by default with observers: reading says what to type, the report does not call it missing."""
    model = nn.Sequential(nn.Linear(2, 2))
    options: dict[str, Any] = {"keep": 0} if how == "keep" else {"observers": lambda capture: None}
    with Probe(model, **options) as p:
        model(torch.ones(1, 2)).sum().backward()
    for field in ("output", "input", "grad_output"):
        assert re.search(r"keeps no values \(keep=0.*create it with Probe\(\.\.\., keep=1\)", absent(p, "0", field))
    for mapping in ("activations", "gradients", "passes"):
        with pytest.raises(AttributeError, match=f"to read {mapping} create it with"):
            getattr(p, mapping)
    assert p.overwritten == []
    assert "keeps no values" in str(p.overwritten)
    if how == "keep":
        assert p.report()[0].reason.startswith("nothing was hooked: no values are kept (keep=0)")
    else:
        (row,) = p.report()
        assert row.reason.startswith("no values are kept")
        assert "not called" not in str(p)


def test_gradients_that_do_not_exist() -> None:
    """Frozen, integer, unused, no_grad, detached: None in place of the tensor, and the reason in the report."""
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with Probe(model) as p:
        out = model(torch.tensor([1]))
        out.detach().requires_grad_().sum().backward()
    assert p["0"].grad_output is None
    assert p.report()[0] == ("", p.report()[0].reason)
    assert "no backward pass has come back" in p.report()[0].reason
    with Probe(model) as p:
        model(torch.tensor([1])).sum().backward()
    assert p["1"].grad_input is None
    assert [tuple(row) for row in p.report()] == [
        ("0", "no gradient: its output needs none (frozen, integer, or computed under no_grad)")
    ]


def test_a_branch_that_the_loss_does_not_use() -> None:
    """The report tells it from frozen layers and from a backward that was not run at all."""
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model.forward = lambda x: (model["used"](x), model["unused"](x))
    with Probe(model, kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT) as p:
        model(torch.ones(1, 2))[0].sum().backward()
    reason = "the loss does not depend on it, or an exception ended the backward pass before it"
    assert [tuple(row) for row in p.report()] == [("unused", f"no grad_output: no gradient was asked back; {reason}")]
    assert p["unused"].grad_output is None
    del model.forward


def test_input_that_needs_no_gradient_is_no_fault() -> None:
    """The first layer of a model has no grad_input unless the images ask for one: None, and not a word."""
    model = nn.Sequential(nn.Linear(2, 2))
    for kinds in (Kind.all(), Kind.GRAD_INPUT):
        with Probe(model, kinds=kinds) as p:
            model(torch.ones(1, 2)).sum().backward()
        assert p["0"].grad_input is None
        assert p.report() == []


def test_report_of_a_clean_run(image: torch.Tensor) -> None:
    """Nothing missing: an empty list that prints as a sentence."""
    model = zoo.ConvNet()
    with Probe(model) as p:
        model(image).sum().backward()
    assert p.report() == []
    assert isinstance(p.report(), list)
    assert str(p.report()) == "everything that was asked for was captured"
    with torch.no_grad(), Probe(model) as p:
        model(image)
    text = str(p.report()).splitlines()
    assert len(text) == 3
    assert text[0].split("  ")[0] == "layer"
    assert set(text[1]) == {"-", " "}
    assert text[2].startswith('""')


def test_exceptions_in_the_forward() -> None:
    """The layer that raised and those around it have an input, no output, and that reason; those before are whole."""

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("mine")

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Fails()), nn.Tanh())
    with Probe(model, "*") as p, pytest.raises(ValueError, match="mine"):
        model(torch.ones(1, 2))
    for name in ("", "1", "1.0"):
        assert absent(p, name, "output") == f"there is no output of {name!r}: its forward raised an exception"
        assert p[name].input.shape == (1, 2)
    assert p["0"].output.shape == (1, 2)
    rows = dict(map(tuple, p.report()))
    assert rows["1.0"] == "its forward raised an exception"
    assert "never called" in rows["2"]
    assert "exception" not in rows.get("0", "")


def test_none_returned_while_an_exception_is_handled() -> None:
    """A module that returns None inside the user's ``except`` block has returned, it did not raise."""
    model = Apply(lambda x: None)
    with Probe(model) as p:
        try:
            raise KeyError("handled")
        except KeyError:
            model(torch.ones(1))
    assert p[""].output is None
    assert not any("exception" in reason for _, reason in p.report())


# -- overwritten -------------------------------------------------------------------------------------------------------


def test_overwritten_names_the_layer_the_writer_and_the_share(image: torch.Tensor) -> None:
    """By a module, by an operation between modules, by both; the share of elements that differ."""
    model = zoo.ConvNet()
    with Probe(model) as p:
        model(image)
    rows = {row.name: row for row in p.overwritten}
    assert set(rows) == {"features.0", "block.bn"}
    assert rows["features.0"].by == "features.1"
    negative = (p["features.0"].output < 0).double().mean().item()
    assert rows["features.0"].share == pytest.approx(negative)
    assert rows["block.bn"].by == "an in-place operation before 'block.relu'"
    assert 0.9 < rows["block.bn"].share <= 1
    assert tuple(rows["features.0"]) == ("features.0", "features.1", rows["features.0"].share)
    text = str(p.overwritten)
    assert text.splitlines()[0].split() == ["layer", "overwritten", "by", "share"]
    assert f"{negative:.1%}" in text


@pytest.mark.parametrize("kinds", [Kind.OUTPUT, Kind.OUTPUT | Kind.INPUT, Kind.all()], ids=lambda kinds: kinds.label)
def test_overwritten_does_not_depend_on_the_other_kinds(kinds: Kind, image: torch.Tensor) -> None:
    """Outputs alone suffice; the writer is known where a probed module shows it."""
    model = zoo.ConvNet()
    with torch.no_grad(), Probe(model, kinds=kinds) as p:
        model(image)
    assert [row.name for row in p.overwritten] == ["features.0", "block.bn"]
    assert p.overwritten[0].by == "features.1"


def test_what_is_not_overwritten(image: torch.Tensor) -> None:
    """In-place writes that change no value, out-of-place models, reading: an empty list that prints as a sentence."""
    model = nn.Sequential(nn.ReLU(), nn.ReLU(inplace=True), nn.Flatten())
    with Probe(model) as p:
        model(image)
    assert p.overwritten == []
    assert str(p.overwritten) == "nothing was overwritten after it was captured"
    for name in p:
        p[name].output.add_(1)
    assert p.overwritten == [] or all(row.share is not None for row in p.overwritten)


def test_overwritten_by_the_user_after_the_pass() -> None:
    """A write with no module after it: the layer and the share are known, the writer is not."""
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad(), Probe(model) as p:
        out = model(torch.ones(1, 2))
        out[:, 0] = math.nan
    ((name, by, share),) = p.overwritten
    assert (name, by, share) == ("0", None, 0.5)


def test_nan_that_stays_nan_is_no_change() -> None:
    """NaN differs from itself: a tensor of NaN that nobody wrote to, or only in other places, is not overwritten."""
    model = nn.Sequential(Apply(lambda x: x / x), Apply(lambda x: x.mul_(1)))
    with Probe(model) as p:
        model(torch.zeros(3))
    assert p.overwritten == []


def test_asking_changes_nothing() -> None:
    """``overwritten`` reads the live memory and leaves it alone, also when the user has freed or resized it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    with torch.no_grad(), Probe(model) as p:
        out = model(torch.ones(4, 2))
        before = out.clone()
        assert [row.name for row in p.overwritten] in ([], ["0"])
        assert torch.equal(out, before)
        out.untyped_storage().resize_(0)
        rows = p.overwritten
        assert out.untyped_storage().nbytes() == 0
        assert all(row.share is None or row.share <= 1 for row in rows)


# -- the table ---------------------------------------------------------------------------------------------------------


class Table(html.parser.HTMLParser):
    """Reads an HTML table into rows of text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


class Sick(nn.Module):
    """One layer of each fault."""

    def __init__(self) -> None:
        super().__init__()
        self.well, self.bad, self.dead = nn.Linear(4, 4), Apply(lambda x: x / torch.zeros(4)), Apply(torch.zeros_like)
        self.flat = Apply(lambda x: torch.full_like(x, 3.0))
        self.unused = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.well(x)
        self.bad(hidden), self.dead(hidden), self.flat(hidden)
        return hidden


@pytest.fixture
def sick() -> Probe:
    model = Sick()
    with pytest.warns(ProbeWarning, match="unused"), Probe(model) as p:
        zoo.loss(model(torch.randn(3, 4))).backward()
    return p


def test_summary_has_one_row_a_layer(sick: Probe) -> None:
    """Name, type, shape, dtype, mean, std, share of zeros, NaN and Inf, gradient norm, calls, and what to look at."""
    table = sick.summary()
    assert [row.name for row in table] == list(sick)
    well, bad, dead, flat, unused = table
    output = sick["well"].output
    assert (well.type, well.shape, well.dtype, well.calls, well.mark) == ("Linear", (3, 4), "float32", 1, "")
    assert well.mean == pytest.approx(output.mean().item(), rel=1e-5)
    assert well.std == pytest.approx(output.std(correction=0).item(), rel=1e-5)
    assert well.zeros == 0
    assert well.grad_norm == pytest.approx(sick["well"].grad_output.norm().item(), rel=1e-5)
    assert bad.nonfinite == 12
    assert "NaN or Inf" in bad.mark
    assert dead.zeros == 1
    assert "dead" in dead.mark
    assert flat.std == 0
    assert "constant" in flat.mark
    assert unused.calls == 0
    assert unused.mean is None
    assert "not called" in unused.mark


def test_printed_table_is_aligned_and_rounded(sick: Probe) -> None:
    """One line a layer, columns under their heads, three figures, the worst marked."""
    head, rule, *rows = str(sick).splitlines()
    assert len(rows) == len(sick)
    assert head.split() == [
        "layer",
        "type",
        "output",
        "dtype",
        "mean",
        "std",
        "zeros",
        "NaN/Inf",
        "grad",
        "norm",
        "calls",
    ]
    assert set(rule) == {"-", " "}
    starts = [match.start() for match in re.finditer(r"(?<=  )-|^-", rule)]
    for row in rows:
        assert all(start == 0 or row[start - 1 : start] in (" ", "") for start in starts)
    assert rows[0].startswith("well")
    assert "3×4" in rows[0]
    assert not re.search(r"\d\.\d{5,}", str(sick))
    assert [("!" in row) for row in rows] == [False, True, True, True, True]
    assert str(sick.summary()) == str(sick)


def test_html_table(sick: Probe) -> None:
    """For notebooks: well-formed, the same cells, names escaped, bad rows in another colour."""
    sick_html = sick._repr_html_()
    table = Table(sick_html)
    assert len(table.rows) == 1 + len(sick)
    assert [row[0] for row in table.rows[1:]] == list(sick)
    assert len({len(row) for row in table.rows}) == 1
    assert sick_html.count("background") == 4

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    Odd.__name__ = "<b>&Odd"
    with Probe(odd := Odd()) as p:
        odd(torch.ones(1))
    assert Table(p._repr_html_()).rows[1][1] == "<b>&Odd"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "output",
    [
        None,
        "text",
        torch.ones(()),
        torch.ones(0, 3),
        torch.ones(3, dtype=torch.bool),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.float16) * 60000,
        torch.full((3,), 1e38),
        torch.eye(3).to_sparse(),
        torch.ones(3, device="meta"),
        {"logits": torch.ones(2, 2), "cache": types.SimpleNamespace(a=torch.ones(1))},
        torch.full((3,), math.nan),
    ],
    ids=lambda value: type(value).__name__ + str(getattr(value, "dtype", "")),
)
def test_table_of_any_output(output: Any) -> None:
    """Whatever a module returns has a row; nothing raises."""
    model = Apply(lambda x: output)
    with Probe(model) as p:
        model(torch.ones(1))
    (row,) = p.summary()
    assert row.calls == 1
    assert len(str(p).splitlines()) == 3
    assert row.shape == (tuple(found[0][1].shape) if (found := leaves(output)) else None)
    assert len(Table(p._repr_html_()).rows) == 2


def test_gradient_norm_is_over_all_outputs() -> None:
    """The L2 norm of the whole ``grad_output``, of the last backward."""
    model = Apply(lambda x: (x * 1, x * 1))
    x = torch.ones(8, requires_grad=True)
    with Probe(model) as p:
        a, b = model(x)
        (3 * a.sum() + 4 * b.sum()).backward()
    assert p.summary()[0].grad_norm == pytest.approx(5 * math.sqrt(8), rel=1e-6)


def test_representations(image: torch.Tensor) -> None:
    """``repr`` says what the probe is of and whether it is attached; records say which call and what they hold."""
    model = zoo.ConvNet()
    p = Probe(model, kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT)
    assert repr(p) == "<Probe of ConvNet: 8 layers, output|grad_output, not attached>"
    with p:
        assert "8 layers" in repr(p)
        assert "not attached" not in repr(p)
        model(image).sum().backward()
        assert repr(p["fc"]) == "<Record 'fc' (Linear), call 0 of 1: output, gradients>"
    with Probe(zoo.Shared(), "first") as p:
        p._session.model(torch.ones(1, 4))
    assert repr(p["first"].calls[1]) == "<Record 'first' (Linear), call 1 of 3: args, output>"


def test_values_are_in_their_own_dtype() -> None:
    """Under autocast outputs and gradients are bfloat16, and stay so."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4)
    with Probe(model) as p:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        out.float().sum().backward()
    assert p["0"].output.dtype == torch.bfloat16
    assert p["0"].grad_output.dtype == torch.bfloat16
    assert p["0"].input.dtype == torch.float32
    assert p.summary()[0].dtype == "bfloat16"


def test_relu_in_place_and_out_of_place_show_the_same(image: torch.Tensor) -> None:
    """The exercise that began it all: the two nets agree in every record, and one of them has overwritten rows."""
    probes = []
    for inplace in (True, False):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace), nn.Conv2d(4, 2, 3))
        with Probe(model) as p:
            F.cross_entropy(model(image).flatten(2).mean(2), torch.tensor([0, 1])).backward()
        probes.append(p)
    for name in probes[0]:
        for field in ("input", "output", "grad_output"):
            assert torch.equal(getattr(probes[0][name], field), getattr(probes[1][name], field)), (name, field)
    assert [row.name for row in probes[0].overwritten] == ["1"]
    assert probes[1].overwritten == []


def test_kept_passes_are_read_like_the_probe() -> None:
    """keep=n: every kept pass, the oldest first."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    inputs = [torch.randn(1, 2) for _ in range(3)]
    with Probe(model, keep=2) as p:
        for x in inputs:
            model(x)
    assert len(p.passes) == 2
    assert [torch.equal(each["0"].input, x) for each, x in zip(p.passes, inputs[1:], strict=True)] == [True, True]
    assert list(p.passes[0]) == ["0", "1"]
    assert repr(p.passes[0]) == "<pass at step 0: 0, 1>"
    with pytest.raises(NoSuchLayer, match="nope"):
        _ = p.passes[0]["nope"]


def test_mappings_say_why_a_value_is_absent() -> None:
    """Unknown, not called, and without a gradient are told apart; aliases are read."""
    model = zoo.Shared()
    model.add_module("unused", nn.Linear(2, 2))
    with pytest.warns(ProbeWarning, match="unused"), Probe(model) as p:
        model(torch.randn(2, 4))
    assert list(p.activations) == ["first", "act"]
    assert torch.equal(p.activations["second"], p["first"].output)
    for mapping, name, text in (
        (p.activations, "nope", "no layer 'nope'"),
        (p.activations, "unused", "never called"),
        (p.gradients, "first", "inside the with-block"),
    ):
        with pytest.raises(KeyError, match=text):
            _ = mapping[name]
    assert len(p.gradients) == 0


def test_outputs_that_were_not_captured_are_not_called_intact() -> None:
    """Without Kind.OUTPUT `overwritten` says that it does not know."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    with Probe(model, kinds=Kind.INPUT) as p:
        model(torch.randn(1, 2))
    assert "Kind.OUTPUT" in str(p.overwritten)


def test_a_small_view_does_not_keep_a_large_storage() -> None:
    """Neither the snapshot nor the book-keeping for `overwritten` holds it."""

    class Crop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(100_000)[:4]

    model = nn.Sequential(Crop())
    with Probe(model) as p:
        model(torch.ones(1))
        held = [event.storage for pass_ in p._store.passes() for event in seen(pass_) if event.call.layer.name == "0"]
        assert all(storage is None or storage.nbytes() < 1000 for storage in held)
    assert p["0"].output.untyped_storage().nbytes() == 16


def test_custom_objects_are_named_as_the_reason() -> None:
    """An output of a type that is not walked is not called frozen."""

    class Box:
        def __init__(self, value: torch.Tensor) -> None:
            self.value = value

    class Boxing(nn.Module):
        def forward(self, x: torch.Tensor) -> Box:
            return Box(x * 2)

    model = nn.Sequential(nn.Linear(2, 2), Boxing())
    with Probe(model) as p:
        model(torch.ones(1, 2)).value.sum().backward()
    assert "Box, which the probe does not look into" in next(row.reason for row in p.report() if row.name == "1")
