"""The worker's lease, its proof of life in Redis, and the threads that renew lease and cards in time.

The lease must be renewed however slow everything else is. So its thread does only that, on a connection of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from redis import RedisError

from shared.queue.claims import ClaimedJob, Claims, Lease, WriteResult
from shared.queue.redis import passes
from worker.process.critical import CriticalThread, OnDeath, end_process

logger = logging.getLogger(__name__)


class _Periodic(CriticalThread):
    """Does something every so often, and continues when Redis is away."""

    def __init__(self, name: str, every_s: float, on_death: OnDeath) -> None:
        super().__init__(name, on_death)
        self._every_s = every_s
        self._ended = False
        self._wake = threading.Event()
        self._away = False

    def stop(self) -> None:
        """End the thread after its present round, and wait for it."""
        self._ended = True
        self._wake.set()
        if self.is_alive():
            self.join()

    def hurry(self) -> None:
        """Do the next round now."""
        self._wake.set()

    def work(self) -> None:
        """A round every so often until stopped."""
        while not self._ended:
            started = time.monotonic()
            self.round()
            self._wake.wait(max(0.0, self._every_s - (time.monotonic() - started)))
            self._wake.clear()

    def round(self) -> None:
        """One round; logs once that Redis is away, and once that it is back.

        Raises:
            redis.RedisError: Redis is not away, but rejects the call.
        """
        try:
            self.do()
        except RedisError as error:
            if not passes(error):
                raise
            if not self._away:
                logger.warning("redis_away", extra={"task": self.name, "reason": str(error)})
            self._away = True
        else:
            if self._away:
                logger.info("redis_back", extra={"task": self.name})
            self._away = False

    def do(self) -> None:
        """What the thread is for."""
        raise NotImplementedError


ApplyWriteResult = Callable[[str, int, WriteResult], object]
"""Called with what Redis says of a job: id, attempt, write_result."""


class LeaseRenewer(_Periodic):
    """Renews the lease, passes on which jobs must stop, and reconciles Redis's view of the held jobs with ours.

    Args:
        apply_write_result: the engine's.
        held: the jobs that this worker has claimed and not finished, by id.
        announce: writes the worker's card; called with True when Redis did not know the lease.
        given_up: whether the lease must lapse, because this process cannot continue.
    """

    def __init__(
        self,
        claims: Claims,
        apply_write_result: ApplyWriteResult,
        held: Callable[[], Mapping[str, ClaimedJob]],
        announce: Callable[[bool], object],
        lease_s: float,
        given_up: Callable[[], bool] = lambda: False,
        on_death: OnDeath = end_process,
    ) -> None:
        super().__init__("lease", lease_s / 3, on_death)
        self._claims = claims
        self._apply_write_result = apply_write_result
        self._held = held
        self._announce = announce
        self._lease_s = lease_s
        self._given_up = given_up
        self._unknown: frozenset[tuple[str, str]] = frozenset()  # job ids and the moments of their claims
        self._renewals = 0

    def do(self) -> None:
        """Renew; then act on what Redis says this worker holds."""
        if self._given_up():
            return
        before = self._held()  # what is claimed during the renewal may be missing from its answer
        lease = self._claims.renew(self._lease_s)
        if not lease.unbroken:
            self._fence(before, lease)
        for job in lease.running:
            if job.stop_as is not None:
                self._apply_write_result(job.job_id, job.attempt, job.stop_as)
        self._renewals += 1
        self._announce(not lease.unbroken)
        self._release_unknown(lease)

    def _fence(self, before: Mapping[str, ClaimedJob], lease: Lease) -> None:
        """The lease had lapsed: other workers may have our jobs."""
        if self._renewals:
            logger.warning("lease_lapsed", extra={"jobs": len(before)})
        kept = {job.job_id for job in lease.running} | {job_id for job_id, _ in lease.reserved}
        for job_id, claimed in before.items():
            if job_id not in kept:
                self._apply_write_result(job_id, claimed.job.attempt, WriteResult.FENCED)

    def _release_unknown(self, lease: Lease) -> None:
        """Release jobs that only Redis knows of, at two renewals in a row: the answer to their claim was lost."""
        held = self._held()
        known = {(job_id, claimed.job.claimed_at) for job_id, claimed in held.items()}
        running = {(job.job_id, job.claimed_at) for job in lease.running}
        unknown = frozenset({*running, *lease.reserved} - known)
        lost, self._unknown = unknown & self._unknown, unknown
        if lost:
            logger.warning("claims_lost", extra={"jobs": len(lost)})
            self._claims.release(lost)


class HostAnnouncer(_Periodic):
    """Announces that this process lives, with or without models."""

    def __init__(self, announce: Callable[[], object], lease_s: float, on_death: OnDeath = end_process) -> None:
        super().__init__("host", lease_s / 3, on_death)
        self._announce = announce

    def do(self) -> None:
        """Announce it."""
        self._announce()
