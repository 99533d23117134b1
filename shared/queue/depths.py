"""How many jobs wait, and for how long, by model and class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from shared.jobs.record import Priority
from shared.redis.client import Redis, script


class QueueDepth(NamedTuple):
    """The queued jobs of one class of a model.

    Attributes:
        waiting: number of jobs, at least 1.
        oldest_s: age of the oldest one in seconds. Estimated if more than 100 API keys have waiting jobs.
    """

    model: str
    priority: Priority
    waiting: int
    oldest_s: float


class QueueDepths:
    """Reads the depths of queues. Its method raises `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis) -> None:
        self._depths = script(client, "depths")

    def read(self, models: Iterable[str]) -> list[QueueDepth]:
        """Return the depth of each class of these models that has waiting jobs."""
        flat = self._depths(args=[*models])
        rows = zip(flat[::4], flat[1::4], flat[2::4], flat[3::4], strict=True)
        return [QueueDepth(model, Priority.read(int(cls)), int(n), float(age)) for model, cls, n, age in rows]
