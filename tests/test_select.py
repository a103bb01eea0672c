"""Names, globs, patterns, types, modules and predicates mean the layers that a user expects."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from probe import NoSuchLayer, Probe, ProbeWarning
from probe.select import choose, layers, match, modules
from tests import zoo


class Net(nn.Module):
    """Names with dots, digits, brackets' relatives, and an attribute that is called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.layer10 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(self.layer10(self.layer1(self.conv1(x))))


LEAVES = ["conv1", "layer1.0", "layer1.1", "layer1.2", "layer10.0", "layer10.1", "module.0", "module.1"]


def names(model: nn.Module, *selectors: Any, **options: Any) -> list[str]:
    return list(Probe(model, *selectors, **options))


# -- what selects ------------------------------------------------------------------------------------------------------


def test_by_default_every_leaf_module_in_the_models_order() -> None:
    """No selector: the leaf modules."""
    assert names(Net()) == LEAVES


def named(value: Any) -> str:
    """The same in every process: a function's address is not."""
    return "predicate" if isinstance(value, types.FunctionType) else str(value)


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        ("conv1", ["conv1"]),
        ("", [""]),
        ("layer1", ["layer1"]),
        ("layer1.*", ["layer1.0", "layer1.1", "layer1.2"]),
        ("layer1*", ["layer1", "layer1.0", "layer1.1", "layer1.2", "layer10", "layer10.0", "layer10.1"]),
        ("*.1", ["layer1.1", "layer10.1", "module.1"]),
        ("layer?.0", ["layer1.0"]),
        ("*.[02]", ["layer1.0", "layer1.2", "layer10.0", "module.0"]),
        ("*", ["", "conv1", "layer1", *LEAVES[1:4], "layer10", *LEAVES[4:6], "module", *LEAVES[6:]]),
        (re.compile("conv"), ["conv1"]),
        (re.compile(r"layer1\.\d"), ["layer1.0", "layer1.1", "layer1.2"]),
        (re.compile(r"^layer10?$"), ["layer1", "layer10"]),
        (nn.BatchNorm2d, ["layer1.1", "layer10.1"]),
        (nn.modules.batchnorm._BatchNorm, ["layer1.1", "layer10.1"]),
        ((nn.Linear, nn.Flatten), ["module.0", "module.1"]),
        (lambda name, module: name.endswith("0") and not [*module.children()], ["layer1.0", "layer10.0", "module.0"]),
        (["conv1", ("module.1", {"layer1.2"})], ["conv1", "layer1.2", "module.1"]),
    ],
    ids=named,
)  # fmt: skip
def test_one_selector(selector: Any, wanted: list[str]) -> None:
    """Names are exact, globs cross dots, patterns are searched, types include subclasses, predicates see both."""
    assert names(Net(), selector) == wanted


def test_a_module_selects_itself() -> None:
    """By identity, not by equality of its type or its numbers."""
    model = Net()
    assert names(model, model.layer1[0], model.module) == ["layer1.0", "module"]
    with pytest.raises(NoSuchLayer, match="this Conv2d is not a module of the probed model"):
        names(model, nn.Conv2d(4, 4, 1))


def test_several_selectors_are_a_union_in_the_models_order() -> None:
    """Whatever the order they are given in, and however often they overlap."""
    assert names(Net(), "module.1", nn.Conv2d, "conv1", "layer1.*") == [
        "conv1", "layer1.0", "layer1.1", "layer1.2", "layer10.0", "module.1",
    ]  # fmt: skip


def test_exclude_takes_the_same_selectors_away() -> None:
    """From the default as from a selection; one that matches nothing is an error, as is one that leaves nothing."""
    assert names(Net(), exclude="layer*") == ["conv1", "module.0", "module.1"]
    assert names(Net(), "layer1.*", exclude=[nn.BatchNorm2d, re.compile("2$")]) == ["layer1.0"]
    with pytest.raises(NoSuchLayer, match=r"no layer matches '\*\.dropout'"):
        names(Net(), exclude="*.dropout")
    with pytest.raises(NoSuchLayer, match=r"nothing is left to probe: exclude='\*'"):
        names(Net(), "conv1", exclude="*")


