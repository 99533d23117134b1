"""What the queue must look like, and the checks that hold it against what Redis holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import redis
from hypothesis.stateful import RuleBasedStateMachine, invariant

from shared.jobs.log import JobLog
from shared.jobs.record import AttemptEnd, Job, Status
from shared.jobs.store import Jobs
from shared.queue import keys
from shared.queue.claims import Claims, Reaper
from shared.queue.redis import Redis
from shared.settings import Settings

MODEL = "m"
WORKERS = ("w1", "w2", "w3")
NEVER = 10**6
"""Deaths that a job may cause: who is to blame is another test's matter."""
LONG_AGO = 1.0
MUCH = 10**6
PERMANENT = {
    keys.TIMERS, keys.LEASES, keys.EXTENSIONS, keys.PASSED, keys.MEMORY, keys.BYTES, keys.FAILED, keys.ENDED, keys.ENDS,
    keys.QUEUE + MODEL, keys.TURNS + MODEL, keys.SPEED + MODEL,
    *(key + worker for key in (keys.RUNNING, keys.RESERVED) for worker in WORKERS),
}  # fmt: skip
"""Keys without a TTL that are not one job's; `shared.queue.keys` says what empties or bounds them."""


@dataclass
class Expected:
    """What a job must look like."""

    owner: str
    key: str
    fingerprint: str
    status: Status = Status.QUEUED
    code: str | None = None
    attempt: int = 0
    holder: str = ""
    """Who runs it or has reserved it."""
    claimed_at: str = ""
    spare: bool = False
    moved: bool = False
    """Whether it was taken over: it stays for a while."""
    stop_as: Status | None = None
    time_is_up: bool = False
    """For what its timer stands for: the time to start before the first start, the deadline."""
    timer: bool = True
    text: str = ""
    tokens: int = 0
    bytes: int = 0
    growth: int = 0
    events: list[str] = field(default_factory=lambda: ["queued"])
    history: list[tuple[int, str, AttemptEnd | None]] = field(default_factory=list)

    @property
    def due(self) -> bool:
        return self.timer and self.time_is_up

    @property
    def runs(self) -> bool:
        return self.status is Status.RUNNING

    def is_run_by(self, grip: Grip) -> bool:
        return self.runs and (self.attempt, self.claimed_at) == (grip.attempt, grip.claimed_at)

    def is_reserved_by(self, grip: Grip) -> bool:
        """Whether the grip is the present reservation."""
        waits = self.status is Status.QUEUED and self.holder != ""
        return waits and (self.attempt + 1, self.claimed_at) == (grip.attempt, grip.claimed_at)

    def reserve(self, worker: str, claimed_at: str, spare: bool) -> None:
        self.moved = self.moved or self.holder != ""
        self.holder, self.claimed_at, self.spare = worker, claimed_at, spare

    def start(self) -> None:
        self.events.append("resumed" if self.attempt else "started")
        self.status, self.attempt, self.spare, self.moved = Status.RUNNING, self.attempt + 1, False, False
        if self.time_is_up and self.attempt == 1 and not self.deadline_is_up:
            self.time_is_up = False
        self.timer = True
        self.history.append((self.attempt, self.holder, None))

    deadline_is_up: bool = False

    def let_go(self, how: AttemptEnd) -> None:
        if self.runs:
            self.history[-1] = (self.attempt, self.holder, how)
        self.holder, self.spare, self.moved = "", False, False

    def end(self, status: Status, code: str | None = None) -> None:
        self.let_go(AttemptEnd.ENDED)
        if status is Status.EXPIRED:
            code = "deadline_exceeded" if self.attempt else "start_timeout"
        self.status, self.code, self.timer = status, code, False
        self.events.append("done")

    def give_up(self, how: AttemptEnd) -> None:
        """Its worker is gone, or gives it back."""
        ran = self.runs
        self.let_go(how)
        if ran and self.stop_as:
            self.status = Status.QUEUED
            self.end(self.stop_as)
        elif ran:
            self.status = Status.QUEUED
            self.events.append("queued")


@dataclass(frozen=True)
class Grip:
    """What a worker believes to hold; it may be wrong, and it may not know of it."""

    job_id: str
    attempt: int
    worker: str
    claimed_at: str = ""


