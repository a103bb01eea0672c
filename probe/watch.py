"""`Watch`: finds what a process trains, as it is called and as it steps, and has each model probed."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from probe import select
from probe.board import new_folder
from probe.forward import graph_task, is_replica
from probe.hooks import on_any_call, on_any_step
from probe.ranks import rank
from probe.session import within_step
from probe.watched import Model, Options, alive, is_traced, is_within, parameters_of, unwrapped

_MOST_MODELS = 16  # a script that makes models without end is not to fill the disk


class Watch:
    """Probes whatever this process trains, from its first call on, and changes nothing about it.

    A model is any module with a parameter that requires a gradient, called while gradients are enabled and not part of
    a model that is known already. Models are looked for, by a hook that torch calls before every module's forward,
    until an optimizer of theirs steps for the second time, and again when an unknown optimizer steps. That hook is
    there on observed steps too, and at no other time. Passes without gradients are never observed: an evaluation can be
    long, and a hook would take `nn.TransformerEncoder` off its fused path.

    A step ends when the model's optimizer has stepped. As long as none has, each pass of the model is taken for a step.

    What no hook may touch without a change of results, compiled models, has only its parameters logged.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.models: list[Model] = []
        self.notes: list[str] = []
        self.updates = 0
        self._folder: str | None = None
        self._of: dict[int, tuple[weakref.ref[nn.Module], Model]] = {}
        self.led: weakref.WeakKeyDictionary[Optimizer, list[Model]] = weakref.WeakKeyDictionary()
        self._pending: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._searching = True
        self._finding = threading.RLock()  # threads may each train a model
        self._calls: Any = None
        self._steps = on_any_step(self._stepping)
        _watches.add(self)
        self.update()

    def folder(self) -> str:
        """Where the models' folders are."""
        if self._folder is None:
            self._folder = self.options.logdir or new_folder(self.options.comment)
        return self._folder

    def update(self) -> None:
        """Put the hook on all calls there, or take it away."""
        wanted = self._searching or any(model.due for model in self.models)
        if wanted and self._calls is None:
            self._calls = on_any_call(self._called)
        elif not wanted and self._calls is not None:
            self._calls.remove()
            self._calls = None

    def close(self) -> None:
        """Take everything off, and write what was seen. Again is harmless."""
        self._searching = False
        self._steps.remove()
        for model in self.models:
            model.end()
        self.update()

    def abandon(self) -> None:
        """In a forked child: touch nothing more, write nothing, and wait for no lock."""
        self._searching = False
        self._steps.remove()
        for model in self.models:
            model.abandon()
        self.update()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or graph_task() != -1:
            return  # the first: so that no compiled graph holds anything of this
        with self._careful():
            known = self._of.get(id(module))
            if known is None or known[0]() is not module:
                with self._finding:
                    self._search(module)
                known = self._of.get(id(module))
            if known is not None and known[0]() is module:
                known[1].called(module, args)

    @contextlib.contextmanager
    def _careful(self) -> Iterator[None]:
        """What fails here must not reach the script: nothing is watched any more then, and a note says why."""
        try:
            yield
        except Exception as error:
            self._note(f"gave up after {type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                self.close()

    def _search(self, module: nn.Module) -> None:
        """Take a module that was not seen before for a model, if it is one."""
        if not self._searching or is_replica(module) or is_traced():
            return
        own = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not own or any(model.adds(module) for model in self.models):
            return
        inside = [model for model in self.models if not model.over and is_within(model.module(), module)]
        seen = {id(p) for model in inside if (root := model.module()) is not None for p in root.parameters()}
        if all(id(parameter) in seen for parameter in own):
            return  # a wrapper of models that are called by themselves
        for model in inside:
            if model.trained or model.steps:
                model.end()
            else:  # it was called while the whole was being built, as to learn what shape it gives
                model.drop()
                self.models.remove(model)
        self._add(module, called=True)

    def _add(self, module: nn.Module, *, called: bool) -> Model | None:
        if rank() > 0:  # another process of a distributed training writes; one is enough
            return None
        if len(self.models) >= _MOST_MODELS:
            self._note(f"{_MOST_MODELS} models were found; those after them are not probed")
            return None
        taken = {model.name for model in self.models}
        base = name = _name(module)
        number = 1
        while name in taken:
            number += 1
            name = f"{base}#{number}"
        model = Model(self, module, name, called=called)
        self.models.append(model)
        self.learn(module, model)
        if model.compiled:
            self._searching = False  # its graph, compiled in this very call, must not see the hook on all calls
        self.update()
        return model

    def learn(self, root: nn.Module, model: Model) -> None:
        """Whose these modules are."""
        for module in select.modules(root):
            self._of[id(module)] = weakref.ref(module), model

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _stepping(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or within_step(optimizer):
            return
        self.updates += 1
        led = self.led.get(optimizer)
        if led is None:
            with self._careful(), self._finding:
                self._adopt(optimizer, has_closure=bool(args[1:] or kwargs))
            return
        for model in led:
            model.stepping(optimizer)
        if self._searching and not self._pending:
            self._searching = False
            self.update()

    def _adopt(self, optimizer: Optimizer, *, has_closure: bool) -> None:
        """Find the models that an optimizer trains, at its first step, or at its second what calls did not show."""
        own = parameters_of(optimizer)
        led = [model for model in self.models if model.holds(own)]
        if not led and optimizer not in self._pending and (has_closure or not self._searching):
            self._pending.add(optimizer)  # its model may yet be called
            self._searching = True
        else:
            if not led:
                owners = [each for each in _owners(own) if all(model.module() is not each for model in self.models)]
                led = [model for each in owners if (model := self._add(each, called=False)) is not None]
            self._pending.discard(optimizer)
            self.led[optimizer] = led
            for model in led:
                model.follow(optimizer)
            for model in self.models:
                model.sleep_if_idle()
        self.update()


_watches: weakref.WeakSet[Watch] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for watch in list(_watches):
        watch.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _name(module: nn.Module) -> str:
    """The global variable that holds the model, where the script has one, else the model's class.

    A class of torch's own says little: what belongs to another module is named by its place there. Local variables are
    left alone: up to Python 3.12 to read those of a running function can change what its `locals` returned before, and
    keeps its values alive.
    """
    inner = unwrapped(module)
    frame = sys._getframe()
    while frame is not None:
        found = frame.f_globals
        if not str(found.get("__name__")).startswith(("torch.", "probe.")):
            for name, value in list(found.items()):
                if (value is module or value is inner) and not name.startswith("_"):
                    return name
        frame = frame.f_back  # type: ignore[assignment]
    if type(inner).__module__.startswith("torch."):
        for parent in alive(nn.Module):
            for key, child in parent.__dict__.get("_modules", {}).items():
                if child is inner and parent is not inner and unwrapped(parent) is parent:
                    return f"{_name(parent)}.{key}"
    return type(inner).__name__


def _owners(parameters: set[int]) -> list[nn.Module]:
    """The outermost modules with these parameters, each of which has some that the ones before have not."""
    holders: list[tuple[nn.Module, set[int]]] = []
    for module in alive(nn.Module):
        with contextlib.suppress(Exception):  # one that is not initialised yet, or has methods of its own
            if own := {id(each) for each in module.parameters()} & parameters:
                holders.append((module, own))
    inner = {id(each) for module, _ in holders for each in select.modules(module)[1:]}
    found: list[nn.Module] = []
    left = set(parameters)
    for module, own in sorted(holders, key=lambda holder: -len(holder[1])):
        if id(module) not in inner and own & left:
            found.append(module)
            left -= own
    return found
