"""One run of the model for an explanation: the trunk without a graph, the graph from the target layer on.

Everything that `explain` needs of a model comes from three questions: what flowed at these layers (`Run.forward`), what
are the gradients there (`Run.gradients`), and what would the score be if this layer had returned something else
(`Run.head`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from probe import select, tree
from probe.cam import layout as layouts
from probe.cam import targets
from probe.cam.layout import Layout
from probe.capture import Kind, Layer
from probe.core import Probe
from probe.hooks import Tap
from probe.session import Session

Progress = Callable[[Iterable[int], int], Iterable[int]]
"""Wraps the chunks of a long loop, given their number."""


@dataclass(frozen=True)
class At:
    """A layer, and what cannot be told from its output.

    Arguments:
        layer: its name, or the module.
        layout: how its output is laid out, where the shape does not tell.
        path: which tensor of a nested output, as ``"[0]"`` or ``".hidden"``.
    """

    layer: str | nn.Module
    layout: Layout | None = None
    path: str | None = None


@dataclass(eq=False)
class Spot:
    """A layer in one run: which call of it is meant, and what it returned there."""

    at: At
    layer: Layer
    call: int | None = None
    calls: int = 0
    value: Tensor | None = None  # its output as the layer laid it out; where the graph starts, if there is one

    @property
    def name(self) -> str:
        return self.layer.name

    def reset(self) -> None:
        self.calls, self.value = 0, None


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of the model would run as compiled code, past its hooks."""
    return any(
        module._compiled_call_impl is not None or select.wrapped_attribute(module) == "_orig_mod"
        for module in model.modules()
    )


