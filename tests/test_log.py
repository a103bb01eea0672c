"""`Probe.log`: what is in the event files is what flowed; nothing is hooked in between; one transfer a step."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import probe
from probe import (
    Board,
    Capture,
    Embedding,
    Histogram,
    Image,
    Kind,
    ParameterKind,
    Probe,
    Scalar,
    Statistics,
    histogram,
    sketch,
    stats,
)
from probe.hooks import ours
from probe.session import _calls_super
from tests import zoo
from tests.reading import pixels


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0}).Reload()


def scalars(folder: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in read(folder).Scalars(tag)}


def hooked(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        if any(map(ours, hooks.values()))
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> None:
    optimizer.zero_grad()
    for x in batches:
        (model(x).square().mean() / len(batches)).backward()
    optimizer.step()


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))


@pytest.fixture
def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_event_files_hold_what_flowed(tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Activations, gradients, parameters, their gradients and updates, against numbers taken by hand."""
    x, twin = torch.randn(5, 4), copy.deepcopy(model)
    before = twin[0].weight.detach().clone()
    truth = zoo.references(twin, x, backward=False)
    out = twin(x)
    out.square().mean().backward()
    gradient = twin[0].weight.grad
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats, histogram)
        train(model, optimizer, [x])
    assert scalars(tmp_path, "0/output/mean") == {0: pytest.approx(float(truth["0"][0][0].mean()), rel=1e-5)}
    assert scalars(tmp_path, "0.weight/value/norm")[0] == pytest.approx(float(before.norm()), rel=1e-5)
    assert scalars(tmp_path, "0.weight/grad/norm")[0] == pytest.approx(float(gradient.norm()), rel=1e-5)
    update = model[0].weight.detach() - before
    assert scalars(tmp_path, "0.weight/update/norm")[0] == pytest.approx(float(update.norm()), rel=1e-4)
    ratio = float(update.norm() / before.norm())
    assert scalars(tmp_path, "0.weight/update/ratio")[0] == pytest.approx(ratio, rel=1e-4)
    assert scalars(tmp_path, "lr/group0") == {0: pytest.approx(0.1)}
    (event,) = read(tmp_path).Histograms("0/output/histogram")
    assert sum(event.histogram_value.bucket) == truth["0"][0][0].numel()
    (event,) = read(tmp_path).Histograms("2/grad_output/histogram")
    assert sum(event.histogram_value.bucket) == out.numel()


def test_event_files_hold_what_is_hard_to_hold(tmp_path: Path) -> None:
    """bfloat16 far from 1, NaN and Inf: finite values keep their scale and their number, the others are counted."""
    values = torch.tensor([1e-9, -1e-9, 1e6, 2e6, 0.0, 0.0, float("nan"), float("inf")], dtype=torch.bfloat16)
    finite = values[:6].double()
    model = nn.Identity()
    with Board(str(tmp_path)) as board, Probe(model, kinds=Kind.OUTPUT) as p:
        p.log(board, stats, histogram)
        model(values)
    (event,) = read(tmp_path).Histograms("Identity/output/histogram")
    drawn = event.histogram_value
    assert (drawn.min, drawn.max, drawn.num) == (float(finite.min()), float(finite.max()), 6)
    assert sum(drawn.bucket) == 6
    assert drawn.sum == pytest.approx(float(finite.sum()), rel=1e-12)
    tiny = [count for limit, count in zip(drawn.bucket_limit, drawn.bucket, strict=True) if limit <= 1e-6]
    assert sum(tiny) == 4  # none was squeezed into its neighbour's bucket
    for name, number in {"nan": 1, "inf": 1, "zeros": 2 / 8, "max": float(finite.max())}.items():
        assert scalars(tmp_path, f"Identity/output/{name}") == {0: pytest.approx(number)}


def test_a_model_without_values_logs_nothing(tmp_path: Path, model: nn.Module) -> None:
    """On the meta device there is nothing to show, and nothing is said."""
    with Board(str(tmp_path)) as board, Probe(model.to("meta")) as p:
        p.log(board, stats, histogram)
        model(torch.empty(2, 4, device="meta")).sum().backward()
    assert not any(tags for tags in read(tmp_path).Tags().values() if isinstance(tags, list))


