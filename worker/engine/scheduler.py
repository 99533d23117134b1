"""Decides which rows are in the batch of one model and what the next step does. Knows neither Redis nor MLX.

Rows are admitted in the order of their rank, resumed ones of a class first, while there are slots and memory. Later
rows may overtake a row that does not fit for `OVERTAKE_LIMIT_S`; after that, memory is reserved for it. The same holds
for the slots of adapters. When memory runs short, the row that was admitted last is preempted, rows of the class
`batch` before others. It continues later, with its generated tokens as part of its prompt.

Rows of the class `batch` do not delay others. They are admitted and prefilled last, leave some rows free, and are
preempted when a row of another class lacks a slot or memory.

When a step raises, its batch is lost, and which row caused the error is unknown. After an out-of-memory error the rows
continue in a batch of half the size, which grows by one with each row that ends. After any other error each row is
tried alone until it gives a token. A row that raises alone fails; the others continue together. So every lost batch
either ends a row or gives each row a token: no row fails for another's error, and no error repeats forever. If several
rows in succession raise alone, with no token in between, the engine itself is broken.
"""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from shared.jobs.record import Status
from worker.engine.adapter_budget import AdapterBudget
from worker.engine.memory_budget import GROWTH, Fit, MemoryBudget
from worker.engine.prefill_budget import PrefillBudget
from worker.engine.prefill_policy import PrefillPolicy
from worker.engine.sequence import Sequence
from worker.runner.base import ModelRunner, OutOfMemory, RemainingPrompt, StepOutput, StepPlan

logger = logging.getLogger(__name__)

OVERTAKE_LIMIT_S: Final = 5.0
"""Longest time for which later rows may take the memory that a waiting row needs."""
MAX_SINGLE_FAILURES: Final = 3
"""Rows in succession that raise alone before the engine counts as broken."""
LONG_STEP_S: Final = 0.05
"""While rows of the class `batch` decode in steps of at least this length, the engine waits for a step before it plans
the next one. So a row of another class that arrives meanwhile is in the next step, not in the one after it. The device
waits one or two milliseconds for the host, which would be a larger part of a shorter step."""
_CHECK_TOKENS: Final = GROWTH // 8
"""Tokens per row between two checks of the memory."""

RowError = tuple[Sequence, Exception]


class EngineBroken(Exception):
    """The runner raises with every batch."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What could be admitted in addition to all running and waiting rows.

    Attributes:
        tokens: total length of the rows that the memory for caches allows.
        reserve: number of the rows that jobs of the class `batch` leave free.
    """

    rows: int
    tokens: int
    reserve: int = 0


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
    failed: tuple[RowError, ...] = ()


