"""Records, the background thread, and all that goes wrong with disks, processes and people who delete folders."""

from __future__ import annotations

import gc
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as reference_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from probe import _events, _records
from probe.board import Board
from probe.capture import Scalar
from tests.processes import fork, wait
from tests.reading import events, read, scalars, steps

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*tfevents*"))


def writer_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("probe: ")]


# Records


@settings(deadline=None)
@given(st.binary(max_size=3000))
@example(bytes(_records._SHORT))
@example(bytes(_records._SHORT + 1))
@example(bytes(range(256)) * 300)
def test_checksums_are_tensorboards(data):
    assert _records.crc32c(data) == reference_crc32c(data)


def test_the_check_value_of_the_crc_catalogue():
    assert _records.crc32c(b"123456789") == 0xE3069283
    assert _records.crc32c(b"") == 0


@settings(deadline=None)
@given(st.binary(max_size=1000))
def test_records_are_tensorboards(data):
    with io.BytesIO() as file:
        RecordWriter(file).write(data)
        assert _records.record(data) == file.getvalue()


@pytest.mark.parametrize(("package", "function"), [("google_crc32c", "value"), ("crc32c", "crc32c")])
def test_a_checksum_in_c_is_used_where_there_is_one(monkeypatch, package, function):
    module = types.ModuleType(package)
    setattr(module, function, lambda data: 7)
    for name in ("google_crc32c", "crc32c"):
        monkeypatch.setitem(sys.modules, name, module if name == package else None)
    _records._checksum.cache_clear()
    try:
        assert _records._checksum()(b"anything") == 7
        monkeypatch.setitem(sys.modules, package, None)
        _records._checksum.cache_clear()
        assert _records._checksum() is _records.crc32c
    finally:
        _records._checksum.cache_clear()


# When it is written


def test_flush_secs_means_what_it_says(tmp_path):
    """Without any further call the event is on disk after flush_secs, and not at once."""
    with Board(tmp_path, flush_secs=0.3) as board:
        began, empty = time.monotonic(), size(tmp_path)
        board.add_scalar("a", 1)
        assert size(tmp_path) == empty
        until(lambda: size(tmp_path) > empty, 3)
        assert time.monotonic() - began > 0.25
        assert scalars(tmp_path, "a") == [(0, 1)]


def test_max_queue_events_are_written_at_once(tmp_path):
    with Board(tmp_path, max_queue=3, flush_secs=1000) as board:
        for _ in range(3):
            board.add_scalar("a", 1)
        until(lambda: steps(tmp_path, "a") == [0, 1, 2])


def test_no_thread_before_the_first_use_and_one_however_many_runs(tmp_path):
    assert writer_threads() == []
    with Board(tmp_path) as board:
        assert writer_threads() == []
        for phase in ("train", "valid", "test"):
            board.curves("a", **{phase: 1}, step=0)
        board.submit(0, lambda: [Scalar("b", 1)])
        board.flush()
        assert len(writer_threads()) == 1
    assert writer_threads() == []


def test_a_board_nobody_holds_any_more_loses_nothing(tmp_path):
    board = Board(tmp_path, flush_secs=1000)
    board.add_scalar("a", 1)
    board.submit(1, [Scalar("a", 2)])
    dead = weakref.ref(board)
    del board
    until(lambda: gc.collect() is not None and dead() is None)
    until(lambda: not writer_threads())
    assert scalars(tmp_path, "a") == [(0, 1), (1, 2)]


