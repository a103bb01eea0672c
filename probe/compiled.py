"""Models that ``torch.compile`` compiled: run eagerly while they are observed, or observed from inside the graph.

Hooks that come after the first compiled call never fire. So either (`Eager`) compiled code runs eagerly for as long as
a step is observed, or (`GraphSession`) the hooks are there before and traced into the graph. Traced Python may not
write anything down, so these hooks call operators of our own, opaque to the compiler, which at run time deliver to the
same receivers as plain hooks do. Each operator writes to a token, which keeps them in order.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from probe import hooks
from probe.calls import Call, Pass, PassInfo, Receiver
from probe.capture import Kind, Layer
from probe.forward import graph_task, same
from probe.hooks import Tap
from probe.select import wrapped_attribute
from probe.session import IN_GRAPH, Session
from probe.tree import Leaves, input_leaves, leaves, rebuild

INSIDE = Kind.INPUT | Kind.OUTPUT | Kind.GRAD_OUTPUT
"""The kinds that can be had inside a compiled graph."""


# -- eagerly -----------------------------------------------------------------------------------------------------------

_holders: dict[int, Any] = {}  # who wants compiled code to run eagerly; the first one has torch's stance to take back
_stance: Any = None


class Eager(Receiver):
    """Has compiled code run eagerly in steps for which hooks are on, and says so once.

    It asks for nothing itself. Where the compiler was never imported nothing can be compiled, and nothing is done.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn: Callable[[str], None] | None = warn
        self._wanted = False

    def tell(self, what: str) -> None:
        """Say it, if it was not said before."""
        if self._warn is not None:
            warn, self._warn = self._warn, None
            warn(
                f"{what} is compiled: in steps that are observed it runs eagerly, because hooks do not fire in "
                "compiled code, and in all others at full speed; to observe from inside the graph enter the probe "
                "before the first compiled call, with compiled='inside'; compiled='error' refuses instead"
            )

    def bound(self, idle: bool) -> None:
        if self._wanted and idle and "torch._dynamo" in sys.modules and any(each.fullgraph for each in _compiling()):
            raise RuntimeError(f"a step ended inside a function compiled with fullgraph=True, and {IN_GRAPH}")
        self._wanted = not idle
        self._follow()

    def begin(self, pass_: Pass) -> None:
        if self._warn is not None and "torch._dynamo" in sys.modules and any(_compiling()):
            self.tell("the function that calls the model")

    def end_step(self, step: int, *, stepped: bool) -> None:
        if self._wanted:
            self._follow()  # the compiler may have been imported meanwhile

    def release(self) -> None:
        """Let compiled code run compiled again."""
        self._wanted = False
        self._follow()

    def _follow(self) -> None:
        global _stance
        if self._wanted and id(self) not in _holders and "torch._dynamo" in sys.modules:
            if not _holders:
                _stance = torch.compiler.set_stance("force_eager")
            _holders[id(self)] = True
        elif not self._wanted and _holders.pop(id(self), None) and not _holders and not sys.is_finalizing():
            _stance.__exit__(None, None, None)


def _compiling() -> Iterator[Any]:
    """For each caller that ``torch.compile`` made, as there are when it runs eagerly: what holds its options."""
    file = sys.modules["torch._dynamo.eval_frame"].__file__
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename == file:
            yield frame.f_locals["self"]
        frame = frame.f_back


# -- inside ------------------------------------------------------------------------------------------------------------

_sessions: dict[int, GraphSession] = {}  # by the number that is a constant in their graphs
_SCHEMAS = (
    "root(Tensor(a!) token, int session, bool entered, bool grad) -> ()",
    "deliver(Tensor[] values, Tensor(a!) token, int session, int site, int spot, str[] paths, bool out, bool grad)"
    " -> ()",
    "gradient(Tensor value, Tensor(a!) token, int session, int site, int spot, str path) -> ()",
)


# A compiled graph runs with gradients disabled; whether they were enabled where it is called is told by `grad`. Tensors
# that it needs no more it writes to again, and counts no version: what is delivered are new tensors on their memory.


def _root(token: torch.Tensor, session: int, entered: bool, grad: bool) -> None:
    if session in _sessions and graph_task() == -1:
        with torch.set_grad_enabled(grad):
            _sessions[session].root(entered)


def _deliver(
    values: list[torch.Tensor],
    token: torch.Tensor,
    session: int,
    site: int,
    spot: int,
    paths: list[str],
    out: bool,
    grad: bool,
) -> None:
    if session in _sessions and graph_task() == -1:  # in a recomputation under activation checkpointing: no new call
        fresh = [value.detach() for value in values]
        _sessions[session].deliver(site, spot, Leaves(zip(paths, fresh, strict=True)), out, grad)


