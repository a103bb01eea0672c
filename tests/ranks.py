"""What two ranks must do together: ``torchrun --nproc-per-node 2 -m tests.ranks FOLDER`` runs every check below.

`tests.test_ranks` starts it once, because each process imports torch, and has one test a check: those are the functions
whose names begin with ``check_``. Each gets a process group of its own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from probe import (
    Board,
    Capture,
    Image,
    Kind,
    ParameterKind,
    Probe,
    Scalar,
    Statistics,
    health,
    histogram,
    sketch,
    stats,
)
from probe.hooks import ours
from probe.sketch import Sketch

SECONDS = 60  # the time-out of the process group of a check


class Kept:
    """A writer that keeps what it is given: ``kept[run][step][tag]``, numbers and sketches in full precision."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[int, dict[str, Any]]] = {}

    def add_scalar(self) -> None:
        """What tells a writer."""

    def submit(self, step: int, work: Callable[[], Any], run: str = "") -> None:
        kept = self.runs.setdefault(run, {}).setdefault(step, {})
        for item in work():
            values = {item.tag: float(item.value) if isinstance(item, Scalar) else item.value}
            if isinstance(item, Statistics):
                values = {f"{item.tag}/{name}": item.value.numbers([name])[0] for name in item.names}
            assert not kept.keys() & values.keys()
            kept |= values

    def __getitem__(self, tag: str) -> Any:
        """What the training run's first step has for a tag."""
        return self.runs[""][0][tag]


def whole(local: Any) -> torch.Tensor:
    """The tensors of all ranks, one behind the other."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, local)
    return torch.cat(parts)


def same(merged: Sketch, tensor: torch.Tensor) -> None:
    """A merged sketch is that of the tensor: counts exactly, moments to 1e-6."""
    expected = sketch.of(tensor)
    assert torch.equal(merged.row[sketch.HEAD :], expected.row[sketch.HEAD :])
    for name in ("count", "zeros", "nan", "posinf", "neginf", "min", "max"):
        assert getattr(merged, name) == pytest.approx(getattr(expected, name), rel=0, nan_ok=True), name
    for name in ("mean", "std", "norm"):
        assert getattr(merged, name) == pytest.approx(getattr(expected, name), rel=1e-6, abs=1e-9), name


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


def batches(rows: int = 6) -> torch.Tensor:
    """The batch of both ranks together."""
    return torch.randn(2 * rows, 4, generator=torch.Generator().manual_seed(7))


def mine(batch: torch.Tensor) -> torch.Tensor:
    """This rank's half."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def step(model: nn.Module, optimizer: Any, *micro: torch.Tensor) -> None:
    optimizer.zero_grad()
    for x in micro:
        (model(x).square().mean() / len(micro)).backward()
    optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@contextlib.contextmanager
