"""``python -m probe run``: runs a script as Python itself would, and probes what it trains.

Nothing here imports torch: the script may set what torch reads when it is imported (``OMP_NUM_THREADS``), and may not
need torch at all. What watches the training is imported right after the script has imported torch.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import shlex
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.watch import Watch

KINDS = ("input", "output", "grad_output", "grad_input", "value", "grad", "update")
USUAL = ("output", "grad_output", "value", "grad", "update")


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``run`` to the commands of a parser; `run` is what it runs, in ``args.run``."""
    parser = subparsers.add_parser(
        "run",
        usage="python -m probe run [options] script.py [its arguments]\n"
        "       python -m probe run [options] -m module [its arguments]",
        help="run a script unchanged, and log what it trains",
        description="Run a script or module as Python would, unchanged and with the very same results, and log every "
        "model that it trains into TensorBoard: statistics and histograms of activations, gradients, parameters and "
        "updates, and learning rates. A table of the layers goes to stderr at the end.",
    )
    parser.add_argument("--logdir", help="a folder for the models' runs (default: a new one below runs/)")
    parser.add_argument("--every", type=positive, default=100, metavar="N", help="log every N-th step (default: 100)")
    parser.add_argument(
        "--layers",
        nargs=1,
        action="extend",
        default=[],
        metavar="GLOB",
        help="only layers of that name; may be repeated",
    )
    parser.add_argument(
        "--kinds", type=_kinds, default=USUAL, metavar="K,K", help=f"of {', '.join(KINDS)} (default: {','.join(USUAL)})"
    )
    parser.add_argument("--until-step", type=int, metavar="N", help="the last step to log")
    parser.add_argument("--no-findings", dest="findings", action="store_false", help="without the health checks")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="...", help="a module and its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="script ...", help="a script and its arguments")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Run the script, and tell what was seen, on stderr.

    Returns:
        The exit status, 0, when the script falls off its end.

    Raises:
        SystemExit: with status 2 where there is no such script; else the script's own.
        BaseException: whatever ends the script. Its traceback is printed without the frames of this package.
    """
    program = Program(args.module if args.module else args.script, bool(args.module), args.parser)
    if not _writable(args.logdir or "runs"):
        args.parser.error(
            f"nothing can be written to {args.logdir or 'runs'!r}; give --logdir a folder that can be made"
        )
    observe = os.environ.get("RANK", "0") == "0"  # what torchrun sets: one rank writes
    watching = _Watching(args, program.name)
    if observe:
        _when_imported("torch", watching.start)
    process = os.getpid()
    try:
        program.run()
    except BaseException as error:
        _hide_frames(error, program.code)
        raise
    finally:
        if observe and program.code is not None and os.getpid() == process:  # not in a child that the script has forked
            watching.finish()
    return 0


class Program:
    """A script or module that runs as ``__main__``, with the ``sys.argv`` and ``sys.path`` that Python gives it."""

    def __init__(self, words: Sequence[str], is_module: bool, parser: argparse.ArgumentParser) -> None:
        if not words:
            parser.error("name a script, or a module after -m")
        self.code: types.CodeType | None = None
        self._words = list(words)
        self._is_module = is_module
        if is_module:
            self.name = words[0].rpartition(".")[2]
            return
        # as Python does since 3.9; not normalised
        self._path = os.path.join(os.getcwd(), words[0].removeprefix("./"))
        self.name = Path(self._path).stem
        if os.path.isdir(self._path):
            parser.error(f"{words[0]!r} is a folder; a package is run with -m")
        try:
            self._source = Path(self._path).read_bytes()
        except OSError as error:
            parser.error(f"can't open file {self._path!r}: [Errno {error.errno}] {error.strerror}")

    def run(self) -> None:
        """Run it in this process; whatever ends it passes through."""
        main = types.ModuleType("__main__")
        main.__dict__.update(__builtins__=builtins, __annotations__={})
        if self._is_module:
            self._prepare_module(main)
        else:
            self._prepare_script(main)
        sys.modules["__main__"] = main  # what pickle, and multiprocessing's spawn, look at
        assert self.code is not None
        exec(self.code, main.__dict__)

    def _prepare_script(self, main: types.ModuleType) -> None:
        sys.argv[:] = self._words
        _first_on_path(os.path.dirname(os.path.realpath(self._path)))
        loader = importlib.machinery.SourceFileLoader("__main__", self._path)
        main.__dict__.update(__file__=self._path, __cached__=None, __loader__=loader)
        self.code = loader.source_to_code(self._source, self._path)

    def _prepare_module(self, main: types.ModuleType) -> None:
        sys.argv[:] = ["-m", *self._words[1:]]
        _first_on_path(os.getcwd())
        spec = _find(self._words[0])
        code = spec.loader.get_code(spec.name)  # type: ignore[union-attr]
        sys.argv[0] = spec.origin or self._words[0]
        main.__dict__.update(
            __file__=spec.origin, __cached__=spec.cached, __loader__=spec.loader, __spec__=spec, __package__=spec.parent
        )
        self.code = code


def _first_on_path(folder: str) -> None:
    """Have the script's folder where this package's was."""
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _find(name: str) -> importlib.machinery.ModuleSpec:
    """Where a module to run is; of a package its ``__main__``."""
    reason = f"No module named {name}"
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name, reason = f"{name}.__main__", f"No module named {name}.__main__; {name!r} is a package"
            spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        reason, spec = f"Error while finding module specification for {name!r} ({error})", None
    if spec is None or spec.loader is None or not hasattr(spec.loader, "get_code"):
        print(f"{sys.executable}: {reason}", file=sys.stderr)
        sys.exit(1)
    return spec


class _Watching:
    """What watches the script's training, once torch is there; and the report of it."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self._args = args
        self._name = name
        self._watch: Watch | None = None
        self._failure = ""

    def start(self) -> None:
        """Watch from now on; what fails here must not fail the script's import of torch."""
        try:
            self._start()
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"

    def _start(self) -> None:
        from probe.watch import Watch
        from probe.watched import Options

        args = self._args
        self._watch = Watch(
            Options(
                logdir=args.logdir,
                every=args.every,
                layers=tuple(args.layers),
                kinds=args.kinds,
                until_step=args.until_step,
                findings=args.findings,
                comment=f"_{self._name}",
            )
        )

    def finish(self) -> None:
        """End it, and tell what was seen. Whatever fails here, the script ends as it would without."""
        try:
            lines = list(self._report())
        except Exception as error:
            lines = [f"probe: the report failed: {type(error).__name__}: {error}"]
        if sys.stderr is not None:  # print would take stdout
            with contextlib.suppress(OSError, ValueError):  # the script has closed it, or nobody reads it
                print(*lines, sep="\n", file=sys.stderr)

    def _report(self) -> Iterator[str]:
        if self._failure:
            yield f"probe: nothing was probed: {self._failure}"
            return
        if self._watch is None:
            yield "probe: the script did not import torch: there was nothing to probe"
            return
        self._watch.close()
        for note in self._watch.notes:
            yield f"probe: {note}"
        if not self._watch.models:
            yield "probe: no model was trained in this process (its child processes are not probed)"
            return
        trained = [model for model in self._watch.models if model.trained]
        for model in self._watch.models:
            yield from model.report(brief=bool(trained) and model not in trained)
        yield f"probe: see it in TensorBoard:  python -m probe open {shlex.quote(self._watch.folder())}"


def _hide_frames(error: BaseException, code: types.CodeType | None) -> None:
    """Have the traceback begin where the script does, as it would without this package."""
    show = sys.excepthook  # by now perhaps the script's own

    def hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code is not code:
            trace = trace.tb_next
        show(kind, error.with_traceback(trace), trace)

    sys.excepthook = hook


def _when_imported(name: str, function: Callable[[], None]) -> None:
    """Have `function` called once, right after a module was imported for the first time; now, if it was already."""
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing by itself: it lets the other finders find the module, and leaves no trace on it."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self._name = name
        self._function = function

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                del loader.exec_module
                execute(module)
                self._function()

            loader.exec_module = exec_module
        return spec


def _writable(folder: str) -> bool:
    """Whether a folder can be made there, or is one that can be written to; a URL is taken at its word."""
    if "://" in folder:
        return True
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _kinds(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"takes some of {', '.join(KINDS)}, with commas, not {text!r}")
    return names


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text!r}")
    return number
