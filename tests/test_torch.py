"""What the code relies on in torch beyond its documented surface. A failure here says what a new torch changed."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

graph_task = torch._C._current_graph_task_id
sequence = torch._C._autograd._get_sequence_nr
address = torch._C._data_address

MODES = pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=["grad", "no_grad", "inference"]
)


# -- copy-on-write -----------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("write", ["mul_", "relu", "iadd", "view", "data", "numpy", "out", "copy_", "set_item"])
def test_lazy_clone_keeps_the_old_bytes_whatever_writes(mode: Any, write: str) -> None:
    """``torch._lazy_clone`` shares memory until somebody writes by any road; then the clone has what was before."""
    with mode():
        live = torch.arange(6.0).view(2, 3) + 0
        kept = torch._lazy_clone(live.detach())
        assert address(kept) == address(live)
        if write == "mul_":
            live.mul_(2)
        elif write == "relu":
            F.relu(live.sub_(3), inplace=True)
        elif write == "iadd":
            live += 1
        elif write == "view":
            live[:, 1].zero_()
        elif write == "data":
            live.data.add_(1)
        elif write == "numpy":
            live.numpy()[:] = 7
        elif write == "out":
            torch.add(live, 1, out=live)
        elif write == "copy_":
            live.copy_(torch.zeros(2, 3))
        else:
            live[0, 2] = 9
        assert address(kept) != address(live)
        assert torch.equal(kept, torch.arange(6.0).view(2, 3))
        assert not torch.equal(kept, live)


@MODES
def test_write_to_a_lazy_clone_does_not_reach_the_original(mode: Any) -> None:
    """Both ways: who writes to the capture leaves the model's tensor alone, and its version."""
    with mode():
        live = torch.ones(3)
        kept = torch._lazy_clone(live.detach())
        kept.zero_()
        assert torch.equal(live, torch.ones(3))
        if mode is not torch.inference_mode:
            assert live._version == 0


def test_lazy_clone_and_autograd() -> None:
    """A clone of ``detach()`` belongs to no graph; saved tensors of the graph keep their version and are not copied."""
    x = torch.randn(3, requires_grad=True)
    y = x.exp()
    before = address(y)
    kept = torch._lazy_clone(y.detach())
    assert kept.grad_fn is None
    assert not kept._is_view()
    y.sum().backward()
    assert torch.equal(x.grad, kept)
    assert address(y) == before
    assert torch._lazy_clone(y).grad_fn is not None  # without detach() it is an operation of autograd


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, 6)[1:, ::2],
        lambda: torch.randn(2, 3).T,
        lambda: torch.randn(1, 1).expand(3, 4),
        lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
)
def test_lazy_clone_keeps_the_geometry(make: Any) -> None:
    """Strides and storage offset are those of the tensor."""
    live = make()
    kept = torch._lazy_clone(live)
    assert (kept.stride(), kept.storage_offset(), kept.shape) == (live.stride(), live.storage_offset(), live.shape)
    assert torch.equal(kept, live)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_lazy_clone_of_any_dtype(dtype: torch.dtype) -> None:
    """No floating point is needed."""
    live = torch.ones(4, dtype=dtype)
    kept = torch._lazy_clone(live)
    live.zero_()
    assert torch.equal(kept, torch.ones(4, dtype=dtype))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("source", ["numpy", "shared", "mmap", "sparse", "nested"])
def test_what_lazy_clone_refuses(source: str, tmp_path: Any) -> None:
    """NumPy-backed, shared and mapped storages and sparse and nested layouts raise one of two exceptions."""
    if source == "numpy":
        live = torch.from_numpy(torch.ones(3).numpy().copy())
    elif source == "shared":
        live = torch.ones(3).share_memory_()
    elif source == "mmap":
        torch.save(torch.ones(3), tmp_path / "x.pt")
        live = torch.load(tmp_path / "x.pt", mmap=True)
    elif source == "sparse":
        live = torch.ones(3).to_sparse()
    else:
        live = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch._lazy_clone(live)
    assert live.detach().clone() is not live


