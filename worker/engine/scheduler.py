"""Which rows are in the batch of one model, and what the next step does. Knows neither Redis nor MLX.

Rows are admitted in the order of their rank, resumed ones first, as long as there are slots and memory. A row that does
not fit is overtaken for `OVERTAKEN_S`, then space is reserved for it. When memory runs short, the row that was admitted
last is preempted; it continues later, with its tokens as part of its prompt.

When a step raises, its batch is lost, and which row was to blame is unknown. A batch that was too large for the memory
continues in halves; then each row that ends makes room for one more than before. After any other error each row is
tried alone until it gives a token. One that raises alone is to blame and fails; the others continue together. So every
lost batch ends a row or gives each of them a token: it never fails a neighbour and never repeats forever. Rows that
raise alone one after another, with no token in between, are not to blame: the engine is broken.
"""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from shared.jobs.record import Status
from worker.engine.memory_budget import GROWTH, Fit, MemoryBudget
from worker.engine.prefill_budget import PrefillBudget
from worker.engine.prefill_policy import PrefillPolicy
from worker.engine.sequence import Sequence
from worker.runner.base import ModelRunner, OutOfMemory, StepOutput, StepPlan, Unread

logger = logging.getLogger(__name__)

OVERTAKEN_S = 5.0
"""Longest time in which later rows may take the memory that a waiting row needs."""
MOST_LONE_FAILURES = 3
"""Number of rows in succession that raise alone after which the engine counts as broken."""
_CHECK_TOKENS = GROWTH // 8
"""Tokens of a row between two checks of the memory."""