def counted(names: tuple[str, ...] = ("all_reduce", "all_gather", "reduce", "broadcast", "barrier")) -> Iterator[Any]:
    """How often each Python function of a collective is called."""
    counts = dict.fromkeys(names, 0)

    def count(name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(dist, name, functools.partial(count, name, getattr(dist, name)))
        yield counts


def hooked(model: nn.Module) -> bool:
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return any(map(ours, hooks))


# -- DistributedDataParallel -------------------------------------------------------------------------------------------


def check_sketches_are_those_of_the_whole_batch(folder: Path) -> None:
    """Outputs and their gradients on every layer, micro-batches included; and near what one process computes."""
    model, x = DistributedDataParallel(net()), batches()
    optimizer, kept, outputs, gradients = sgd(model), Kept(), {}, {}

    def keep(c: Capture) -> None:
        into = outputs if c.kind is Kind.OUTPUT else gradients
        into.setdefault(c.name, []).append(c.value)

    with Probe(model, optimizer=optimizer, observers=keep, kinds=Kind.OUTPUT | Kind.GRAD_OUTPUT) as p:
        assert list(p) == ["0", "1", "2"]
        p.log(kept, stats, histogram)
        with model.no_sync():
            (model(mine(x)[:2]).square().mean() / 2).backward()
        (model(mine(x)[2:]).square().mean() / 2).backward()
        optimizer.step()
    for name in p:
        output, gradient = whole(torch.cat(outputs[name])), whole(torch.cat(gradients[name]))
        if dist.get_rank() == 0:
            same(kept[f"{name}/output/histogram"], output)
            same(kept[f"{name}/grad_output/histogram"], gradient)
            assert kept[f"{name}/output/std"] == pytest.approx(float(output.std(correction=0)), rel=1e-6)
            torch.testing.assert_close(output.sort(0).values, _in_one_process(x, name).sort(0).values)
    assert (kept.runs == {}) == (dist.get_rank() > 0)


def _in_one_process(x: torch.Tensor, name: str) -> torch.Tensor:
    model = net()
    with Probe(model) as p:
        model(x)
    return p[name].output


def check_one_all_reduce_a_logged_step(folder: Path) -> None:
    """And no other collective, whatever is logged; none on other steps."""

    def mine_too(c: Capture) -> Iterator[Any]:
        yield Scalar("largest", c.value.max())
        yield Scalar("seven", 7)

    model = DistributedDataParallel(net())
    optimizer, kept = sgd(model), Kept()
    with Probe(model, optimizer=optimizer) as p, counted() as counts:
        p.log(kept, stats, histogram, mine_too, every=2)
        for number in range(1, 5):
            step(model, optimizer, mine(batches()))
            assert counts == {**dict.fromkeys(counts, 0), "all_reduce": (number + 1) // 2}
    if dist.get_rank() == 0:
        assert list(kept.runs[""]) == [0, 2]
        assert kept["1/output/seven"] == 7


def check_numbers_are_averaged(folder: Path) -> None:
    """A summary's own numbers are the mean over ranks and micro-batches; NaN and Inf are not lost."""
    rank = dist.get_rank()

    def numbers(c: Capture) -> Iterator[Any]:
        yield Scalar("sum", c.value.sum())
        yield Scalar("rank", rank)
        yield Scalar("nan", torch.tensor(float("nan") if rank else 1.0))
        yield Scalar("inf", float("inf"))

    model, kept = net(), Kept()
    with Probe(model, "0", kinds=Kind.OUTPUT) as p:
        p.log(kept, numbers)
        for part in mine(batches()).chunk(2):
            model(part)
    total = whole(model[0](mine(batches())).detach()).sum()
    if rank == 0:
        assert kept["0/output/sum"] == pytest.approx(float(total) / 4, rel=1e-6)
        assert kept["0/output/rank"] == 0.5
        assert math.isnan(kept["0/output/nan"])
        assert kept["0/output/inf"] == math.inf


def check_ddp_gradients_are_the_averaged_ones(folder: Path) -> None:
    """F12.2: hooks on parameters see this rank's gradient; what is logged is the average, counted once, and norms."""
    model, x, kept, local = DistributedDataParallel(net()), batches(), Kept(), []
    twin = net()
    optimizer, other = sgd(model), sgd(twin)
    handle = next(model.parameters()).register_hook(lambda g: local.append(g.clone()))
    with Probe(model, optimizer=optimizer) as p:
        p.log(kept, stats, histogram)
        model(mine(x)).square().mean().backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.05))
        optimizer.step()
    handle.remove()
    twin(x).square().mean().backward()
    average = twin[0].weight.grad.clone()
    nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
    before = twin[0].weight.detach().clone()
    other.step()
    assert not torch.allclose(local[0], average)
    if dist.get_rank() == 0:
        same(kept["0.weight/grad/histogram"], model.module[0].weight.grad)
        assert kept["0.weight/grad/norm"] == pytest.approx(float(twin[0].weight.grad.norm()), rel=1e-5)
        assert kept["0.weight/value/histogram"].count == 20
        assert kept["grad_norm/before_clipping"] == pytest.approx(norm, rel=1e-6)
        assert kept["grad_norm/after_clipping"] == pytest.approx(0.05, rel=1e-3)
        update = twin[0].weight.detach() - before
        assert kept["0.weight/update/ratio"] == pytest.approx(float(update.norm() / before.norm()), rel=1e-4)
        assert kept["lr/group0"] == 0.1