def test_reading_the_data_pointer_makes_a_copy() -> None:
    """``data_ptr()`` counts as a write (so it must not be asked for), ``_data_address`` does not."""
    live = torch.ones(3)
    kept = torch._lazy_clone(live)
    assert address(kept) == address(live)
    kept.data_ptr()
    assert address(kept) != address(live)


def test_a_numpy_view_taken_before_the_clone_writes_through() -> None:
    """The one thing that copy-on-write cannot see: the documented limit of a capture."""
    live = torch.ones(3)
    array = live.numpy()
    kept = torch._lazy_clone(live)
    array[:] = 5
    assert torch.equal(kept, torch.full((3,), 5.0))


def test_a_lazy_clone_shares_among_many() -> None:
    """Several clones of one tensor: a write copies once for all that stay behind, none of them changes."""
    live = torch.ones(3)
    first = torch._lazy_clone(live)
    second = torch._lazy_clone(live)
    third = torch._lazy_clone(first)
    live.zero_()
    assert all(torch.equal(kept, torch.ones(3)) for kept in (first, second, third))
    assert address(first) == address(second) == address(third)


def test_storage_identity() -> None:
    """``_cdata`` tells one storage from another while either is alive; a lazy clone has a storage of its own."""
    live = torch.ones(4)
    assert live[1:].untyped_storage()._cdata == live.untyped_storage()._cdata
    assert live.detach().untyped_storage()._cdata == live.untyped_storage()._cdata
    assert torch._lazy_clone(live).untyped_storage()._cdata != live.untyped_storage()._cdata


def test_wrappers_of_torch_func_have_no_storage() -> None:
    """That is how the short way of a capture notices them: a lazy clone of a wrapper would be a dead wrapper later."""
    seen: list[Any] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        assert torch._C._functorch.is_functorch_wrapped_tensor(x)
        assert type(x) is torch.Tensor
        with pytest.raises((RuntimeError, NotImplementedError)):
            x.untyped_storage()
        value = x.detach().clone()
        while torch._C._functorch.is_functorch_wrapped_tensor(value):
            value = torch._C._functorch.get_unwrapped(value)
        seen.append(value.detach())
        return (x**2).sum()

    x = torch.randn(3, 2)
    torch.vmap(function)(x)
    torch.func.grad(function)(x)
    torch.vmap(torch.func.grad(function))(x)
    assert all(torch.equal(value, x) for value in seen)
    assert len(seen) == 3


def test_versions() -> None:
    """``detach()`` shares the version counter with its base, inference tensors have none."""
    live = torch.ones(3)
    alias, view = live.detach(), live[1:]
    view.add_(1)
    assert live._version == alias._version == view._version == 1
    assert live.data._version == 0
    with torch.inference_mode(), pytest.raises(RuntimeError, match="version counter"):
        _ = torch.ones(3)._version


# -- the autograd graph ------------------------------------------------------------------------------------------------


def test_sequence_numbers_tell_what_was_made_since() -> None:
    """Nodes made from now on have the current number or a higher one; the wrapper object of a node stays one object."""
    x = torch.ones(3, requires_grad=True)
    early = x * 2
    since = sequence()
    late = early.exp()
    assert early.grad_fn._sequence_nr() < since <= late.grad_fn._sequence_nr() < sequence()
    with torch.no_grad():
        early.exp()
    assert sequence() == late.grad_fn._sequence_nr() + 1


def test_accumulate_grad_counts_as_newest() -> None:
    """The node of a leaf has the highest number there is: a walk by number never stops before it, and it ends there."""
    x = torch.ones(3, requires_grad=True)
    node, position = (x * 2).grad_fn.next_functions[0]
    assert node is torch.autograd.graph.get_gradient_edge(x).node
    assert position == 0
    assert node._sequence_nr() == 2**64 - 1
    assert node.next_functions == ()


def test_sequence_numbers_are_each_threads_own() -> None:
    """They start anew in a new thread: numbers of two threads cannot be compared."""
    for _ in range(3):
        torch.ones(1, requires_grad=True) * 2
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(sequence()))
    thread.start()
    thread.join()
    assert found[0] < sequence()