SCRIPT = """
    import sys, threading
    from probe.board import Board
    from probe.capture import Scalar
    board = Board(sys.argv[1], flush_secs=1000, max_queue=0)
    for step in range(1000):
        board.add_scalar("a", step, step)
    board.submit(1000, lambda: [Scalar("a", 1000)])
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [("raise ValueError('on purpose')", 1), ("import atexit; atexit.register(board.add_scalar, 'b', 1)", 0)],
)
def test_a_program_that_just_ends_loses_nothing(tmp_path, ending, code):
    """By an exception, or in the normal way with one more event added while the interpreter shuts down; no close."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT) + ending, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert steps(tmp_path, "a") == list(range(1001))
    if "atexit" in ending:
        assert scalars(tmp_path, "b") == [(0, 1)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_killed_program_loses_at_most_flush_secs(tmp_path, how):
    """SIGKILL, SIGTERM and os._exit: the file is whole, and all but the last interval is in it."""
    told, tell = os.pipe()
    interval, slack = 0.2, 0.8  # the slack is for a busy machine that lets the thread wait

    def train():
        board = Board(tmp_path, flush_secs=interval)
        for step in range(10**9):
            board.add_scalar("a", step, step)
            os.write(tell, f"{step} {time.monotonic()}\n".encode())
            if how is None and step == 500:
                time.sleep(interval + slack)
                os._exit(0)
            time.sleep(0.001)

    child = fork(train)
    os.close(tell)
    with os.fdopen(told) as pipe:
        if how is not None:
            for line in pipe:
                if line.startswith("500 "):
                    time.sleep(interval + slack)
                    os.kill(child, how)
                    break
        killed = time.monotonic()
        rest = [line.split() for line in pipe]
    assert wait(child) == (0 if how is None else -how)
    safe = [int(step) for step, when in rest if float(when) < killed - interval - slack]
    found = steps(tmp_path, "a")
    assert found == list(range(len(found)))
    assert len(found) > max([500, *safe])


def test_a_signal_handler_may_close_the_board(tmp_path):
    """SIGTERM in the middle of whatever: the handler closes, nothing that was added is missing, nothing hangs."""

    def train():
        board = Board(tmp_path, flush_secs=0.001)
        added = [-1]

        def stop(*_):
            board.close()
            os._exit(0 if steps(tmp_path, "a")[: added[0] + 1] == list(range(added[0] + 1)) else 3)

        signal.signal(signal.SIGTERM, stop)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        for step in range(10**9):
            board.add_scalar("a", step, step)
            added[0] = step

    assert wait(fork(train)) == 0


def test_a_handler_that_interrupts_a_locked_section_may_flush_and_close(tmp_path):
    """The interrupted code of the same thread holds the lock: whatever waits for the writer's thread gives it up."""

    def train():
        board = Board(tmp_path, flush_secs=0.001)
        for step in range(100):
            with board._writer._changed:
                board.add_scalar("a", step)
                board.submit(step, [Scalar("b", step)])
                board.flush()
        with board._writer._changed:
            board.close()

    assert wait(fork(train)) == 0
    assert steps(tmp_path, "a") == steps(tmp_path, "b") == list(range(100))


def test_where_no_thread_can_be_started_everything_is_written_at_once(tmp_path, monkeypatch):
    """As while the interpreter shuts down, from Python 3.12 on."""

    def refuse(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    board = Board(tmp_path, flush_secs=1000)
    board.add_scalar("a", 1)
    board.submit(1, [Scalar("a", 2)])
    assert scalars(tmp_path, "a") == [(0, 1), (1, 2)]
    board.close()


# Faults of the disk


def test_a_full_disk_is_one_warning_and_nothing_is_lost_once_there_is_room(tmp_path):
    """The limit on file sizes plays the full disk: the file stays whole, the program goes on, events wait."""

    def train():
        board = Board(tmp_path, flush_secs=0.01)
        board.add_scalar("a", 0, 0)
        board.flush()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size(tmp_path) + 1000, hard))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(1, 300):
                board.add_scalar("a", step, step)
                if step % 50 == 0:
                    time.sleep(0.02)
            board.flush()
        assert [each.category for each in caught] == [RuntimeWarning]
        assert "Training" not in str(caught[0].message)
        assert "File too large" in str(caught[0].message)
        assert caught[0].filename == __file__
        before = steps(tmp_path, "a")
        assert before == list(range(len(before)))
        assert len(before) < 300
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            board.close()
        assert steps(tmp_path, "a") == list(range(300))

    assert wait(fork(train)) == 0


def test_what_a_faulty_disk_cannot_take_is_kept_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(_events, "KEPT_BYTES", 5000)
    board = Board(tmp_path, flush_secs=0)
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()  # opening it fails, for root too

    def train():
        for step in range(500):
            board.add_scalar("a", step, step)
        board.flush()

    with pytest.warns(RuntimeWarning, match="Is a directory") as caught:
        train()
    assert len(caught) == 1
    assert sum(file.waiting_bytes for file in board._writer._files.values()) <= 5000
    path.rmdir()
    until(lambda: any(each.is_file() for each in tmp_path.iterdir()))  # it tries again by itself
    with pytest.warns(RuntimeWarning, match="deleted"):
        board.close()
    found = steps(tmp_path, "a")
    assert 20 < len(found) < 500
    assert found == list(range(500 - len(found), 500))


