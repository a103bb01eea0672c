"""How much do hooks slow a run down? On your machine and model: ``python -m benchmarks.overhead --model resnet18``.

Every arm is measured against a copy of the bare model, step by step in turn, and told as the median ratio with its
quartiles. Arms that log are measured at every step, every 10th and every 100th (``--every``), with the background
thread's writing and the last transfer inside the measurement. Training steps are zero_grad, forward, backward and SGD
with momentum on random data that stays the same. Your own model: ``--model package.module:function``, a function that
returns ``(model, inputs)``.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import apart, command
from benchmarks.arms import ARMS, Arm, Attached
from benchmarks.command import Results, progress
from benchmarks.counts import Counts, count
from benchmarks.timing import Ratio, compare, seconds_of
from benchmarks.work import Work, calls, prepare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Task(NamedTuple):
    """One row to measure: an arm, every how many steps it observes, and what it is measured against."""

    arm: Arm
    every: int
    against: Arm


def main(words: Sequence[str] | None = None) -> None:
    parser = command.arguments(__doc__)
    parser.add_argument(
        "--model", default="resnet18", help="gpt, mlp200, resnet18, resnet50, vit_b_16, module:function"
    )
    parser.add_argument("--mode", choices=("forward", "train"), default="train")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--batch", type=command.positive, help="samples; by default what the model's function says")
    parser.add_argument(
        "--size", type=command.positive, help="pixels a side, or tokens of gpt; likewise (64 pixels with --quick)"
    )
    parser.add_argument("--compile", action="store_true", help="measure against torch.compile(model)")
    parser.add_argument("--every", help="for the arms that log; 1,10,100 by default, 1,10 with --quick")
    parser.add_argument("--arms", default="*", help="which arms, as globs with commas between: 'output,all*'")
    parser.add_argument("--seconds", type=apart.seconds, help="how long to measure an arm; at least so many")
    options = parser.parse_args(words)
    every = _every(options.every or ("1,10" if options.quick else "1,10,100"))
    chosen = _arms(options.arms, options.mode, options.compile)
    if options.quick and options.size is None and options.model in ("resnet18", "resnet50"):
        options.size = 64
    command.start(options)
    if options.compile:
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # else a copy without hooks lends its code to one with
    settings = {key: value for key in ("batch", "size") if (value := getattr(options, key)) is not None}
    try:
        work = prepare(options.model, options.mode, options.device, DTYPES[options.dtype], options.compile, settings)
        base = work.twin()
        base.step()
        run = Run(base, options.seconds or (0.3 if options.quick else 4.0), 3 if options.quick else 5)
    except Exception as error:
        if not command.out_of_memory(error):
            error.add_note(f"--model {options.model}, --mode {options.mode}: raised before anything was measured")
            raise
        raise SystemExit(_too_little(options.model, error)) from error
    kept = {key: getattr(options, key) for key in ("model", "mode", "device", "dtype", "batch", "size", "compile")}
    tasks = _tasks(chosen, every)
    with Results("overhead", options, **kept, layers=len(run.names), calls=run.calls) as found:
        print(f"{options.model}, {options.mode}, {options.device}, {options.dtype}: {run.calls} hooked calls a step")
        print("~: not told from 1. py/call: Python calls a hooked call. held, peak: bytes beyond the bare step's.")
        print(f"{'arm':28} " + " ".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
        for task in progress(tasks, len(tasks)):
            measure(task, work, run, found)


class Run:
    """What all rows share: the bare work, its counts, and for how long to measure."""

    def __init__(self, base: Work, seconds: float, least: int) -> None:
        self.base = base
        self.seconds = seconds
        self.least = least
        self.names, self.calls = calls(base)
        self.step_seconds = seconds_of(base.step, seconds=0.0)
        self.counts = count(base.model, base.step, base.device)

    def steps(self, every: int) -> int:
        """How many steps one run of a logging arm has: whole periods, and a fifth of a second of bare steps.

        Long enough that flushing once at the end of a run weighs little; short enough that an arm that takes 40 times
        as long is measured in pairs all the same.
        """
        return every * max(1, round(min(0.2, self.seconds) / (every * self.step_seconds)))


def measure(task: Task, work: Work, run: Run, found: Results) -> None:
    """One row: counts, then times; an arm that can't be had says why."""
    arm, every, against = task
    row: dict[str, Any] = {"arm": arm.name, "every": every if arm.logs else None, "against": against.name}
    label = f"{arm.name}, every {every}" if arm.logs else arm.name
    if work.compiled:
        torch.compiler.reset()  # copies of a model share their code's cache, which holds only a few variants
    try:
        counts = _counts(arm, every, work, run) if against.name == "bare" else None
        ratio = _ratio(arm, every, against, work, run)
    except Exception as error:
        why = _too_little(arm.name, error) if command.out_of_memory(error) else f"{type(error).__name__}: {error}"
        start = label if against.name == "bare" else f"{label} / {against.name}"
        found.add(f"{start:28} {why.splitlines()[0][:90]}", **row, failed=why.splitlines()[0])
        return
    if counts is not None:
        row |= counts._asdict()
    if every == 1:
        row["microseconds"] = 1e6 * ratio.beyond / (run.steps(1) if arm.logs else 1) / max(run.calls, 1)
    found.add(_line(label, against.name, ratio, row, run), **row, ratio=ratio)


