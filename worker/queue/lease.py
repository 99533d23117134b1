"""The worker's lease, its proof of life in Redis, and the threads that renew the lease and announce the worker.

The lease must be renewed in time, no matter how slow the rest of the process is. So its thread does nothing else and
has its own connection.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from redis import RedisError

from shared.queue.claims import ClaimedJob, Claims, Lease, WriteResult
from shared.redis.client import passes
from worker.process.critical import CriticalThread, OnDeath, end_process

logger = logging.getLogger(__name__)


class PeriodicThread(CriticalThread):
    """Runs `do` periodically, also while Redis is unreachable."""

    def __init__(self, name: str, interval_s: float, on_death: OnDeath) -> None:
        super().__init__(name, on_death)
        self._interval_s = interval_s
        self._stopped = False
        self._wake = threading.Event()
        self._unreachable = False

    def stop(self) -> None:
        """End the thread after its current round, and wait for it."""
        self._stopped = True
        self._wake.set()
        if self.is_alive():
            self.join()

    def hurry(self) -> None:
        """Start the next round now."""
        self._wake.set()

    def work(self) -> None:
        """Run rounds until stopped."""
        while not self._stopped:
            started = time.monotonic()
            self.round()
            self._wake.wait(max(0.0, self._interval_s - (time.monotonic() - started)))
            self._wake.clear()

    def round(self) -> None:
        """Run one round. Log when Redis becomes unreachable, and when it is reachable again.

        Raises:
            redis.RedisError: Redis rejects the call, and would reject it again.
        """
        try:
            self.do()
        except RedisError as error:
            if not passes(error):
                raise
            if not self._unreachable:
                logger.warning("redis_unreachable", extra={"task": self.name, "reason": str(error)})
            self._unreachable = True
        else:
            if self._unreachable:
                logger.info("redis_reachable", extra={"task": self.name})
            self._unreachable = False

    def do(self) -> None:
        """Do the work of one round."""
        raise NotImplementedError


ApplyWriteResult = Callable[[str, int, WriteResult], object]
"""Called with job id, attempt and result: the engine stops the job if the result says so."""


class LeaseRenewer(PeriodicThread):
    """Renews the lease three times per lease period, and compares the jobs that Redis has for this worker with its own.

    Args:
        apply_write_result: the engine's.
        held: returns the jobs that this worker has claimed and not finished, by id.
        announce: writes the worker's card; called with True if Redis did not know the lease.
        let_lapse: returns whether the lease must not be renewed, because this process cannot continue.
    """

    def __init__(
        self,
        claims: Claims,
        apply_write_result: ApplyWriteResult,
        held: Callable[[], Mapping[str, ClaimedJob]],
        announce: Callable[[bool], object],
        lease_s: float,
        let_lapse: Callable[[], bool] = lambda: False,
        on_death: OnDeath = end_process,
    ) -> None:
        super().__init__("lease", lease_s / 3, on_death)
        self._claims = claims
        self._apply_write_result = apply_write_result
        self._held = held
        self._announce = announce
        self._lease_s = lease_s
        self._let_lapse = let_lapse
        self._unknown: frozenset[tuple[str, str]] = frozenset()  # claims: (job id, claimed_at)
        self._renewals = 0

    def do(self) -> None:
        """Renew the lease; then stop and release jobs as Redis requires."""
        if self._let_lapse():
            return
        before = self._held()  # jobs that are claimed during the renewal may be missing from its answer
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
        """Drop the jobs that other workers may have taken while the lease was lapsed."""
        if self._renewals:
            logger.warning("lease_lapsed", extra={"jobs": len(before)})
        kept = {job.job_id for job in lease.running} | {job_id for job_id, _ in lease.reserved}
        for job_id, claimed in before.items():
            if job_id not in kept:
                self._apply_write_result(job_id, claimed.job.attempt, WriteResult.FENCED)

    def _release_unknown(self, lease: Lease) -> None:
        """Release jobs that only Redis knew at two renewals in a row: the answer to their claim was lost."""
        held = self._held()
        known = {(job_id, claimed.job.claimed_at) for job_id, claimed in held.items()}
        running = {(job.job_id, job.claimed_at) for job in lease.running}
        unknown = frozenset({*running, *lease.reserved} - known)
        lost, self._unknown = unknown & self._unknown, unknown
        if lost:
            logger.warning("lost_claims_released", extra={"jobs": len(lost)})
            self._claims.release(lost)


class HostAnnouncer(PeriodicThread):
    """Announces this process, whether it has models or not."""

    def __init__(self, announce: Callable[[], object], lease_s: float, on_death: OnDeath = end_process) -> None:
        super().__init__("host", lease_s / 3, on_death)
        self._announce = announce

    def do(self) -> None:
        """Announce the process."""
        self._announce()