def test_a_deleted_folder_is_one_warning_and_a_new_file(tmp_path):
    folder = tmp_path / "run"
    board = Board(folder, flush_secs=0)
    board.add_scalar("a", 0)
    board.curves("loss", train=0)
    board.flush()
    shutil.rmtree(folder)

    def train():
        for _ in range(20):
            board.add_scalar("a", 1)
            board.curves("loss", train=1)
        board.flush()

    with pytest.warns(RuntimeWarning, match=r"deleted.*A new file goes on") as caught:
        train()
    assert len(caught) == 1
    shutil.rmtree(folder)
    board.add_scalar("a", 2)
    board.curves("loss", train=2)
    board.close()
    assert scalars(folder, "a") == [(21, 2)]
    assert scalars(folder / "train", "loss") == [(21, 2)]


def test_embeddings_that_cannot_be_written_are_a_warning_too(tmp_path):
    with Board(tmp_path) as board:
        (tmp_path / "00000").write_text("in the way")
        with pytest.warns(RuntimeWarning, match="Nothing can be written"):
            board.add_embedding(torch.rand(2, 2))
        board.add_scalar("a", 1)
    assert scalars(tmp_path, "a") == [(0, 1)]


def test_warnings_turned_into_errors_reach_the_user_and_spare_the_thread(tmp_path):
    """pytest.ini turns warnings into errors: the one who adds gets it, once, and the writing goes on."""
    folder = tmp_path / "run"
    with Board(folder, flush_secs=0) as board:
        board.add_scalar("a", 0)
        board.flush()
        shutil.rmtree(folder)

        def train():
            for _ in range(1000):
                board.add_scalar("a", 1)
                time.sleep(0.001)

        with pytest.raises(RuntimeWarning, match="deleted"):
            train()
        board.add_scalar("b", 1)
        board.flush()
        gate = threading.Event()

        def job():
            assert gate.wait(20)
            board.add_scalar("c", 1)
            board.add_scalar("c", 2)

        board.submit(0, job)
        (path,) = folder.iterdir()
        path.unlink()
        path.mkdir()
        board.add_scalar("b", 2)
        board._writer._write_waiting()  # the thread is busy
        gate.set()
        until(board._writer._is_idle)
        with pytest.raises(RuntimeWarning, match="Nothing can be written"):
            board.submit(0, [Scalar("d", 1)])
        path.rmdir()
        assert len(writer_threads()) == 1
    assert scalars(folder, "b") == [(1, 2)]
    assert scalars(folder, "c") == [(0, 1), (1, 2)]
    assert scalars(folder, "d") == [(0, 1)]


def test_an_unwritable_folder_is_a_clear_error_from_the_start(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError, match="a Board can't write to"):
        Board(tmp_path / "file" / "run")
    with pytest.raises(FileExistsError, match="give it a folder that it can"):
        Board(tmp_path / "file")
    with pytest.raises(OSError, match="can't write to 'nosuch://bucket/run'"):
        Board("nosuch://bucket/run")
    assert writer_threads() == []