def check_ddp_training_is_bit_identical(folder: Path) -> None:
    """With all hooks, logging on every second step, against the same without a probe."""
    model, twin = (DistributedDataParallel(net()) for _ in range(2))
    optimizer, other = sgd(model), sgd(twin)
    with Probe(model, optimizer=optimizer, kinds=Kind.all(), keep=1) as p:
        p.log(Kept(), stats, histogram, every=2)
        for _ in range(4):
            step(model, optimizer, mine(batches()))
    for _ in range(4):
        step(twin, other, mine(batches()))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert not hooked(model)


def check_modes_are_merged_apart(folder: Path) -> None:
    """Passes under a tag, into a board: one event file a run, from rank 0, with the numbers of both ranks."""
    from tests.reading import scalars

    model = DistributedDataParallel(net())
    optimizer = sgd(model)
    with Board(folder / "runs") as board, Probe(model, optimizer=optimizer, kinds=Kind.OUTPUT) as p:
        p.log(board, stats)
        step(model, optimizer, mine(batches()))
        with torch.no_grad(), p.tag("valid"):
            model(mine(batches(3)))
    truth = whole(model.module[0](mine(batches(3))).detach())
    dist.barrier()
    assert len(list((folder / "runs").glob("*.tfevents.*"))) == 1
    assert len(list((folder / "runs" / "valid").glob("*.tfevents.*"))) == 1
    ((number, mean),) = scalars(folder / "runs" / "valid", "0/output/mean")
    assert (number, mean) == (1, pytest.approx(float(truth.mean()), rel=1e-5))
    assert [number for number, _ in scalars(folder / "runs", "0/output/mean")] == [0]


def check_a_run_for_each_rank(folder: Path) -> None:
    """``per_rank=True`` merges nothing; each rank's numbers are its own, in sub-runs of one folder."""
    from tests.reading import scalars

    model, rank = DistributedDataParallel(net()), dist.get_rank()
    optimizer = sgd(model)
    with Board(folder / "runs") as board, Probe(model, optimizer=optimizer) as p, counted() as counts:
        p.log(board, stats, per_rank=True)
        own = model.module[0](mine(batches())).detach()
        step(model, optimizer, mine(batches()))
        with torch.no_grad(), p.tag("valid"):
            model(mine(batches()))
    assert not any(counts.values())
    assert scalars(folder / "runs" / f"rank{rank}", "0/output/mean") == [
        (0, pytest.approx(float(own.mean()), rel=1e-5))
    ]
    assert scalars(folder / "runs" / f"rank{rank}" / "valid", "0/output/mean")
    assert scalars(folder / "runs" / f"rank{rank}", "grad_norm/after_clipping")


def check_only_the_first_rank_needs_a_writer(folder: Path) -> None:
    """On the others it may be None, unless each writes its own; a log that merges nothing may be on one rank only."""
    rank, kept, model = dist.get_rank(), Kept(), net()

    def picture(c: Capture) -> Iterator[Any]:
        yield Image("picture", torch.zeros(3, 4, 5))

    with Probe(model, "0") as p:
        if rank == 0:
            p.log(kept, stats)
            p.log(kept, picture)
        else:
            p.log(None, stats)
            with pytest.raises(TypeError, match="writes to a Board"):
                p.log(None, stats, per_rank=True)
        model(mine(batches()))
    if rank == 0:
        assert kept["0/output/picture"].shape == (3, 4, 5)
        truth = model[0](batches()).detach()
        assert kept["0/output/mean"] == pytest.approx(float(truth.mean()), rel=1e-5)


