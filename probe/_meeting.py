"""`Meeting`: where ranks compare what they are about to do together, so that none enters a collective alone.

There, unlike in a collective, nobody waits for ever: a rank that would do something else, that left because of an
exception, or that does not come, is an error on all ranks. A meeting is three or four messages to the process group's
key-value store (0.2 ms on one machine); it waits for the other ranks' Python, not for any device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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

    def agree(self, lines: list[str], news: Sequence[str] = (), *, leaving: bool = False) -> list[str]:
        """Return when all ranks have come with the same lines; the first says where this rank is.

        Arguments:
            lines: where this rank is, and all that it is about to do. Ranks with nothing to do may be anywhere.
            news: why it is about to do that, where it may be that the others do something else: one line each.
            leaving: this rank has nothing to do, and will not come again: it is no error if others do not come.

        Returns:
            nothing where all agree; where they do not and there are news, those of all ranks.

        Raises:
            RuntimeError: on every rank, with what differs, who left or who did not come.
        """
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest() if len(lines) > 1 else ""
        kind, *said = self._verdict(digest, news, lines[0]).split("\n")
        text = self._difference(lines, *said) if kind == "differ" else said[0] if said else ""
        self._at += 1
        if kind == "news":
            return said
        if kind != "agreed" and not (kind == "late" and leaving):
            error = RuntimeError(text)
            note_told(error)
            raise error
        return []

    def leave(self, reason: str) -> None:
        """Have the others raise at the meeting that this rank would have come to next."""
        self._decide("left", _line(reason))
        self._at += 1

    @property
    def _here(self) -> str:
        return f"{self._prefix}/{self._at}"

    @property
    def _timeout(self) -> timedelta:
        timeout: timedelta = self._store.timeout
        return timeout / 2

    def _verdict(self, digest: str, news: Sequence[str], where: str) -> str:
        """In lines: ``agreed``, ``differ`` and two ranks, ``news`` and these, ``left`` and why, ``late`` and who."""
        store, here = self._store, self._here
        ranks = [f"{here}/rank{each}" for each in range(self._size)]
        store.set(ranks[self._rank], "\n".join([digest, *map(_line, news)]))
        if store.add(f"{here}/come", 1) == self._size:
            digests, told = zip(*(each.decode().partition("\n")[::2] for each in store.multi_get(ranks)), strict=True)
            others = [str(each) for each in range(self._size) if digests[each] != digests[0]]
            if not others:
                self._decide("agreed")
            elif any(told):
                self._decide("news", *filter(None, told))
            else:
                self._decide("differ", "0", others[0])
            if self._at:
                self._forget(self._at - 1)
        try:
            store.wait([f"{here}/verdict"], self._timeout)
        except RuntimeError:
            absent = [str(each) for each, key in enumerate(ranks) if not store.check([key])]
            seconds = self._timeout.total_seconds()
            who = f"rank {absent[0]}" if len(absent) == 1 else f"ranks {', '.join(absent)}"
            text = f"{who} did not come within {seconds:.0f} s to {where}, where rank {self._rank} waits. {_ADVICE}"
            self._decide("late", text)
        verdict: str = store.get(f"{here}/verdict").decode()
        return verdict

    def _difference(self, lines: list[str], *ranks: str) -> str:
        """What two ranks have come with, compared by all."""
        lines_of = f"{self._here}/lines"
        if str(self._rank) in ranks:
            self._store.set(lines_of + str(self._rank), "\n".join(lines))
        self._store.wait([lines_of + each for each in ranks], self._timeout)
        first, other = (self._store.get(lines_of + each).decode().split("\n") for each in ranks)
        return f"the ranks log different things{_difference(first, other, *ranks)}. {_ADVICE}"

    def _decide(self, kind: str, *said: str) -> None:
        """Set the verdict of the present meeting, unless somebody has."""
        if self._store.add(f"{self._here}/decided", 1) == 1:
            self._store.set(f"{self._here}/verdict", "\n".join([kind, *said]))

    def _forget(self, at: int) -> None:
        """Clear away a meeting that all ranks have left, which they have when they are at the next one."""
        for key in ("come", "decided", "verdict", *(f"rank{each}" for each in range(self._size))):
            self._store.delete_key(f"{self._prefix}/{at}/{key}")


def _line(text: str) -> str:
    return " ".join(text.split())


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