def test_an_exact_name_goes_before_a_glob() -> None:
    """A name with a glob's signs in it means itself."""
    model = nn.Module()
    model.add_module("a[0]", nn.Linear(1, 1))
    model.add_module("a0", nn.Linear(1, 1))
    assert names(model, "a[0]") == ["a[0]"]
    assert names(model, "a[0-9]") == ["a0"]


def test_globs_mind_the_case() -> None:
    """``Conv*`` is not ``conv*``, on every system."""
    with pytest.raises(NoSuchLayer):
        names(Net(), "Conv*")


def test_a_model_that_is_a_leaf() -> None:
    """Its only layer is the root."""
    model = nn.Linear(2, 2)
    with Probe(model) as p:
        model(torch.ones(1, 2))
    assert list(p) == [""]
    assert p[""].output.shape == (1, 2)


# -- what is no selector, and what matches nothing ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("conv2", r"no layer matches 'conv2'; did you mean 'conv1'"),
        ("layer1.conv", r"did you mean 'layer1"),
        ("fc", r"the model has 'conv1', 'layer1', .* and \d+ more"),
        ("linear*", r"no layer matches 'linear\*'"),
        (re.compile("xyz"), r"no layer matches the pattern 'xyz'; the model has 'conv1'"),
        (nn.LSTM, r"no layer is a LSTM; the model has BatchNorm2d, Conv2d, Flatten"),
        (lambda name, module: False, r"no layer matches the predicate <function"),
    ],
    ids=named,
)
def test_no_match_names_the_nearest(selector: Any, message: str) -> None:
    """A KeyError and a ValueError whose text says what was asked and what there is."""
    with pytest.raises(NoSuchLayer, match=message) as caught:
        names(Net(), selector)
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ValueError)
    assert not str(caught.value).startswith(("'", '"'))


@pytest.mark.parametrize("selector", [None, 3, b"conv1"])
def test_what_cannot_select(selector: Any) -> None:
    """Says what can."""
    with pytest.raises(TypeError, match=r"cannot select layers: give a name, a glob, a compiled re\.Pattern"):
        names(Net(), selector)


def test_one_bad_selector_among_good_ones_is_an_error() -> None:
    """Nothing is silently left out of a union."""
    with pytest.raises(NoSuchLayer, match="'conv7'"):
        names(Net(), "conv1", "conv7")


def test_predicates_errors_are_the_users_own() -> None:
    """What a predicate raises comes through."""
    with pytest.raises(ZeroDivisionError) as caught:
        names(Net(), lambda name, module: 1 / 0)
    assert "called as selector(name, module)" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match="positional argument"):
        names(Net(), lambda name: True)


@pytest.mark.parametrize("model", [None, 3, "model", nn.Linear, torch.ones(1), lambda x: x])
def test_what_is_no_model(model: Any) -> None:
    """A TypeError at once."""
    with pytest.raises(TypeError, match=r"nn\.Module"):
        Probe(model)


# -- which modules -----------------------------------------------------------------------------------------------------


def test_modules_that_work_inside_are_leaves() -> None:
    """MultiheadAttention works on the weights of children it never calls: it is a default layer, they are not."""
    assert names(zoo.Attention()) == ["attn", "norm"]
    model = zoo.Attention()
    with pytest.warns(ProbeWarning, match="MultiheadAttention"), Probe(model, "attn.out_proj", "norm") as p:
        model(torch.randn(2, 3, 8))
    with pytest.raises(AttributeError, match=r"its parent 'attn' \(MultiheadAttention\) uses its weights"):
        _ = p["attn.out_proj"].output


def test_containers_that_are_never_called_are_no_default_layers() -> None:
    """Empty lists and dictionaries of modules or parameters have no forward."""
    model = nn.Sequential(nn.Linear(1, 1))
    model.lists = nn.ModuleList([nn.ModuleDict(), nn.ParameterList([nn.Parameter(torch.ones(1))]), nn.ParameterDict()])
    model.tanh = nn.Tanh()
    assert names(model) == ["0", "tanh"]
    with pytest.warns(ProbeWarning, match="ModuleList only holds other modules"), Probe(model, "lists", "tanh"):
        model.tanh(torch.ones(1))


