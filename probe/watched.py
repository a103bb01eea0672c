"""`Model`: one model that `probe.watch` found in a running script: its probe, its board, and what was seen."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from probe import health, select
from probe.board import Board
from probe.calls import Pass, Receiver
from probe.capture import Kind, Layer, ParameterKind
from probe.core import Probe
from probe.findings import Findings
from probe.ranks import several
from probe.session import stepping_scaler
from probe.summary import histogram, stats
from probe.table import LastSeen

KINDS: dict[str, Kind | ParameterKind] = {each.label: each for each in (*Kind, *ParameterKind)}

_UNLED = 64  # so many passes without an optimizer's step, and it is taken that none will come


@dataclass(frozen=True)
class Options:
    """What to log of every model, and where.

    Arguments:
        logdir: the folder in which each model gets one of its own; None makes a new one below ``runs``.
        every: steps with ``step % every == 0`` are observed.
        layers: names and globs; none for every leaf module.
        kinds: keys of `KINDS`.
        until_step: the last step that may be observed.
        findings: whether to run the health checks.
        comment: the end of the name of a new folder.
    """

    logdir: str | None
    every: int
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    until_step: int | None
    findings: bool
    comment: str


class Watcher(Protocol):
    """What a model needs of what found it."""

    options: Options
    updates: int
    led: weakref.WeakKeyDictionary[Optimizer, list[Model]]

    def folder(self) -> str: ...
    def learn(self, root: nn.Module, model: Model) -> None: ...
    def update(self) -> None: ...


class Model(Receiver):
    """One model that was found: its probe while it is awake, and what was seen.

    Asleep it holds on to nothing of the script's. It falls asleep when others are trained in its place, and wakes at
    the next step of its optimizer: a script that trains one model after the other must be able to free them.

    Arguments:
        watch: what found it.
        module: the model.
        name: its folder's.
        called: whether its calls were seen; False where only its optimizer told of it.
    """

    def __init__(self, watch: Watcher, module: nn.Module, name: str, *, called: bool) -> None:
        self.watch = watch
        self.module = weakref.ref(module)
        self.name = name
        self.type = type(unwrapped(module)).__name__
        self.compiled = select.is_compiled(select.modules(module))
        self.over = False  # for good
        self.steps = 0
        self.seen = LastSeen()
        self.layers: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self._findings: list[Findings] = []  # of one probe after the other
        self._options = watch.options
        kinds = [KINDS[each] for each in self._options.kinds]
        self._activations = called and not self.compiled and any(isinstance(kind, Kind) for kind in kinds)
        self._kinds = [kind for kind in kinds if self._activations or isinstance(kind, ParameterKind)]
        self._thread = threading.get_ident()
        self._probe: Probe | None = None
        self._board: Board | None = None
        self._new_folder: str | None = None  # the board's, if nobody had it before
        self._handles: list[Any] = []
        self._others: set[int] = set()  # optimizers that have stepped since that one did whose step ends a step
        self._last_update = 0
        self._trained = False
        self._passes = 0
        self._evaluated = -1  # the last step of which a pass in eval mode was observed
        if self.compiled:
            self.notes.append("it is compiled: hooks would change its results, so only its parameters are logged")
        elif not called:
            self.notes.append("no call of it was seen (is it called in a compiled function, or by .forward?): only its "
                              "parameters are logged")  # fmt: skip
        with self._careful():
            self._wake()

    @property
    def trained(self) -> bool:
        """Whether an optimizer of its parameters was seen."""
        return self._trained

    @property
    def due(self) -> bool:
        """Whether its next call may be observed."""
        if self._probe is None or not self._activations:
            return False
        return not self._trained or self.steps % self._options.every == 0

    def holds(self, parameters: set[int]) -> bool:
        """Whether one of its parameters is among these ids."""
        root = self.module()
        return root is not None and not self.over and any(id(each) in parameters for each in root.parameters())

    def adds(self, module: nn.Module) -> bool:
        """Whether the module has become part of it since it was found; it then counts as such."""
        root = self.module()
        if root is None or self.over or not is_within(module, root):
            return False
        self.watch.learn(root, self)
        return True

    # -- what the watch tells it of ------------------------------------------------------------------------------------

    def called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """One of its modules is about to run, gradients enabled: observe the pass, if it is one and is to be seen."""
        if self._probe is None or threading.get_ident() != self._thread or not self._activations:
            return
        session = self._probe._session
        if session.local.current is None and not is_traced():
            with self._careful():
                if self._wants_trained() if self._trained else self._wants_untrained(module):
                    session.see(module, args)

    def _wants_trained(self) -> bool:
        session, root = self._probe._session, self.module()  # type: ignore[union-attr]
        last = self._options.until_step
        if session.step % self._options.every or root is None or (last is not None and session.step > last):
            return False
        if not root.training:  # an evaluation that does not turn gradients off: one batch is enough
            wanted, self._evaluated = self._evaluated != session.step, session.step
            return wanted
        return True

    def _wants_untrained(self, module: nn.Module) -> bool:
        if module is not self.module():
            return False
        session, number = self._probe._session, self._passes  # type: ignore[union-attr]
        self._passes += 1
        if 0 < number < 4 and not self.seen.gradients and Kind.GRAD_OUTPUT in self._kinds:
            session.end_step(stepped=True)  # the pass before was a dry run: this may be the first real one
            return True
        if number:
            session.advance(stepped=True)
            self._stop_after_last()
        # until it is clear that there is no optimizer, further passes may be micro-batches of the first update
        return number == 0 or (number >= _UNLED and session.step % self._options.every == 0)

    def stepping(self, optimizer: Optimizer) -> None:
        """An optimizer that it follows is about to step."""
        self._last_update = self.watch.updates
        probe, last = self._probe, self._options.until_step
        if probe is not None and optimizer is probe._session.optimizers[0] and (last is None or probe.steps <= last):
            self._others.clear()
            return
        with self._careful():
            self._stop_after_last()
            if self._probe is None and not self.over:
                self._wake([optimizer])
            if self._probe is None or optimizer is self._probe._session.optimizers[0]:
                return
            if id(optimizer) not in self._others:
                self._others.add(id(optimizer))
            else:  # the first one does not step any more, or less often
                self._others.clear()
                session = self._probe._session
                session.optimizers.remove(optimizer)
                session.optimizers.insert(0, optimizer)
                session.advance(stepped=True)

    def follow(self, optimizer: Optimizer) -> None:
        """An optimizer that trains it steps for the first time."""
        self._last_update = self.watch.updates
        with self._careful():
            root = self.module()
            if root is None or self.over:
                return
            if self._trained:
                others = self._probe._session.optimizers if self._probe is not None else []
                own = parameters_of(optimizer)  # it comes in place of those that it shares parameters with
                others = [each for each in others if not own & parameters_of(each)]
            else:
                ids = {id(each) for each in root.parameters()}
                others = [each for each in alive(Optimizer) if each is not optimizer and ids & parameters_of(each)]
            self._rest(close_board=False)
            if not self._trained:
                self.steps, self._trained = 0, True
                for part in self._findings:  # the step that began before its optimizer was known is examined again
                    part.steps = 0
            self._wake([optimizer, *others])

    # -- its probe -----------------------------------------------------------------------------------------------------

    def active(self, step: int) -> bool:
        """It wants nothing of what its own probe delivers."""
        return False

    def end_step(self, step: int, *, stepped: bool) -> None:
        """Told by its probe."""
        self.steps = step + 1
        self.watch.update()

    def _wake(self, optimizers: Sequence[Optimizer] = ()) -> None:
        root = self.module()
        if root is None:
            return
        probe = Probe(root if self._activations else unwrapped(root), *self._options.layers, optimizer=[*optimizers])
        # not Probe(scaler=): which updates were skipped is known only to who is told of every step
        probe._scaler = probe._session.scaler = stepping_scaler() if optimizers else _only_scaler()
        self.layers = [(name, layer.module_type.__name__) for name, layer in probe._by_name.items()]
        if self._board is None:
            folder = os.path.join(self.watch.folder(), self.name)
            self._new_folder = None if os.path.exists(folder) else folder
            self._board = Board(folder)
        # parameters are shown around an optimizer's step; without one they would be shown twice for the first step
        kinds = self._kinds if optimizers else [kind for kind in self._kinds if isinstance(kind, Kind)] or self._kinds
        alone: dict[str, Any] = {"every": self._options.every, "per_rank": several()}  # only the first rank is probed
        probe.log(self._board, stats, histogram, self.seen, kinds=kinds, **alone)
        if self._options.findings:
            probe.log(self._board, *health.checks(), **alone)
        session = probe._session
        every = self._options.every if optimizers else 1  # gradients of a pass may come when others have been
        session.receivers = [self, *(_Guarded(each, every, self.give_up) for each in session.receivers)]
        session.count_from(self.steps)
        session.rest()
        if self._activations:
            probe.__enter__()
        else:
            self._handles = [handle for each in optimizers for handle in session.step_with(each)]
        self._probe = probe
        for optimizer in optimizers:
            led = self.watch.led.setdefault(optimizer, [])
            if self not in led:
                led.append(self)

    def _rest(self, *, close_board: bool = True) -> None:
        """Take its probe off, write what it saw, and let go of everything of the script's."""
        probe, self._probe = self._probe, None
        if probe is None:
            return
        steps = probe.steps
        while self._handles:
            self._handles.pop().remove()
        probe._close(None)
        for receiver in reversed(probe._session.receivers) if not self._activations else ():  # it was never entered
            receiver.finish(steps, stepped=True)
        if self._options.findings:
            self._findings.append(probe.findings)
        self.steps = steps
        if close_board and self._board is not None:
            board, self._board = self._board, None
            board.close()

    def end(self) -> None:
        """Be done with it. Again is harmless."""
        self.over = True
        with self._careful():
            self._rest()

    def drop(self) -> None:
        """Be done with it before anything of it is written, and leave no empty folder."""
        if self._probe is not None:
            self._probe._session.receivers.clear()
        self.end()
        if self._new_folder is not None:
            shutil.rmtree(self._new_folder, ignore_errors=True)

    def sleep_if_idle(self) -> None:
        """Hold on to nothing of the script's, if others were trained lately in its place."""
        if self._trained and self.watch.updates - self._last_update > 1:
            with self._careful():
                self._rest()

    def report(self, *, brief: bool) -> Iterator[str]:
        """What was seen, line by line, the table of layers among it unless `brief`."""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        title = self.name if self.name.startswith(self.type) else f"{self.name} ({self.type})"
        seen = sorted(self.seen.steps)
        observed = f", {len(seen)} of them observed" if self._activations else ""
        last = f"; below the last one, step {seen[-1]}" if seen and not brief else ""
        yield f"probe: {title}: {steps}{observed}{last}"
        for note in self.notes:
            yield f"probe: {title}: {note}"
        if seen and not brief:
            yield from str(self.seen.table(self.layers)).splitlines()
        if findings := self.findings():
            yield from str(findings).splitlines()

    def findings(self) -> Findings:
        """What the health checks found, the worst first; each once."""
        first = {(each.layer, each.check): each for part in reversed(self._findings) for each in part}
        return Findings(first.values(), sum(part.steps for part in self._findings))

    def abandon(self) -> None:
        """In a forked child: as if it had not been found."""
        self.over = True
        if self._probe is not None:
            session = self._probe._session
            session.closed = True
            session.receivers.clear()
            session.detach()

    def _stop_after_last(self) -> None:
        last = self._options.until_step
        if last is not None and self._probe is not None and self._probe.steps > last:
            self.end()

    @contextlib.contextmanager
    def _careful(self) -> Iterator[None]:
        """What fails here must not reach the script."""
        try:
            yield
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Something failed: it is not probed any more, and a note says why."""
        if not self.over:
            self.notes.append(f"not probed any more after {type(error).__name__}: {error}")
        self.over = True
        with contextlib.suppress(Exception):
            self._rest()


class _Guarded(Receiver):
    """Passes on what it is told, and what the other raises not to the script but to `fail`.

    Of steps that are not observed the other is not told, so that they cost next to nothing: only the end of the first
    one, which comes after what was late for an observed one.
    """

    def __init__(self, receiver: Receiver, every: int, fail: Callable[[Exception], None]) -> None:
        self._receiver = receiver
        self._every = every
        self._fail = fail

    def active(self, step: int) -> bool:
        return self._receiver.active(step)

    def taker(self, layer: Layer, kind: Kind) -> Callable[..., None] | None:
        take = self._receiver.taker(layer, kind)
        return None if take is None else functools.partial(self._call, take)

    def bound(self, idle: bool) -> None:
        self._call(self._receiver.bound, idle)

    def begin(self, pass_: Pass) -> None:
        self._call(self._receiver.begin, pass_)

    def before_step(self, optimizer: Any, step: int) -> None:
        if step % self._every == 0:
            self._call(self._receiver.before_step, optimizer, step)

    def after_step(self, optimizer: Any, step: int) -> None:
        if step % self._every == 0:
            self._call(self._receiver.after_step, optimizer, step)

    def end_step(self, step: int, *, stepped: bool) -> None:
        if step % self._every <= 1:
            self._call(self._receiver.end_step, step, stepped=stepped)

    def leave(self, error: BaseException) -> None:
        self._call(self._receiver.leave, error)

    def close(self) -> None:
        self._call(self._receiver.close)

    def _call(self, function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:
            self._fail(error)


def is_traced() -> bool:
    """Whether what runs now is no training: a graph is being recorded from it, or a CUDA graph captured."""
    if torch._C._is_tracing() or torch.compiler.is_exporting() or torch.fx._symbolic_trace.is_fx_symbolic_tracing():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _only_scaler() -> torch.amp.GradScaler | None:
    """The `GradScaler` of the script, as far as that can be known before an optimizer steps."""
    scalers = [each for each in alive(torch.amp.GradScaler) if each.is_enabled()]
    return scalers[0] if len(scalers) == 1 else None


def is_within(module: nn.Module | None, root: nn.Module) -> bool:
    """Whether a module is the root or a part of it."""
    return module is not None and any(each is module for each in select.modules(root))


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside of DataParallel, torch.compile and the like."""
    while (attribute := select.wrapped_attribute(module)) is not None:
        module = getattr(module, attribute)
    return module


def parameters_of(optimizer: Optimizer) -> set[int]:
    """The ids of what it updates."""
    return {id(each) for group in optimizer.param_groups for each in group["params"]}


def alive(kind: type) -> list[Any]:
    """All objects of a class, looked for in C, in one call.

    Between two lines of Python another thread may run, and be making a tuple: that fails if a list of all objects holds
    the tuple too. So the list is made, looked through and cleared by the last line alone.
    """
    kinds: set[type] = set()
    new = [kind]
    while new:
        kinds.add(each := new.pop())
        below: list[type] = type.__subclasses__(each)
        new += [other for other in below if other not in kinds]
    lists, same, again = itertools.tee(map(gc.get_objects, [None]), 3)  # of one list
    wanted = map(map, [set(map(id, kinds)).__contains__], map(map, [id], map(map, [type], same)))
    found = itertools.chain.from_iterable(map(itertools.compress, lists, wanted))
    return list(itertools.chain(found, filter(None, map(list.clear, again))))
