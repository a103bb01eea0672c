"""`p.log` over ranks: two processes do together what `tests.ranks` says; here also what one process can show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from probe import merge, ranks
from probe._meeting import Meeting
from probe.ranks import Part
from tests.ranks import CHECKS

ROOT = Path(__file__).parent.parent


def torchrun(*arguments: str, folder: Path) -> str:
    """What two processes print, each with one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """For each rank the traceback of each check, empty where it passed. All run at once: starting takes longest."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun("-m", "tests.ranks", str(folder), folder=folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo, with which ranks on the CPU talk")
@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(check: str, results: list[dict[str, str]]) -> None:
    for rank, result in enumerate(results):
        assert not result[check], f"on rank {rank}:\n{result[check]}"


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo, with which ranks on the CPU talk")
def test_the_example_runs(tmp_path: Path) -> None:
    """One run, written by one rank, with the statistics of both halves of each batch."""
    from tests.reading import read

    printed = torchrun(str(ROOT / "examples" / "distributed.py"), "--steps", "3", folder=tmp_path)
    assert "2 ranks" in printed
    (file,) = (tmp_path / "runs" / "distributed").glob("*.tfevents.*")
    run = read(file.parent)
    assert {"0/output/std", "0.weight/grad/norm", "grad_norm/after_clipping"} <= set(run.Tags()["scalars"])
    assert [event.step for event in run.Histograms("0/output/histogram")] == [0, 2]
    assert {sum(event.histogram_value.bucket) for event in run.Histograms("0/output/histogram")} == {2 * 32 * 64}


# -- the meeting, with threads for ranks -------------------------------------------------------------------------------


@pytest.fixture
def store() -> Any:
    made = dist.HashStore()
    made.set_timeout(timedelta(seconds=20))
    return made


def together(*work: Callable[[], Any]) -> list[Any]:
    """What each function returns or raises, all run at the same time."""
    found: list[Any] = [None] * len(work)

    def run(i: int) -> None:
        try:
            found[i] = work[i]()
        except RuntimeError as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_that_agree_go_on_and_leave_little_behind(store: Any) -> None:
    """The store holds the keys of the last meeting only, however many there were."""
    meetings = [Meeting(store, rank, 3) for rank in range(3)]
    sizes = []
    for number in range(5):
        found = together(*(lambda m=m, n=number: m.agree([f"step {n}", "a"]) for m in meetings))
        assert found == [[]] * 3
        sizes.append(store.num_keys())
    assert sizes[1:] == [sizes[1]] * 4


def test_what_differs_is_told_to_all(store: Any) -> None:
    """Also to those ranks that are of one mind with the first; afterwards they can meet again."""
    meetings = [Meeting(store, rank, 3) for rank in range(3)]
    lines = [["step 1", "a", "b"], ["step 1", "a", "b"], ["step 1", "a", *"cdefgh"]]
    found = together(*(lambda m=m, x=x: m.agree(x) for m, x in zip(meetings, lines, strict=True)))
    text = "the ranks log different things at step 1; only rank 0 has b; only rank 2 has c, d, e, f and 2 more. Every"
    assert all(str(error).startswith(text) for error in found)
    assert together(*(lambda m=m: m.agree(["step 2"]) for m in meetings)) == [[]] * 3


def test_a_store_may_outlive_a_process_group(store: Any) -> None:
    """What the ranks of an earlier one agreed, or failed, to do in it is nothing to those of the next."""
    for _ in range(3):
        meetings = [Meeting(store, rank, 2) for rank in range(2)]
        assert together(*(lambda m=m: m.agree(["step 0"]) for m in meetings)) == [[]] * 2
        found = together(*(lambda m=m, r=r: m.agree(["step 1", str(r)]) for r, m in enumerate(meetings)))
        assert all("only rank 0 has 0; only rank 1 has 1" in str(error) for error in found)


def test_a_rank_that_left_is_named_to_all(store: Any) -> None:
    """Whether they wait already or come later; afterwards they can meet again."""
    here, there = (Meeting(store, rank, 2) for rank in range(2))
    there.leave("rank 1 left\n for a reason")
    (error,) = together(lambda: here.agree(["step 0"]))
    assert str(error) == "rank 1 left for a reason"
    assert together(lambda: here.agree(["step 1"]), lambda: there.agree(["step 1"])) == [[]] * 2
    first, _ = together(lambda: here.agree(["step 2"]), lambda: there.leave("rank 1 left"))
    assert str(first) == "rank 1 left"


def test_a_rank_that_does_not_come_is_named(store: Any) -> None:
    """After half the store's time-out, to those who waited and to the late one."""
    store.set_timeout(timedelta(seconds=1))
    meetings = [Meeting(store, rank, 3) for rank in range(3)]
    waited = together(*(lambda m=m: m.agree(["step 0"]) for m in meetings[:2]))
    late = together(lambda: meetings[2].agree(["step 0"]))
    for error in (*waited, *late):
        assert str(error).startswith("rank 2 did not come within 0 s to step 0, where rank ")


