"""The report of a dead worker process to the queue: who held what, and which jobs it was working on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from shared.queue.redis import Redis, script


@dataclass(frozen=True, slots=True)
class Burial:
    """What the report changed.

    Attributes:
        models: those that have waiting jobs now.
        suspects: ids of the jobs that share the blame.
        failed: ids of the jobs that failed because they were the only suspect too often.
    """

    models: tuple[str, ...]
    suspects: tuple[str, ...]
    failed: tuple[str, ...]


def bury(client: Redis, workers: Sequence[str], in_flight: Sequence[str], most_deaths: int, exit: str) -> Burial:  # noqa: A002
    """Return what the workers of a dead process held to the queue, and fail the job that is to blame.

    A second report of the same death changes nothing.

    Args:
        workers: ids of all workers of the process; their leases end.
        in_flight: ids of the jobs that the process was working on.
        most_deaths: deaths in a row that a job may be the only suspect of.
        exit: how the process ended, for the culprit's error message.

    Raises:
        redis.RedisError: Redis is away.
    """
    death = {"workers": list(workers), "in_flight": list(in_flight), "most_deaths": most_deaths, "exit": exit}
    models, suspects, failed = script(client, "bury")(args=[json.dumps(death)])
    return Burial(tuple(models), tuple(suspects), tuple(failed))
