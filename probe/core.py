"""`Probe`: select, attach, deliver, step, detach."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from probe import select
from probe.calls import Receiver, StopForward
from probe.capture import Kind, Layer, Summary
from probe.compiled import INSIDE, Eager, GraphSession, check_options
from probe.edits import Edit, checked
from probe.findings import Findings
from probe.hooks import Tap, hookable
from probe.observers import Adapter, Joint, Scene, Store, joint
from probe.reasons import missing, only_holds, why_never, why_no_gradients
from probe.record import (
    OverwrittenRow,
    PassRecords,
    Reading,
    Record,
    Row,
    Table,
    Values,
    overwritten,
)
from probe.select import NoSuchLayer
from probe.session import Session

if TYPE_CHECKING:  # imported where they are used: they need NumPy, and ``import probe`` is to be quick
    from probe import schedule
    from probe.cache import StepCache
    from probe.table import LayerTable


class ProbeWarning(UserWarning):
    """Something a probe was asked for did not happen."""


class Probe:
    """See inside a model while it runs: ``with Probe(model) as p:``, then ``p["layer1.0.conv1"].output``.

    Inside the block all four hooks sit on the chosen layers; after it, also after an exception, the model is what it
    was. What the hooks capture are true values: copy-on-write snapshots that in-place operations cannot reach.

    Arguments:
        model: any ``nn.Module``; or an optimizer, of which only the `schedule` is traced.
        layers: which layers, the union of exact names, globs (``*`` crosses dots), compiled patterns (searched), module
            types, modules, and predicates ``(name, module) -> bool``. None given: every leaf module.
        kinds: which of the four values to capture; all by default.
        exclude: selectors of layers to leave out.
        optimizer: one or several; every ``step()`` of the first then advances `steps` (of those that step in turns name
            the last one first), and `schedule` traces all.
        scaler: the ``torch.amp.GradScaler`` that steps them. Its scale is then taken out of captured gradients (those
            in float16 come in float32), and `schedule` knows exactly which updates it skipped.
        observers: functions of a `Capture`, objects with ``bind(site)``, and ``health.checks()``; they run inside the
            hooks.
        keep: how many passes to keep for reading (`passes` has those before the last); by default 1, and 0 for a probe
            with observers.
        backward: ``"tensor"`` reads gradients by tensor hooks and by the nodes that consume a module's input, without
            touching the graph; ``"module"`` by torch's own ``register_full_backward_hook``, with its restrictions.
        copy_views: hand on a copy of an output that is a view, so that a later in-place operation cannot drop its
            gradient hook. Needed for views of a module's input, and of modules that are not torch's own. Changes
            aliasing: what is written to the copy no longer reaches the view's base.
        compiled: of a model that ``torch.compile`` compiled, alone or as a part of a compiled function: ``"auto"`` runs
            it eagerly in steps that are observed and at full speed in all others, ``"error"`` refuses it. ``"inside"``
            observes from inside the graph: entered before the first compiled call, with everything that is to be
            logged; inputs, outputs and their gradients go to `log` and to observers, and no values are kept.

    Raises:
        NoSuchLayer: (a KeyError and ValueError) a selector matches nothing; the message has the nearest names.
        TypeError: the model is no ``nn.Module``, or is scripted; another argument is of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module | torch.optim.Optimizer,
        *layers: Any,
        kinds: Kind | None = None,
        exclude: Any = (),
        optimizer: Any = None,
        scaler: Any = None,
        observers: Any = (),
        keep: int | None = None,
        backward: str = "tensor",
        copy_views: bool = False,
        compiled: str = "auto",
    ) -> None:
        model, optimizers = _subject(model, optimizer)
        if backward not in ("tensor", "module"):
            raise ValueError(f"backward={backward!r}: use 'tensor' (the default) or 'module' (torch's own hook)")
        if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 0):
            raise ValueError(f"keep={keep!r}: give the number of passes to keep, 0 or more")
        if kinds is not None and (not isinstance(kinds, Kind) or not kinds):
            raise TypeError(f"kinds={kinds!r}: combine Kind.INPUT, OUTPUT, GRAD_OUTPUT and GRAD_INPUT with |")
        if scaler is not None and not hasattr(scaler, "is_enabled"):
            raise TypeError(f"scaler= takes a torch.amp.GradScaler, not a {type(scaler).__name__}")
        check_options(compiled, kinds, keep, backward, copy_views)
        self._every = select.layers(model)
        chosen = [] if isinstance(model, _NoModel) else select.choose(self._every, layers, exclude)
        self._scripted = [layer for layer in chosen if isinstance(layer.module, torch.jit.ScriptModule)]
        self._layers = hookable(chosen)
        self._by_name = {name: layer for layer in self._layers for name in layer.names}
        self._known = {name for layer in self._every for name in layer.names}
        named = [each for each in select.flatten(layers) if isinstance(each, (str, nn.Module))]
        self._asked = {each if isinstance(each, str) else id(each) for each in named}
        self._asked_kinds = kinds
        self._kinds = kinds or (INSIDE & ~Kind.INPUT if compiled == "inside" else Kind.all())
        self._asked_keep = keep
        self._optimizers = optimizers
        self._scaler = scaler
        self._told: dict[int, dict[Any, int]] = {}
        self._recorder = _recorder(optimizers, scaler)
        observers = _listed(observers)
        adapters = [Adapter(each, self._layers, self._kinds) for each in observers if not isinstance(each, Joint)]
        self._compiled = compiled
        self._eager = Eager(_warn) if compiled == "auto" else None
        if compiled == "inside":
            self._session: Session = GraphSession(model, functools.partial(_warn, stacklevel=5))
            keep = 0
        else:
            self._session = Session(model, backward=backward, copy_views=copy_views)
        self._session.scaler = scaler
        self._store = Store(self._session, self._layers, self._kinds, (0 if observers else 1) if keep is None else keep)
        self._session.receivers = [self._store, *adapters]
        if self._eager is not None:
            self._session.receivers.append(self._eager)
        if self._recorder is not None:
            self._session.receivers.append(_Rates(self._recorder))
        self._why_never = functools.partial(why_never, self._session, self._every)  # no method: that were a cycle
        self._reading = Reading(self._kinds, self._store.keep, self._why_never)
        self._stack: contextlib.ExitStack | None = None
        for layer in self._layers:
            self._session.taps[layer] = Tap(layer, self._session)
        self._joint: list[Receiver] = []
        self._add_joint(observers, self._layers)

    # -- attach and detach ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Probe:
        if self._stack is not None:
            raise RuntimeError("this probe is already attached; leave its with-block first, or create another Probe")
        with contextlib.ExitStack() as stack:
            stack.callback(self._session.close)
            if self._eager is not None:
                stack.callback(self._eager.release)
            if self._compiled != "inside" and select.is_compiled(select.modules(self._session.model)):
                if self._eager is None:
                    raise RuntimeError(
                        "the model is compiled, and hooks do not fire in compiled code. Leave compiled='error' out to "
                        "have the steps that are observed run eagerly; or enter the probe before the first compiled "
                        "call, with compiled='inside'"
                    )
                self._eager.tell("the model")
            self._session.optimizers.clear()
            for optimizer in self._optimizers:
                stack.callback(_remove, self._session.step_with(optimizer))
            self._session.bind()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        stopped = isinstance(error, StopForward) and error.session is self._session
        try:
            self._close(None if stopped else error)
        except Exception as failure:
            if error is None or stopped:
                raise
            error.add_note(f"And while the probe was left: {failure!r}")
        if stopped:
            return True
        if error is None:
            self._tell()
        return False

    def __del__(self) -> None:
        if getattr(self, "_stack", None) is not None:
            self._close(RuntimeError("it was dropped, and its with-block not left"))
        if hasattr(self, "_session"):
            self._session.dissolve()

    def _close(self, error: BaseException | None) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            with contextlib.ExitStack() as ends:  # each receiver ends its step, whatever another one raises
                for receiver in reversed(self._session.receivers):
                    ends.push(_ending(receiver, self._session, error))
                stack.close()

    def _tell(self) -> None:
        """Be loud about layers that never fired, where something did, and about gradients in a scaler's units."""
        session = self._session
        if isinstance(session, GraphSession):
            session.check()
        if session.scaled and any(
            tap.asks(Kind.GRAD_OUTPUT) or tap.asks(Kind.GRAD_INPUT) for tap in session.taps.values()
        ):
            text = "gradients were captured with the GradScaler's scale in them; Probe(..., scaler=scaler) takes it out"
            warnings.warn(text, ProbeWarning, stacklevel=3)
        taps = [session.taps[layer] for layer in self._layers]
        silent = [tap.layer for tap in taps if tap.tried and not tap.fired]
        silent = [layer for layer in silent if not only_holds(layer) or self._asked & {*layer.names, id(layer.module)}]
        if silent and not any(tap.stop for tap in session.taps.values()):
            shown = ", ".join(repr(layer.name) for layer in silent[:5]) + (" ..." if len(silent) > 5 else "")
            text = f"{len(silent)} of {len(self._layers)} probed layers were never called: {shown}. The first: "
            warnings.warn(text + self._why_never(silent[0]), ProbeWarning, stacklevel=3)

    # -- reading -------------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Record:
        layer = self._layer_of(name)
        calls = self._store.calls(layer)
        return Record(layer, calls, len(calls) - 1, self._reading)

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def _why_absent(self, name: Any) -> str:
        if not isinstance(name, str):
            return f"layers are read by name; {name!r} is of type {type(name).__name__}"
        if name not in self._known:
            return f"the model has no layer {name!r}; {select.nearest(self._every, name)}"
        if any(name in layer.names for layer in self._scripted):
            return f"layer {name!r} is a ScriptModule: torch puts no hooks on it"
        return f"layer {name!r} is not among the probed ones; add it: Probe(model, ..., {name!r})"

    @property
    def activations(self) -> Mapping[str, Any]:
        """``name -> output`` of the last call, for every layer that has one."""
        self._reading.check_kept("activations")
        return Values(self, lambda name: self[name].output)

    @property
    def gradients(self) -> Mapping[str, Any]:
        """``name -> grad_output`` of the last call, for every layer that a gradient came back to."""
        self._reading.check_kept("gradients")
        return Values(self, lambda name: self[name].grad_output)

    @property
    def passes(self) -> list[PassRecords]:
        """The kept passes, the oldest first, each to be read like the probe: ``p.passes[-2]["fc"].output``."""
        self._reading.check_kept("passes")
        return [PassRecords(pass_, self._layer_of, self._reading) for pass_ in self._store.passes()]

    def _layer_of(self, name: str) -> Layer:
        if name not in self._by_name:
            raise NoSuchLayer(self._why_absent(name))
        return self._by_name[name]

    @property
    def overwritten(self) -> list[OverwrittenRow]:
        """What in-place operations overwrote after it was captured, in the kept passes: ``(name, by, share)`` rows.

        A naive forward hook would have read these wrongly; the probe's own values are those from before. Comparing
        values waits for the device.
        """
        rows = {row.name: row for pass_ in self._store.passes() for row in overwritten(pass_)}
        empty = "nothing was overwritten after it was captured"
        if not self._store.keep:
            empty = "not known: this probe keeps no values; create it with Probe(..., keep=1)"
        elif not self._session.passes:
            empty = f"not known: {self._why_never(self._every[0])}"
        elif Kind.OUTPUT not in self._kinds:
            empty = "not known: outputs were not captured; add Kind.OUTPUT to kinds="
        return Table(rows.values(), ("layer", "overwritten by", "share"), empty)

    def report(self) -> list[Row]:
        """What was not captured, and why: ``(name, reason)`` rows, which print as a table."""
        rows = [Row(layer.name, "a ScriptModule: torch puts no hooks on it") for layer in self._scripted]
        calls = {layer: self._store.calls(layer) for layer in self._layers}
        if not self._session.passes and self._layers:
            rows.append(Row("", self._why_never(self._every[0])))
        blind = why_no_gradients([call for each in calls.values() for call in each], self._kinds)
        if blind:
            rows.append(Row("", f"no gradients: {blind}"))
        for layer in self._layers if self._session.passes else ():
            if not self._session.taps[layer].fired or (self._store.keep and not calls[layer]):
                rows.append(Row(layer.name, self._why_never(layer)))
            reasons = dict.fromkeys(
                reason for call in calls[layer] for reason in missing(call, self._kinds, blind is not None)
            )
            rows.extend(Row(layer.name, reason) for reason in reasons)
        if self._session.scaled:
            rows.append(
                Row("", "gradients have the GradScaler's scale in them; Probe(..., scaler=scaler) takes it out")
            )
        if not self._store.keep and self._session.passes:
            rows.append(Row("", "no values are kept, because the probe has observers or logs (keep= says otherwise)"))
        return Table(rows, ("layer", "not captured, because"), "everything that was asked for was captured")

    # -- changing what flows -------------------------------------------------------------------------------------------

    def edit(
        self, selector: Any, function: Callable[[Any], Any], on: Kind = Kind.OUTPUT, *, same_shape: bool = True
    ) -> Edit:
        """Replace what flows: ``p.edit("features.3", lambda output: output * 0)``.

        Arguments:
            selector: which layers, of the whole model, not only of the probed ones.
            function: gets what ``.input`` or ``.output`` would show and returns the same structure, shapes and dtypes;
                for the gradient kinds it gets and returns one gradient tensor at a time. Later edits see earlier ones.
            on: which kinds. What is captured is what flows on, after the edit. For GRAD_INPUT the module is handed
                copies of its inputs, so that its share of the gradient can be told from others'.
            same_shape: False lets the function return something of another shape or structure, such as another batch.

        Returns:
            A handle with ``remove()``; it is also a context manager. Leaving the probe's block ends its effect.

        Raises:
            NoSuchLayer: the selector matches nothing.
            TypeError, ValueError: while the model runs: the function returned another structure, shape or dtype.
        """
        if not callable(function):
            raise TypeError(f"edit takes a function of the value, not {function!r}")
        if not isinstance(on, Kind) or not on:
            raise TypeError(f"on={on!r}: give Kind.INPUT, OUTPUT, GRAD_OUTPUT or GRAD_INPUT")
        self._outside("edit")
        chosen = hookable(select.match(self._every, selector))
        added: list[tuple[Tap, Kind, Any]] = []
        for layer in chosen:
            tap = self._tap(layer)
            for kind in on:
                edit = checked(function, layer, kind, same_shape)
                tap.edits[kind] = (*tap.edits.get(kind, ()), edit)
                added.append((tap, kind, edit))
        self._rebind()

        def undo() -> None:
            for tap, kind, edit in added:
                tap.edits[kind] = tuple(each for each in tap.edits.get(kind, ()) if each is not edit)
            self._rebind()

        return Edit(undo)

    def stop_after(self, selector: Any) -> Edit:
        """End every forward right after the selected layer, cleanly: the probe's ``with`` swallows the interruption.

        The rest of the block is skipped; what was captured until then can be read after it.
        """
        self._outside("stop_after")
        taps = [self._tap(layer) for layer in hookable(select.match(self._every, selector))]
        for tap in taps:
            tap.stop += 1
        self._rebind()

        def undo() -> None:
            for tap in taps:
                tap.stop -= 1
            self._rebind()

        return Edit(undo)

    def _outside(self, what: str) -> None:
        if self._compiled == "inside":
            raise RuntimeError(f"{what} cannot change what flows inside a compiled graph; take compiled='auto'")

    def _tap(self, layer: Layer) -> Tap:
        return self._session.taps.setdefault(layer, Tap(layer, self._session))

    def _rebind(self) -> None:
        if self._stack is not None:
            self._session.bind()

    @property
    def kinds(self) -> Kind:
        """The kinds that are captured."""
        return self._kinds

    # -- logging -------------------------------------------------------------------------------------------------------

    def log(
        self,
        writer: Any,
        *summaries: Summary | Joint,
        every: int = 1,
        layers: Any = None,
        kinds: Any = None,
        on_error: str = "raise",
        per_rank: bool = False,
    ) -> Edit:
        """Feed summaries on every n-th step, and write what they yield: ``p.log(board, stats, histogram, every=100)``.

        Steps with ``p.steps % every == 0`` are observed; on the others no layer has a hook for it. What several calls
        or micro-batches of a step yield under one tag is merged: sketches add up, other numbers are averaged, of
        pictures the last one stays. With an optimizer, parameters, their gradients and their updates are captured
        around its step, learning rates are written as ``lr/<group>`` (momentum and weight decay once they change), and
        the norm of all gradients before and after clipping; of several optimizers each by its name, ``lr/SGD.group0``.
        With a scaler, its scale and how many updates it has skipped so far (``grad_scaler/scale``, ``.../skipped``).
        Passes in eval mode, or under `tag`, go to a sub-run of that name. A probe that logs keeps nothing for reading
        unless ``keep=`` says so.

        Where ``torch.distributed`` runs with several ranks, a logged step is merged over all of them by one
        ``all_reduce``, and the first rank writes it: statistics of activations and of their gradients are those of the
        whole batch, other numbers are averaged, pictures and health checks are the first rank's. Parameters count
        once, as the optimizer uses them: with averaged gradients, and as a whole where they are sharded (DTensors,
        ``fully_shard``). DTensors of partial sums are kept until the step ends, and added up then. Every rank must log
        the same layers; a rank that has nothing where others have something is an error on all of them.

        Arguments:
            writer: a `Board`, which writes in the background, or any ``SummaryWriter``. It is not closed here. On ranks
                that write nothing None will do.
            summaries: functions from a `Capture` to `Scalar`, `Histogram`, `Image`. One with an attribute ``kinds``
                gets only those.
            every: 1 or more.
            layers: selectors, as of `Probe`; by default the probed layers, and all parameters.
            kinds: a `Kind`, a `ParameterKind`, or a list of both; by default outputs and their gradients (or the
                probe's own ``kinds=``), what the summaries ask for, and with an optimizer all of parameters.
            on_error: ``"raise"`` what a summary raises, or ``"warn"`` once and go on without it; on all ranks, where
                one of them drops it, and without what was logged of that step.
            per_rank: merge nothing; every rank writes what it saw, as a sub-run ``rank0``, ``rank1``, ..., of DTensors
                its own shard or addend.

        Returns:
            a handle; ``remove()`` ends the logging.

        Raises:
            TypeError, ValueError, NoSuchLayer: an argument is wrong; nothing is changed then.
            RuntimeError: at the end of a step, on all ranks: they do not log the same, or one of them left or is late
                by half of the process group's time-out.
        """
        from probe.log import Log, Parameters, by_kind, check
        from probe.ranks import rank

        silent = rank() > 0 and not per_rank
        check(writer, summaries, every, on_error, silent=silent)
        if layers is None:
            chosen, owners = self._layers, self._every
        else:
            chosen = owners = select.choose(self._every, [layers])
        plain = tuple(each for each in summaries if not isinstance(each, Joint))
        asked = self._kinds if self._compiled == "inside" else self._asked_kinds
        wanted = by_kind(plain, _listed(kinds), asked, bool(self._optimizers))
        if self._compiled == "inside" and Kind.GRAD_INPUT in wanted:
            raise ValueError("Kind.GRAD_INPUT can't be had inside a compiled graph; leave compiled='inside' out")
        added: list[Receiver] = []
        if plain:
            log = Log(
                writer,
                wanted,
                every=every,
                layers=chosen,
                parameters=Parameters(self._every, owners, self._optimizers),
                cache=self._cache,
                on_error=on_error,
                recorder=self._recorder,
                scaler=self._scaler,
                told=self._told.setdefault(id(writer), {}),
                per_rank=per_rank,
            )
            receivers = self._session.receivers
            # before those that need less of a sketch, so that these find it
            place = next((i for i, each in enumerate(receivers) if each in self._joint), len(receivers))
            receivers.insert(place, log)
            added.append(log)
        for layer in chosen:
            self._tap(layer)
        if self._asked_keep is None:
            self._store.keep = self._reading.keep = 0
        added += self._add_joint(summaries, chosen, every_n=every, writer=None if silent else writer)
        if hasattr(writer, "before_close"):
            for each in added:
                writer.before_close(functools.partial(_last_call, weakref.ref(self._session), weakref.ref(each)))
        try:
            self._rebind()
        except BaseException:
            for each in added:
                self._session.receivers.remove(each)
            raise
        receivers, rebind = self._session.receivers, self._rebind

        def undo() -> None:
            for receiver in added:
                receiver.finish(self._session.step, stepped=True)
                receivers.remove(receiver)
            rebind()

        return Edit(undo)

    @functools.cached_property
    def _cache(self) -> StepCache:
        from probe.cache import StepCache

        return StepCache()

    def _add_joint(self, observers: Iterable[Any], layers: list[Layer], **options: Any) -> list[Receiver]:
        """Give the observers that work together their receivers, and the root for these to hook."""
        together = [each for each in observers if isinstance(each, Joint)]
        if not together:
            return []
        scene = Scene(self._every, layers, self._kinds, self._cache, self._optimizers, self._scaler, **options)
        added = joint(together, scene)
        self._tap(self._every[0])
        self._session.receivers += added
        self._joint += added
        return added

    @property
    def findings(self) -> Findings:
        """What the health checks found, the worst first; printed it is a report. Waits for the device.

        Steps that have ended are examined, and after the block all.

        Raises:
            AttributeError: no checks are attached.
        """
        found = self._findings()
        if found is None:
            raise AttributeError(
                "there are no findings, as nothing is checked: from probe import health, then "
                "Probe(model, observers=health.checks()) or p.log(board, *health.checks())"
            )
        return found

    def _findings(self) -> Findings | None:
        parts = [each for receiver in self._joint if (each := receiver.findings()) is not None]
        first = {(each.layer, each.check): each for part in reversed(parts) for each in reversed(part)}
        return Findings(first.values(), max(part.steps for part in parts)) if parts else None

    @property
    def schedule(self) -> schedule.Trace:
        """Learning rate, momentum and weight decay of every update so far, per param group: ``p.schedule.lr``.

        Raises:
            AttributeError: the probe has no optimizer.
        """
        if self._recorder is None:
            raise AttributeError("there is no schedule: give the optimizer, Probe(model, optimizer=optimizer)")
        return self._recorder.trace()

    # -- steps ---------------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """How many steps have ended: each ``optimizer.step()`` of the given optimizer, or each `step`.

        A training that is resumed sets it, before its first step, to the number of those made before.
        """
        return self._session.step

    @steps.setter
    def steps(self, number: int) -> None:
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"steps={number!r}: give the number of steps that were made before, 0 or more")
        if number != self._session.step:
            self._session.count_from(number)
            self._rebind()

    def step(self) -> None:
        """End a step, where there is no optimizer to do so."""
        self._session.advance()

    @contextlib.contextmanager
    def tag(self, name: str) -> Iterator[None]:
        """Passes inside the block count as `name` (``"valid"``) in place of ``"train"`` or ``"eval"``.

        Raises:
            TypeError: `name` is no string.
        """
        if not isinstance(name, str):
            raise TypeError(f'tag takes a name, as p.tag("valid"), not {name!r} ({type(name).__name__})')
        before, self._session.tag = self._session.tag, name
        try:
            yield
        finally:
            self._session.tag = before

    # -- showing -------------------------------------------------------------------------------------------------------

    def summary(self) -> LayerTable:
        """A table with one row a layer: type, output shape and dtype, statistics, gradient norm, calls.

        Layers that one should look at are marked, with what the health checks found where there are any.
        """
        taps = self._session.taps
        from probe.table import layer_table

        found = self._findings() or ()
        return layer_table(((layer, self._store.calls(layer), taps[layer].fired) for layer in self._layers), found)

    def __str__(self) -> str:
        return str(self.summary() if self._layers else self.schedule)

    def __repr__(self) -> str:
        state = "attached" if self._stack is not None else "not attached"
        if not self._layers:
            return f"<Probe of {', '.join(type(each).__name__ for each in self._optimizers)}: schedule, {state}>"
        return f"<Probe of {type(self._session.model).__name__}: {len(self)} layers, {self._kinds.label}, {state}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a Probe can't be copied or pickled: it belongs to one model in one process. Make another, and save what "
            "this one read, dict(p.activations) for example"
        )

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


_OPTIMIZER_WRAPPERS = {  # where the class is, and its name
    "accelerate.optimizer": "AcceleratedOptimizer",
    "lightning.pytorch.core.optimizer": "LightningOptimizer",
    "pytorch_lightning.core.optimizer": "LightningOptimizer",
}


def _warn(text: str, stacklevel: int = 4) -> None:
    warnings.warn(text, ProbeWarning, stacklevel=stacklevel)


class _NoModel(nn.Module):
    """Stands for the model of a probe on an optimizer alone."""


class _Rates(Receiver):
    """Tells a schedule's recorder of optimizer steps."""

    def __init__(self, recorder: schedule.Recorder) -> None:
        self._recorder = recorder

    def before_step(self, optimizer: Any, step: int) -> None:
        self._recorder.before_step(optimizer)

    def after_step(self, optimizer: Any, step: int) -> None:
        self._recorder.after_step(optimizer)


