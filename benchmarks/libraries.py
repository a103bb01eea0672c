"""How each library does a piece of work: what `benchmarks.peers` runs, one function a library and work.

Each is a context manager around a `Job`. What a library needs a user to write is what stands here, and no more; nothing
is tuned for any of them, `probe` included.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.work import Work
from probe import Board, Kind, ParameterKind, Probe, cam, histogram

Values = dict[Any, Any]


@dataclass
class Job:
    """A piece of work as one library does it.

    Arguments:
        run: what is timed.
        values: what the last `run` captured. Outputs: by ``(module's name, which call)``. Histograms: by
            ``(parameter's name, "value" or "grad")`` the number of values, the least and the greatest. Maps: by sample.
        work: what it is compared with, where that is not the model that all share.
    """

    run: Callable[[], object]
    values: Callable[[], Values]
    work: Work | None = None


Adapter = Callable[[Work], AbstractContextManager[Job]]


def leaf_names(model: nn.Module) -> list[str]:
    """The names of the modules that have no children."""
    return [name for name, module in model.named_modules() if not any(True for _ in module.children())]


def _entered(job: Job) -> AbstractContextManager[Job]:
    return contextlib.nullcontext(job)


# -- capture the output of every leaf module ---------------------------------------------------------------------------


@contextlib.contextmanager
def probe_attached(work: Work) -> Iterator[Job]:
    """``Probe(model, kinds=Kind.OUTPUT)``, attached all the time."""
    with Probe(work.model, kinds=Kind.OUTPUT) as p:
        yield Job(work.step, lambda: _of_probe(p))


@contextlib.contextmanager
def probe_anew(work: Work) -> Iterator[Job]:
    """``with Probe(...)`` around every forward."""
    probes: list[Probe] = []

    def run() -> None:
        with Probe(work.model, kinds=Kind.OUTPUT) as p:
            work.step()
        probes[:] = [p]

    yield Job(run, lambda: _of_probe(probes[0]))


def _of_probe(p: Probe) -> Values:
    found: Values = {}
    for name in p:
        with contextlib.suppress(AttributeError):  # a layer that was not called
            found.update({(name, i): call.output for i, call in enumerate(p[name].calls)})
    return found


@contextlib.contextmanager
def by_hand(work: Work) -> Iterator[Job]:
    """A forward hook on every leaf that stores a reference: the limit."""
    held: defaultdict[str, list[Any]] = defaultdict(list)

    def keeper(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            held[name].append(output)

        return hook

    def run() -> None:
        held.clear()
        work.step()

    with contextlib.ExitStack() as stack:
        for name in leaf_names(work.model):
            stack.enter_context(work.model.get_submodule(name).register_forward_hook(keeper(name)))
        yield Job(run, lambda: {(name, i): x for name, values in held.items() for i, x in enumerate(values)})


def torchvision_extractor(work: Work) -> AbstractContextManager[Job]:
    """``create_feature_extractor`` with every leaf module as a node."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    leaves = set(leaf_names(work.model))
    keys: dict[str, tuple[str, int]] = {}
    for node in get_graph_node_names(work.model)[not work.model.training]:
        name, _, number = node.rpartition("_")
        if node in leaves:
            keys[node] = node, 0
        elif name in leaves and number.isdigit():
            keys[node] = name, int(number)
    extract = create_feature_extractor(work.model, return_nodes=list(keys))
    found: Values = {}

    def run() -> None:
        with torch.no_grad():
            found.update(extract(work.inputs))

    return _entered(Job(run, lambda: {keys[node]: x for node, x in found.items()}))


def captum_activation(work: Work) -> AbstractContextManager[Job]:
    """``LayerActivation`` of all leaf modules at once."""
    from captum.attr import LayerActivation

    names = leaf_names(work.model)
    activation = LayerActivation(work.model, [work.model.get_submodule(name) for name in names])
    found: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            found[:] = activation.attribute(work.inputs)

    def values() -> Values:
        each = {name: x if isinstance(x, tuple) else (x,) for name, x in zip(names, found, strict=True)}
        return {(name, i): x for name, calls in each.items() for i, x in enumerate(calls)}

    return _entered(Job(run, values))


def nnsight_trace(work: Work) -> AbstractContextManager[Job]:
    """``.output.save()`` of every leaf module in a trace."""
    import nnsight

    names = leaf_names(work.model)
    model = nnsight.NNsight(work.model)
    envoys = {name: model.get(name) for name in names}
    found: Values = {}

    def run() -> None:
        found.clear()
        with torch.no_grad(), model.trace(work.inputs):
            saved = nnsight.save({})
            for name, envoy in envoys.items():
                saved[name] = envoy.output
        found.update(saved)

    return _entered(Job(run, lambda: {(name, 0): x for name, x in found.items()}))


def pyvene_collect(work: Work) -> AbstractContextManager[Job]:
    """A ``CollectIntervention`` at the output of every leaf module."""
    import inspect

    import pyvene

    names, counts = leaf_names(work.model), calls_of(work)
    if not hasattr(work.model, "config"):
        work.model.config = types.SimpleNamespace(to_dict=dict)  # pyvene wants one
    sites = [{"component": f"{name}.output", "intervention": pyvene.CollectIntervention()} for name in names]
    model = pyvene.IntervenableModel(sites, work.model)
    argument = next(iter(inspect.signature(work.model.forward).parameters))
    found: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            result = model({argument: work.inputs}, return_dict=True)
        found[:] = result.collected_activations

    keys = [(name, i) for name in names for i in range(counts[name])]
    return _entered(Job(run, lambda: dict(zip(keys, found, strict=False))))


def torchlens_trace(work: Work) -> AbstractContextManager[Job]:
    """``torchlens.trace``: every operation, as a graph."""
    import torchlens

    held: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            held[:] = [torchlens.trace(work.model, work.inputs)]

    def values() -> Values:
        found: Values = {}
        for operation in held[0].layer_list:
            for call in operation.output_of_module_calls:
                name, _, number = call.rpartition(":")
                found[name, int(number) - 1] = operation.out
        return found

    return _entered(Job(run, values))


def torchlens_record(work: Work) -> AbstractContextManager[Job]:
    """``torchlens.record``: the values of what leaf modules do, without the graph."""
    import torchlens

    held: list[Any] = []
    leaves = set(leaf_names(work.model))

    def run() -> None:
        with torch.no_grad():
            held[:] = [torchlens.record(work.model, work.inputs, save=lambda each: each.address in leaves)]

    def values() -> Values:
        records = held[0].records
        return {(each.ctx.address, each.ctx.module_pass_index - 1): each.ram_payload for each in records}

    return _entered(Job(run, values))


def transformerlens_cache(work: Work) -> AbstractContextManager[Job]:
    """``run_with_cache`` of its bridge around a GPT-2 of the same depth, width and input: no other model will do.

    What it is compared with is that GPT-2 itself: bare, under `probe`, and a copy of every leaf module's output.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tokenizers import Tokenizer, models
    from transformer_lens import TransformerBridge
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_layer=6, n_embd=256, n_head=8, n_positions=512, vocab_size=512, **ids)
    plain = Work(GPT2LMHeadModel(config).eval().to(work.device), work.inputs)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(512)}, unk_token="0"))
    special = dict.fromkeys(("unk_token", "pad_token", "bos_token", "eos_token"), "0")
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        tokens = AutoTokenizer.from_pretrained(folder)
        model = plain.twin().model
        bridge = TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=tokens, device=work.device)
    held: dict[str, Tensor] = {}

    def run() -> None:
        with torch.no_grad():
            held.update(bridge.run_with_cache(work.inputs)[1])

    return _entered(Job(run, lambda: _of_transformerlens(held, leaf_names(plain.model)), plain))


def _of_transformerlens(held: dict[str, Tensor], names: list[str]) -> Values:
    """Its cache by the names that transformers gives to GPT-2's modules."""
    outside = {"wte": "embed", "ln_f": "ln_final", "lm_head": "unembed"}
    inside = {
        "ln_1": "ln1.hook_out",
        "attn.c_proj": "attn.o.hook_out",
        "attn.resid_dropout": "attn.hook_out",
        "ln_2": "ln2.hook_out",
        "mlp.c_fc": "mlp.in.hook_out",
        "mlp.act": "mlp.hook_post",
        "mlp.c_proj": "mlp.out.hook_out",
        "mlp.dropout": "mlp.hook_out",
    }

    def value(name: str) -> Tensor:
        if name == "drop":
            return held["blocks.0.hook_in"]
        if name == "wpe":
            return held["pos_embed.hook_out"][:1]  # handed out once a sample
        if not name.startswith("h."):
            return held[f"{outside[name]}.hook_out"]
        _, block, part = name.split(".", 2)
        if part == "attn.c_attn":
            return torch.cat([held[f"blocks.{block}.attn.{each}.hook_out"].flatten(2) for each in "qkv"], 2)
        return held[f"blocks.{block}.{inside[part]}"]

    found: Values = {}
    for name in names:
        with contextlib.suppress(KeyError):  # where it has no hook
            found[name, 0] = value(name.removeprefix("transformer."))
    return found


# -- histograms of all parameters and their gradients, every training step ---------------------------------------------


def summary_of(x: Tensor) -> tuple[int, float, float]:
    """How many values, the least and the greatest: what every histogram must agree with."""
    return x.numel(), float(x.min()), float(x.max())


@contextlib.contextmanager
def probe_log(work: Work) -> Iterator[Job]:
    """``p.log(board, histogram)`` on every step, written when a step ends."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Board(folder) as board,
        Probe(work.model, optimizer=work.optimizer) as p,
    ):
        p.log(board, histogram, kinds=ParameterKind.VALUE | ParameterKind.GRAD)

        def run() -> None:
            work.step()
            board.flush()

        yield Job(run, lambda: _histograms(folder, "/value/histogram", "/grad/histogram"))


@contextlib.contextmanager
def summary_writer(work: Work) -> Iterator[Job]:
    """``SummaryWriter.add_histogram`` of each after the step's backward."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        steps = 0

        def write(*_: object) -> None:
            nonlocal steps
            for name, parameter in work.model.named_parameters():
                writer.add_histogram(f"{name}/value", parameter.detach(), steps)
                writer.add_histogram(f"{name}/grad", parameter.grad, steps)
            steps += 1

        assert work.optimizer is not None
        with work.optimizer.register_step_pre_hook(write):

            def run() -> None:
                work.step()
                writer.flush()

            yield Job(run, lambda: _histograms(folder, "/value", "/grad"))


def _histograms(folder: str, value: str, grad: str) -> Values:
    """What TensorBoard reads back of the last step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder, size_guidance={"histograms": 0}).Reload()
    found: Values = {}
    for tag in events.Tags()["histograms"]:
        for suffix in (value, grad):
            if tag.endswith(suffix):
                last = events.Histograms(tag)[-1].histogram_value
                found[tag.removesuffix(suffix), suffix.split("/")[1]] = (int(last.num), last.min, last.max)
    return found


@contextlib.contextmanager
def wandb_watch(work: Work) -> Iterator[Job]:
    """``wandb.watch(model, log="all", log_freq=1)`` and a ``log`` a step, in offline mode."""
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    import wandb

    found: Values = {}
    first = next(name for name, _ in work.model.named_parameters())
    with tempfile.TemporaryDirectory() as folder:
        run_ = wandb.init(dir=folder, project="benchmark", settings=wandb.Settings(silent=True))
        log = run_._log

        def noted(data: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            for name, value in data.items():
                where, _, parameter = name.partition("/")
                if where in ("parameters", "gradients"):
                    key = parameter, "value" if where == "parameters" else "grad"
                    found[key] = int(sum(value.histogram)), value.bins[0], value.bins[-1]
            return log(data, *args, **kwargs)

        def values() -> Values:
            run_._log = log
            return _of_wandb(found, first)

        def run() -> None:
            work.step()
            run_.log({})

        run_._log = noted  # until the values are read: what is timed is theirs alone
        run_.watch(work.model, log="all", log_freq=1)
        try:
            yield Job(run, values)
        finally:
            run_.unwatch(work.model)
            run_.finish()


def _of_wandb(found: Values, first: str) -> Values:
    """By the parameters' names: from the second watched model of a process on each has a ``graph_1`` glued to it."""
    prefix = next((name for name, _ in found), first).removesuffix(first)
    return {(name.removeprefix(prefix), what): value for (name, what), value in found.items()}


# -- Grad-CAM of resnet18's last block ---------------------------------------------------------------------------------

LAYER = "layer4"


def _maps(maps: Tensor) -> Values:
    """By sample."""
    return dict(enumerate(maps.detach().float().cpu()))


def true_maps(work: Work) -> Values:
    """By ``torch.autograd.grad`` on the network cut in two, without a hook."""
    children = list(work.model.children())
    value = nn.Sequential(*children[:-2])(work.inputs).detach().requires_grad_()
    score = nn.Sequential(children[-2], nn.Flatten(), children[-1])(value)[:, 0].sum()
    (gradient,) = torch.autograd.grad(score, value)
    return _maps((gradient.mean((2, 3), keepdim=True) * value).sum(1))


def probe_cam(work: Work) -> AbstractContextManager[Job]:
    """``cam.explain``."""
    held: list[Tensor] = []

    def run() -> None:
        held[:] = [cam.explain(work.model, work.inputs, layer=LAYER, target=0, method=cam.grad_cam)]

    return _entered(Job(run, lambda: _maps(held[0])))


@contextlib.contextmanager
def pytorch_grad_cam(work: Work) -> Iterator[Job]:
    """``GradCAM`` of grad-cam; its maps come at the size of the input."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    held: list[Any] = []
    targets = [ClassifierOutputTarget(0)] * len(work.inputs)
    with GradCAM(work.model, [work.model.get_submodule(LAYER)]) as explain:

        def run() -> None:
            held[:] = [explain(work.inputs, targets)]

        yield Job(run, lambda: _maps(torch.from_numpy(held[0])))


@contextlib.contextmanager
def torchcam_grad_cam(work: Work) -> Iterator[Job]:
    """``GradCAM`` of torchcam."""
    from torchcam.methods import GradCAM

    held: list[Tensor] = []
    with GradCAM(work.model, work.model.get_submodule(LAYER)) as explain:

        def run() -> None:
            held[:] = explain([0] * len(work.inputs), work.model(work.inputs))

        yield Job(run, lambda: _maps(held[0]))


def captum_grad_cam(work: Work) -> AbstractContextManager[Job]:
    """``LayerGradCam``."""
    from captum.attr import LayerGradCam

    explain = LayerGradCam(work.model, work.model.get_submodule(LAYER))
    held: list[Tensor] = []

    def run() -> None:
        held[:] = [explain.attribute(work.inputs, target=0, relu_attributions=True)[:, 0]]

    return _entered(Job(run, lambda: _maps(held[0])))


# -- what is true ------------------------------------------------------------------------------------------------------


def calls_of(work: Work) -> dict[str, int]:
    """How often each leaf module is called in a forward."""
    counts: dict[str, int] = defaultdict(int)
    for name, _ in true_outputs(work):
        counts[name] += 1
    return counts


def true_outputs(work: Work) -> Values:
    """A copy of every output, made inside a hook before anything can write to it."""
    found: Values = {}
    counts: dict[str, int] = defaultdict(int)

    def keeper(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name, counts[name]] = output.detach().clone()
            counts[name] += 1

        return hook

    with contextlib.ExitStack() as stack:
        for name in leaf_names(work.model):
            stack.enter_context(work.model.get_submodule(name).register_forward_hook(keeper(name)))
        Work(work.model, work.inputs).step()
    return found


def true_histograms(work: Work) -> Values:
    """What the histograms of the next step must agree with."""
    found: Values = {}

    def look(*_: object) -> None:
        for name, parameter in work.model.named_parameters():
            found[name, "value"] = summary_of(parameter.detach())
            assert parameter.grad is not None
            found[name, "grad"] = summary_of(parameter.grad)

    assert work.optimizer is not None
    with work.optimizer.register_step_pre_hook(look):
        work.step()
    return found
