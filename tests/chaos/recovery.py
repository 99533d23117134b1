"""Measures how long faults interrupt the jobs that they affect."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import redis

from shared.jobs.log import EventKind
from shared.models.registry import WorkerInfo
from shared.redis import keys
from tests.chaos.stack import ChaosStack

_POLL_S = 0.01
_MAX_S = 60.0
_PROGRESS = (EventKind.CHUNK, EventKind.DONE)
"""Events that show progress of a job."""


@dataclass(slots=True)
class Measurement:
    """A measurement of one fault. It is discarded if the fault hit no target."""

    hit: bool = False


class Recovery:
    """Watches the jobs of a worker, or all running jobs, from a fault until each has its next token or its end.

    Attributes:
        seconds: for each kind of fault, how long each job was interrupted.
        warm: the same for jobs of a hit worker that another ready worker had free slots for.
    """

    def __init__(self, stack: ChaosStack) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.warm: defaultdict[str, list[float]] = defaultdict(list)
        self._stack = stack
        self._threads: list[threading.Thread] = []

    @contextmanager
    def measuring(self, kind: str, worker: int | None = None) -> Iterator[Measurement]:
        """Measure from the end of the block, which injects the fault; without a worker, watch all running jobs."""
        measurement = Measurement()
        victim = None if worker is None else self._stack.worker_info(worker)
        others = [info for info in self._stack.ready_workers() if victim and info.id != victim.id]
        yield measurement
        if measurement.hit and (worker is None or victim is not None):  # a worker that is not ready has no jobs
            thread = threading.Thread(target=self._watch, args=(kind, victim, others, time.monotonic()), daemon=True)
            thread.start()
            self._threads.append(thread)

    def wait(self) -> None:
        """Wait until every watched job has continued."""
        for thread in self._threads:
            thread.join()

    def _watch(self, kind: str, victim: WorkerInfo | None, others: list[WorkerInfo], injected_at: float) -> None:
        interrupted = self._last_events(self._running_jobs(victim))
        free_slots = sum(info.slots - info.slots_used for info in others)
        takeover = bool(victim) and free_slots >= len(interrupted)
        while interrupted and time.monotonic() - injected_at < _MAX_S:
            time.sleep(_POLL_S)
            for job_id in self._continued(interrupted):
                del interrupted[job_id]
                self._record(kind, time.monotonic() - injected_at, takeover)
        for _ in interrupted:
            self._record(kind, _MAX_S, takeover)

    def _record(self, kind: str, seconds: float, takeover: bool) -> None:
        self.seconds[kind].append(seconds)
        if takeover:
            self.warm[kind].append(seconds)

    def _running_jobs(self, worker: WorkerInfo | None) -> list[str]:
        """Return the running jobs of a worker, or of all workers. Waits while Redis is unreachable."""
        while True:
            try:
                workers = [worker.id] if worker else self._stack.redis.zrange(keys.LEASES, 0, -1)
                return [job for each in workers for job in self._stack.redis.smembers(keys.RUNNING + each)]
            except redis.RedisError:
                time.sleep(_POLL_S)

    def _last_events(self, jobs: list[str]) -> dict[str, int]:
        """Return the number of each job's latest event. Waits while Redis is unreachable."""
        while True:
            try:
                latest = self._latest_events(jobs)
                return {job: latest[job][0] for job in jobs if job in latest}
            except redis.RedisError:
                time.sleep(_POLL_S)

    def _continued(self, interrupted: Mapping[str, int]) -> list[str]:
        try:
            latest = self._latest_events(list(interrupted))
        except redis.RedisError:
            return []
        return [
            job
            for job, last in interrupted.items()
            if job not in latest or (latest[job][0] > last and latest[job][1] in _PROGRESS)
        ]

    def _latest_events(self, jobs: list[str]) -> dict[str, tuple[int, str]]:
        """Return number and kind of each job's latest event."""
        with self._stack.redis.pipeline(transaction=False) as pipe:
            for job in jobs:
                pipe.xrevrange(keys.LOG + job, count=1)
            replies = pipe.execute()
        logs = zip(jobs, replies, strict=True)
        return {job: (int(entries[0][0].split("-")[0]), entries[0][1]["e"]) for job, entries in logs if entries}
