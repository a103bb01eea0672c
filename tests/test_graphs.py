"""The graph of a model: drawn from one forward, right about data flow, and leaving nothing behind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from probe._graphs import Enter, Leave, Op, Value, graph_def, record
from probe.board import Board
from probe.core import Probe
from tests import zoo
from tests.reading import read


def nodes(proto):
    """name -> (op, inputs), after checking what holds for every graph: names are unique, inputs are earlier nodes."""
    found = {}
    for node in proto.node:
        assert node.name not in found
        assert {source.split(":")[0] for source in node.input} <= found.keys()
        found[node.name] = (node.op, list(node.input))
    return found


def edges(model, *args, **kwargs):
    return {name: inputs for name, (_, inputs) in nodes(graph_def(record(model, args, kwargs))).items()}


def value(key, *shape, path="", dtype="float32"):
    return Value(key, shape, dtype, "cpu", path)


# Drawing, by hand


def call(layer, inputs, outputs, inner=(), type_="Module", index=0):
    """The events of one call of a module; numbers stand for tensors."""
    start = Enter(layer, index, type_, tuple(map(value, inputs)), (("options", f"of {layer}"),))
    return [start, *inner, Leave(layer, index, tuple(map(value, outputs)))]


def operator(name, inputs, outputs):
    return Op(name, tuple(map(value, inputs)), tuple(map(value, outputs)))


def test_calls_become_nodes_in_scopes_and_functions_nodes_between_them():
    """Net: y = block(x) with block = fc2(relu(fc1(x))), then out = y + x."""
    block = [
        *call("block.fc1", [1], [2], [operator("addmm", [1, 90], [2])]),
        operator("relu", [2], [3]),
        *call("block.fc2", [3], [4], [operator("addmm", [3, 91], [4])]),
    ]
    drawn = nodes(graph_def(call("", [1], [5], [*call("block", [1], [4], block), operator("add", [4, 1], [5])], "Net")))
    assert drawn == {
        "input": ("input", []),
        "Net/block/fc1": ("Module", ["input"]),
        "Net/block/relu": ("relu", ["Net/block/fc1"]),
        "Net/block/fc2": ("Module", ["Net/block/relu"]),
        "Net/add": ("add", ["Net/block/fc2", "input"]),
        "output": ("output", ["Net/add"]),
    }


def test_who_wrote_last_is_the_source():
    """An in-place operation and an in-place module come between the tensor and its next reader."""
    inner = [
        *call("conv", [1], [2], [operator("conv", [1], [2])]),
        *call("relu", [2], [2], [operator("relu_", [2], [2])]),
        operator("add_", [2, 1], [2]),
        *call("fc", [2], [3], [operator("mm", [2], [3])]),
    ]
    drawn = nodes(graph_def(call("", [1], [3], inner, "Net")))
    assert drawn["Net/relu"][1] == ["Net/conv"]
    assert drawn["Net/add_"][1] == ["Net/relu", "input"]
    assert drawn["Net/fc"][1] == ["Net/add_"]


def test_a_module_without_operators_is_still_on_the_way():
    drawn = nodes(graph_def(call("", [1], [1], call("drop", [1], [1]), "Net")))
    assert drawn["Net/drop"][1] == ["input"]
    assert drawn["output"][1] == ["Net/drop"]


def test_repeated_calls_are_numbered():
    inner = [event for i in range(3) for event in call("cell", [1 + i], [2 + i], index=i)]
    drawn = nodes(graph_def(call("", [1], [4], inner, "Net")))
    assert drawn["Net/cell-3"][1] == ["Net/cell-2"]
    assert drawn["Net/cell-2"][1] == ["Net/cell"]


def test_several_outputs_are_told_apart():
    inner = [*call("lstm", [1], [2, 3]), operator("tanh", [3], [4])]
    drawn = nodes(graph_def(call("", [1], [2, 4], inner, "Net")))
    assert drawn["Net/tanh"][1] == ["Net/lstm:1"]
    assert drawn["output"][1] == ["Net/lstm"]
    assert drawn["output-2"][1] == ["Net/tanh"]


def test_what_a_module_reads_beside_its_inputs_is_an_edge_too():
    """A module that takes a tensor from elsewhere (an attribute, a closure, an object of the user's)."""
    inner = [operator("exp", [1], [2]), *call("odd", [], [3], [operator("neg", [2], [9]), operator("abs", [9], [3])])]
    drawn = nodes(graph_def(call("", [1], [3], inner, "Net")))
    assert drawn["Net/odd"][1] == ["Net/exp"]


def test_what_a_module_writes_beside_its_outputs_is_known():
    """A cache: one module fills it, an operator reads it."""
    inner = [*call("cache", [1], [], [operator("copy_", [70, 1], [70])]), operator("neg", [70], [2])]
    drawn = nodes(graph_def(call("", [1], [2], inner, "Net")))
    assert drawn["Net/neg"][1] == ["Net/cache"]


def test_constants_are_not_drawn():
    inner = [operator("arange", [], [7]), operator("neg", [7], [8]), operator("add", [1, 8], [2])]
    drawn = nodes(graph_def(call("", [1], [2], [*inner, *call("fc", [2], [3])], "Net")))
    assert list(drawn) == ["input", "Net/add", "Net/fc", "output"]


def test_a_call_that_raised_is_forgotten():
    """The model catches it: no Leave comes for it, and what follows belongs to its caller."""
    broken = [Enter("bad", 0, "Module", (value(1),)), operator("exp", [1], [5])]
    inner = [*call("a", [1], [2]), *broken, *call("b", [2], [3])]
    drawn = nodes(graph_def(call("", [1], [3], inner, "Net")))
    assert drawn["Net/b"][1] == ["Net/a"]
    assert drawn["output"][1] == ["Net/b"]


def test_a_node_tells_shapes_dtypes_device_options_and_parameters():
    proto = graph_def(record(nn.Sequential(nn.Linear(3, 2, bias=False)), (torch.rand(4, 3),), {}))
    node = {each.name: each for each in proto.node}["Sequential/0"]
    (shape,) = node.attr["_output_shapes"].list.shape
    assert [dim.size for dim in shape.dim] == [4, 2]
    assert node.device == "cpu"
    told = {key: node.attr[key].s.decode() for key in ("inputs", "outputs", "options", "parameters", "type")}
    assert told == {
        "inputs": "float32[4, 3]",
        "outputs": "float32[4, 2]",
        "options": "in_features=3, out_features=2, bias=False",
        "parameters": "weight [2, 3]",
        "type": "Linear",
    }


# Models


def test_a_convolutional_net_with_a_shortcut_and_in_place_operations():
    assert edges(zoo.ConvNet(), torch.rand(2, 3, 8, 8)) == {
        "input": [],
        "ConvNet/features/0": ["input"],
        "ConvNet/features/1": ["ConvNet/features/0"],
        "ConvNet/features/2": ["ConvNet/features/1"],
        "ConvNet/block/conv": ["ConvNet/features/2"],
        "ConvNet/block/bn": ["ConvNet/block/conv"],
        "ConvNet/block/add_": ["ConvNet/block/bn", "ConvNet/features/2"],
        "ConvNet/block/relu": ["ConvNet/block/add_"],
        "ConvNet/pool": ["ConvNet/block/relu"],
        "ConvNet/fc": ["ConvNet/pool"],
        "output": ["ConvNet/fc"],
    }


def test_keyword_only_inputs_and_a_mapping_out():
    found = edges(zoo.HFModel().eval(), input_ids=torch.zeros(1, 3, dtype=torch.int64), attention_mask=torch.ones(1, 3))
    assert found["HFModel/embeddings"] == ["input.input_ids"]
    attention = found["HFModel/layers/0/dense"][0]
    while attention != "HFModel/layers/0/query_key_value":  # one operator or several, by torch's version
        attention = found[attention][0]
    (first,), (second,) = found["HFModel/layers/1/norm"], found["output.hidden_states.0"]
    assert found[first] == ["HFModel/embeddings", "HFModel/layers/0/dropout"]
    assert found[second] == [first, "HFModel/layers/1/dropout"]
    assert found["output.logits"] == ["HFModel/head"]


@pytest.mark.parametrize(("how", "names"), [("dict", "abn"), ("nested", None), ("dataclass", None), ("tuple", "02")])
def test_any_structure_out(how, names):
    found = edges(zoo.Structured(how), torch.rand(2, 4))
    outputs = [name for name in found if name.startswith("output.")]
    assert len(outputs) >= 2
    assert all(found[name][0].startswith("Structured/inner") for name in outputs)
    if names:
        assert outputs == [f"output.{name}" for name in names]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (zoo.Shortcut(), (2, 4)),
        (zoo.Shared(), (2, 4)),
        (zoo.Recurrent(), (2, 3, 3)),
        (zoo.PassThrough().eval(), (2, 4)),
        (zoo.ViewThenWrite(), (2, 3, 4, 4)),
        (zoo.Attention(), (2, 3, 8)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval(), (2, 3, 8)),
        (nn.LSTM(4, 3, num_layers=2, bidirectional=True), (2, 5, 4)),
        (nn.Linear(4, 3), (2, 4)),
    ],
)
def test_every_output_is_reached_from_the_input(model, shape):
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = edges(model, torch.rand(shape))
        reached = {"input"}
        for name, sources in found.items():
            if {source.split(":")[0] for source in sources} & reached:
                reached.add(name)
        assert {name for name in found if name.startswith("output")} <= reached
        assert not [name for name in found if name not in reached]


