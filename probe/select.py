"""Which layers: names, globs, patterns, types, modules and predicates to the layers of a model."""

from __future__ import annotations

import difflib
import fnmatch
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from probe.capture import Layer

Selector = str | re.Pattern[str] | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool]
"""One way to say which layers: an exact name or a glob (``*`` crosses dots), a compiled pattern (``search``), a module
type, a module, a predicate ``(name, module) -> bool``; or a list, tuple or set of these."""

WORKS_INSIDE: tuple[type[nn.Module], ...] = (nn.MultiheadAttention,)
"""Modules that do their work in C++ on their children's weights, without calling the children."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_WRAPPERS = {
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper"): "_checkpoint_wrapped_module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
}


class NoSuchLayer(KeyError, ValueError):
    """A name or selector that matches no layer; the message names the nearest ones."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would print the message's repr


def wrapped_attribute(module: nn.Module) -> str | None:
    """The attribute under which a wrapper (DataParallel, DDP, FSDP, torch.compile) holds the user's module."""
    for kind in type(module).__mro__:  # by name: to import them all would take longer than what they are needed for
        attribute = _WRAPPERS.get((kind.__module__, kind.__name__))
        if attribute is not None:
            return attribute
    return None


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether any of a model's `modules` would run as compiled code, past its hooks."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and any(
        module._compiled_call_impl is not None or isinstance(module, dynamo.OptimizedModule) for module in modules
    )


def layers(model: nn.Module) -> list[Layer]:
    """Every module of the model, the root first, by the names of the user's own model.

    A module under several names is one `Layer`. The prefix of a wrapper is dropped because of the wrapper's type; a
    wrapper and what it wraps share a name, which then means the wrapped one.
    """
    found: dict[int, tuple[list[str], nn.Module]] = {}
    wrapping: dict[type, str | None] = {}  # a model has many modules of a few types

    def visit(module: nn.Module, name: str, above: tuple[int, ...]) -> None:
        kind = type(module)
        if kind not in wrapping:
            wrapping[kind] = wrapped_attribute(module)
        hidden = wrapping[kind]
        if hidden is None:
            names = found.setdefault(id(module), ([], module))[0]
            if name not in names:
                names.append(name)
        children = module._modules
        if not children or id(module) in above:  # a leaf, or a module that contains itself
            return
        for key, child in children.items():
            if child is not None:
                inner = name if key == hidden else f"{name}.{key}" if name else key
                visit(child, inner, (*above, id(module)))

    visit(model, "", ())
    return [Layer(tuple(names), module) for names, module in found.values()]


def modules(model: nn.Module) -> list[nn.Module]:
    """Every module, wrappers too, the root first: ``model.modules()`` also for modules that cannot be hashed."""
    found: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        found[id(module)] = module
        for child in module._modules.values():
            if child is not None and id(child) not in found:
                visit(child)

    visit(model)
    return list(found.values())


def ancestors(model: nn.Module, chosen: Iterable[nn.Module]) -> list[nn.Module]:
    """Every module with one of `chosen` below it, wrappers included, the root first; the root also if it is chosen."""
    wanted = {id(module) for module in chosen}
    found: dict[int, nn.Module] = {}

    def below(module: nn.Module, above: tuple[int, ...]) -> bool:
        if id(module) in above:
            return False
        inside = [below(child, (*above, id(module))) for child in module._modules.values() if child is not None]
        if any(inside) or (module is model and id(module) in wanted):
            found[id(module)] = module
        return any(inside) or id(module) in wanted

    below(model, ())
    return list(found.values())[::-1]


def default(every: list[Layer]) -> list[Layer]:
    """The leaf modules, and modules that work on their children's weights without calling them (not those children)."""
    inside = {id(m) for layer in every if isinstance(layer.module, WORKS_INSIDE) for m in _children(layer.module)}
    return [
        layer
        for layer in every
        if id(layer.module) not in inside
        and not isinstance(layer.module, _CONTAINERS)
        and (isinstance(layer.module, WORKS_INSIDE) or not set(layer.module._modules.keys()) - {"parametrizations"})
    ]


