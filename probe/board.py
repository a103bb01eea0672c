"""`Board`: TensorBoard that tells the truth. A `SummaryWriter` whose faults are mended, and a fast way to write."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import nn

from probe.capture import Embedding, Shown

try:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import FileWriter, SummaryWriter
    from torch.utils.tensorboard.summary import hparams
except ImportError as error:
    raise ImportError(f"probe.Board needs TensorBoard ({error}): pip install tensorboard") from error

from probe import _values
from probe._events import Writer
from probe.image import to_uint8
from probe.ranks import rank

Work = Iterable[Shown] | Callable[[], Iterable[Shown] | None]
"""Things to show, or a function that makes them when the background thread calls it."""


class Board(SummaryWriter):
    """A TensorBoard run: a `torch.utils.tensorboard.SummaryWriter`, so that every ``add_*`` is there, and more.

        with Board("runs/lenet") as board:
            board.graph(model, images)
            for epoch in range(epochs):
                board.curves("loss", train=train_loss, valid=valid_loss, step=epoch)     # both lines in one chart

    **What is different.** Histograms are true for every dtype and at every scale; NaN and Inf are counted beside them
    (`add_histogram`). Images take any number of channels, and NaN is magenta (`add_image`). A video needs no moviepy. A
    graph comes from one ordinary forward and works wherever that works (`graph`). Tensors without data (meta) log
    nothing. A DTensor counts as a whole, for which all ranks of its mesh must call. Without a step, a tag gets the step
    after its last one, from 0. ``add_hparams`` without a ``run_name`` belongs to this run itself.

    **Nothing is lost.** What was added is with the operating system at most `flush_secs` later, whatever happens to the
    process then: kill -9, SIGTERM or ``os._exit`` lose no more than that. `close`, ``with``, the end of the program (by
    an exception too) and the death of the last reference lose nothing. A forked child writes at once, to a file of its
    own. An `add_*` after `close` is a RuntimeError.

    **Several ranks.** Every rank of ``torch.distributed`` may open the same folder, also before the process group is
    there, where the launcher's environment has the rank (``RANK``). On ranks other than the first the file is made when
    something is written, because TensorBoard reads on in the newest file of a folder.

    **The disk is not the program's problem.** A full disk or lost permission is one RuntimeWarning; events are kept and
    tried again. A deleted folder is one RuntimeWarning and a new file. Only a folder that can't be written to from the
    start raises.

    **Two runs, one folder.** TensorBoard draws all events of a folder as one run. A program that resumes passes
    ``purge_step=<its first step>`` (for `curves` as well, this holds for the sub-runs); what the earlier one wrote from
    there on is hidden. Steps that go backwards without it are kept as they are.

    Arguments:
        log_dir: the folder, or a URL that TensorBoard knows. None makes ``runs/<date>_<host><comment>``, which is new
            even if two programs start in the same second.
        comment: end of that name; unused when `log_dir` is given.
        purge_step: see above.
        max_queue: when so many events wait in memory they are written at once; 0 for no such number.
        flush_secs: the longest that an event waits in memory, in seconds.
        filename_suffix: end of the names of the event files.
        max_jobs: so many `submit`s may wait for the background thread; beyond, `submit` blocks, and warns once.

    Raises:
        OSError: (or its PermissionError, NotADirectoryError, ...) the folder can't be made or written to.
        ValueError: a negative number.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        comment: str = "",
        purge_step: int | None = None,
        max_queue: int = 1000,
        flush_secs: float = 5,
        filename_suffix: str = "",
        *,
        max_jobs: int = 16,
    ) -> None:
        where = os.fspath(log_dir) if log_dir else None
        self._writer = Writer(where or "runs", max_queue, flush_secs, max_jobs)
        self._runs: dict[str, _Run] = {}
        self._purge_from = purge_step
        self._before_close: list[Callable[[], None]] = []
        try:
            self._writer.where = where = where or new_folder(comment)
            self._root = where if "://" in where else os.path.abspath(where)  # the program may change directory later
            self._suffix = filename_suffix
            self._waits = rank() > 0
            super().__init__(where, comment, purge_step, max_queue, flush_secs, filename_suffix)
            self._waits = False
        except OSError as error:
            place = where or os.path.abspath("runs")
            message = f"a Board can't write to {place!r}: {error.strerror or error}; give it a folder that it can"
            raise (OSError(error.errno, message) if error.errno else OSError(message)) from error
        weakref.finalize(self, self._writer.close)  # when it is dropped, and when the interpreter ends

    # The life of a board

    def flush(self) -> None:
        """Return when everything added and submitted before is with the operating system.

        Raises:
            Exception: what a submitted callable raised.
        """
        self._writer.flush()

    def close(self) -> None:
        """`flush`, and end it. Again is harmless.

        Raises:
            Exception: what a submitted callable raised.
        """
        try:
            while self._before_close:
                self._before_close.pop(0)()
        finally:
            self._writer.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed; nothing can be added then."""
        return self._writer.closed

    def before_close(self, function: Callable[[], None]) -> None:
        """Have `function` called when the board closes, to write what was gathered for it until then."""
        self._writer.check_open()
        self._before_close.append(function)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"And while logging to {self.log_dir}: {failure!r}")

    def __repr__(self) -> str:
        return f"Board({self.log_dir!r}{', closed' if self.closed else ''})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a Board can't be copied or pickled: its files and its thread belong to this process. Send its log_dir and "
            "open a Board there; a forked process (not a spawned one) may use this one as it is"
        )

    # Writing many things at once

    def write(self, step: int | None, items: Iterable[Shown], wall_time: float | None = None, run: str = "") -> None:
        """Write things to show as one event, which is a good deal cheaper than one each.

        Arguments:
            step: their common step; None for the one after the last of their tags.
            items: `Scalar`, `Statistics`, `Histogram`, `Image` and `Embedding`, as summaries yield them.
            wall_time: seconds since the epoch; None for now.
            run: name of a sub-run, a folder below `log_dir`: ``"valid"`` beside the training's. The projector has one
                list for all runs: there an embedding's tag begins with the name.

        Raises:
            TypeError, ValueError: an item can't be shown; nothing is written then.
            RuntimeError: the board is closed.
        """
        target, items = self._run(run), list(items)
        points = [item for item in items if isinstance(item, Embedding)]
        values = _values.shown((item for item in items if not isinstance(item, Embedding)), target.seen)
        target.add_values(values, step, wall_time)
        for each in points:
            self.add_embedding(each.value, each.labels, global_step=step, tag=f"{run}/{each.tag}" if run else each.tag)

    def submit(self, step: int | None, work: Work, wall_time: float | None = None, run: str = "") -> None:
        """`write` in the background thread; returns at once.

        Arguments:
            step: as for `write`.
            work: the things to show, or a function that makes them: it is called in the background thread, and may wait
                there for a copy from a device. It returns an iterable, or None for nothing.
            wall_time: as for `write`, but None is the time of this call.
            run: as for `write`.

        Raises:
            Exception: what earlier work raised, noted with its step; several at once in an ExceptionGroup. Whatever is
                raised after the last `submit` comes from `flush` or `close`.
            RuntimeError: the board is closed.
        """
        now = time.time() if wall_time is None else wall_time

        def job() -> None:
            try:
                items = work() if callable(work) else work
                self.write(step, () if items is None else items, now, run)
            except Exception as error:
                error.add_note(f"(raised in the background, by what was submitted to {self!r} for step {step})")
                raise

        self._writer.submit(job)

    def curves(self, tag: str, /, *, step: int | None = None, walltime: float | None = None, **values: Any) -> None:
        """Draw several phases' values in one chart, a colour each: ``board.curves("loss", train=a, valid=b, step=i)``.

        Each phase is a sub-run (a folder ``train``, ``valid``) in which the value has the same tag: that is how
        TensorBoard puts lines into one chart.

        Arguments:
            tag: title of the chart.
            step: None for the one after the last of any of these phases.
            walltime: seconds since the epoch; None for now.
            values: a number for each phase, as for `add_scalar`; None for a phase that has none at this step.
        """
        targets = {phase: self._run(phase) for phase, value in values.items() if value is not None}
        made = {phase: _values.scalar(tag, values[phase]) for phase in targets}
        if step is None:
            step = max((target.next_step(made[phase]) for phase, target in targets.items()), default=0)
        for phase, target in targets.items():
            target.add_values(made[phase], step, walltime)

    def graph(self, model: nn.Module, /, *inputs: Any, **kwargs: Any) -> None:
        """Show the model's graph, from one forward ``model(*inputs, **kwargs)`` in the mode that the model is in.

        Modules are boxes to open, with shapes, dtypes, options and parameters; functions between them are nodes. Any
        model that runs can be drawn: nested inputs and outputs, keywords, control flow, in-place operations; compiled
        ones run eagerly here. Afterwards the model's buffers (running statistics) and attributes are what they were,
        and so are the random number generators. Hooks of the model's own run, once; those of probes around it do not.

        Raises:
            TypeError: the model is no ``nn.Module``, or scripted, which has no hooks.
            ValueError: it has lazy layers that are not initialised.
            Exception: what the forward raises, with a note.
        """
        from probe import _graphs

        run = self._run("")
        graph = _graphs.graph_def(_graphs.record(model, inputs, kwargs))
        run.add_event(Event(graph_def=graph.SerializeToString()))

    # SummaryWriter's methods, mended

    def add_scalar(
        self,
        tag: str,
        scalar_value: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        new_style: bool = False,
        double_precision: bool = False,
    ) -> None:
        """A number, or a tensor of one element of any real dtype; stored in float32 unless `double_precision`.

        Raises:
            TypeError, ValueError: not one real number.
        """
        values = _values.scalar(tag, scalar_value)
        if values and new_style:
            super().add_scalar(tag, float(_values.tensor(scalar_value)), global_step, walltime, True, double_precision)  # type: ignore[arg-type]
        else:
            self._run("").add_values(values, global_step, walltime)

    def add_scalars(
        self,
        main_tag: str,
        tag_scalar_dict: dict[str, Any],
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """A sub-run a line, as ever, but without a thread each. `curves` needs fewer runs for several charts."""
        for tag, value in tag_scalar_dict.items():
            run = self._run(f"{main_tag.replace('/', '_')}_{tag}")
            run.add_values(_values.scalar(main_tag, value), global_step, walltime)

    def add_hparams(
        self,
        hparam_dict: dict[str, Any],
        metric_dict: dict[str, Any],
        hparam_domain_discrete: dict[str, list[Any]] | None = None,
        run_name: str | None = None,
        global_step: int | None = None,
    ) -> None:
        """Hyper-parameters and metrics, in this run or, with `run_name`, in a sub-run of that name."""
        run = self._run(run_name or "")
        for summary in hparams(hparam_dict, metric_dict, hparam_domain_discrete):
            run.add_summary(summary, global_step)
        for tag, value in metric_dict.items():
            run.add_values(_values.scalar(tag, value), global_step)

    def add_histogram(
        self,
        tag: str,
        values: Any,
        global_step: int | None = None,
        bins: Any = "tensorflow",
        walltime: float | None = None,
        max_bins: int | None = None,
    ) -> None:
        """The distribution of the finite values; scalars ``<tag>/nan`` and ``<tag>/inf`` count the others.

        Arguments:
            values: a tensor of any dtype, layout and device, an array, a list, or a `probe.sketch.Sketch`. Complex
                numbers are shown by their modulus.
            bins: the default follows the data at every scale (a quarter of a power of two or finer; what is closer
                together than that, as 1e4 ± 0.01, is drawn flat); edges, or a rule of ``numpy.histogram``, are taken as
                given, at NumPy's cost.
            max_bins: join neighbouring bins until there are no more than these.
        """
        run = self._run("")
        chosen = None if isinstance(bins, str) and bins == "tensorflow" else bins
        run.add_values(_values.histogram(tag, values, run.seen, chosen, max_bins), global_step, walltime)

    def add_image(
        self,
        tag: str,
        img_tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        dataformats: str = "CHW",
    ) -> None:
        """A picture, or with ``N`` in `dataformats` several side by side.

        uint8 is shown as it is, bool in black and white, uint16 from 0..65535, other integers as 0..255, floats as
        0..1; what lies outside is clamped; NaN is magenta. To stretch a range, use `probe.image.grid`. One channel is
        grey, three are RGB, four RGB and opacity; of any other number each becomes a tile of its own.
        """
        self._run("").add_values(_values.picture(tag, img_tensor, dataformats), global_step, walltime)

    def add_images(
        self,
        tag: str,
        img_tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        dataformats: str = "NCHW",
    ) -> None:
        """`add_image` of a batch."""
        self.add_image(tag, img_tensor, global_step, walltime, dataformats)

    def add_image_with_boxes(
        self,
        tag: str,
        img_tensor: Any,
        box_tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        rescale: float = 1,
        dataformats: str = "CHW",
        labels: Any = None,
    ) -> None:
        """`add_image`, with boxes ``[N, 4]`` of (xmin, ymin, xmax, ymax) drawn on it."""
        pixels, boxes = _values.pixels(img_tensor, dataformats), _values.tensor(box_tensor)
        if pixels is not None and boxes is not None:
            super().add_image_with_boxes(
                tag, pixels, boxes.double().numpy(), global_step, walltime, rescale, "HWC", labels
            )

    def add_video(
        self,
        tag: str,
        vid_tensor: Any,
        global_step: int | None = None,
        fps: float = 4,
        walltime: float | None = None,
    ) -> None:
        """Clips ``[N, T, C, H, W]`` side by side, as an animated GIF; ranges and channels as for `add_image`."""
        self._run("").add_values(_values.video(tag, vid_tensor, fps), global_step, walltime)

    def add_audio(
        self,
        tag: str,
        snd_tensor: Any,
        global_step: int | None = None,
        sample_rate: int = 44100,
        walltime: float | None = None,
    ) -> None:
        """Sound ``[L]`` or ``[channels, L]``: floats of -1..1 (clamped), integers of their dtype's range."""
        self._run("").add_values(_values.audio(tag, snd_tensor, sample_rate), global_step, walltime)

    def add_embedding(
        self,
        mat: Any,
        metadata: Any = None,
        label_img: Any = None,
        global_step: int | None = None,
        tag: str = "default",
        metadata_header: Any = None,
    ) -> None:
        """Points ``[N, D]`` for the projector, with labels and with pictures ``[N, 1 or 3, H, W]`` as for `add_image`.

        This writes files at once, in the calling thread.
        """
        points, sprites = _values.tensor(mat), None if label_img is None else _values.tensor(label_img)
        if points is None:
            return
        if points.is_complex():
            raise TypeError(f"the points of {tag!r} are complex: give .abs(), or torch.view_as_real(...).flatten(1)")
        if sprites is not None:
            sprites = to_uint8(sprites) / 255
        run = self._run("")
        step = run.next_step([Summary.Value(tag=tag)]) if global_step is None else int(global_step)
        with self._writer.beside:
            try:
                super().add_embedding(
                    _values.dense(points).double().numpy(), metadata, sprites, step, tag, metadata_header
                )
            except OSError as error:
                self._writer.fault(run.folder, error)
        run.steps[tag] = step

    def add_pr_curve(
        self,
        tag: str,
        labels: Any,
        predictions: Any,
        global_step: int | None = None,
        num_thresholds: int = 127,
        weights: Any = None,
        walltime: float | None = None,
    ) -> None:
        """Precision over recall, from labels (0 or 1) and predicted probabilities of any dtype."""
        truth, guess = _values.tensor(labels), _values.tensor(predictions)
        if truth is not None and guess is not None:
            super().add_pr_curve(
                tag, truth.numpy(), guess.double().numpy(), global_step, num_thresholds, weights, walltime
            )

    def add_graph(
        self, model: Any, input_to_model: Any = None, verbose: bool = False, use_strict_trace: bool = True
    ) -> None:
        """`graph`, with the inputs as one tensor or as a tuple or list of arguments. A scripted model is traced.

        Nothing is traced otherwise, so `verbose` and `use_strict_trace` only matter for a scripted model.
        """
        if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            super().add_graph(model, input_to_model, verbose, use_strict_trace)
        elif input_to_model is None:
            self.graph(model)
        else:
            self.graph(model, *(input_to_model if isinstance(input_to_model, tuple | list) else (input_to_model,)))

    # What SummaryWriter is built on

    def _get_file_writer(self) -> FileWriter:
        return None if self._waits else self._run("")  # type: ignore[return-value]  # when it begins nobody uses it

    def _run(self, name: str) -> _Run:
        """The run in the sub-folder of that name; ``""`` is the board's own."""
        self._writer.check_open()
        found = self._runs.get(name)
        if found is None:
            if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
                raise ValueError(f"a sub-run is a folder below {self.log_dir}: {name!r} is not")
            folder = f"{self._root.rstrip('/')}/{name}" if name else self._root
            found = self._runs.setdefault(name, _Run(self._writer, folder, self._suffix, self._purge_from))
            self.file_writer = self._runs.get("")  # type: ignore[assignment]
            self.all_writers = {run.folder: run for run in self._runs.values()}  # type: ignore[assignment]
        return found