def test_only_every_nth_step_is_hooked_and_logged(
    tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """On the steps between, no module carries a hook of ours; the events' steps are the observed ones."""
    seen = []
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats, every=3)
        for _ in range(7):
            seen.append(bool(hooked(model)))
            train(model, optimizer, [torch.randn(2, 4)])
        assert p.steps == 7
    assert seen == [True, False, False, True, False, False, True]
    assert list(scalars(tmp_path, "0/output/mean")) == [0, 3, 6]
    assert list(scalars(tmp_path, "0.weight/grad/mean")) == [0, 3, 6]


def test_training_is_bit_identical(tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights after a logged training are those after a bare one."""
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    batches = [torch.randn(3, 4) for _ in range(4)]
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats, histogram, every=2)
        for x in batches:
            train(model, optimizer, [x])
    for x in batches:
        train(twin, other, [x])
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_micro_batches_merge(tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The statistics of a step's micro-batches are those of the batch: std too, which no mean of stds would give."""
    x = torch.randn(6, 4)
    whole = model[0](x).detach()
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats, histogram, layers="0")
        train(model, optimizer, [x[:2], x[2:]])
    assert scalars(tmp_path, "0/output/std")[0] == pytest.approx(float(whole.std(correction=0)), rel=1e-5)
    (event,) = read(tmp_path).Histograms("0/output/histogram")
    assert sum(event.histogram_value.bucket) == whole.numel()


def test_evaluation_is_logged_apart(tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Passes in eval mode and under a tag go to sub-runs of that name."""
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats)
        with torch.no_grad():
            model.eval()(torch.ones(2, 4))
            with p.tag("valid"):
                model(torch.zeros(2, 4))
        model.train()
        train(model, optimizer, [torch.randn(2, 4)])
    means = {run: scalars(tmp_path / run, "0/output/mean")[0] for run in ("", "eval", "valid")}
    assert means["valid"] == pytest.approx(float(means["valid"]))
    assert len(set(means.values())) == 3


def test_one_transfer_an_observed_step(
    tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is logged, by however many summaries, crosses to the host in one `fetch` an observed step."""
    fetches: list[int] = []
    fetch = sketch.fetch

    def counted(values: Any) -> Any:
        values = list(values)
        fetches.append(len(values))
        return fetch(values)

    monkeypatch.setattr(sketch, "fetch", counted)
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats, histogram, probe.dead_units, every=2)
        for _ in range(4):
            train(model, optimizer, [torch.randn(2, 4)])
    assert len(fetches) == 2
    assert all(fetches)


def test_a_summary_of_the_users_own(tmp_path: Path, model: nn.Module) -> None:
    """One function; what it yields lands under the layer's tag, with p.step() in place of an optimizer."""

    def mine(c: Capture) -> Iterator[Any]:
        if c.kind is Kind.OUTPUT:
            yield Scalar("largest", c.value.max())
            yield Histogram("values", c.value)
            yield Image("picture", torch.zeros(3, 4, 5))

    x = torch.randn(2, 4)
    with Board(str(tmp_path)) as board, Probe(model) as p:
        p.log(board, mine, layers="0")
        for _ in range(2):
            model(x)
            p.step()
    largest = float(model[0](x).detach().max())
    assert scalars(tmp_path, "0/output/largest") == pytest.approx({0: largest, 1: largest})
    assert len(read(tmp_path).Histograms("0/output/values")) == 2
    assert read(tmp_path).Images("0/output/picture")[0].width == 5