def _recorder(optimizers: list[torch.optim.Optimizer], scaler: Any) -> schedule.Recorder | None:
    if not optimizers:
        return None
    from probe.schedule import Recorder

    return Recorder(optimizers, scaler)


def _subject(model: Any, optimizer: Any) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """The model, and the optimizers; checked."""
    if isinstance(model, torch.optim.Optimizer):
        model, optimizer = _NoModel(), [model, *_listed(optimizer)]
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("the model is a ScriptModule: torch puts no hooks on it; probe it before torch.jit.script")
    if isinstance(model, torch.export.ExportedProgram):
        raise TypeError(
            "the model is an ExportedProgram: its layers are inlined; probe the model before torch.export.export, or "
            "what torch.export.unflatten(program) gives"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"Probe takes an nn.Module or an optimizer, not {type(model).__name__}")
    optimizers = [_unwrapped(each) for each in _listed(optimizer)]
    for each in optimizers:
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(f"optimizer={each!r} is a {type(each).__name__}; give a torch.optim.Optimizer, or a list")
    return model, optimizers


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer that makes the updates, where accelerate or Lightning have wrapped it."""
    for where, name in _OPTIMIZER_WRAPPERS.items():
        wrapper = getattr(sys.modules.get(where), name, None)
        if wrapper is not None and isinstance(optimizer, wrapper):
            return _unwrapped(optimizer.optimizer)
    return optimizer


def _last_call(session: weakref.ref[Session], log: weakref.ref[Receiver]) -> None:
    """The writer closes before the probe is left: what is open is sent off now."""
    live, receiver = session(), log()
    if live is not None and receiver in live.receivers and not live.closed:
        error = sys.exc_info()[1]  # that which ends the writer's with-block
        _end(receiver, live, None if isinstance(error, StopForward) else error)


def _end(receiver: Receiver, session: Session, error: BaseException | None) -> None:
    """Nothing more will come: have the receiver end the step that is open, which `error` interrupts if there is one."""
    if error is not None:
        receiver.leave(error)
    try:
        receiver.finish(session.step, stepped=bool(session.optimizers))
    except BaseException as failure:
        receiver.leave(failure)
        raise


def _ending(receiver: Receiver, session: Session, error: BaseException | None) -> Callable[..., None]:
    """`_end` for an ``ExitStack``: what an earlier receiver raised interrupts the step of this one, too."""
    return lambda kind, failure, trace: _end(receiver, session, error or failure)
