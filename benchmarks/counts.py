"""What can be counted in one step, and so is the same on every machine: hooks, calls, allocations, bytes, transfers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from probe import sketch

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")  # of a copying thread's events: none


class Counts(NamedTuple):
    """What one step did.

    Arguments:
        hooks: on modules, while it is attached.
        python_calls: of Python functions, during the step.
        allocations: of tensors' memory.
        held: bytes that were allocated in the step and not freed in it.
        peak: the most bytes that the step held at once, beyond what there was before.
        transfers: from the device to the host. On the CPU: calls that would copy to the host, or wait for the device,
            if the model were on one (`sketch.fetch`, ``.item()``, ``.cpu()``, ``if tensor:``).
        waits: of the training thread for the device; on the CPU 0.
    """

    hooks: int
    python_calls: int
    allocations: int
    held: int
    peak: int
    transfers: int
    waits: int

    def __sub__(self, other: Counts) -> Counts:  # type: ignore[override]
        return Counts(*(a - b for a, b in zip(self, other, strict=True)))


def count(model: nn.Module, step: Callable[[], object], device: str) -> Counts:
    """The counts of a step. It is run four times; what is held is what the first run leaves."""
    allocations, held, peak = _memory(step, device)
    transfers, waits = _transfers(step, device)
    step()  # a compiled one may have compiled itself anew for what counts the transfers
    return Counts(hooks(model), python_calls(step), allocations, held, peak, transfers, waits)


def hooks(model: nn.Module) -> int:
    """How many hooks there are on the model's modules."""
    return sum(len(getattr(module, key)) for module in model.modules() for key in _HOOKS)


def python_calls(run: Callable[[], object]) -> int:
    """How many Python functions are called in this thread while `run` runs."""
    calls = 0

    def profiler(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(profiler)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


def _memory(run: Callable[[], object], device: str) -> tuple[int, int, int]:
    """Allocations, bytes held, peak bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, count = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
        run()
        torch.cuda.synchronize()
        count = torch.cuda.memory_stats()["allocation.all.allocated"] - count
        return count, torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    with _profile(device, memory=True) as prof:
        run()
    live: dict[int, int] = {}
    count = peak = 0
    for block in _allocations(prof):
        if block.alloc_size > 0:
            live[block.ptr] = block.alloc_size
            count += 1
            peak = max(peak, sum(live.values()))
        else:  # also of blocks from before, whose size the profiler may have wrong
            live.pop(block.ptr, None)
    return count, sum(live.values()), peak


def _transfers(run: Callable[[], object], device: str) -> tuple[int, int]:
    """Transfers to the host, and waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
        with _profile(device) as prof:
            run()
        names = Counter(event.name() for event in prof.profiler.kineto_results.events())
        return sum(n for name, n in names.items() if "Memcpy DtoH" in name), sum(names[name] for name in _WAITS)
    found = _ToHost()
    fetch = sketch.fetch

    def counted(values: Any) -> sketch.Fetch:
        values = list(values)
        found.count += any(isinstance(value, (sketch.Sketch, torch.Tensor)) for value in values)
        return fetch(values)

    with mock.patch.object(sketch, "fetch", counted), found:
        run()
    return found.count, 0


class _ToHost(TorchFunctionMode):
    """Counts calls that copy to the host where the tensor is on a device."""

    _NAMES = ("cpu", "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__contains__", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        moved = name == "to" and any(
            each == "cpu" for each in (*args[1:], *(kwargs or {}).values()) if type(each) is str
        )
        self.count += moved or name in self._NAMES
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _profile(device: str, memory: bool = False) -> Iterator[profile]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with _silenced(), profile(activities=activities, profile_memory=memory, acc_events=True) as prof:
        yield prof


def _allocations(prof: profile) -> list[Any]:
    """What was allocated and freed, in order of time: ``ptr``, and ``alloc_size`` in bytes, negative where freed."""
    pending = list(prof.profiler.kineto_results.experimental_event_tree())
    found = []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation:
            found.append(event)
    return [event.extra_fields for event in sorted(found, key=lambda event: event.start_time_ns)]


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """No stderr: where there is no GPU the profiler's C++ complains about that each time."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
