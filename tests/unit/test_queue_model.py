"""The scripts against a model in Python: whatever workers, owners and the reaper do in whatever order."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import fakeredis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from shared.claims import Append, Claims, NoLease, Reaper, Verdict
from shared.errors import Conflict
from shared.jobs import Ending, Generation, Jobs, Sampling, Status, Submission
from shared.log import EventKind, JobLog
from shared.settings import Settings

MODEL = "m"
WORKERS = ("w1", "w2")
MAX_ATTEMPTS = 3


@dataclass
class Expected:
    """What a job must look like."""

    owner: str
    status: Status = Status.QUEUED
    attempt: int = 0
    losses: int = 0
    holder: str = ""
    stopping: bool = False
    text: str = ""
    events: list[str] = field(default_factory=lambda: ["queued"])

    @property
    def alone(self) -> bool:
        return self.losses >= MAX_ATTEMPTS - 1

    def end(self, status: Status) -> None:
        self.status, self.holder = status, ""
        self.events.append("done")

    def lose(self) -> None:
        self.losses += 1
        if self.losses >= MAX_ATTEMPTS:
            self.end(Status.FAILED)
        else:
            self.wait_again()

    def wait_again(self) -> None:
        if self.stopping:
            self.end(Status.CANCELLED)
        else:
            self.status, self.holder = Status.QUEUED, ""
            self.events.append("queued")


@dataclass(frozen=True)
class Grip:
    """What a worker believes to hold; it may be wrong."""

    job_id: str
    attempt: int
    worker: str


class Queue(RuleBasedStateMachine):
    jobs_made = Bundle("jobs_made")
    grips = Bundle("grips")

    def __init__(self) -> None:
        super().__init__()
        self.redis = fakeredis.FakeRedis(decode_responses=True)
        self.jobs = Jobs(self.redis, Settings(_env_file=None))
        self.claims = {name: Claims(self.redis, name) for name in WORKERS}
        self.reaper = Reaper(self.redis, MAX_ATTEMPTS)
        self.log = JobLog(self.redis)
        self.alive: set[str] = set()
        self.graced: set[str] = set()
        self.expected: dict[str, Expected] = {}

    @rule(target=jobs_made, owner=st.sampled_from("ab"))
    def submit(self, owner: str) -> str:
        job, _ = self.jobs.create(Submission(Generation(MODEL, 9, Sampling(0.0), prompt="p"), owner))
        self.expected[job.id] = Expected(owner)
        return job.id

    @rule(worker=st.sampled_from(WORKERS))
    def renew(self, worker: str) -> None:
        lease = self.claims[worker].renew(3600)
        assert lease.unbroken == (worker in self.alive)
        self.alive.add(worker)
        self.graced.add(worker)
        assert {held.job_id for held in lease.held} == {i for i, e in self.expected.items() if e.holder == worker}

    @rule(target=grips, worker=st.sampled_from(WORKERS))
    def claim(self, worker: str) -> Grip:
        try:
            job = self.claims[worker].claim(MODEL)
        except NoLease:
            assert worker not in self.alive
            return Grip("none", 0, worker)
        waiting = {i: e for i, e in self.expected.items() if e.status is Status.QUEUED}
        held = [e for e in self.expected.values() if e.holder == worker]
        if job is None:
            must_be_free = any(e.alone for e in held) or (held and any(e.alone for e in waiting.values()))
            assert not waiting or must_be_free
            return Grip("none", 0, worker)
        expected = waiting[job.id]
        assert not any(e.alone for e in held)
        assert not (expected.alone and held)
        expected.events.append("resumed" if expected.attempt else "started")
        expected.status, expected.attempt, expected.holder = Status.RUNNING, expected.attempt + 1, worker
        assert job.attempt == expected.attempt
        return Grip(job.id, job.attempt, worker)

    @rule(grip=grips, text=st.text(min_size=1, max_size=3), twice=st.booleans())
    def write(self, grip: Grip, text: str, twice: bool) -> None:
        expected = self.expected.get(grip.job_id, Expected(""))
        holds = expected.status is Status.RUNNING and expected.attempt == grip.attempt
        row = Append(grip.job_id, grip.attempt, len(expected.events) + 1, text, (1,))
        for _ in range(1 + twice):
            (verdict,) = self.claims[grip.worker].append([row])
            assert (verdict is not Verdict.FENCED) == holds
            assert (verdict is Verdict.CANCELLED) == (holds and expected.stopping)
        if holds:
            expected.text += text
            expected.events.append("chunk")

    @rule(grip=consumes(grips), twice=st.booleans())
    def end(self, grip: Grip, twice: bool) -> None:
        expected = self.expected.get(grip.job_id, Expected(""))
        holds = expected.status is Status.RUNNING and expected.attempt == grip.attempt
        already = expected.status is Status.SUCCEEDED and expected.attempt == grip.attempt
        ending = Ending(Status.SUCCEEDED, text=expected.text, finish_reason="stop")
        row = Append(grip.job_id, grip.attempt, len(expected.events) + 1, ending=ending)
        for _ in range(1 + twice):
            (verdict,) = self.claims[grip.worker].append([row])
            assert (verdict is not Verdict.FENCED) == (holds or already)
        if holds:
            expected.end(Status.SUCCEEDED)

    @rule(job_id=jobs_made)
    def cancel(self, job_id: str) -> None:
        expected = self.expected[job_id]
        try:
            self.jobs.stop(job_id, expected.owner)
        except Conflict:
            assert expected.status.terminal
            assert expected.status is not Status.CANCELLED
            return
        if expected.status is Status.QUEUED:
            expected.end(Status.CANCELLED)
        elif expected.status is Status.RUNNING:
            expected.stopping = True

    @rule(grip=grips, lost=st.booleans())
    def hand_back(self, grip: Grip, lost: bool) -> None:
        self.claims[grip.worker].release([(grip.job_id, grip.attempt)], max_attempts=MAX_ATTEMPTS if lost else None)
        expected = self.expected.get(grip.job_id, Expected(""))
        if (expected.holder, expected.attempt) == (grip.worker, grip.attempt):
            expected.lose() if lost else expected.wait_again()

    @rule(worker=st.sampled_from(WORKERS))
    def lapse(self, worker: str) -> None:
        self.pass_by()
        self.run_out(worker)
        self.reaper.reap()
        self.lost(worker)

    @rule()
    def outage(self) -> None:
        """Redis comes back after all leases have run out: who renewed before gets another full one, but once."""
        for worker in WORKERS:
            self.run_out(worker)
        self.redis.hset("mlxq:passed", mapping={"server": "before", "at": time.time() - 60})
        self.reaper.reap()
        for worker in set(WORKERS) - self.graced:
            self.lost(worker)
        self.graced.clear()

    def pass_by(self) -> None:
        """The reaper has been here just now, on this server."""
        self.redis.hset("mlxq:passed", mapping={"server": "", "at": time.time()})

    def run_out(self, worker: str) -> None:
        if worker in self.alive:
            self.redis.zadd("mlxq:leases", {worker: 1.0})

    def lost(self, worker: str) -> None:
        self.alive.discard(worker)
        self.graced.discard(worker)
        for expected in self.expected.values():
            if expected.holder == worker:
                expected.lose()

    @rule(worker=st.sampled_from(WORKERS), lost=st.booleans())
    def retire(self, worker: str, lost: bool) -> None:
        self.claims[worker].retire(max_attempts=MAX_ATTEMPTS if lost else None)
        self.alive.discard(worker)
        self.graced.discard(worker)
        for expected in self.expected.values():
            if expected.holder == worker:
                expected.lose() if lost else expected.wait_again()

    @invariant()
    def records_and_logs_are_as_expected(self) -> None:
        for job_id, expected in self.expected.items():
            job = self.jobs.get(job_id, expected.owner)
            assert (job.status, job.attempt, self.jobs.text(job)) == (expected.status, expected.attempt, expected.text)
            events = self.log.read(job_id)
            assert [event.kind.value for event in events] == expected.events
            assert [event.n for event in events] == list(range(1, len(events) + 1)) and job.last_event == len(events)
            assert job.status.terminal == (events[-1].kind is EventKind.DONE)

    @invariant()
    def nothing_leaks(self) -> None:
        assert set(self.redis.zrange("mlxq:leases", 0, -1)) == self.alive
        assert set(self.redis.hkeys("mlxq:grace")) == self.graced
        waiting = {i for i, e in self.expected.items() if e.status is Status.QUEUED}
        assert set(self.redis.zrange("mlxq:queue:m", 0, -1)) == waiting
        held = {w: {i for i, e in self.expected.items() if e.holder == w} for w in WORKERS}
        assert {w: self.redis.smembers(f"mlxq:running:{w}") for w in WORKERS} == held
        ended = {i for i, e in self.expected.items() if e.status.terminal}
        assert set(self.redis.zrange("mlxq:timers", 0, -1)) == self.expected.keys() - ended
        assert waiting or not self.redis.exists("mlxq:clock:m")


Queue.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestQueue = Queue.TestCase
