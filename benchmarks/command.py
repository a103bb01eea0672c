"""`Results`: what a command measured, row by row: shown as it comes, kept in a file, also when it is interrupted."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from benchmarks.timing import Ratio, environment, machine, steady

T = TypeVar("T")


def arguments(doc: str | None, *, device: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that all commands share."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if device:
        parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU; 1, because that varies least")
    parser.add_argument("--quick", action="store_true", help="under a minute, and so less exact")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep the results in this file")
    return parser


def positive(text: str) -> int:
    """The type of an option that is a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def run(main: Callable[[], None]) -> None:
    """A command, as the shell calls it: Ctrl-C ends it with a line where nothing is measured yet, too."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; what is shown above was measured in full", file=sys.stderr)
        raise SystemExit(130) from None


def start(options: argparse.Namespace) -> None:
    """Settle the device, the threads, and how much memory may be had; say where this runs.

    Raises:
        SystemExit: there is no such device, or the file for the results can't be written.
    """
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU; there is --device cpu")
    if options.out is not None:
        _check_out(options.out)
    steady(options.threads)
    if options.device == "cpu":
        _bound_memory()
    quiet()
    print(machine(options.device), flush=True)


def _check_out(out: Path) -> None:
    """Say now what would be said when all is measured."""
    if not out.parent.is_dir():
        raise SystemExit(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise SystemExit(f"--out {out}: that is a folder; give a file, as in --out {out / 'results.json'}")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise SystemExit(f"--out {out}: no permission to write there")


def quiet() -> None:
    """No warnings: of layers that a model never calls, of what other libraries deprecate."""
    warnings.simplefilter("ignore")


def _bound_memory() -> None:
    """Have the kernel refuse memory that is not there: an error that can be told, where it would kill the process."""
    with contextlib.suppress(ImportError, OSError, ValueError, KeyError):
        import resource

        with open("/proc/meminfo") as file:
            free = next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
        with open("/proc/self/status") as file:
            used = next(1024 * int(line.split()[1]) for line in file if line.startswith("VmData"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (free + used, hard))


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there is not enough memory, on whichever device."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text


class Results:
    """Collects rows, also those before Ctrl-C, and writes them to ``--out``, which without a row stays as it was.

    Arguments:
        command: the module that measures.
        options: of the command line; ``out`` is where to.
        settings: what the rows have in common, for whoever reads the file.
    """

    def __init__(self, command: str, options: argparse.Namespace, **settings: Any) -> None:
        self._out: Path | None = options.out
        self.kept: dict[str, Any] = {
            "command": command,
            "line": shlex.join(["python", "-m", f"benchmarks.{command}", *_shown(sys.argv[1:])]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": environment(getattr(options, "device", "cpu")),
            "quick": options.quick,
            "settings": settings,
            "complete": False,
            "rows": [],
        }

    def add(self, text: str, **row: Any) -> None:
        """Keep a row, and show `text`."""
        self.kept["rows"].append({key: plain(value) for key, value in row.items()})
        with _bar_aside():
            print(text, flush=True)

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kept["complete"] = error is None
        if self._out is not None and self.kept["rows"]:
            text = json.dumps(self.kept, indent=1) + "\n"
            self._out.write_text(text, encoding="utf-8")
            print(f"{len(self.kept['rows'])} rows in {self._out}")
        if isinstance(error, KeyboardInterrupt):
            print(f"interrupted; the {len(self.kept['rows'])} rows above were measured in full", file=sys.stderr)
            raise SystemExit(130) from None


def _shown(words: list[str]) -> list[str]:
    """The command line without ``--out``, which is no part of how to measure."""
    words = [word for word in words if not word.startswith("--out=")]
    if "--out" in words:
        at = words.index("--out")
        return words[:at] + words[at + 2 :]
    return words


def plain(value: Any) -> Any:
    """What JSON takes: a `Ratio` as a dict."""
    return {**value._asdict(), "differs": value.differs} if isinstance(value, Ratio) else value


def progress(items: Iterable[T], total: int) -> Iterator[T]:
    """A bar on stderr where tqdm is installed and somebody looks; else nothing, as every row is shown as it comes."""
    try:
        from tqdm import tqdm
    except ImportError:
        for number, item in enumerate(items):
            if sys.stderr.isatty():
                print(f"\r{number} of {total}\r", end="", file=sys.stderr, flush=True)
            yield item
        return
    yield from tqdm(items, total=total, leave=False, disable=None)


def _bar_aside() -> Any:
    """While something is printed, tqdm's bar is out of the way."""
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext()
    return tqdm.external_write_mode(file=sys.stdout)
