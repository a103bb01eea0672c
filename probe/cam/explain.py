"""`explain`: from a model and its inputs to maps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from probe import select, tree
from probe.cam import choose
from probe.cam.attention import AttentionWeights
from probe.cam.ingredients import GRADIENTS, LAYERLESS, NAMES, SCORED, Ingredients, layout_of
from probe.cam.methods.gradient import grad_cam
from probe.cam.perturb import Progress
from probe.cam.run import Run
from probe.cam.spot import At, Spot
from probe.cam.state import untouched, warn, warn_if_training
from probe.cam.targets import Classes, Score
from probe.cam.tell import tell
from probe.hooks import on_enter

Method = Callable[..., Tensor]
Target = int | Sequence[int] | Tensor | Score | None
LayerSpec = str | nn.Module | At


def explain(
    model: nn.Module,
    *inputs: Any,
    layer: LayerSpec | Sequence[LayerSpec] | None = None,
    target: Target = None,
    method: Method = grad_cam,
    call: int | None = None,
    batch_size: int = 32,
    progress: bool = False,
    **inputs_by_name: Any,
) -> Any:
    """Class activation maps of any model: ``explain(model, images, layer="layer4", target=281)``.

    The layers before the explained one run without a graph, so the peak of memory is near that of a plain forward. The
    model runs in the modes its user set and is left as it was: gradients, ``requires_grad``, buffers, hooks, random
    numbers, also when something raises. Frozen parameters, ``no_grad``, inference mode, autocast and half-precision
    models work; a compiled model runs eagerly meanwhile.

    Arguments:
        model: the model. Its output may be a tensor, or a tuple, dict or dataclass that holds the logits.
        inputs, inputs_by_name: what it is called with, the batch first.
        layer: a name, a module, `At` where more has to be said, or a list of these; None picks one and says which.
        target: what to explain: a class for all samples, a list or tensor with one for each, None for each sample's top
            class, or a function of the batch's output that returns ``[B]`` scores or a scalar (see
            `probe.cam.targets`).
        method: a function whose required parameters say what it needs: ``activation, gradient`` and others, the public
            attributes of `probe.cam.ingredients.Ingredients`. Options by ``functools.partial``.
        call: which call of a layer that is called several times, from 0.
        batch_size: rows in one forward of methods that score many perturbed inputs.
        progress: show a progress bar for those.

    Returns:
        raw, signed maps ``[B, *spatial]`` of the layer's spatial size, float32 (float64 for such models), on the
        model's device. A list of layers gives a list of maps, from one run.

    Raises:
        NoSuchLayer: no such layer; the message has the nearest names.
        AmbiguousLayout: the shape of the layer's output does not tell what is space; the message says what to pass.
        IndexError: a target class that the output does not have.
        ValueError: the wrong number of targets; a layer that is not called, or several times; a score that does not
            depend on it.

    Warns:
        UserWarning: zero gradients, a map without anything positive, values that are not finite, a model in train mode,
            the layer that was chosen for ``layer=None``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give the number of rows in one forward, at least 1")
    needs = requirements(method)
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain takes an nn.Module, not {type(model).__name__}")
    several = isinstance(layer, (list, tuple))
    with _quietly(model, tree.input_leaves(inputs, inputs_by_name)) as compiled:
        if compiled:
            warn("the model is compiled; it runs eagerly while it is explained, because hooks do not fire in its code")
        run = Run(model, inputs, inputs_by_name, target, batch_size)
        warn_if_training(run.every, "explaining")
        if needs & LAYERLESS and "activation" not in needs:
            maps = [_layerless(run, method, needs, progress)] * (len(layer) if several else 1)  # type: ignore[arg-type]
            tell(maps[0], method_name(method), run, None, None)
        else:
            layers = list(layer) if several else [layer]  # type: ignore[arg-type]
            if not layers:
                raise ValueError("layer=[] names no layer; give names, or None to have one chosen")
            spots, gradients = _look(run, layers, call, needs)
            maps = []
            for spot, gradient in zip(spots, gradients, strict=True):
                maps.append(_map(run, spot, gradient, method, needs, progress))
                tell(maps[-1], method_name(method), run, spot, gradient)
        for note in run.notes:
            warn(note)
    return maps if several else maps[0]


def fixed_layer(model: nn.Module, images: Tensor, layer: LayerSpec | None, target: Target) -> LayerSpec:
    """`layer` so that it means the same in later runs and in copies of the model: by name; None is chosen now."""
    if layer is not None:
        return by_name(model, layer)
    with _quietly(model, [("", images)]):
        run = Run(model, (images,), {}, target, len(images))
        return _choose(run, None, requirements(grad_cam), [])[0][0].name


def by_name(model: nn.Module, layer: LayerSpec) -> LayerSpec:
    """`layer` by its name, where it was given as a module."""
    at = layer if isinstance(layer, At) else At(layer)
    if isinstance(at.layer, str):
        return layer
    name = select.match(select.layers(model), at.layer)[0].name
    return dataclasses.replace(at, layer=name)