def _gradient(value: torch.Tensor, token: torch.Tensor, session: int, site: int, spot: int, path: str) -> None:
    if session in _sessions:
        _sessions[session].gradient(site, spot, path, value.detach())


@cache
def _define() -> torch.library.Library:
    """Define the operators, once; they last as long as the library."""
    library = torch.library.Library("probe", "DEF")
    for schema, function in zip(_SCHEMAS, (_root, _deliver, _gradient), strict=True):
        name = schema.partition("(")[0]
        library.define(schema, tags=torch.Tag.cudagraph_unsafe)
        # disabled: called from a hook that runs outside of a graph, the compiler would try to trace what they do
        library.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"probe::{name}", lambda *args: None, lib=library)
    return library


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that is not compiled by itself where torch calls it outside of a graph, as it does the root's."""
    skip = getattr(sys.modules["torch._dynamo.eval_frame"], "skip_code", None)
    if skip is not None:
        skip(hook.__code__)
    return hook


class _Tap(torch.autograd.Function):
    """The identity; its backward delivers the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, token: torch.Tensor, session: int, site: int, spot: int, path: str) -> Any:
        ctx.token = token
        ctx.where = session, site, spot, path
        return x.clone()  # no view: torch forbids to write in place to a view that a custom function made

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        torch.ops.probe.gradient(gradient, ctx.token, *ctx.where)
        return gradient, None, None, None, None, None


class GraphSession(Session):
    """A session whose hooks are traced into the compiled graph, where the operators above deliver for them.

    The hooks stay on from step to step. Whether they do anything is one flag, which the compiler guards: observed and
    un-observed steps have a graph each. An output that needs a gradient is handed on as a copy, as with ``copy_views``.
    """

    def __init__(self, model: nn.Module, warn: Callable[[str], None]) -> None:
        super().__init__(model)
        _define()
        self._warn: Callable[[str], None] | None = warn
        self.observing = False
        self.number = next(_numbers)
        self.tokens = torch.zeros(()), torch.zeros(())  # one for the forward, one for the backward: no graph shares it
        self.spot: Callable[[], int] = torch.compiler.assume_constant_result(_spot)
        self._sites: list[Tap] = []
        self._calls: dict[int, Call] = {}  # by the spot in the graphs where they were made, the last of each
        self._begun: dict[Layer, Call] = {}  # calls whose input was delivered and whose output was not yet

    def bind(self) -> None:
        """Ask every receiver what it wants in this step. Hooks are put on where one wants anything in any step."""
        self.ask()
        for tap in self.taps.values():
            if tap not in self._sites and any(r.taker(tap.layer, kind) for r in self.receivers for kind in INSIDE):
                if self.passes:
                    raise RuntimeError(
                        f"layer {tap.layer.name!r} comes too late: with compiled='inside' everything that is to be "
                        "logged is asked for before the model is first called"
                    )
                self._sites.append(tap)
        if not self.passes:
            self.detach()
            try:
                self._register()
            except BaseException:
                self.detach()
                raise
        self._live, self._live_since = self._sites, 0
        _sessions[self.number] = self
        self.observing = not self.idle
        self.closed = False

    def _register(self) -> None:
        root = self.model
        while (inner := wrapped_attribute(root)) is not None:
            root = root._modules[inner]  # type: ignore[assignment]  # hooks on the wrapper are not part of the graph
        if any(tap.layer.module is not root for tap in self._sites):
            self._handles.append(hooks.on_enter(root, self._root_hook(True)))
        for site, tap in enumerate(self._sites):
            wanted = {kind for each in self.receivers for kind in INSIDE if each.taker(tap.layer, kind)}
            if Kind.INPUT in wanted:
                self._handles.append(hooks.on_enter(tap.layer.module, self._input_hook(site), with_kwargs=True))
            self._handles.append(hooks.on_output(tap.layer.module, self._hook(site, Kind.GRAD_OUTPUT in wanted)))
        if any(tap.layer.module is not root for tap in self._sites):
            self._handles.append(hooks.on_output(root, self._root_hook(False)))

    # The hooks that are traced. They read this session's attributes, and change nothing but the token. They read the
    # flag of `is_exporting`, because to the question itself some versions of the compiler answer yes when they trace.

    def _root_hook(self, entered: bool) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            if self.observing and not torch.compiler._is_exporting_flag:
                torch.ops.probe.root(self.tokens[0], self.number, entered, torch.is_grad_enabled())

        return _untraced(hook)

    def _input_hook(self, site: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.observing and not torch.compiler._is_exporting_flag:
                self._call(site, self.spot(), input_leaves(args, kwargs), False)

        return _untraced(hook)

    def _hook(self, site: int, gradients: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not self.observing or torch.compiler._is_exporting_flag:
                return None
            spot, found = self.spot(), leaves(output)
            self._call(site, spot, found, True)
            if not gradients or not any(tensor.requires_grad for _, tensor in found):
                return None

            def tapped(path: str, tensor: torch.Tensor) -> torch.Tensor:
                if not tensor.requires_grad:
                    return tensor
                return _Tap.apply(tensor, self.tokens[1], self.number, site, spot, path)  # type: ignore[no-any-return]

            return rebuild(output, tapped, opaque=same)

        return _untraced(hook)

    def _call(self, site: int, spot: int, found: list[tuple[str, torch.Tensor]], out: bool) -> None:
        values, paths = [tensor.detach() for _, tensor in found], [path for path, _ in found]
        torch.ops.probe.deliver(values, self.tokens[0], self.number, site, spot, paths, out, torch.is_grad_enabled())

    # What the operators call at run time.

    def root(self, entered: bool) -> None:
        """The model's forward begins or ends."""
        pass_ = self.local.current
        if pass_ is not None:  # at the beginning: of a forward that was interrupted
            self.end(pass_, whole=not entered)
        if entered:
            self.begin(self.model)

    def deliver(self, site: int, spot: int, found: Leaves, out: bool, grad: bool) -> None:
        """A layer was given tensors, or returned them, where gradients are enabled or not."""
        tap, pass_ = self._sites[site], self.local.current
        alone = pass_ is None
        if pass_ is None:
            with torch.set_grad_enabled(grad):
                pass_ = self.begin(tap.layer.module)
        if pass_ is None or not pass_.open:
            return
        call = self._begun.pop(tap.layer, None) or pass_.call(tap.layer)
        tap.fired = True
        if out:
            self._calls[spot] = call
        else:
            self._begun[tap.layer] = call
        for take in tap.takers.get(Kind.OUTPUT if out else Kind.INPUT, ()):
            take(pass_, call, found if out else ((found,), {}))
        if alone and out:
            self.end(pass_, whole=True)

    def gradient(self, site: int, spot: int, path: str, value: torch.Tensor) -> None:
        """A gradient came back to what a layer returned."""
        tap = self._sites[site]
        call = self._calls.get(spot) or Call(tap.layer, 0, PassInfo(self.step, self.tag or "train"))
        tap.on_gradient(Kind.GRAD_OUTPUT)(call, value, path)

    def advance(self, *, stepped: bool = False) -> None:
        self.check()
        self._begun.clear()
        if len(self._calls) > 1 << 16:
            self._calls.clear()  # of a model that runs eagerly: every call is a spot of its own
        super().advance(stepped=stepped)

    def check(self) -> None:
        """Be loud when a step was to be observed and nothing was captured."""
        if not (self.idle or self.passes) and self._warn is not None:
            warn, self._warn = self._warn, None
            warn(
                "compiled='inside' captured nothing in an observed step. The model was not called; or it was compiled "
                "before the probe was entered; or a model of the same class was compiled before, without hooks, and "
                "torch takes that graph. Enter the probe before the first compiled call, and type "
                "torch.compiler.reset() before that; or take compiled='auto'"
            )

    def close(self) -> None:
        self.observing = False
        _sessions.pop(self.number, None)
        self._calls.clear()
        super().close()


_numbers = itertools.count()
_spots = itertools.count()


def _spot() -> int:
    """A number for each place where a hook was traced: a constant in the graph."""
    return next(_spots)


def check_options(compiled: str, kinds: Kind | None, keep: int | None, backward: str, copy_views: bool) -> None:
    if compiled not in ("auto", "inside", "error"):
        raise ValueError(f"compiled={compiled!r}: use 'auto' (the default), 'inside' or 'error'")
    if compiled == "inside":
        for given, what in (
            (keep, f"keep={keep}: values are not kept"),
            (backward == "module", "backward='module': that hook does not fire"),
            (copy_views, "copy_views: outputs that need a gradient are handed on as copies anyway"),
            ((kinds or INSIDE) & ~INSIDE, "Kind.GRAD_INPUT can't be had"),
        ):
            if given:
                raise ValueError(f"{what} inside a compiled graph; leave compiled='inside' out, or this")
