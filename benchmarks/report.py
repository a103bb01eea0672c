"""Write ``RESULTS.md``, its pictures and the README's table from what is kept: ``python -m benchmarks.report``.

Nothing is measured here. The files under ``benchmarks/results/`` come from the other commands' ``--out``.
"""

from __future__ import annotations

import argparse
import html
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import ARMS

HERE = Path(__file__).parent
BEGIN, END = "<!-- made by python -m benchmarks.report -->", "<!-- end of what is made -->"
Kept = dict[str, Any]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(words)
    kept = load(HERE / "results")
    for path, text in written(kept, HERE.parent).items():
        path.write_text(text, encoding="utf-8")
        print(path)


def load(folder: Path) -> list[Kept]:
    """Everything that is kept in a folder, in an order that does not depend on the files' names.

    Raises:
        SystemExit: a file is none of a benchmark's.
    """
    kept = []
    for path in sorted(folder.glob("*.json")):
        try:
            each = json.loads(path.read_text(encoding="utf-8"))
            _ = [each[key] for key in ("command", "line", "date", "machine", "quick", "settings", "complete", "rows")]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is no file of results: write one with --out of another command") from error
        kept.append(each)
    return sorted(kept, key=_order)


def _order(each: Kept) -> tuple[str, ...]:
    """Runs of a model stand together, whatever else they differ in."""
    settings = each["settings"]
    first = (str(settings.get(key, "")) for key in ("device", "model", "compile", "mode"))
    return (each["command"], *first, json.dumps(settings, sort_keys=True))


def written(kept: list[Kept], root: Path) -> dict[Path, str]:
    """What each file is to contain."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    files = {root / "README.md": f"{before}{BEGIN}\n{summary(kept)}{END}{after}"}
    files[root / "benchmarks" / "RESULTS.md"] = results(kept)
    files.update({root / "benchmarks" / "results" / name: text for name, text in pictures(kept).items()})
    return files


# -- the README's table ------------------------------------------------------------------------------------------------

SUMMARY = (
    ("forward", "reference", None, "forward: a bare hook that stores references"),
    ("forward", "output", None, "forward: `kinds=Kind.OUTPUT`"),
    ("train", "reference", None, "training: a bare hook that stores references"),
    ("train", "output", None, "training: `kinds=Kind.OUTPUT`"),
    ("train", "all but grad_input", None, "training: inputs, outputs, their gradients"),
    ("train", "full backward", None, "training: torch's full backward hooks alone"),
    ("train", "all four", None, "training: `Probe(model)`, all four kinds"),
    ("train", "stats+histogram", 1, "`p.log(board, stats, histogram)`, every step"),
    ("train", "stats+histogram", 10, "the same, `every=10`"),
    ("train", "stats+histogram", 100, "the same, `every=100`"),
    ("train", "full log", 1, "and parameters, their gradients and updates, every step"),
    ("train", "full log", 100, "the same, `every=100`"),
)


def summary(kept: list[Kept]) -> str:
    """The README's table: what a step costs, by model and device."""
    runs = [each for each in kept if each["command"] == "overhead" and not each["settings"]["compile"]]
    if not runs:
        return "\nNo measurements are kept yet.\n\n"
    columns = _columns(runs)
    lines = [["ratio to the bare step", *columns]]
    for mode, arm, every, label in SUMMARY:
        cells = [_cell(column.get(mode), arm, every) for column in columns.values()]
        if any(cells):
            lines.append([label, *cells])
    machines = list(dict.fromkeys(_machine(each) for each in runs))
    dates = sorted({each["date"] for each in runs})
    notes = [
        "Median of interleaved pairs (quartiles); `~`: the quartiles lie on both sides of 1; empty: not measured. "
        f"On {'; '.join(machines)}; {_span(dates)}. "
        "All results, the method and what is not measured: [benchmarks/RESULTS.md](benchmarks/RESULTS.md)."
    ]
    return "\n" + _table(lines) + "\n" + "\n".join(notes) + "\n\n"


def _columns(runs: list[Kept]) -> dict[str, dict[str, Kept]]:
    """By a column's name, its run in each mode; runs that are named alike have columns of their own, numbered."""
    columns: dict[str, dict[str, Kept]] = {}
    for each in runs:
        names = (_name(each) + (f" ({n})" if n > 1 else "") for n in itertools.count(1))
        column = next(name for name in names if each["settings"]["mode"] not in columns.get(name, {}))
        columns.setdefault(column, {})[each["settings"]["mode"]] = each
    return columns


