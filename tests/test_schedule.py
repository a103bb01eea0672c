"""`probe.schedule`: traces of optimizers, exact simulation of schedulers, expressions, charts, the shell command."""

from __future__ import annotations

import argparse
import ast
import copy
import csv
import functools
import gc
import io
import math
import random
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR
from torch.utils.tensorboard import SummaryWriter

from probe import schedule
from probe.schedule import Recorder, Trace
from probe.schedule.expression import _lambda, signature
from probe.schedule.log import _Column
from tests.reading import read


def parameters(count: int = 1) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.ones(2)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.zeros(2)
    return made


OPTIMIZERS = {
    "sgd": lambda groups: SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "adam": lambda groups: Adam(groups, lr=0.1),
    "tensor rate": lambda groups: AdamW(groups, lr=torch.tensor(0.1), foreach=False),
}


def two_groups(kind: str = "sgd") -> Optimizer:
    """Two groups with rates 0.1 and 0.02, the first of them named."""
    second = torch.tensor(0.02) if kind == "tensor rate" else 0.02
    return OPTIMIZERS[kind]([{"params": parameters(2), "name": "backbone"}, {"params": parameters(), "lr": second}])


def in_sequence(optimizer: Optimizer, *makers: Any, milestones: list[int]) -> SequentialLR:
    return SequentialLR(optimizer, [make(optimizer) for make in makers], milestones)


def in_chain(optimizer: Optimizer, *makers: Any) -> ChainedScheduler:
    return ChainedScheduler([make(optimizer) for make in makers])


class Halving:
    """A user's own scheduler: no base class, the optimizer under a name of its own, its groups cached."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.target = optimizer
        self.groups = optimizer.param_groups
        self.calls = 0

    def step(self) -> None:
        self.calls += 1
        for group in self.groups:
            group["lr"] = group["lr"] / 2
            group["weight_decay"] = 0.01 * self.calls

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}


SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, [lambda epoch: 0.1 ** (epoch // 4), lambda epoch: 0.95**epoch]),
    "lambda of an object": lambda o: LambdaLR(o, functools.partial(pow, 0.9)),
    "multiplicative": lambda o: MultiplicativeLR(o, lambda epoch: 0.95),
    "multiplicative by epoch": lambda o: MultiplicativeLR(o, [lambda epoch: 1 / (1 + epoch), lambda epoch: 1.1]),
    "step": lambda o: StepLR(o, 3),
    "step half": lambda o: StepLR(o, step_size=5, gamma=0.5),
    "multi step": lambda o: MultiStepLR(o, [2, 3, 9]),
    "multi step repeated": lambda o: MultiStepLR(o, [4, 4, 7], gamma=0.3),
    "constant": lambda o: ConstantLR(o),
    "constant long": lambda o: ConstantLR(o, factor=0.25, total_iters=9),
    "linear": lambda o: LinearLR(o),
    "linear down": lambda o: LinearLR(o, start_factor=1.0, end_factor=0.01, total_iters=12),
    "exponential": lambda o: ExponentialLR(o, 0.95),
    "exponential fast": lambda o: ExponentialLR(o, 0.3),
    "cosine": lambda o: CosineAnnealingLR(o, 5),
    "cosine floor": lambda o: CosineAnnealingLR(o, 7, eta_min=0.01),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, 4),
    "restarts doubled": lambda o: CosineAnnealingWarmRestarts(o, 2, T_mult=2, eta_min=1e-3),
    "polynomial": lambda o: PolynomialLR(o, 8),
    "polynomial squared": lambda o: PolynomialLR(o, 20, power=2.0),
    "one cycle": lambda o: OneCycleLR(o, max_lr=[0.5, 0.2], total_steps=24),
    "one cycle three phases": lambda o: OneCycleLR(
        o, 0.3, epochs=4, steps_per_epoch=6, three_phase=True, anneal_strategy="linear", pct_start=0.4
    ),
    "one cycle without momentum": lambda o: OneCycleLR(o, 0.3, total_steps=30, cycle_momentum=False),
    "cyclic": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=4),
    "cyclic shrinking": lambda o: CyclicLR(o, [0.01, 0.02], 0.1, 3, 5, mode="triangular2", base_momentum=0.5),
    "cyclic range": lambda o: CyclicLR(o, 0.01, 0.1, 5, mode="exp_range", gamma=0.9, cycle_momentum=False),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=2, cooldown=1),
    "plateau max": lambda o: ReduceLROnPlateau(o, "max", factor=0.5, patience=0, min_lr=[0.01, 0.001]),
    "sequential": lambda o: in_sequence(
        o, lambda o: ConstantLR(o, 0.1, total_iters=5), lambda o: ExponentialLR(o, 0.9), milestones=[5]
    ),
    "sequential of three": lambda o: in_sequence(
        o,
        lambda o: LinearLR(o, 0.1, total_iters=4),
        lambda o: CosineAnnealingLR(o, 8),
        lambda o: StepLR(o, 3, 0.5),
        milestones=[4, 12],
    ),
    "chained": lambda o: in_chain(o, lambda o: ConstantLR(o, 0.1, total_iters=6), lambda o: ExponentialLR(o, 0.9)),
    "chained three": lambda o: in_chain(
        o, lambda o: StepLR(o, 5), lambda o: LinearLR(o, 0.5), lambda o: MultiplicativeLR(o, lambda epoch: 0.99)
    ),
    "swa": lambda o: SWALR(o, swa_lr=0.05),
    "swa linear": lambda o: SWALR(o, swa_lr=[0.05, 0.001], anneal_epochs=6, anneal_strategy="linear"),
    "own": Halving,
}
METRICS = [0.5, 0.4, 0.41, 0.42, 0.43, 0.44, 0.3, 0.3, 0.31, 0.32, 0.33, 0.34, 0.2, 0.25, 0.2, 0.3, 0.4, 0.4, 0.1, 0.5]
STEPS = len(METRICS) + 1


def watched(optimizer: Optimizer, **options: Any) -> Recorder:
    recorder = Recorder(optimizer, **options)
    optimizer.register_step_pre_hook(recorder.before_step)
    optimizer.register_step_post_hook(recorder.after_step)
    return recorder


def by_hand(optimizer: Optimizer) -> list[tuple[float, float, float]]:
    """Rate, momentum, weight decay of each group, read off the groups."""
    return [
        (float(group["lr"]), group["betas"][0] if "betas" in group else group["momentum"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


def train(optimizer: Optimizer, scheduler: Any, steps: int, metrics: list[float]) -> tuple[Trace, np.ndarray]:
    """Really step both; the recorder's trace, and what the groups said `[updates, groups, 3]`."""
    recorder, groups = watched(optimizer), []
    for update in range(steps):
        groups.append(by_hand(optimizer))
        optimizer.step()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(metrics[update] if update < len(metrics) else 0.0)
        else:
            scheduler.step()
    return recorder.trace(), np.array(groups)


def check_simulation(optimizer: Optimizer, scheduler: Any, steps: int, metrics: list[float]) -> None:
    """Simulation == live trace == the groups read by hand, and simulating changed nothing."""
    states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    attributes, groups = dict(vars(optimizer)), [dict(group) for group in optimizer.param_groups]
    generators = torch.get_rng_state(), random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulated = schedule.simulate(scheduler, steps, metrics)
    assert str(states) == str((optimizer.state_dict(), scheduler.state_dict()))
    assert all(value is vars(optimizer)[key] for key, value in attributes.items())
    assert all(
        value is now[key] for was, now in zip(groups, optimizer.param_groups, strict=True) for key, value in was.items()
    )
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]

    live, by_groups = train(optimizer, scheduler, steps, metrics)
    np.testing.assert_array_equal(live.lr, by_groups[:, :, 0])
    np.testing.assert_array_equal(live.momentum, by_groups[:, :, 1])
    np.testing.assert_array_equal(live.weight_decay, by_groups[:, :, 2])
    assert live.values.keys() == simulated.values.keys()
    for key, values in live.values.items():
        np.testing.assert_array_equal(simulated[key], values, err_msg=key)
    assert simulated.lr.dtype == np.float64
    assert simulated.names == live.names
    assert simulated.events == live.events


# --- simulation ---------------------------------------------------------------------------------------------------


