"""`Log`: on every n-th step it feeds summaries, merges what they yield, and hands all of it to a writer at once."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from probe import merge, ranks
from probe.cache import StepCache
from probe.calls import Call, Pass, Receiver
from probe.capture import Capture, Embedding, Histogram, Image, Kind, Layer, ParameterKind, Scalar, Statistics, Summary
from probe.hooks import after_backward
from probe.observers import Joint, quiet, tensor_taker
from probe.ranks import Addend, Norm, Part
from probe.sketch import Sketch, square_sums
from probe.summary import curves, draw_all, drawing, forget_drawn
from probe.tally import Tally, described
from probe.tree import snapshot, storage_of

if TYPE_CHECKING:
    from probe.schedule import Recorder


Late = tuple[Capture, list[Summary], str, str, Addend]
"""An addend, and what is to be done with the sum: the arguments of `Log._summarise`."""


OfParameter = tuple[torch.Tensor, Capture, Part | Addend]
"""A parameter, its gradient or its update, as it is and as it is captured, and what this rank has of it."""


class Parameters:
    """The parameters of some layers and of what is below them, with their names and owners."""

    def __init__(self, every: Sequence[Layer], layers: Sequence[Layer], optimizers: Sequence[Any]) -> None:
        below = {id(module) for layer in layers for module in layer.module.modules()}
        self.optimizers = optimizers
        self.found: dict[int, tuple[str, torch.Tensor, type, int]] = {}
        for layer in every:
            if id(layer.module) not in below:
                continue
            for key, parameter in layer.module.named_parameters(recurse=False):
                if id(parameter) not in self.found:
                    name = f"{layer.name}.{key}" if layer.name else key
                    groups = int(getattr(layer.module, "groups", 1))
                    self.found[id(parameter)] = (name, parameter, layer.module_type, groups)

    def updated(self) -> dict[int, torch.Tensor]:
        """Those that have values: where there are optimizers, what is in their groups now."""
        own = {id(p) for each in self.optimizers for p in updated_by(each)}
        found = {key: parameter for key, (_, parameter, _, _) in self.found.items() if not is_lazy(parameter)}
        return {key: parameter for key, parameter in found.items() if key in own or not self.optimizers}


def updated_by(optimizer: Any) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class Log(Receiver):
    """Receives captures on observed steps, runs summaries on them, and sends their items off at the end of the step.

    On an observed step nothing waits for a device: summaries leave sketches and 0-dim tensors there, which cross to the
    host in one copy when the step ends. A `Board` then writes them in its background thread; any other
    ``SummaryWriter`` gets them at once. Where there are several ranks, the step is merged over them before.

    Arguments:
        writer: a `Board`, or any ``torch.utils.tensorboard.SummaryWriter``.
        wanted: for each kind of capture the summaries that get it.
        every: steps with ``step % every == 0`` are observed.
        layers: whose activations.
        parameters: whose values, gradients and updates.
        on_error: ``"raise"``, or ``"warn"``: a summary that raises is named once and not asked again.
        recorder: of the optimizers' rates; None where there are none.
        scaler: the GradScaler in whose units gradients are before the optimizer's step.
        cache: shared by the receivers of the probe.
        told: shared by the logs of one writer: of each optimizer the last steps whose rates and norms were written.
        per_rank: write what this rank saw, as a run of its own.
    """

    def __init__(
        self,
        writer: Any,
        wanted: dict[Kind | ParameterKind, list[Summary]],
        *,
        every: int,
        layers: Sequence[Layer],
        parameters: Parameters,
        cache: StepCache,
        on_error: str,
        recorder: Recorder | None = None,
        scaler: Any = None,
        told: dict[Any, int] | None = None,
        per_rank: bool = False,
    ) -> None:
        self.writer = writer
        self.every = every
        self.on_error = on_error
        self._wanted = wanted
        self._layers = set(layers)
        self._recorder = recorder
        self._scaler = scaler
        self._told: dict[Any, int] = {} if told is None else told
        if not per_rank and set(wanted) & set(ParameterKind):
            ranks.refuse_flat(parameters.updated().values())
        self._norm_before: dict[int, tuple[Norm, Part]] = {}  # of an optimizer's gradients
        self._per_rank = per_rank
        self._merger = merge.Merger(adds=any(isinstance(kind, Kind) for kind in wanted))
        self._numbered = [each for kind in sorted(wanted, key=lambda kind: kind.label) for each in wanted[kind]]
        self._addends: list[Late] = []  # to be summed when the step ends
        self._left = False
        self._ending = self._ended = False
        self._last_backward = -1
        self._parameters = parameters
        self._steps: dict[int, Tally] = {}
        self._lock = threading.Lock()
        self._cache = cache
        cache.users += 1
        self._draws = False  # whether a summary has asked for the sketch of an activation
        self._before: dict[int, tuple[torch.Tensor, Part | Addend, Sketch | None]] = {}

    # -- activations ---------------------------------------------------------------------------------------------------

    def active(self, step: int) -> bool:
        """Whether the step is observed."""
        return step % self.every == 0

    def taker(self, layer: Layer, kind: Kind) -> Callable[..., None] | None:
        summaries = self._wanted.get(kind)
        if not summaries or layer not in self._layers:
            return None
        module_type = layer.module_type
        stem = f"{layer.name or module_type.__name__}/{kind.label}"

        def deliver(call: Call, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
            with quiet():
                for path, tensor in tensors:
                    own, part = ranks.part(tensor)
                    value = snapshot(own, call.info.fixed)
                    if value is not None:
                        step, number = call.info.step, call.index
                        capture = Capture(layer.name, kind, value, step, number, path, module_type)
                        suffix = f"{path}{f'#{number}' if number else ''}"
                        with drawing(partial(self._sketch, own, (call, kind), value)):
                            self._summarise(capture, summaries, stem + suffix, call.info.mode, part)

        take = tensor_taker(kind, deliver)
        if kind in Kind.INPUT | Kind.OUTPUT or self._recorder is None or not self._wanted.get(ParameterKind.GRAD):
            return take

        def take_gradient(call: Call, path: str, gradient: torch.Tensor, backward: int) -> None:
            if backward != self._last_backward:
                self._last_backward = backward
                after_backward(self._measure_gradients)
            take(call, path, gradient, backward)

        return take_gradient

    def begin(self, pass_: Pass) -> None:
        """Have those who want less of a sketch make it so that it is found here."""
        self._cache.binned = self._cache.binned or (self._draws and self.active(pass_.info.step))

    def _sketch(
        self, source: torch.Tensor, place: tuple[Call, Kind], copy: torch.Tensor, value: torch.Tensor
    ) -> Sketch | None:
        """The sketch of a value that nobody writes to: of what was captured of `source`, or made from that."""
        self._draws = True
        if value is copy:
            return self._cache.sketch(source, place, copy, histogram=True)
        return self._cache.fresh(value)

    def _summarise(
        self, capture: Capture, summaries: list[Summary], prefix: str, mode: str, part: Part | Addend
    ) -> None:
        if isinstance(part, Addend):
            if self._merges():
                capture = dataclasses.replace(capture, value=capture.value.clone())
                self._addends.append((capture, summaries, prefix, mode, part))
                return
            part = Part.OWN
        for summary in list(summaries):
            try:
                shown = summary(capture)
                if shown is not None and not isinstance(shown, Iterable):
                    raise TypeError(f"a summary yields what it shows, or returns a list of it, not {described(shown)}")
                items = list(shown or ())
                if isinstance(capture.kind, ParameterKind):
                    items = [_kept(each, capture) if isinstance(each, (Image, Embedding)) else each for each in items]
                with self._lock:
                    step = self._steps.setdefault(capture.step, Tally())
                    for item in items:
                        step.add(mode, prefix, item, part)
            except Exception as error:
                where = f"{capture.name!r}, {capture.kind.label}"
                error.add_note(f"raised by the summary {summary!r} at {where}")
                if self.on_error == "raise":
                    raise
                self._merger.drop(self._numbered.index(summary), f"raised {error!r} at {where}")
                self._drop(summary)
                text = f"the summary {summary!r} raised {error!r} at {where}; it is not asked again"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _drop(self, summary: Summary) -> None:
        for each in self._wanted.values():
            if summary in each:
                each.remove(summary)

    # -- parameters ----------------------------------------------------------------------------------------------------

    def before_step(self, optimizer: Any, step: int) -> None:
        """Show gradients and parameters as the update will use them."""
        if not self.active(step):
            return
        with quiet():
            gradients = self._gradients(optimizer)
            self._norms(optimizer, step, gradients.values())
            values: dict[int, OfParameter] = {}
            shown: list[OfParameter] = []
            for key, (_, parameter, _, _) in self._of(optimizer):
                if self._wanted.get(ParameterKind.VALUE) or self._wanted.get(ParameterKind.UPDATE):
                    values[key] = self._shown(key, ParameterKind.VALUE, parameter, step)
                if self._wanted.get(ParameterKind.VALUE):
                    shown.append(values[key])
                if key in gradients:
                    shown.append(self._shown(key, ParameterKind.GRAD, gradients[key], step))
            self._show(shown)
            if self._wanted.get(ParameterKind.UPDATE):
                parameters = [parameter for parameter, _, _ in values.values()]
                own = [capture.value for _, capture, _ in values.values()]
                drawn = self._cache.sketches(parameters, own, histogram=None)
                for (key, (parameter, _, part)), head in zip(values.items(), drawn, strict=True):
                    self._before[key] = self._cache.copy(parameter), part, head

    def after_step(self, optimizer: Any, step: int) -> None:
        """Show the rates that the update used, and what it added to the parameters."""
        if not self.active(step):
            return
        with quiet():
            if self._first("rates", optimizer, step):
                for tag, number in {} if self._recorder is None else self._recorder.scalars(optimizer).items():
                    what, _, group = tag.partition("/")
                    self._add(step, what, Scalar(group, number))
                scale = getattr(self._scaler, "_scale", None)  # that of this update: `scaler.update()` comes later
                if scale is not None:
                    self._add(step, "grad_scaler", Scalar("scale", scale))
            shown: list[OfParameter] = []
            heads: list[Sketch | None] = []
            for key, (_, parameter, _, _) in self._of(optimizer):
                if key in self._before:
                    before, part, head = self._before.pop(key)
                    update = self._cache.update(parameter, before)
                    shown.append((update, self._shown(key, ParameterKind.UPDATE, update, step)[1], part))
                    heads.append(head)
            self._show(shown)
            updates = [update for update, _, _ in shown]
            self._ratios(step, shown, self._cache.sketches(updates, updates, histogram=None), heads)

    def _ratios(
        self, step: int, shown: list[OfParameter], updates: list[Sketch | None], values: list[Sketch | None]
    ) -> None:
        """Show the norm of each update, relative to that of the parameter before it."""
        known = [(of, a, b) for of, a, b in zip(shown, updates, values, strict=True) if a is not None and b is not None]
        if known:
            moved, whole = (square_sums(drawn) for drawn in ([a for _, a, _ in known], [b for _, _, b in known]))
            for ((_, capture, part), _, _), *ratio in zip(known, moved, whole, strict=True):
                self._add(step, f"{capture.name}/update", Scalar("ratio", Norm(*ratio)), part)

    def _measure_gradients(self) -> None:
        """At the end of a backward pass: the norm of each optimizer's gradients, before anybody clips them."""
        with quiet():
            for optimizer in self._parameters.optimizers:
                gradients = [p.grad for p in updated_by(optimizer) if p.grad is not None]
                norm, part = ranks.norm_of(gradients, merged=self._merges())
                scale = getattr(self._scaler, "_scale", None)
                if scale is not None:
                    scaled = tuple((each / scale.to(each.device), addend) for each, addend in norm.addends)
                    norm = Norm(norm.squares / scale.to(norm.squares).square(), addends=scaled)
                self._norm_before[id(optimizer)] = norm, part

    def _gradients(self, optimizer: Any) -> dict[int, torch.Tensor]:
        """The gradients of an optimizer's parameters as its update uses them, where summaries want any."""
        if not self._wanted.get(ParameterKind.GRAD):
            return {}
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler leaves it to a fused optimizer to take it out
        found = {id(p): p.grad for p in updated_by(optimizer) if p.grad is not None}
        return found if scale is None else {key: grad / scale.to(grad.device) for key, grad in found.items()}

    def _norms(self, optimizer: Any, step: int, gradients: Collection[torch.Tensor]) -> None:
        """Show the norm of all gradients of the optimizer, whichever parameters are chosen."""
        before = self._norm_before.pop(id(optimizer), None)
        if self._recorder is not None and gradients:
            prefix = self._recorder.prefix(optimizer)
            if self._first("after_clipping", optimizer, step):
                norm, part = ranks.norm_of(gradients, merged=self._merges())
                self._add(step, "grad_norm", Scalar(f"{prefix}after_clipping", norm), part)
            if before is not None and self._first("before_clipping", optimizer, step):
                norm, part = before
                self._add(step, "grad_norm", Scalar(f"{prefix}before_clipping", norm), part)

    def _first(self, what: str, optimizer: Any, step: int) -> bool:
        """Whether no log of the writer has written this of the step yet; now one does."""
        key = what, id(optimizer)
        told, self._told[key] = self._told.get(key), step
        return told != step

    def _add(self, step: int, prefix: str, item: Any, part: Part | Addend = Part.WHOLE) -> None:
        if isinstance(part, Addend):
            return  # a parameter is never one
        with self._lock:
            self._steps.setdefault(step, Tally()).add("train", prefix, item, part)

    def _of(self, optimizer: Any) -> list[tuple[int, tuple[str, torch.Tensor, type, int]]]:
        own = [id(p) for p in updated_by(optimizer)]
        return [(key, self._parameters.found[key]) for key in own if key in self._parameters.found]

    def _shown(self, key: int, kind: ParameterKind, value: torch.Tensor, step: int) -> OfParameter:
        name, _, module_type, groups = self._parameters.found[key]
        own, part = ranks.part(value.detach(), replicated=True)
        return value, Capture(name, kind, own, step, module_type=module_type, groups=groups), part

    def _show(self, shown: Iterable[OfParameter]) -> None:
        shown = list(shown)
        values = [capture.value for _, capture, _ in shown]
        draw_all(
            [capture for _, capture, _ in shown],
            lambda: self._cache.sketches([value for value, _, _ in shown], values, histogram=True),
        )
        try:
            for _, capture, part in shown:
                kind = capture.kind
                self._summarise(capture, self._wanted.get(kind, []), f"{capture.name}/{kind.label}", "train", part)
        finally:
            forget_drawn()

    # -- the end of a step ---------------------------------------------------------------------------------------------

    def end_step(self, step: int, *, stepped: bool) -> None:
        """Send off what the ended steps yielded: one copy to the host a step, then the writer's thread.

        Where ranks merge, that comes before, and only the first one writes. Parameters are shown here where no
        optimizer has `stepped`.
        """
        if self._left:
            self._left, self._steps, self._addends = False, {}, []
            return
        closed = getattr(self.writer, "closed", False)  # it then was told what there was: see `Board.before_close`
        if not stepped and not closed and self.active(step) and self._wanted.get(ParameterKind.VALUE):
            with quiet():
                found = self._parameters.updated().items()
                self._show(self._shown(key, ParameterKind.VALUE, parameter, step) for key, parameter in found)
        forget_drawn()
        with self._lock:
            steps, self._steps = self._steps, {}
            addends, self._addends = self._addends, []
        numbers = {number for number, tally in steps.items() if tally} | {capture.step for capture, *_ in addends}
        if (not self._ended if self._ending else self.active(step)) and self._merges():
            numbers.add(step)  # with nothing, too: others may have something
        if numbers:
            self._cache.forget()
        for number in sorted(numbers):  # the same order on all ranks
            self._send(number, steps.get(number, Tally()), [each for each in addends if each[0].step == number])

    def bound(self, idle: bool) -> None:
        """What ended may go on: a probe can be entered again."""
        self._left = self._ended = False

    def finish(self, step: int, *, stepped: bool) -> None:
        """The last step is over; on a rank that wrote to a board which closed before, it was already."""
        self._ending = True
        try:
            super().finish(step, stepped=stepped)
        finally:
            self._ending, self._ended = False, True

    def leave(self, error: BaseException) -> None:
        """Tell the ranks that wait for this one to merge a step; what is open is lost."""
        if self._merges():
            self._left = True
            merge.leave(error)

    def _merges(self) -> bool:
        return not self._per_rank and ranks.several()

    def _send(self, number: int, step: Tally, addends: list[Late]) -> None:
        run = f"rank{ranks.rank()}" if self._per_rank else ""
        with quiet():
            if self._merges() and not (self._merge(number, step, addends) and ranks.rank() == 0):
                return
            if self.writer is None:
                return
            items = step.fetch()
        if not hasattr(self.writer, "submit"):
            _write_plainly(self.writer, number, items(), run)
            return
        fetched: dict[str, list[Any]] = {}

        def of(mode: str) -> list[Any]:
            if not fetched:
                fetched.update(items())
            return fetched.get(mode, [])

        for mode in dict.fromkeys(mode for mode, _ in _keys(step)):
            self.writer.submit(number, lambda mode=mode: of(mode), run=_run(mode, run))

    def _merge(self, number: int, step: Tally, addends: list[Late]) -> bool:
        """Have the step hold what all ranks gathered; False: some ranks have dropped a summary, and it is lost."""
        try:
            sites = [(f"{mode}: {prefix}", capture.value, addend) for capture, _, prefix, mode, addend in addends]
            summed = self._merger.sum_up(number, step, sites)
            if summed:
                self._steps[number] = step
                for (capture, summaries, prefix, mode, _), (value, part) in zip(addends, summed, strict=True):
                    self._summarise(dataclasses.replace(capture, value=value), summaries, prefix, mode, part)
                forget_drawn()
                del self._steps[number]
            self._merger.merge(number, step, leaving=self._ending)
        except merge.Dropped as dropped:
            for index, why in dropped.why.items():
                summary = self._numbered[index]
                self._drop(summary)
                text = f"step {number} is not logged: the summary {summary!r} {why}; it is not asked again on any rank"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            return False
        return True


