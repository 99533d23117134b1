"""Samples of the service's state over the last hour, for plots.

One process takes them, the background process that leads, and they are in Redis. So the figures are the same whichever
API process answers, and restarts lose nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Final, Self

from shared.histogram import quantile
from shared.models.registry import Registry, WorkerInfo
from shared.queue.depths import QueueDepths
from shared.redis import keys
from shared.redis.client import Redis
from shared.wire import known_fields

INTERVAL_S: Final = 30.0
KEPT: Final = 120
"""Samples of one hour."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Two percentiles of a duration in seconds."""

    p50: float
    p99: float


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
        ttft: time from submission to the first token, of the first tokens since the last sample.
        itl: time between two tokens of a job, of the tokens since the last sample.
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


@dataclass(frozen=True, slots=True)
class _Reading:
    """Counters that only grow, at one moment: what happened between two readings is their difference.

    Attributes:
        ended: jobs that ended, by status.
        latencies: observations per bucket of each histogram, by worker, name and class, after the bounds.
    """

    ended: Counter[str]
    latencies: dict[tuple[str, str, str], tuple[tuple[float, ...], list[int]]]

    @classmethod
    def of(cls, ended: Mapping[tuple[str, str], int], workers: Sequence[WorkerInfo]) -> Self:
        """Read the counters."""
        by_status: Counter[str] = Counter()
        for (_, status), count in ended.items():
            by_status[status] += count
        histograms = ((worker.id, each) for worker in workers for each in worker.histograms)
        return cls(by_status, {(worker, e.name, e.priority): (e.bounds, e.counts) for worker, e in histograms})

    def percentiles(self, before: _Reading, name: str) -> Percentiles | None:
        """Return the percentiles of a latency since an earlier reading; None if there were no observations."""
        sums: Counter[float] = Counter()
        for key, (bounds, counts) in self.latencies.items():
            if key[1] == name:
                _, earlier = before.latencies.get(key, (bounds, [0] * len(counts)))
                sums.update({bound: new - old for bound, new, old in zip((*bounds, inf), counts, earlier, strict=True)})
        edges = sorted(sums)
        counts = [sums[edge] for edge in edges]
        p50, p99 = (quantile(share, edges[:-1], counts) for share in (0.5, 0.99)) if edges else (None, None)
        return None if p50 is None or p99 is None else Percentiles(round(p50, 6), round(p99, 6))


class Samples:
    """The samples in Redis. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._registry = Registry(client)
        self._depths = QueueDepths(client)
        self._last: _Reading | None = None

    def recent(self) -> list[Sample]:
        """Return the samples of the last hour, oldest first."""
        now, _ = self._client.time()
        samples = [Sample.from_json(text) for text in self._client.lrange(keys.SAMPLES, -KEPT, -1)]
        return [each for each in samples if each.at > now - KEPT * INTERVAL_S]

    def take(self) -> Sample:
        """Take a sample and store it. Only the leader calls this; its first sample has no ends and latencies."""
        now, workers = self._registry.workers_now()
        reading = _Reading.of(self._registry.ended(), workers)
        sample = self._sample(now, workers, reading, self._last or reading)
        self._last = reading
        with self._client.pipeline() as pipe:
            pipe.rpush(keys.SAMPLES, sample.to_json())
            pipe.ltrim(keys.SAMPLES, -KEPT, -1)
            pipe.execute()
        return sample

    def _sample(self, now: float, workers: Sequence[WorkerInfo], reading: _Reading, before: _Reading) -> Sample:
        waiting: Counter[str] = Counter()
        for depth in self._depths.read(sorted(self._registry.known_models())):
            waiting[depth.priority.label] += depth.waiting
        return Sample(
            at=now,
            waiting=dict(waiting),
            running=sum(worker.slots_used for worker in workers),
            slots=sum(worker.slots for worker in workers),
            tokens_per_s=tokens_per_s(workers),
            memory_bytes=memory_bytes(workers),
            ended=dict(reading.ended - before.ended),
            ttft=reading.percentiles(before, "time_to_first_token"),
            itl=reading.percentiles(before, "inter_token_latency"),
        )


def tokens_per_s(workers: Sequence[WorkerInfo]) -> float:
    """Return how many tokens all workers generated per second, over the last minute."""
    return round(sum(worker.stats.get("tokens_per_s", 0.0) for worker in workers), 1)


def memory_bytes(workers: Sequence[WorkerInfo]) -> int:
    """Return the memory that MLX uses in all worker processes. All models of a process report the same number."""
    by_process = {worker.node: worker.stats.get("memory_active_bytes", 0.0) for worker in workers}
    return round(sum(by_process.values()))
