"""Whatever is done with probes, in whatever order, the model ends as it was and captures are true."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from probe import Kind, Probe
from probe.hooks import ours
from probe.tree import leaves
from tests.strategies import WIDTH, trees
from tests.zoo import fingerprint, loss, references

KINDS = st.lists(st.sampled_from(list(Kind)), min_size=1, max_size=4, unique=True)


class Boom(Exception):
    pass


class Machine(RuleBasedStateMachine):
    """Enter, run, raise anywhere, nest, copy, pickle, edit, exit in any order."""

    @initialize(tree=trees, batch=st.integers(1, 3))
    def build(self, tree: nn.Module, batch: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), tree, nn.Linear(WIDTH, 2))
        self.x = torch.randn(batch, WIDTH)
        self.foreign = [self.model[0].register_forward_hook(_foreign), self.model.register_forward_pre_hook(_foreign)]
        self.before = fingerprint(self.model)
        self.probes: list[Probe] = []
        self.twin = copy.deepcopy(self.model)
        self.truth = references(self.twin, self.x)

    def teardown(self) -> None:
        for p in getattr(self, "probes", []):
            p.__exit__(None, None, None)
        if hasattr(self, "model"):
            self.model.zero_grad()
            assert fingerprint(self.model) == self.before

    @rule(kinds=KINDS, everything=st.booleans(), keep=st.integers(1, 2))
    def enter(self, kinds: list[Kind], everything: bool, keep: int) -> None:
        union = kinds[0]
        for kind in kinds[1:]:
            union |= kind
        selectors = ("*",) if everything else ()
        self.probes.append(Probe(self.model, *selectors, kinds=union, keep=keep).__enter__())

    @precondition(lambda self: self.probes)
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        p = self.probes.pop(data.draw(st.integers(0, len(self.probes) - 1)))
        p.__exit__(None, None, None)

    @rule()
    def run(self) -> None:
        """Outputs and gradients are the twin's, bit for bit; captures are the oracle's."""
        self.model.zero_grad()
        out = self.model(self.x)
        loss(out).backward()
        assert torch.equal(out, self.truth[""][-1][0])
        for mine, other in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            assert (mine.grad is None) == (other.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, other.grad)
        for p in self.probes:
            for name in p:
                if name in self.truth:
                    _check(p, name, self.truth[name])
        self.model.zero_grad()

    @rule()
    def run_without_gradients(self) -> None:
        with torch.no_grad():
            assert torch.equal(self.model(self.x), self.truth[""][-1][0])

    @rule(data=st.data())
    def raise_somewhere(self, data: Any) -> None:
        """An exception in any module, at its entry or its end, leaves everything fit to go on."""
        where = data.draw(st.sampled_from(list(self.model.modules())))
        kind = data.draw(st.sampled_from([Boom, KeyboardInterrupt]))

        def boom(*args: Any) -> None:
            raise kind

        register = data.draw(st.sampled_from(["register_forward_hook", "register_forward_pre_hook"]))
        with getattr(where, register)(boom):
            try:
                self.model(self.x)
            except (Boom, KeyboardInterrupt):
                return
        raise AssertionError("nothing was raised")

    @precondition(lambda self: self.probes)
    @rule(data=st.data())
    def edit(self, data: Any) -> None:
        """An edit flows on, is what is captured, and goes with its handle."""
        p = data.draw(st.sampled_from(self.probes))
        with p.edit("2", lambda output: output * 0):
            assert not self.model(self.x).any()
        with torch.no_grad():
            assert torch.equal(self.model(self.x), self.truth[""][-1][0])

    @rule()
    def copy_and_pickle(self) -> None:
        """Copies made while probes are attached are inert."""
        buffer = io.BytesIO()
        torch.save(self.model, buffer)
        buffer.seek(0)
        for other in (
            copy.deepcopy(self.model),
            pickle.loads(pickle.dumps(self.model)),
            torch.load(buffer, weights_only=False),
        ):
            assert not any(ours(h) for m in other.modules() for h in m._forward_hooks.values())
            kept = [len(p[name].calls) for p in self.probes for name in p]
            with torch.no_grad():
                assert torch.equal(other(self.x), self.truth[""][-1][0])
            assert [len(p[name].calls) for p in self.probes for name in p] == kept

    @invariant()
    def others_keep_their_hooks(self) -> None:
        if hasattr(self, "foreign"):
            assert all(handle.hooks_dict_ref()[handle.id] is _foreign for handle in self.foreign)


def _foreign(*args: Any) -> None:
    """Somebody else's hook."""


def _check(p: Probe, name: str, truth: list[tuple[Any, Any]]) -> None:
    calls = p[name].calls
    assert len(calls) == len(truth)
    for record, (output, gradient) in zip(calls, truth, strict=True):
        if Kind.OUTPUT in p.kinds:
            assert torch.equal(record.output, output)
        if Kind.GRAD_OUTPUT in p.kinds and gradient is not None:
            assert torch.allclose(record.grad_output, gradient, atol=1e-6)
        if Kind.INPUT in p.kinds:
            assert leaves(record.input)


Machine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMachine = Machine.TestCase
