"""``python -m probe schedule``: what a schedule does, from the shell."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from probe import image
from probe.schedule.chart import Picture
from probe.schedule.expression import SCHEDULERS, parse, signature
from probe.schedule.simulation import blank_optimizer, simulate
from probe.schedule.trace import Comparison

_PLAIN = str.maketrans("▁▂▃▄▅▆▇█", "_.-~=+*#")


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``schedule`` to the commands of a parser; `run` is what it runs, in ``args.run``."""
    parser = subparsers.add_parser(
        "schedule",
        help="preview a learning-rate schedule",
        description="Preview any scheduler of torch, exactly as training would see it. Several are compared.",
        epilog="schedulers:\n  " + "\n  ".join(signature(name) for name in SCHEDULERS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "expressions",
        nargs="+",
        metavar="EXPRESSION",
        help="a scheduler as written in Python, without its optimizer: 'CosineAnnealingLR(T_max=50)' or "
        "'LambdaLR(lambda epoch: 0.95 ** epoch)'",
    )
    parser.add_argument("--steps", type=int, default=100, help="updates to simulate (default: 100)")
    parser.add_argument(
        "--lr", type=_rates, default=[0.1], help="base rate; '0.1,0.01' makes two groups (default: 0.1)"
    )
    parser.add_argument(
        "--metric-file", type=Path, help="for ReduceLROnPlateau: one number a line, a loss for each update"
    )
    parser.add_argument("--png", type=Path, help="write the chart into this file")
    parser.add_argument("--logdir", type=Path, help="write the curves for TensorBoard into this folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print, and draw if asked for, what the schedules in `args` do.

    Returns:
        The exit status: 0; 2 when the input makes no sense and 1 when a file cannot be written, with the reason on
        stderr.
    """
    try:
        metrics = None if args.metric_file is None else _numbers(args.metric_file)
        traces = Comparison()
        for expression in args.expressions:
            traces[expression] = simulate(parse(expression)(blank_optimizer(args.lr)), args.steps, metrics)
    except Exception as error:  # whatever a scheduler makes of its arguments is an answer, not a crash
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
        return _fail(f"{error or type(error).__name__}{notes}", 2)
    shown = traces if len(traces) > 1 else next(iter(traces.values()))
    text = str(shown)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = text.translate(_PLAIN)
    print(text)
    try:
        if args.png is not None:
            _write_png(args.png, shown.plot())
        if args.logdir is not None:
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(args.logdir)) as writer:
                shown.log(writer)
    except OSError as error:
        return _fail(str(error), 1)
    return 0


def _fail(reason: str, status: int) -> int:
    print(f"python -m probe schedule: error: {reason}", file=sys.stderr)
    return status


def _rates(text: str) -> list[float]:
    """``"0.1,0.01"`` -> rates."""
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate, nor several such as 0.1,0.01") from None


def _numbers(path: Path) -> list[float]:
    """The numbers of a text file, one a line; empty lines and what follows a ``#`` do not count."""
    numbers = []
    for count, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if text:
            try:
                numbers.append(float(text))
            except ValueError:
                raise ValueError(f"{path}, line {count}: {text!r} is not a number") from None
    return numbers


def _write_png(path: Path, picture: Picture) -> None:
    cv2 = image.opencv()

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