def _name(each: Kept) -> str:
    """What a run was of: everything that is not as the command has it by default, but for the mode."""
    settings, threads = each["settings"], each["machine"]["threads"]
    parts = [settings["model"]]
    parts += [f"{key} {settings[key]}" for key in ("batch", "size") if settings[key]]
    parts += [settings["dtype"]] if settings["dtype"] != "float32" else []
    parts += ["compiled"] if settings["compile"] else []
    parts += [f"{threads} threads"] if threads != 1 else []
    parts += ["(GPU)"] if settings["device"] == "cuda" else []
    parts += ["(quick)"] if each["quick"] else []
    return " ".join(parts)


def _cell(run: Kept | None, arm: str, every: int | None) -> str:
    for row in run["rows"] if run else ():
        if (row["arm"], row["every"], row["against"]) == (arm, every, "bare"):
            return "raises" if "failed" in row else _ratio(row["ratio"])
    return ""


# -- RESULTS.md --------------------------------------------------------------------------------------------------------

METHOD = """\
**Method.** Two ways of doing the same work run in turn, in one process, each on a copy of the model of its own; a
result is the median of the ratios of such pairs, with its quartiles. `~` marks a ratio whose quartiles lie on both
sides of 1: it is not told from noise. Every table of overheads has a row *bare*, the bare model against its own copy,
which shows what the method itself makes of nothing. A run is repeated to 5 ms at least; the two run strictly in turn,
so that each begins with the caches as the other left them. On the CPU one thread computes, and memory that is freed
stays with the process. On a GPU each run begins on an idle device and CUDA events tell its length, launches and kernels
included. Inputs are random and stay the same; a training step is `zero_grad`, forward, backward and SGD with momentum.
Logs are written to a folder on disk, and a measurement ends when everything is written. Counts (hooks, Python calls,
bytes, transfers) are of one step, beyond those of the bare one, and do not depend on the machine. Bytes are those of
torch's tensors: what NumPy and OpenCV take in between, on the CPU, is not among them. *Pairs* is how many a ratio rests
on; of three, the quartiles are the least and the greatest. Ratios beside other libraries, of maps and of scaling rest
on five or more, limits on fifteen or more.

**Not measured.** Data loading, distributed training, several GPUs, models larger than memory, a slow disk, how much a
user's own summary costs. Random weights: nothing here depends on their values, except that in-place operations
overwrite what they overwrite. Figures of one machine are not those of another; the commands above each table run
anywhere.
"""


def results(kept: list[Kept]) -> str:
    """The whole of ``RESULTS.md``."""
    parts = ["# What hooks cost: results\n", "Made by `python -m benchmarks.report`; not edited by hand.\n", METHOD]
    if not kept:
        parts.append("No measurements are kept yet.\n")
    sections = {"overhead": _overhead, "peers": _peers, "limits": _limits, "scaling": _scaling, "cam": _cam}
    titles = {
        "overhead": "Overhead: hooks, captures and logs, a step",
        "peers": "Beside other libraries, at the same work",
        "limits": "Limits of the machine, and the distance from them",
        "scaling": "As the work grows",
        "cam": "Class activation maps, beside other libraries",
    }
    drawn = pictures(kept)
    for command, section in sections.items():
        runs = [each for each in kept if each["command"] == command]
        if runs:
            parts.append(f"## {titles[command]}\n")
            parts += [f"![{_alt(name)}](results/{name})\n" for name in drawn if name.startswith(command)]
        if runs and command == "overhead":
            parts.append("\n".join(f"- *{arm.name}*: {arm.what}" for arm in ARMS) + "\n")
        for each in runs:
            parts.append(_heading(each) + section(each))
    return "\n".join(parts)


def _heading(each: Kept) -> str:
    state = "" if each["complete"] else " Interrupted: only what was measured until then."
    state += " Quick, and so less exact." if each["quick"] else ""
    return f"### `{each['line']}`\n\n{_machine(each)}; {each['date']}.{state}\n\n"


def _machine(each: Kept) -> str:
    machine = each["machine"]
    name = machine.get("gpu", machine["cpu"]) + (f" ({machine['clocks']})" if machine.get("clocks") else "")
    threads = f"{machine['threads']} of {machine['cores']} cores"
    return f"{name}, {threads}, torch {machine['torch']}, Python {machine['python']}"


