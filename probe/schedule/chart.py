"""Line charts as pictures, drawn by matplotlib where it is installed and by OpenCV elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probe import image

Picture = NDArray[np.uint8]
Color = tuple[int, int, int]

# The ten colours of Tableau in their usual order (RGB).
_COLORS: list[Color] = [
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207),
]  # fmt: skip
_INK, _GRID, _MARK = (60, 60, 60), (228, 228, 228), (150, 150, 150)
_NAMED = 16  # more curves than this are drawn, but not all of them are named


@dataclass
class Line:
    """One curve: the hyper-parameter it shows, its label, its values (NaN: not drawn), its first update's number."""

    key: str
    label: str
    values: NDArray[np.float64]
    start: int


def draw(lines: Sequence[Line], milestones: Sequence[int], *, width: int, height: int, log: bool) -> Picture:
    """Draw curves against the update, one panel for each hyper-parameter, the first of them twice as high.

    Arguments:
        lines: the curves.
        milestones: updates to mark by a vertical line.
        width, height: size of the picture in pixels.
        log: logarithmic axis in the first panel.

    Returns:
        A uint8 RGB picture `[height, width, 3]`.

    Raises:
        ValueError: there are no curves, or the picture is too small to hold a chart.
    """
    if not lines:
        raise ValueError("there is no schedule to draw")
    keys = list(dict.fromkeys(line.key for line in lines))
    least = 100 + 60 * len(keys)
    if width < 240 or height < least:
        raise ValueError(f"a chart of {', '.join(keys)} needs at least 240 x {least} pixels, not {width} x {height}")
    panels = [[line for line in lines if line.key == key] for key in keys]
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return _by_opencv(panels, milestones, width, height, log)
    return _by_matplotlib(panels, milestones, width, height, log)


def _legend(panel: Sequence[Line]) -> list[str]:
    labels = [line.label if len(line.label) <= 40 else line.label[:37] + "..." for line in panel]
    return labels if len(labels) <= _NAMED else [*labels[: _NAMED - 1], f"and {len(labels) - _NAMED + 1} more"]


def _by_matplotlib(panels: list[list[Line]], milestones: Sequence[int], width: int, height: int, log: bool) -> Picture:
    # Without pyplot: no global state, no window, no back end to choose.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = {"height_ratios": [2, *[1] * (len(panels) - 1)]}
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw=grid)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        for index, line in enumerate(panel):
            color = tuple(channel / 255 for channel in _COLORS[index % len(_COLORS)])
            marker = "o" if np.count_nonzero(np.isfinite(line.values)) == 1 else None
            axis.plot(np.arange(len(line.values)) + line.start, line.values, color=color, marker=marker)
        for row in milestones:
            axis.axvline(row + panel[0].start, color="0.6", linestyle=":", linewidth=1)
        for row in _apart(milestones, 0, len(panel[0].values), width // 40):
            at = (row + panel[0].start, 1)
            axis.annotate(
                str(at[0]), at, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize="small"
            )
        axis.set_ylabel(panel[0].key)
        axis.grid(alpha=0.3)
        labels = _legend(panel)
        axis.legend(axis.get_lines()[: len(labels)], labels, fontsize="small", loc="best")
    if log:
        axes[0].set_yscale("log", nonpositive="mask")
    axes[-1].set_xlabel("update")
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[:height, :width, :3])


