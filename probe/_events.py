"""Event files and the one background thread that fills them.

An event is in one of three places: in memory, for at most `flush_secs`; with the operating system, where the death of
the process can't reach it; or nowhere, after a fault that was warned of. A file is opened, appended to in one go and
closed again, so nothing is held open across a fork and a deleted folder is noticed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from probe._records import record

KEPT_BYTES = 64 << 20
"""How much may wait in memory. Beyond it `put` waits for the disk; where the disk is faulty, the oldest events go."""

_serial = itertools.count()


class EventFile:
    """One event file of one folder. It is made at once, so that a folder one can't write to shows at once.

    `folder` is an absolute path, or a URL of a file system that TensorBoard knows (``gs://``, ``memory://``).
    """

    def __init__(self, folder: str, suffix: str) -> None:
        self.folder = folder
        self.suffix = suffix
        self.waiting: list[bytes] = []
        self.waiting_bytes = 0
        self._path: str | None = None
        self._remote: Any = None
        self._create()

    def put(self, records: list[bytes]) -> None:
        """Have `records` wait, behind those that do."""
        self.waiting += records
        self.waiting_bytes += sum(map(len, records))

    def take(self) -> list[bytes]:
        """What waits, now the caller's."""
        taken, self.waiting, self.waiting_bytes = self.waiting, [], 0
        return taken

    def forget_surplus(self) -> None:
        """Drop the oldest of what waits until it is no more than `KEPT_BYTES`."""
        surplus = 0
        while self.waiting_bytes > KEPT_BYTES:
            self.waiting_bytes -= len(self.waiting[surplus])
            surplus += 1
        del self.waiting[:surplus]

    def write(self, records: list[bytes]) -> None:
        """Append all of the records, or none of them and raise.

        Raises:
            FileNotFoundError: the file was deleted. The next `write` begins a new one.
            OSError: any other fault.
        """
        if self._path is None:
            self._create()
        data = b"".join(records)
        if self._remote is not None:
            with _as_os_error():
                self._remote.write(data)
                self._remote.flush()
            return
        assert self._path is not None
        try:
            file = open(self._path, "r+b", buffering=0)  # noqa: SIM115  (closed below)
        except FileNotFoundError:
            self.start_anew()
            raise
        with file:
            end = file.seek(0, os.SEEK_END)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)  # at half a record a reader stops for good
                raise

    def start_anew(self) -> None:
        """Leave the present file as it is; the next `write` begins a new one in the same folder."""
        self._path = self._remote = None

    def _create(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata

        source = SourceMetadata(writer="probe")
        first = Event(wall_time=time.time(), file_version="brain.Event:2", source_metadata=source)
        head = record(first.SerializeToString())
        if "://" in self.folder:
            from tensorboard.compat import tf

            with _as_os_error():
                tf.io.gfile.makedirs(self.folder)
                path = f"{self.folder.rstrip('/')}/{self._name()}"
                self._remote = tf.io.gfile.GFile(path, "wb")
                self._remote.write(head)
                self._remote.flush()
            self._path = path
            return
        os.makedirs(self.folder, exist_ok=True)
        while self._path is None:
            path = os.path.join(self.folder, self._name())
            with contextlib.suppress(FileExistsError), open(path, "xb") as file:  # two containers may share all names
                file.write(head)
                self._path = path

    def _name(self) -> str:
        # TensorBoard reads the files of a folder in the order of their names, hence the padding.
        number = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_serial):06d}"
        return f"events.out.tfevents.{number}{self.suffix}"