def test_a_folder_without_permission_is_a_permission_error(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    for each in [tmp_path, *tmp_path.parents]:
        if str(each).startswith("/tmp/"):
            each.chmod(each.stat().st_mode | 0o055)

    def train():
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        with pytest.raises(PermissionError, match=r"can't write to .*locked.*Permission denied"):
            Board(folder)

    assert wait(fork(train)) == 0


# Several at once


def test_two_boards_on_one_folder_both_keep_everything(tmp_path):
    with Board(tmp_path, flush_secs=0) as one, Board(tmp_path, flush_secs=0) as two:
        for step in range(50):
            one.add_scalar("one", step, step)
            two.add_scalar("two", step, step)
    expected = [(step, step) for step in range(50)]
    assert scalars(tmp_path, "one") == scalars(tmp_path, "two") == expected
    assert len(list(tmp_path.iterdir())) == 2


def test_two_processes_on_one_folder_both_keep_everything(tmp_path):
    def train(tag):
        with Board(tmp_path, flush_secs=0) as board:
            for step in range(100):
                board.add_scalar(tag, step, step)

    children = [fork(lambda tag=tag: train(tag)) for tag in ("one", "two")]
    assert [wait(child) for child in children] == [0, 0]
    assert steps(tmp_path, "one") == steps(tmp_path, "two") == list(range(100))


def test_threads_may_share_a_board(tmp_path):
    def add(board, tag):
        for step in range(200):
            board.add_scalar(tag, step, step)
            board.curves(tag, train=step, step=step)

    with Board(tmp_path, flush_secs=0.001) as board:
        threads = [threading.Thread(target=add, args=(board, f"t{n}")) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for folder in (tmp_path, tmp_path / "train"):
        found = read(folder)
        for n in range(4):
            assert [each.step for each in found.Scalars(f"t{n}")] == list(range(200))


def test_one_thread_at_a_time_is_at_the_disk(tmp_path, monkeypatch):
    """Two appends at once would begin at the same place."""
    inside, most, write = [], [], _events.EventFile.write

    def slow(self, records):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.002)
        write(self, records)
        inside.pop()

    def add(board):
        for _ in range(10):
            board.add_scalar("a", 1)
            board.flush()

    monkeypatch.setattr(_events.EventFile, "write", slow)
    with Board(tmp_path, flush_secs=0) as board:
        threads = [threading.Thread(target=add, args=(board,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(most) == {1}
    assert len(steps(tmp_path, "a")) == 30


def test_a_forked_child_writes_to_a_file_of_its_own_at_once(tmp_path):
    """It inherits a board with a thread, a queue and a half-full buffer; it hangs nowhere, and nothing comes twice."""
    gate = threading.Event()
    board = Board(tmp_path, flush_secs=1000, max_jobs=1)
    board.add_scalar("parent", 0)
    board.submit(1, lambda: gate.wait(20) and [Scalar("parent", 1)])

    def work():
        for _ in range(50):
            board.add_scalar("child", 1)
        board.curves("loss", train=1)
        board.submit(0, lambda: [Scalar("job", 1)])
        board.flush()
        assert writer_threads() == []

    assert wait(fork(work)) == 0
    assert wait(fork(board.close)) == 0  # a child that only closes writes nothing and does not hang
    gate.set()
    board.add_scalar("parent", 2, 2)
    board.close()
    assert steps(tmp_path, "parent") == [0, 2, 1]
    assert steps(tmp_path, "child") == list(range(50))
    assert scalars(tmp_path, "job") == [(0, 1)]
    assert scalars(tmp_path / "train", "loss") == [(0, 1)]
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 2


def test_a_fork_in_the_middle_of_writing_does_not_hang(tmp_path):
    """Forks land anywhere in the thread's work; each child still writes."""
    board = Board(tmp_path, flush_secs=0)
    stop = threading.Event()

    def train():
        while not stop.is_set():
            board.add_scalar("parent", 1)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for n in range(6):
            assert wait(fork(lambda n=n: board.add_scalar("child", n, n))) == 0
    finally:
        stop.set()
        thread.join()
        board.close()
    assert sorted(steps(tmp_path, "child")) == list(range(6))
    found = steps(tmp_path, "parent")
    assert found == list(range(len(found)))


# Work in the background


def test_submit_returns_at_once_and_keeps_the_order(tmp_path):
    gate, where = threading.Event(), []

    def slow():
        where.append(threading.current_thread())
        assert gate.wait(20)
        yield Scalar("a", 1)

    with Board(tmp_path) as board:
        board.submit(1, slow, wall_time=5.0)
        before = time.time()
        board.submit(2, [Scalar("a", 2)], run="valid")
        board.submit(2, [Scalar("a", 2)])
        after = time.time()
        board.submit(3, lambda: None)
        time.sleep(0.05)
        assert events(tmp_path) == []
        gate.set()
        board.flush()
        first, second = events(tmp_path)
        assert (first.step, first.wall_time, second.step) == (1, 5.0, 2)
        assert before <= second.wall_time <= after  # the time of the step, not of the writing
        assert scalars(tmp_path / "valid", "a") == [(2, 2)]
        assert where == writer_threads()


def test_a_full_queue_blocks_and_warns_once(tmp_path):
    gate = threading.Event()
    with Board(tmp_path, max_jobs=2) as board:
        board.submit(0, lambda: gate.wait(20) and [Scalar("a", 0)])
        until(lambda: not board._writer._jobs)
        threading.Timer(0.1, gate.set).start()

        def train():
            for step in range(1, 20):
                board.submit(step, lambda step=step: time.sleep(0.001) or [Scalar("a", step)])
                assert len(board._writer._jobs) <= 2

        with pytest.warns(RuntimeWarning, match="2 steps wait.*max_jobs") as caught:
            train()
        assert len(caught) == 1
        assert caught[0].filename == __file__
    assert steps(tmp_path, "a") == list(range(20))


@pytest.mark.parametrize("surface", ["submit", "flush", "close"])
def test_what_a_job_raises_comes_out_at_the_next_call(tmp_path, surface):
    """With the place it was raised at and the step in a note; the jobs after it still run."""

    def broken():
        raise LookupError("on purpose")

    board = Board(tmp_path)
    board.submit(7, broken)
    until(lambda: board._writer._failures)
    call = {"submit": lambda: board.submit(8, []), "flush": board.flush, "close": board.close}[surface]
    with pytest.raises(LookupError, match="on purpose") as caught:
        call()
    assert "step 7" in caught.value.__notes__[0]
    assert caught.traceback[-1].name == "broken"
    if surface != "close":
        board.submit(9, [Scalar("a", 1)])
        board.close()
        assert steps(tmp_path, "a") == [9]
    board.close()


def test_several_failures_come_out_together(tmp_path):
    gate = threading.Event()

    def broken():
        assert gate.wait(20)
        raise LookupError("on purpose")

    board = Board(tmp_path)
    for step in range(3):
        board.submit(step, broken)
    gate.set()
    with pytest.raises(ExceptionGroup, match="3 failures") as caught:
        board.close()
    assert [type(each) for each in caught.value.exceptions] == [LookupError] * 3


def test_a_failing_job_does_not_hide_the_error_that_ends_the_block(tmp_path):
    def train():
        with Board(tmp_path) as board:
            board.submit(3, lambda: 1 / 0)
            until(lambda: board._writer._failures)
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="own") as caught:
        train()
    assert "ZeroDivisionError" in caught.value.__notes__[0]


def test_a_job_may_use_the_board_itself(tmp_path):
    with Board(tmp_path) as board:

        def job():
            board.add_scalar("a", 1)
            board.submit(5, [Scalar("b", 1)])
            board.flush()
            return [Scalar("c", 1)]

        board.submit(4, job)
    assert (steps(tmp_path, "a"), steps(tmp_path, "b"), steps(tmp_path, "c")) == ([0], [5], [4])


def test_a_job_that_is_done_holds_nothing(tmp_path):
    """The tensors of a step are free once it is written, not when the next one comes."""
    with Board(tmp_path) as board:
        tensor = torch.ones(3)
        dead = weakref.ref(tensor)
        board.submit(0, lambda tensor=tensor: [Scalar("a", tensor.sum())])
        del tensor
        board.flush()
        until(lambda: dead() is None)


def test_names_that_are_taken_are_passed_over(tmp_path, monkeypatch):
    """Two containers with one host name and process id, in one second, on one shared disk."""
    monkeypatch.setattr(_events.time, "time", lambda: 1e9)
    monkeypatch.setattr(_events, "_serial", iter([5, 5, 5, 6]))
    Board(tmp_path).close()
    with Board(tmp_path) as board:
        board.add_scalar("a", 1)
    assert len(list(tmp_path.iterdir())) == 2
    assert scalars(tmp_path, "a") == [(0, 1)]


def test_close_may_be_interrupted_and_called_again(tmp_path):
    gate = threading.Event()
    board = Board(tmp_path, flush_secs=1000)
    board.add_scalar("a", 1)
    board.submit(1, lambda: gate.wait(20) and [Scalar("a", 2)])
    threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        board.close()
    gate.set()
    board.close()
    assert scalars(tmp_path, "a") == [(0, 1), (1, 2)]