def test_edges_are_found_by_identity() -> None:
    """A node is one Python object while its tensor lives: ``(node, number)`` serves as the key of an edge."""
    x = torch.randn(4, 2, requires_grad=True) * 1
    left, right = x.unbind(1)
    assert left.grad_fn is right.grad_fn
    assert (left.output_nr, right.output_nr) == (0, 1)
    product = left * right
    assert product.grad_fn.next_functions == ((left.grad_fn, 0), (left.grad_fn, 1))
    assert left.grad_fn.next_functions[0][0] is x.grad_fn
    assert torch.autograd.graph.get_gradient_edge(left)[:2] == (left.grad_fn, 0)
    assert {(left.grad_fn, 0): 1}[product.grad_fn.next_functions[0]] == 1


def test_nodes_take_post_hooks() -> None:
    """``Node.register_hook`` sees what the node hands back, None where nothing was asked, and hands it on unchanged."""
    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    product = x * w
    seen: list[Any] = []
    handle = product.grad_fn.register_hook(lambda grad_inputs, grad_outputs: seen.append((grad_inputs, grad_outputs)))
    (got,) = torch.autograd.grad(product.sum(), x, retain_graph=True)
    (inputs, outputs) = seen.pop()
    assert torch.equal(inputs[0], got)
    assert inputs[1] is None
    assert torch.equal(outputs[0], torch.ones(3))
    handle.remove()
    product.sum().backward()
    assert seen == []


def test_queued_callbacks_run_at_the_end_of_this_backward() -> None:
    """``queue_callback``: once, after the last node, in the same graph task; a nested backward has its own."""
    order: list[Any] = []
    engine = torch.autograd.Variable._execution_engine

    def last() -> None:
        order.append(("end", graph_task()))

    def early(gradient: torch.Tensor) -> None:
        order.append(("hook", graph_task()))
        engine.queue_callback(last)

    x = torch.ones(1, requires_grad=True)
    inner = x * 2
    y = inner * 3
    y.register_hook(early)
    inner.register_hook(lambda gradient: order.append(("later hook", graph_task())))
    y.sum().backward()
    assert [what for what, _ in order] == ["hook", "later hook", "end"]
    assert len({task for _, task in order}) == 1
    with pytest.raises(RuntimeError):
        engine.queue_callback(last)  # only during backward


def test_queued_callbacks_of_a_backward_that_raised_are_dropped() -> None:
    """A backward that raises runs none of the callbacks that were queued in it: what they were to end stays open."""
    ended: list[int] = []

    def early(gradient: torch.Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: ended.append(1))

    def fails(gradient: torch.Tensor) -> None:
        raise ValueError("mine")

    x = torch.ones(1, requires_grad=True)
    inner = x * 2
    y = inner * 3
    y.register_hook(early)
    inner.register_hook(fails)
    with pytest.raises(ValueError, match="mine"):
        y.sum().backward()
    assert ended == []


def test_graph_task_id() -> None:
    """-1 outside of backward, else a number that no other backward has, also for each nested one."""
    seen: list[int] = []
    x = torch.ones(1, requires_grad=True)

    def nested(gradient: torch.Tensor) -> None:
        seen.append(graph_task())
        with torch.enable_grad():
            inner = torch.ones(1, requires_grad=True) * 2
            inner.register_hook(lambda g: seen.append(graph_task()))
            inner.sum().backward()
        seen.append(graph_task())

    assert graph_task() == -1
    for _ in range(2):
        y = x * 2
        y.register_hook(nested)
        y.sum().backward()
    assert graph_task() == -1
    assert seen[0] == seen[2]
    assert seen[3] == seen[5]
    assert len(set(seen)) == 4
    assert -1 not in seen


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_runs_inside_a_graph_task(reentrant: bool) -> None:
    """Under both modes of activation checkpointing the second run has a graph task; the first has none."""
    tasks: list[int] = []
    nodes: list[Any] = []
    grads: list[bool] = []
    fc = nn.Linear(2, 2)

    def block(x: torch.Tensor) -> torch.Tensor:
        tasks.append(graph_task())
        nodes.append(torch._C._current_autograd_node() if graph_task() != -1 else None)
        grads.append(torch.is_grad_enabled())
        return torch.tanh(fc(x))

    since = sequence()
    out = checkpoint(block, torch.ones(1, 2, requires_grad=True), use_reentrant=reentrant)
    number = out.grad_fn._sequence_nr()
    out.sum().backward()
    assert tasks[0] == -1 != tasks[1]
    assert grads == [not reentrant, True]
    if reentrant:  # the node that recomputes was made before the forward ran, and bears the number of that moment
        assert isinstance(nodes[1], torch.autograd.function.BackwardCFunction)
        assert since <= nodes[1]._sequence_nr() == number
    else:
        assert not isinstance(nodes[1], torch.autograd.function.BackwardCFunction)