class Writer:
    """A queue of events, a queue of jobs, and the one thread that empties both.

    Thread-safe, usable after a fork and from a signal handler (whatever waits here gives up the one lock meanwhile).
    In a forked child there is no thread: it writes each event at once, to a file of its own, and runs each job inside
    `submit`. So a child that ends by ``os._exit``, as multiprocessing's do, loses nothing.

    Arguments:
        where: what to call the destination in messages.
        max_queue: when so many events wait, they are written without waiting for `flush_secs`; 0 for no such number.
        flush_secs: the longest time in seconds that an event waits in memory (or until the running job has ended).
        max_jobs: so many jobs may wait; `submit` blocks while there are that many.
    """

    def __init__(self, where: str, max_queue: int, flush_secs: float, max_jobs: int) -> None:
        if not (max_queue >= 0 and flush_secs >= 0 and max_jobs >= 1):
            raise ValueError(
                "a Board needs max_queue >= 0, flush_secs >= 0 and max_jobs >= 1, "
                f"not max_queue={max_queue}, flush_secs={flush_secs}, max_jobs={max_jobs}"
            )
        self.where = where
        self.max_queue = max_queue
        self.flush_secs = flush_secs
        self.max_jobs = max_jobs
        self.closed = False
        self._threaded = True
        self._files: dict[str, EventFile] = {}
        self._warned: set[str] = set()
        self._reset()
        _writers.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self.beside = threading.RLock()  # for whoever writes other files into the folder
        self._thread: threading.Thread | None = None
        self._jobs: deque[Callable[[], None]] = deque()
        self._busy = False
        self._writing: int | None = None  # the thread that is at the disk
        self._faulty = False
        self._due: float | None = None
        self._failures: list[BaseException] = []
        self._warnings: list[str] = []

    def open(self, folder: str, suffix: str) -> EventFile:
        """The file for that folder, made when it is first asked for.

        Raises:
            OSError: it can't be made.
        """
        with self._changed:
            self.check_open()
            if folder not in self._files:
                self._files[folder] = EventFile(folder, suffix)
            return self._files[folder]

    def put(self, file: EventFile, event: bytes) -> None:
        """Queue one serialised event. Only when `KEPT_BYTES` wait already does this wait for the disk."""
        framed = record(event)
        with self._changed:
            self.check_open()
            file.put([framed])
            hurry = not self._faulty and 0 < self.max_queue <= sum(len(each.waiting) for each in self._files.values())
            if self._due is None or hurry:
                self._due = time.monotonic() + (0 if hurry else self.flush_secs)
                self._wake()
            surplus = file.waiting_bytes > KEPT_BYTES
            if surplus and self._faulty:
                file.forget_surplus()
            inline = self._thread is None or (surplus and not self._faulty)
        if inline:
            self._write_waiting()
        self._tell()

    def submit(self, job: Callable[[], None]) -> None:
        """Have the thread run `job` after those before it.

        Raises:
            Exception: what earlier jobs raised, see `raise_failures`.
        """
        self.raise_failures()
        with self._changed:
            self.check_open()
            self._wake()
            inline = self._thread is None or self._in_thread()
            if not inline and len(self._jobs) >= self.max_jobs:
                self._note(
                    "full",
                    f"Logging to {self.where} is slower than training: {self.max_jobs} steps wait to be written, so "
                    "training now waits too. Log less, or less often, or give the Board a larger max_jobs.",
                )
        try:
            self._tell()
        finally:  # a warning made an error must not lose the job
            if inline:
                job()
            else:
                self._enqueue(job)

    def _enqueue(self, job: Callable[[], None]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._jobs) < self.max_jobs or self.closed)
            self.check_open()
            self._jobs.append(job)
            self._changed.notify_all()

    def flush(self) -> None:
        """Return when all that was put and submitted before is with the operating system.

        Raises:
            Exception: what jobs raised, see `raise_failures`.
        """
        if not self._in_thread():
            with self._changed:
                self._changed.wait_for(self._is_idle)
        self._write_waiting()
        self._tell()
        self.raise_failures()

    def close(self) -> None:
        """`flush`, end the thread, and refuse whatever comes after. Again is harmless, also after an interruption.

        Raises:
            Exception: what jobs raised, see `raise_failures`.
        """
        with self._changed:
            thread = self._thread
            if not self._in_thread():
                self._changed.wait_for(self._is_idle)
            self.closed = True
            self._changed.notify_all()
            if not self._in_thread():
                self._changed.wait_for(lambda: self._thread is None)
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._write_waiting()
        self._tell()
        self.raise_failures()

    def raise_failures(self) -> None:
        """Raise what jobs raised since this was last asked: the exception itself, several in an ExceptionGroup."""
        with self._changed:
            failures, self._failures = self._failures, []
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise BaseExceptionGroup(f"{len(failures)} failures in the background, logging to {self.where}", failures)

    def after_fork_in_child(self) -> None:
        """Drop what the parent will write, and its lock and thread."""
        self._reset()
        self._threaded = False
        for file in self._files.values():
            file.take()
            file.start_anew()

    def fault(self, folder: str, error: OSError) -> None:
        """Warn of an error that the caller met while writing to that folder by itself."""
        self._note_fault(folder, error)
        self._tell()

    def check_open(self) -> None:
        """Raises:
        RuntimeError: the writer is closed.
        """
        if self.closed:
            raise RuntimeError(
                f"the Board on {self.where} is closed: nothing can be added to it. To go on in that folder, open "
                f"another: Board({self.where!r}, purge_step=<the next step>)"
            )

    def _in_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def _is_idle(self) -> bool:
        return not self._jobs and not self._busy

    def _is_due(self) -> bool:
        return self._due is not None and time.monotonic() >= self._due

    def _wake(self) -> None:
        """Start the thread, or tell it that there is something to do. Called with the lock held."""
        if self._thread is None and self._threaded:
            thread = threading.Thread(target=self._run, name=f"probe: {self.where}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is shutting down
                self._threaded = False
            else:
                self._thread = thread
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._jobs or self._is_due() or self.closed):
                    self._changed.wait(None if self._due is None else min(self._due - time.monotonic(), 3600))
                if self._is_due():
                    work = self._write_waiting
                elif self._jobs:
                    work = self._jobs.popleft()
                else:
                    self._thread = None
                    self._changed.notify_all()
                    return
                self._busy = True
                self._changed.notify_all()
            try:
                work()
            except BaseException as failure:
                self._failures.append(failure)
            del work  # what it holds must not live until there is other work
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _write_waiting(self) -> None:
        """Write what waits, one thread at a time. The same thread may come in twice, from a signal handler."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._writing in (None, me))
            outer, self._writing = self._writing, me
            self._due = None
            self._faulty = False
            batches = [(file, file.take()) for file in self._files.values() if file.waiting]
        try:
            for file, records in batches:
                self._write(file, records)
        finally:
            with self._changed:
                self._writing = outer
                self._changed.notify_all()

    def _write(self, file: EventFile, records: list[bytes]) -> None:
        try:
            try:
                file.write(records)
            except FileNotFoundError:
                file.write(records)
                self._note(
                    "deleted",
                    f"The events of {file.folder} were deleted while more were being written. A new file goes on "
                    "there; what was in the old one is gone.",
                )
        except OSError as error:
            with self._changed:
                later = file.take()
                file.put(records + later)
                self._faulty = True
                self._due = time.monotonic() + max(self.flush_secs, 1.0)
                self._note_fault(file.folder, error)

    def _note_fault(self, folder: str, error: OSError) -> None:
        self._note(
            "fault",
            f"Nothing can be written to {folder} at present: {error}. The program goes on. Events are kept (the last "
            f"{KEPT_BYTES >> 20} MiB) and tried again; those that still can't be written when the Board is closed are "
            "lost.",
        )

    def _note(self, kind: str, message: str) -> None:
        """Have a user's thread warn, once: raised in this one, a warning made an error would end the writing."""
        if kind not in self._warned:
            self._warned.add(kind)
            self._warnings.append(message)

    def _tell(self) -> None:
        if self._warnings and not self._in_thread():
            with self._changed:
                messages, self._warnings = self._warnings, []
            for message in messages:
                warnings.warn(message, RuntimeWarning, stacklevel=_users_level())


def _users_level() -> int:
    """The `stacklevel` with which `Writer._tell` warns of the first line outside of this package and torch's."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith(("probe.", "torch.utils.tensorboard")):
        level, frame = level + 1, frame.f_back
    return level


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Whatever a remote file system raises becomes an OSError, as a local one would have raised."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for writer in list(_writers):
        writer.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
