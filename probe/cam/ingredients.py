"""What methods may ask for, by parameter name: made when it is first asked for, channels first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from probe.cam import attention as attentions
from probe.cam import layout as layouts
from probe.cam import targets
from probe.cam.layout import Layout
from probe.cam.methods.score import Rows
from probe.cam.perturb import Progress, cheapest_trunk, masked, pictured, replaced, score_rows
from probe.cam.run import Run
from probe.cam.spot import Spot, hand_on, pick, swap
from probe.hooks import on_output

GRADIENTS = frozenset({"gradient", "hessian_product", "gradient_of"})
"""Ingredients that need the graph of the first run."""

SCORED = frozenset({"masked_score", "replaced_score"})
"""Ingredients that score many perturbed rows."""

LAYERLESS = frozenset({"full_gradients", "attention", "attention_gradients"})
"""Ingredients of the whole model; a method that asks for one has no layer."""


class Ingredients:
    """The requirements of one method at one layer, for the whole batch or for one sample of it.

    Every public attribute may be a parameter of a method.

    Arguments:
        run: a run that has been forwarded (with a graph, if the method needs gradients).
        spot: the layer; None for methods without one.
        native_gradient: ∂score/∂value there, as the layer lays it out.
        sample: one sample's index, or None for all.
        progress: wraps the chunks of a long loop.
    """

    def __init__(
        self, run: Run, spot: Spot | None, native_gradient: Tensor | None, sample: int | None, progress: Progress | None
    ) -> None:
        self._run = run
        self._spot = spot
        self._native_gradient = native_gradient
        self._sample = sample
        self._progress = progress

    # -- at the layer --------------------------------------------------------------------------------------------------

    @cached_property
    def layout(self) -> Layout:
        """How the layer's output is laid out; without a layer, how the tokens of the attention are."""
        if self._spot is None:
            return _token_layout(self._run, self.attention[0].shape[-1])
        return layout_of(self._run, self._spot)

    @cached_property
    def activation(self) -> Tensor:
        """The layer's output, ``[B, C, *spatial]``."""
        return self._front(self._value.detach())

    @cached_property
    def gradient(self) -> Tensor:
        """∂score/∂activation, ``[B, C, *spatial]``."""
        assert self._native_gradient is not None, "explain gives a gradient to the methods that ask for one"
        return self._front(self._native_gradient.detach())

    @cached_property
    def hessian_product(self) -> Tensor:
        """H A, the Hessian of the score at the activation times the activation, ``[B, C, *spatial]``."""
        gradient, value = self._native_gradient, self._value
        if gradient is None or not gradient.requires_grad:
            return torch.zeros_like(self.activation)
        with torch.enable_grad():
            (product,) = torch.autograd.grad(gradient, value, value.detach(), retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.activation) if product is None else self._front(product)

    def gradient_of(self, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Gradient at the layer of another score, a function of the logits ``[B, K]`` and the classes ``[B]``."""
        run, spot = self._run, self._spot
        assert spot is not None
        index = self._run.classes("compares classes").index
        with torch.enable_grad():
            scores = score(targets.class_scores(run.output, run.batch), index)
            return self._front(run.gradients([spot], scores, keep=True)[0])

    def noisy_gradient(self, noise: float) -> Tensor:
        """Gradient at the layer for the input plus Gaussian noise of deviation ``noise * (max - min)``."""
        image, _, _ = self._run.inputs.image()
        flat = image.flatten(1)
        deviation = noise * (flat.amax(1) - flat.amin(1)).view(-1, *[1] * (image.dim() - 1))
        assert self._spot is not None
        other = self._run.like(*self._run.inputs.with_image(image + deviation * torch.randn_like(image)))
        spot = Spot(self._spot.at, self._spot.layer, self._spot.call)
        other.graph([spot])
        return self._front(other.gradients([spot])[0])

    # -- scores --------------------------------------------------------------------------------------------------------

    @cached_property
    def score(self) -> Tensor:
        """The explained scores, ``[B]``."""
        scores = self._run.scores
        assert scores is not None
        if scores.dim() == 0 and self._run.batch > 1:
            raise ValueError(
                f"the target returned one scalar for {self._run.batch} samples; this method compares scores of "
                "samples: return [B] scores"
            )
        scores = scores.detach().reshape(-1)
        return scores if self._sample is None else scores[self._sample : self._sample + 1]

    @cached_property
    def size(self) -> tuple[int, ...]:
        """Spatial size of the input."""
        return self._run.inputs.image()[1]

    def masked_score(self, masks: Rows, count: int, probability: bool = False) -> Tensor:
        """Scores ``[B, count]`` of the input times masks; ``masks(slice)`` makes some, ``[B, len(slice), *size]``."""
        rows = masked(self._run, masks, self._sample)
        return self._scores(rows, count, functools.partial(pictured, self._run), probability)

    def replaced_score(self, activations: Rows, count: int) -> Tensor:
        """Scores ``[B, count]`` when the layer returns other activations, ``[B, len(slice), C, *spatial]``."""
        run, spot, layout = self._run, self._spot, self.layout
        assert spot is not None
        native, axis = self._value.detach(), layout.batch
        trunk = cheapest_trunk(run, spot, axis)

        def output(rows: Tensor, samples: Tensor) -> Any:
            like = native.index_select(axis, samples.to(native.device))
            return replaced(run, spot, layout.restore(rows.to(native.dtype), like), samples, trunk)

        return self._scores(activations, count, output, False)

    def _scores(self, make: Rows, count: int, output_of: Callable[[Tensor, Tensor], Any], probability: bool) -> Tensor:
        return score_rows(
            self._run, make, count, output_of, probability=probability, sample=self._sample, progress=self._progress
        )

    # -- the model -----------------------------------------------------------------------------------------------------

    @cached_property
    def weight(self) -> Tensor:
        """Rows of the linear layer behind the pooling, one for each sample's class, ``[B, C]``."""
        classes = self._run.classes("reads a class's weights")
        channels, name = self.activation.shape[1], self._spot.name if self._spot else ""
        fitting = [
            (module, given)
            for module, given in self._run.linears
            if module.weight.shape[1] == channels and int(classes.index.max()) < module.weight.shape[0]
        ]
        if not fitting:
            raise ValueError(
                f"CAM needs a linear layer from the {channels} channels of {name!r} to the classes, behind global "
                "average pooling; this model has none: use cam.grad_cam, which needs neither"
            )
        module, given = fitting[-1]
        pooled = self.activation.float().flatten(2).mean(2)
        if (
            given is None
            or given.numel() != pooled.numel()
            or not torch.allclose(
                given.float().reshape(pooled.shape), pooled, rtol=1e-2, atol=1e-3 * float(pooled.abs().max())
            )
        ):
            self._run.notes.append(
                f"CAM: what the linear layer receives is not the average of {name!r}: something (a ReLU, a norm, "
                "another pooling) stands between, and the map does not add up to the score; cam.grad_cam needs neither"
            )
        rows: Tensor = module.weight.detach().flatten(1)
        return rows[classes.index.to(rows.device)]

    @cached_property
    def guided_gradient(self) -> Tensor:
        """Guided back-propagation's gradient at the input, ``[B, C, *size]``."""
        with attentions.GuidedReLU() as guided:
            leaf, other = self._from_input()
            other.forward([], graph=False, whole=True)
        if not guided.found:
            raise ValueError("guided back-propagation changes ReLUs, and this model has none: use cam.grad_cam")
        (gradient,) = _input_gradients(other, [leaf])
        return gradient.movedim(-1, 1) if self._run.inputs.image()[2] else gradient

    @cached_property
    def full_gradients(self) -> list[Tensor]:
        """FullGrad's terms: input times gradient, then bias times gradient of every convolution and batch norm."""
        if any(isinstance(module, _NormBase) and module.training for module in self._run.model.modules()):
            self._run.notes.append(
                "FullGrad: a batch norm in train mode has no bias of its own; its terms are left out, the others do "
                "not add up to the score"
            )
        with torch.no_grad():
            biased = [(module, bias) for module in self._run.model.modules() if (bias := _bias(module)) is not None]
        seen: list[tuple[Tensor, Tensor]] = []

        def noting(module: nn.Module, bias: Tensor) -> Callable[[], Any]:
            def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
                if not output.requires_grad:
                    return None
                seen.append((bias, output))
                return hand_on(output)

            return functools.partial(on_output, module, note)

        leaf, other = self._from_input()
        other.forward([], graph=False, whole=True, watch=[noting(module, bias) for module, bias in biased])
        at_input, *gradients = _input_gradients(other, [leaf, *(output for _, output in seen)])
        terms = [leaf.detach() * at_input]
        terms = [term.movedim(-1, 1) for term in terms] if self._run.inputs.image()[2] else terms
        for (bias, output), gradient in zip(seen, gradients, strict=True):
            if output.dim() == leaf.dim():
                terms.append(gradient * bias.view(1, -1, *[1] * (output.dim() - 2)))
        return terms

    @cached_property
    def attention(self) -> list[Tensor]:
        """Every layer's attention weights, first to last, ``[B, heads, N, N]``."""
        return attentions.checked_attention(self._run.attention, self._run.batch)

    @cached_property
    def attention_gradients(self) -> list[Tensor]:
        """∂y_l/∂W_l of every layer: W_l its attention weights, y_l the score read off the tokens after it."""
        run = self._run
        count = len(self.attention)
        blocks = _blocks(run.model, count)
        tokens: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            tensor = pick(output, None, run.batch)[1]
            tokens.append(tensor)
            return swap(output, tensor, hand_on(tensor))

        with attentions.AttentionWeights(run.batch) as seen:
            other = self._from_input()[1] if run.inputs.has_image else run.like(run.inputs.args, run.inputs.kwargs)
            watch = [functools.partial(on_output, block, note) for block in blocks]
            other.forward([], graph=False, whole=True, watch=watch)
        assert other.scores is not None
        assert run.score is not None
        (last,) = other.spots([blocks[-1]], None)
        last.value = tokens[-1]
        axis = 0 if len(tokens[-1]) == run.batch else 1
        trunk = cheapest_trunk(other, last, axis) if count > 1 else "all"
        samples = torch.arange(run.batch)
        found = []
        for edge, value in zip(seen.edges, tokens, strict=True):
            score = other.scores
            if value is not tokens[-1]:
                output = replaced(other, last, value, samples, trunk if trunk == "empty" else "all")
                with torch.enable_grad():
                    score = run.score(output)
            if isinstance(edge, Tensor) and not edge.requires_grad:
                raise ValueError(
                    "LeGrad needs a graph that reaches the attention: with inputs that are whole numbers it starts at "
                    "the parameters, and they are frozen; unfreeze the embedding, requires_grad_(True)"
                )
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(score.float().sum(), edge, retain_graph=True)
            found.append(gradient.reshape(run.batch, -1, *gradient.shape[-2:]))
        return found

    # -- helpers -------------------------------------------------------------------------------------------------------

    @property
    def _value(self) -> Tensor:
        assert self._spot is not None
        assert self._spot.value is not None
        return self._spot.value

    def _front(self, native: Tensor) -> Tensor:
        front = self.layout.channels_first(native.detach())
        return front if self._sample is None else front[self._sample : self._sample + 1]

    def _from_input(self) -> tuple[Tensor, Run]:
        """A leaf with the image's values, and a run of the same explanation that starts there."""
        image, _, _ = self._run.inputs.image()
        leaf = image.detach().clone().requires_grad_()
        with torch.enable_grad():
            other = self._run.like(*self._run.inputs.with_image(hand_on(leaf)))
        return leaf, other


NAMES = frozenset(name for name in vars(Ingredients) if not name.startswith("_"))
"""What there is to ask for."""


def layout_of(run: Run, spot: Spot) -> Layout:
    """How a spot's value is laid out: as the user says, or as its shape tells."""
    if spot.at.layout is not None:
        return spot.at.layout
    assert spot.value is not None
    return layouts.infer(
        spot.value.shape,
        inputs=run.inputs.tensors,
        batch=run.batch,
        module=spot.layer.module,
        model=run.model,
        name=spot.name,
    )


def _token_layout(run: Run, tokens: int) -> Layout:
    if not run.inputs.has_image:  # text: every token is a position
        return Layout("tokens", grid=(tokens,))
    _, size, _ = run.inputs.image()
    layout = layouts.token_grid(tokens, size, run.model)
    if layout is None:
        raise layouts.AmbiguousLayout(
            f"{tokens} tokens of an input of size {size}: the grid that they make is not clear. Call the method on the "
            'attention weights yourself, with cam.Layout("tokens", grid=..., prefix=...)'
        )
    return layout


def _input_gradients(run: Run, leaves: list[Tensor]) -> list[Tensor]:
    assert run.scores is not None
    if not run.scores.requires_grad:
        raise ValueError("the score does not depend on the input: the model detaches something on the way")
    with torch.enable_grad():
        found = torch.autograd.grad(run.scores.float().sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, found, strict=True)]


def _bias(module: nn.Module) -> Tensor | None:
    """What a layer adds to each channel whatever comes in: its bias, or that of a batch norm with its running mean."""
    if isinstance(module, _ConvNd):
        return module.bias
    if isinstance(module, _NormBase) and not module.training and module.running_mean is not None:
        assert module.running_var is not None
        scale = (module.running_var + module.eps).rsqrt()
        bias = -module.running_mean * scale
        return bias if module.weight is None else bias * module.weight + module.bias
    return None


def _blocks(model: nn.Module, count: int) -> list[nn.Module]:
    """The model's transformer blocks: the outermost list of `count` modules of one type."""
    for module in model.modules():
        children = list(module.children())
        one_type = len({type(child) for child in children}) == 1
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) == count and one_type:
            return children
    raise ValueError(
        f"LeGrad reads the score off the tokens after each of the {count} attention layers, and this model has no list "
        f"of {count} equal blocks: use cam.attention_rollout, or cam.grad_cam at the last block's first norm"
    )
