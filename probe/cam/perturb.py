"""What the scores would be if the input, or what a layer returns, were another one: many rows, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from probe.cam import targets
from probe.cam.methods.score import Rows
from probe.cam.run import Run, checked_scores
from probe.cam.spot import Spot, pick, swap
from probe.hooks import on_output

Progress = Callable[[Iterable[int], int], Iterable[int]]
"""Wraps the chunks of a long loop, given their number."""


def score_rows(
    run: Run,
    make: Rows,
    count: int,
    output_of: Callable[[Tensor, Tensor], Any],
    *,
    probability: bool = False,
    sample: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Scores of many changed rows, the run's `batch_size` at a time: ``[B, count]``, float32.

    Arguments:
        run: says what is explained.
        make: makes a slice of the rows, ``[B, len(slice), ...]``.
        count: how many there are for each sample.
        output_of: the model's output for rows ``[N, ...]`` and the samples they belong to, ``[N]``.
        probability: softmax probabilities instead of scores; needs a target that is a class.
        sample: only this sample (then B is 1 in `make` and in what is returned).
        progress: wraps the chunks.
    """
    samples = torch.arange(run.batch) if sample is None else torch.tensor([sample])
    step = max(1, run.batch_size // len(samples))
    chunks: Iterable[int] = range(0, count, step)

    def scores_of(rows: slice) -> Tensor:  # a function of its own: of one chunk nothing is left when the next one runs
        block = make(rows).transpose(0, 1).flatten(0, 1)  # whole batches, one after the other
        index = samples.repeat(len(block) // len(samples))
        scores = _scores(run, output_of(block, index), index, probability).detach().float()
        return scores.view(-1, len(samples)).T

    if progress:
        chunks = progress(chunks, -(-count // step))
    return torch.cat([scores_of(slice(start, min(start + step, count))) for start in chunks], 1)


def _scores(run: Run, output: Any, samples: Tensor, probability: bool) -> Tensor:
    if isinstance(run.score, targets.Classes) or probability:
        return run.classes("takes probabilities").of(output, samples, probability)
    assert run.score is not None
    pieces = [_rows_of(output, at, run.batch, len(samples)) for at in range(0, len(samples), run.batch)]
    scores = [checked_scores(run.score(piece), run.batch).reshape(-1) for piece in pieces]
    if any(len(each) != run.batch for each in scores):
        raise ValueError(
            f"the target returned one scalar for {run.batch} samples, and these scores are compared sample by sample: "
            "return [B] scores"
        )
    return torch.cat(scores)


def _rows_of(output: Any, start: int, count: int, total: int) -> Any:
    """Rows ``start : start + count`` of an output for `total` rows: tensors and per-sample lists are cut."""

    def is_list(value: Any) -> bool:
        return isinstance(value, list) and len(value) == total

    def cut(value: Any) -> Any:
        whole = is_list(value) or (isinstance(value, Tensor) and value.dim() and len(value) == total)
        return value[start : start + count] if whole else value

    return pytree.tree_map(cut, output, is_leaf=is_list)


def masked(run: Run, masks: Rows, sample: int | None) -> Rows:
    """The image, or that of one sample, times each of `masks`: ``[B, len(slice), ...]``."""
    image, _, last = run.inputs.image()
    image = (image if sample is None else image[sample : sample + 1]).unsqueeze(1)
    return lambda rows: image * masks(rows).to(image.dtype).unsqueeze(-1 if last else 2)


def pictured(run: Run, images: Tensor, samples: Tensor) -> Any:
    """The output for other images, and what else the model is given for these samples."""
    args, kwargs = run.inputs.with_image(images, samples)
    return run.model(*args, **kwargs)


def replaced(run: Run, spot: Spot, value: Tensor, samples: Tensor, trunk: str) -> Any:
    """The output if `spot` had returned `value` for these samples.

    Arguments:
        run: has been forwarded.
        spot: where.
        value: ``[rows, ...]`` as the layer lays it out, with the batch in front.
        samples: which sample each row belongs to.
        trunk: what runs before the spot. ``"empty"``: a batch of no samples, which costs nothing and is enough where
            all that reaches the output passes the spot. ``"one"``: the one sample that all rows belong to, whose
            tensors broadcast to the rows (a spot inside a residual branch). ``"all"``: every row.
    """
    first = int(samples[0])
    chosen = {"empty": slice(0, 0), "one": slice(first, first + 1)}.get(trunk, samples)
    args, kwargs = run.inputs.of(chosen)
    calls = 0

    def replace(module: nn.Module, given: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls - 1 != (spot.call or 0):
            return output
        torch.set_grad_enabled(value.requires_grad)
        return swap(output, pick(output, spot, None)[1], value)

    with torch.no_grad(), on_output(spot.layer.module, replace):
        return run.model(*args, **kwargs)


def cheapest_trunk(run: Run, spot: Spot, axis: int) -> str:
    """How little may run before `spot` so that the scores come out right; see `replaced`. Found out once a run.

    Arguments:
        axis: the batch's, of what the spot returned.
    """
    if spot not in run.trunks:
        run.trunks[spot] = _cheapest_trunk(run, spot, axis)
    return run.trunks[spot]


def _cheapest_trunk(run: Run, spot: Spot, axis: int) -> str:
    assert spot.value is not None
    assert run.scores is not None
    value, known = spot.value.detach(), run.scores.detach().float().reshape(-1)
    everyone, first = torch.arange(run.batch), torch.zeros(2, dtype=torch.long)
    by_class = isinstance(run.score, targets.Classes)
    trials = [("empty", everyone), *([("one", first)] if by_class or run.batch == 1 else [])]
    for trunk, samples in trials:
        try:
            output = replaced(run, spot, value.index_select(axis, samples.to(value.device)), samples, trunk)
            scores = _scores(run, output, samples, False)
        except Exception:  # whatever a model raises on a batch it did not expect: then more of it has to run
            continue
        tolerance = 0.02 if value.dtype.itemsize == 2 or scores.dtype.itemsize == 2 else 1e-3
        expected = known[samples.to(known.device)] if len(known) == run.batch else known
        found = scores.detach().float().reshape(-1)
        if torch.allclose(found, expected[: len(found)], rtol=tolerance, atol=tolerance * float(known.abs().max())):
            return trunk
    return "all"