def test_the_table_holds_every_scheduler_of_torch_twice() -> None:
    """A scheduler that a later torch brings shall not go untested."""
    made = [type(make(two_groups())).__name__ for make in SCHEDULERS.values()]
    known = {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}
    assert {name for name in known if made.count(name) < 2} == set()
    assert len(known) >= 16


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_simulation_equals_the_live_trace_and_the_groups(name: str, kind: str) -> None:
    optimizer = two_groups(kind)
    check_simulation(optimizer, SCHEDULERS[name](optimizer), STEPS, METRICS)


factors = st.floats(0.05, 1.0)
counts = st.integers(1, 12)
SIMPLE = st.one_of(
    st.builds(lambda n, g: functools.partial(StepLR, step_size=n, gamma=g), counts, factors),
    st.builds(lambda m, g: functools.partial(MultiStepLR, milestones=m, gamma=g), st.lists(counts), factors),
    st.builds(lambda f, n: functools.partial(ConstantLR, factor=f, total_iters=n), factors, counts),
    st.builds(
        lambda a, b, n: functools.partial(LinearLR, start_factor=a, end_factor=b, total_iters=n),
        factors,
        factors,
        counts,
    ),
    st.builds(lambda g: functools.partial(ExponentialLR, gamma=g), factors),
    st.builds(lambda n, e: functools.partial(CosineAnnealingLR, T_max=n, eta_min=e), counts, st.floats(0, 0.05)),
    st.builds(lambda n, p: functools.partial(PolynomialLR, total_iters=n, power=p), counts, st.floats(0.5, 3)),
    st.builds(lambda f: functools.partial(LambdaLR, lr_lambda=lambda epoch: f**epoch), factors),
    st.builds(lambda f: functools.partial(MultiplicativeLR, lr_lambda=lambda epoch: f), factors),
)
ANY = st.one_of(
    SIMPLE,
    st.builds(lambda n, m: functools.partial(CosineAnnealingWarmRestarts, T_0=n, T_mult=m), counts, st.integers(1, 3)),
    st.builds(
        lambda top, three, momentum, pct, strategy: functools.partial(
            OneCycleLR, max_lr=top, total_steps=60, three_phase=three, cycle_momentum=momentum, pct_start=pct,
            anneal_strategy=strategy,
        ),
        factors, st.booleans(), st.booleans(), st.floats(0.1, 0.4), st.sampled_from(["cos", "linear"]),
    ),
    st.builds(
        lambda low, up, down, mode, momentum: functools.partial(
            CyclicLR, base_lr=low, max_lr=1.0, step_size_up=up, step_size_down=down, mode=mode, gamma=0.9,
            cycle_momentum=momentum,
        ),
        factors, counts, counts, st.sampled_from(["triangular", "triangular2", "exp_range"]), st.booleans(),
    ),
    st.builds(
        lambda mode, factor, patience, cooldown: functools.partial(
            ReduceLROnPlateau, mode=mode, factor=factor, patience=patience, cooldown=cooldown
        ),
        st.sampled_from(["min", "max"]), st.floats(0.05, 0.9), st.integers(0, 4), st.integers(0, 4),
    ),
    st.builds(lambda rate, n: functools.partial(SWALR, swa_lr=rate, anneal_epochs=n), factors, st.integers(0, 12)),
    st.builds(
        lambda first, second, at: functools.partial(
            lambda o, a, b, m: in_sequence(o, a, b, milestones=[m]), a=first, b=second, m=at
        ),
        SIMPLE, SIMPLE, counts,
    ),
    st.builds(
        lambda first, second: functools.partial(lambda o, a, b: in_chain(o, a, b), a=first, b=second), SIMPLE, SIMPLE
    ),
)  # fmt: skip


@settings(deadline=None, max_examples=120)
@given(
    make=ANY,
    kind=st.sampled_from(list(OPTIMIZERS)),
    rates=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=3),
    before=st.integers(0, 8),
    steps=st.integers(1, 25),
    metrics=st.lists(st.floats(0, 1), min_size=40, max_size=40),
)
def test_any_schedule_simulates_exactly_from_any_point_on(make, kind, rates, before, steps, metrics) -> None:
    """Simulation == live trace == groups by hand for drawn schedules, optimizers, groups and starting points."""
    groups = [{"params": parameters(), "lr": torch.tensor(rate) if kind == "tensor rate" else rate} for rate in rates]
    optimizer = OPTIMIZERS[kind](groups)
    scheduler = make(optimizer)
    for update in range(before):
        optimizer.step()
        scheduler.step(*([metrics[update]] if isinstance(scheduler, ReduceLROnPlateau) else []))
    check_simulation(optimizer, scheduler, steps, metrics[before:])


SEED_LOSSES = [0.5] * 5 + [0.4] * 195


