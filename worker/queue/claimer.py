"""The Celery task: claim a job, hand it to the engine, wait until its end is written."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping

from celery import Celery
from kombu.exceptions import OperationalError
from redis import RedisError

from shared.errors import Gone, JobFailure
from shared.jobs.log import JobLog
from shared.jobs.record import Ending, Job, Status
from shared.logging import about
from shared.queue.claims import Append, Claims, LeftToOthers, NoLease
from shared.queue.redis import passes
from shared.queue.wakeups import TASK, TicketOffice
from worker.engine.core import Batch, Unloaded
from worker.engine.sequence import Outcome, Said, Sequence
from worker.queue.lease import Claim
from worker.queue.left import Caller
from worker.queue.publisher import Publisher
from worker.queue.seats import Seats
from worker.runner.base import Backend, Prompt, PromptError

logger = logging.getLogger(__name__)

RENEWALS_AWAITED = 3
_NOT_STARTED = "The worker could not start this job."


class Runner:
    """What the task threads share.

    Args:
        held: the claims the threads work on, for others to read.
        wait_renewal: waits for the lease to be renewed, at most so many seconds; whether it was.
        slots: jobs worked on at a time.
        beside: names of the workers of other models in this process.
        images: the files of a job's images, by digest, as far as they are kept.

    Attributes:
        draining: whether no more jobs are claimed.
        encoding: the job whose prompt is being read now; those that wait for their turn are not to blame for it.
    """

    def __init__(
        self,
        batch: Batch,
        publisher: Publisher,
        claims: Claims,
        log: JobLog,
        tickets: TicketOffice,
        held: set[Claim],
        wait_renewal: Callable[[float], bool],
        images: Callable[[str, Collection[str]], Mapping[str, bytes]],
        slots: int,
        beside: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._beside = beside
        self._batch = batch
        self._publisher = publisher
        self._claims = claims
        self._log = log
        self._tickets = tickets
        self._caller = Caller(tickets)
        self._wait_renewal = wait_renewal
        self._images = images
        self._seats = Seats(slots)
        self._held = held
        self.draining = False
        self.encoding: tuple[Claim, Job] | None = None
        self._turn = threading.Lock()

    @property
    def idle(self) -> bool:
        """Whether no thread works on a job, or is about to claim one."""
        return self._seats.empty

    def run(self, model: str, ticket_for: str) -> None:
        """Work on the next job of a model, if one waits: perhaps the one the ticket was sent for."""
        seated = self._seats.take()
        while seated:
            try:
                self._work(model, ticket_for)
            except Exception:  # of a claim; raised further it would keep the seat, and those owed theirs
                logger.exception("nothing is done for a ticket")
            seated = not self._seats.leave()

    def _work(self, model: str, ticket_for: str) -> None:
        job = None if self.draining else self._claim(model)
        if job is None:
            # A ticket too many, or one that came too late: what waits still gets another.
            logger.debug("nothing to do for a ticket", extra={"job_id": ticket_for})
            return
        claim = (job.id, job.attempt)
        self._held.add(claim)
        try:
            with about(request_id=job.request_id, job_id=job.id):
                try:
                    self._work_on(job)
                except Exception:
                    logger.exception("the task failed")
                    self.fail(job)
        finally:
            self._held.discard(claim)
        if job.alone:
            self._call_next(model)

    def _claim(self, model: str) -> Job | None:
        for _ in range(RENEWALS_AWAITED):
            try:
                return self._claims.claim(model, self._beside())
            except NoLease:
                self._wait_renewal(1.0)
            except LeftToOthers as left:
                self._caller.call(model, left.jobs)
                return None
            except RedisError as error:
                if not passes(error):
                    raise
                # If it was claimed and only the answer is lost, the lease keeper finds and releases it.
                logger.warning("no claim: Redis is away: %s", error)
                return None
        logger.warning("no claim: the lease was not renewed")
        return None

    def _work_on(self, job: Job) -> None:
        try:
            backend = self._batch.loaded.result()
        except Unloaded:  # while it was being claimed
            self._hand_back(job)
            return
        sequence = Sequence(job, backend)
        end = self._prepare(sequence, backend)
        if end is None:
            self._batch.submit(sequence)
        else:
            self._publisher.put([end])
        match sequence.wait():
            case Outcome.ENDED:
                _log_end(job, sequence.ending)
            case Outcome.HANDED_BACK:
                self._hand_back(job)
            case Outcome.FENCED:
                logger.info("the job is not this worker's any more", extra={"attempt": job.attempt})

    def _prepare(self, sequence: Sequence, backend: Backend) -> Said | None:
        """Make a sequence ready for the engine; its end when it does not get that far."""
        job = sequence.job
        try:
            end = sequence.replay(self._log.written(job.id, job.last_event)) if job.attempt > 1 else None
            return end or sequence.begin(self._encode(job, backend, self._images_of(job)))
        except PromptError as error:
            return sequence.fail(JobFailure(error.code), str(error))
        except Gone as error:
            logger.error("the job cannot be continued: %s", error)
            return sequence.fail(JobFailure.LOG_LOST, "What was generated before is not all in the job's log any more.")
        except RedisError as error:
            if not passes(error):
                raise
            logger.warning("handing the job back: its log cannot be read: %s", error)
            return sequence.hand_back()
        except Exception:
            logger.exception("the job cannot be started")
            return sequence.fail(JobFailure.ENGINE, _NOT_STARTED)

    def _images_of(self, job: Job) -> Mapping[str, bytes]:
        """The files that the job's messages name.

        Raises:
            PromptError: they are not all there any more.
        """
        digests = {part["image"] for part in job.generation.image_parts}
        images = self._images(job.id, digests) if digests else {}
        if len(images) < len(digests):
            raise PromptError(JobFailure.IMAGE_LOST, "An image of this job is not kept any more.")
        return images

    def _encode(self, job: Job, backend: Backend, images: Mapping[str, bytes]) -> Prompt:
        """Read the prompt, when it is this job's turn."""
        with self._turn:
            self.encoding = ((job.id, job.attempt), job)
            try:
                return backend.encode(job.generation, images)
            finally:
                self.encoding = None

    def fail(self, job: Job) -> None:
        """End a job that has no sequence to say so."""
        try:
            ending = Ending(Status.FAILED, error_code=JobFailure.ENGINE, error_message=_NOT_STARTED)
            self._claims.append([Append.of(job, job.last_event + 1, ending=ending)])
        except Exception:
            # The lease keeper will find a claim that nobody works on, and hand it back as lost.
            logger.exception("the job's end is not written")

    def _call_next(self, model: str) -> None:
        """Send a ticket at once for one of those that had to wait until this worker was free again."""
        try:
            self._tickets.rescue_model(model, slots=1)
        except (RedisError, OperationalError) as error:
            logger.warning("no ticket sent: Redis or the broker is away: %s", error)  # the rescue will

    def _hand_back(self, job: Job) -> None:
        logger.info("handing the job back", extra={"attempt": job.attempt})
        try:
            self._tickets.send_all(self._claims.release([(job.id, job.attempt)]))
        except RedisError as error:
            logger.warning("not handed back yet: Redis is away: %s", error)  # the lease keeper will, or the reaper
        except OperationalError as error:
            logger.warning("no ticket sent: the broker is away: %s", error)  # the rescue will


def _log_end(job: Job, ending: Ending | None) -> None:
    """One line a job, with what it took."""
    if ending is None:
        return
    facts = {
        "status": ending.status.value,
        "finish_reason": ending.finish_reason,
        "error_code": ending.error_code,
        "attempt": job.attempt,
        "prompt_tokens": ending.prompt_tokens,
        "completion_tokens": ending.completion_tokens,
        "cached_tokens": ending.cached_tokens,
        **{name: round(seconds, 4) for name, seconds in ending.timings.items()},
    }
    logger.info("job ended", extra=facts)


def register(app: Celery, work: Callable[[str, str], object]) -> None:
    """Make the task known to Celery: `work` is called with a model and the job that a ticket was sent for."""

    @app.task(name=TASK, ignore_result=True)
    def run(model: str, job_id: str) -> None:
        work(model, job_id)
