"""Claims jobs for one model of this process, as many as its engine can run, and prepares them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from redis import RedisError

from shared.errors import JobFailure, PromptRefused
from shared.jobs.log import Written
from shared.jobs.record import Ending, Job, Status
from shared.logging import log_context
from shared.queue.claims import Append, ClaimedJob, Claims, Demand, NoLease, WriteResult
from shared.queue.job_spans import JobSpans
from shared.queue.task_events import TaskEvents
from shared.queue.wakeups import Notifier
from shared.redis.client import passes
from worker.engine.core import EngineCore
from worker.engine.loading import Unloaded
from worker.engine.output import OutputProcessor, replay_results
from worker.engine.sequence import Outcome, Sequence, SequenceOutput
from worker.engine.timings import Timings
from worker.process.critical import CriticalThread, OnDeath, end_process
from worker.queue.prepare import Preparer, TryLater
from worker.runner.base import ModelRunner

logger = logging.getLogger(__name__)

POLL_S: Final = 1.0
"""Longest time between two rounds, with or without wake-ups."""
LEASE_WAIT_S: Final = 0.1
"""Pause after a claim without a lease; the lease thread renews it meanwhile."""
RETRY_S: Final = 1.0
"""Delay before a job that cannot be prepared now is released. Without it, the job would be claimed again at once."""
NOT_STARTED: Final = "The worker could not start this job."
SLOTS_PER_SPARE_JOB: Final = 8
"""A worker claims one spare job per this many slots, so that a job is ready when a row ends."""
PREPARERS: Final = 4
"""Threads for jobs that need images, the log or the tokenizer. The claimer's own thread prepares all others."""


