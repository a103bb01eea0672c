"""`Meeting`: where ranks compare what they are about to do together, so that none enters a collective alone.

There, unlike in a collective, nobody waits for ever: a rank that would do something else, that left because of an
exception, or that does not come, is an error on all ranks. A meeting is three or four messages to the process group's
key-value store (0.2 ms on one machine); it waits for the other ranks' Python, not for any device.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

_ADVICE = (
    "Every rank must log the same layers in the same steps: a layer that is not called, or an evaluation or a p.log on "
    "one rank only, will not do. p.log(..., per_rank=True) merges nothing and writes a run for each rank"
)


def note_told(error: BaseException) -> None:
    """Remember that all ranks know of the error."""
    error._probe_told_ranks = True  # type: ignore[attr-defined]


def is_told(error: BaseException) -> bool:
    """Whether all ranks know of the error, or of what it was raised because of."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "_probe_told_ranks", False):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


class Meeting:
    """Where ranks meet, again and again, to compare what they are about to do; through a store that they share.

    Arguments:
        store: the store of the process group. Its time-out is the group's, of which a meeting waits half.
        rank: this one.
        size: how many ranks there are.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store = store.clone()  # a connection of its own: whoever waits at one blocks its other users
        self._rank = rank
        self._size = size
        self._at = 0
        # torchrun's store outlives a process group: what another one's meetings left there must not be taken for ours
        self._prefix = f"probe/{self._store.add(f'probe/rank{rank}', 1)}"

    def agree(self, lines: list[str]) -> None:
        """Return when all ranks have come with the same lines; the first says where this rank is.

        Raises:
            RuntimeError: on every rank, with what differs, who left or who did not come.
        """
        lines_of = f"{self._here}/lines"
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        verdict, *differing = self._verdict(digest, lines[0]).split("\n")
        if differing:
            if str(self._rank) in differing:
                self._store.set(lines_of + str(self._rank), "\n".join(lines))
            self._store.wait([lines_of + each for each in differing], self._timeout)
            first, other = (self._store.get(lines_of + each).decode().split("\n") for each in differing)
            verdict = f"{verdict}{_difference(first, other, *differing)}. {_ADVICE}"
        self._at += 1
        if verdict != "agreed":
            error = RuntimeError(verdict)
            note_told(error)
            raise error

    def leave(self, reason: str) -> None:
        """Have the others raise at the meeting that this rank would have come to next."""
        self._decide(" ".join(reason.split()))  # one line: in a verdict of more the others are ranks
        self._at += 1

    @property
    def _here(self) -> str:
        return f"{self._prefix}/{self._at}"

    @property
    def _timeout(self) -> timedelta:
        timeout: timedelta = self._store.timeout
        return timeout / 2

    def _verdict(self, digest: str, where: str) -> str:
        """``"agreed"``, or what is wrong; with two ranks to compare, one a line, where that is a difference."""
        store, here = self._store, self._here
        ranks = [f"{here}/rank{each}" for each in range(self._size)]
        store.set(ranks[self._rank], digest)
        if store.add(f"{here}/come", 1) == self._size:
            digests = store.multi_get(ranks)
            others = [each for each in range(self._size) if digests[each] != digests[0]]
            self._decide(f"the ranks log different things\n0\n{others[0]}" if others else "agreed")
            if self._at:
                self._forget(self._at - 1)
        try:
            store.wait([f"{here}/verdict"], self._timeout)
        except RuntimeError:
            absent = [str(each) for each, key in enumerate(ranks) if not store.check([key])]
            seconds = self._timeout.total_seconds()
            who = f"rank {absent[0]}" if len(absent) == 1 else f"ranks {', '.join(absent)}"
            text = f"{who} did not come within {seconds:.0f} s to {where}, where rank {self._rank} waits. {_ADVICE}"
            self._decide(text)
        verdict: str = store.get(f"{here}/verdict").decode()
        return verdict

    def _decide(self, verdict: str) -> None:
        """Set the verdict of the present meeting, unless somebody has."""
        if self._store.add(f"{self._here}/decided", 1) == 1:
            self._store.set(f"{self._here}/verdict", verdict)

    def _forget(self, at: int) -> None:
        """Clear away a meeting that all ranks have left, which they have when they are at the next one."""
        for key in ("come", "decided", "verdict", *(f"rank{each}" for each in range(self._size))):
            self._store.delete_key(f"{self._prefix}/{at}/{key}")


def _difference(first: list[str], other: list[str], *ranks: str) -> str:
    """What one rank has and the other lacks, in words."""
    if first[0] != other[0]:
        return f": rank {ranks[0]} is at {first[0]}, rank {ranks[1]} at {other[0]}"
    text = ""
    for rank_, extra in zip(ranks, (set(first) - set(other), set(other) - set(first)), strict=True):
        if extra:
            more = f" and {len(extra) - 4} more" if len(extra) > 4 else ""
            text += f"; only rank {rank_} has {', '.join(sorted(extra)[:4])}{more}"
    return f" at {first[0]}{text}"
