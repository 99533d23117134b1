"""How long the queues are, and how old their oldest jobs: by model and priority class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shared.jobs.record import Priority
from shared.redis import keys
from shared.redis.client import Redis

CLASS_WIDTH: Final = 10**12
"""Score in a queue = class times this, plus the turn (`lib/job.lua`)."""
_LOOKED_AT: Final = 500
"""Jobs at the front of a class among which the oldest is looked for. Each API key's oldest job is near the front,
because turns are fair between keys."""
_TIME_IN_ID: Final = slice(4, 20)
"""Where a job's id has its time of creation, in nanoseconds and hexadecimal."""


@dataclass(frozen=True, slots=True)
class Depth:
    """The waiting jobs of a model in one class.

    Attributes:
        oldest_at: when the oldest of them was created, in seconds since the epoch.
    """

    model: str
    priority: Priority
    waiting: int
    oldest_at: float


def depths(client: Redis, models: Sequence[str]) -> list[Depth]:
    """Return the classes with waiting jobs, by model and class."""
    classes = [(model, priority) for model in models for priority in Priority]
    with client.pipeline(transaction=False) as pipe:
        for model, priority in classes:
            low, high = priority * CLASS_WIDTH, f"({(priority + 1) * CLASS_WIDTH}"
            pipe.zcount(keys.QUEUE + model, low, high)
            pipe.zrange(keys.QUEUE + model, low, high, byscore=True, offset=0, num=_LOOKED_AT)
        replies = pipe.execute()
    counted = zip(classes, replies[::2], replies[1::2], strict=True)
    return [
        Depth(model, priority, int(count), min(map(created_at, ids)))
        for (model, priority), count, ids in counted
        if ids
    ]


def created_at(job_id: str) -> float:
    """Return the time of creation that is in a job's id, in seconds since the epoch; 0 if it has another form."""
    try:
        return int(job_id[_TIME_IN_ID], 16) / 1e9
    except ValueError:
        return 0.0
