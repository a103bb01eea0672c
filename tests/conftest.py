"""Fixtures for every test: nothing of a probe may be left on a model, and random numbers are the same each time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from probe.hooks import ours
from probe.session import Session

torch.set_num_threads(1)  # two threads wait for each other as soon as another process wants the same core


@pytest.fixture(autouse=True, scope="module")
def _short_collections() -> Iterator[None]:
    """What the modules before have left (imports, caches) is not looked through again in each collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_leaked_hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test after which a hook of a probe is still on a module of a model that is alive."""
    sessions: list[weakref.ref[Session]] = []
    init = Session.__init__

    def remember(self: Session, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        sessions.append(weakref.ref(self))

    monkeypatch.setattr(Session, "__init__", remember)
    yield
    if any(ref() is not None for ref in sessions):
        gc.collect()  # a probe that was dropped in a reference cycle takes its hooks off when it is collected
    for ref in sessions:
        session = ref()
        for name, module in session.model.named_modules() if session is not None else ():
            for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                left = [hook for hook in getattr(module, key).values() if ours(hook)]
                assert not left, f"a probe left a hook in {key} of {name!r}"
