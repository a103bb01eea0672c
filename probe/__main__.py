"""``python -m probe``: the demo, and small tools for the shell."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import probe
from probe import run


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Arguments:
        argv: what was typed after ``python -m probe``; ``sys.argv[1:]`` by default.

    Returns:
        The exit status: 0, 1 when it could not be done, 130 when it was interrupted; the reason is on stderr.

    Raises:
        SystemExit: after ``--help`` and ``--version`` (0), and for arguments that make no sense (2).
        BaseException: whatever ends the script of ``run``.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m probe", description=probe.__doc__)
    parser.add_argument("--version", action="version", version=f"probe {probe.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    run.add_command(commands)
    if argv[:1] != ["run"]:  # these import torch, which is the script's to do
        from probe import demo, schedule

        demo.add_command(commands)
        schedule.add_command(commands)
        _add_open(commands)
    args = parser.parse_args(argv)
    if args.command == "run":
        return run.run(args)
    try:
        status: int = args.run(args)
    except ImportError as error:
        return _fail(args.command, str(error))
    except OSError as error:
        return _fail(args.command, str(error) if error.filename else error.strerror or str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


def _fail(command: str, reason: str) -> int:
    print(f"python -m probe {command}: error: {reason}", file=sys.stderr)
    return 1


def _add_open(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "open", help="start TensorBoard on a folder of runs", description="Start TensorBoard on a folder of runs."
    )
    parser.add_argument("logdir", type=Path, help="a run's folder, or one that holds several")
    parser.add_argument("--port", type=int, default=6006, help="0 takes any that is free (default: %(default)s)")
    parser.add_argument("--host", default="localhost", help="0.0.0.0 to be seen from elsewhere (default: %(default)s)")
    parser.set_defaults(run=_open)


def _open(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("TensorBoard is not installed: pip install tensorboard")
    if not args.logdir.is_dir():
        raise NotADirectoryError(
            f"there is no folder {str(args.logdir)!r}; make a run: python -m probe demo --logdir {args.logdir}"
        )
    if next(args.logdir.rglob("*.tfevents.*"), None) is None:
        print(f"note: there is no run below {str(args.logdir)!r} yet", file=sys.stderr)
    where = ["--logdir", str(args.logdir), "--host", args.host, "--port", str(args.port)]
    return subprocess.call([sys.executable, "-m", "tensorboard.main", *where])


if __name__ == "__main__":
    sys.exit(main())
