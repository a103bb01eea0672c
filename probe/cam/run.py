"""One run of the model for an explanation: the trunk without a graph, the graph from the target layer on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probe import select
from probe.cam import targets
from probe.cam.inputs import Inputs
from probe.cam.spot import At, Spot, check_called, visitor
from probe.hooks import hookable, on_output
from probe.tree import full_precision


class Run:
    """A model and the inputs that it is explained on: what flows at a layer (`forward`), its gradients (`gradients`).

    Arguments:
        model: the model.
        args, kwargs: what it is called with.
        target: what is explained.
        batch_size: rows in one forward of what `probe.cam.perturb` makes of it.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, batch_size: int):
        self.model = model
        self.inputs = Inputs(args, kwargs)
        self.batch = self.inputs.batch
        self.target = target
        self.batch_size = batch_size
        self.every = select.layers(model)
        self.attention: list[Tensor] = []
        self.linears: list[tuple[Any, Tensor | None]] = []
        self.notes: list[str] = []
        self.trunks: dict[Spot, str] = {}
        self.output: Any = None
        self.score: targets.Score | None = None
        self.scores: Tensor | None = None

    def spots(self, layers: Sequence[Any], call: int | None) -> list[Spot]:
        """The layers as `Spot`, or an error with the nearest names."""
        found = []
        for layer in layers:
            at = layer if isinstance(layer, At) else At(layer)
            if not isinstance(at.layer, (str, nn.Module)):
                raise TypeError(f"a layer is a name, a module or cam.At(...), not {at.layer!r}")
            matches = hookable(select.match(self.every, at.layer))
            if len(matches) > 1:
                names = ", ".join(repr(match.name) for match in matches[:4])
                raise ValueError(
                    f"{at.layer!r} matches {len(matches)} layers ({names}, ...): give one, or a list of them"
                )
            found.append(Spot(at, matches[0], call))
        return found

    def forward(
        self, spots: list[Spot], *, graph: bool, whole: bool = False, watch: Sequence[Callable[[], Any]] = ()
    ) -> Any:
        """Run the model, keep what the spots' layers return, and with `graph` start the graph there.

        The output and the scores are kept on the run. What goes on behind a spot is a copy-on-write clone of its value,
        so that in-place operations that follow reach neither the value nor, when it is a leaf, autograd's nerves.

        Arguments:
            spots: where to look.
            graph: build a graph from the spots on.
            whole: with gradients enabled from the start, for a graph that begins at the inputs or the parameters.
            watch: put more hooks on for this run, and return the handle.

        Returns:
            the model's output.
        """
        with torch.set_grad_enabled(whole), contextlib.ExitStack() as handles:
            for spot in spots:
                spot.reset()
                handles.enter_context(on_output(spot.layer.module, visitor(spot, self.batch, graph)))
            for hook in watch:
                handles.enter_context(hook())
            self.output = self.model(*self.inputs.args, **self.inputs.kwargs)
        for spot in spots:
            check_called(spot)
        self._take_scores(graph or whole)
        return self.output

    def forward_plain(self) -> Any:
        """`forward` without looking anywhere: no hook, no graph."""
        self.output = self.model(*self.inputs.args, **self.inputs.kwargs)
        self._take_scores(False)
        return self.output

    def _take_scores(self, graph: bool) -> None:
        devices = {"cpu", *(tensor.device.type for tensor in self.inputs.tensors)}
        with torch.set_grad_enabled(graph), full_precision(devices):  # of what the model returned
            if self.score is None:
                self.score = targets.resolve(self.target, self.output, self.batch)
            self.scores = checked_scores(self.score(self.output), self.batch)

    def gradients(
        self, spots: list[Spot], score: Tensor | None = None, *, keep: bool = False, create: bool = False
    ) -> list[Tensor]:
        """∂score/∂value at every spot of the last `forward` with a graph.

        Raises:
            ValueError: the score does not depend on a spot.
        """
        values = [spot.value for spot in spots if spot.value is not None]
        scores = self.scores if score is None else score
        assert scores is not None
        found: Sequence[Tensor | None] = [None] * len(values)
        if scores.requires_grad:
            with torch.enable_grad():
                total = scores.float().sum() if scores.dtype != torch.float64 else scores.sum()
                found = torch.autograd.grad(
                    total, values, retain_graph=keep or create, create_graph=create, allow_unused=True
                )
        for spot, gradient in zip(spots, found, strict=True):
            if gradient is None:
                raise ValueError(
                    f"the score does not depend on layer {spot.name!r}: its output is not used, or the way from it to "
                    "the output is cut (detach, no_grad, inference_mode, argmax); choose a layer nearer to the output"
                )
        return [gradient for gradient in found if gradient is not None]

    def graph(self, spots: list[Spot]) -> None:
        """`forward` with a graph from the spots on; from the start, where the model itself switches gradients off."""
        self.forward(spots, graph=True)
        if self.scores is not None and not self.scores.requires_grad:
            self.forward(spots, graph=True, whole=True)

    def like(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        """The same explanation, of the same scores, for other inputs."""
        other = Run(self.model, args, kwargs, self.target, self.batch_size)
        other.score = self.score
        return other

    def classes(self, why: str) -> targets.Classes:
        """The score, if it is that of a class; else an error with the reason why it has to be."""
        if not isinstance(self.score, targets.Classes):
            raise ValueError(f"this method {why}: give target= as an int, a list or tensor of ints, or None")
        return self.score


def checked_scores(scores: Any, batch: int) -> Tensor:
    """What a target returned, if it is ``[B]`` scores or a scalar.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"a target function returns a tensor of [B] scores or a scalar, not {type(scores).__name__}")
    if scores.dim() == 0 or tuple(scores.shape) == (1,) or tuple(scores.shape) == (batch,):
        return scores
    raise ValueError(
        f"a target function returns one score a sample, [{batch}], or a scalar; this one returned {tuple(scores.shape)}"
    )