def check(writer: Any, summaries: tuple[Any, ...], every: Any, on_error: str, *, silent: bool) -> None:
    """Refuse arguments of ``Probe.log`` that are none; `silent`: on this rank nothing is written."""
    if not (hasattr(writer, "add_scalar") or (silent and writer is None)):
        raise TypeError(f"log writes to a Board or a SummaryWriter, not {type(writer).__name__}: p.log(board, stats)")
    if not summaries:
        raise TypeError("log needs at least one summary: p.log(board, stats, histogram)")
    for summary in summaries:
        if not callable(summary) and not isinstance(summary, Joint):
            raise TypeError(f"{summary!r} is no summary: give functions from a Capture to things to show")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r}: give a whole number of at least 1")
    if on_error not in ("raise", "warn"):
        raise ValueError(f"on_error={on_error!r}: use 'raise' or 'warn'")


def by_kind(
    summaries: tuple[Summary, ...], kinds: Any, of_probe: Kind | None, with_parameters: bool
) -> dict[Any, list[Summary]]:
    """Which summaries get which kinds of captures."""
    asked: set[Any] = set()
    for each in kinds:
        if not isinstance(each, (Kind, ParameterKind)):
            raise TypeError(f"kinds={each!r}: give Kind and ParameterKind members, combined with | or in a list")
        asked.update(each)
    usual = set(of_probe or Kind.OUTPUT | Kind.GRAD_OUTPUT) | (set(ParameterKind) if with_parameters else set())
    wanted: dict[Any, list[Summary]] = {}
    for summary in summaries:
        declared = getattr(summary, "kinds", None)
        own = usual if declared is None else set(declared)
        for kind in own & asked if asked and declared is not None else asked or own:
            wanted.setdefault(kind, []).append(summary)
    return wanted