def test_the_first_hook_of_a_tensor_is_like_any_other() -> None:
    """What `on_gradient_of` puts on itself runs, takes turns, outlives in-place operations and goes as torch's do."""
    from probe.hooks import Hook, on_gradient_of

    seen: list[str] = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    ours = on_gradient_of(y, y.grad_fn, Hook(lambda g: seen.append(f"ours {g.item():g}")))
    y.register_hook(lambda g: seen.append("theirs"))
    z = y.mul_(3)
    second = on_gradient_of(z, z.grad_fn, Hook(lambda g: seen.append(f"after {g.item():g}")))
    z.sum().backward(retain_graph=True)
    assert seen == ["after 1", "ours 3", "theirs"]
    ours.remove()
    ours.remove()
    second.remove()
    seen.clear()
    z.sum().backward()
    assert seen == ["theirs"]
    assert ours.hooks_dict_ref() is not None
    del y, z
    assert ours.hooks_dict_ref() is None
    ours.remove()


def test_hooks_go_with_the_graph() -> None:
    """``hooks_dict_ref`` of a handle dies with what it hooks: that is how handles of dead graphs are found."""
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    on_tensor, on_node = y.register_hook(lambda g: None), y.grad_fn.register_hook(lambda *g: None)
    assert on_tensor.hooks_dict_ref() is not None
    assert on_node.hooks_dict_ref() is not None
    del y
    assert on_tensor.hooks_dict_ref() is None
    assert on_node.hooks_dict_ref() is None
    on_tensor.remove()
    on_node.remove()


def test_graphs_are_freed_by_reference_counting() -> None:
    """A hook whose closure reaches nothing of the graph leaves no cycle; one that holds its own tensor does."""
    gc.disable()
    try:
        x = torch.ones(1, requires_grad=True)
        y = x.exp()
        y.register_hook(lambda g: None)
        dead = weakref.ref(y)
        del y
        assert dead() is None
    finally:
        gc.enable()


def test_tensor_hook_stays_with_the_value_before_an_inplace_write() -> None:
    """A hook put on before the write gets the gradient before it; on a view that is written to it never fires."""
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    hidden = x * 1
    seen: list[Any] = []
    hidden.register_hook(seen.append)
    F.relu(hidden, inplace=True).sum().backward()
    assert torch.equal(seen.pop(), torch.tensor([0.0, 1.0]))

    view = (x * 1).view(2)
    view.register_hook(seen.append)
    F.relu(view, inplace=True).sum().backward()
    assert seen == []


def test_tensor_hooks_run_in_the_order_they_came() -> None:
    """Each gets what the one before returned."""
    x = torch.ones(1, requires_grad=True) * 1
    seen: list[float] = []
    x.register_hook(lambda g: g * 2)
    x.register_hook(lambda g: seen.append(g.item()))
    x.sum().backward()
    assert seen == [2.0]