def _children(module: nn.Module) -> list[nn.Module]:
    return modules(module)[1:]


def choose(every: list[Layer], selectors: Iterable[Any], exclude: Any = ()) -> list[Layer]:
    """The union of what the selectors match, without what `exclude` matches, in the model's order.

    Raises:
        NoSuchLayer: a selector (or an excluding one) matches nothing, or nothing is left.
        TypeError: a selector of no known form.
    """
    given = list(selectors)
    flat = list(flatten(given))
    if given and not flat:
        raise NoSuchLayer(f"{given[0]!r} selects no layer: it is empty; leave it out to probe every leaf module")
    dropped = {id(layer) for selector in flatten(exclude) for layer in match(every, selector)}
    if flat:
        wanted = {id(layer) for selector in flat for layer in match(every, selector)}
        chosen = [layer for layer in every if id(layer) in wanted and id(layer) not in dropped]
    else:
        chosen = [layer for layer in default(every) if id(layer) not in dropped]
    if not chosen and not dropped:
        raise NoSuchLayer("the model has no leaf module that computes something; name layers: the root is ''")
    if not chosen:
        raise NoSuchLayer(f"nothing is left to probe: exclude={exclude!r} drops every layer that was selected")
    return chosen


def match(every: list[Layer], selector: Any) -> list[Layer]:
    """The layers that one selector means.

    Raises:
        NoSuchLayer: none.
        TypeError: not a selector.
    """
    if isinstance(selector, str):
        found = [layer for layer in every if selector in layer.names]
        if not found and any(sign in selector for sign in "*?["):
            found = [layer for layer in every if any(fnmatch.fnmatchcase(name, selector) for name in layer.names)]
    elif isinstance(selector, re.Pattern):
        found = [layer for layer in every if any(selector.search(name) for name in layer.names)]
    elif isinstance(selector, nn.Module):
        found = [layer for layer in every if layer.module is selector]
    elif isinstance(selector, type):
        found = [layer for layer in every if isinstance(layer.module, selector)]
    elif callable(selector):
        try:
            found = [layer for layer in every if any(selector(name, layer.module) for name in layer.names)]
        except Exception as error:
            error.add_note(f"raised by the selector {selector!r}, which is called as selector(name, module)")
            raise
    else:
        raise TypeError(
            f"{selector!r} cannot select layers: give a name, a glob, a compiled re.Pattern, a module type, a module, "
            "or a function (name, module) -> bool"
        )
    if not found:
        raise NoSuchLayer(_no_match(every, selector))
    return found


def flatten(selectors: Any) -> Iterator[Any]:
    """The single selectors in nested lists, tuples and sets of them."""
    if isinstance(selectors, (list, tuple, set, frozenset)):
        for selector in selectors:
            yield from flatten(selector)
    else:
        yield selectors


def _no_match(every: list[Layer], selector: Any) -> str:
    if isinstance(selector, nn.Module):
        return f"this {type(selector).__name__} is not a module of the probed model"
    if isinstance(selector, type):
        types = sorted({layer.module_type.__name__ for layer in every})
        return f"no layer is a {selector.__name__}; the model has {', '.join(types)}"
    if isinstance(selector, str):
        return f"no layer matches {selector!r}; {nearest(every, selector)}"
    what = f"the pattern {selector.pattern!r}" if isinstance(selector, re.Pattern) else f"the predicate {selector!r}"
    return f"no layer matches {what}; {nearest(every, '')}"


def nearest(every: list[Layer], name: str) -> str:
    """A phrase with the layer names nearest to `name`."""
    names = [each for layer in every for each in layer.names if each]
    if not names:
        return 'the model has no submodules; its root is ""'
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if not close and name:
        close = [each for each in names if name.strip("*.") and name.strip("*.") in each][:3]
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    shown = ", ".join(map(repr, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"the model has {shown}"
