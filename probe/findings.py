"""Plain data: what a health check found (`Finding`), and the report of them (`Findings`)."""

from __future__ import annotations

import enum
import html
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass


class Severity(enum.IntEnum):
    """How bad a finding is; the higher the worse."""

    NOTICE = 1
    """Training works, and wastes something."""
    WARNING = 2
    """A part of the model does not learn, or learns badly."""
    ERROR = 3
    """What comes out is not what was meant; further steps are worth nothing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a health check holds to be wrong, and where.

    Arguments:
        layer: the layer's name, ``"loss"``, or a group: ``"group0"`` is the optimizer's first param group.
        check: the name of the check.
        what: what `measured` is a measure of, in words.
        measured: the number.
        threshold: the number that it crossed.
        meaning: what that usually means.
        advice: what to try.
        source: where the rule comes from.
        step: the step in which it was seen first.
        severity: how bad it is.
        details: further lines, such as the statistics of the steps before.
    """

    layer: str
    check: str
    what: str
    measured: float
    threshold: float
    meaning: str
    advice: str
    source: str
    step: int = 0
    severity: Severity = Severity.WARNING
    details: tuple[str, ...] = ()

    @property
    def excess(self) -> float:
        """How far the measured number is beyond the threshold, as a ratio of at least 1; infinite where that is 0."""
        a, b = abs(self.measured), abs(self.threshold)
        if a == b:
            return 1.0
        if not (math.isfinite(a) and math.isfinite(b)) or not min(a, b):
            return math.inf
        return max(a, b) / min(a, b)

    @property
    def words(self) -> tuple[str, str, str]:
        """What it says beside its numbers: meaning, advice and source."""
        return f"meaning: {self.meaning}", f"try: {self.advice}", f"rule: {self.source}"

    @property
    def numbers(self) -> str:
        """Where it is, and what was measured there."""
        head = f"{self.severity.name.lower()}: {self.layer or chr(34) * 2}: {self.check} (step {self.step})"
        measured = f"{self.what}: {_number(self.measured)} (threshold {_number(self.threshold)})"
        return "\n".join([head, *map(_wrapped, (measured, *self.details))])

    def __str__(self) -> str:
        return "\n".join([self.numbers, *map(_wrapped, self.words)])


class Findings(list[Finding]):
    """Findings, the worst first, which print as a report. What several have to say in common it says once, after them.

    Arguments:
        found: in any order.
        steps: how many steps were examined, for the report.
    """

    def __init__(self, found: Iterable[Finding] = (), steps: int = 0) -> None:
        super().__init__(sorted(found, key=lambda each: (-each.severity, each.step, -each.excess, each.layer)))
        self.steps = steps

    def __str__(self) -> str:
        examined = f"{self.steps} step{'' if self.steps == 1 else 's'} examined"
        if not self:
            return f"nothing found ({examined})"
        count = f"{len(self)} finding{'' if len(self) == 1 else 's'}"
        first = f"{count}, the worst first" if len(self) > 1 else count
        alike: dict[tuple[str, ...], list[Finding]] = {}
        for each in self:
            alike.setdefault((each.severity.name, each.check, *each.words), []).append(each)
        parts = (
            "\n".join([*(each.numbers for each in some), *map(_wrapped, some[0].words)]) for some in alike.values()
        )
        return "\n\n".join([f"{first} ({examined})", *parts])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 110, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)


def _number(value: float) -> str:
    return f"{value:.3g}"