class ExpectedQueue(RuleBasedStateMachine):
    """The queue under test and what it must look like; the rules come with a subclass."""

    def __init__(self, client: Redis) -> None:
        super().__init__()
        self.redis = client
        self.redis.flushall()
        self.jobs = Jobs(self.redis, Settings(start_within_s=3600, durable=False))
        self.claims = {name: Claims(self.redis, name) for name in WORKERS}
        self.reaper = Reaper(self.redis, NEVER, 2**20)
        self.log = JobLog(self.redis)
        self.leases: dict[str, bool] = {}
        """Whether it holds still; a lapsed one is there until it is reaped or renewed."""
        self.graced: set[str] = set()
        """Whose lease gets its full time once more after an outage."""
        self.expected: dict[str, Expected] = {}
        self.made: list[str] = []
        self.grips: list[Grip] = [Grip("none", 0, WORKERS[0])]
        self.raw = redis.Redis(unix_socket_path=client.connection_pool.connection_kwargs["path"])
        self.copy: tuple[dict[bytes, tuple[int, Any]], Any] | None = None

    def right_grips(self) -> list[Grip]:
        held = [(i, job) for i, job in self.expected.items() if job.holder]
        return [Grip(i, job.attempt + (not job.runs), job.holder, job.claimed_at) for i, job in held]

    def of(self, status: Status) -> dict[str, Expected]:
        return {job_id: job for job_id, job in self.expected.items() if job.status is status}

    def active(self) -> list[str]:
        return [job_id for job_id, job in self.expected.items() if not job.status.terminal]

    def held_by(self, worker: str, *, running: bool) -> dict[str, Expected]:
        return {i: job for i, job in self.expected.items() if job.holder == worker and job.runs == running}

    def known(self, grip: Grip) -> Expected:
        return self.expected.get(grip.job_id, Expected("", "", "", timer=False))

    # What always holds

    @invariant()
    def all_is_as_expected(self) -> None:
        """One look at Redis a step: nothing is missing, nothing is wrong, nothing is left over."""
        own = {i: self.keys_of(i, job) for i, job in self.expected.items()}
        with self.redis.pipeline() as pipe:
            for job_id in own:
                pipe.hgetall(keys.JOB + job_id).xrange(keys.LOG + job_id).get(keys.OUTPUT + job_id)
            pipe.zrange(keys.QUEUE + MODEL, 0, -1).zrange(keys.TIMERS, 0, -1, withscores=True)
            pipe.zrange(keys.LEASES, 0, -1).hgetall(keys.BYTES).keys("*")
            for worker in WORKERS:
                pipe.smembers(keys.RUNNING + worker).smembers(keys.RESERVED + worker)
            *found, waiting, timers, leases, counted, there = (result := pipe.execute())[: 3 * len(own) + 5]
            held = result[3 * len(own) + 5 :]
        for n, (job_id, expected) in enumerate(self.expected.items()):
            record, log, text = found[3 * n : 3 * n + 3]
            self.check_record(record, expected)
            assert [(entry_id, entry["e"]) for entry_id, entry in log] == [
                (f"{n}-0", kind) for n, kind in enumerate(expected.events, 1)
            ]
            assert (job_id, str(len(log)), text or "") == (record["id"], record["seq"], expected.text)
        assert set(waiting) == self.of(Status.QUEUED).keys()
        assert dict(timers).keys() == {i for i, job in self.expected.items() if job.timer}
        assert set(leases) == self.leases.keys()
        assert held == [{*self.held_by(name, running=runs)} for name in WORKERS for runs in (True, False)]
        self.check_bytes(counted)
        assert waiting or keys.TURNS + MODEL not in there
        self.check_keys(set(there), own)

    def keys_of(self, job_id: str, job: Expected) -> set[str]:
        names = {keys.JOB + job_id, keys.LOG + job_id, f"{keys.IDEM}{job.owner}:{job.key}"}
        keeps_request = not job.status.terminal or job.status is Status.FAILED
        return (
            names | {keys.REQUEST + job_id for _ in [0] if keeps_request} | {keys.OUTPUT + job_id for _ in job.text[:1]}
        )

    def check_keys(self, there: set[str], own: dict[str, set[str]]) -> None:
        of_jobs = {name for names in own.values() for name in names}
        shared = {name for name in there if name.startswith((keys.OWNER, keys.WAKE))}
        assert of_jobs <= there and there - of_jobs - shared <= PERMANENT
        ended = {name for i, names in own.items() if self.expected[i].status.terminal for name in names}
        names = [*sorted(of_jobs | shared)]
        with self.redis.pipeline() as pipe:
            for name in names:
                pipe.pttl(name)
            lives = dict(zip(names, pipe.execute(), strict=True))
        assert {name for name, life in lives.items() if life == -1} == of_jobs - ended

    def check_bytes(self, counted: dict[str, str]) -> None:
        unfinished = [job for job in self.expected.values() if not job.status.terminal]
        sums = {"total": sum(job.bytes for job in unfinished), "growth": sum(job.growth for job in unfinished)}
        sums |= {f"owner:{name}": sum(job.bytes for job in unfinished if job.owner == name) for name in "ab"}
        known = {name: int(value) for name, value in counted.items() if not name.startswith("failed")}
        assert known == {name: total for name, total in sums.items() if total}

    def check_record(self, record: dict[str, str], expected: Expected) -> None:
        job = Job.from_record(record)
        assert (job.status, job.error_code, job.attempt) == (expected.status, expected.code, expected.attempt)
        assert (record["worker"], "spare" in record) == (expected.holder, expected.spare)
        assert [(each.number, each.worker, each.how) for each in job.history] == expected.history[-20:]
        assert (job.started_at is None) == (expected.attempt == 0)
        assert (job.finished_at is not None) == expected.status.terminal
        if expected.status.terminal and expected.attempt:
            assert job.completion_tokens == expected.tokens

    def teardown(self) -> None:
        """What readers and the next attempt make of it; and once all has ended, nothing is held."""
        for job_id, expected in self.expected.items():
            job = self.jobs.get(job_id, expected.owner)
            written = self.log.written(job_id, job.last_event)
            assert (written.text, len(written.tokens)) == (expected.text, expected.tokens)
            assert self.log.ended(job_id) == expected.status.terminal
        for worker in WORKERS:
            self.claims[worker].retire()
        for job_id in self.active():
            owner = self.expected[job_id].owner
            if not self.jobs.get(job_id, owner).status.terminal:  # one that was asked to stop has ended by now
                self.jobs.stop(job_id, owner)
            self.jobs.forget(job_id, owner)
        left = self.redis.keys("*")
        assert not [name for name in left if name.startswith((keys.RUNNING, keys.RESERVED, keys.QUEUE, keys.TURNS))]
        assert not self.redis.exists(keys.TIMERS, keys.LEASES, keys.EXTENSIONS) and not self.redis.hexists(
            keys.BYTES, "total"
        )
