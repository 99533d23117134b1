"""Writes the output of all rows to Redis: one thread, one script call for everything since the last call.

While Redis is unreachable, nothing is lost and nothing is written twice. A batch without an answer may have been
written, so the same batch is sent again with the same event numbers, and the script skips the events that it has. Newer
output waits meanwhile and is merged into one event per job. An error that retrying cannot fix ends the process, and its
jobs continue elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any, Final, NamedTuple

from redis import RedisError

from shared.histogram import Histogram
from shared.jobs.record import Job
from shared.queue.claims import Append, Claims, WriteResult
from shared.redis.client import passes
from shared.wire import to_json
from worker.engine.sequence import Outcome, Sequence, SequenceOutput
from worker.output.parser import Delta, merged
from worker.process.critical import CriticalThread, OnDeath, end_process
from worker.queue.lease import ApplyWriteResult
from worker.runner.base import TokenOutput

logger = logging.getLogger(__name__)

MAX_PAUSE_S: Final = 1.0
"""Longest pause between two tries; the first is 0.05 s, and each further one is twice as long."""


WRITE_BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""Upper bounds in seconds of the histogram of calls. On an idle machine a call takes about 1 ms."""


class _BatchRow(NamedTuple):
    """One job's part of a batch."""

    sequence: Sequence
    append: Append
    outcome: Outcome | None


class Publisher(CriticalThread):
    """Writes the outputs that are `put`, and settles each sequence whose last output is written.

    Args:
        apply_write_result: the engine's.
        on_started: called after a job's admission to the batch is written.

    Attributes:
        attempts: number of calls so far, answered or not.
        started: number of jobs whose admission is written.
        latency: how long answered calls took.
    """

    def __init__(
        self,
        claims: Claims,
        apply_write_result: ApplyWriteResult,
        on_death: OnDeath = end_process,
        on_started: Callable[[Job], object] = lambda _job: None,
    ) -> None:
        super().__init__("publisher", on_death)
        self.attempts = self.started = 0
        self.latency = Histogram("redis_write", WRITE_BOUNDS)
        self._claims = claims
        self._apply_write_result = apply_write_result
        self._on_started = on_started
        self._inbox: SimpleQueue[list[SequenceOutput] | None] = SimpleQueue()
        self._pending: dict[Sequence, list[SequenceOutput]] = {}
        self._batch: list[_BatchRow] = []  # not empty after a call without an answer
        self._failures = 0
        self._open = True
        self._ended = False

    @property
    def backlog(self) -> int:
        """Jobs with output that is not known to be written."""
        return len(self._pending) + len(self._batch)

    def put(self, outputs: list[SequenceOutput]) -> None:
        """Queue output for writing; never blocks. After the thread has ended, the sequences are handed back."""
        self._inbox.put(outputs)
        if self._ended:
            self._hand_back_late()

    def close(self) -> None:
        """End the thread after all output so far is written."""
        self._inbox.put(None)

    def work(self) -> None:
        """Receive and write until closed."""
        while self._open or self.backlog:
            if not self.backlog:
                self._receive(self._inbox.get())
            self.write()
        self._ended = True
        self._hand_back_late()

    def write(self) -> None:
        """Write all output in one call. After an error, pause; the next call sends the same batch again."""
        while not self._inbox.empty():
            self._receive(self._inbox.get())
        if not self._batch:
            self._batch = [_batch_row(sequence, outputs) for sequence, outputs in self._pending.items()]
            self._pending = {}
        if not self._batch:
            return
        self.attempts += 1
        began = monotonic()
        try:
            results = self._claims.append([row.append for row in self._batch])
        except RedisError as error:
            if not passes(error):  # every further call would fail as well
                raise
            self._pause(error)
            return
        self.latency.observe(monotonic() - began)
        batch, self._batch = self._batch, []
        for row, write_result in zip(batch, results, strict=True):
            self._handle_result(row, write_result)
        if self._failures:
            logger.info("writes_resumed")
            self._failures = 0

    def _hand_back_late(self) -> None:
        """Hand back the sequences whose last output came too late to be written."""
        with suppress(Empty):
            while True:
                for output in self._inbox.get_nowait() or ():
                    if output.outcome is not None:
                        output.sequence.settle(Outcome.HANDED_BACK)

    def _receive(self, outputs: list[SequenceOutput] | None) -> None:
        if outputs is None:
            self._open = False
            return
        for output in outputs:
            if output.outcome is Outcome.HANDED_BACK and not output.sequence.started:
                output.sequence.settle(Outcome.HANDED_BACK)  # its attempt has not begun, so there is nothing to write
            elif output.sequence.outcome is None:
                self._pending.setdefault(output.sequence, []).append(output)

    def _handle_result(self, row: _BatchRow, write_result: WriteResult) -> None:
        job = row.append
        if job.start and write_result is not WriteResult.FENCED:
            self.started += 1
            self._on_started(row.sequence.job)
        if write_result is WriteResult.FENCED:
            self._pending.pop(row.sequence, None)
            row.sequence.settle(Outcome.FENCED)
        elif row.outcome is not None:
            row.sequence.settle(row.outcome)
            return
        if write_result is not WriteResult.OK:
            self._apply_write_result(job.job_id, job.attempt, write_result)

    def _pause(self, error: RedisError) -> None:
        if not self._failures:
            logger.warning("writes_paused", extra={"reason": str(error)})
        sleep(min(MAX_PAUSE_S, 0.05 * 2.0**self._failures))
        self._failures = min(self._failures + 1, 10)


def _batch_row(sequence: Sequence, outputs: list[SequenceOutput]) -> _BatchRow:
    """Merge all outputs of a job into one chunk event.

    Without text and without a new part of the message there is no event, and no number is used.
    """
    last, claimed = outputs[-1], sequence.claimed
    start = any(output.started for output in outputs)
    if start:
        sequence.next_event += 1  # the admission is an event as well
    tokens = tuple(chain.from_iterable(output.outputs for output in outputs))
    delta = merged(output.delta for output in outputs if output.delta) if sequence.message else None
    append = Append(
        job_id=claimed.job.id,
        attempt=claimed.job.attempt,
        claimed_at=claimed.job.claimed_at,
        n=sequence.next_event,
        text="".join(output.text for output in outputs),
        tokens=tuple(token.token for token in tokens),
        extra=_extra_fields(sequence, tokens, delta),
        chunk=bool(delta),
        start=start,
        prompt=sequence.new_tokens if start else None,
        ending=last.ending,
    )
    if append.has_chunk:
        sequence.next_event += 1
    return _BatchRow(sequence, append, last.outcome)


def _extra_fields(sequence: Sequence, tokens: Iterable[TokenOutput], delta: Delta | None) -> str:
    """Return the fields of the chunk event other than its text, as JSON without braces."""
    fields: dict[str, Any] = {}
    if sequence.request.logprobs is not None:
        fields["logprobs"] = [sequence.describe_logprob(token) for token in tokens]
    if delta is not None:
        fields["delta"] = delta
    return to_json(fields)[1:-1] if fields else ""
