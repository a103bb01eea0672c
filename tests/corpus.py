"""Small trainings, sound ones and ones with a planted fault, on which the health checks are measured.

``python -m tests.corpus --seeds 10`` takes more seeds than the suite has time for, and prints the tables.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from probe import health
from tests.faults import FAULTS, Fault
from tests.trainings import HEALTHY, Training, healthy


@dataclass
class Case:
    """A fault planted in one training, and what was found."""

    fault: Fault
    model: str
    seed: int
    layer: str = ""
    found: health.Findings = field(default_factory=health.Findings)

    def run(self, *, whole: bool) -> None:
        """Train for 20 steps; unless `whole` no further than to where the fault is named."""
        training = Training(self.model, self.seed, **self.fault.options)
        self.layer = self.fault.plant(training)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some faults are so plain that a probe tells without checks
            self.found = training.run(20, until=None if whole else self.is_right)

    def is_right(self, found: health.Finding) -> bool:
        return found.check == self.fault.check and self.layer in (found.layer, "*")

    @property
    def named(self) -> bool:
        """Whether the fault was named, with the right layer."""
        return any(map(self.is_right, self.found))

    @property
    def first(self) -> bool:
        """Whether the worst finding is the right one."""
        return bool(self.found) and self.is_right(self.found[0])


def sabotaged(seed: int) -> list[Case]:
    """Every fault, in one of its models, at a random layer."""
    return [Case(fault, fault.on[(seed + i) % len(fault.on)], seed) for i, fault in enumerate(FAULTS)]


AREAS = {
    "where NaN and Inf began, forward, backward and in the loss": ("NaN or Inf", "NaN or Inf in gradients"),
    "dead, constant and saturated layers, attention, float16's range, overwritten captures": (
        "dead units",
        "constant output",
        "saturated",
        "attention collapsed",
        "float16 overflow",
        "float16 underflow",
        "overwritten capture",
    ),
    "gradients that vanish, explode, are missing, or are all alike": (
        "gradients vanishing",
        "gradients exploding",
        "no gradient",
        "symmetry",
    ),
    "updates too large, too small or lost; learning rates and optimizers": (
        "updates too large",
        "updates too small",
        "updates lost",
        "never moves",
        "learning rate is zero",
        "in no optimizer",
        "in two optimizers",
    ),
    "train and eval mode, BatchNorm": (
        "train mode in evaluation",
        "eval mode in training",
        "BatchNorm with batch 1",
        "BatchNorm statistics frozen",
        "BatchNorm statistics diverge",
    ),
    "losses that ignore the input, or jump": ("loss ignores the input", "loss spike"),
}
"""What the findings are about, for the short table."""


def short_table(cases: list[Case], alarms: list[health.Findings]) -> str:
    """Hits and false alarms by area, as Markdown."""
    rows = ["| findings about | planted faults | named, with the right layer |", "|---|---:|---:|"]
    for area, checks in AREAS.items():
        own = [case for case in cases if case.fault.check in checks]
        rows.append(f"| {area} | {len(own)} | {sum(case.named for case in own)} |")
    rows.append(f"| all | {len(cases)} | {sum(case.named for case in cases)} |")
    rows.append(f"| any, in {len(alarms)} sound trainings | 0 | {sum(len(found) for found in alarms)} |")
    return "\n".join(rows)


def table(cases: list[Case], alarms: dict[str, health.Findings]) -> str:
    """Hits and false alarms by fault, as Markdown."""
    rows = ["| planted fault | finding | planted | named, with the right layer |", "|---|---|---:|---:|"]
    for fault in FAULTS:
        own = [case for case in cases if case.fault is fault]
        rows.append(f"| {fault.name} | {fault.check} | {len(own)} | {sum(case.named for case in own)} |")
    rows.append(f"| all | | {len(cases)} | {sum(case.named for case in cases)} |")
    rows += ["", "| sound training | trainings | findings |", "|---|---:|---:|"]
    for name in HEALTHY:
        found = [each for label, each in alarms.items() if label.startswith(f"{name},")]
        rows.append(f"| {name} | {len(found)} | {sum(map(len, found))} |")
    rows.append(f"| all | {len(alarms)} | {sum(map(len, alarms.values()))} |")
    return "\n".join(rows)


def measure(seeds: Iterable[int]) -> tuple[list[Case], dict[str, health.Findings]]:
    """Run everything; tell of what went wrong on the way."""
    cases: list[Case] = []
    alarms: dict[str, health.Findings] = {}
    for seed in seeds:
        for case in sabotaged(seed):
            case.run(whole=True)  # whether it comes first is told below
            cases.append(case)
            if not case.first:
                found = [(each.check, each.layer, each.step) for each in case.found[:4]]
                how = "not first" if case.named else "MISSED"
                print(f"{how}: {case.fault.name}, {case.model} {case.layer!r}, seed {seed}: {found}")
        for label, training in healthy(seed):
            alarms[label] = training.run()
            if alarms[label]:
                print(f"FALSE ALARM: {label}: {alarms[label]}")
    return cases, alarms


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the health checks on trainings, sound and sabotaged.")
    parser.add_argument("--seeds", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed; the tests have 0 (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases, alarms = measure(range(args.first, args.first + args.seeds))
    print(short_table(cases, list(alarms.values())), table(cases, alarms), sep="\n\n")


if __name__ == "__main__":
    main()