def test_calls_and_paths_have_tags_of_their_own(tmp_path: Path) -> None:
    """Calls after the first get a number, nested outputs their path."""
    model = nn.ModuleDict({"shared": zoo.Shared(), "cell": nn.LSTM(4, 3)})
    with Board(str(tmp_path)) as board, Probe(model) as p:
        p.log(board, stats, kinds=Kind.OUTPUT)
        model["shared"](torch.randn(2, 4))
        model["cell"](torch.randn(2, 1, 4))
    tags = read(tmp_path).Tags()["scalars"]
    for tag in (
        "shared.first/output/mean",
        "shared.first/output#2/mean",
        "cell/output[0]/mean",
        "cell/output[1][1]/mean",
    ):
        assert tag in tags


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_summary_that_raises(tmp_path: Path, model: nn.Module, on_error: str) -> None:
    """It is named with layer and kind; training stops, or goes on without it."""

    def broken(c: Capture) -> Iterator[Any]:
        raise ZeroDivisionError

    with Board(str(tmp_path)) as board, Probe(model) as p:
        p.log(board, broken, stats, on_error=on_error)
        if on_error == "raise":
            with pytest.raises(ZeroDivisionError) as caught:
                model(torch.randn(2, 4))
            assert "broken" in caught.value.__notes__[0]
            assert "'0', output" in caught.value.__notes__[0]
        else:
            with pytest.warns(RuntimeWarning, match="broken"):
                model(torch.randn(2, 4))
            model(torch.randn(2, 4))
    assert ("0/output/mean" in read(tmp_path).Tags()["scalars"]) == (on_error == "warn")


@pytest.mark.parametrize(
    ("shown", "error", "message"),
    [
        (3, TypeError, "returns a list of it, not 3"),
        (Scalar("a", 1.0), TypeError, "returns a list of it, not Scalar"),
        ([3], TypeError, "Scalar, Statistics, Histogram, Image, Embedding, not 3"),
        ([Scalar("a", "much")], TypeError, r"Scalar\('a', ...\) is one real number, not 'much'"),
        ([Scalar("a", torch.ones(3))], ValueError, r"Scalar\('a', ...\) .* not a float32 tensor of shape \(3,\)"),
        ([Scalar("a", torch.ones((), dtype=torch.cfloat))], ValueError, "one real number"),
        ([Histogram("a", "much")], TypeError, r"Histogram\('a', ...\) takes a tensor, numbers or a Sketch"),
        ([Statistics("much")], TypeError, r"Statistics\(...\) takes a tensor, numbers or a Sketch"),
        ([Statistics(torch.ones(3), ("mode",))], ValueError, r"names=\('mode',\)\): use mean, std,"),
        ([Image("a", torch.ones(3))], TypeError, r"Image\('a', ...\) takes a tensor \[C, H, W\]"),
        ([Embedding("a", torch.ones(3))], TypeError, r"Embedding\('a', ...\) takes a tensor \[N, F\]"),
        ([Histogram("a", sketch.of(torch.ones(3), histogram=False))], ValueError, r"takes a sketch with a histogram"),
        ([Image("a", torch.ones(3, 3) * 1j)], TypeError, r"takes a tensor \[C, H, W\], not a complex64 tensor"),
        ([Embedding("a", torch.ones(3, 3) * 1j)], TypeError, r"takes a tensor \[N, F\], not a complex64 tensor"),
        ([Embedding("a", torch.ones(3, 2), [1])], ValueError, "3 points, 1 labels"),
    ],
)
def test_what_a_summary_may_not_yield(
    shown: Any, error: type[Exception], message: str, tmp_path: Path, model: nn.Module
) -> None:
    """It is said at once, at the layer, or warned of once: not by the background thread later."""

    def summary(c: Capture) -> Any:
        return shown

    with Board(str(tmp_path)) as board, Probe(model, "0", kinds=Kind.OUTPUT) as p:
        handle = p.log(board, summary)
        with pytest.raises(error, match=message) as caught:
            model(torch.randn(2, 4))
        assert "at '0', output" in caught.value.__notes__[0]
        handle.remove()
        p.log(board, summary, on_error="warn")
        with pytest.warns(RuntimeWarning, match="it is not asked again"):
            model(torch.randn(2, 4))


def test_a_long_step_takes_no_more_memory(tmp_path: Path, model: nn.Module) -> None:
    """An evaluation of many batches, or steps that nobody ends: numbers are merged as they come, not gathered."""

    def mean(c: Capture) -> Iterator[Any]:
        yield Scalar("own", c.value.mean())

    def alive() -> int:
        return sum(type(each) in (torch.Tensor, sketch.Sketch) for each in gc.get_objects())

    batches = [torch.randn(2, 4) for _ in range(60)]
    with Board(str(tmp_path)) as board, Probe(model, "0", kinds=Kind.OUTPUT) as p, torch.no_grad():
        p.log(board, stats, mean, histogram)
        for x in batches[:20]:
            model(x)
        before = alive()
        for x in batches[20:]:
            model(x)
        assert alive() < before + 4 * sketch.Sketch.TERMS  # a sum keeps so many before it folds them
    outputs = torch.stack([model[0](x).detach() for x in batches])
    assert scalars(tmp_path, "0/output/own")[0] == pytest.approx(float(outputs.mean()), abs=1e-6)
    assert scalars(tmp_path, "0/output/mean")[0] == pytest.approx(float(outputs.mean()), abs=1e-6)