# -- sharded models ----------------------------------------------------------------------------------------------------


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for child in model:
        if list(child.parameters()):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def meshes(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def check_fsdp_values_and_norms(folder: Path) -> None:
    """F12.3: activations and gradients are right; parameters and norms are those of the whole, unevenly sharded too."""
    for shape in ((2,), (2, 1)):  # the second is one of replicas: each parameter is on both ranks as a whole shard
        model, twin, x, kept = shard(net(), meshes(*shape)), net(), batches(), Kept()
        optimizer, other = sgd(model), sgd(twin)
        with Probe(model, "", nn.Linear, nn.ReLU, optimizer=optimizer, keep=1) as p:
            p.log(kept, stats, histogram)
            step(model, optimizer, mine(x))
        assert "FSDP" not in str(p)
        before = [each.detach().clone() for each in twin.parameters()]
        with Probe(twin) as q:
            step(twin, other, x)
        if dist.get_rank() == 0:
            assert kept["Sequential/output/mean"] == kept["2/output/mean"]
        for name in q:
            assert type(p[name].output) is torch.Tensor
            torch.testing.assert_close(whole(p[name].output), q[name].output)
            torch.testing.assert_close(whole(p[name].grad_output) / 2, q[name].grad_output)
        torch.testing.assert_close(whole(p["2"].grad_input) / 2, q["2"].grad_input)
        if dist.get_rank() == 0:
            for (name, parameter), old in zip(twin.named_parameters(), before, strict=True):
                same(kept[f"{name}/value/histogram"], old)
                assert kept[f"{name}/grad/norm"] == pytest.approx(float(parameter.grad.norm()), rel=1e-5)
                assert kept[f"{name}/grad/histogram"].count == parameter.numel()
                update = parameter.detach() - old
                assert kept[f"{name}/update/norm"] == pytest.approx(float(update.norm()), rel=1e-5)
                ratio = float(update.norm() / old.norm())
                assert kept[f"{name}/update/ratio"] == pytest.approx(ratio, rel=1e-5)
            norm = float(torch.stack([each.grad.norm() for each in twin.parameters()]).norm())
            assert kept["grad_norm/before_clipping"] == pytest.approx(norm, rel=1e-5)
            assert kept["grad_norm/after_clipping"] == pytest.approx(norm, rel=1e-5)


def check_fsdp_training_is_bit_identical(folder: Path) -> None:
    """All hooks, all logs; what is FSDP's own in the same hook dictionaries stays, and training goes on."""
    mesh = meshes(2)
    model, twin = shard(net(), mesh), shard(net(), mesh)
    optimizer, other = sgd(model), sgd(twin)
    counts = [len(each._forward_hooks) for each in model.modules()]
    with Probe(model, optimizer=optimizer, kinds=Kind.all(), keep=1) as p:
        p.log(Kept(), stats, histogram, every=2)
        for _ in range(4):
            step(model, optimizer, mine(batches()))
    assert [len(each._forward_hooks) for each in model.modules()] == counts
    step(model, optimizer, mine(batches()))
    for _ in range(5):
        step(twin, other, mine(batches()))
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.to_local(), two.to_local())
    assert not hooked(model)


def check_a_weight_as_output_under_fsdp(folder: Path) -> None:
    """What a module returns of its own weight is kept as it was, though FSDP frees the memory of it afterwards."""
    from torch.distributed.fsdp import fully_shard

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(12.0).view(4, 3))

        def forward(self) -> torch.Tensor:
            return self.weight[1:]

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Table()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.table().T

    model = nn.Sequential(Uses(), nn.Tanh())
    fully_shard(model[0])
    fully_shard(model)
    with Probe(model, keep=2) as p:
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
    assert torch.equal(p["0.table"].output, torch.arange(12.0).view(4, 3)[1:])
    assert torch.equal(p.passes[0]["0.table"].output, torch.arange(12.0).view(4, 3)[1:])


