"""`Trace`: the hyper-parameters that every update of an optimizer used, as plain data."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from probe.schedule.chart import Line, Picture, draw

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Floats = NDArray[np.float64]

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """What each update of an optimizer used. A live trace and a simulation give the same thing.

    Row `i` holds the values that update `i` used; row 0 is the current one when tracing began. A group that was
    added in the middle is NaN before. With several optimizers, a row counts the updates of the optimizer that owns
    the group, and those that made fewer updates end in NaN.

    Arguments:
        values: hyper-parameter -> float64 array `[updates, groups]`: every number found in the param groups. ``betas``
            are spelled ``"momentum"`` (the first), ``"betas[1]"``, ...
        names: one name a group: its ``group["name"]``, else ``"group0"``, ``"group1"``, ...
        skipped: the updates that a `GradScaler` skipped, counted from 0 among all updates asked for. They changed
            nothing and are no rows of `lr`.
        events: what a reader should know, each told once, in words.
        start: how many updates the optimizer had made before row 0, as far as its own state tells (Adam's ``step``).
    """

    values: Mapping[str, Floats]
    names: tuple[str, ...]
    skipped: list[int] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    start: int = 0

    @property
    def lr(self) -> Floats:
        """Learning rates, float64 `[updates, groups]`."""
        return self.values["lr"]

    @property
    def momentum(self) -> Floats:
        """Momentum, ``betas[0]`` for the Adam family, float64 `[updates, groups]`; NaN where a group has none."""
        return self._column("momentum")

    @property
    def weight_decay(self) -> Floats:
        """Weight decay, float64 `[updates, groups]`; NaN where a group has none."""
        return self._column("weight_decay")

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that changed while they were watched: ``("lr", "momentum")``."""
        return tuple(key for key, value in self.values.items() if any(_varies(column) for column in value.T))

    def __getitem__(self, key: str) -> Floats:
        """The hyper-parameter `key`, float64 `[updates, groups]`."""
        try:
            return self.values[key]
        except KeyError:
            raise KeyError(f"no hyper-parameter {key!r} in this trace; it has {', '.join(self.values)}") from None

    def __len__(self) -> int:
        """The number of updates."""
        return len(self.lr)

    def milestones(self, key: str = "lr") -> list[int]:
        """The updates at which `key` jumps, turns, starts or stops moving, in any group, in order."""
        return sorted({row for column in self[key].T for row in _turns(column)})

    def __repr__(self) -> str:
        return f"Trace({len(self)} updates, groups: {', '.join(self.names)}, skipped: {len(self.skipped)})"

    def __str__(self) -> str:
        """A sparkline and the change points of every hyper-parameter that changes, and the events."""
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        lines = [f"{_count(len(self), 'update')} of {_count(len(self.names), 'group')}{skipped}"]
        rows = [(f"{line.key} {line.label}", line.values) for line in _lines({"": self}, ("lr", *self.changed))]
        width = max((len(title) for title, _ in rows), default=0)
        for title, values in rows:
            first, *rest = _describe(values)
            lines += [f"{title:<{width}}  {first}", *(f"{'':<{width}}  {part}" for part in rest)]
        return "\n".join(lines + [f"! {event}" for event in self.events])

    def plot(self, *, width: int = 900, height: int = 480, log: bool = False) -> Picture:
        """Draw the rates against the update, with axes, legend and milestones.

        Hyper-parameters other than the rate get a panel of their own below it where they change. Drawn by matplotlib
        where that is installed, else by OpenCV.

        Arguments:
            width, height: size of the picture in pixels.
            log: logarithmic rate axis; rates that are not positive are left out.

        Returns:
            A uint8 RGB picture `[height, width, 3]`.
        """
        return draw(_lines({"": self}, ("lr", *self.changed)), self.milestones(), width=width, height=height, log=log)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line an update: its number, and each group's rate, momentum, weight decay and whatever else changes.

        Numbers are written so that they read back exactly; a value that does not exist is an empty cell.
        """
        keys = [*dict.fromkeys(("lr", "momentum", "weight_decay", *self.changed))]
        table = np.concatenate([self._column(key) for key in keys], axis=1)
        with open(path, "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["update", *(f"{key}/{name}" for key in keys for name in self.names)])
            for row, numbers in enumerate(table.tolist(), self.start):
                out.writerow([row, *("" if number != number else repr(number) for number in numbers)])

    def log(self, writer: SummaryWriter) -> None:
        """Write the curves to any `SummaryWriter`: ``lr/<group>``, and ``<name>/<group>`` of what else changes."""
        for key in dict.fromkeys(("lr", *self.changed)):
            for name, column in zip(self.names, self[key].T, strict=True):
                for row in np.flatnonzero(~np.isnan(column)).tolist():
                    writer.add_scalar(f"{key}/{name}", float(column[row]), self.start + row)

    def _column(self, key: str) -> Floats:
        return self.values[key] if key in self.values else np.full(self.lr.shape, np.nan)


class Comparison(dict[str, Trace]):
    """Several schedules by name, as `compare` returns them: a dict that prints and draws itself."""

    def __str__(self) -> str:
        return "\n\n".join(f"{name}: {trace}" for name, trace in self.items())

    def plot(self, *, width: int = 900, height: int = 480, log: bool = False) -> Picture:
        """Draw all rates in one chart: a uint8 RGB picture `[height, width, 3]`, see `Trace.plot`."""
        return draw(_lines(self, ("lr",)), [], width=width, height=height, log=log)

    def log(self, writer: SummaryWriter) -> None:
        """Write every schedule as a run of its own below the writer's folder, under the same tags.

        TensorBoard then draws them in one chart, each in its own colour and by its own name.
        """
        from torch.utils.tensorboard import SummaryWriter

        for name, trace in self.items():
            folder = re.sub(r"[^\w .,=+()\[\]-]", "_", name)[:120]
            with SummaryWriter(os.path.join(writer.log_dir, folder), purge_step=trace.start) as run:
                trace.log(run)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _varies(column: Floats) -> bool:
    """Whether a column changes; a group that comes or goes is no change."""
    known = column[~np.isnan(column)]
    return bool(np.any(known[1:] != known[:-1]))


def _turns(column: Floats) -> list[int]:
    """Rows at which a curve jumps, turns, starts or stops moving."""
    if len(column) < 2:
        return []
    step = np.nan_to_num(np.diff(column), posinf=0.0, neginf=0.0)
    size = np.abs(step)
    # Rounding makes a level curve tremble; a step that small is none.
    tremble = np.fmax(1e-9 * np.abs(column[:-1]), 1e-13 * np.max(np.abs(column), initial=0, where=np.isfinite(column)))
    heading = [0.0, *np.where(size > tremble, np.sign(step), 0.0).tolist(), 0.0]  # of the step to row i
    jump = np.concatenate([size[1:-1] > 4 * np.maximum(size[:-2], size[2:]), [False]])
    rows = set()
    for row in range(len(step)):
        before, after, later = heading[row : row + 3]
        if before != after:
            # A step on its own is a jump: what counts is the row it leads to, not the one it leaves.
            rows.add(row + 1 if after and later != after else row)
        elif after and jump[row - 1]:
            rows.add(row + 1)
    return sorted(rows - {0})


def _sparkline(column: Floats) -> str:
    """The curve in at most 60 characters; blank where there is no value."""
    if not np.isfinite(column).any():
        return ""
    low, high = np.min(column[np.isfinite(column)]), np.max(column[np.isfinite(column)])
    picked = column[np.linspace(0, len(column) - 1, min(len(column), _WIDTH)).round().astype(int)]
    scale = (picked - low) / (high - low) if high > low else np.where(np.isfinite(picked), 0.5, np.nan)
    return "".join(_BARS[min(7, int(8 * level))] if np.isfinite(level) else " " for level in scale)


def _describe(column: Floats) -> list[str]:
    """The sparkline with its first and last value, and the change points."""
    known = np.flatnonzero(~np.isnan(column))
    if not len(known):
        return ["never set"]
    first, last = column[known[0]], column[known[-1]]
    parts = [f"{first:.4g} {_sparkline(column)} {last:.4g}"]
    turns = _turns(column)
    if turns:
        told = ", ".join(f"{row}: {column[row]:.4g}" for row in turns[:12])
        parts.append(f"changes at {told}" + (f", and {len(turns) - 12} more" if len(turns) > 12 else ""))
    return parts


def _lines(traces: Mapping[str, Trace], keys: tuple[str, ...]) -> list[Line]:
    """One line a curve to draw; groups whose curves are equal share one."""
    lines: dict[tuple[Any, ...], Line] = {}
    for title, trace in traces.items():
        for key in dict.fromkeys(keys):
            for name, column in zip(trace.names, trace[key].T, strict=True):
                label = name if not title else title if len(trace.names) == 1 else f"{title} {name}"
                line = lines.get((title, key, column.tobytes()))
                if line is None:
                    lines[title, key, column.tobytes()] = Line(key, label, column, trace.start)
                else:
                    line.label += f", {label}"
    return list(lines.values())
