"""Why something is not there to be read: a layer that was never called, a gradient that did not come."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from probe import select
from probe.calls import Call
from probe.capture import Kind, Layer
from probe.session import Session
from probe.tree import Opaque, rebuild


def only_holds(layer: Layer) -> bool:
    """Whether the layer is a container that nobody can call (ModuleList, ModuleDict)."""
    kind = type(layer.module)
    called = kind.forward is not nn.Module.forward or kind.__call__ is not nn.Module.__call__
    return not called and not layer.module._parameters


def why_never(session: Session, every: list[Layer], layer: Layer) -> str:
    """Why a layer has no call to show, as far as can be known."""
    module = layer.module
    tap = session.taps.get(layer)
    if not session.passes and session.idle:
        return "nothing was hooked: no values are kept (keep=0), and no observer or log wanted any"
    if not session.passes:
        dynamo = " (was it compiled before that?)" if "torch._dynamo" in sys.modules else ""
        return "the model was not called while the probe was attached" + dynamo
    if all(each.module is not module for each in select.layers(session.model)):
        return "it was replaced by another module while the probe was attached; enter a new Probe afterwards"
    if tap is not None and tap.fired:
        return "it was called, but not in the passes that are kept (keep= says how many)"
    if type(module).__call__ is not nn.Module.__call__:
        return f"never called through hooks: {type(module).__name__} overrides __call__"
    if type(module) is nn.Module and isinstance(session.model, torch.fx.GraphModule):
        return (
            "never called: the program was exported, and its layers are inlined; probe the model before "
            "torch.export.export, or what torch.export.unflatten(program) gives"
        )
    if only_holds(layer):
        return f"never called: {type(module).__name__} only holds other modules"
    for parent in every:
        if isinstance(parent.module, select.WORKS_INSIDE) and any(m is module for m in parent.module.children()):
            kind = type(parent.module).__name__
            return f"never called: its parent {parent.name!r} ({kind}) uses its weights without calling it"
    if any(each.stop for each in session.taps.values()):
        return "never called: stop_after ended the forward before it"
    if not session.whole_passes:
        return "never called: an exception ended the forward before it"
    return (
        "never called: the model skips it, calls its .forward directly, uses its weights in a function, "
        "or took a fused path around it"
    )


def why_no_gradient(call: Call, kind: Kind) -> str | None:
    """Why no gradient came to a call, or None where there is simply none to come (frozen, integer, unused)."""
    if lost_views(call):  # with an output that is a view of the input, the gradient at the input is lost as well
        return (
            "lost: the output is a view and was written to in place afterwards, which drops torch's hook without "
            "a word; use Probe(..., copy_views=True) to hand on a copy instead"
        )
    if kind is Kind.GRAD_INPUT:
        lost = [note for note in call.notes if "lost" in note]
        if lost:
            return lost[0]
    if not call.needs_grad or (kind is Kind.GRAD_INPUT and not call.input_needs_grad):
        return None
    if not call.info.backwards:
        return (
            "no backward pass has come back to it while the probe was attached; call backward() on a loss that depends "
            "on it, inside the with-block"
        )
    return None


def why_no_gradients(calls: list[Call], kinds: Kind) -> str | None:
    """Why there is not one gradient of these kinds in all these calls, where one reason holds for all of them."""
    if not kinds & (Kind.GRAD_INPUT | Kind.GRAD_OUTPUT):
        return None
    if calls and not any(call.info.grad_enabled for call in calls):
        return "the forward ran under no_grad or inference_mode"
    waiting = any(call.needs_grad if Kind.GRAD_OUTPUT in kinds else call.input_needs_grad for call in calls)
    if waiting and not any(call.info.backwards or lost_views(call) for call in calls):
        return (
            "no backward pass has come back while the probe was attached; call backward() on a loss that depends on "
            "the output, inside the with-block"
        )
    return None


def lost_views(call: Call) -> list[str]:
    """Paths of outputs whose gradient hook torch dropped: views that were written to in place."""
    came = {path for each in call.backwards for path in each.grad_output}
    return [path for path, alias, before in call.views if path not in came and alias._version != before]


def missing(call: Call, kinds: Kind, blind: bool) -> list[str]:
    """What is not on a call though it was asked for, in words; `blind`: there are no gradients at all, as was said."""
    if call.raised:
        return [call.raised]
    found = [note for note in call.notes if "lost" not in note]
    asked = [kind for kind in (Kind.GRAD_OUTPUT, Kind.GRAD_INPUT) if kind in kinds]
    if blind or not asked:
        return found
    if not call.needs_grad:
        seen = opaque_types(call.shape_out)
        if seen:
            return [*found, f"no gradient: its output holds {seen}, which the probe does not look into"]
        return [*found, "no gradient: its output needs none (frozen, integer, or computed under no_grad)"]
    for kind in asked:
        side = "grad_output" if kind is Kind.GRAD_OUTPUT else "grad_input"
        if any(getattr(each, side) for each in call.backwards):
            continue
        if kind is Kind.GRAD_INPUT and not call.input_needs_grad:
            continue
        if reason := why_no_gradient(call, kind):
            found.append(f"no {side}: {reason}")
        elif not call.backwards:
            found.append(
                f"no {side}: no gradient was asked back; the loss does not depend on it, or an exception ended the "
                "backward pass before it"
            )
    return found


def opaque_types(value: Any) -> str:
    """The types of objects in a shape that the walker did not look into."""
    found: list[str] = []

    def see(each: Any) -> Any:
        found.append(each.type.__qualname__ if isinstance(each, Opaque) else type(each).__qualname__)
        return each

    rebuild(value, lambda _, slot: slot, opaque=see)
    return ", ".join(dict.fromkeys(found))