def _counts(arm: Arm, every: int, work: Work, run: Run) -> Counts:
    """What the arm adds to the counts of a step: of an observed one, or where there are others, of one of those."""
    twin = work.twin()
    Work(twin.model, twin.inputs, twin.optimizer).step()  # not the compiled one, which an arm may have to come before
    apart = max(every, 10) if every > 1 else 1  # so far that none of the counted steps is observed
    with arm.attach(twin, apart) as attached:
        if every > 1:
            attached.step()
            attached.finish()
        return count(twin.model, attached.step, twin.device) - run.counts


def _ratio(arm: Arm, every: int, against: Arm, work: Work, run: Run) -> Ratio:
    with contextlib.ExitStack() as stack:
        measured = stack.enter_context(arm.attach(work.twin(), every))
        base = stack.enter_context(against.attach(run.base if against.name == "bare" else work.twin(), every))
        if not arm.logs:
            return compare(measured.step, _compiled(base.step, work), seconds=run.seconds, least=2 * run.least)
        steps = run.steps(every)
        many, few = _repeated(measured, steps), _repeated(base, steps)
        return compare(many, _compiled(few, work), seconds=run.seconds, least=3)  # runs of many steps each


def _repeated(attached: Attached, steps: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            attached.step()
        attached.finish()

    return run


def _compiled(step: Callable[[], object], work: Work) -> Callable[[], object]:
    """The step with compiled code in force, which an attached `Probe` suspends everywhere in the process."""
    if not work.compiled:
        return step

    def run() -> None:
        with torch.compiler.set_stance("default"):
            step()

    return run


def _every(text: str) -> list[int]:
    try:
        every = [int(word) for word in text.split(",")]
    except ValueError:
        every = []
    if not every or min(every) < 1:
        raise SystemExit(f"--every {text}: give whole numbers of at least 1 with commas between, as in 1,10,100")
    return every


def _arms(text: str, mode: str, compiled: bool) -> list[Arm]:
    patterns = [pattern.strip() for pattern in text.split(",")]
    possible = [arm for arm in ARMS if mode in arm.modes and arm.compiled <= compiled]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(arm.name, pattern) for arm in possible):
            there = f"in mode {mode}{'' if compiled else ' without --compile'} there are"
            names = ", ".join(arm.name for arm in possible)
            raise SystemExit(f"--arms {text}: {pattern!r} is no arm here; {there} {names}")
    return [arm for arm in possible if any(fnmatch.fnmatchcase(arm.name, pattern) for pattern in patterns)]


def _tasks(chosen: list[Arm], every: list[int]) -> list[Task]:
    named = {arm.name: arm for arm in ARMS}
    tasks = [
        Task(arm, n, named[against])
        for n in every
        for arm in chosen
        if arm.logs or n == every[0]
        for against in ("bare", *arm.against)
    ]
    return [task if task.arm.logs else task._replace(every=1) for task in tasks]


def _too_little(what: str, error: BaseException) -> str:
    return f"{what}: too little memory; take a smaller --batch or --size ({str(error).splitlines()[0]})"


COLUMNS = {"ratio (quartiles)": 24, "µs/call": 8, "hooks": 6, "py/call": 8, "held": 9, "peak": 9, "to host": 8}


def _line(label: str, against: str, ratio: Ratio, row: dict[str, Any], run: Run) -> str:
    spread = f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})" + ("" if ratio.differs else " ~")
    if against != "bare":
        return f"{label + ' / ' + against:28} {spread}"
    micro = f"{row['microseconds']:8.1f}" if "microseconds" in row else " " * 8
    each = row["python_calls"] / run.calls
    held, peak = (f"{row[key] / 1e6:7.1f}MB" for key in ("held", "peak"))
    return f"{label:28} {spread:24} {micro} {row['hooks']:6} {each:8.1f} {held} {peak} {row['transfers']:8}"


if __name__ == "__main__":
    command.run(main)