def test_ranks_with_nothing_to_do_need_not_be_at_the_same_place(store: Any) -> None:
    """But one that has something is told who has not."""
    meetings = [Meeting(store, rank, 2) for rank in range(2)]
    assert together(*(lambda m=m, n=n: m.agree([f"step {n}"]) for n, m in enumerate(meetings))) == [[], []]
    found = together(*(lambda m=m, n=n: m.agree(["step 1", *"a"[n:]]) for n, m in enumerate(meetings)))
    assert all("at step 1; only rank 0 has a. Every" in str(error) for error in found)


def test_news_come_to_all_ranks(store: Any) -> None:
    """Where they explain a difference, instead of an error; where all know the same there is none."""
    meetings = [Meeting(store, rank, 3) for rank in range(3)]
    lines = [["step 0", "a"], ["step 0", "not b", "a"], ["step 0", "not c", "a"]]
    news = [[], ["b\nfailed"], ["c failed"]]
    coming = [*zip(meetings, lines, news, strict=True)]
    assert together(*(lambda m=m, x=x, n=n: m.agree(x, n) for m, x, n in coming)) == [["b failed", "c failed"]] * 3
    found = together(*(lambda m=m: m.agree(["step 1", "not b"], [f"b failed in {id(m)}"]) for m in meetings))
    assert found == [[]] * 3


def test_who_leaves_with_nothing_does_not_insist_on_the_others(store: Any) -> None:
    """They may have ended otherwise. One that comes later, with something, is told."""
    store.set_timeout(timedelta(seconds=1))
    here, there = (Meeting(store, rank, 2) for rank in range(2))
    assert here.agree(["step 3"], leaving=True) == []
    (late,) = together(lambda: there.agree(["step 3", "a"]))
    assert str(late).startswith("rank 1 did not come within 0 s to step 3, where rank 0 waits")


# -- who holds what ----------------------------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_other_ranks_there_is_nothing_to_merge() -> None:
    assert ranks.rank() == 0
    assert not ranks.several()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"RANK": "3", "WORLD_SIZE": "4"}, 3), ({"RANK": "3"}, 0), ({"RANK": "first", "WORLD_SIZE": "4"}, 0)],
)
def test_before_the_process_group_the_launcher_says_the_rank(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its environment is what ``init_process_group`` would read; ``RANK`` alone may mean anything."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.rank() == expected
    assert not ranks.several()


@pytest.mark.usefixtures("alone")
def test_a_single_rank_meets_nobody() -> None:
    assert not ranks.several()


@pytest.mark.parametrize(
    ("config", "candidates", "expected"),
    [
        ("cpu:gloo,cuda:gloo", ["cpu", "cuda:1"], "cpu"),
        ("cpu:gloo,cuda:nccl", ["cuda:1", "cpu"], "cuda:1"),
        ("cuda:nccl", ["cpu", "cuda:1"], "cuda:1"),
        ("cuda:nccl", ["cpu"], "cuda:3"),
        ("cpu:gloo", ["cuda:1"], "cpu:0"),
    ],
)
def test_where_ranks_add_up(config: str, candidates: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that the process group's backends can reduce: the tensors' own, or the current accelerator."""
    monkeypatch.setattr(dist, "get_backend_config", lambda: config)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    assert merge._device([torch.device(each) for each in candidates]) == torch.device(expected)


def parts(rank: int, dims: tuple[str, ...], placements: tuple[str, ...], *, replicated: bool) -> Part:
    """What a rank of four, which form a mesh of two by two, has of a DTensor on some of the mesh's dimensions."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    dist.init_process_group("fake", store=fake.FakeStore(), rank=rank, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))[dims]
        placed = [Replicate() if each == "R" else Shard(0) for each in placements]
        tensor = DTensor.from_local(torch.ones(2, 3), mesh, placed, run_check=False)
        local, part = ranks.part(tensor, replicated=replicated)
        assert type(local) is torch.Tensor
        assert local.shape == (2, 3)
        assert isinstance(part, Part)
        return part
    finally:
        dist.destroy_process_group()


OWN, COPY, WHOLE = Part.OWN, Part.COPY, Part.WHOLE


@pytest.mark.parametrize(
    ("dims", "placements", "replicated", "expected"),
    [
        (("a", "b"), ("S", "S"), True, [OWN, OWN, OWN, OWN]),
        (("a", "b"), ("R", "S"), True, [OWN, OWN, COPY, COPY]),  # hybrid sharding
        (("a", "b"), ("S", "R"), True, [OWN, COPY, OWN, COPY]),
        (("a", "b"), ("R", "R"), True, [WHOLE] * 4),
        (("b",), ("S",), True, [OWN, OWN, COPY, COPY]),  # tensor parallel, and replicas of it beside
        (("b",), ("S",), False, [OWN] * 4),  # of activations these have other batches
        (("b",), ("R",), False, [OWN, COPY, OWN, COPY]),
    ],
)
def test_each_part_is_counted_once(
    dims: tuple[str, ...], placements: tuple[str, ...], replicated: bool, expected: list[Part]
) -> None:
    """Shards add up over the dimensions that shard; of replicas one counts."""
    assert [parts(rank, dims, placements, replicated=replicated) for rank in range(4)] == expected