def _by_opencv(panels: list[list[Line]], milestones: Sequence[int], width: int, height: int, log: bool) -> Picture:
    picture = np.full((height, width, 3), 255, np.uint8)
    left, right, top, bottom, gap = 70, width - 14, 24, height - 44, 26
    unit = (bottom - top - gap * (len(panels) - 1)) / (len(panels) + 1)
    first = min(line.start for panel in panels for line in panel)
    last = max(line.start + len(line.values) - 1 for panel in panels for line in panel)
    low = float(top)
    for index, panel in enumerate(panels):
        high, low = low, low + unit * (1 if index else 2)
        box = (left, round(high), right, round(low))
        frame = _Frame(picture, box, (first, max(last, first + 1)), panel, log and not index)
        frame.axes(panel[0].key, [row + panel[0].start for row in milestones], numbered=index == len(panels) - 1)
        for line, color in zip(panel, _cycle(len(panel)), strict=True):
            frame.curve(line, color)
        frame.legend(panel)
        low += gap
    _text(picture, "update", ((left + right) // 2, height - 8), align=0.5)
    return picture


def _cycle(count: int) -> list[Color]:
    return [_COLORS[index % len(_COLORS)] for index in range(count)]


class _Frame:
    """One panel: a rectangle of the picture, the ranges of its two axes, and what is drawn into it."""

    def __init__(
        self,
        picture: Picture,
        box: tuple[int, int, int, int],
        across: tuple[float, float],
        panel: list[Line],
        log: bool,
    ) -> None:
        values = np.concatenate([line.values for line in panel])
        values = values[np.isfinite(values)]
        values = values[values > 0] if log else values
        low, high = (float(values.min()), float(values.max())) if len(values) else (1.0, 1.0)
        if log:
            low, high = math.log10(low), math.log10(high)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
        self.picture, self.box, self.log = picture, box, log
        self.across, self.up = across, (low - room, high + room)
        self.drawn: list[NDArray[np.float64]] = []  # points in pixels, for the legend to keep clear of

    def pixels(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Data -> pixels `[points, 2]`; NaN where there is nothing to draw."""
        left, top, right, bottom = self.box
        if self.log:
            y = np.log10(y, where=y > 0, out=np.full_like(y, np.nan))
        (x0, x1), (y0, y1) = self.across, self.up
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return np.stack([left + across * (right - left), bottom - up * (bottom - top)], axis=1)

    def axes(self, title: str, milestones: Sequence[int], *, numbered: bool) -> None:
        cv2 = image.opencv()

        left, top, right, bottom = self.box
        for value in _ticks(*self.across, max(2, (right - left) // 80)):
            x = round(float(self.pixels(np.array([value]), np.ones(1))[0, 0]))
            cv2.line(self.picture, (x, top), (x, bottom), _GRID)
            if numbered:
                _text(self.picture, f"{value:.10g}", (x, bottom + 16), align=0.5)
        ticks = _ticks(*self.up, max(2, (bottom - top) // 36))
        for value in [10.0**power for power in ticks] if self.log else ticks:
            y = round(float(self.pixels(np.zeros(1), np.array([value]))[0, 1]))
            cv2.line(self.picture, (left, y), (right, y), _GRID)
            _text(self.picture, f"{value:.3g}", (left - 6, y + 4), align=1.0)
        for row in milestones:
            x = round(float(self.pixels(np.array([float(row)]), np.ones(1))[0, 0]))
            for y in range(top, bottom, 6):
                cv2.line(self.picture, (x, y), (x, min(y + 2, bottom)), _MARK)
        for row in _apart(milestones, *self.across, (right - left) // 40):
            x = round(float(self.pixels(np.array([float(row)]), np.ones(1))[0, 0]))
            _text(self.picture, str(row), (x, top - 6), align=0.5)
        cv2.rectangle(self.picture, (left, top), (right, bottom), _INK)
        _text(self.picture, title, (left, top - 6))

    def curve(self, line: Line, color: Color) -> None:
        cv2 = image.opencv()

        points = self.pixels(np.arange(len(line.values), dtype=np.float64) + line.start, line.values)
        known = np.isfinite(points[:, 1])
        self.drawn.append(points[known])
        for run in np.split(np.arange(len(points)), np.flatnonzero(np.diff(known)) + 1):
            if len(run) and known[run[0]]:
                sixteenths = np.round(points[run] * 16).astype(np.int32)
                if len(run) == 1:  # a line of one point would not show
                    cv2.circle(self.picture, sixteenths[0].tolist(), 3 * 16, color, -1, cv2.LINE_AA, 4)
                else:
                    cv2.polylines(self.picture, [sixteenths], False, color, 2, cv2.LINE_AA, 4)

    def legend(self, panel: list[Line]) -> None:
        """Names of the curves, in the corner that covers the fewest points."""
        cv2 = image.opencv()

        left, top, right, bottom = self.box
        labels = _legend(panel)[: max(1, (bottom - top - 16) // 16)]
        wide, tall = 40 + max(_size(label) for label in labels), 8 + 16 * len(labels)
        corners = [(x, y) for y in (top + 6, bottom - tall - 6) for x in (right - wide - 6, left + 6)]
        drawn = np.concatenate(self.drawn)
        covered = [
            np.count_nonzero(np.logical_and(drawn >= (x, y), drawn <= (x + wide, y + tall)).all(axis=1))
            for x, y in corners
        ]
        x, y = corners[int(np.argmin(covered))]
        behind = self.picture[y : y + tall, x : x + wide]
        behind[:] = behind // 4 + 191
        cv2.rectangle(self.picture, (x, y), (x + wide, y + tall), _MARK)
        for index, (label, color) in enumerate(zip(labels, _cycle(len(labels)), strict=True)):
            row = y + 12 + 16 * index
            cv2.line(self.picture, (x + 6, row), (x + 28, row), color, 2, cv2.LINE_AA)
            _text(self.picture, label, (x + 34, row + 4))


def _apart(marks: Sequence[int], low: float, high: float, count: int) -> list[int]:
    """The marks that can be labelled without covering each other, or what stands at the left edge."""
    chosen, least = [], low + 2 * (high - low) / count
    for mark in marks:
        if mark >= least:
            chosen.append(mark)
            least = mark + (high - low) / count
    return chosen


def _ticks(low: float, high: float, count: int) -> list[float]:
    """At most `count` round numbers (1, 2 or 5 times a power of ten apart) within a range."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(picture: Picture, text: str, at: tuple[int, int], align: float = 0.0) -> None:
    cv2 = image.opencv()

    printable = text.encode("ascii", "replace").decode()  # the built-in font has no other characters
    x = round(at[0] - align * _size(printable))
    cv2.putText(picture, printable, (x, at[1]), cv2.FONT_HERSHEY_SIMPLEX, 0.42, _INK, 1, cv2.LINE_AA)


def _size(text: str) -> int:
    cv2 = image.opencv()

    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.42, 1)
    return int(width)