class _Run(FileWriter):
    """One folder of a board, which is one run to TensorBoard: where `SummaryWriter`'s methods put their summaries."""

    def __init__(self, writer: Writer, folder: str, suffix: str, purge_step: int | None) -> None:
        self.folder = folder
        self.steps: dict[str, int] = {}
        self.seen: set[str] = set()
        self._writer = writer
        self._file = writer.open(folder, suffix)
        if purge_step is not None:
            self.add_event(Event(session_log=SessionLog(status=SessionLog.START)), purge_step)

    def add_values(self, values: list[Summary.Value], step: int | None, walltime: float | None = None) -> None:
        """One event of these values; none if there are none."""
        if values:
            self.add_summary(Summary(value=values), step, walltime)

    def add_summary(self, summary: Summary, global_step: Any = None, walltime: float | None = None) -> None:
        step = self.next_step(summary.value) if global_step is None else int(global_step)
        for value in summary.value:
            self.steps[value.tag] = step
        super().add_summary(summary, step, walltime)

    def next_step(self, values: Iterable[Summary.Value]) -> int:
        """The step after the last one of any of these tags."""
        return 1 + max((self.steps.get(value.tag, -1) for value in values), default=-1)

    def add_event(self, event: Event, step: Any = None, walltime: float | None = None) -> None:
        event.wall_time = time.time() if walltime is None else walltime
        if step is not None:
            event.step = int(step)
        self._writer.put(self._file, event.SerializeToString())

    def get_logdir(self) -> str:
        return self.folder

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.flush()

    def reopen(self) -> None:
        self._writer.check_open()


def new_folder(comment: str) -> str:
    """Make a folder below ``runs`` that nobody had before."""
    os.makedirs("runs", exist_ok=True)
    name = f"runs/{time.strftime('%b%d_%H-%M-%S')}_{socket.gethostname()}{comment}"
    for number in range(1, 10**6):
        folder = name if number == 1 else f"{name}-{number}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
            return folder
    raise FileExistsError(f"a million folders like {name!r}")
