"""`Check`, a judgment on the last steps, and `Rule`, the words that its findings have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from probe.calls import Receiver
from probe.capture import Kind, ParameterKind
from probe.findings import Finding, Severity
from probe.health.records import CallRecord, Step
from probe.observers import Scene

Judge = Callable[[Sequence[Step]], Iterable[Finding]]
"""From the last observed steps, the newest last, to what is wrong in the newest."""


@dataclass(frozen=True)
class Check:
    """A health check, for ``Probe(observers=...)`` and ``p.log``: all checks of one probe share their measurements.

    Arguments:
        name: for messages.
        judge: from the last observed steps (the newest last, at most `window`) to findings.
        kinds: what has to be measured for it.
        window: how many steps it looks at; until there are so many it is not asked, unless it is `eager`.
        eager: whether it is asked from the first step on.
        of_broken: whether it is asked also of steps in which values are NaN or Inf; others would tell consequences.
    """

    name: str
    judge: Judge
    kinds: tuple[Kind | ParameterKind, ...]
    window: int = 1
    eager: bool = False
    of_broken: bool = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window!r}: give a whole number of steps, at least 1")

    @classmethod
    def receiver(cls, members: Sequence[Check], scene: Scene) -> Receiver:
        """One `Doctor` for all of them."""
        from probe.health.doctor import Doctor

        return Doctor(members, scene)


@dataclass(frozen=True)
class Rule:
    """What the findings of one kind say, whatever was measured; the fields are those of `Finding`."""

    check: str
    meaning: str
    advice: str
    source: str
    severity: Severity = Severity.WARNING

    def broken(
        self, step: Step, layer: str, what: str, measured: float, threshold: float, *details: str, meaning: str = ""
    ) -> Finding:
        """A finding by this rule; empty `details` are left out, `meaning` may say more than the rule's."""
        return Finding(
            layer,
            self.check,
            what,
            float(measured),
            float(threshold),
            meaning or self.meaning,
            self.advice,
            self.source,
            step.number,
            self.severity,
            tuple(each for each in details if each),
        )


def calls_of(step: Step) -> Iterator[CallRecord]:
    """The calls of a step's passes in training, without those of the root."""
    for pass_ in step.trained():
        yield from (call for call in pass_.calls if call.layer)


def shown(names: Iterable[str], limit: int = 4) -> str:
    """A few names in words."""
    names = list(dict.fromkeys(names))
    few = ", ".join(repr(name) for name in names[:limit])
    return few + (f" and {len(names) - limit} more" if len(names) > limit else "")