class EngineBroken(Exception):
    """The runner raises with every batch."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What could be admitted beside the rows that run and wait: rows, and tokens of their caches in all."""

    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Changes of the batch before a step.

    Attributes:
        insert: rows to add to the runner's batch.
        remove: uids of rows to drop from it.
        failed: rows that never fit into the memory.
    """

    insert: tuple[Sequence, ...] = ()
    remove: tuple[int, ...] = ()
    failed: tuple[tuple[Sequence, Exception], ...] = ()


class Scheduler:
    """The rows of one model.

    Args:
        slots: most rows in the batch.
        clock: seconds by which steps are measured; stands still while other models step.

    Attributes:
        running: rows in the batch by uid, in the order of admission.
        version: changes with the rows, and with the memory that they are expected to take.
        preemptions: rows preempted so far.
    """

    def __init__(self, runner: ModelRunner, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.running: dict[int, Sequence] = {}
        self.preemptions = 0
        self.memory = MemoryBudget(runner)
        self.prefill_budget = PrefillBudget(runner.chunk, runner.cost)
        self._policy = PrefillPolicy(runner.chunk, runner.depth, runner.cost, self.prefill_budget)
        self._slots = self._most_rows = slots
        self._clock = clock
        self._stepped_at = clock()
        self._waiting: list[Sequence] = []
        self._suspects: deque[Sequence] = deque()
        self._on_trial = False
        self._lone_failures = 0
        self._seen_unread: set[int] = set()
        self._alone: set[int] = set()
        self._again: list[Sequence] = []
        self.version = 0
        self._scanned_version = -1
        self._check_in = 0

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Rows that are not in the batch."""
        return (*self._suspects, *self._waiting)

    @property
    def not_started(self) -> tuple[Sequence, ...]:
        """Rows that were never in the batch."""
        return tuple(sequence for sequence in self._waiting if not sequence.started)

    @property
    def busy(self) -> bool:
        """Whether there is any row."""
        return bool(self.running or self._waiting or self._suspects)

    def add(self, sequence: Sequence) -> None:
        """Take in a row, in its place among those that wait."""
        insort(self._waiting, sequence, key=_place)
        self.version += 1

    def take(self, job_id: str, attempt: int) -> Sequence | None:
        """Give up a row, wherever it is; the runner may still have it."""
        for sequence in (*self.running.values(), *self.waiting):
            if sequence.job.id == job_id and sequence.job.attempt == attempt:
                self.give_up([sequence])
                return sequence
        return None

    def give_up(self, sequences: Iterable[Sequence]) -> None:
        """Forget rows, wherever they are."""
        for sequence in sequences:
            if sequence.uid in self.running:
                self._leave(sequence)
            elif sequence in self._suspects:
                self._suspects.remove(sequence)
            else:
                self._waiting.remove(sequence)
            self.version += 1

    def finish(self, sequence: Sequence) -> None:
        """Note the end of a row in the batch."""
        if sequence.ending is not None and sequence.ending.status is Status.SUCCEEDED:
            self.memory.answered(len(sequence.generated))
        self._most_rows = min(self._slots, self._most_rows + 1)
        self._leave(sequence)

    def grant(self, limit_bytes: int, hoped_bytes: int = 0) -> None:
        """Set the memory for rows and prefixes.

        Args:
            hoped_bytes: what it may be again before long, if that is more: rows keep what they have, or wait for it.
        """
        self.memory.grant(limit_bytes, hoped_bytes)
        self.version += 1

    def schedule(self) -> Schedule:
        """Preempt rows where memory runs short, and admit those that fit."""
        preempted = self._preempt()
        again, self._again = self._again, []
        admitted, failed = self._admit()
        return Schedule((*again, *admitted), preempted, failed)

    def plan(self, unread: Mapping[int, Unread], image_s: float | None) -> StepPlan:
        """Plan the next step of the batch.

        Args:
            unread: rows that can be prefilled now.
            image_s: seconds that the next image takes to encode; None: none waits.
        """
        if not self._seen_unread.issuperset(unread):  # images are encoded: their memory is free again
            self._seen_unread.update(unread)
            self.version += 1
        decoding = any(uid not in unread for uid in self._seen_unread)
        return self._policy.plan(unread, image_s, decoding=decoding, alone=self._alone)

    def update(self, output: StepOutput) -> list[tuple[Sequence, Exception]]:
        """Note what a step did; the rows that failed in it."""
        now = self._clock()
        last, self._stepped_at = self._stepped_at, now
        if output.tokens and not output.verified:
            self.prefill_budget.stepped(now - last, output.predicted_s)
        self._seen_unread.update(output.prefilled)
        self._alone.difference_update(output.prefilled)
        for uid, cached_tokens in output.prefilled.items():
            self.running[uid].prefilled(cached_tokens)
        self._check_in -= 1 if len(output.tokens) <= len(self.running) else len(output.tokens)
        failed = [(self.running[uid], error) for uid, error in output.failed]
        failed += self._out_of_memory(output.out_of_memory)
        for sequence, _ in failed:
            self.finish(sequence)
        return failed

    def acquit(self) -> tuple[int, ...]:
        """Tokens came. A row on trial steps aside until the other suspects have been tried; its uid."""
        self._lone_failures = 0
        if not self._on_trial:
            return ()
        self._on_trial = False
        acquitted = list(self.running.values())
        for sequence in acquitted:
            self._leave(sequence)
            self.add(sequence)
        return tuple(sequence.uid for sequence in acquitted)

    def lose(self, error: Exception) -> list[tuple[Sequence, Exception]]:
        """Recover from the loss of the batch; the rows to blame.

        Raises:
            EngineBroken: no row is.
        """
        lost = list(self.running.values())
        for sequence in lost:
            self._leave(sequence)
        self._on_trial = False
        exhausted = isinstance(error, OutOfMemory)
        if len(lost) > 1 and exhausted:  # no row is to blame: there were too many of them
            self._most_rows = len(lost) // 2
            for sequence in lost:
                self.add(sequence)
            return []
        if len(lost) > 1:
            self._suspects.extend(lost)
            return []
        if not exhausted:
            self._lone_failures += 1
            if self._lone_failures >= MOST_LONE_FAILURES:
                raise EngineBroken(f"{self._lone_failures} rows in succession raised alone") from error
        return [(sequence, error) for sequence in lost]

    def capacity(self) -> Capacity:
        """Return what could be admitted beside the rows that run and wait."""
        rows = [*self.running.values(), *self.waiting]
        free = self.memory.left(rows, self._encoding())
        return Capacity(max(0, self._most_rows - len(rows)), self.memory.tokens_in(free))

    def prefix_bytes(self) -> int:
        """Bytes that the rows in the batch leave for prefixes."""
        return self.memory.left(self.running.values(), self._encoding())

    def _leave(self, sequence: Sequence) -> None:
        del self.running[sequence.uid]
        self._seen_unread.discard(sequence.uid)
        self._alone.discard(sequence.uid)
        self._again = [each for each in self._again if each is not sequence]
        self.version += 1

    def _encoding(self) -> list[Sequence]:
        """Rows whose images are not encoded yet."""
        return [each for uid, each in self.running.items() if each.prompt.media and uid not in self._seen_unread]

    def _preempt(self) -> tuple[int, ...]:
        """Take the newest rows out of the batch until the others can grow."""
        if self._check_in > 0 and self._scanned_version == self.version:
            return ()
        self._check_in = _CHECK_TOKENS
        self.version += 1
        preempted = []
        while self.running and self.memory.is_short(self.running.values()):
            sequence = next(reversed(self.running.values()))
            logger.info("row_preempted", extra={"job_id": sequence.job.id})
            self._leave(sequence)
            self.add(sequence)
            preempted.append(sequence.uid)
        self.preemptions += len(preempted)
        return tuple(preempted)

    def _admit(self) -> tuple[list[Sequence], tuple[tuple[Sequence, Exception], ...]]:
        """Fill the batch; but while there are suspects, try one of them alone."""
        if self._scanned_version == self.version or (self._on_trial and self.running):
            return [], ()
        trial = bool(self._suspects)
        admitted: list[Sequence] = []
        failed: list[tuple[Sequence, Exception]] = []
        most = 1 if trial else self._most_rows
        while len(self.running) < most and (found := self._next(trial)) is not None:
            sequence, fit = found
            if fit is Fit.NEVER:
                failed.append((sequence, OutOfMemory(f"{sequence.longest} tokens never fit")))
                continue
            self._on_trial = trial
            sequence.blocked_at = None
            sequence.timings.admitted()
            self.running[sequence.uid] = sequence
            admitted.append(sequence)
        self.version += bool(admitted or failed)
        self._scanned_version = self.version
        return admitted, tuple(failed)

    def _next(self, trial: bool) -> tuple[Sequence, Fit] | None:
        """Take the first row that need not wait for memory; rows overtake one that has not waited long."""
        source = self._suspects if trial else self._waiting
        encoding = self._encoding()
        for sequence in source:
            fit = self.memory.fits(sequence, self.running.values(), encoding)
            if fit is not Fit.LATER:
                source.remove(sequence)
                return sequence, fit
            now = time.monotonic()
            if sequence.blocked_at is None:
                sequence.blocked_at = now
            if now - sequence.blocked_at >= OVERTAKEN_S:
                return None
        return None

    def _out_of_memory(self, uids: Iterable[int]) -> list[tuple[Sequence, Exception]]:
        """Have rows whose prefill found no memory tried once more, alone; those that were have failed."""
        failed: list[tuple[Sequence, Exception]] = []
        for uid in uids:
            sequence = self.running[uid]
            if uid in self._alone:
                failed.append((sequence, OutOfMemory(f"{sequence.length} tokens found no memory")))
            else:
                self._alone.add(uid)
                self._seen_unread.discard(uid)
                self._again.append(sequence)
        return failed


def _place(sequence: Sequence) -> tuple[bool, float, int]:
    return (not sequence.resumed, sequence.claimed.rank, sequence.uid)
