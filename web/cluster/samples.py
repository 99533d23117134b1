"""Samples of the service's state over the last hour, for plots.

One process takes them, the background process that leads, and they are in Redis. So the figures are the same whichever
API process answers, and restarts lose nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, NamedTuple, Self

from shared.models.registry import Registry, WorkerInfo
from shared.redis import keys
from shared.redis.client import Redis
from shared.wire import known_fields
from web.cluster.queues import depths

INTERVAL_S: Final = 30.0
KEPT: Final = 120
"""Samples of one hour."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Two percentiles of a duration in seconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """Return the percentiles by the nearest-rank method; None without values."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p99 = (ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in (0.5, 0.99))
        return cls(round(p50, 6), round(p99, 6))


@dataclass(frozen=True, slots=True)
class Sample:
    """The state at one moment, and what happened since the sample before.

    Attributes:
        at: time by Redis's clock, in seconds since the epoch.
        waiting: jobs in the queues, by class.
        running, slots: occupied rows, and rows, of all workers.
        tokens_per_s: tokens that all workers generated per second, over the last minute.
        memory_bytes: memory that MLX uses in all worker processes.
        ended: jobs that ended since the last sample, by status.
        ttft: time from submission to the first token, of these jobs.
        itl: mean time between the tokens of a job, of these jobs.
    """

    at: float
    waiting: dict[str, int] = field(default_factory=dict)
    running: int = 0
    slots: int = 0
    tokens_per_s: float = 0.0
    memory_bytes: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    ttft: Percentiles | None = None
    itl: Percentiles | None = None

    def to_json(self) -> str:
        """Encode as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse the output of `to_json`, also that of another version."""
        data = known_fields(cls, json.loads(text))
        for name in ("ttft", "itl"):
            data[name] = Percentiles(**data[name]) if data.get(name) else None
        return cls(**data)


class _End(NamedTuple):
    """A job that ended; durations in seconds, None if unknown."""

    status: str
    ttft_s: float | None
    itl_s: float | None

    @classmethod
    def parse(cls, entry: str) -> _End:
        """Parse an entry of `lib/job.lua`: status, time to the first token, total time, tokens; `-` if unknown."""
        status, first, total, tokens = entry.split()
        ttft_s = None if first == "-" else float(first)
        intervals = 0 if tokens == "-" else int(tokens) - 1
        known = ttft_s is not None and total != "-" and intervals > 0
        return cls(status, ttft_s, (float(total) - (ttft_s or 0.0)) / intervals if known else None)


class Samples:
    """The samples in Redis. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._registry = Registry(client)

    def recent(self) -> list[Sample]:
        """Return the samples of the last hour, oldest first."""
        now, _ = self._client.time()
        samples = [Sample.from_json(text) for text in self._client.lrange(keys.SAMPLES, -KEPT, -1)]
        return [each for each in samples if each.at > now - KEPT * INTERVAL_S]

    def take(self) -> Sample:
        """Take a sample and store it. Only the leader calls this: each ended job is counted in one sample."""
        now, workers = self._registry.workers_now()
        sample = self._sample(now, workers, self._take_ends())
        with self._client.pipeline() as pipe:
            pipe.rpush(keys.SAMPLES, sample.to_json())
            pipe.ltrim(keys.SAMPLES, -KEPT, -1)
            pipe.execute()
        return sample

    def _sample(self, now: float, workers: Sequence[WorkerInfo], ends: Sequence[_End]) -> Sample:
        waiting: dict[str, int] = {}
        for depth in depths(self._client, sorted(self._registry.known_models())):
            waiting[depth.priority.label] = waiting.get(depth.priority.label, 0) + depth.waiting
        ended: dict[str, int] = {}
        for end in ends:
            ended[end.status] = ended.get(end.status, 0) + 1
        return Sample(
            at=now,
            waiting=waiting,
            running=sum(worker.slots_used for worker in workers),
            slots=sum(worker.slots for worker in workers),
            tokens_per_s=round(sum(worker.stats.get("tokens_per_s", 0.0) for worker in workers), 1),
            memory_bytes=memory_bytes(workers),
            ended=ended,
            ttft=Percentiles.of([end.ttft_s for end in ends if end.ttft_s is not None]),
            itl=Percentiles.of([end.itl_s for end in ends if end.itl_s is not None]),
        )

    def _take_ends(self) -> list[_End]:
        with self._client.pipeline() as pipe:
            pipe.lrange(keys.RECENT_ENDS, 0, -1)
            pipe.delete(keys.RECENT_ENDS)
            entries, _ = pipe.execute()
        return [_End.parse(entry) for entry in entries]


def memory_bytes(workers: Sequence[WorkerInfo]) -> int:
    """Return the memory that MLX uses in all worker processes. All models of a process report the same number."""
    by_process = {worker.node: worker.stats.get("memory_active_bytes", 0.0) for worker in workers}
    return round(sum(by_process.values()))