def _kept(item: Image | Embedding, capture: Capture) -> Image | Embedding:
    """A picture or points, to be read when the step has ended: a copy of a parameter's own memory, or its gradient's.

    Captures of other kinds are snapshots; numbers are copied and sketches made at once.
    """
    if not isinstance(item.value, torch.Tensor):
        return item
    own, memory = storage_of(item.value), storage_of(capture.value)
    if own is not None and memory is not None and own._cdata != memory._cdata:
        return item
    return dataclasses.replace(item, value=item.value.detach().clone())


def _keys(step: Tally) -> list[tuple[str, str]]:
    return [*step.scalars, *step.statistics, *step.histograms, *step.norms, *step.images, *step.embeddings]


def _run(mode: str, of_rank: str) -> str:
    """The sub-run of a mode: training has none, unless each rank has a run of its own."""
    return "/".join(part for part in (of_rank, "" if mode == "train" else mode) if part)


def _write_plainly(writer: Any, step: int, by_mode: dict[str, list[Any]], of_rank: str) -> None:
    """Write to a ``SummaryWriter`` that is no `Board`: where that has a sub-run the tags get a prefix."""
    for mode, items in by_mode.items():
        run = _run(mode, of_rank)
        prefix = f"{run}/" if run else ""
        for item in items:
            match item:
                case Scalar():
                    writer.add_scalar(prefix + item.tag, item.value, step)
                case Statistics():
                    for tag, number in curves(item):
                        writer.add_scalar(prefix + tag, number, step)
                case Histogram():
                    _histogram(writer, prefix + item.tag, item.value, step)
                case Image():
                    writer.add_image(prefix + item.tag, item.value, step)
                case Embedding():
                    writer.add_embedding(item.value, metadata=item.labels, global_step=step, tag=prefix + item.tag)


def _histogram(writer: Any, tag: str, drawn: Sketch, step: int) -> None:
    limits, counts = drawn.buckets()
    if limits:
        writer.add_histogram_raw(
            tag,
            min=drawn.min,
            max=drawn.max,
            num=sum(counts),
            sum=drawn.sum,
            sum_squares=drawn.sum_squares,
            bucket_limits=limits,
            bucket_counts=counts,
            global_step=step,
        )
