"""What became of a job's attempts, as its record keeps it: the history of a job that was lost or handed back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from shared.wire import member


class AttemptEnd(StrEnum):
    """How an attempt ended. What only a newer process knows is taken for `handed_back`: the job went on."""

    WORKER_LOST = "worker_lost"
    """Its worker was gone, or did not know of it any more; it counts towards `MAX_ATTEMPTS`."""
    HANDED_BACK = "handed_back"
    """Its worker gave it back, to be continued by another."""
    ENDED = "ended"
    """The job ended with it."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt. Times are seconds since the epoch, of Redis's clock; without an end it is under way.

    Attributes:
        number: 1, 2, 3…: the fence of its writes.
        worker: who claimed the job.
    """

    number: int
    worker: str
    started_at: float
    ended_at: float | None = None
    how: AttemptEnd | None = None


_FIELD: Final = "attempt:"


def history(record: Mapping[str, str]) -> tuple[Attempt, ...]:
    """The attempts in a job's record, oldest first: the newest that ended, and the one under way."""
    ended = sorted(_ended(name, text) for name, text in record.items() if name.startswith(_FIELD))
    attempts = tuple(attempt for _, attempt in ended)
    if not record.get("worker") or record["status"] != "running":  # a job that is only reserved has no attempt yet
        return attempts
    began = float(record.get("admitted_at") or record.get("claimed_at") or record["started_at"])
    return (*attempts, Attempt(int(record["attempt"]), record["worker"], began))


def _ended(name: str, text: str) -> tuple[int, Attempt]:
    number, entry = int(name.removeprefix(_FIELD)), json.loads(text)
    times = float(entry["started_at"]), float(entry["ended_at"])
    return number, Attempt(number, entry["worker"], *times, member(AttemptEnd, entry["how"], AttemptEnd.HANDED_BACK))
