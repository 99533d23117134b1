"""What rows say goes to Redis: one thread, and one script call for all that was said since the last.

While Redis is away nothing is lost and nothing is said twice. A batch whose answer did not come may have been
written, so it is sent again as it was, under the same numbers, which the script passes over when it has them; what
is said meanwhile waits behind it, one event a job. An error that will not pass ends the process: the jobs go elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from queue import Empty, SimpleQueue
from time import sleep
from typing import NamedTuple

from redis import RedisError

from shared.queue.claims import Append, Claims, Verdict
from shared.queue.redis import passes
from worker.engine.sequence import Outcome, Said, Sequence
from worker.process.critical import OnDeath, VitalThread, end_process

logger = logging.getLogger(__name__)

LONGEST_PAUSE_S = 1.0

Heed = Callable[[str, int, Verdict], object]
"""Told what Redis says of a job: id, attempt, verdict."""


class _Row(NamedTuple):
    """One job's part of a batch."""

    sequence: Sequence
    append: Append
    outcome: Outcome | None


class Publisher(VitalThread):
    """Writes what is `put`, settles the sequences that said their last, passes verdicts on.

    Attributes:
        attempts: calls made so far, answered or not.
    """

    def __init__(self, claims: Claims, heed: Heed, on_death: OnDeath = end_process) -> None:
        super().__init__("publisher", on_death)
        self.attempts = 0
        self._claims = claims
        self._heed = heed
        self._inbox: SimpleQueue[list[Said] | None] = SimpleQueue()
        self._unsent: dict[Sequence, list[Said]] = {}
        self._batch: list[_Row] = []
        self._failures = 0
        self._open = True
        self._ended = False

    @property
    def backlog(self) -> int:
        """Jobs with something to say that is not known to be written."""
        return len(self._unsent) + len(self._batch)

    def put(self, said: list[Said]) -> None:
        """Have this written soon; does not wait. After the end it is left to another attempt to say it."""
        self._inbox.put(said)
        if self._ended:
            self._turn_away()

    def close(self) -> None:
        """End the thread once everything put before is written."""
        self._inbox.put(None)

    def work(self) -> None:
        """Gather and write until closed."""
        while self._open or self.backlog:
            if not self.backlog:
                self._sort(self._inbox.get())
            self.write()
        self._ended = True
        self._turn_away()

    def write(self) -> None:
        """Write all there is, in one call; on an error wait a little, and leave it to the next."""
        while not self._inbox.empty():
            self._sort(self._inbox.get())
        if not self._batch:
            self._batch = [_as_row(sequence, parts) for sequence, parts in self._unsent.items()]
            self._unsent = {}
        if not self._batch:
            return
        self.attempts += 1
        try:
            verdicts = self._claims.append([row.append for row in self._batch])
        except RedisError as error:
            if not passes(error):  # it would never be written, and the lease be held for nothing
                raise
            self._pause(error)
            return
        batch, self._batch = self._batch, []
        for row, verdict in zip(batch, verdicts, strict=True):
            self._answer(row, verdict)
        if self._failures:
            logger.info("Redis takes writes again")
            self._failures = 0

    def _turn_away(self) -> None:
        """Let nobody wait for what came too late to be written."""
        with suppress(Empty):
            while True:
                for said in self._inbox.get_nowait() or ():
                    if said.outcome is not None:
                        said.sequence.settle(Outcome.HANDED_BACK)

    def _sort(self, words: list[Said] | None) -> None:
        if words is None:
            self._open = False
            return
        for said in words:
            if said.sequence.outcome is None:
                self._unsent.setdefault(said.sequence, []).append(said)

    def _answer(self, row: _Row, verdict: Verdict) -> None:
        job = row.append
        if verdict is Verdict.FENCED:
            self._unsent.pop(row.sequence, None)
            row.sequence.settle(Outcome.FENCED)
        elif row.outcome is not None:
            row.sequence.settle(row.outcome)
            return
        if verdict is not Verdict.OK:
            self._heed(job.job_id, job.attempt, verdict)

    def _pause(self, error: RedisError) -> None:
        if not self._failures:
            logger.warning("Redis does not take writes; they are kept and sent again: %s", error)
        sleep(min(LONGEST_PAUSE_S, 0.05 * 2.0**self._failures))
        self._failures = min(self._failures + 1, 10)


def _as_row(sequence: Sequence, parts: list[Said]) -> _Row:
    """One event out of all that a job said; it takes a number only when it has text."""
    last = parts[-1]
    append = Append.of(
        sequence.job,
        sequence.next_event,
        text="".join(part.text for part in parts),
        tokens=tuple(chain.from_iterable(part.tokens for part in parts)),
        ending=last.ending,
    )
    if append.text:
        sequence.next_event += 1
    return _Row(sequence, append, last.outcome)