@pytest.mark.parametrize("first_ends_the_step", [False, True])
def test_several_optimizers_are_told_apart(first_ends_the_step: bool, tmp_path: Path, model: nn.Module) -> None:
    """Each has its rates and norms; what belongs to one iteration is at one step, whichever of them steps first."""
    one = torch.optim.SGD(model[0].parameters(), lr=0.5)
    other = torch.optim.Adam(model[2].parameters(), lr=0.25)
    norms: dict[str, list[float]] = {"SGD": [], "Adam": []}
    with Board(str(tmp_path)) as board, Probe(model, optimizer=[one, other]) as p:
        p.log(board, stats, every=2)
        for _ in range(4):
            model.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()
            for name, layer in (("SGD", model[0]), ("Adam", model[2])):
                norms[name].append(float(nn.utils.get_total_norm([each.grad for each in layer.parameters()])))
            nn.utils.clip_grad_norm_(model[0].parameters(), 1e-3)
            for optimizer in (one, other) if first_ends_the_step else (other, one):
                optimizer.step()
    for name, rate, clipped in (("SGD", 0.5, 1e-3), ("Adam", 0.25, None)):
        expected = {step: pytest.approx(norms[name][step], rel=1e-4) for step in (0, 2)}
        assert scalars(tmp_path, f"lr/{name}.group0") == {0: rate, 2: rate}
        assert scalars(tmp_path, f"grad_norm/{name}.before_clipping") == expected
        after = scalars(tmp_path, f"grad_norm/{name}.after_clipping")
        assert after == ({step: pytest.approx(clipped, rel=1e-2) for step in (0, 2)} if clipped else expected)
    assert sorted(scalars(tmp_path, "2.weight/grad/mean")) == sorted(scalars(tmp_path, "0.weight/grad/mean")) == [0, 2]


def test_sparse_gradients_count(tmp_path: Path) -> None:
    """An embedding's sparse gradient, in which a row may come twice, has the norm of the dense one."""
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    with Board(str(tmp_path)) as board, Probe(embedding, optimizer=optimizer) as p:
        p.log(board, stats)
        embedding(torch.tensor([1, 1, 3])).sum().backward()
        optimizer.step()
    expected = {0: pytest.approx((2 * (2**2 + 1)) ** 0.5)}
    assert scalars(tmp_path, "grad_norm/after_clipping") == expected
    assert scalars(tmp_path, "grad_norm/before_clipping") == expected


def test_a_plain_summary_writer_is_enough(tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Tags and numbers are the same; other modes than training get a prefix."""
    with SummaryWriter(str(tmp_path)) as writer, Probe(model, optimizer=optimizer) as p:
        p.log(writer, stats, histogram, probe.kernels)
        train(model, optimizer, [torch.ones(2, 4)])
        with torch.no_grad(), p.tag("valid"):
            model(torch.ones(2, 4))
    tags = read(tmp_path).Tags()
    assert {"0/output/mean", "valid/0/output/mean", "lr/group0"} <= set(tags["scalars"])
    assert "0.weight/grad/histogram" in tags["histograms"]


def test_clipping_is_seen(tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The norm of all gradients before and after clipping."""
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats)
        (model(torch.randn(3, 4)) * 100).square().mean().backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
    assert scalars(tmp_path, "grad_norm/before_clipping")[0] == pytest.approx(norm, rel=1e-4)
    assert scalars(tmp_path, "grad_norm/after_clipping")[0] == pytest.approx(0.5, rel=1e-3)


