"""Work in a process of its own: a library that dies, hangs or fills the memory takes nothing else along."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def version(package: str) -> str | None:
    """The installed version of a package, as pip calls it; None if it is missing.

    Importing is no test: any folder of that name, such as the one in which wandb keeps its runs, can be imported.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def seconds(text: str) -> float:
    """The type of an option that is a time: finite, and more than nothing."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time to measure for; give seconds above 0")
    return number


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a command that measures in processes of their own."""
    parser.add_argument(
        "--limit", type=seconds, default=120.0, metavar="SECONDS", help="after which a row is given up; 120 by default"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def rows(module: str, tasks: Sequence[Any], limit: float, **order: Any) -> Iterator[Any]:
    """What ``python -m module --worker ORDER`` answers to each task, as soon as it does.

    A task that ends its process, or takes longer than `limit` seconds (a process's first one, the start included),
    becomes ``{"failed": why}``; the tasks after it go on in a new process.

    Arguments:
        module: whose ``--worker`` calls `answer`.
        tasks: whatever JSON takes.
        limit: seconds.
        order: what the tasks have in common, likewise.
    """
    left = list(tasks)
    while left:
        words = [sys.executable, "-W", "ignore", "-m", module, "--worker", json.dumps({"tasks": left, **order})]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            ) as process,
        ):
            why = ""
            try:
                while left and (line := _line(process, limit)):
                    left.pop(0)
                    yield json.loads(line)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            except TimeoutError:
                why = f"took longer than {limit:g} s"
            finally:
                _end(process)
            why = why or _why_ended(process.returncode, errors)
        if left:
            left.pop(0)
            yield {"failed": why}


def _line(process: subprocess.Popen[str], limit: float) -> str:
    """The next line; nothing once the process has ended."""
    late = threading.Event()

    def end() -> None:
        late.set()
        _end(process)

    timer = threading.Timer(limit, end)
    timer.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
    finally:
        timer.cancel()
    if not line and late.is_set():
        raise TimeoutError
    return line


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and, where the system has groups of them, what it started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):  # the timer's thread was quicker
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def _why_ended(code: int, errors: Any) -> str:
    if code < 0:
        killed = " (too little memory?)" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{killed}"
    errors.seek(0)
    last = (errors.read().strip().splitlines() or [f"its process ended with code {code}"])[-1]
    return str(last)[:200]


def answer(measure: Callable[[Any], Any], tasks: Sequence[Any]) -> None:
    """In the worker: measure each task, and hand back a line of JSON; ``{"failed": why}`` where it raises.

    Whatever a library prints goes nowhere, and what it starts does not keep the pipe open.
    """
    with os.fdopen(os.dup(1), "w") as out, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        for task in tasks:
            try:
                row = measure(task)
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                little = "too little memory: " if "can't allocate memory" in first else ""
                row = {"failed": f"{little}{type(error).__name__}: {first}"[:200]}
            print(json.dumps(row), file=out, flush=True)