def _overhead(each: Kept) -> str:
    counted = ["µs a call", "hooks", "Python calls a call", "MB held", "MB at peak", "to host"]
    lines = [["", "ratio (quartiles)", "pairs", *counted]]
    for row in each["rows"]:
        label = row["arm"] + (f", every {row['every']}" if row["every"] else "")
        if row["against"] != "bare":
            label = f"*{label} / {row['against']}*"
        if "failed" in row:
            lines.append([label, _shortened(row["failed"]), *[""] * 7])
            continue
        counts = [""] * 6
        if "hooks" in row:
            micro = f"{row['microseconds']:.1f}" if "microseconds" in row else ""
            calls = f"{row['python_calls'] / each['settings']['calls']:.1f}"
            held, peak = (f"{row[key] / 1e6:.1f}" for key in ("held", "peak"))
            counts = [micro, str(row["hooks"]), calls, held, peak, str(row["transfers"])]
        lines.append([label, _ratio(row["ratio"]), str(row["ratio"]["pairs"]), *counts])
    waits = sum(row.get("waits", 0) for row in each["rows"] if row["every"])
    note = (
        f"\nWaits for the device in steps that log, before they are flushed: {waits}.\n"
        if "gpu" in each["machine"]
        else ""
    )
    calls = each["settings"]["calls"]
    more = "Counts with `every` above 1 are those of a step that is not observed."
    return f"{_table(lines)}\n{calls} hooked calls a step. {more}\n{note}"


def _peers(each: Kept) -> str:
    lines = [["work", "model", "library", "/ bare", "/ probe", "true", ""]]
    for row in each["rows"]:
        name = f"{row['peer']} {row['version']}" if row["version"] else row["peer"]
        start = [row["work"], row["model"], f"**{name}**" if row["peer"] == "probe" else name]
        if "failed" in row:
            lines.append([*start, "", "", "", _shortened(row["failed"])])
            continue
        probe = _ratio(row["to_probe"]) if row["to_probe"] else ""
        lines.append(
            [*start, _ratio(row["ratio"]), probe, f"{row['true']} of {row['all']}", _verdict(row, each["rows"])]
        )
    return _table(lines[:1] + sorted(lines[1:], key=lambda line: (line[0], line[1]))) + "\n"


def _verdict(row: Kept, rows: list[Kept]) -> str:
    """The note, and whether `probe` is cheapest of all that do this work, and the only one that is right throughout."""
    others = [
        each
        for each in rows
        if (each["work"], each["model"]) == (row["work"], row["model"]) and "failed" not in each and each["package"]
    ]
    parts = [row["note"]] if row["note"] else []
    if row["peer"] == "probe":
        cheaper = [each["peer"] for each in others if each["to_probe"]["high"] < 1]
        right = [each["peer"] for each in others if each["true"] == each["all"]]
        parts.append(f"cheaper: {', '.join(cheaper)}" if cheaper else "none is cheaper")
        parts.append(f"as right: {', '.join(right)}" if right else "no other is right throughout")
    elif row["package"]:
        ratio = row["to_probe"]
        if ratio["low"] <= 1:
            parts.append("cheaper than probe" if ratio["high"] < 1 else "not told from probe")
        parts.append("right throughout" if row["true"] == row["all"] else "not right throughout")
    return "; ".join(parts)


def _limits(each: Kept) -> str:
    lines = [["", "measured"]]
    for row in each["rows"]:
        if "failed" in row:
            lines.append([row["what"], "too little memory"])
        elif "ratio" in row:
            share = f", {100 * row['share']:.0f} % of its bandwidth" if "share" in row else ""
            lines.append([f"{row['what']} / {row['against']}", _ratio(row["ratio"]) + share])
        elif "gigabytes" in row:
            lines.append([f"{row['what']}, float32 [{row['size']:,}]", f"{row['gigabytes']:.1f} GB/s"])
        else:
            lines.append([row["what"], f"{row['microseconds']:.2f} µs"])
    return _table(lines) + "\n"


def _scaling(each: Kept) -> str:
    lines = [["what grows", "probe", "cost of each, by size", "growth"]]
    sweeps = list(dict.fromkeys((row["sweep"], row["how"]) for row in each["rows"] if row["sweep"] != "steps"))
    for sweep, how in sweeps:
        rows = [row for row in each["rows"] if (row["sweep"], row["how"]) == (sweep, how)]
        costs = ", ".join(f"{row['size']:,}: {_time(row['nanoseconds'])}" for row in rows if "nanoseconds" in row)
        growth = next((row["growth"] for row in rows if "growth" in row), None)
        shown = "lost in the noise" if growth is None else f"{growth:.2f}"
        if growth is not None and not next(row["linear"] for row in rows if "linear" in row):
            shown = f"**{shown}: faster than the work**"
        lines.append([sweep, how, costs, shown])
    runs = [["steps", "probe", "bytes a step", "objects more", "a late step / an early one"]]
    for row in each["rows"]:
        if row["sweep"] == "steps":
            size = f"{row['size']:,}"
            runs.append([size, row["how"], f"{row['bytes_a_step']:+.1f}", f"{row['objects']:+}", f"{row['time']:.2f}"])
    return _table(lines) + "\n" + _table(runs) + "\n"