def test_norms_are_of_all_gradients_whatever_is_chosen(
    tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """A log of one layer tells the norm of all gradients as well, and two logs of a writer tell it once a step."""
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats, layers="0")
        p.log(board, histogram, every=2)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(3, 4)).square().mean().backward()
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
            optimizer.step()
    for tag, expected in (("before_clipping", norm), ("after_clipping", 0.01)):
        told = [(each.step, each.value) for each in read(tmp_path).Scalars(f"grad_norm/{tag}")]
        assert [step for step, _ in told] == [0, 1, 2]
        assert told[-1][1] == pytest.approx(expected, rel=1e-3)
    assert "2.weight/grad/norm" not in read(tmp_path).Tags()["scalars"]


def test_what_shares_memory_with_a_parameter_is_what_it_was(tmp_path: Path) -> None:
    """A number or a picture that a summary takes straight from a parameter or its gradient is that of its step."""

    def own(c: Capture) -> Iterator[Any]:
        yield Scalar("number", c.value[0])
        yield Image("picture", c.value.expand(1, 2, 2))
        yield Embedding("points", c.value[None])

    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    model.weight.grad = torch.zeros(1)
    with Board(str(tmp_path), flush_secs=60) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, own, kinds=[ParameterKind.VALUE, ParameterKind.GRAD])
        for step in range(3):
            model.weight.grad.fill_(step)
            optimizer.step()
        model.weight.grad.zero_()
        board.flush()
    assert scalars(tmp_path, "weight/value/number") == {0: 1.0, 1: 1.0, 2: 0.75}
    assert scalars(tmp_path, "weight/grad/number") == {0: 0.0, 1: 1.0, 2: 2.0}
    assert pixels(tmp_path, "weight/value/picture")[0, 0].tolist() == [191] * 3
    points = sorted(tmp_path.glob("*/weight%2fvalue%2fpoints/tensors.tsv"))
    assert [float(each.read_text()) for each in points] == [1.0, 1.0, 0.75]


def test_a_running_total_is_what_it_was(tmp_path: Path) -> None:
    """A number that a summary goes on writing to is logged as it was when it was yielded."""
    total = torch.zeros(())

    def passes(c: Capture) -> Iterator[Any]:
        yield Scalar("passes", total.add_(1))

    model = nn.Identity()
    with Board(str(tmp_path)) as board, Probe(model, kinds=Kind.OUTPUT) as p:
        p.log(board, passes)
        for _ in range(3):
            model(torch.ones(2))
            p.step()
    assert scalars(tmp_path, "Identity/output/passes") == {0: 1.0, 1: 2.0, 2: 3.0}


def test_parameters_that_an_optimizer_gets_later(tmp_path: Path, model: nn.Module) -> None:
    """A layer that is thawed in the middle is logged from then on, and not before."""
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    model[0].requires_grad_(False)
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats)
        for step in range(4):
            if step == 2:
                optimizer.add_param_group({"params": list(model[0].requires_grad_(True).parameters())})
            train(model, optimizer, [torch.ones(3, 4)])
    for what in ("value/norm", "grad/norm", "update/ratio"):
        assert sorted(scalars(tmp_path, f"0.weight/{what}")) == [2, 3]
        assert sorted(scalars(tmp_path, f"2.weight/{what}")) == [0, 1, 2, 3]


def test_parameters_without_values_yet(tmp_path: Path) -> None:
    """Those of a lazy layer are logged once they have values; the last step is the one left open at the end."""
    model = nn.LazyLinear(2)
    with Board(str(tmp_path)) as board, Probe(model) as p:
        p.log(board, stats, kinds=ParameterKind.VALUE)
        p.step()
        model(torch.ones(1, 3))
        p.step()
    assert sorted(scalars(tmp_path, "weight/value/mean")) == [1, 2]


def test_pictures(tmp_path: Path) -> None:
    """Inputs, kernels and feature maps, without an optimizer, through one log each."""
    model = zoo.ConvNet()
    with Board(str(tmp_path)) as board, Probe(model) as p:
        p.log(board, probe.feature_maps(), probe.kernels, probe.input_images(), layers="features.0")
        model(torch.rand(2, 3, 8, 8))
    expected = {"features.0/output/feature_maps", "features.0.weight/value/kernels", "features.0/input/images"}
    assert set(read(tmp_path).Tags()["images"]) == expected