def test_torchvisions_vision_transformer():
    """Its attention unpacks fused views of one projection, which defeats tracing."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16)
    found = edges(model, torch.rand(1, 3, 32, 32))
    layer = "VisionTransformer/encoder/layers/encoder_layer_1"
    assert found[f"{layer}/self_attention"] == [f"{layer}/ln_1"]
    assert found[f"{layer}/add-2"] == [f"{layer}/add", f"{layer}/mlp/4"]


def test_a_model_without_data():
    found = edges(zoo.ConvNet().to("meta"), torch.rand(2, 3, 8, 8, device="meta"))
    assert found == edges(zoo.ConvNet(), torch.rand(2, 3, 8, 8))


def test_wrappers_are_looked_through():
    expected = edges(zoo.Shared(), torch.rand(2, 4))
    assert edges(nn.DataParallel(zoo.Shared()), torch.rand(2, 4)) == expected


def test_compiled_models_run_eagerly_for_the_graph():
    """Compiled as a whole, in place, or in a part: the same graph, and nothing is compiled for it."""
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    expected = edges(zoo.Shared(), torch.rand(2, 4))
    assert edges(torch.compile(zoo.Shared(), backend=backend), torch.rand(2, 4)) == expected
    part = zoo.Shared()
    part.act.compile(backend=backend)
    part.compile(backend=backend)
    assert edges(part, torch.rand(2, 4)) == expected
    assert compiled == []


def test_functions_compiled_by_themselves_run_eagerly_too():
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.function = torch.compile(lambda x: x.exp().neg(), backend=backend)

        def forward(self, x):
            return self.function(x)

    model = nn.Sequential(Model(), nn.Tanh())
    assert edges(model, torch.rand(3))["Sequential/0"] == ["input"]
    assert compiled == []
    model(torch.rand(3))
    assert len(compiled) == 1


def test_memory_that_is_used_again_makes_no_edge():
    """The constant gets the memory of a tensor that is gone."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))
            self.tanh = nn.Tanh()

        def forward(self, x):
            totals = [x.exp().sum() for _ in range(20)]
            constant = self.w * 2
            return self.tanh(x), constant.neg(), totals[0]

    with torch.no_grad():
        found = edges(Model(), torch.rand(4))
    assert not [name for name in found if "neg" in name or "mul" in name]


