"""The worker's proof of life, and the queue's housekeeping: two threads that look after Redis every so often.

The lease must be renewed on time whatever else is slow; so the thread that renews it does only what a renewal
asks for, and everything that may wait for the broker is the other's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from kombu.exceptions import OperationalError
from redis import RedisError

from shared.queue.claims import REAP_S, Claims, Held, Lease, Reaper, Verdict, Waiting
from shared.queue.redis import passes
from shared.queue.wakeups import TicketOffice
from worker.process.critical import OnDeath, VitalThread, end_process

logger = logging.getLogger(__name__)

Claim = tuple[str, int]
"""Job id and attempt."""


class _Periodic(VitalThread):
    """Does something every so often, and goes on when Redis or the broker is away."""

    def __init__(self, name: str, every_s: float, on_death: OnDeath) -> None:
        super().__init__(name, on_death)
        self._every_s = every_s
        self._ended = False
        self._wake = threading.Event()
        self._away = False

    def stop(self) -> None:
        """End the thread after its current round, and wait for it."""
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
        """One round; says once that what it needs is away, and once that it is back.

        Raises:
            redis.RedisError: Redis is not away, but finds a fault in what we ask.
        """
        try:
            self.do()
        except (RedisError, OperationalError) as error:
            if isinstance(error, RedisError) and not passes(error):
                raise
            if not self._away:
                logger.warning("%s: Redis or the broker is away, trying on: %s", self.name, error)
            self._away = True
        else:
            if self._away:
                logger.info("%s: Redis and the broker are back", self.name)
            self._away = False

    def do(self) -> None:
        """What there is to do."""
        raise NotImplementedError


Heed = Callable[[str, int, Verdict], object]
"""Told what Redis says of a job: id, attempt, verdict."""


class LeaseKeeper(_Periodic):
    """Renews the lease, passes stop words on, and settles what Redis and this process disagree on.

    Args:
        heed: the engine's; told what Redis says of jobs.
        held: the claims that task threads work on; they change it.
        announce: tells who we are; with True when Redis did not know us.
        max_attempts: how often a job may be lost.
        given_up: whether the lease is to lapse, because this process cannot go on.
    """

    def __init__(
        self,
        claims: Claims,
        heed: Heed,
        held: set[Claim],
        announce: Callable[[bool], object],
        lease_s: float,
        max_attempts: int,
        given_up: Callable[[], bool] = lambda: False,
        on_death: OnDeath = end_process,
    ) -> None:
        super().__init__("lease", lease_s / 3, on_death)
        self._claims = claims
        self._heed = heed
        self._held = held
        self._announce = announce
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self._given_up = given_up
        self._strangers: frozenset[Claim] = frozenset()
        self._renewals = 0
        self._renewed = threading.Condition()

    def wait_renewal(self, timeout_s: float) -> bool:
        """Wait for the next renewal; False when none came in time."""
        with self._renewed:
            seen = self._renewals
            return self._renewed.wait_for(lambda: self._renewals > seen, timeout_s)

    def do(self) -> None:
        """Renew; then act on what Redis says we hold."""
        if self._given_up():
            return
        before = frozenset(self._held)  # what is claimed during the renewal may be missing from its answer
        lease = self._claims.renew(self._lease_s)
        if not lease.unbroken:
            self._fence(before, lease)
        for job in lease.held:
            if job.stop_as is not None:
                self._heed(job.job_id, job.attempt, job.stop_as)
        with self._renewed:
            self._renewals += 1
            self._renewed.notify_all()
        self._announce(not lease.unbroken)
        self._give_back_strangers(lease.held)

    def _fence(self, before: Iterable[Claim], lease: Lease) -> None:
        """The lease had lapsed: others may have our jobs."""
        if self._renewals:
            logger.warning("the lease had lapsed")
        lost = set(before) - {(job.job_id, job.attempt) for job in lease.held}
        for job_id, attempt in lost:
            self._heed(job_id, attempt, Verdict.FENCED)

    def _give_back_strangers(self, held: Iterable[Held]) -> None:
        """What Redis says we hold and nobody here knows of, twice in a row.

        The answer to its claim was lost or could not be read; so it counts as a loss, or that could go on for ever.
        """
        strangers = frozenset((job.job_id, job.attempt) for job in held) - self._held
        lost, self._strangers = strangers & self._strangers, strangers
        if lost:
            logger.warning("handing back %d jobs whose claims were lost", len(lost))
            self._claims.release(lost, max_attempts=self._max_attempts)  # the housekeepers send their tickets


class HostKeeper(_Periodic):
    """Tells that this process lives, whatever models it has."""

    def __init__(self, announce: Callable[[], object], lease_s: float, on_death: OnDeath = end_process) -> None:
        super().__init__("host", lease_s / 3, on_death)
        self._announce = announce

    def do(self) -> None:
        """Tell it."""
        self._announce()


class Housekeeper(_Periodic):
    """Takes back what dead workers held, and sends tickets where they are missing. Every process may run one."""

    def __init__(self, reaper: Reaper, tickets: TicketOffice, on_death: OnDeath = end_process) -> None:
        super().__init__("housekeeper", REAP_S, on_death)
        self._reaper = reaper
        self._tickets = tickets

    def round(self) -> None:
        """One round. Jobs can be worked on without it, so a fault in it does not end the process."""
        try:
            super().round()
        except RedisError:
            logger.exception("housekeeping failed")

    def do(self) -> None:
        """Reap, and send what tickets that takes."""
        self._every_s = REAP_S
        waiting: list[Waiting] = self._reaper.reap()
        self._every_s = self._reaper.rest_s
        if waiting:
            logger.info("%d jobs of lost workers wait again", len(waiting))
            self._tickets.send_all(waiting)
        self._tickets.rescue()
