"""`simulate`: what a scheduler will do, ahead of time, exactly and without touching anything."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import SGD, Optimizer

from probe.schedule.expression import parse
from probe.schedule.log import Log, updates_made
from probe.schedule.trace import Comparison, Trace

Advance = Callable[[Any, int], object]

# How the argument that a step() cannot do without is called when it is a time. Under any other name it is a metric.
_TIMES = {"epoch", "step", "steps", "t", "iteration", "num_updates", "num_steps", "current_step", "global_step"}
_METRICS = {"metric", "metrics"}


def simulate(
    scheduler: Any,
    steps: int,
    metrics: Iterable[Any] | None = None,
    *,
    optimizer: Optimizer | None = None,
    advance: Advance | None = None,
) -> Trace:
    """Trace the next `steps` updates of a schedule without making them.

    A copy of the scheduler runs against a stand-in for its optimizer: the same class and hyper-parameters, no
    parameters, a ``step`` that does nothing. The numbers come from the scheduler's own arithmetic, so they are those of
    the training loop to the last bit, and nothing of the caller's changes, the random generators included. No
    parameter is copied. The scheduler may have been stepped before: row 0 is the current rate.

    The scheduler is anything with a ``step()`` that sets hyper-parameters of an optimizer: torch's, those of
    transformers and timm, your own. It is stepped after every update but the last.

    What a copy cannot see through: a function that closes over the real optimizer goes on to read and write that one,
    and a schedule that depends on parameters or gradients finds none.

    Arguments:
        scheduler: the scheduler, which `copy.deepcopy` must be able to copy.
        steps: how many updates.
        metrics: for schedulers that take a metric (`ReduceLROnPlateau`): ``metrics[i]`` goes to the step after
            update i. Others ignore it.
        optimizer: the optimizer to trace, where the scheduler holds none, or several.
        advance: how to step, a function of the scheduler (the copy) and i, called after update i. By default that is
            ``scheduler.step()``, or ``step(metrics[i])`` if it needs a metric, or ``step(i + 1)`` if it needs a time;
            for timm's also ``step_update(i + 1)``.

    Returns:
        The trace that a `Recorder` would give after the real updates.

    Raises:
        ValueError: `steps` is not positive, or there are not enough metrics.
        TypeError: there is no ``step()``, no way to know how to call it, or no optimizer to be found.
        Exception: whatever the scheduler itself raises, with a note that tells at which step.
    """
    if not hasattr(steps, "__index__") or steps < 1:
        raise ValueError(f"simulate needs a positive number of steps, not {steps!r}")
    if not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"simulate takes a scheduler, something with a step(), not a {type(scheduler).__name__}")
    held = _optimizers(scheduler)
    if optimizer is None:
        if len(held) != 1:
            raise TypeError(
                f"this {type(scheduler).__name__} holds {len(held) or 'no'} optimizers: say which one to trace, "
                "simulate(scheduler, steps, optimizer=...)"
            )
        optimizer = held[0]
    if advance is None:
        advance = _way_to_step(scheduler, steps, None if metrics is None else list(metrics))

    memo: dict[int, Any] = {}
    for one in {id(one): one for one in [*held, optimizer]}.values():
        _shadow(one, memo)
    shadow = memo[id(optimizer)]
    with _random_state_kept():
        double = _copy(scheduler, memo)
        log = Log(shadow, start=int(updates_made(optimizer)))
        for update in range(steps):
            log.before(shadow)
            log.after(shadow)
            if update < steps - 1:
                try:
                    advance(double, update)
                except Exception as error:
                    error.add_note(f"raised by step {update + 1} of the simulated scheduler, after update {update}")
                    raise
    trace = log.trace()
    trace.events[:0] = _moved_by_others(scheduler, trace)
    return trace


def compare(
    schedules: Mapping[str, Any],
    steps: int,
    metrics: Iterable[Any] | None = None,
    *,
    lr: float | Sequence[float] = 0.1,
) -> Comparison:
    """Simulate several schedules, to print them or to draw them in one chart.

    Give each scheduler an optimizer of its own: merely to make a scheduler moves the rate of its optimizer. Or give
    recipes instead, and each gets one: ``compare({"step": lambda optimizer: StepLR(optimizer, 50)}, 200)``.

    Arguments:
        schedules: name -> a scheduler; or a function of an optimizer that makes one; or an expression for `parse`,
            ``"StepLR(50)"``; or a finished `Trace`.
        steps: how many updates.
        metrics: as for `simulate`, for every schedule that takes a metric.
        lr: the base rate for recipes and expressions, or one for each of several groups.

    Returns:
        Name -> trace.
    """
    given = None if metrics is None else list(metrics)
    traces = Comparison()
    for name, item in schedules.items():
        recipe = parse(item) if isinstance(item, str) else item
        if isinstance(recipe, Trace):
            traces[name] = recipe
        elif hasattr(recipe, "step") or not callable(recipe):
            traces[name] = simulate(recipe, steps, given)
        else:
            traces[name] = simulate(recipe(blank_optimizer(lr)), steps, given)
    return traces


def blank_optimizer(lr: float | Sequence[float]) -> Optimizer:
    """An SGD with momentum 0.9 (which some schedulers move) over nothing of interest, one group for each rate."""
    rates = [lr] if isinstance(lr, int | float) else list(lr)
    return SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in rates], lr=rates[0], momentum=0.9)


def _optimizers(scheduler: Any) -> list[Optimizer]:
    """The optimizers that a scheduler holds, itself or in the schedulers that it holds."""
    found: dict[int, Optimizer] = {}
    seen: set[int] = set()
    ahead: list[Any] = [scheduler]
    while ahead:
        item = ahead.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Optimizer):
            found[id(item)] = item
        elif isinstance(item, list | tuple):
            ahead.extend(item)
        elif isinstance(item, dict):
            ahead.extend(item.values())
        elif hasattr(item, "step") and hasattr(item, "__dict__"):
            ahead.extend(vars(item).values())
    return list(found.values())


def _no_step(*_: object, **__: object) -> None:
    """Stands in for an optimizer's step, marked like a step that a scheduler has wrapped."""