# Nothing is changed


class Restless(nn.Module):
    """Changes everything that a forward may change: buffers, attributes, all random number generators."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.again = nn.Module()
        self.again.register_buffer("calls", self.calls)
        self.count = 0

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.last = x
        self.register_buffer("late", torch.ones(1))
        self.shared = bool(self.again.calls == self.calls)
        random.random()
        np.random.rand()
        return self.drop(self.norm(self.fc(x)))


@pytest.mark.parametrize("train", [True, False])
def test_the_model_and_the_random_numbers_are_what_they_were(train):
    model = Restless().train(train)
    model.fc.eval()
    model.fc.weight.grad = torch.ones(4, 4)
    x = torch.rand(3, 4)
    before, states = zoo.fingerprint(model), (random.getstate(), np.random.get_state()[1].tolist())
    record(model, (x,), {})
    assert zoo.fingerprint(model) == before
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_a_backward_that_waits_is_not_disturbed():
    """Eval-mode batch norm saves its buffers for the backward; restoring them by writing would break that."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    loss = model(torch.rand(3, 4)).sum()
    model.train()
    record(model, (torch.rand(3, 4),), {})
    loss.backward()
    assert model[0].weight.grad is not None


def test_buffers_that_are_one_stay_one_during_the_forward():
    seen = []
    model = Restless()
    model.drop.register_forward_pre_hook(lambda *_: seen.append(model.shared))
    record(model, (torch.rand(3, 4),), {})
    assert seen == [True]