def _cam(each: Kept) -> str:
    lines = [["model", "batch", "method", "library", "error", "time", "MB at peak", "left behind"]]
    for row in each["rows"]:
        name = " ".join(part for part in (row["library"], row.get("version")) if part)
        start = [row["model"], f"{row['batch']} of {row['size']} px", row["method"], name]
        if row["library"] == "probe":
            start[-1] = "**probe**"
        if "failed" in row:
            lines.append([*start, row["failed"], "", "", ""])
            continue
        error = f"{row['error']:.0e}" if "error" in row else ""
        ratio = _ratio(row["ratio"]) if "ratio" in row else ""
        time = f"*{ratio}*" if ratio and row["library"] == "probe" else ratio
        peak = f"{row['peak'] / 1e6:.0f}" if "peak" in row else ""
        lines.append([*start, error, time, peak, row.get("left", "")])
    note = (
        "Error: the largest difference from autograd on the network cut in two by hand, as a share of the map's "
        "maximum. Time: a library's / that of `probe` at the same work, above 1 where `probe` is faster; *slanted*: "
        "that of `probe` / a plain forward without a graph. *forward* is that plain forward. Left behind: on a model "
        "in train mode, half of it frozen, with gradients."
    )
    return f"{_table(lines)}\n{note}\n"


# -- writing tables and pictures ---------------------------------------------------------------------------------------


def _ratio(ratio: Kept) -> str:
    spread = f"{_number(ratio['median'])} ({_number(ratio['low'])}–{_number(ratio['high'])})"
    return spread if ratio["differs"] else f"{spread} ~"


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:99].rstrip()}…"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _time(nanoseconds: float) -> str:
    return f"{nanoseconds / 1000:.1f} µs" if abs(nanoseconds) >= 1000 else f"{nanoseconds:.2f} ns"


def _span(dates: list[str]) -> str:
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _table(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    rows.insert(1, "|" + "---|" * len(lines[0]))
    return "\n".join(rows) + "\n"


def _alt(name: str) -> str:
    if name.startswith("scaling"):
        return "What a probe costs a layer, a call and an element, against their number"
    mode = "forward" if "forward" in name else "training step"
    return f"The ratio of a {mode} to the bare one, for each way to look into it, by model"


def pictures(kept: list[Kept]) -> dict[str, str]:
    """SVGs by name: the ratios of each mode's arms, and the growth of costs."""
    found = {}
    for mode in ("forward", "train"):
        runs = [
            each
            for each in kept
            if each["command"] == "overhead" and each["settings"]["mode"] == mode and not each["settings"]["compile"]
            if any(row["against"] == "bare" and "ratio" in row for row in each["rows"])
        ]
        if runs:
            found[f"overhead-{mode}.svg"] = _whiskers(runs)
    sweeps = [
        each
        for each in kept
        if each["command"] == "scaling" and any(row.get("nanoseconds", 0) > 0 for row in each["rows"])
    ]
    for number, each in enumerate(sweeps, 1):
        found["scaling.svg" if number == 1 else f"scaling-{number}.svg"] = _lines(each)
    return found


COLOURS = ("#1b6ca8", "#d1495b", "#2a9d5c", "#8e5ea2", "#c98a1b", "#4c4c4c")


def _whiskers(runs: list[Kept]) -> str:
    """A row an arm, a dot and its quartiles a model, on a logarithmic axis."""
    labels: dict[str, list[tuple[int, Kept]]] = {}
    for number, each in enumerate(runs):
        for row in each["rows"]:
            if row["against"] == "bare" and "ratio" in row:
                label = row["arm"] + (f", every {row['every']}" if row["every"] else "")
                labels.setdefault(label, []).append((number, row["ratio"]))
    left, width, step = 190, 480, 9 * len(runs) + 8
    most = max(ratio["high"] for rows in labels.values() for _, ratio in rows)
    ticks = [tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50, 100) if tick <= 1.2 * most]

    def place(ratio: float) -> float:
        share = math.log(max(ratio, 0.8) / 0.8) / math.log(max(1.2 * most, 1.5) / 0.8)
        return round(left + width * min(share, 1), 1)

    height = step * len(labels)
    body = [f'<line x1="{place(t)}" y1="20" x2="{place(t)}" y2="{20 + height}" class="g"/>' for t in ticks]
    body += [f'<text x="{place(t)}" y="14" text-anchor="middle">{t}×</text>' for t in ticks]
    for at, (label, rows) in enumerate(labels.items()):
        top = 20 + at * step
        body.append(f'<text x="{left - 8}" y="{top + step / 2 + 4}" text-anchor="end">{html.escape(label)}</text>')
        for number, ratio in rows:
            y, (colour, dash) = top + 8 + 9 * number, _stroke(number)
            ends = f'x1="{place(ratio["low"])}" y1="{y}" x2="{place(ratio["high"])}" y2="{y}"'
            body.append(f'<line {ends} stroke="{colour}" stroke-width="2"{dash}/>')
            body.append(f'<circle cx="{place(ratio["median"])}" cy="{y}" r="3.5" fill="{colour}"/>')
    title = "ratio to the bare step: median (dot) and quartiles (line), on a logarithmic axis"
    return _svg(body, list(_columns(runs)), left + width + 20, 20 + height, title)


