"""Jobs left to the workers that have their beginnings: those workers are told, and soon after, everybody.

The first ticket goes to that worker's own queue, and another to the queue of all when the job is anybody's, if anything
waits then. So a job is delayed by no more than that when the one it was left to is full, frozen or dead. Should this
process be gone by then, the rescue sends it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Final

from kombu.exceptions import OperationalError
from redis import RedisError

from shared.queue.claims import Left
from shared.queue.wakeups import TicketOffice

logger = logging.getLogger(__name__)

_MARGIN_S: Final = 0.005
"""A ticket that came too early would find the job still left to another, and be of no use."""


class Caller:
    """Sends the tickets for jobs that are left to others."""

    def __init__(self, tickets: TicketOffice) -> None:
        self._tickets = tickets

    def call(self, model: str, jobs: Sequence[Left]) -> None:
        """Tell their workers at once; and everybody, when it is time, without making the caller wait."""
        due = time.monotonic() + _MARGIN_S
        threading.Thread(target=self._remind, args=(model, jobs, due), name="reminder", daemon=True).start()
        try:
            for job in jobs:
                self._tickets.send(model, job.job_id, job.node)
        except (RedisError, OperationalError) as error:
            logger.warning("no ticket sent: Redis or the broker is away: %s", error)

    def _remind(self, model: str, jobs: Sequence[Left], due: float) -> None:
        try:
            for job in sorted(jobs, key=lambda job: job.seconds):
                # In a thread of its own, which has nothing else to do and may end with the process at any time.
                time.sleep(max(0.0, due + job.seconds - time.monotonic()))
                self._tickets.remind(model, job.job_id)
        except (RedisError, OperationalError) as error:
            logger.warning("no ticket sent: Redis or the broker is away: %s", error)  # the rescue will