def test_a_layer_that_changes_shape(tmp_path: Path, model: nn.Module) -> None:
    """Batches of other sizes are logged like any."""
    with Board(str(tmp_path)) as board, Probe(model) as p:
        p.log(board, stats, histogram)
        for size in (1, 7, 3):
            model(torch.randn(size, 4))
            p.step()
    counts = [sum(e.histogram_value.bucket) for e in read(tmp_path).Histograms("2/output/histogram")]
    assert counts == [2, 14, 6]


def test_removing_a_log(tmp_path: Path, model: nn.Module) -> None:
    """The handle ends it; what was open is written."""
    with Board(str(tmp_path)) as board, Probe(model) as p:
        handle = p.log(board, stats)
        model(torch.randn(2, 4))
        handle.remove()
        assert not hooked(model)
        p.step()
        model(torch.randn(2, 4))
    assert list(scalars(tmp_path, "0/output/mean")) == [0]


def test_a_probe_that_logs_keeps_nothing(tmp_path: Path, model: nn.Module) -> None:
    """Unless keep= says so; the error says what to type."""
    with Board(str(tmp_path)) as board:
        with Probe(model) as p:
            p.log(board, stats)
            model(torch.randn(2, 4))
            with pytest.raises(AttributeError, match="keep=1"):
                _ = p["0"].output
        with Probe(model, keep=1) as p:
            p.log(board, stats)
            model(torch.randn(2, 4))
        assert p["0"].output.shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda p, b: p.log(b), TypeError, "at least one summary"),
        (lambda p, b: p.log(stats), TypeError, "writes to a Board"),
        (lambda p, b: p.log(b, 3), TypeError, "no summary"),
        (lambda p, b: p.log(b, stats, every=0), ValueError, "every=0"),
        (lambda p, b: p.log(b, stats, on_error="ignore"), ValueError, "on_error"),
        (lambda p, b: p.log(b, stats, kinds="output"), TypeError, "kinds="),
        (lambda p, b: p.log(b, stats, layers="nope"), probe.NoSuchLayer, "nope"),
        (lambda p, b: p.log(b, stats, layers=[]), probe.NoSuchLayer, "it is empty"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, model: nn.Module, call: Callable[[Any, Any], Any], error: type[Exception], text: str
) -> None:
    """Refused before anything is changed."""
    with Board(str(tmp_path)) as board:
        p = Probe(model)
        with pytest.raises(error, match=text):
            call(p, board)
        with p:
            model(torch.randn(2, 4))
        assert p["0"].output is not None


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_a_board_that_closes_before_the_probe_is_left(
    with_optimizer: bool, tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """What is open is written by then, once; whichever of the two blocks is the outer one."""
    for outer in ("probe", "board"):
        folder = tmp_path / outer
        with ExitStack() as stack:
            board = stack.enter_context(Board(str(folder))) if outer == "board" else None
            p = stack.enter_context(Probe(model, optimizer=optimizer if with_optimizer else None))
            board = board or stack.enter_context(Board(str(folder)))
            p.log(board, stats, kinds=[Kind.OUTPUT, ParameterKind.VALUE])
            train(model, optimizer, [torch.randn(2, 4)])
            with p.tag("valid"), torch.no_grad():
                model(torch.randn(2, 4))
        step = int(with_optimizer)
        assert [event.step for event in read(folder / "valid").Scalars("2/output/mean")] == [step]
        assert [event.step for event in read(folder).Scalars("2.weight/value/mean")] == [0]
        assert board.closed


def test_an_error_on_leaving_does_not_hide_the_users(tmp_path: Path, model: nn.Module) -> None:
    """It is a note on the one that ends the block; by itself it is raised. Nothing stays hooked either way."""

    def late(c: Capture) -> Iterator[Any]:
        if c.kind is ParameterKind.VALUE:
            raise ZeroDivisionError
        yield Scalar("one", 1.0)

    with Board(str(tmp_path)) as board:
        p = Probe(model)
        p.log(board, late, kinds=[Kind.OUTPUT, ParameterKind.VALUE])
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught, p:
            model(torch.randn(2, 5))
        assert "ZeroDivisionError" in caught.value.__notes__[0]
        with pytest.raises(ZeroDivisionError), p:
            model(torch.randn(2, 4))
        p.stop_after("0")
        p.log(board, stats, layers="0")
        with pytest.raises(ZeroDivisionError), p:
            model(torch.randn(2, 4))
    assert not hooked(model)
    assert "0/output/mean" in read(tmp_path).Tags()["scalars"]  # the other log's step is ended all the same


def test_no_hook_waits_for_a_device(tmp_path: Path) -> None:
    """Inside hooks and at the end of a step nothing is read back: checked with tensors that refuse to be."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "local_scalar_dense" not in str(func), "a hook read a number back"
            return func(*args, **(kwargs or {}))

    model = zoo.ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, probe.dead_units, probe.feature_maps())
        with NoReading():
            train(model, optimizer, [torch.randn(2, 3, 8, 8)])


def test_a_probe_on_an_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """It traces the schedule, and nothing else."""
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with Probe(optimizer) as p:
        assert repr(p) == "<Probe of SGD: schedule, attached>"
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
            scheduler.step()
    np.testing.assert_allclose(p.schedule.lr[:, 0], [0.1, 0.05, 0.025])
    assert p.steps == 3
    assert list(p) == []
    assert p.report() == []
    assert str(p) == str(p.schedule)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(AttributeError, match="optimizer=optimizer"):
        _ = Probe(model).schedule
    with pytest.raises(TypeError, match="optimizer="):
        Probe(model, optimizer="adam")
    assert ParameterKind.VALUE.label == "value"


@pytest.mark.parametrize("how", ["positional", "keyword", "LBFGS"])
def test_a_step_with_a_closure(tmp_path: Path, model: nn.Module, how: str) -> None:
    """Gradients come to be inside the step: those logged are the first evaluation's, which the update starts from."""
    twin, x = copy.deepcopy(model), torch.randn(5, 4)
    twin(x).square().mean().backward()
    kind = torch.optim.LBFGS if how == "LBFGS" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    before = twin[0].weight.detach().clone()
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats)
        loss = optimizer.step(closure=closure) if how == "keyword" else optimizer.step(closure)
        assert p.steps == 1
        assert len(p.schedule.lr) == 1
    torch.testing.assert_close(loss, twin(x).square().mean())
    assert scalars(tmp_path, "0.weight/grad/norm") == {0: pytest.approx(float(twin[0].weight.grad.norm()), rel=1e-5)}
    assert scalars(tmp_path, "0.weight/value/norm") == {0: pytest.approx(float(before.norm()), rel=1e-5)}
    update = model[0].weight.detach() - before
    assert scalars(tmp_path, "0.weight/update/norm")[0] == pytest.approx(float(update.norm()), rel=1e-4)