_no_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _shadow(optimizer: Optimizer, memo: dict[int, Any]) -> None:
    """Make a stand-in for `optimizer`, and have `memo` hand it out in place of it and of its groups."""
    kind = type(optimizer)
    if isinstance(inspect.getattr_static(kind, "param_groups", None), property):
        kind = Optimizer  # a wrapper, which would go and ask the optimizer that it wraps
    shadow: Optimizer = object.__new__(kind)
    memo[id(optimizer)] = shadow
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parameters: list[Any] = []
        memo[id(group["params"])] = parameters
        # A tensor is cloned because deepcopy refuses one that has a history.
        rest = {
            key: value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value, memo)
            for key, value in group.items()
            if key != "params"
        }
        groups.append({"params": parameters, **rest})
        memo[id(group)] = groups[-1]
    state: defaultdict[Any, Any] = defaultdict(dict)
    memo[id(optimizer.state)] = state
    plain = {key: value for key, value in vars(optimizer).items() if isinstance(value, bool | int | float | str)}
    defaults = dict(optimizer.defaults)
    Optimizer.__setstate__(shadow, {**plain, "defaults": defaults, "state": state, "param_groups": groups})
    vars(shadow).update(step=_no_step, _opt_called=True)


def _copy(scheduler: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(scheduler, memo)
    except Exception as error:
        error.add_note(f"simulate runs a copy, and copy.deepcopy cannot copy this {type(scheduler).__name__}")
        raise


def _way_to_step(scheduler: Any, steps: int, metrics: list[Any] | None) -> Advance:
    """How this scheduler wants its ``step`` called: with nothing, a time, a metric."""
    name = type(scheduler).__name__
    parameters = [
        parameter
        for parameter in inspect.signature(scheduler.step).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if len(needed) > 1:
        raise TypeError(
            f"{name}.step() needs {', '.join(needed)}: say how to call it, "
            "simulate(scheduler, steps, advance=lambda scheduler, i: scheduler.step(...))"
        )
    timed = bool(needed) and needed[0] in _TIMES
    measured = bool(needed) and not timed
    option = next((one.name for one in parameters if one.name in _METRICS and one.name not in needed), None)
    given = metrics or []
    if (measured or (option and metrics is not None)) and len(given) < steps - 1:
        raise ValueError(
            f"{name}.step() takes a metric: {steps} updates need {steps - 1} of them in metrics=, not {len(given)}; "
            "metrics[i] goes to the step after update i"
        )

    def advance(double: Any, update: int) -> None:
        arguments = [update + 1] if timed else [given[update]] if measured else []
        options = {option: given[update]} if option and metrics is not None else {}
        double.step(*arguments, **options)
        if hasattr(double, "step_update"):  # timm: one of the two does nothing, depending on t_in_epochs
            double.step_update(update + 1, **options)

    return advance


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Schedulers with noise draw from the global generators; the training run shall draw what it would have drawn."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def _moved_by_others(scheduler: Any, trace: Trace) -> list[str]:
    """A rate that is not what this scheduler last set, as happens when schedulers share an optimizer."""
    left = getattr(scheduler, "_last_lr", None)
    if not isinstance(left, list) or len(left) != len(trace.names):
        return []
    return [
        f"{name}: the rate is {now:.4g} where this scheduler left {float(before):.4g}: something else has set it since"
        for name, now, before in zip(trace.names, trace.lr[0].tolist(), left, strict=True)
        if now == now and now != float(before)
    ]