def test_the_forward_is_one_ordinary_forward():
    """Hooks of the user's run once; the model gets the very inputs; gradients are off when they are off."""
    seen = []
    model = zoo.Shared()
    x = torch.rand(2, 4)
    model.act.register_forward_hook(lambda *_: seen.append("act"))
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0] is x))
    model.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    with torch.no_grad():
        record(model, (x,), {})
    assert seen == [True, "act", "act", False]


def test_a_probe_around_it_sees_nothing_of_it():
    """Neither as a pass nor in its observers; the order of hooks is what it was, and the probe works on."""
    seen = []
    model = zoo.Shared()
    handle = model.act.register_forward_hook(lambda *_: handle.remove())
    with Probe(model, observers=[seen.append], keep=1) as p:
        last = model.act.register_forward_hook(lambda *_: None)
        before = list(model.act._forward_hooks)
        record(model, (torch.rand(2, 4),), {})
        assert seen == []
        assert p._session.passes == 0
        assert list(model.act._forward_hooks) == [key for key in before if key != handle.id]
        model(torch.rand(2, 4))
        assert len(p["act"].calls) == 2
        assert seen
    last.remove()
    assert not model.act._forward_hooks


def test_what_the_forward_raises_is_noted_and_leaves_nothing():
    model = Restless()
    model.drop.register_forward_hook(lambda *_: 1 / 0)
    x, before = torch.rand(3, 4), zoo.fingerprint(model)
    with pytest.raises(ZeroDivisionError) as caught:
        record(model, (x,), {})
    assert "Board.graph" in caught.value.__notes__[-1]
    assert zoo.fingerprint(model) == before


def test_lazy_layers_must_have_been_called():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="call it once"):
        record(model, (torch.rand(2, 4),), {})
    model(torch.rand(2, 4))
    assert edges(model, torch.rand(2, 4))["output"] == ["Sequential/0"]


@pytest.mark.parametrize("model", ["text", lambda x: x, None])
def test_only_modules_have_a_graph(tmp_path, model):
    with Board(tmp_path) as board, pytest.raises(TypeError, match=r"nn\.Module"):
        board.graph(model, torch.rand(1))


# On the board


def test_a_board_shows_the_graph(tmp_path):
    with Board(tmp_path) as board:
        board.graph(zoo.Shared(), torch.rand(2, 4))
        with Board(tmp_path / "add") as other:
            other.add_graph(zoo.Shared(), torch.rand(2, 4), use_strict_trace=False)
    assert nodes(read(tmp_path).Graph()) == nodes(read(tmp_path / "add").Graph())
    assert "Shared/first-3" in nodes(read(tmp_path).Graph())


def test_add_graph_takes_several_inputs_as_a_tuple(tmp_path):
    with Board(tmp_path) as board:
        board.add_graph(nn.Bilinear(2, 3, 4), (torch.rand(1, 2), torch.rand(1, 3)))
    assert nodes(read(tmp_path).Graph())["Bilinear"][1] == ["input.0", "input.1"]


@pytest.mark.filterwarnings("ignore")
def test_add_graph_still_traces_scripted_models(tmp_path):
    with Board(tmp_path) as board:
        board.add_graph(torch.jit.script(nn.Linear(2, 2)), torch.rand(1, 2))
        with pytest.raises(TypeError, match=r"ScriptModule"):
            board.graph(torch.jit.script(nn.Linear(2, 2)), torch.rand(1, 2))
    assert "aten::linear" in [node.op for node in read(tmp_path).Graph().node]