class Scheduler:
    """The rows of one model.

    Args:
        slots: maximum rows in the batch.
        clock: seconds by which steps are measured; stands still while other models step.
        reserve: number of rows that jobs of the class `batch` leave free.

    Attributes:
        running: rows in the batch by uid, in the order of admission.
        version: changes whenever the rows or their expected memory may have changed.
        preemptions: rows preempted so far because memory ran short.
        yielded: rows of the class `batch` preempted so far because a row of another class waited.
    """

    def __init__(
        self, runner: ModelRunner, slots: int, clock: Callable[[], float] = time.monotonic, reserve: int = 0
    ) -> None:
        self.running: dict[int, Sequence] = {}
        self.preemptions = self.yielded = 0
        self.version = 0
        self.memory = MemoryBudget(runner)
        self.prefill_budget = PrefillBudget(runner.chunk, runner.cost)
        self._policy = PrefillPolicy(runner.chunk, runner.depth, runner.cost, self.prefill_budget)
        self._slots = self._max_rows = slots
        self._adapters = AdapterBudget(runner.adapter_slots, self.running)
        self._reserve = reserve
        self._clock = clock
        self._stepped_at = clock()
        self._waiting: list[Sequence] = []
        self._suspects: deque[Sequence] = deque()
        self._on_trial = False  # the batch is a single suspect
        self._single_failures = 0
        self._ready: set[int] = set()  # rows that were prefillable at least once: their images are encoded
        self._exclusive: set[int] = set()  # rows to prefill alone after their prefill ran out of memory
        self._reinsert: list[Sequence] = []
        self._scheduled_version = -1
        self._tokens_to_check = 0

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
        """Add a row to those that wait."""
        insort(self._waiting, sequence, key=_order)
        self.version += 1

    def remove(self, job_id: str, attempt: int) -> Sequence | None:
        """Drop a job's row and return it; None if it is not here. The runner may still have the row."""
        for sequence in (*self.running.values(), *self.waiting):
            if sequence.job.id == job_id and sequence.job.attempt == attempt:
                self.drop([sequence])
                return sequence
        return None

    def drop(self, sequences: Iterable[Sequence]) -> None:
        """Drop rows, running or waiting. The runner may still have them."""
        for sequence in sequences:
            if sequence.uid in self.running:
                self._leave_batch(sequence)
            elif sequence in self._suspects:
                self._suspects.remove(sequence)
            else:
                self._waiting.remove(sequence)
            self.version += 1

    def finish(self, sequence: Sequence) -> None:
        """Remove a row that has ended from the batch."""
        if sequence.ending is not None and sequence.ending.status is Status.SUCCEEDED:
            self.memory.add_answer(len(sequence.generated))
        self._max_rows = min(self._slots, self._max_rows + 1)
        self._leave_batch(sequence)

    def set_memory_limit(self, limit_bytes: int, future_limit_bytes: int = 0) -> None:
        """Set the memory for rows and prefixes; see `MemoryBudget`."""
        self.memory.set_limit(limit_bytes, future_limit_bytes)
        self.version += 1

    def schedule(self) -> Schedule:
        """Preempt rows if memory runs short or rows of a higher class wait, and admit rows that fit."""
        preempted = (*self._preempt(), *self._make_room())
        reinserted, self._reinsert = self._reinsert, []
        admitted, failed = self._admit()
        return Schedule((*reinserted, *admitted), preempted, failed)

    def plan(self, remaining: Mapping[int, RemainingPrompt], image_s: float | None) -> StepPlan:
        """Plan the next step of the batch.

        Args:
            remaining: rows that can be prefilled now.
            image_s: seconds that encoding the next image takes; None: no image waits.
        """
        if not self._ready.issuperset(remaining):  # images were encoded: the memory for that is free again
            self._ready.update(remaining)
            self.version += 1
        decoding = any(uid not in remaining for uid in self._ready)
        urgent = {uid: left for uid, left in remaining.items() if not self.running[uid].is_batch}
        rows = urgent or remaining
        plan = self._policy.plan(rows, image_s, decoding=decoding, exclusive=self._exclusive, batch=not urgent)
        return replace(plan, ahead=self._runs_ahead())

    def _runs_ahead(self) -> bool:
        """Return whether the next step is queued before the tokens of this one are read; see `LONG_STEP_S`."""
        is_short = self.prefill_budget.plain_s < LONG_STEP_S
        return is_short or not any(each.is_batch for each in self.running.values())

    def update(self, output: StepOutput) -> list[RowError]:
        """Apply the output of a step; return the rows that failed in it."""
        now = self._clock()
        last, self._stepped_at = self._stepped_at, now
        if output.tokens and not output.verified:
            self.prefill_budget.record_step(now - last, output.predicted_s)
        self._ready.update(output.prefilled)
        self._exclusive.difference_update(output.prefilled)
        for uid, cached_tokens in output.prefilled.items():
            self.running[uid].prefilled(cached_tokens)
        self._tokens_to_check -= 1 if len(output.tokens) <= len(self.running) else len(output.tokens)
        failed = [(self.running[uid], error) for uid, error in output.failed]
        failed += self._prefill_again(output.out_of_memory)
        for sequence, _ in failed:
            self.finish(sequence)
        return failed

    def clear_suspect(self) -> tuple[int, ...]:
        """Note that a step gave tokens. A suspect on trial is cleared and waits until the other suspects were tried.

        Returns:
            Uids of the rows that left the batch.
        """
        self._single_failures = 0
        if not self._on_trial:
            return ()
        self._on_trial = False
        cleared = list(self.running.values())
        for sequence in cleared:
            self._leave_batch(sequence)
            self.add(sequence)
        return tuple(sequence.uid for sequence in cleared)

    def recover(self, error: Exception) -> list[RowError]:
        """Queue the rows of a lost batch again; return the row that caused the error, if it is known.

        Raises:
            EngineBroken: several single rows raised in succession.
        """
        lost = list(self.running.values())
        for sequence in lost:
            self._leave_batch(sequence)
        self._on_trial = False
        out_of_memory = isinstance(error, OutOfMemory)
        if len(lost) > 1 and out_of_memory:  # no row is to blame: there were too many
            self._max_rows = len(lost) // 2
            for sequence in lost:
                self.add(sequence)
            return []
        if len(lost) > 1:
            self._suspects.extend(lost)
            return []
        if not out_of_memory:
            self._single_failures += 1
            if self._single_failures >= MAX_SINGLE_FAILURES:
                raise EngineBroken(f"{self._single_failures} rows in succession raised alone") from error
        return [(sequence, error) for sequence in lost]

    def capacity(self) -> Capacity:
        """Return what could be admitted in addition to all running and waiting rows."""
        rows = [*self.running.values(), *self.waiting]
        free_bytes = self.memory.free_bytes(rows, self._encoding())
        # Rows that only lack a slot for their adapter must not keep the worker from claiming others.
        blocked = len(self._waiting) - len(self._adapters.with_slot(self._waiting))
        free_rows = max(0, self._max_rows - len(rows) + min(blocked, self._max_rows // 2))
        return Capacity(free_rows, self.memory.tokens_in(free_bytes), self._reserved())

    def prefix_bytes(self) -> int:
        """Return the bytes that the rows in the batch leave for prefixes."""
        return self.memory.free_bytes(self.running.values(), self._encoding())

    def _leave_batch(self, sequence: Sequence) -> None:
        del self.running[sequence.uid]
        self._ready.discard(sequence.uid)
        self._exclusive.discard(sequence.uid)
        self._reinsert = [each for each in self._reinsert if each is not sequence]
        self.version += 1

    def _encoding(self) -> list[Sequence]:
        """Rows in the batch whose images are not encoded yet."""
        return [each for uid, each in self.running.items() if each.prompt.media and uid not in self._ready]

    def _reserved(self) -> int:
        """Return the number of rows that jobs of the class `batch` leave free. They always get at least one row."""
        return min(self._reserve, self._max_rows - 1)

    def _preempt(self) -> list[int]:
        """Remove the newest rows from the batch until the others can grow."""
        if self._tokens_to_check > 0 and self._scheduled_version == self.version:
            return []
        self._tokens_to_check = _CHECK_TOKENS
        self.version += 1
        preempted = []
        while self.running and self.memory.is_exceeded(self.running.values()):
            newest = self._newest_of_batch_class() or next(reversed(self.running.values()))
            preempted.append(self._set_aside(newest))
        self.preemptions += len(preempted)
        return preempted

    def _make_room(self) -> list[int]:
        """Remove the newest rows of the class `batch` until those of other classes that wait can be admitted."""
        if self._scheduled_version == self.version or self._suspects or self._on_trial:
            return []
        waiting = [each for each in self._waiting if not each.is_batch]
        preempted = []
        while (row := self._adapters.newest_to_preempt(waiting)) is not None:
            preempted.append(self._set_aside(row))
        urgent = self._adapters.with_slot(waiting)
        while urgent and self._lack_room(urgent) and (newest := self._newest_of_batch_class()) is not None:
            preempted.append(self._set_aside(newest))
        self.yielded += len(preempted)
        return preempted

    def _lack_room(self, urgent: list[Sequence]) -> bool:
        """Return whether waiting rows lack slots, or the first one lacks memory that rows of the class `batch` hold."""
        if len(self.running) + len(urgent) > self._max_rows:
            return True
        rows, encoding = self.running.values(), self._encoding()
        if self.memory.fits(urgent[0], rows, encoding) is not Fit.LATER:
            return False
        others = [each for each in rows if not each.is_batch]
        return self.memory.fits(urgent[0], others, [each for each in encoding if not each.is_batch]) is Fit.NOW

    def _newest_of_batch_class(self) -> Sequence | None:
        return next((each for each in reversed(self.running.values()) if each.is_batch), None)

    def _set_aside(self, sequence: Sequence) -> int:
        """Let a row wait again; return its uid."""
        logger.info("row_preempted", extra={"job_id": sequence.job.id})
        self._leave_batch(sequence)
        self.add(sequence)
        return sequence.uid

    def _admit(self) -> tuple[list[Sequence], tuple[RowError, ...]]:
        """Fill the batch. While there are suspects, admit one of them alone instead."""
        if self._scheduled_version == self.version or (self._on_trial and self.running):
            return [], ()
        trial = bool(self._suspects)
        admitted: list[Sequence] = []
        failed: list[RowError] = []
        max_rows = 1 if trial else self._max_rows
        while len(self.running) < max_rows and (candidate := self._next(trial)) is not None:
            sequence, fit = candidate
            if fit is Fit.NEVER:
                failed.append((sequence, OutOfMemory(f"{sequence.max_length} tokens never fit")))
                continue
            self._on_trial = trial
            sequence.blocked_at = None
            sequence.timings.admitted()
            self.running[sequence.uid] = sequence
            admitted.append(sequence)
        self.version += bool(admitted or failed)
        self._scheduled_version = self.version
        return admitted, tuple(failed)

    def _next(self, trial: bool) -> tuple[Sequence, Fit] | None:
        """Take the first row that need not wait for memory or for a slot for its adapter.

        Both may be reserved for a row before it. If that row waits for a slot, rows without an adapter may overtake it.
        """
        source = self._suspects if trial else self._waiting
        encoding = self._encoding()
        adapters, slot_reserved = self._adapters.in_use(), False
        for sequence in source:
            if not trial and sequence.is_batch and len(self.running) >= self._max_rows - self._reserved():
                return None  # only rows of the class `batch` follow
            lacks_slot = self._adapters.lacks_slot(sequence, adapters)
            if lacks_slot or (slot_reserved and sequence.request.adapter is not None):
                slot_reserved = slot_reserved or sequence.is_overdue(OVERTAKE_LIMIT_S)
                continue
            fit = self.memory.fits(sequence, self.running.values(), encoding)
            if fit is not Fit.LATER:
                source.remove(sequence)
                return sequence, fit
            if sequence.is_overdue(OVERTAKE_LIMIT_S):
                return None
        return None

    def _prefill_again(self, uids: Iterable[int]) -> list[RowError]:
        """Prefill rows alone whose prefill ran out of memory; return those that ran out of memory alone."""
        failed: list[RowError] = []
        for uid in uids:
            sequence = self.running[uid]
            if uid in self._exclusive:
                failed.append((sequence, OutOfMemory(f"no memory to prefill {sequence.length} tokens")))
            else:
                self._exclusive.add(uid)
                self._ready.discard(uid)
                self._reinsert.append(sequence)
        return failed


def _order(sequence: Sequence) -> tuple[bool, bool, float, int]:
    return (sequence.is_batch, not sequence.resumed, sequence.claimed.rank, sequence.uid)
