"""The real scripts under simulated load: jobs arrive, run and end at simulated times by a simulated clock of Redis.

A worker has `slots` rows. A job takes a random time to run, whatever else runs.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from shared.jobs.limits import OwnerLimits
from shared.jobs.record import Ending, Job, Priority, Status
from shared.jobs.store import Jobs
from shared.models.registry import Registry, WorkerInfo
from shared.queue.claims import Append, ClaimedJob, Claims, Demand
from shared.redis import client as redis_client
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import MODEL, MUCH, submission
from web.cluster.snapshot import ClusterSnapshot

CLOCK = "simulated-clock"
_READ_CLOCK = f"  return tonumber(redis.call('GET', '{CLOCK}'))\n"
_WORKER = "w"


@dataclass(frozen=True, slots=True)
class Source:
    """A stream of jobs.

    Attributes:
        rate: mean number of jobs per second; the times between them are exponentially distributed.
        mean_s: mean duration of a job, exponentially distributed.
    """

    owner: str
    rate: float
    mean_s: float = 1.0
    priority: Priority = Priority.NORMAL
    limits: OwnerLimits = field(default_factory=OwnerLimits)


@dataclass(slots=True)
class Waited:
    """What was predicted for a job, and what happened."""

    source: Source
    position: int
    predicted_s: float | None
    submitted_at: float
    started_at: float | None = None

    @property
    def waited_s(self) -> float:
        assert self.started_at is not None
        return self.started_at - self.submitted_at


class Simulation:
    """One model with one worker."""

    def __init__(self, client: Redis, monkeypatch: pytest.MonkeyPatch, *, slots: int, reserve: int = 0) -> None:
        _simulate_clock(monkeypatch)
        self.now = 1_000_000.0
        self._client, self._slots, self._reserve = client, slots, reserve
        self._set_clock(self.now)
        settings = Settings(durable=False, max_queue=10**6, max_queue_per_key=10**6, queue_bytes=2**40)
        self._jobs = Jobs(client, settings)
        self._claims = Claims(client, _WORKER)
        self._claims.renew(10**9)
        self._registry = Registry(client)
        self._rows = 0
        self.waited: dict[str, Waited] = {}

    def run(self, sources: Sequence[Source], seconds: float, seed: int = 1) -> list[Waited]:
        """Simulate; return the jobs that started."""
        chance = random.Random(seed)
        end = self.now + seconds
        events: list[tuple[float, int, ClaimedJob | Source]] = []
        for number, source in enumerate(sources):
            heapq.heappush(events, (self.now + chance.expovariate(source.rate), -number - 1, source))
        serial = 0
        while events and events[0][0] < end:
            self.now, _, event = heapq.heappop(events)
            self._set_clock(self.now)
            if isinstance(event, Source):
                self._submit(event)
                heapq.heappush(events, (self.now + chance.expovariate(event.rate), -serial - 100, event))
            else:
                self._end(event)
            for claimed in self._start():
                serial += 1
                mean_s = self.waited[claimed.job.id].source.mean_s
                heapq.heappush(events, (self.now + chance.expovariate(1 / mean_s), serial, claimed))
        return [each for each in self.waited.values() if each.started_at is not None]

    def _submit(self, source: Source) -> None:
        accepted = self._jobs.create(
            submission(source.owner, priority=source.priority, limits=source.limits, max_tokens=1)
        )
        assert accepted.place is not None
        predicted_s = self._snapshot().estimated_start_s(MODEL, accepted.place, source.priority)
        self.waited[accepted.job.id] = Waited(source, accepted.place.position, predicted_s, self.now)

    def _snapshot(self) -> ClusterSnapshot:
        worker = WorkerInfo(
            id=_WORKER, node="w", host="h", pid=1, model=MODEL, state="ready", slots=self._slots, slots_used=self._rows,
            started_at=0.0, heartbeat_at=0.0, stats={"reserved_rows": self._reserve}, about={},
        )  # fmt: skip
        return ClusterSnapshot({}, (worker,), self._registry.speeds([MODEL]), taken_at=0.0)

    def _start(self) -> Iterator[ClaimedJob]:
        demand = Demand(self._slots - self._rows, MUCH, reserve=self._reserve)
        claimed = self._claims.claim(MODEL, demand).jobs if demand.rows else ()
        self._rows += len(claimed)
        self._claims.append([_row(each.job, start=True) for each in claimed])
        for each in claimed:
            self.waited[each.job.id].started_at = self.now
            yield each

    def _end(self, claimed: ClaimedJob) -> None:
        self._rows -= 1
        self._claims.append([_row(claimed.job, ending=Ending(Status.SUCCEEDED, completion_tokens=0))])

    def _set_clock(self, seconds: float) -> None:
        self._client.set(CLOCK, f"{seconds:.6f}")


def _row(job: Job, *, start: bool = False, ending: Ending | None = None) -> Append:
    return Append(job.id, job.attempt, job.claimed_at, job.last_event + 2, start=start, ending=ending)


def _simulate_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scripts that are loaded from now on read the time from `CLOCK`."""
    source = redis_client.source
    clock = (redis_client.SCRIPTS / "lib/clock.lua").read_text()
    start = clock.index("  local time = redis.call('TIME')")
    simulated = clock[:start] + _READ_CLOCK + clock[clock.index("end\n", start) :]
    monkeypatch.setattr(redis_client, "source", lambda name: source(name).replace(clock, simulated))


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