def requirements(method: Method) -> frozenset[str]:
    """The names of a method's required parameters.

    Raises:
        TypeError: it is no function, or asks for something that there is not.
    """
    with contextlib.suppress(KeyError, TypeError):  # what cannot be hashed or weakly referenced is not remembered
        return _required[method]
    if not callable(method):
        raise TypeError(f"a method is a function such as cam.grad_cam, not {method!r}")
    needs = frozenset(
        name
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )
    unknown = sorted(needs - NAMES)
    if unknown or not needs:
        what = f"asks for {', '.join(map(repr, unknown))}" if unknown else "asks for nothing"
        raise TypeError(
            f"{method_name(method)} {what}; the parameters of a method are among {', '.join(sorted(NAMES))}"
        )
    with contextlib.suppress(TypeError):
        _required[method] = needs
    return needs


_required: weakref.WeakKeyDictionary[Method, frozenset[str]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _quietly(model: nn.Module, inputs: list[tuple[str, Tensor]]) -> Iterator[bool]:
    """Leave the model as it was, and run it eagerly: whether that is not what it would do."""
    with contextlib.ExitStack() as stack:
        modules = stack.enter_context(untouched(model, [tensor for _, tensor in inputs]))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; functions that the model calls may be, too
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield select.is_compiled(modules)


def _look(
    run: Run, layers: list[Any], call: int | None, needs: frozenset[str]
) -> tuple[list[Spot], list[Tensor | None]]:
    """Run the model once and take values and gradients at the layers."""
    watch = _watching_linears(run) if "weight" in needs else []
    if layers == [None]:
        return _choose(run, call, needs, watch)
    spots = run.spots(layers, call)
    return spots, _values(run, spots, needs, watch)


def _values(run: Run, spots: list[Spot], needs: frozenset[str], watch: list[Any]) -> list[Tensor | None]:
    if not needs & GRADIENTS:
        run.forward(spots, graph=False, watch=watch)
        return [None] * len(spots)
    second = "hessian_product" in needs  # which fused attention has no derivative for
    with sdpa_kernel(SDPBackend.MATH) if second else contextlib.nullcontext():
        run.graph(spots)
    return list(run.gradients(spots, keep="gradient_of" in needs, create=second))


def _choose(
    run: Run, call: int | None, needs: frozenset[str], watch: list[Any]
) -> tuple[list[Spot], list[Tensor | None]]:
    """The best layer, or the next best one where the gradient is zero; the best again where it is zero everywhere."""
    found = None
    for name in choose.candidates(run):
        spots = run.spots([name], call)
        try:
            gradients = _values(run, spots, needs, watch)
        except ValueError:  # called several times, or without influence: no layer to choose
            continue
        found = found or (spots, gradients)
        if gradients[0] is None or bool(layout_of(run, spots[0]).channels_first(gradients[0]).any()):
            found = spots, gradients
            break
    if found is None:
        raise ValueError(
            "layer=None: no layer with space that is called once influences the score; say which, layer=..."
        )
    value = found[0][0].value
    shape = () if value is None else tuple(value.shape)
    warn(f"layer=None: explaining {found[0][0].name!r}, whose output is {shape}; layer= chooses another")
    return found


def _watching_linears(run: Run) -> list[Any]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = tree.inputs(args, kwargs)
        run.linears.append((module, tree.snapshot(given) if isinstance(given, Tensor) else None))

    pointwise = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    modules = [
        layer.module
        for layer in run.every
        if isinstance(layer.module, nn.Linear)
        or (isinstance(layer.module, pointwise) and max(layer.module.kernel_size) == 1)
    ]
    return [functools.partial(on_enter, module, note, with_kwargs=True) for module in modules]


def _map(
    run: Run, spot: Spot, gradient: Tensor | None, method: Method, needs: frozenset[str], progress: bool
) -> Tensor:
    """One layer's maps; methods that score many rows take classes sample by sample, since these are independent."""
    alone = bool(needs & SCORED) and isinstance(run.score, Classes)
    samples: list[int | None] = list(range(run.batch)) if alone else [None]
    maps = []
    for sample in samples:
        bar = _bar(method_name(method) + ("" if sample is None else f" {sample + 1}/{run.batch}")) if progress else None
        ingredients = Ingredients(run, spot, gradient, sample, bar)
        maps.append(method(**{name: getattr(ingredients, name) for name in needs}).detach())
    return torch.cat(maps) if len(maps) > 1 else maps[0]


def _layerless(run: Run, method: Method, needs: frozenset[str], progress: bool) -> Tensor:
    if needs & {"attention", "attention_gradients"}:
        with AttentionWeights(run.batch) as seen:
            run.forward([], graph=False)
        run.attention = seen.weights
    else:
        run.forward([], graph=False)
    ingredients = Ingredients(run, None, None, None, _bar(method_name(method)) if progress else None)
    return method(**{name: getattr(ingredients, name) for name in needs}).detach()


def _bar(label: str) -> Progress:
    from tqdm import tqdm

    return lambda chunks, total: tqdm(chunks, total=total, desc=label)


def method_name(method: Method) -> str:
    while isinstance(method, functools.partial):
        method = method.func
    return getattr(method, "__name__", type(method).__name__)