def check_tensor_parallel(folder: Path) -> None:
    """Records are plain local tensors; sharded activations and weights count as the whole, replicas once."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model, kept, x = copy.deepcopy(twin), Kept(), batches()
    plan = {
        "0": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        "2": RowwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate(), use_local_output=False),
    }
    parallelize_module(model, meshes(2), plan)
    optimizer, other = sgd(model), sgd(twin)
    seen: list[Any] = []
    handle = model[2].register_forward_hook(lambda m, args, out: seen.append(out.placements))
    with Probe(model, optimizer=optimizer, keep=1, kinds=Kind.all()) as p:
        p.log(kept, stats, histogram)
        optimizer.zero_grad()
        model(x).full_tensor().square().mean().backward()
        optimizer.step()
    handle.remove()
    with Probe(twin) as q:
        step(twin, other, x)
    rank = dist.get_rank()
    for name in ("0", "1"):
        for field in ("output", "grad_output"):
            own = getattr(p[name], field)
            assert type(own) is torch.Tensor
            torch.testing.assert_close(own, getattr(q[name], field).chunk(2, -1)[rank])
    torch.testing.assert_close(p["2"].output, q["2"].output)
    if rank == 0:
        for name, field in (("0", "output"), ("1", "output"), ("2", "output"), ("1", "grad_output"), ("2", "input")):
            merged, truth = kept[f"{name}/{field}/histogram"], getattr(q[name], field)
            assert merged.count == truth.numel(), (name, field)
            assert merged.norm == pytest.approx(float(truth.norm()), rel=1e-5)
        for name, parameter in twin.named_parameters():
            assert kept[f"{name}/grad/histogram"].count == parameter.numel()
            assert kept[f"{name}/grad/norm"] == pytest.approx(float(parameter.grad.norm()), rel=1e-5)
        norm = float(torch.stack([each.grad.norm() for each in twin.parameters()]).norm())
        assert kept["grad_norm/after_clipping"] == pytest.approx(norm, rel=1e-5)
    assert Partial() not in seen[0]


def check_partial_sums_are_summed_first(folder: Path) -> None:
    """A DTensor whose shards are addends counts by their sum, in each call; a record, or a rank's run, has its own."""
    rank, kept, own, model = dist.get_rank(), Kept(), Kept(), partial_sums()
    with Probe(model, keep=1) as p, counted() as counts:
        p.log(kept, stats, histogram)
        p.log(own, stats, per_rank=True)
        model(torch.ones(3))
        model(torch.full((2,), 5.0))
        assert not any(counts.values())
    assert torch.equal(p["0"].output, torch.full((2,), 5.0 + 5.0 * rank))
    assert own.runs[f"rank{rank}"][0]["0/output/max"] == 5.0 + 5.0 * rank
    if rank == 0:
        same(kept["0/output/histogram"], torch.tensor([3.0, 3.0, 3.0, 15.0, 15.0]))


def partial_sums() -> nn.Module:
    """What it returns are addends, twice as large on the second rank."""
    from torch.distributed.tensor import DTensor, Partial

    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return DTensor.from_local(x * (1 + dist.get_rank()), mesh, [Partial()], run_check=False)

    mesh = meshes(2)
    return nn.Sequential(Half())


def check_partial_gradients_are_summed(folder: Path) -> None:
    """As sequence parallelism leaves them on replicated parameters: their statistics and norms are the optimizer's."""
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    torch.manual_seed(0)
    twin, x = nn.Sequential(nn.LayerNorm(4)), batches().view(2, 6, 4)
    model, kept = copy.deepcopy(twin), Kept()
    parallelize_module(model, meshes(2), {"0": SequenceParallel(use_local_output=False)})
    optimizer = sgd(model)
    with Probe(model, optimizer=optimizer) as p:
        p.log(kept, stats, histogram)
        model(x.chunk(2, 1)[dist.get_rank()]).full_tensor().square().mean().backward()
        assert model[0].weight.grad.placements == (Partial(),)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    twin(x).square().mean().backward()
    norm = float(torch.stack([each.grad.norm() for each in twin.parameters()]).norm())
    if dist.get_rank() == 0:
        for name, parameter in twin.named_parameters():
            assert kept[f"{name}/grad/histogram"].count == parameter.numel()
            assert kept[f"{name}/grad/norm"] == pytest.approx(float(parameter.grad.norm()), rel=1e-5)
        assert kept["grad_norm/before_clipping"] == pytest.approx(norm, rel=1e-5)
        assert kept["grad_norm/after_clipping"] == pytest.approx(norm, rel=1e-5)