def plateau_closed_form(epoch: int) -> float:
    """Loss 0.5, from epoch 5 on 0.4. Patience 10 runs out in the 11th bad epoch; then 10 epochs do not count."""
    # Best at epoch 5; bad from 6 on; the 11th bad one is epoch 16, so update 17 has the new rate. After that: cooldown
    # 17 to 26, bad from 27 on, the 11th is epoch 37; and so on, every 21 epochs, down to min_lr.
    return max(0.1 * 0.1 ** max(0, (epoch - 17) // 21 + 1), 1e-4)


@pytest.mark.parametrize(
    ("make", "closed_form"),
    [
        (lambda o: StepLR(o, 50), lambda epoch: 0.1 * 0.1 ** (epoch // 50)),
        (
            lambda o: MultiStepLR(o, [50, 125, 160]),
            lambda epoch: 0.1 * 0.1 ** ((epoch >= 50) + (epoch >= 125) + (epoch >= 160)),
        ),
        (lambda o: ExponentialLR(o, 0.95), lambda epoch: 0.1 * 0.95**epoch),
        (lambda o: CosineAnnealingLR(o, 50, eta_min=0), lambda epoch: 0.1 * (1 + math.cos(math.pi * epoch / 50)) / 2),
        (lambda o: ReduceLROnPlateau(o, factor=0.1, patience=10, cooldown=10, min_lr=1e-4), plateau_closed_form),
        (lambda o: LambdaLR(o, lambda epoch: 0.1 ** (epoch // 20)), lambda epoch: 0.1 * 0.1 ** (epoch // 20)),
        (lambda o: LambdaLR(o, lambda epoch: 0.95**epoch), lambda epoch: 0.1 * 0.95**epoch),
    ],
    ids=["step", "multi step", "exponential", "cosine", "plateau", "lambda staircase", "lambda exponential"],
)
def test_the_curves_of_the_lessons_equal_their_closed_forms_at_each_of_200_epochs(make, closed_form) -> None:
    trace = schedule.compare({"it": make}, 200, SEED_LOSSES)["it"]
    expected = [closed_form(epoch) for epoch in range(200)]
    np.testing.assert_allclose(trace.lr[:, 0], expected, rtol=1e-9, atol=1e-15)


def test_simulating_copies_no_parameter_and_costs_little() -> None:
    """1000 steps on an Adam of 20 M parameters: no large tensor is made, and the extra time stays under 50 ms."""
    weights = [nn.Parameter(torch.zeros(1000, 1000)) for _ in range(20)]
    optimizer = Adam([{"params": weights[:10]}, {"params": weights[10:], "lr": 0.01}], lr=0.1)
    scheduler = CosineAnnealingLR(optimizer, 50)

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements += result.numel()
            return result

    with Allocations() as allocations:
        schedule.simulate(scheduler, 1000)
    assert allocations.elements == 0

    def seconds(function) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

    own = copy.copy(scheduler)
    optimizer._opt_called = True  # as after an update, which is what the scheduler would warn about
    alone = min(seconds(lambda: [own.step() for _ in range(999)]) for _ in range(3))
    whole = min(seconds(lambda: schedule.simulate(scheduler, 1000)) for _ in range(3))
    assert whole - alone < 0.05


def test_what_a_scheduler_caches_of_its_optimizer_is_the_stand_in_s() -> None:
    """One group, the list of its parameters, the state: none of them is copied, and none is the real one."""

    class Caching:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer, self.group, self.state = optimizer, optimizer.param_groups[0], optimizer.state
            self.weights = self.group["params"]

        def step(self) -> None:
            self.group["lr"] = 1.0 + len(self.weights) + len(self.state)

    optimizer = two_groups("adam")
    optimizer.step()
    assert schedule.simulate(Caching(optimizer), 2).lr[:, 0].tolist() == [0.1, 1.0]
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_object_that_caches_the_groups_meets_the_stand_in_s_groups() -> None:
    """`Halving` writes through its own reference to `param_groups`; neither real groups nor parameters are touched."""
    optimizer = two_groups()
    trace = schedule.simulate(Halving(optimizer), 4)
    np.testing.assert_array_equal(trace.lr[:, 0], [0.1, 0.05, 0.025, 0.0125])
    np.testing.assert_array_equal(trace.weight_decay[:, 1], [1e-4, 0.01, 0.02, 0.03])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02]
    assert trace.changed == ("lr", "weight_decay")


@pytest.mark.parametrize("name", ["epoch", "loss"])
def test_a_step_that_needs_an_argument_gets_the_time_or_the_metric(name: str) -> None:
    """`step(epoch)` counts from 1 as timm does; `step(loss)` gets metrics[i] after update i."""

    class Told:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        if name == "epoch":

            def step(self, epoch: int) -> None:
                self.optimizer.param_groups[0]["lr"] = float(epoch)
        else:

            def step(self, loss: float) -> None:
                self.optimizer.param_groups[0]["lr"] = loss

    trace = schedule.simulate(Told(two_groups()), 4, [7.0, 8.0, 9.0])
    assert trace.lr[:, 0].tolist() == ([0.1, 1, 2, 3] if name == "epoch" else [0.1, 7, 8, 9])


def test_a_scheduler_with_step_update_is_stepped_both_ways() -> None:
    """timm's schedulers have two methods, of which one does nothing; both may be told a metric."""

    class TwoWays:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, epoch: int, metric: float | None = None) -> None:
            self.optimizer.param_groups[0]["lr"] = epoch + (metric or 0.0)

        def step_update(self, num_updates: int, metric: float | None = None) -> None:
            self.optimizer.param_groups[1]["lr"] = 10.0 * num_updates

    trace = schedule.simulate(TwoWays(two_groups()), 3, [0.5, 0.25])
    assert trace.lr.tolist() == [[0.1, 0.02], [1.5, 10.0], [2.25, 20.0]]
    assert schedule.simulate(TwoWays(two_groups()), 3).lr[:, 0].tolist() == [0.1, 1.0, 2.0]
    with pytest.raises(ValueError, match="3 updates need 2 of them in metrics=, not 1"):
        schedule.simulate(TwoWays(two_groups()), 3, [0.5])


def test_advance_steps_a_scheduler_its_own_way() -> None:
    """Warm restarts may be stepped by fractions of an epoch."""
    optimizer = two_groups()
    scheduler = CosineAnnealingWarmRestarts(optimizer, 2)
    trace = schedule.simulate(scheduler, 6, advance=lambda double, i: double.step((i + 1) / 4))
    expected = [0.1 * (1 + math.cos(math.pi * i / 4 / 2)) / 2 for i in range(6)]
    np.testing.assert_allclose(trace.lr[:, 0], expected, rtol=1e-12)


def test_one_cycle_past_its_end_tells_the_step() -> None:
    """Torch's own error comes back, with the step of the scheduler at which it happens."""
    optimizer = two_groups()
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=10)
    assert len(schedule.simulate(scheduler, 11)) == 11
    with pytest.raises(ValueError, match="Tried to step 11 times") as caught:
        schedule.simulate(scheduler, 50)
    assert caught.value.__notes__ == ["raised by step 11 of the simulated scheduler, after update 10"]
    assert scheduler.last_epoch == 0


def test_nested_sequential_fails_at_its_milestone_like_torch() -> None:
    optimizer = two_groups()
    nested = in_sequence(
        optimizer,
        lambda o: ConstantLR(o, 0.5),
        lambda o: in_sequence(o, lambda o: StepLR(o, 2), lambda o: StepLR(o, 3), milestones=[2]),
        milestones=[3],
    )
    with pytest.raises(NotImplementedError) as caught:
        schedule.simulate(nested, 10)
    assert "step 3 of" in caught.value.__notes__[0]


@pytest.mark.parametrize("steps", [0, -1, 2.5, None, np.int64(0)])
def test_steps_must_be_a_positive_number(steps) -> None:
    with pytest.raises(ValueError, match="positive number of steps"):
        schedule.simulate(StepLR(two_groups(), 3), steps)


@pytest.mark.parametrize("metrics", [None, [0.5] * 8])
def test_a_plateau_without_enough_metrics_says_what_to_give(metrics) -> None:
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau.step\(\) takes a metric: 10 updates need 9"):
        schedule.simulate(ReduceLROnPlateau(two_groups()), 10, metrics)


def test_what_is_no_scheduler_is_refused_with_a_reason() -> None:
    class Blind:
        def step(self) -> None: ...

    class Demanding(Blind):
        def step(self, a: int, b: int) -> None: ...

    with pytest.raises(TypeError, match=r"something with a step\(\), not a int"):
        schedule.simulate(3, 5)
    with pytest.raises(TypeError, match="holds no optimizers"):
        schedule.simulate(Blind(), 5)
    with pytest.raises(TypeError, match=r"needs a, b: .*advance="):
        schedule.simulate(Demanding(), 5, optimizer=two_groups())
    assert schedule.simulate(Blind(), 5, optimizer=two_groups()).lr.shape == (5, 2)


def test_a_scheduler_that_cannot_be_copied_is_named() -> None:
    class Stuck(Halving):
        def __init__(self, optimizer: Optimizer) -> None:
            super().__init__(optimizer)
            self.source = (number for number in range(3))

    with pytest.raises(TypeError) as caught:
        schedule.simulate(Stuck(two_groups()), 5)
    assert caught.value.__notes__ == ["simulate runs a copy, and copy.deepcopy cannot copy this Stuck"]


def test_a_noisy_schedule_leaves_the_generators_alone() -> None:
    """The training run draws the numbers it would have drawn without the simulation."""
    optimizer = two_groups()
    noisy = LambdaLR(optimizer, lambda epoch: random.random() + float(np.random.rand()) + float(torch.rand(())))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert len(set(schedule.simulate(noisy, 5).lr[:, 0])) == 5
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())


def test_a_wrapper_whose_groups_are_a_property_is_simulated() -> None:
    """Apex, accelerate and others wrap an optimizer and forward `param_groups`."""

    class Wrapper(SGD):
        def __init__(self, inner: Optimizer) -> None:
            self.inner = inner
            self.defaults, self.state = inner.defaults, inner.state

        @property
        def param_groups(self):
            return self.inner.param_groups

        def __reduce_ex__(self, protocol):
            raise AssertionError("the optimizer was copied")

    inner = two_groups()
    assert schedule.simulate(Halving(Wrapper(inner)), 3).lr[:, 0].tolist() == [0.1, 0.05, 0.025]
    assert inner.param_groups[0]["lr"] == 0.1


def test_a_rate_that_somebody_else_set_is_told() -> None:
    """Schedulers that share an optimizer spoil each other's rate already when they are made."""
    optimizer = two_groups()
    shared = {"step": StepLR(optimizer, 50), "warm": LinearLR(optimizer, 0.5)}
    traces = schedule.compare(shared, 5)
    assert traces["step"].events[0] == (
        "backbone: the rate is 0.05 where this scheduler left 0.1: something else has set it since"
    )
    assert traces["warm"].events == []


def transformers_schedules() -> list[Any]:
    optimization = pytest.importorskip("transformers").optimization
    names = [
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ]
    return [
        lambda o, name=name: optimization.get_scheduler(name, o, num_warmup_steps=4, num_training_steps=20)
        for name in names
    ]


def test_schedules_of_transformers_simulate_exactly() -> None:
    for make in transformers_schedules():
        optimizer = two_groups("adam")
        check_simulation(optimizer, make(optimizer), STEPS, METRICS)


@pytest.mark.parametrize("by_epoch", [True, False])
def test_schedules_of_timm_simulate_exactly(by_epoch: bool) -> None:
    timm = pytest.importorskip("timm.scheduler")
    options = {"warmup_t": 3, "warmup_lr_init": 1e-3, "t_in_epochs": by_epoch}
    for make in (
        lambda o: timm.CosineLRScheduler(o, 10, noise_range_t=(2, 8), **options),
        lambda o: timm.TanhLRScheduler(o, 10, **options),
        lambda o: timm.StepLRScheduler(o, 4, decay_rate=0.3, **options),
        lambda o: timm.MultiStepLRScheduler(o, [4, 9], **options),
        lambda o: timm.PolyLRScheduler(o, 10, **options),
    ):
        optimizer = two_groups("adam")
        scheduler = make(optimizer)
        simulated = schedule.simulate(scheduler, STEPS)
        recorder = watched(optimizer)
        for update in range(STEPS):
            optimizer.step()
            scheduler.step(update + 1)
            scheduler.step_update(update + 1)
        np.testing.assert_array_equal(simulated.lr, recorder.trace().lr)
        assert simulated.changed == ("lr",)


# --- live traces --------------------------------------------------------------------------------------------------


def test_a_group_added_in_the_middle_is_nan_before_and_told() -> None:
    optimizer = two_groups()
    recorder = watched(optimizer)
    optimizer.step()
    optimizer.step()
    optimizer.add_param_group({"params": parameters(), "lr": 0.5, "name": "head"})
    optimizer.step()
    trace = recorder.trace()
    np.testing.assert_array_equal(trace.lr[:, 2], [np.nan, np.nan, 0.5])
    np.testing.assert_array_equal(trace.momentum[:, 2], [np.nan, np.nan, 0.9])
    assert trace.names == ("backbone", "group1", "head")
    assert trace.events == ["head: the group was added before update 2"]
    assert trace.changed == ()


def test_a_group_taken_away_is_nan_afterwards() -> None:
    """As `optimizer.param_groups.pop()` does; that is no NaN rate, so nothing is told."""
    optimizer = two_groups()
    recorder = watched(optimizer)
    optimizer.step()
    group = optimizer.param_groups.pop()
    optimizer.step()
    optimizer.param_groups.append(group)
    optimizer.step()
    assert np.isnan(recorder.trace().lr[:, 1]).tolist() == [False, True, False]
    assert recorder.trace().events == []


@pytest.mark.parametrize(
    ("rate", "told"), [(0.0, "0"), (-0.1, "negative"), (float("nan"), "NaN"), (float("inf"), "infinite")]
)
def test_a_rate_that_makes_no_sense_is_told_once(rate: float, told: str) -> None:
    optimizer = two_groups()
    recorder = watched(optimizer)
    for now in (0.1, rate, rate, 0.1, rate):
        optimizer.param_groups[1]["lr"] = now
        optimizer.step()
    assert recorder.trace().events == [f"group1: the rate is {told} at update 1"]


def test_an_optimizer_that_finds_its_rate_itself_has_none() -> None:
    """Adafactor's relative steps: `lr` is None. That is no NaN rate."""
    optimizer = two_groups()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = None
    recorder = Recorder(optimizer)
    recorder.before_step(optimizer)
    recorder.after_step(optimizer)
    assert np.isnan(recorder.trace().lr).all()
    assert recorder.trace().events == []


def test_hooks_attached_in_the_middle_of_a_step_wait_for_the_next() -> None:
    """An update that was not seen to begin is no row."""
    optimizer = two_groups()
    recorder = Recorder(optimizer)
    recorder.after_step(optimizer)
    assert len(recorder.trace()) == 0


def test_a_scheduler_stepped_before_the_optimizer_is_told() -> None:
    """Not so for one that is stepped after it, nor for a state that is loaded before the first update."""
    optimizer = two_groups()
    scheduler = ExponentialLR(optimizer, 0.9)
    recorder = watched(optimizer)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    optimizer.step()
    assert recorder.trace().events == [
        f"{name}: no update used the first rate {old}, update 0 uses {new}: "
        "a scheduler was stepped before the optimizer (or the rate was set by hand)"
        for name, old, new in (("backbone", 0.1, 0.09), ("group1", 0.02, 0.018))
    ]
    fresh = two_groups()
    ExponentialLR(fresh, 0.9)
    recorder = watched(fresh)
    fresh.load_state_dict(optimizer.state_dict())
    fresh.step()
    assert recorder.trace().events == []


def test_a_resumed_run_counts_on() -> None:
    """Adam's own step count is where the trace starts; loading a state in the middle does not start it again."""
    first = two_groups("adam")
    for _ in range(5):
        first.step()
    resumed = two_groups("adam")
    recorder = watched(resumed)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.step()
    faster = copy.deepcopy(first.state_dict())
    faster["param_groups"][0]["lr"] = 0.7
    resumed.load_state_dict(faster)
    resumed.step()
    trace = recorder.trace()
    assert trace.start == 5
    assert trace.lr[:, 0].tolist() == [0.1, 0.7]
    assert schedule.simulate(StepLR(first, 3), 2).start == 5
    assert Recorder(resumed, start=40).trace().start == 40


def test_a_tensor_rate_is_copied() -> None:
    """It is one object that changes in place; a reference to it would show the last value only."""
    optimizer = two_groups("tensor rate")
    recorder = watched(optimizer)
    for rate in (0.5, 0.25):
        optimizer.param_groups[0]["lr"].fill_(rate)
        optimizer.step()
    assert recorder.trace().lr[:, 0].tolist() == [0.5, 0.25]


def test_a_learnt_rate_is_read_without_its_history() -> None:
    """A rate that requires grad (hypergradients) must give a number and no warning."""
    optimizer = two_groups()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25, requires_grad=True) * 1
    log = Recorder(optimizer)
    log.before_step(optimizer)
    log.after_step(optimizer)
    assert log.trace().lr[0, 0] == 0.25
    assert schedule.simulate(Halving(optimizer), 2).lr[:, 0].tolist() == [0.25, 0.125]


def test_numbers_on_a_device_are_fetched_only_when_they_are_read() -> None:
    """Tensors are kept, and joined in blocks; numbers before and after them stay in their places."""
    column = _Column()
    column.put(0, 7.0)
    for update in range(1, 601):
        column.put(update, torch.tensor(float(update)))
    column.put(601, 600.0)
    column.put(602, 600.0)
    expected = [7.0, *range(1, 601), 600.0, 600.0]
    assert column.read(603).tolist() == expected
    assert column.read(603).tolist() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_rate_on_the_gpu_is_copied_and_nobody_waits_for_it() -> None:
    """A capturable optimizer's rate stays where it is until the trace is read; skips of a fused one likewise."""
    weight = nn.Parameter(torch.ones(2, device="cuda"))
    optimizer = AdamW([weight], lr=torch.tensor(0.1, device="cuda"), fused=True)
    scaler = torch.amp.GradScaler("cuda")
    recorder = watched(optimizer, scaler=scaler)
    scaler.scale(torch.ones((), device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for update in range(300):
            optimizer.param_groups[0]["lr"].mul_(0.99)
            weight.grad = torch.full((2,), float("inf") if update in (0, 7) else 1.0, device="cuda")
            scaler.step(optimizer)
            scaler.update()
            recorder.scalars()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trace = recorder.trace()
    assert trace.skipped == [0, 7]
    expected = np.delete(0.1 * 0.99 ** np.arange(1, 301), [0, 7])
    np.testing.assert_allclose(trace.lr[:, 0], expected, rtol=1e-4)
    assert trace.start == 0


def test_lbfgs_makes_one_row_a_step_whatever_its_closures() -> None:
    weight = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = torch.optim.LBFGS([weight], lr=0.5, max_iter=5)
    recorder = watched(optimizer)
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = weight.pow(4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert calls > 4
    assert recorder.trace().lr.tolist() == [[0.5], [0.5]]
    assert np.isnan(recorder.trace().momentum).all()


def test_a_step_that_raises_leaves_no_row() -> None:
    optimizer = two_groups()
    recorder = watched(optimizer)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.3
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert len(recorder.trace()) == 1
    optimizer.param_groups[1]["lr"] = 0.4
    optimizer.step()
    assert recorder.trace().lr.tolist() == [[0.1, 0.02], [0.3, 0.4]]


def test_several_optimizers_stand_side_by_side() -> None:
    """Each counts its own updates; the one with fewer ends in NaN; names tell the optimizer."""
    one, two = two_groups(), two_groups("adam")
    recorder = Recorder([one, two])
    for optimizer in (one, two):
        optimizer.register_step_pre_hook(recorder.before_step)
        optimizer.register_step_post_hook(recorder.after_step)
    scheduler = ExponentialLR(one, 0.5)
    for _ in range(3):
        one.step()
        scheduler.step()
    two.step()
    trace = recorder.trace()
    assert trace.names == ("SGD.backbone", "SGD.group1", "Adam.backbone", "Adam.group1")
    np.testing.assert_array_equal(trace.lr[:, 0], [0.1, 0.05, 0.025])
    np.testing.assert_array_equal(trace.lr[:, 2], [0.1, np.nan, np.nan])
    assert trace.changed == ("lr",)
    np.testing.assert_array_equal(trace["betas[1]"][0], [np.nan, np.nan, 0.999, 0.999])
    np.testing.assert_array_equal(recorder.trace(two).lr, [[0.1, 0.02]])
    assert recorder.scalars() == {
        "lr/SGD.backbone": 0.025, "lr/SGD.group1": 0.005, "lr/Adam.backbone": 0.1, "lr/Adam.group1": 0.02
    }  # fmt: skip
    assert Recorder([two_groups(), two_groups()]).trace().names[2] == "SGD.1.backbone"
    assert Recorder({"G": one, "D": two}).trace().names[2] == "D.backbone"


def test_scalars_are_the_rates_and_whatever_has_changed() -> None:
    optimizer = two_groups()
    recorder, scheduler = watched(optimizer), Halving(optimizer)
    assert recorder.scalars() == {}
    optimizer.step()
    scheduler.step()
    assert recorder.scalars() == {"lr/backbone": 0.1, "lr/group1": 0.02}
    optimizer.step()
    assert recorder.scalars(optimizer) == {
        "lr/backbone": 0.05, "lr/group1": 0.01, "weight_decay/backbone": 0.01, "weight_decay/group1": 0.01
    }  # fmt: skip


def test_what_is_not_recorded_is_refused_by_name() -> None:
    recorder = Recorder(two_groups())
    with pytest.raises(KeyError, match=r"this Adam is not among the recorded optimizers \(SGD\)"):
        recorder.before_step(two_groups("adam"))
    for wrong in ([nn.Linear(1, 1)], nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="'Linear' is a Linear"):
            Recorder(wrong)
    with pytest.raises(TypeError, match="needs an optimizer"):
        Recorder([])
    with pytest.raises(TypeError, match=r"takes a torch.amp.GradScaler, not a int"):
        Recorder(two_groups(), scaler=3)


def test_a_recorder_keeps_no_parameter_alive() -> None:
    """It holds numbers; when the model and the optimizer are gone, the trace is still there."""
    optimizer = two_groups("adam")
    recorder = watched(optimizer)
    optimizer.step()
    weight = weakref.ref(optimizer.param_groups[0]["params"][0])
    del optimizer
    gc.collect()
    assert weight() is None
    assert recorder.trace().lr.tolist() == [[0.1, 0.02]]


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch 2.11, of its own modules
def test_a_compiled_step_is_traced_and_compiled_once() -> None:
    """The hooks stay out of the graph: their counting must not make it recompile."""
    from torch._dynamo.testing import CompileCounter

    optimizer = AdamW(parameters(), lr=torch.tensor(0.1), foreach=False)
    recorder, scheduler, counter = watched(optimizer), ExponentialLR(optimizer, 0.5), CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    for _ in range(6):
        step()
        scheduler.step()
    np.testing.assert_allclose(recorder.trace().lr[:, 0], 0.1 * 0.5 ** np.arange(6), rtol=1e-6)
    assert counter.frame_count == 1


# --- skipped updates ----------------------------------------------------------------------------------------------


def scaled_step(scaler: torch.amp.GradScaler, *overflows: tuple[Optimizer, bool]) -> None:
    """One iteration of mixed-precision training, in which some optimizers meet an Inf."""
    scaler.scale(torch.ones(()))
    for optimizer, overflow in overflows:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full((2,), float("inf") if overflow else 1.0)
        scaler.step(optimizer)
    scaler.update()


scalers = st.builds(
    functools.partial(torch.amp.GradScaler, "cpu"),
    init_scale=st.sampled_from([1.0, 65536.0, 2.0**126]),
    growth_factor=st.sampled_from([2.0, 1.5]),
    backoff_factor=st.sampled_from([0.5, 0.7]),
    growth_interval=st.integers(1, 4),
)


@settings(deadline=None, max_examples=80)
@given(scaler=scalers, overflows=st.lists(st.booleans(), max_size=25), fused=st.booleans(), reads=st.booleans())
def test_skipped_updates_are_known_exactly(scaler, overflows, fused, reads) -> None:
    """Which updates were skipped, and the rates of the others, also when the last ones are skipped or all are."""
    optimizer = AdamW(parameters(), lr=0.1, fused=fused)
    recorder, scheduler = watched(optimizer, scaler=scaler), ExponentialLR(optimizer, 0.9)
    optimizer._opt_called = True
    rates = []
    for overflow in overflows:
        rates.append(optimizer.param_groups[0]["lr"])
        scaled_step(scaler, (optimizer, overflow))
        scheduler.step()
        if reads:
            recorder.trace()
    trace = recorder.trace()
    assert trace.skipped == [update for update, overflow in enumerate(overflows) if overflow]
    made = [rate for rate, overflow in zip(rates, overflows, strict=True) if not overflow]
    assert trace.lr[:, 0].tolist() == made
    assert trace.events == []


@settings(deadline=None, max_examples=60)
@given(scaler=scalers, overflows=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=20), fused=st.booleans())
def test_two_optimizers_that_share_a_scaler_are_told_apart(scaler, overflows, fused) -> None:
    """Stepped in the same iteration, one may be skipped and the other not."""
    first, second = SGD(parameters(), lr=0.1), AdamW(parameters(), lr=0.1, fused=fused)
    recorder = Recorder([first, second], scaler)
    for optimizer in (first, second):
        optimizer.register_step_pre_hook(recorder.before_step)
        optimizer.register_step_post_hook(recorder.after_step)
    for one, two in overflows:
        scaled_step(scaler, (first, one), (second, two))
    for index, optimizer in enumerate((first, second)):
        assert recorder.trace(optimizer).skipped == [i for i, both in enumerate(overflows) if both[index]]
    assert len(recorder.trace(first)) == sum(not one for one, _ in overflows)


@settings(deadline=None, max_examples=60)
@given(scaler=scalers, overflows=st.lists(st.booleans(), max_size=20), poll=st.booleans())
def test_optimizers_stepped_in_turns_are_told_apart_by_polling(scaler, overflows, poll) -> None:
    """Without `poll` the recorder does not guess: it says that it cannot know, and blames nobody wrongly."""
    turns = SGD(parameters(), lr=0.1), SGD(parameters(), lr=0.1)
    recorder = Recorder(turns, scaler)
    for optimizer in turns:
        optimizer.register_step_pre_hook(recorder.before_step)
        optimizer.register_step_post_hook(recorder.after_step)
    for update, overflow in enumerate(overflows):
        if poll:
            recorder.poll()
        scaled_step(scaler, (turns[update % 2], overflow))
    truth = [[i for i, overflow in enumerate(overflows[first::2]) if overflow] for first in (0, 1)]
    traces = [recorder.trace(optimizer) for optimizer in turns]
    if poll or not traces[0].events:
        assert [trace.skipped for trace in traces] == truth
    else:
        assert "cannot be known whose" in traces[0].events[0]
        assert all(len(trace.skipped) <= len(true) for trace, true in zip(traces, truth, strict=True))


def test_a_first_update_that_is_skipped_is_no_fault_of_the_scheduler() -> None:
    optimizer, scaler = SGD(parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    scheduler = ExponentialLR(optimizer, 0.9)
    recorder = watched(optimizer, scaler=scaler)
    for overflow in (True, False):
        scaled_step(scaler, (optimizer, overflow))
        optimizer._opt_called = True
        scheduler.step()
    trace = recorder.trace()
    assert trace.skipped == [0]
    assert trace.events == [
        "group0: no update used the first rate 0.1, update 0 uses 0.09: "
        "the GradScaler skipped the first update, and the scheduler went on"
    ]


def test_a_scale_set_by_hand_is_told() -> None:
    """Then skipped updates cannot be counted from the scale any more."""
    optimizer, scaler = SGD(parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    recorder = watched(optimizer, scaler=scaler)
    scaled_step(scaler, (optimizer, False))
    scaled_step(scaler, (optimizer, False))
    scaler.update(10.0)
    scaled_step(scaler, (optimizer, False))
    assert "the GradScaler's scale changed in a way" in recorder.trace().events[0]
    assert len(recorder.trace()) == 3


def test_an_optimizer_that_is_not_recorded_but_shares_the_scaler_is_told() -> None:
    """Its updates move the scaler's numbers, so the recorded one's skips cannot be counted from them."""
    recorded, other, scaler = SGD(parameters(), lr=0.1), SGD(parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    recorder = watched(recorded, scaler=scaler)
    for optimizer in (recorded, other, recorded):
        scaled_step(scaler, (optimizer, False))
    assert "another optimizer uses it too" in recorder.trace().events[0]


def test_a_skip_is_known_before_the_scaler_s_update() -> None:
    """The trace may be read in the middle of an iteration."""
    optimizer, scaler = SGD(parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    recorder = watched(optimizer, scaler=scaler)
    scaled_step(scaler, (optimizer, False))
    optimizer.param_groups[0]["params"][0].grad.fill_(float("inf"))
    scaler.step(optimizer)
    assert recorder.trace().skipped == [1]
    scaler.update()
    assert recorder.trace().skipped == [1]


def test_an_update_made_before_the_recorder_was_there_is_no_skip() -> None:
    """It may be made between ``scaler.step()`` and ``scaler.update()``."""
    optimizer, scaler = SGD(parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    recorder = watched(optimizer, scaler=scaler)
    scaler.update()
    scaled_step(scaler, (optimizer, False))
    assert (recorder.trace().skipped, recorder.trace().events, len(recorder.trace())) == ([], [], 1)


def test_a_scale_that_cannot_grow_any_more_is_no_skip() -> None:
    """At the largest float32 torch leaves the scale as it is."""
    optimizer = SGD(parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1)
    recorder = watched(optimizer, scaler=scaler)
    for _ in range(4):
        scaled_step(scaler, (optimizer, False))
    assert scaler.get_scale() == 2.0**127
    assert (recorder.trace().skipped, recorder.trace().events, len(recorder.trace())) == ([], [], 4)


def test_a_poll_in_between_forgets_nothing() -> None:
    """What was read inside a step still counts the skips after it, when nobody polls then."""
    optimizer, scaler = SGD(parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    recorder = watched(optimizer, scaler=scaler)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    recorder.poll()
    scaler.update()
    for overflow in (True, True, False):
        scaled_step(scaler, (optimizer, overflow))
    assert recorder.trace().skipped == [1, 2]


@pytest.mark.parametrize("fused", [True, False])
def test_the_scale_is_never_read_in_a_poll_nor_for_fused_optimizers(fused: bool, monkeypatch) -> None:
    """Reading it would wait for the device; torch itself waits in the step of an optimizer that is not fused."""
    optimizer, scaler = AdamW(parameters(), lr=0.1, fused=fused), torch.amp.GradScaler("cpu")
    recorder = watched(optimizer, scaler=scaler)
    monkeypatch.setattr("probe.schedule.scaler.SkipWatch._read", lambda self: pytest.fail("the scale was read"))
    recorder.poll()
    if fused:
        for overflow in (True, False, True):
            scaled_step(scaler, (optimizer, overflow))
            recorder.poll()
        assert recorder.trace().skipped == [0, 2]


def test_a_scaler_that_is_switched_off_changes_nothing() -> None:
    optimizer, scaler = SGD(parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False)
    recorder = watched(optimizer, scaler=scaler)
    scaler.step(optimizer)
    recorder.poll()
    assert (len(recorder.trace()), recorder.trace().skipped) == (1, [])


def test_without_the_scaler_fused_optimizers_still_tell() -> None:
    """`found_inf` is on the optimizer while it steps; an optimizer that is not fused is not called at all."""
    for fused in (True, False):
        optimizer, scaler = AdamW(parameters(), lr=0.1, fused=fused), torch.amp.GradScaler("cpu")
        recorder = watched(optimizer)
        for overflow in (True, False, True):
            scaled_step(scaler, (optimizer, overflow))
        assert len(recorder.trace()) == 1
        assert recorder.trace().skipped == ([0, 2] if fused else [])


def test_what_the_skip_watch_relies_on_holds_in_torch() -> None:
    """`update` puts a fresh dict in place of the one that says who stepped, and scales by one factor only."""
    optimizer, scaler = SGD(parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    held = scaler._per_optimizer_states
    scaler.scale(torch.ones(()))
    optimizer.param_groups[0]["params"][0].grad.fill_(float("inf"))
    scaler.step(optimizer)
    assert held[id(optimizer)]["stage"].name == "STEPPED"
    scaler.update()
    assert scaler._per_optimizer_states is not held
    assert (scaler._scale.item(), scaler._growth_tracker.item()) == (4.0, 0)
    for expected in ((4.0, 1), (8.0, 0)):
        scaled_step(scaler, (optimizer, False))
        assert (scaler._scale.item(), scaler._growth_tracker.item()) == expected


# --- what a trace shows -------------------------------------------------------------------------------------------


def steps_and_cosine() -> schedule.Comparison:
    return schedule.compare({"step": "StepLR(4)", "cosine": CosineAnnealingLR(two_groups(), 4)}, 10)


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ("StepLR(4)", [4, 8]),
        ("CosineAnnealingLR(4)", [4, 8]),
        ("CosineAnnealingWarmRestarts(4)", [4, 8]),
        ("ConstantLR(total_iters=1)", [1]),
        ("LinearLR(total_iters=5)", [5]),
        ("ExponentialLR(0.9)", []),
        ("LambdaLR(lambda epoch: 1 if epoch == 5 else 0)", [5, 6]),
        ("LambdaLR(lambda epoch: 0.99 ** epoch * (0.1 if epoch > 6 else 1))", [7]),
        ("OneCycleLR(0.1, total_steps=12)", [3]),
    ],
)
def test_milestones_are_where_a_rate_jumps_turns_starts_or_stops(expression: str, rows: list[int]) -> None:
    assert schedule.compare({"it": expression}, 12)["it"].milestones() == rows


def test_a_trace_prints_sparklines_change_points_and_events() -> None:
    lr = np.array([[0.8, 0.1], [0.8, np.nan], [0.4, 0.1], [0.0, 0.1], [0.1, 0.1], [0.2, 0.1]])
    trace = Trace({"lr": lr}, ("backbone", "head"), skipped=[3], events=["something happened"])
    assert str(trace).splitlines() == [
        "6 updates of 2 groups, 1 skipped",
        "lr backbone  0.8 ██▅▁▂▃ 0.2",
        "             changes at 1: 0.8, 3: 0",
        "lr head      0.1 ▅ ▅▅▅▅ 0.1",
        "! something happened",
    ]
    assert repr(trace) == "Trace(6 updates, groups: backbone, head, skipped: 1)"
    assert "step: 10 updates of 1 group\n" in str(steps_and_cosine())


def test_a_trace_of_nothing_still_prints_and_draws() -> None:
    empty = Recorder(two_groups()).trace()
    assert empty.lr.shape == empty.momentum.shape == (0, 2)
    assert "lr backbone, group1  never set" in str(empty)
    assert empty.plot().shape == (480, 900, 3)


def test_an_unknown_hyper_parameter_names_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"no hyper-parameter 'beta'.*it has lr, momentum"):
        steps_and_cosine()["step"]["beta"]


def colored(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Where the picture has a colour, rows and columns."""
    return np.argwhere((np.abs(picture.astype(int) - color) < 12).all(axis=2))


@pytest.mark.parametrize("by", ["opencv", "matplotlib"])
def test_a_plot_shows_the_curves_in_a_picture_of_the_size_asked_for(by: str, monkeypatch) -> None:
    """The first curve falls from the upper left to the lower right; other hyper-parameters have panels below."""
    pytest.importorskip("cv2" if by == "opencv" else "matplotlib")
    if by == "opencv":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    traces = schedule.compare({"linear": "LinearLR(1.0, 0.0, 40)", "one": "OneCycleLR(0.1, total_steps=40)"}, 40)
    for width, height in ((900, 480), (333, 251)):
        picture = traces["linear"].plot(width=width, height=height)
        assert (picture.shape, picture.dtype) == ((height, width, 3), np.uint8)
        line = colored(picture, (31, 119, 180))
        left, right = line[line[:, 1] < width * 0.3], line[line[:, 1] > width * 0.9]
        assert left[:, 0].min() < height * 0.3
        assert right[:, 0].max() > height * 0.7
    both = traces.plot()
    assert len(colored(both, (31, 119, 180))) > 500
    assert len(colored(both, (255, 127, 14))) > 500
    panels = traces["one"].plot()
    assert len(colored(panels[:300], (31, 119, 180))) > 500
    assert len(colored(panels[330:], (31, 119, 180))) > 300
    assert not np.array_equal(traces.plot(log=True), both)
    with pytest.raises(ValueError, match="lr, momentum needs at least 240 x 220 pixels, not 100 x 480"):
        traces["one"].plot(width=100)
    with pytest.raises(ValueError, match="no schedule to draw"):
        schedule.compare({}, 5).plot()


def test_many_groups_and_gaps_draw() -> None:
    """40 groups, of which the legend names 15; one that appears late; one that is never positive on a log axis."""
    lr = np.repeat(np.linspace(0.1, 0.01, 20)[:, None], 40, axis=1) * np.arange(40)
    lr[:12, 3] = np.nan
    trace = Trace({"lr": lr}, tuple(f"layer{i}" for i in range(40)))
    assert trace.plot().shape == trace.plot(log=True).shape == (480, 900, 3)


def test_csv_reads_back_exactly(tmp_path: Path) -> None:
    optimizer = two_groups("adam")
    recorder, scheduler = watched(optimizer, start=7), CyclicLR(optimizer, 0.01, 0.1, 3)
    for update in range(6):
        if update == 3:
            optimizer.add_param_group({"params": parameters(), "name": "odd, name"})
            break
        optimizer.step()
        scheduler.step()
    optimizer.step()
    trace = recorder.trace()
    trace.to_csv(tmp_path / "trace.csv")
    with open(tmp_path / "trace.csv", newline="") as file:
        header, *rows = csv.reader(file)
    keys = ("lr", "momentum", "weight_decay")
    assert header == ["update", *(f"{key}/{name}" for key in keys for name in trace.names)]
    assert [row[0] for row in rows] == ["7", "8", "9", "10"]
    numbers = np.array([[float(cell or "nan") for cell in row[1:]] for row in rows])
    np.testing.assert_array_equal(numbers, np.concatenate([trace.lr, trace.momentum, trace.weight_decay], axis=1))
    assert rows[0][3] == ""


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = read(folder)
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_trace_is_logged_under_its_groups_names(tmp_path: Path) -> None:
    """`lr/<group>` always; momentum because it changes; weight decay not, because it does not."""
    trace = schedule.simulate(OneCycleLR(two_groups(), 0.1, total_steps=9), 9)
    with SummaryWriter(str(tmp_path)) as writer:
        trace.log(writer)
    logged = scalars(tmp_path)
    assert logged.keys() == {"lr/backbone", "lr/group1", "momentum/backbone", "momentum/group1"}
    assert [step for step, _ in logged["lr/group1"]] == list(range(9))
    np.testing.assert_allclose([value for _, value in logged["momentum/backbone"]], trace.momentum[:, 0], rtol=1e-6)


def test_a_comparison_is_logged_as_one_chart(tmp_path: Path) -> None:
    """A run for each schedule, the same tag in all: TensorBoard draws them together."""
    traces = schedule.compare({"StepLR(4)": "StepLR(4)", "../up": "ExponentialLR(0.5)"}, 5)
    with SummaryWriter(str(tmp_path / "runs")) as writer:
        traces.log(writer)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    step, up = (scalars(tmp_path / "runs" / name) for name in ("StepLR(4)", ".._up"))
    assert step.keys() == up.keys() == {"lr/group0"}
    np.testing.assert_allclose([value for _, value in up["lr/group0"]], traces["../up"].lr[:, 0], rtol=1e-6)


def test_compare_takes_schedulers_recipes_expressions_and_traces() -> None:
    done = schedule.simulate(StepLR(two_groups(), 2), 4)
    traces = schedule.compare(
        {
            "a": StepLR(two_groups(), 2),
            "b": lambda o: StepLR(o, 2),
            "c": "StepLR(2)",
            "d": done,
            "e": "ReduceLROnPlateau()",
        },
        4,
        [1.0, 1.0, 1.0],
        lr=[0.1, 0.02],
    )
    assert list(traces) == ["a", "b", "c", "d", "e"]
    assert all(np.array_equal(traces[name].lr, done.lr) for name in "abc")
    assert traces["d"] is done
    with pytest.raises(TypeError, match="not a int"):
        schedule.compare({"a": 3}, 4)


# --- expressions and the command ----------------------------------------------------------------------------------


def rates(expression: str, steps: int = 12, lr: Any = 0.1) -> list[float]:
    return schedule.compare({"it": expression}, steps, METRICS, lr=lr)["it"].lr[:, 0].tolist()


@pytest.mark.parametrize(
    ("expression", "make"),
    [
        ("StepLR(3)", lambda o: StepLR(o, 3)),
        ("torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=.5)", lambda o: StepLR(o, 3, 0.5)),
        ("MultiStepLR([2, 5], gamma=1e-1)", lambda o: MultiStepLR(o, [2, 5])),
        ("MultiStepLR(milestones=(2, 5))", lambda o: MultiStepLR(o, [2, 5])),
        ("CosineAnnealingLR(T_max=5, eta_min=-0.01)", lambda o: CosineAnnealingLR(o, 5, -0.01)),
        ("ReduceLROnPlateau('max', patience=1)", lambda o: ReduceLROnPlateau(o, "max", patience=1)),
        ("OneCycleLR(0.5, 20, three_phase=True)", lambda o: OneCycleLR(o, 0.5, 20, three_phase=True)),
        ("CyclicLR(.01, .1, 3, scale_fn=lambda x: 1/x)", lambda o: CyclicLR(o, 0.01, 0.1, 3, scale_fn=lambda x: 1 / x)),
        ("SWALR(0.05, anneal_strategy='linear')", lambda o: SWALR(o, 0.05, anneal_strategy="linear")),
        ("LambdaLR(lambda epoch: 0.1 ** (epoch // 4))", lambda o: LambdaLR(o, lambda epoch: 0.1 ** (epoch // 4))),
        (
            "SequentialLR([LinearLR(0.1, total_iters=3), CosineAnnealingLR(6)], milestones=[3])",
            lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, 6)], [3]),
        ),
        (
            "ChainedScheduler([ConstantLR(0.1, 4), ExponentialLR(0.9)], optimizer=optimizer)",
            lambda o: ChainedScheduler([ConstantLR(o, 0.1, 4), ExponentialLR(o, 0.9)]),
        ),
    ],
)  # fmt: skip
def test_an_expression_makes_the_scheduler_that_python_would(expression: str, make) -> None:
    assert rates(expression) == schedule.compare({"it": make}, 12, METRICS)["it"].lr[:, 0].tolist()


def test_every_scheduler_can_be_written_as_an_expression() -> None:
    for name in (*lr_scheduler.__all__, "SWALR"):
        if name != "LRScheduler":
            assert signature(name).startswith(f"{name}(")
            assert "optimizer" not in signature(name)


def test_a_recipe_makes_schedulers_that_share_nothing() -> None:
    """`SequentialLR` keeps the list that it is given."""
    recipe = schedule.parse("SequentialLR([StepLR(2), StepLR(3)], [4])")
    one, two = recipe(two_groups()), recipe(two_groups())
    assert one._milestones is not two._milestones
    assert one._schedulers[0] is not two._schedulers[0]


OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "<", "<=", ">", ">=", "==", "!=", "and", "or"]
epochs = st.just("epoch")
constants = st.one_of(st.integers(-9, 9).map(str), st.floats(-9, 9).map(repr), st.sampled_from(["math.pi", "True"]))
arithmetic = st.recursive(
    epochs | constants,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map(lambda parts: "({} {} {})".format(*parts)),
        st.tuples(inner, inner, inner).map(lambda parts: "({} if {} < {} else 7)".format(*parts)),
        st.tuples(
            st.sampled_from(["-", "not ", "abs", "math.cos", "math.sqrt", "int", "round", "math.exp"]), inner
        ).map(lambda parts: "({}({}))".format(*parts)),
        st.tuples(st.sampled_from(["min", "max", "math.pow", "math.hypot"]), inner, inner).map(
            lambda parts: "{}({}, {})".format(*parts)
        ),
        st.tuples(inner, inner, inner).map(lambda parts: "({} < {} <= {})".format(*parts)),
    ),
    max_leaves=8,
)


def outcome(function) -> Any:
    """What a function returns, or the exception that it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's about comparisons of literals
            return function()
    except Exception as error:
        return error


@settings(deadline=None, max_examples=300)
@given(source=arithmetic, epoch=st.integers(0, 200))
@example(source="(2 or epoch)", epoch=3)
@example(source="(0 and epoch)", epoch=3)
@example(source="(epoch < epoch <= (epoch / epoch))", epoch=0)
def test_the_arithmetic_of_a_lambda_is_python_s(source: str, epoch: int) -> None:
    """Same value of the same type, or the same kind of refusal; beyond a float it refuses where Python goes on."""
    function = _lambda(ast.parse(f"lambda epoch: {source}", mode="eval").body)
    expected, found = outcome(lambda: eval(source, {"epoch": epoch, "math": math})), outcome(lambda: function(epoch))
    if isinstance(expected, Exception):
        assert isinstance(found, type(expected) | OverflowError | ValueError)
    elif isinstance(found, OverflowError | ValueError):
        assert isinstance(expected, complex) or "too large" in str(found)
    else:
        assert found == expected or (found != found and expected != expected)
        assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("9**9**9", r"a call of a scheduler, such as StepLR\(30\); this is '9 \*\* 9 \*\* 9'"),
        ("StepLR", r"such as StepLR\(...\)"),
        ("CosineLR(5)", r"'CosineLR'; did you mean CosineAnnealingLR\(T_max, eta_min=0.0, last_epoch=-1\)\?"),
        ("onecycle(5)", r"did you mean OneCycleLR\(max_lr"),
        ("plateau()", r"did you mean ReduceLROnPlateau\("),
        ("zzz(5)", r"no scheduler 'zzz'; There are ChainedScheduler, ConstantLR"),
        ("LRScheduler()", "no scheduler 'LRScheduler'"),
        ("__import__('os').system('true')", "no scheduler \"__import__"),
        ("__import__('os').StepLR(3)", "no scheduler \"__import__"),
        ("CosineAnnealingLR(T_mx=5)", r"no argument 'T_mx', did you mean 'T_max'\?; the signature is Cosine"),
        ("StepLR(**{'step_size': 3})", r"StepLR has no argument '\*\*'; the signature"),
        ("StepLR(3, step_size=3)", "given 'step_size' twice"),
        ("StepLR(1, 2, 3, 4)", "takes at most 3 arguments, not 4"),
        ("StepLR()", "StepLR needs step_size; the signature is StepLR"),
        ("StepLR(step_size=1 + 1)", r"step_size must be written out .* not '1 \+ 1'"),
        ("StepLR(open)", "must be written out"),
        ("StepLR(-'x')", "must be written out"),
        ("StepLR(b'x')", "must be written out"),
        ("StepLR(lambda epoch: 3)", "step_size must be written out"),
        ("SequentialLR([3], [])", "a schedule is a call of a scheduler"),
        ("StepLR(3", "cannot read 'StepLR\\(3'"),
        ("StepLR(3)\0", "cannot read"),
        ("StepLR(" + "-" * 3000 + "3)", "nested too deeply"),
        ("StepLR(" + "1+" * 1500 + "3)", "nested too deeply"),
        ("StepLR(" + "3" * 5000 + ")", "at most 4000 characters"),
        ("LambdaLR(lambda: 1)", "takes one number"),
        ("LambdaLR(lambda *a: 1)", "takes one number"),
        ("LambdaLR(lambda epoch: epochs)", r"cannot use 'epochs'; did you mean epoch\?; it has epoch, numbers"),
        ("LambdaLR(lambda epoch: cos(epoch))", r"did you mean math.cos\?"),
        ("LambdaLR(lambda epoch: math.factorial(epoch))", "cannot use 'math.factorial"),
        ("LambdaLR(lambda epoch: round(epoch, -10 ** 9))", "takes 1 positional argument"),
        ("LambdaLR(lambda epoch: epoch.__class__)", "cannot use 'epoch.__class__'"),
        ("LambdaLR(lambda epoch: [epoch])", r"cannot use '\[epoch\]'"),
        ("LambdaLR(lambda epoch: 'a' * 9)", "cannot use \"'a'\""),
        ("LambdaLR(lambda epoch: max(epoch, key=abs))", "cannot use 'max"),
        ("LambdaLR(lambda epoch: 1 << epoch)", "cannot use '1 << epoch'"),
        ("LambdaLR(lambda epoch: (lambda x: x)(epoch))", "cannot use"),
        ("LambdaLR(lambda epoch: 9 ** 9 ** 9 ** 9)", "too large"),
        ("LambdaLR(lambda epoch: (2 ** 1000) * (2 ** 1000))", "a number in the lambda is too large"),
        ("LambdaLR(lambda epoch: (epoch - 8) ** 0.5)", "not a real number"),
        ("LambdaLR([lambda epoch: 1, lambda epoch: 2])", "Expected 1 lr_lambdas, but got 2"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_with_a_hint(expression: str, message: str) -> None:
    with pytest.raises((ValueError, OverflowError, TypeError), match=message):
        rates(expression)


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    schedule.add_command(parser.add_subparsers(required=True))
    args = parser.parse_args(["schedule", *arguments])
    assert args.run is schedule.run
    return schedule.run(args)


def test_the_command_previews_a_schedule(tmp_path: Path, capsys) -> None:
    """It prints, draws and logs what `simulate` says."""
    losses = tmp_path / "loss.txt"
    losses.write_text("# from the log\n\n" + "\n".join(f"{loss}  # epoch" for loss in METRICS))
    expression = "ReduceLROnPlateau(patience=2, cooldown=1)"
    files = {"--metric-file": losses, "--png": tmp_path / "new" / "out.png", "--logdir": tmp_path / "runs"}
    options = [str(item) for pair in files.items() for item in pair]
    assert command(expression, "--steps", "21", "--lr", "0.1,0.02", *options) == 0
    recipe = functools.partial(ReduceLROnPlateau, patience=2, cooldown=1)
    expected = schedule.compare({"it": recipe}, 21, METRICS, lr=[0.1, 0.02])["it"]
    assert capsys.readouterr().out == f"{expected}\n"
    logged = scalars(tmp_path / "runs")
    np.testing.assert_allclose([value for _, value in logged["lr/group1"]], expected.lr[:, 1], rtol=1e-6)
    picture = pytest.importorskip("cv2").imread(str(files["--png"]))
    assert picture.shape == (480, 900, 3)


def test_the_command_compares_several_schedules(capsys) -> None:
    assert command("StepLR(5)", "ExponentialLR(0.9)", "--steps", "9") == 0
    out = capsys.readouterr().out
    assert "StepLR(5): 9 updates of 1 group" in out
    assert "ExponentialLR(0.9): 9 updates of 1 group" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["CosineLR(5)"],
            "python -m probe schedule: error: torch has no scheduler 'CosineLR'; did you mean CosineAnnealingLR(",
        ),
        (["StepLR(0)"], "raised by step 1 of the simulated scheduler"),
        (["ConstantLR(factor=7)"], "error: Constant multiplicative factor"),
        (["OneCycleLR(0.1, total_steps=10)", "--steps", "20"], "raised by step 11"),
        (["StepLR(3)", "--steps", "0"], "error: simulate needs a positive number"),
        (["ReduceLROnPlateau()"], "takes a metric"),
        (["ReduceLROnPlateau()", "--metric-file", "absent.txt"], "No such file"),
        (["ReduceLROnPlateau()", "--metric-file", "words.txt"], "words.txt, line 2: 'many' is not a number"),
        (["StepLR(3)", "--png", "words.txt/out.png"], "error: "),
    ],
)
def test_the_command_explains_what_it_cannot_do(arguments, message, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("1\nmany\n")
    assert command(*arguments) == (1 if "--png" in arguments else 2)
    assert message in capsys.readouterr().err


def test_a_rate_that_is_no_number_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        command("StepLR(3)", "--lr", "0.1,much")
    assert "'0.1,much' is no rate, nor several such as 0.1,0.01" in capsys.readouterr().err


def test_the_command_prints_where_there_are_no_block_characters(monkeypatch, capsys) -> None:
    """As on a terminal that knows ASCII only."""
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    assert command("LinearLR(1.0, 0.1, 7)", "--steps", "8") == 0
    plain.flush()
    assert plain.buffer.getvalue().decode().splitlines()[1] == "lr group0  0.1 #*+=~-._ 0.01"


def test_importing_it_imports_no_picture_library_and_no_tensorboard() -> None:
    code = "import probe.schedule, sys; print([m for m in ('cv2', 'matplotlib', 'tensorboard') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
