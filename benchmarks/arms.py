"""The arms of `benchmarks.overhead`: ways to look into a step, from an empty hook to everything in TensorBoard."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.work import Work
from probe import Board, Kind, Probe, cam, histogram, stats
from probe.cam.explain import fixed_layer


class Attached(NamedTuple):
    """What is run while an arm is attached: `step` again and again, and `finish` once at the end of a measurement."""

    step: Callable[[], object]
    finish: Callable[[], object] = lambda: None


Attach = Callable[[Work, int], AbstractContextManager[Attached]]


class Arm(NamedTuple):
    """One way to look into a step.

    Arguments:
        name: how it is chosen and shown.
        what: one line for a reader.
        attach: from the work, and every how many steps, to a context manager around what is run.
        modes: in which it makes sense.
        logs: whether it observes only every n-th step.
        compiled: whether it makes sense for compiled models only.
        against: what else it is measured against, beside the bare model.
    """

    name: str
    what: str
    attach: Attach
    modes: tuple[str, ...] = ("forward", "train")
    logs: bool = False
    compiled: bool = False
    against: tuple[str, ...] = ()


# -- by hand -----------------------------------------------------------------------------------------------------------


def bare(work: Work, every: int = 1) -> AbstractContextManager[Attached]:
    """Nothing attached."""
    return contextlib.nullcontext(Attached(work.step))


def _by_hand(keep: Callable[[torch.Tensor], Any] | None) -> Attach:
    """A forward hook on every leaf; it stores what `keep` makes of the output, or does nothing."""

    @contextlib.contextmanager
    def attach(work: Work, every: int) -> Iterator[Attached]:
        held: dict[str, Any] = {}

        def keeper(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor):
                    held[name] = keep(output)  # type: ignore[misc]

            return hook

        def empty(module: nn.Module, args: Any, output: Any) -> None:
            pass

        with contextlib.ExitStack() as stack:
            for name, module in work.model.named_modules():
                if not any(True for _ in module.children()):
                    stack.enter_context(module.register_forward_hook(empty if keep is None else keeper(name)))
            yield Attached(work.step)

    return attach


def _reference(output: torch.Tensor) -> torch.Tensor:
    return output


def _clone(output: torch.Tensor) -> torch.Tensor:
    return output.detach().clone()


def _to_host(output: torch.Tensor) -> torch.Tensor:
    return output.detach().to("cpu", copy=True)


@contextlib.contextmanager
def _full_backward(work: Work, every: int) -> Iterator[Attached]:
    held: dict[str, Any] = {}

    def keeper(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
            held[name] = grad_input, grad_output

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in work.model.named_modules():
            if not any(True for _ in module.children()):
                stack.enter_context(module.register_full_backward_hook(keeper(name)))
        yield Attached(work.step)


# -- by probe ----------------------------------------------------------------------------------------------------------


def _probe(kinds: Kind) -> Attach:
    @contextlib.contextmanager
    def attach(work: Work, every: int) -> Iterator[Attached]:
        with Probe(work.called, kinds=kinds):
            yield Attached(work.step)

    return attach


@contextlib.contextmanager
def _left(work: Work, every: int) -> Iterator[Attached]:
    with Probe(work.called):
        work.step()
    yield Attached(work.step)


def _log(*summaries: Any, everything: bool = False, compiled: str = "auto") -> Attach:
    """Log outputs and (in training) their gradients; `everything`: parameters, their gradients and updates as well."""

    @contextlib.contextmanager
    def attach(work: Work, every: int) -> Iterator[Attached]:
        optimizer = work.optimizer if everything else None
        kinds = Kind.OUTPUT if work.optimizer is None else Kind.OUTPUT | Kind.GRAD_OUTPUT
        with (
            tempfile.TemporaryDirectory() as folder,
            Board(folder) as board,
            Probe(work.called, optimizer=optimizer, compiled=compiled) as p,
        ):
            p.log(board, *summaries, every=every, kinds=None if everything else kinds)

            def step() -> None:
                work.step()
                if optimizer is None:
                    p.step()

            yield Attached(step, board.flush)

    return attach


@contextlib.contextmanager
def _grad_cam(work: Work, every: int) -> Iterator[Attached]:
    if not (isinstance(work.inputs, torch.Tensor) and work.inputs.dim() == 4):
        raise TypeError("Grad-CAM is measured on pictures [B, C, H, W]")
    layer = fixed_layer(work.model, work.inputs, None, 0)  # found once, as by who explains more than one batch
    yield Attached(lambda: cam.explain(work.model, work.inputs, layer=layer, target=0))


ARMS = (
    Arm("bare", "the model itself, a copy: what is told apart from it beyond this row's quartiles is no noise", bare),
    Arm("empty hook", "a forward hook that does nothing on every leaf module", _by_hand(None)),
    Arm(
        "reference",
        "a forward hook that stores the output: the limit; wrong after in-place operations",
        _by_hand(_reference),
    ),
    Arm("clone", "a forward hook that stores a clone", _by_hand(_clone)),
    Arm("to host", "a forward hook that stores a copy on the host, and waits for it", _by_hand(_to_host)),
    Arm("full backward", "torch's register_full_backward_hook, references stored", _full_backward, ("train",)),
    Arm("output", "Probe(kinds=Kind.OUTPUT): copy-on-write", _probe(Kind.OUTPUT), against=("reference",)),
    Arm("input", "Probe(kinds=Kind.INPUT)", _probe(Kind.INPUT)),
    Arm("grad_output", "Probe(kinds=Kind.GRAD_OUTPUT)", _probe(Kind.GRAD_OUTPUT), ("train",)),
    Arm("grad_input", "Probe(kinds=Kind.GRAD_INPUT)", _probe(Kind.GRAD_INPUT), ("train",)),
    Arm(
        "all but grad_input",
        "Probe without grad_input",
        _probe(Kind.INPUT | Kind.OUTPUT | Kind.GRAD_OUTPUT),
        ("train",),
    ),
    Arm("all four", "Probe(model)", _probe(Kind.all()), ("train",)),
    Arm("after a probe", "the model once Probe(model) has left it", _left),
    Arm("stats", "p.log(board, stats): outputs, and their gradients in training", _log(stats), logs=True),
    Arm("stats+histogram", "the same with histograms", _log(stats, histogram), logs=True),
    Arm(
        "full log",
        "p.log(board, stats, histogram) with the optimizer: parameters, their gradients and updates too",
        _log(stats, histogram, everything=True),
        ("train",),
        logs=True,
    ),
    Arm(
        "inside",
        'stats+histogram from inside the compiled graph, Probe(..., compiled="inside"), where "auto" runs eagerly',
        _log(stats, histogram, compiled="inside"),
        logs=True,
        compiled=True,
    ),
    Arm("Grad-CAM", "cam.explain in place of a forward; models of pictures", _grad_cam, ("forward",)),
)
