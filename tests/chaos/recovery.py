"""How long the jobs that a fault hits stand still."""

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
from tests.chaos.fleet import Fleet

_POLL_S = 0.01
_LONGEST_S = 60.0
_TELLING = (EventKind.CHUNK, EventKind.DONE)


@dataclass(slots=True)
class Watch:
    """What a strike says of itself: one that hit nothing is not measured."""

    hit: bool = False


class Recovery:
    """Watches the jobs of a worker, or all that run, from a fault until each has its next token (or its end).

    Attributes:
        seconds: for each kind of fault, the time each job stood still.
        warm: of those hit with their worker, the times of jobs that another worker with a free slot for each could
            take over at once.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.warm: defaultdict[str, list[float]] = defaultdict(list)
        self._fleet = fleet
        self._watchers: list[threading.Thread] = []

    @contextmanager
    def watching(self, kind: str, worker: int | None = None) -> Iterator[Watch]:
        """Measure from the end of the block, which strikes; without a worker, all jobs that run are watched."""
        watch = Watch()
        victim = None if worker is None else self._fleet.card(worker)
        others = [card for card in self._fleet.ready() if victim and card.id != victim.id]
        yield watch
        if watch.hit and (worker is None or victim is not None):  # a worker that is not ready has no jobs
            watcher = threading.Thread(target=self._watch, args=(kind, victim, others, time.monotonic()), daemon=True)
            watcher.start()
            self._watchers.append(watcher)

    def wait(self) -> None:
        """Until every job watched has gone on."""
        for watcher in self._watchers:
            watcher.join()

    def _watch(self, kind: str, victim: WorkerInfo | None, others: list[WorkerInfo], struck_at: float) -> None:
        standing = self._last_events(self._held(victim))
        room = sum(card.slots - card.slots_used for card in others)
        took_over = bool(victim) and room >= len(standing)
        while standing and time.monotonic() - struck_at < _LONGEST_S:
            time.sleep(_POLL_S)
            for job_id in self._gone_on(standing):
                del standing[job_id]
                self._note(kind, time.monotonic() - struck_at, took_over)
        for _ in standing:
            self._note(kind, _LONGEST_S, took_over)

    def _note(self, kind: str, seconds: float, took_over: bool) -> None:
        self.seconds[kind].append(seconds)
        if took_over:
            self.warm[kind].append(seconds)

    def _held(self, victim: WorkerInfo | None) -> list[str]:
        """Jobs that run: on the victim, or anywhere."""
        while True:
            try:
                names = [victim.id] if victim else self._fleet.redis.zrange(keys.LEASES, 0, -1)
                return [job for name in names for job in self._fleet.redis.smembers(keys.RUNNING + name)]
            except redis.RedisError:
                time.sleep(_POLL_S)

    def _last_events(self, jobs: list[str]) -> dict[str, int]:
        """The number of each job's newest event."""
        while True:
            try:
                newest = self._newest(jobs)
                return {job: newest[job][0] for job in jobs if job in newest}
            except redis.RedisError:
                time.sleep(_POLL_S)

    def _gone_on(self, standing: Mapping[str, int]) -> list[str]:
        try:
            newest = self._newest(list(standing))
        except redis.RedisError:
            return []
        return [
            job
            for job, last in standing.items()
            if job not in newest or (newest[job][0] > last and newest[job][1] in _TELLING)
        ]

    def _newest(self, jobs: list[str]) -> dict[str, tuple[int, str]]:
        """Number and kind of each job's newest event."""
        with self._fleet.redis.pipeline(transaction=False) as pipe:
            for job in jobs:
                pipe.xrevrange(keys.LOG + job, count=1)
            answers = pipe.execute()
        found = zip(jobs, answers, strict=True)
        return {job: (int(entries[0][0].split("-")[0]), entries[0][1]["e"]) for job, entries in found if entries}