class Claimer(CriticalThread):
    """Keeps the engine of one model supplied with jobs.

    Args:
        core: the model's engine.
        preparer: makes the prompts of claimed jobs.
        publish: writes the end of a job that never reaches the engine.
        events: sends Celery's task events of jobs.
        spans: sends the spans of jobs to a trace collector.
        slots: maximum rows in the batch.
        worker_ids: returns the ids of all model workers of this process.

    Attributes:
        draining: whether no more jobs are claimed.
        claimed: number of jobs claimed so far.
    """

    def __init__(
        self,
        model: str,
        core: EngineCore,
        claims: Claims,
        preparer: Preparer,
        publish: Callable[[list[SequenceOutput]], object],
        notifier: Notifier,
        events: TaskEvents,
        spans: JobSpans,
        slots: int,
        worker_ids: Callable[[], Iterable[str]] = tuple,
        on_death: OnDeath = end_process,
    ) -> None:
        super().__init__("claimer", on_death)
        self.draining = False
        self.claimed = 0
        self._model = model
        self._core = core
        self._claims = claims
        self._preparer = preparer
        self._publish = publish
        self._notifier = notifier
        self._events = events
        self._spans = spans
        self._max_spare = max(1, slots // SLOTS_PER_SPARE_JOB)
        self._worker_ids = worker_ids
        self._held: dict[str, ClaimedJob] = {}
        self._preparing: set[str] = set()
        # By claim (job id, claimed_at): when to release the job, and the job. Any thread adds, only this one removes.
        self._to_release: dict[tuple[str, str], tuple[float, ClaimedJob]] = {}
        self._wake = threading.Event()
        self._stopped = False
        self._pool = ThreadPoolExecutor(PREPARERS, thread_name_prefix="prepare")

    @property
    def held(self) -> dict[str, ClaimedJob]:
        """The jobs that this worker has claimed and not finished, by id."""
        return dict(self._held)

    @property
    def idle(self) -> bool:
        """Whether this worker holds no job."""
        return not self._held

    def wake(self) -> None:
        """Start the next round now, because a wake-up came or a row ended."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread after its current round, and wait for it."""
        self.draining = self._stopped = True
        self._wake.set()
        if self.is_alive():
            self.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def work(self) -> None:
        """Run rounds until stopped."""
        while not self._stopped:
            pause_s = self.round()
            self._wake.wait(pause_s)
            self._wake.clear()

    def round(self) -> float:
        """Release the jobs that are due for it and claim as many as fit; return the seconds until the next round."""
        try:
            self._release_due()
            return POLL_S if self.draining else self._claim()
        except NoLease:
            return LEASE_WAIT_S
        except RedisError as error:
            if not passes(error):
                raise
            # If the claim was executed and only its answer was lost, the lease thread releases its jobs.
            logger.warning("claim_failed", extra={"model": self._model, "reason": str(error)})
            return POLL_S

    def _claim(self) -> float:
        demand = self._demand()
        if not (demand.rows or demand.spare > 0 or demand.waiting):
            return POLL_S
        claim = self._claims.claim(self._model, demand, self._worker_ids())
        for job_id in claim.lost:
            if claimed := self._held.get(job_id):
                self._core.apply_write_result(job_id, claimed.job.attempt, WriteResult.FENCED)
        self.claimed += len(claim.jobs)
        for claimed in claim.jobs:
            self._begin(claimed)
        return POLL_S if claim.again_s is None else min(POLL_S, claim.again_s)

    def _demand(self) -> Demand:
        """Return how many jobs to claim. Jobs in preparation take rows first; those beyond the rows are spare jobs."""
        capacity, waiting = self._core.capacity(), tuple(self._core.waiting())
        preparing = len(self._preparing)
        full = capacity.rows <= 0 or capacity.tokens <= 0
        return Demand(
            rows=max(0, capacity.rows - preparing),
            tokens=capacity.tokens,
            spare=self._max_spare - len(waiting) - max(0, preparing - capacity.rows),
            waiting=waiting if full else (),
            reserve=capacity.reserve,
        )

    def _begin(self, claimed: ClaimedJob) -> None:
        self._held[claimed.job.id] = claimed
        self._preparing.add(claimed.job.id)
        if claimed.tokens is not None and not claimed.request.image_parts and claimed.job.started_at is None:
            self._prepare(claimed)
        else:
            self._pool.submit(self._prepare, claimed)

    def _prepare(self, claimed: ClaimedJob) -> None:
        job = claimed.job
        with log_context(request_id=job.request_id, job_id=job.id):
            try:
                self._submit(claimed)
            except (TryLater, Unloaded) as error:
                logger.warning("job_not_prepared", extra={"reason": str(error)})
                self._release_later(claimed, time.monotonic() + RETRY_S)
            except PromptRefused as error:
                self._fail(claimed, JobFailure(error.code), str(error))
            except Exception:  # the job must end: no other worker gets it while this one holds its lease
                logger.exception("job_not_prepared")
                self._fail(claimed, JobFailure.ENGINE, NOT_STARTED)
            finally:
                self._preparing.discard(job.id)

    def _submit(self, claimed: ClaimedJob) -> None:
        """Make the job's prompt and submit it to the engine, unless earlier attempts have written the whole answer."""
        runner = self._core.loaded.result()
        prepared = self._preparer.prepare(claimed, runner)
        sequence = Sequence(claimed, prepared.prompt, runner, self._settled)
        sequence.new_tokens = prepared.new_tokens
        end = _replayed(sequence, prepared.written, runner) if prepared.written else None
        if end is None:
            self._core.submit(sequence)
        else:
            self._publish([end])

    def _fail(self, claimed: ClaimedJob, code: JobFailure, message: str) -> None:
        """Fail a job that has no sequence yet. This one write begins and ends its attempt."""
        job = claimed.job
        ending = Ending(Status.FAILED, error_code=code, error_message=message)
        row = Append(job.id, job.attempt, job.claimed_at, job.last_event + 2, start=True, ending=ending)
        try:
            (write_result,) = self._claims.append([row])
        except Exception:
            logger.exception("job_end_not_written")  # the lease thread releases the job
        else:
            if write_result is not WriteResult.FENCED:
                _log_end(job, ending)
                self._events.started(job)
                self._events.ended(job, ending)
                self._spans.attempt_ended(claimed, Timings(claimed).stages(), ending)
        self._forget(claimed)

    def _settled(self, sequence: Sequence, outcome: Outcome) -> None:
        """Handle the outcome of a sequence; called by the engine thread or the publisher thread."""
        job = sequence.job
        # A job that is handed back before it was admitted has had no attempt.
        if self._spans.enabled and (outcome is Outcome.ENDED or (outcome is Outcome.HANDED_BACK and sequence.started)):
            self._spans.attempt_ended(sequence.claimed, sequence.timings.stages(), sequence.ending)
        with log_context(request_id=job.request_id, job_id=job.id):
            if outcome is Outcome.HANDED_BACK:
                logger.info("job_handed_back", extra={"attempt": job.attempt})
                self._events.retried(job)
                self._release_later(sequence.claimed)
                self.wake()
                return
            if outcome is Outcome.ENDED and sequence.ending is not None:
                _log_end(job, sequence.ending)
                self._events.ended(job, sequence.ending)
            elif outcome is Outcome.FENCED:
                logger.info("job_fenced", extra={"attempt": job.attempt})
        self._forget(sequence.claimed)

    def _release_later(self, claimed: ClaimedJob, moment: float = 0.0) -> None:
        self._to_release[claimed.job.id, claimed.job.claimed_at] = moment, claimed

    def _release_due(self) -> None:
        now = float("inf") if self.draining else time.monotonic()
        due = [claim for claim, (moment, _) in tuple(self._to_release.items()) if moment <= now]
        if not due:
            return
        models = self._claims.release(due)
        for claim in due:
            self._forget(self._to_release.pop(claim)[1])
        self._notifier.wake(models)

    def _forget(self, claimed: ClaimedJob) -> None:
        if self._held.get(claimed.job.id) is claimed:  # otherwise the job has been claimed again
            del self._held[claimed.job.id]
        self.wake()


def _replayed(sequence: Sequence, written: Written, runner: ModelRunner) -> SequenceOutput | None:
    """Continue a sequence from what earlier attempts wrote; return its end if nothing is missing."""
    if sequence.prompt.inputs is not None:
        return replay_results(sequence, sequence.prompt.inputs, written)
    return OutputProcessor(runner.eos).replay(sequence, written)


def _log_end(job: Job, ending: Ending) -> None:
    """Log one line per job, with its token counts and timings."""
    fields = {
        "status": ending.status.value,
        "finish_reason": ending.finish_reason,
        "error_code": ending.error_code,
        "attempt": job.attempt,
        "prompt_tokens": ending.prompt_tokens,
        "completion_tokens": ending.completion_tokens,
        "cached_tokens": ending.cached_tokens,
        **{name: round(seconds, 4) for name, seconds in ending.timings.items()},
    }
    logger.info("job_ended", extra=fields)