def test_a_step_that_calls_its_parents_is_one_step(tmp_path: Path, model: nn.Module) -> None:
    """torch calls hooks around ``super().step()`` as well, once an optimizer of the parent's class was made."""

    class Careful(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD(model.parameters())
    before = model[0].weight.detach().clone()
    optimizer = Careful(model.parameters(), lr=0.1)
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats)
        for _ in range(2):
            train(model, optimizer, [torch.ones(3, 4)])
        assert (p.steps, len(p.schedule.lr)) == (2, 2)
    assert scalars(tmp_path, "0.weight/value/norm")[0] == pytest.approx(float(before.norm()), rel=1e-5)
    assert sorted(scalars(tmp_path, "0.weight/update/norm")) == [0, 1]


def test_of_torchs_own_optimizers_no_step_calls_another(model: nn.Module) -> None:
    """So at their steps nobody looks through the frames, though torch wraps anew what a class has from its parent."""
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            with suppress(ValueError, TypeError):  # Muon takes matrices alone
                kind(model.parameters())
            assert not _calls_super(kind), kind


def test_a_resumed_training_goes_on_counting(
    tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """``p.steps = n`` before or inside the block; the schedule of ``every`` follows."""
    with Board(str(tmp_path)) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats, every=2)
        p.steps = 7
        assert not hooked(model)
        for _ in range(3):
            train(model, optimizer, [torch.randn(2, 4)])
        assert p.steps == 10
        with pytest.raises(ValueError, match="steps=-1"):
            p.steps = -1
    assert list(scalars(tmp_path, "0/output/mean")) == [8]
    assert list(scalars(tmp_path, "0.weight/update/mean")) == [8]
