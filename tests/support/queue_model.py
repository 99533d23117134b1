"""A model of the queue in Python, and its comparison with Redis."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import redis
from hypothesis.stateful import RuleBasedStateMachine, invariant

from shared.jobs.log import JobLog
from shared.jobs.record import AttemptEnd, Job, Status
from shared.jobs.store import Jobs
from shared.jobs.usage import Counters, UsageRow, UsageStore
from shared.queue.claims import Claims
from shared.queue.recovery import Reaper
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings

MODEL = "m"
WORKERS = ("w1", "w2", "w3")
NEVER = 10**6
"""Crashes that a job may cause: blame is tested elsewhere."""
LONG_AGO = 1.0
MUCH = 10**6
PERMANENT = {
    keys.TIMERS, keys.LEASES, keys.EXTENSIONS, keys.PASSED, keys.MEMORY, keys.BYTES, keys.FAILED, keys.ENDED, keys.ENDS,
    keys.ATTEMPTS, keys.TOKENS,
    keys.QUEUE + MODEL, keys.QUEUED + MODEL, keys.TURNS + MODEL, keys.SPEED + MODEL,
    *(key + worker for key in (keys.RUNNING, keys.RESERVED) for worker in WORKERS),
}  # fmt: skip
"""Keys without expiry that do not belong to one job; see `shared.redis.keys` for what bounds them."""


@dataclass
class Expected:
    """The expected state of a job.

    Attributes:
        code: its error code.
        holder: the worker that runs it or has reserved it.
        moved: whether another worker took it over, so that it must stay there for some time.
        time_is_up: whether it exceeded the limit of its timer: `start_within_s` before the first start, then the
            deadline.
    """

    owner: str
    key: str
    fingerprint: str
    status: Status = Status.QUEUED
    code: str | None = None
    attempt: int = 0
    holder: str = ""
    claimed_at: str = ""
    spare: bool = False
    moved: bool = False
    stop_as: Status | None = None
    time_is_up: bool = False
    deadline_is_up: bool = False
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

    def is_run_by(self, belief: Belief) -> bool:
        return self.runs and (self.attempt, self.claimed_at) == (belief.attempt, belief.claimed_at)

    def is_reserved_by(self, belief: Belief) -> bool:
        """Whether a belief is the current reservation."""
        is_reserved = self.status is Status.QUEUED and self.holder != ""
        return is_reserved and (self.attempt + 1, self.claimed_at) == (belief.attempt, belief.claimed_at)

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
        """End the hold of its worker, which crashed or hands it back."""
        was_running = self.runs
        self.let_go(how)
        if was_running and self.stop_as:
            self.status = Status.QUEUED
            self.end(self.stop_as)
        elif was_running:
            self.status = Status.QUEUED
            self.events.append("queued")


@dataclass(frozen=True)
class Belief:
    """A job that a worker believes to hold, rightly or wrongly."""

    job_id: str
    attempt: int
    worker: str
    claimed_at: str = ""


class ExpectedQueue(RuleBasedStateMachine):
    """The queue under test and its expected state. A subclass defines the rules."""

    def __init__(self, client: Redis) -> None:
        super().__init__()
        self.redis = client
        self.redis.flushall()
        self.jobs = Jobs(self.redis, Settings(start_within_s=3600, durable=False))
        self.claims = {name: Claims(self.redis, name) for name in WORKERS}
        self.reaper = Reaper(self.redis, NEVER, 2**20)
        self.log = JobLog(self.redis)
        self.leases: dict[str, bool] = {}
        """Worker → whether its lease is valid. An expired lease stays until it is reaped or renewed."""
        self.extensible: set[str] = set()
        """Workers whose lease an outage would extend."""
        self.expected: dict[str, Expected] = {}
        self.forgotten: list[Expected] = []
        """Deleted jobs, which still count as usage."""
        self.submitted: list[str] = []
        self.beliefs: list[Belief] = [Belief("none", 0, WORKERS[0])]
        self.raw = redis.Redis(unix_socket_path=client.connection_pool.connection_kwargs["path"])
        self.copy: tuple[dict[bytes, tuple[int, Any]], Any] | None = None

    def true_beliefs(self) -> list[Belief]:
        held = [(i, job) for i, job in self.expected.items() if job.holder]
        return [Belief(i, job.attempt + (not job.runs), job.holder, job.claimed_at) for i, job in held]

    def of(self, status: Status) -> dict[str, Expected]:
        return {job_id: job for job_id, job in self.expected.items() if job.status is status}

    def active(self) -> list[str]:
        return [job_id for job_id, job in self.expected.items() if not job.status.terminal]

    def held_by(self, worker: str, *, running: bool) -> dict[str, Expected]:
        return {i: job for i, job in self.expected.items() if job.holder == worker and job.runs == running}

    def known(self, belief: Belief) -> Expected:
        return self.expected.get(belief.job_id, Expected("", "", "", timer=False))

    # Invariants

    @invariant()
    def redis_equals_the_model(self) -> None:
        """Read everything with one call per step: no key or field is missing, wrong or superfluous."""
        own = {i: self.keys_of(i, job) for i, job in self.expected.items()}
        with self.redis.pipeline() as pipe:
            for job_id in own:
                pipe.hgetall(keys.JOB + job_id).xrange(keys.LOG + job_id).get(keys.OUTPUT + job_id)
            pipe.zrange(keys.QUEUE + MODEL, 0, -1).zrange(keys.TIMERS, 0, -1, withscores=True)
            pipe.zrange(keys.LEASES, 0, -1).hgetall(keys.BYTES).hgetall(keys.QUEUED + MODEL)
            pipe.hget(keys.CHARGES + "a", "reserved")
            pipe.keys("*")
            for worker in WORKERS:
                pipe.smembers(keys.RUNNING + worker).smembers(keys.RESERVED + worker)
            *jobs, queued, timers, leases, counted, by_owner, reserved, names = (result := pipe.execute())[
                : 3 * len(own) + 7
            ]
            held = result[3 * len(own) + 7 :]
        for n, (job_id, expected) in enumerate(self.expected.items()):
            record, log, text = jobs[3 * n : 3 * n + 3]
            self.check_record(record, expected)
            assert [(entry_id, entry["e"]) for entry_id, entry in log] == [
                (f"{n}-0", kind) for n, kind in enumerate(expected.events, 1)
            ]
            assert (job_id, str(len(log)), text or "") == (record["id"], record["seq"], expected.text)
        assert set(queued) == self.of(Status.QUEUED).keys()
        by_owner.pop("counted_at", None)
        owners = Counter(job.owner for job in self.of(Status.QUEUED).values())
        assert by_owner == {owner: str(count) for owner, count in owners.items()}
        assert dict(timers).keys() == {i for i, job in self.expected.items() if job.timer}
        assert set(leases) == self.leases.keys()
        assert held == [{*self.held_by(name, running=runs)} for name in WORKERS for runs in (True, False)]
        self.check_bytes(counted)
        charged = [record.get("charged") for record in jobs[::3] if not record.get("finished_at")]
        assert int(reserved or 0) == sum(int(tokens) for tokens in charged if tokens)
        self.check_usage({*names})
        assert queued or not {keys.TURNS + MODEL, keys.QUEUED + MODEL} & {*names}
        self.check_keys(set(names), own)

    def keys_of(self, job_id: str, job: Expected) -> set[str]:
        names = {keys.JOB + job_id, keys.LOG + job_id, f"{keys.IDEM}{job.owner}:{job.key}"}
        keeps_request = not job.status.terminal or job.status is Status.FAILED
        return (
            names | {keys.REQUEST + job_id for _ in [0] if keeps_request} | {keys.OUTPUT + job_id for _ in job.text[:1]}
        )

    def check_keys(self, present: set[str], own: dict[str, set[str]]) -> None:
        of_jobs = {name for names in own.values() for name in names}
        shared = {name for name in present if name.startswith((keys.OWNER, keys.WAKE, keys.USAGE, keys.CHARGES))}
        assert of_jobs <= present and present - of_jobs - shared <= PERMANENT
        ended = {name for i, names in own.items() if self.expected[i].status.terminal for name in names}
        names = [*sorted(of_jobs | shared)]
        with self.redis.pipeline() as pipe:
            for name in names:
                pipe.pttl(name)
            ttls = dict(zip(names, pipe.execute(), strict=True))
        assert {name for name, ttl in ttls.items() if ttl == -1} == of_jobs - ended

    def check_bytes(self, counted: dict[str, str]) -> None:
        unfinished = [job for job in self.expected.values() if not job.status.terminal]
        sums = {"total": sum(job.bytes for job in unfinished), "growth": sum(job.growth for job in unfinished)}
        sums |= {f"owner:{name}": sum(job.bytes for job in unfinished if job.owner == name) for name in "ab"}
        known = {name: int(value) for name, value in counted.items() if not name.startswith("failed")}
        assert known == {name: total for name, total in sums.items() if total}

    def check_usage(self, names: set[str]) -> None:
        """Each job that has ended counts once, with the tokens of all its attempts."""
        ended = [job for job in (*self.expected.values(), *self.forgotten) if job.status.terminal]
        for owner in "ab":
            used = sum((row.counters for row in self.usage_of(owner, names)), Counters())
            own = [job for job in ended if job.owner == owner]
            ends = Counter(job.status.value for job in own)
            assert {status: getattr(used, status) for status in ends} == ends and used.jobs == len(own)
            assert used.completion == sum(job.tokens for job in own)

    def usage_of(self, owner: str, names: set[str]) -> list[UsageRow]:
        """Return an owner's usage on all days, of which there are two at midnight."""
        days = [int(name.rpartition(":")[2]) for name in names if name.startswith(f"{keys.USAGE}{owner}:")]
        first, last = (date(1970, 1, 1) + timedelta(days=day) for day in (min(days, default=0), max(days, default=0)))
        return UsageStore(self.redis).read([owner], first, last)

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
        """Check what readers and a next attempt would read. Then end all jobs; no worker or queue holds any."""
        for job_id, expected in self.expected.items():
            job = self.jobs.get(job_id, expected.owner)
            written = self.log.written(job_id, job.last_event)
            assert (written.text, len(written.tokens)) == (expected.text, expected.tokens)
            assert self.log.ended(job_id) == expected.status.terminal
        for worker in WORKERS:
            self.claims[worker].retire()
        for job_id in self.active():
            owner = self.expected[job_id].owner
            if not self.jobs.get(job_id, owner).status.terminal:  # a job that must stop has ended by now
                self.jobs.stop(job_id, owner)
            self.jobs.forget(job_id, owner)
        remaining = self.redis.keys("*")
        assert not [
            name for name in remaining if name.startswith((keys.RUNNING, keys.RESERVED, keys.QUEUE, keys.TURNS))
        ]
        assert not self.redis.exists(keys.TIMERS, keys.LEASES, keys.EXTENSIONS) and not self.redis.hexists(
            keys.BYTES, "total"
        )
