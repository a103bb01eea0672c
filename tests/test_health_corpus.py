"""The health checks, measured: silent on sound trainings, and right about every planted fault (`tests.corpus`)."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from probe import health
from tests import corpus

SOUND = [label for label, _ in corpus.healthy(0)]


@functools.cache
def alarms(label: str) -> health.Findings:
    """What is found in a sound training."""
    return dict(corpus.healthy(0))[label].run()


@functools.cache
def case(number: int) -> corpus.Case:
    """A planted fault, and what was found."""
    found = corpus.sabotaged(0)[number]
    found.run(whole=False)
    return found


@pytest.mark.parametrize("label", SOUND)
def test_no_false_alarm(label: str) -> None:
    """Silence when all is well."""
    assert str(alarms(label)).startswith("nothing found"), alarms(label)


@pytest.mark.parametrize("number", range(len(corpus.FAULTS)), ids=[fault.name for fault in corpus.FAULTS])
def test_the_fault_is_named_with_its_layer(number: int) -> None:
    """Within 20 steps."""
    found = case(number)
    assert found.named, f"{found.fault.check} at {found.layer!r} expected, but {found.found}"


def test_the_tables_in_the_docs_are_what_was_measured() -> None:
    """``python -m tests.corpus --seeds 1`` prints them."""
    cases = [case(number) for number in range(len(corpus.FAULTS))]
    found = {label: alarms(label) for label in SOUND}
    root = Path(corpus.__file__).parents[1]
    short, full = corpus.short_table(cases, list(found.values())), corpus.table(cases, found)
    for table, page in ((short, "README.md"), (full, "tests/corpus.md")):
        lines = (root / page).read_text().splitlines()
        assert [line for line in table.splitlines() if line not in lines] == [], page