def test_parametrised_layers_are_leaves() -> None:
    """``parametrizations`` below a layer makes it no container."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Tanh())
    assert "0" in names(model)
    with Probe(model, "0", "1") as p:
        model(torch.ones(1, 2)).sum().backward()
    assert p["0"].output.shape == (1, 2)


def test_shared_modules_have_all_their_names() -> None:
    """One layer, listed by its first name, chosen by any."""
    model = zoo.Shared()
    for selector in ("first", "second", "s*", re.compile("^second$"), lambda name, module: name == "second"):
        assert names(model, selector) == ["first"]
    assert [layer.names for layer in layers(model)] == [("",), ("first", "second"), ("act",)]
    p = Probe(model)
    assert len(p) == 2
    assert "second" in p
    assert "third" not in p
    assert 3 not in p


def test_a_shared_container() -> None:
    """Everything below it has all names as well."""
    inner = nn.Sequential(nn.Linear(2, 2))
    model = nn.Sequential(inner, nn.Tanh(), inner)
    assert [layer.names for layer in layers(model)] == [("",), ("0", "2"), ("0.0", "2.0"), ("1",)]


def test_a_module_that_contains_itself() -> None:
    """Names end where the circle closes."""
    model = nn.Sequential(nn.Linear(1, 1))
    model.add_module("loop", model)
    assert names(model, "*") == ["", "0"]
    assert len(modules(model)) == 2


def test_slots_that_hold_none() -> None:
    """``self.downsample = None`` registered as a module is no layer."""
    model = nn.Sequential(nn.Linear(1, 1))
    model.register_module("downsample", None)
    assert names(model) == ["0"]


# -- wrappers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compiled, then parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "parallel, then compiled": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore::probe.ProbeWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_of_the_users_model(wrapper: str) -> None:
    """A wrapper's prefix is dropped because of its type, an attribute called ``module`` stays; values are right."""
    model = Net()
    wrapped = WRAPPERS[wrapper](model)
    assert names(wrapped) == LEAVES
    assert names(wrapped, "*")[0] == ""
    x = torch.randn(2, 3, 1, 1)
    with Probe(wrapped, "", "conv1", "module") as p:
        out = wrapped(x)
        out.sum().backward()
    assert torch.equal(p[""].output, out.detach())
    assert torch.equal(p["conv1"].input, x)
    assert torch.equal(p["module"].grad_output, torch.ones(2, 2))


def test_wrappers_inside_a_model() -> None:
    """A compiled or parallel part of a model drops its prefix too."""
    model = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Sequential(nn.Tanh()), backend="eager"))
    model.part = nn.DataParallel(nn.Linear(2, 2))
    assert names(model) == ["0", "1.0", "part"]


def test_attributes_that_are_spelled_like_prefixes() -> None:
    """People have attributes called ``module`` and ``_orig_mod``: they are names like any other."""
    model = nn.Module()
    model.module = nn.Sequential(nn.Linear(1, 1))
    model._orig_mod = nn.Linear(1, 1)
    assert names(model) == ["module.0", "_orig_mod"]


# -- what always holds -------------------------------------------------------------------------------------------------

TREES = st.recursive(
    st.sampled_from([nn.Tanh, nn.Flatten, nn.Dropout]).map(lambda make: make()),
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda each: nn.Sequential(*each)),
    max_leaves=8,
)


@settings(deadline=None, max_examples=40)
@given(TREES, st.data())
def test_selection_is_a_function_of_names(model: nn.Module, data: Any) -> None:
    """Every module has a name that selects it alone, ``*`` selects all, exclusion is the difference; torch's order."""
    every = layers(model)
    known = [name for name, _ in model.named_modules()]
    assert [layer.name for layer in every] == known
    assert [layer.module for layer in every] == [module for _, module in model.named_modules()] == modules(model)
    assert match(every, "*") == every
    for layer in every:
        assert match(every, layer.name) == match(every, layer.module) == [layer]
    some = data.draw(st.lists(st.sampled_from(known), min_size=1, unique=True))
    rest = [name for name in known if name not in some]
    assert [layer.name for layer in choose(every, some)] == [name for name in known if name in some]
    if rest:
        assert [layer.name for layer in choose(every, ["*"], some)] == rest
