"""Recovery of jobs whose worker is lost: the reaper, and the report of a crashed worker process."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shared.jobs.record import EndedJob
from shared.redis import keys
from shared.redis.client import Redis, script

REAP_S: Final = 1.0
"""Maximum seconds between two passes of a process. `reap.lua` treats a gap of twice this time as an outage."""
_MAX_EXPIRED: Final = 1000
"""Maximum jobs expired per pass."""
_MAX_ENDS: Final = 1000
"""Maximum ended jobs returned per call."""


class Reaper:
    """Returns jobs of expired leases to the queue and expires late jobs. Several reapers may run at once.

    Args:
        max_deaths: number of process crashes with a job as the only suspect after which the job fails.
        failed_request_bytes: maximum total size of the kept requests of ended jobs.
        keep_requests: `failed` or `all`: which ended jobs keep their request.

    Attributes:
        rest_s: seconds until the next pass is due: `REAP_S`, or less if a lease may expire earlier.
    """

    def __init__(
        self, client: Redis, max_deaths: int, failed_request_bytes: int, keep_requests: str = "failed"
    ) -> None:
        self.rest_s = REAP_S
        self._client = client
        self._reap = script(client, "reap")
        self._max_deaths = max_deaths
        self._kept = (failed_request_bytes, keep_requests)

    def reap(self) -> list[str]:
        """Make one pass. Returns the models that have queued jobs because of it."""
        self.rest_s = REAP_S
        expires_s, *models = self._reap(args=[self._max_deaths, _MAX_EXPIRED, *self._kept])
        if expires_s:
            # All processes wait for the same lease; jitter keeps them from making the pass at the same time.
            self.rest_s = min(REAP_S, max(0.05, float(expires_s)) + random.uniform(0.002, 0.03))
        return list(models)

    def take_ends(self) -> list[EndedJob]:
        """Remove and return the jobs that ended without a worker. Each one is returned to one caller only."""
        return [EndedJob.from_json(text) for text in self._client.lpop(keys.ENDS, _MAX_ENDS) or ()]


@dataclass(frozen=True, slots=True)
class CrashOutcome:
    """What the report of a crash changed in the queue.

    Attributes:
        models: models that have queued jobs because of it.
        suspects: ids of the jobs that may have caused the crash.
        failed: ids of the jobs that failed, because they were the only suspect too often.
    """

    models: tuple[str, ...]
    suspects: tuple[str, ...]
    failed: tuple[str, ...]


def report_crash(
    client: Redis, workers: Sequence[str], in_flight: Sequence[str], max_deaths: int, exit_status: str
) -> CrashOutcome:
    """Return the jobs of a crashed process to the queue, and fail the job that causes the crashes.

    Repeated reports of the same crash change nothing.

    Args:
        workers: ids of all workers of the process; their leases end.
        in_flight: ids of the jobs that the process was running.
        max_deaths: number of consecutive crashes with a job as the only suspect after which the job fails.
        exit_status: how the process ended, for the job's error message.

    Raises:
        redis.RedisError: Redis is unreachable.
    """
    crash = {
        "workers": list(workers),
        "in_flight": list(in_flight),
        "max_deaths": max_deaths,
        "exit_status": exit_status,
    }
    models, suspects, failed = script(client, "report_crash")(args=[json.dumps(crash)])
    return CrashOutcome(tuple(models), tuple(suspects), tuple(failed))