def test_backward_hooks_attribute_of_tensors() -> None:
    """None until the first hook; it may be set to None again, which is what an untouched tensor has."""
    x = torch.ones(1, requires_grad=True)
    assert x._backward_hooks is None
    handle = x.register_hook(lambda g: g * 5)
    handle.remove()
    assert len(x._backward_hooks) == 0
    x._backward_hooks = None
    (x * 3).sum().backward()
    assert x.grad.item() == 3
    x.register_hook(lambda g: g * 2)
    (x * 3).sum().backward()
    assert x.grad.item() == 9


VIEWS = {
    "InstanceNorm1d": (nn.InstanceNorm1d(4), (2, 4, 3)),
    "InstanceNorm2d": (nn.InstanceNorm2d(4), (2, 4, 3, 3)),
    "Flatten": (nn.Flatten(), (2, 4, 3)),
    "Unflatten": (nn.Unflatten(1, (2, 2)), (2, 4)),
    "MaxPool1d": (nn.MaxPool1d(2), (2, 4, 6)),
    "AvgPool1d": (nn.AvgPool1d(2), (2, 4, 6)),
    "LSTM(batch_first)": (nn.LSTM(4, 4, batch_first=True), (2, 3, 4)),
    "Conv2d, unbatched": (nn.Conv2d(4, 4, 1), (4, 3, 3)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_builtin_modules_that_return_views(name: str) -> None:
    """The list in the documentation of ``copy_views``."""
    module, shape = VIEWS[name]
    out = module(torch.randn(shape, requires_grad=True) * 1)
    assert (out[0] if isinstance(out, tuple) else out)._is_view()


# -- modules -----------------------------------------------------------------------------------------------------------


class Raises(nn.Module):
    def forward(self, error: type[BaseException] | None = None) -> Any:
        if error is not None:
            raise error("mine")
        return None


def test_always_call_hooks() -> None:
    """They run on Exception with None for the output, and not on KeyboardInterrupt, SystemExit and GeneratorExit."""
    module, seen = Raises(), []
    module.register_forward_hook(lambda m, args, output: seen.append(output), always_call=True)
    for error in (ValueError, StopIteration, KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error):
            module(error)
    assert seen == [None, None]


def test_always_call_hooks_see_the_exception_on_its_way() -> None:
    """Its traceback begins in ``_call_impl`` of the module that it leaves: so one handled further out is told apart."""
    module, seen = Raises(), []

    def hook(m: nn.Module, args: Any, output: Any) -> None:
        error = sys.exc_info()[1]
        frame = error.__traceback__.tb_frame
        seen.append(frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is m)

    module.register_forward_hook(hook, always_call=True)
    with contextlib.suppress(ValueError):
        module(ValueError)
    try:
        raise KeyError
    except KeyError:
        module()
    assert seen == [True, False]


def test_hooks_that_are_removed_while_they_are_due() -> None:
    """Torch runs a snapshot of the hooks, but asks only then whether one takes keywords: a removed one gets none."""
    module, seen = nn.Identity(), []

    def with_keywords() -> Any:
        return module.register_forward_pre_hook(lambda *given: seen.append(len(given)), with_kwargs=True)

    due: list[Any] = []
    module.register_forward_pre_hook(lambda m, args: due.pop().remove() if due else None)
    due.append(with_keywords())
    module(torch.ones(1))
    with_keywords()
    module(torch.ones(1))
    assert seen == [2, 3]


def test_full_backward_hook_leaves_a_flag() -> None:
    """After its removal ``_is_full_backward_hook`` stays True, and the legacy hook is refused for ever."""
    module = nn.Linear(2, 2)
    assert module._is_full_backward_hook is None
    module.register_full_backward_hook(lambda *_: None).remove()
    assert module._is_full_backward_hook is True
    with pytest.raises(RuntimeError, match="Cannot use both"):
        module.register_backward_hook(lambda *_: None)
    module._is_full_backward_hook = None
    module.register_backward_hook(lambda *_: None)


def test_full_backward_hook_and_inplace() -> None:
    """What ``backward="module"`` translates: the words of the error, and the node that shows whose output it was."""
    module = nn.Linear(2, 2)
    module.register_full_backward_hook(lambda *_: None)
    out = module(torch.ones(1, 2, requires_grad=True))
    assert out.grad_fn.name() == "BackwardHookFunctionBackward"
    with pytest.raises(RuntimeError, match=r"BackwardHookFunction.* is a view and is being modified inplace"):
        out.relu_()


def test_full_backward_hook_runs_in_its_node() -> None:
    """``_current_autograd_node()`` in the hook was made by this very call, after the pre-hooks and before the next."""
    module, seen = nn.Linear(2, 2), []
    numbers: list[int] = []
    module.register_forward_pre_hook(lambda m, args: numbers.append(sequence()))
    module.register_full_backward_hook(lambda *_: seen.append(torch._C._current_autograd_node()._sequence_nr()))
    x = torch.ones(1, 2, requires_grad=True)
    module(module(x)).sum().backward()
    assert numbers[0] <= seen[1] < numbers[1] <= seen[0]


def test_the_fast_path_of_modules() -> None:
    """A module whose hook dictionaries are empty calls forward directly: that is why an exited probe costs nothing."""
    module = nn.Linear(2, 2)
    hooks = [name for name in vars(module) if "hook" in name and isinstance(getattr(module, name), dict)]
    assert {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"} <= set(hooks)
    handle = module.register_forward_hook(lambda *_: None, always_call=True)
    handle.remove()
    assert not any(getattr(module, name) for name in hooks)


def test_hooks_switch_the_fused_transformer_layer_off() -> None:
    """In eval the layer takes a fused path that calls no child; any hook on one of its modules disables that."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    x = torch.randn(2, 3, 4)
    called: list[str] = []
    with torch.no_grad():
        handle = layer.linear2.register_forward_pre_hook(lambda *_: called.append("linear2"))
        out = layer(x)
        handle.remove()
        torch.testing.assert_close(layer(x), out)
    assert called == ["linear2"]


def test_multihead_attention_never_calls_its_projection() -> None:
    """``out_proj`` is used by its weights alone, in train and in eval: so it is not among the default layers."""
    attention = nn.MultiheadAttention(4, 2)
    called: list[int] = []
    attention.out_proj.register_forward_hook(lambda *_: called.append(1))
    x = torch.randn(3, 2, 4)
    attention(x, x, x)[0].sum().backward()
    attention.eval()(x, x, x)
    assert called == []
    assert attention.out_proj.weight.grad is not None


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_script_modules() -> None:
    """They refuse hooks, and their ``_modules`` is a mapping without iteration."""
    scripted = torch.jit.script(nn.Sequential(nn.Tanh()))
    assert list(scripted._modules.keys()) == ["0"]
    for register in (scripted.register_forward_hook, scripted.register_forward_pre_hook):
        with pytest.raises(RuntimeError, match="not supported on ScriptModules"):
            register(lambda *_: None)
    traced = torch.jit.trace(nn.Sequential(nn.Tanh()), torch.ones(1))
    assert isinstance(next(traced.children()), torch.jit.ScriptModule)


def test_tracing_is_noticed() -> None:
    """``_is_tracing`` and ``is_exporting`` tell when values are not values."""
    assert not torch._C._is_tracing()
    assert not torch.compiler.is_exporting()
    seen: list[bool] = []

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.compiler.is_exporting())
            return x * 2

    torch.export.export(Model(), (torch.ones(2),))
    assert True in seen


def test_optimizer_step_hooks() -> None:
    """Once a ``step()``, also one with a closure that is evaluated many times; GradScaler goes through them as well."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight], max_iter=4)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert seen == ["before", "after"]


# -- copying and saving ------------------------------------------------------------------------------------------------


def test_an_inert_hook_needs_no_package() -> None:
    """``nullcontext().__exit__`` takes anything, returns None, and its pickle names the standard library alone."""
    inert = contextlib.nullcontext().__exit__
    assert inert(nn.Linear(1, 1), (torch.ones(1),), torch.ones(1)) is None
    data = pickle.dumps(inert)
    assert pickle.loads(data)(1, 2, 3) is None
    assert b"torch" not in data


def test_a_bound_method_is_copied_as_what_it_is_bound_to_says() -> None:
    """So may a hook be one: Python calls it with no detour through C, and a copy of the model has an inert one."""

    class Held:
        def __exit__(self, *given: Any) -> str:
            return "held"

        def __deepcopy__(self, memo: Any) -> contextlib.nullcontext[None]:
            return contextlib.nullcontext()

        def __reduce__(self) -> Any:
            return contextlib.nullcontext, ()

    module = nn.Linear(1, 1)
    module.register_forward_hook(Held().__exit__)
    (copied,) = copy.deepcopy(module)._forward_hooks.values()
    assert isinstance(getattr(copied, "__self__", None), contextlib.nullcontext)
    assert pickle.loads(pickle.dumps(Held().__exit__))(module, (), 1) is None


def test_deepcopy_and_pickle_carry_hooks_along() -> None:
    """A copy of a hooked model has the hooks: so they must know how to be copied."""

    class Hook:
        def __call__(self, *given: Any) -> None: ...

        def __deepcopy__(self, memo: Any) -> str:
            return "copied"

    module = nn.Linear(1, 1)
    module.register_forward_hook(Hook())
    assert list(copy.deepcopy(module)._forward_hooks.values()) == ["copied"]
    assert copy.copy(module)._forward_hooks is module._forward_hooks


def test_hooked_parameters_can_be_saved() -> None:
    """Torch warns about tensors with hooks unless these say that they do not belong into the file."""

    class Hook:
        __torch_unserializable__ = True

        def __call__(self, gradient: torch.Tensor) -> None: ...

    for leaf in (torch.ones(2, requires_grad=True), nn.Parameter(torch.ones(2))):
        leaf.register_hook(Hook())
        torch.save(leaf, io.BytesIO())
        copy.deepcopy(leaf)


# -- wrappers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_where_wrappers_hold_the_users_module() -> None:
    """By type and attribute: ``module`` for the parallel ones, ``_orig_mod`` for torch.compile."""
    module = nn.Linear(2, 2)
    assert nn.DataParallel(module).module is module
    assert nn.parallel.DistributedDataParallel(module).module is module
    compiled = torch.compile(module, backend="eager")
    assert compiled._orig_mod is module
    assert type(compiled) is torch._dynamo.eval_frame.OptimizedModule
    assert module._compiled_call_impl is None
    module.compile(backend="eager")
    assert module._compiled_call_impl is not None


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("process_group")
def test_the_store_of_the_default_group() -> None:
    """It has the group's time-out; a clone sees the same keys; the group is a weak key."""
    store = dist.distributed_c10d._get_default_store()
    assert store.timeout.total_seconds() > 0
    clone = store.clone()
    store.set("a", "b")
    assert clone.multi_get(["a"]) == [b"b"]
    assert weakref.WeakKeyDictionary({dist.group.WORLD: 1})[dist.group.WORLD] == 1
    assert "cpu:gloo" in dist.get_backend_config().split(",")


def test_a_callback_of_backward_may_queue_another() -> None:
    """Which runs after all that were queued in the pass itself, as those of DDP and FSDP are."""
    queue, order = torch.autograd.Variable._execution_engine.queue_callback, []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: queue(lambda: queue(lambda: order.append("ours"))))
    x.register_hook(lambda g: queue(lambda: order.append("theirs")))
    y.sum().backward()
    assert order == ["theirs", "ours"]


@MODES
def test_views_of_a_parameter_know_it(mode: Any) -> None:
    """So that no snapshot shares its memory: a copy-on-write storage does not survive ``resize_(0)``."""
    weight = nn.Parameter(torch.ones(3))
    with mode():
        assert type(weight[1:]._base) is nn.Parameter


def test_vmap_counts_no_in_place_write() -> None:
    """So that what was measured of a tensor under vmap can't be found again by its version (`probe.graph.version`)."""
    versions: list[int] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        versions.append(y._version)
        y.relu_()
        versions.append(y._version)
        return y

    torch.vmap(function)(torch.randn(3, 2))
    assert versions == [0, 0]