def check_health_of_sharded_parameters(folder: Path) -> None:
    """Each rank judges its own shards and batch; the first one's findings are written, by it alone."""
    from tests.reading import scalars

    model = shard(net(), meshes(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    with Board(folder / "runs") as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, *health.checks())
        for _ in range(4):
            step(model, optimizer, mine(batches()))
    assert p.findings
    dist.barrier()
    assert len(list((folder / "runs").glob("*.tfevents.*"))) == 1
    assert scalars(folder / "runs", "health/findings")


def check_the_older_fsdp_is_refused(folder: Path) -> None:
    """Its shards are plain tensors; activations can be logged, and each rank by itself."""
    model = net()
    for parameter in model.parameters():
        parameter._fsdp_flattened = True  # what it sets; it needs a GPU
    with Probe(model, optimizer=sgd(model)) as p:
        with pytest.raises(TypeError, match="fully_shard"):
            p.log(Kept(), stats)
        p.log(Kept(), stats, kinds=Kind.OUTPUT)
        p.log(Kept(), stats, per_rank=True)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def log_a_step(model: nn.Module, log: Callable[[Probe], Any]) -> None:
    """A training step with a probe, which may end in an error, but soon and with nothing left on the model."""
    optimizer, began = sgd(model), time.monotonic()
    try:
        with Probe(model, optimizer=optimizer) as p:
            log(p)
            step(model, optimizer, mine(batches()))
    finally:
        assert time.monotonic() - began < SECONDS / 4
        assert not hooked(model)


def fails(model: nn.Module, log: Callable[[Probe], Any], text: str) -> None:
    """On both ranks, with this in the message."""
    with pytest.raises(RuntimeError, match=text):
        log_a_step(model, log)


def check_other_layers_are_an_error_on_all_ranks(folder: Path) -> None:
    layers = "0" if dist.get_rank() == 0 else ["0", "1"]
    text = r"at the end of step 0; only rank 1 has train: 1/grad_output \(mean, std.*train: 1/output \(.*per_rank=True"
    fails(DistributedDataParallel(net()), lambda p: p.log(Kept(), stats, layers=layers), text)


def check_partial_sums_on_one_rank_only_are_an_error_on_all(folder: Path) -> None:
    """No rank waits in a collective that the other never enters; with a run for each rank it is no error."""
    model, kept = partial_sums(), Kept()
    for how in ({}, {"per_rank": True}):
        began = time.monotonic()
        expected = contextlib.nullcontext() if how else pytest.raises(RuntimeError, match=r"only rank 0 has .*0/output")
        with expected, Probe(nn.ModuleList([model, net()]), kinds=Kind.OUTPUT) as p:
            p.log(kept, stats, layers="0.0" if dist.get_rank() == 0 else "1.0", **how)
            model(torch.ones(3))
            p.step()
        assert time.monotonic() - began < SECONDS / 4


def check_a_rank_that_gathers_nothing_is_an_error_on_all_ranks(folder: Path) -> None:
    """In a step, or in what is open when the block ends, with and without an optimizer; soon."""
    first = dist.get_rank() == 0

    def run(x: torch.Tensor, *, ends: bool, optimizer: Any = None) -> None:
        with Probe(model, optimizer=optimizer) as p:
            p.log(Kept(), stats)
            (model if first else twin)(x).sum().backward()
            if optimizer is not None:
                optimizer.step()
            elif ends:
                p.step()

    model, twin = net(), net()
    began = time.monotonic()
    for how in ({"ends": True}, {"ends": False}, {"ends": True, "optimizer": sgd(model)}):
        with pytest.raises(RuntimeError, match=r"at the end of step 0; only rank 0 has .*train: 0/grad_output"):
            run(batches(), **how)
    assert time.monotonic() - began < SECONDS / 4


def check_ranks_that_gather_nothing_may_leave_at_other_steps(folder: Path) -> None:
    """Nothing was logged in the open steps: nothing is missed. Then they log together again."""
    model, kept = net(), Kept()
    with Probe(model) as p:
        p.log(Kept(), stats, every=3)
        for _ in range(2 + dist.get_rank()):  # the second rank leaves in a step that is observed
            p.step()
    with Probe(model, kinds=Kind.OUTPUT) as p:
        p.log(kept, stats)
        model(mine(batches()))
    assert bool(kept.runs) == (dist.get_rank() == 0)


def check_a_rank_that_raises_before_it_logs_is_an_error_on_all_ranks(folder: Path) -> None:
    """Also where the others have nothing to merge any more, with two logs; afterwards all go on."""
    model, kept = net(), Kept()

    def run() -> None:
        with Probe(model) as p:
            p.log(Kept(), stats)
            p.log(Kept(), histogram)
            if dist.get_rank() == 1:
                raise ZeroDivisionError("mine")

    for _ in range(2):
        with pytest.raises((RuntimeError, ZeroDivisionError), match="mine"):
            run()
    log_a_step(model, lambda p: p.log(kept, stats))
    assert bool(kept.runs) == (dist.get_rank() == 0)


def check_a_rank_that_raises_at_the_very_end_is_an_error_on_all_ranks(folder: Path) -> None:
    """A summary of parameters, which are shown when the block is left, in the second of three logs."""

    def broken(c: Capture) -> Iterator[Any]:
        if dist.get_rank() == 1:
            raise ZeroDivisionError("mine")
        yield Scalar("norm", c.value.norm())

    model, began = net(), time.monotonic()

    def run() -> None:
        with Probe(model) as p:
            p.log(Kept(), stats, kinds=Kind.OUTPUT)
            p.log(Kept(), broken, kinds=[ParameterKind.VALUE, Kind.OUTPUT], layers="0")
            p.log(Kept(), broken, kinds=[ParameterKind.VALUE])
            model[1](torch.ones(3))

    with pytest.raises((RuntimeError, ZeroDivisionError), match="mine"):
        run()
    assert time.monotonic() - began < SECONDS / 4


def warned_of(model: nn.Module, kept: Kept, fragile: Callable[[Capture], Any], steps: int) -> list[str]:
    """The warnings that name the summary `fragile`, of some logged steps that go on without it."""
    with Probe(model, kinds=Kind.OUTPUT) as p, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        p.log(kept, stats, fragile, on_error="warn")
        for _ in range(steps):
            model(mine(batches()))
            p.step()
    return [text for each in told if "fragile" in (text := str(each.message))]


def check_a_summary_dropped_on_one_rank_is_dropped_on_all(folder: Path) -> None:
    """``on_error="warn"`` goes on: the step of the error is not logged, and those after it without the summary."""
    rank, model, kept = dist.get_rank(), net(), Kept()

    def fragile(c: Capture) -> Iterator[Any]:
        if rank == 1 and c.step == 1 and c.name == "2":
            raise ZeroDivisionError("mine")
        yield Scalar("number", 7)

    texts = warned_of(model, kept, fragile, steps=4)
    assert len(texts) == 1 + rank
    assert re.search(r"step 1 is not logged: .*on rank 1 raised ZeroDiv.*'2', output; it is not asked again", texts[-1])
    if rank == 0:
        assert {step: "0/output/number" in tags for step, tags in kept.runs[""].items()} == {
            0: True,
            2: False,
            3: False,
        }
        assert all("2/output/mean" in tags for tags in kept.runs[""].values())


def check_a_summary_dropped_on_all_ranks_costs_no_step(folder: Path) -> None:
    def fragile(c: Capture) -> Iterator[Any]:
        raise ZeroDivisionError("everybody's")

    model, kept = net(), Kept()
    assert len(warned_of(model, kept, fragile, steps=2)) == 1
    assert dist.get_rank() or [*kept.runs[""]] == [0, 1]


def check_other_summaries_are_an_error_on_all_ranks(folder: Path) -> None:
    summaries = (stats,) if dist.get_rank() else (stats, histogram)
    fails(DistributedDataParallel(net()), lambda p: p.log(Kept(), *summaries), "only rank 0 has .*with bins")


def check_other_steps_are_an_error_on_all_ranks(folder: Path) -> None:
    def log(p: Probe) -> None:
        if dist.get_rank() == 0:
            p.step()
        p.log(Kept(), stats)

    text = "rank 0 is at the end of step 1, rank 1 at the end of step 0"
    fails(DistributedDataParallel(net()), log, text)


def check_a_rank_that_raises_is_an_error_on_all_ranks(folder: Path) -> None:
    """Between the backward and the end of the step, when the others are on their way to the collective."""

    def broken(c: Capture) -> Iterator[Any]:
        if dist.get_rank() == 1 and c.kind is ParameterKind.GRAD:
            raise ZeroDivisionError("mine")
        yield Scalar("norm", c.value.norm())

    model = DistributedDataParallel(net())
    with pytest.raises((RuntimeError, ZeroDivisionError)) as caught:
        log_a_step(model, lambda p: (p.log(Kept(), stats, layers="1", kinds=Kind.OUTPUT), p.log(Kept(), broken)))
    if dist.get_rank() == 0:
        assert "rank 1 left its probe with ZeroDivisionError: mine" in str(caught.value)
    else:
        assert caught.type is ZeroDivisionError
    kept = Kept()
    log_a_step(model, lambda p: p.log(kept, stats))  # the ranks can go on together, though two logs were left
    assert bool(kept.runs) == (dist.get_rank() == 0)


def check_a_board_that_closes_before_the_probe_is_left(folder: Path) -> None:
    """The step that is open is merged then; where an exception closes the board, the other ranks are told."""
    first, model = dist.get_rank() == 0, net()

    def run(name: str, *, fails: bool) -> None:
        board = Board(str(folder / name)) if first else contextlib.nullcontext()
        with Probe(model, "0", kinds=Kind.OUTPUT) as p, board as writer:
            p.log(writer, stats)
            model(mine(batches()))
            if fails and first:
                raise ZeroDivisionError("mine")

    run("whole", fails=False)
    dist.barrier()
    (file,) = (folder / "whole").glob("*.tfevents.*")
    assert b"0/output/mean" in file.read_bytes()
    with pytest.raises(ZeroDivisionError if first else RuntimeError, match="mine"):
        run("failed", fails=True)


def check_a_rank_that_does_not_come_is_an_error(folder: Path) -> None:
    """After half of the process group's time-out, and it says who is waited for; the late one is told, too."""
    dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=2))

    def late(p: Probe) -> None:
        p.log(Kept(), stats)
        if dist.get_rank() == 1:
            time.sleep(2)

    text = "rank 1 did not come within 1 s to the end of step 0, where rank 0 waits"
    fails(net(), late, text)


def check_micro_batches_of_other_sizes(folder: Path) -> None:
    """Ranks may have different numbers of rows and of passes."""
    rank, model, kept = dist.get_rank(), net(), Kept()
    with Probe(model, "0") as p:
        p.log(kept, stats, histogram, kinds=Kind.OUTPUT)
        for rows in ((3, 1), (2,))[rank]:
            model(torch.full((rows, 4), float(rank)))
    if rank == 0:
        assert kept["0/output/histogram"].count == 6 * 5


# -- running them ------------------------------------------------------------------------------------------------------

CHECKS = {name: function for name, function in list(globals().items()) if name.startswith("check_")}


def main(folder: Path) -> None:
    """Run every check; each rank leaves a file of its tracebacks, empty texts for those that passed."""
    store, rank, size = next(dist.rendezvous("env://"))
    results = {}
    for name, check in CHECKS.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        prefixed = dist.PrefixStore(name, store)
        dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS))
        torch.manual_seed(0)
        began = time.monotonic()
        try:
            check(own)
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - began:.2f} s", flush=True)
        dist.destroy_process_group()
        (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