def _lines(each: Kept) -> str:
    """Cost of each layer, call and element against their number, both axes logarithmic."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in each["rows"]:
        if row.get("nanoseconds", 0) > 0:
            series.setdefault(f"{row['sweep']}, {row['how']}", []).append((row["size"], row["nanoseconds"]))
    points = [point for line in series.values() for point in line]
    sizes, costs = [math.log10(x) for x, _ in points], [math.log10(y) for _, y in points]
    left, top, width, height = 70, 20, 480, 240

    def place(x: float, y: float) -> str:
        across = (math.log10(x) - min(sizes)) / max(max(sizes) - min(sizes), 1e-9)
        up = (math.log10(y) - min(costs)) / max(max(costs) - min(costs), 1e-9)
        return f"{left + width * across:.1f},{top + height * (1 - up):.1f}"

    body = []
    for exponent in range(math.ceil(min(sizes)), math.floor(max(sizes)) + 1):
        x = place(10**exponent, 10 ** min(costs)).split(",")[0]
        body.append(f'<line x1="{x}" y1="{top}" x2="{x}" y2="{top + height}" class="g"/>')
        body.append(f'<text x="{x}" y="14" text-anchor="middle">1e{exponent}</text>')
    for exponent in range(math.ceil(min(costs)), math.floor(max(costs)) + 1):
        y = place(10 ** min(sizes), 10**exponent).split(",")[1]
        body.append(f'<line x1="{left}" y1="{y}" x2="{left + width}" y2="{y}" class="g"/>')
        body.append(f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{_axis(exponent)}</text>')
    for number, line in enumerate(series.values()):
        colour, dash = _stroke(number)
        marks = " ".join(place(*point) for point in line)
        body.append(f'<polyline points="{marks}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
    title = "what each one adds to the bare step (sketch.of: what it takes), by their number"
    return _svg(body, list(series), left + width + 20, top + height, title)


def _stroke(number: int) -> tuple[str, str]:
    """Colour and dashes of a series: no two alike up to twice as many as there are colours."""
    return COLOURS[number % len(COLOURS)], ' stroke-dasharray="4 3"' if number >= len(COLOURS) else ""


def _axis(exponent: int) -> str:
    """A power of ten of nanoseconds."""
    return f"{10 ** (exponent - 3):g} µs" if exponent >= 3 else f"{10**exponent:g} ns"


def _svg(body: list[str], names: list[str], width: int, height: float, title: str) -> str:
    """The picture, with what it shows and a legend below: a line each, dashed as those in it."""
    legend = [f'<text x="20" y="{height + 22}">{html.escape(title)}</text>']
    for number, name in enumerate(names):
        x, y = 20 + width // 2 * (number % 2), height + 44 + 18 * (number // 2)
        colour, dash = _stroke(number)
        ends = f'x1="{x}" y1="{y - 4}" x2="{x + 22}" y2="{y - 4}"'
        legend.append(f'<line {ends} stroke="{colour}" stroke-width="4"{dash}/>')
        legend.append(f'<text x="{x + 28}" y="{y}">{html.escape(name)}</text>')
    height += 54 + 18 * ((len(names) - 1) // 2)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
    style = "<style>text{font:12px sans-serif;fill:#333}.g{stroke:#ddd}</style>"
    ground = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    return "\n".join([head, style, ground, *body, *legend, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