class Run:
    """A model and the inputs that it is explained on.

    Arguments:
        model: the model.
        args, kwargs: what it is called with.
        target: what is explained.
        batch_size: rows in one forward of `head` and `masked`.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, batch_size: int):
        self.model = model
        self.args, self.kwargs = pytree.tree_map_only(Tensor, _ordinary, (args, kwargs))
        self.target = target
        self.batch_size = batch_size
        self.tensors = [tensor for _, tensor in tree.input_leaves(self.args, self.kwargs)]
        self.batch = _batch(self.args, self.tensors)
        self.every = select.layers(model)
        self.attention: list[Tensor] = []
        self.linears: list[tuple[Any, Tensor | None]] = []
        self.notes: list[str] = []
        self._trunks: dict[Spot, str] = {}
        self.output: Any = None
        self.score: targets.Score | None = None
        self.scores: Tensor | None = None

    # -- what flows ----------------------------------------------------------------------------------------------------

    def spots(self, layers: Sequence[Any], call: int | None) -> list[Spot]:
        """The layers as `Spot`, or an error with the nearest names."""
        found = []
        for layer in layers:
            at = layer if isinstance(layer, At) else At(layer)
            if not isinstance(at.layer, (str, nn.Module)):
                raise TypeError(f"a layer is a name, a module or cam.At(...), not {at.layer!r}")
            matches = select.match(self.every, at.layer)
            if len(matches) > 1:
                names = ", ".join(repr(match.name) for match in matches[:4])
                raise ValueError(
                    f"{at.layer!r} matches {len(matches)} layers ({names}, ...): give one, or a list of them"
                )
            found.append(Spot(at, matches[0], call))
        return found

    def forward(self, spots: list[Spot], *, graph: bool, whole: bool = False, watch: Sequence[Any] = ()) -> Any:
        """Run the model, keep what the spots' layers return, and with `graph` start the graph there.

        The output and the scores are kept on the run. What goes on behind a spot is a copy-on-write clone of its value,
        so that in-place operations that follow reach neither the value nor, when it is a leaf, autograd's nerves.

        Arguments:
            spots: where to look.
            graph: build a graph from the spots on.
            whole: with gradients enabled from the start, for a graph that begins at the inputs or the parameters.
            watch: more ``(module, function, kind)`` edits for this run.

        Returns:
            the model's output.
        """
        for spot in spots:
            spot.reset()
        chosen: list[Any] = [spot.layer.module for spot in spots]
        probe = Probe(self.model, *(chosen or [""]), kinds=Kind.OUTPUT, keep=0)
        if not spots:
            probe.edit("", lambda output: output)
        for spot in spots:
            probe.edit(spot.layer.module, _visitor(spot, self.batch, graph))
        for module, function, kind in watch:
            probe.edit(module, function, on=kind)
        with torch.set_grad_enabled(whole), probe:
            self.output = self.model(*self.args, **self.kwargs)
            for spot in spots:
                _check_called(spot)
        self._take_scores(graph or whole)
        return self.output

    def forward_plain(self) -> Any:
        """`forward` without looking anywhere: no hook, no graph."""
        self.output = self.model(*self.args, **self.kwargs)
        self._take_scores(False)
        return self.output

    def _take_scores(self, graph: bool) -> None:
        with torch.set_grad_enabled(graph), _full_precision(self.tensors):
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

    # -- what would be -------------------------------------------------------------------------------------------------

    def inputs(self, samples: Tensor | slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's inputs for some of the samples: whatever has the batch in front is indexed."""

        def pick(tensor: Tensor) -> Tensor:
            if tensor.dim() == 0 or len(tensor) != self.batch:
                return tensor
            return tensor[samples if isinstance(samples, slice) else samples.to(tensor.device)]

        args, kwargs = pytree.tree_map_only(Tensor, pick, (self.args, self.kwargs))
        return args, kwargs

    def image(self) -> tuple[Tensor, tuple[int, ...], bool]:
        """The input that masks are laid on: the tensor, its spatial size, and whether its channels come last.

        Raises:
            ValueError: no input has space.
        """
        for tensor in self.tensors:
            size = layouts.input_size(tensor, self.batch)
            if size and tensor.is_floating_point() and len(tensor) == self.batch:
                return tensor, size, size != tuple(tensor.shape[2:])
        raise ValueError("this method changes the input image, and no input is a float tensor [B, C, *spatial]")

    def with_image(
        self, image: Tensor, samples: Tensor | slice = slice(None)
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of `samples`, with the image replaced."""
        old, _, _ = self.image()
        args, kwargs = self.inputs(samples)
        flat, spec = pytree.tree_flatten((self.args, self.kwargs))
        new, _ = pytree.tree_flatten((args, kwargs))
        swapped = [image if before is old else after for before, after in zip(flat, new, strict=True)]
        args, kwargs = pytree.tree_unflatten(swapped, spec)
        return args, kwargs

    def masked(self, masks: Tensor, samples: Tensor) -> Any:
        """The output for the inputs of `samples` times `masks` ``[rows, *size]``."""
        image, _, last = self.image()
        rows = image[samples.to(image.device)] * masks.to(image.dtype).unsqueeze(-1 if last else 1)
        args, kwargs = self.with_image(rows, samples)
        return self.model(*args, **kwargs)

    def score_rows(
        self,
        make: Callable[[slice], Tensor],
        count: int,
        output_of: Callable[[Tensor, Tensor], Any],
        *,
        probability: bool = False,
        sample: int | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Scores of many changed rows, `batch_size` at a time: ``[B, count]``, float32.

        Arguments:
            make: makes a slice of the rows, ``[B, len(slice), ...]``.
            count: how many there are for each sample.
            output_of: the model's output for rows ``[N, ...]`` and the samples they belong to, ``[N]``.
            probability: softmax probabilities instead of scores; needs a target that is a class.
            sample: only this sample (then B is 1 in `make` and in what is returned).
            progress: wraps the chunks.
        """
        samples = torch.arange(self.batch) if sample is None else torch.tensor([sample])
        step = max(1, self.batch_size // len(samples))
        chunks: Iterable[int] = range(0, count, step)
        found = []
        for start in progress(chunks, -(-count // step)) if progress else chunks:
            block = make(slice(start, min(start + step, count)))
            index = samples.repeat(block.shape[1])
            output = output_of(block.transpose(0, 1).flatten(0, 1), index)  # whole batches, one after the other
            scores = self._row_scores(output, index, probability).detach().float()
            found.append(scores.view(block.shape[1], -1).T)
        return torch.cat(found, 1)

    def _row_scores(self, output: Any, samples: Tensor, probability: bool) -> Tensor:
        if isinstance(self.score, targets.Classes) or probability:
            return self.classes("takes probabilities").of(output, samples, probability)
        assert self.score is not None
        pieces = [rows_of(output, at, self.batch, len(samples)) for at in range(0, len(samples), self.batch)]
        scores = [checked_scores(self.score(piece), self.batch).reshape(-1) for piece in pieces]
        if any(len(each) != self.batch for each in scores):
            raise ValueError(
                f"the target returned one scalar for {self.batch} samples, and these scores are compared sample by "
                "sample: return [B] scores"
            )
        return torch.cat(scores)

    def classes(self, why: str) -> targets.Classes:
        """The score, if it is that of a class; else an error with the reason why it has to be."""
        if not isinstance(self.score, targets.Classes):
            raise ValueError(f"this method {why}: give target= as an int, a list or tensor of ints, or None")
        return self.score

    def cheapest_trunk(self, spot: Spot, axis: int) -> str:
        """How little may run before `spot` so that the scores come out right; see `head`. Found out once a run."""
        if spot not in self._trunks:
            self._trunks[spot] = self._cheapest_trunk(spot, axis)
        return self._trunks[spot]

    def _cheapest_trunk(self, spot: Spot, axis: int) -> str:
        assert spot.value is not None
        assert self.scores is not None
        assert self.score is not None
        value, known = spot.value.detach(), self.scores.detach().float().reshape(-1)
        everyone, first = torch.arange(self.batch), torch.zeros(2, dtype=torch.long)
        trials = [("empty", everyone)]
        if isinstance(self.score, targets.Classes) or self.batch == 1:
            trials.append(("one", first))
        for trunk, samples in trials:
            try:
                output = self.head(spot, value.index_select(axis, samples.to(value.device)), samples, trunk)
                if isinstance(self.score, targets.Classes):
                    scores = self.score.of(output, samples)
                else:
                    scores = checked_scores(self.score(rows_of(output, 0, self.batch, len(samples))), self.batch)
            except Exception:  # whatever a model raises on a batch it did not expect: then more of it has to run
                continue
            tolerance = 0.02 if value.dtype.itemsize == 2 or scores.dtype.itemsize == 2 else 1e-3
            expected = known[samples.to(known.device)] if len(known) == self.batch else known
            found = scores.detach().float().reshape(-1)
            if torch.allclose(found, expected[: len(found)], rtol=tolerance, atol=tolerance * float(known.abs().max())):
                return trunk
        return "all"

    def head(self, spot: Spot, value: Tensor, samples: Tensor, trunk: str) -> Any:
        """The output if `spot` had returned `value` for these samples.

        Arguments:
            spot: where.
            value: ``[rows, ...]`` as the layer lays it out, with the batch in front.
            samples: which sample each row belongs to.
            trunk: what runs before the spot. ``"empty"``: a batch of no samples, which costs nothing and is enough
                where all that reaches the output passes the spot. ``"one"``: the one sample that all rows belong to,
                whose tensors broadcast to the rows (a spot inside a residual branch). ``"all"``: every row.
        """
        first = int(samples[0])
        chosen = {"empty": slice(0, 0), "one": slice(first, first + 1)}.get(trunk, samples)
        args, kwargs = self.inputs(chosen)
        calls = 0

        def replaced(output: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls - 1 != (spot.call or 0):
                return output
            torch.set_grad_enabled(value.requires_grad)
            return swap(output, pick(output, spot, None)[1], value)

        with torch.no_grad(), _replacing(self.model, spot.layer, replaced):
            return self.model(*args, **kwargs)


@contextlib.contextmanager
def _replacing(model: nn.Module, layer: Layer, function: Callable[[Any], Any]) -> Iterator[None]:
    """Like ``Probe.edit``, which keeps shapes; here the batch that flows on is another one than came."""
    session = Session(model)
    tap = session.taps[layer] = Tap(layer, session)
    tap.edits[Kind.OUTPUT] = (function,)
    try:
        session.bind()
        yield
    finally:
        session.close()
        session.dissolve()


def _visitor(spot: Spot, batch: int, graph: bool) -> Callable[[Any], Any]:
    """The edit that notes what a layer returns, and starts the graph there."""

    def visit(output: Any) -> Any:
        spot.calls += 1
        if spot.calls - 1 != (spot.call or 0):
            return output
        _, tensor = pick(output, spot, batch)
        if not graph:
            spot.value = tree.snapshot(tensor)
            return output
        torch.set_grad_enabled(True)
        if tensor.requires_grad:
            spot.value = tensor
        else:
            kept = tensor.clone() if tensor.is_inference() else tree.snapshot(tensor)
            spot.value = None if kept is None else kept.requires_grad_()
        return swap(output, tensor, hand_on(spot.value))

    return visit


def hand_on(value: Tensor | None) -> Tensor:
    """A non-leaf with the same values that in-place operations may write to."""
    assert value is not None, "explain does not run under torch.export or a fake mode"
    try:
        return torch._lazy_clone(value)
    except (RuntimeError, NotImplementedError):
        return value.clone()


def pick(output: Any, spot: Spot | None, batch: int | None) -> tuple[str, Tensor]:
    """The tensor in a layer's output that is explained."""
    found = [(path, tensor) for path, tensor in tree.leaves(output) if tensor.is_floating_point()]
    if spot is not None and spot.at.path is not None:
        for path, tensor in found:
            if path == spot.at.path:
                return path, tensor
        raise ValueError(
            f"the output of layer {spot.name!r} has no float tensor at {spot.at.path!r}, but at {[p for p, _ in found]}"
        )
    name = "" if spot is None else spot.name
    spatial = [each for each in found if each[1].dim() > 2 and (batch is None or batch in each[1].shape[:2])] or found
    if not spatial:
        raise ValueError(f"layer {name!r} returns no float tensor; choose another layer")
    if len(spatial) > 1 and isinstance(output, dict) and type(output).__module__ in ("builtins", "collections"):
        paths = ", ".join(f"{path!r} {tuple(tensor.shape)}" for path, tensor in spatial)
        raise ValueError(
            f"layer {name!r} returns several tensors ({paths}): say which, "
            f"layer=cam.At({name!r}, path={spatial[0][0]!r})"
        )
    return spatial[0]


def swap(output: Any, old: Tensor, new: Tensor) -> Any:
    """`output` with one tensor replaced; all other objects in it stay the very same."""
    if output is old:
        return new
    if dataclasses.is_dataclass(output) and not isinstance(output, type) and not isinstance(output, dict):
        changed = copy.copy(output)
        for each in dataclasses.fields(output):
            object.__setattr__(changed, each.name, swap(getattr(output, each.name), old, new))
        return changed
    return pytree.tree_map(lambda leaf: new if leaf is old else leaf, output)


def rows_of(output: Any, start: int, count: int, total: int) -> Any:
    """Rows ``start : start + count`` of an output for `total` rows: tensors and per-sample lists are cut."""

    def is_list(value: Any) -> bool:
        return isinstance(value, list) and len(value) == total

    def cut(value: Any) -> Any:
        whole = is_list(value) or (isinstance(value, Tensor) and value.dim() and len(value) == total)
        return value[start : start + count] if whole else value

    return pytree.tree_map(cut, output, is_leaf=is_list)


def _check_called(spot: Spot) -> None:
    if not spot.calls:
        raise ValueError(
            f"layer {spot.name!r} was not called in this forward: the model skips it, calls its .forward directly, or "
            "uses its weights in a function (nn.MultiheadAttention's out_proj); choose its parent or another layer"
        )
    if spot.call is None and spot.calls > 1:
        raise ValueError(
            f"layer {spot.name!r} was called {spot.calls} times in this forward: say which call to explain, "
            f"call=0 to call={spot.calls - 1}"
        )
    if spot.value is None:
        raise ValueError(
            f"call={spot.call} of layer {spot.name!r}: it was called {spot.calls} times, 0 to {spot.calls - 1}"
        )


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


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd can work with: inference tensors are copied."""
    return tensor.clone() if tensor.is_inference() else tensor


def _batch(args: tuple[Any, ...], tensors: list[Tensor]) -> int:
    if args and isinstance(args[0], (list, tuple)) and args[0] and all(isinstance(x, Tensor) for x in args[0]):
        return len(args[0])  # a list of images, as detectors take them
    for tensor in tensors:
        if tensor.dim():
            return len(tensor)
    raise ValueError("explain needs the model's inputs: explain(model, images, ...), with the batch as first dimension")


@contextlib.contextmanager
def _full_precision(tensors: list[Tensor]) -> Iterator[None]:
    """No autocast: scores and their sums are taken in the precision that the model returned."""
    with contextlib.ExitStack() as stack:
        for device in {"cpu", *(tensor.device.type for tensor in tensors)}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
