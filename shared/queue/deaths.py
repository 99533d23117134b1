"""Reports the crash of a worker process to the queue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from shared.queue.redis import Redis, script


@dataclass(frozen=True, slots=True)
class Burial:
    """What the report of a crash changed.

    Attributes:
        models: models that have queued jobs because of it.
        suspects: ids of the jobs that may have caused the crash.
        failed: ids of the jobs that failed, because they were the only suspect too often.
    """

    models: tuple[str, ...]
    suspects: tuple[str, ...]
    failed: tuple[str, ...]


def bury(client: Redis, workers: Sequence[str], in_flight: Sequence[str], max_deaths: int, exit_status: str) -> Burial:
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
    return Burial(tuple(models), tuple(suspects), tuple(failed))
