"""The scripts against a model in Python: whatever workers, owners, clocks and the reaper do in whatever order.

Every call that may be sent twice, because its first answer was lost, is: what it does and says is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from shared.errors import Conflict, KeyReused, NotFound
from shared.jobs.attempts import AttemptEnd
from shared.jobs.log import JobLog
from shared.jobs.record import Ending, Job, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.models.registry import Registry, WorkerInfo
from shared.queue.claims import Append, Claims, LeftToOthers, NoLease, Reaper, Verdict
from shared.queue.redis import Redis
from shared.settings import Settings

MODEL = "m"
WORKERS = ("w1", "w2", "w3")
MAX_ATTEMPTS = 3
LONG_AGO = 1.0
SLOTS = 3
MOST_LEFT = 8


@dataclass
class Expected:
    """What a job must look like."""

    owner: str
    key: str
    fingerprint: str
    status: Status = Status.QUEUED
    code: str | None = None
    attempt: int = 0
    losses: int = 0
    holder: str = ""
    stop_as: Status | None = None
    time_is_up: bool = False
    """For what its timer stands for: the time to start before the first start, the deadline."""
    timer: bool = True
    text: str = ""
    tokens: int = 0
    events: list[str] = field(default_factory=lambda: ["queued"])
    history: list[tuple[int, str, AttemptEnd | None]] = field(default_factory=list)
    claimed_at: str = ""
    marks: tuple[str, ...] = ()
    left: bool = False
    """To another worker, which has its beginning; for as long as it is not anybody's."""
    anybodys: bool = False
    seen_to: bool = False

    @property
    def alone(self) -> bool:
        return self.losses >= MAX_ATTEMPTS - 1

    @property
    def due(self) -> bool:
        return self.timer and self.time_is_up

    def has_number(self, grip: Grip) -> bool:
        return self.status is Status.RUNNING and (self.attempt, self.holder) == (grip.attempt, grip.worker)

    def is_held_by(self, grip: Grip) -> bool:
        return self.has_number(grip) and self.claimed_at == grip.claimed_at

    def start(self, worker: str, claimed_at: str) -> None:
        self.claimed_at = claimed_at
        self.events.append("resumed" if self.attempt else "started")
        self.status, self.attempt, self.holder = Status.RUNNING, self.attempt + 1, worker
        self.history.append((self.attempt, worker, None))

    def end_attempt(self, how: AttemptEnd) -> None:
        if self.holder:
            self.history[-1] = (self.attempt, self.holder, how)
            self.holder = ""

    def end(self, status: Status, code: str | None = None) -> None:
        self.end_attempt(AttemptEnd.ENDED)
        if status is Status.EXPIRED:
            code = "deadline_exceeded" if self.attempt else "start_timeout"
        self.status, self.code, self.timer = status, code, False
        self.events.append("done")

    def lose(self) -> None:
        self.losses += 1
        if self.losses >= MAX_ATTEMPTS and not self.stop_as:
            self.end_attempt(AttemptEnd.WORKER_LOST)
            self.end(Status.FAILED, "worker_lost")
        else:
            self.wait_again(AttemptEnd.WORKER_LOST)

    def wait_again(self, how: AttemptEnd) -> None:
        self.end_attempt(how)
        if self.stop_as:
            self.end(self.stop_as)
        else:
            self.status = Status.QUEUED
            self.events.append("queued")


@dataclass(frozen=True)
class Grip:
    """What a worker believes to hold; it may be wrong, and it may not know of it."""

    job_id: str
    attempt: int
    worker: str
    claimed_at: str = ""


def one_of(choose: Callable[[Queue], Sequence[Any]]) -> st.SearchStrategy[Any]:
    """One of what the queue under test has now."""
    return st.runner().flatmap(lambda queue: st.sampled_from(choose(queue)))


workers = st.sampled_from(WORKERS)
twice = st.booleans()
jobs = one_of(lambda queue: queue.active() * 3 + queue.made)  # also forgotten ones
grips = one_of(lambda queue: (queue.right_grips() or queue.grips) * 2 + queue.grips[-3:])
words = st.tuples(st.text(min_size=1, max_size=3), st.integers(1, 3))


@contextmanager
def sent(caller: object, script: str, again: bool) -> Iterator[None]:
    """The script's calls are sent twice, as when the first answer is lost; the second answer counts."""
    send = getattr(caller, script)

    def send_twice(args: list[object]) -> object:
        send(args=args)
        return send(args=args)

    setattr(caller, script, send_twice if again else send)
    yield
    setattr(caller, script, send)


class Queue(RuleBasedStateMachine):
    def __init__(self, client: Redis) -> None:
        super().__init__()
        self.redis = client
        self.redis.flushall()
        self.jobs = Jobs(self.redis, Settings(_env_file=None, start_within_s=3600, durable=False))
        self.claims = {name: Claims(self.redis, name) for name in WORKERS}
        self.reaper = Reaper(self.redis, MAX_ATTEMPTS)
        self.registry = Registry(self.redis)
        self.keepers: dict[str, list[str]] = {}
        """Who last started jobs that begin so, the newest first."""
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

    @initialize()
    def begin(self) -> None:
        # Hypothesis leaves rules out of an example; so there is something to happen to in each.
        for owner in "ab":
            self.accept(owner, "k", "x")
        for worker in WORKERS:
            self.hold_lease(worker)
            self.take(worker, [("é", 2)])

    def right_grips(self) -> list[Grip]:
        return [Grip(i, job.attempt, job.holder, job.claimed_at) for i, job in self.of(Status.RUNNING).items()]

    def of(self, status: Status) -> dict[str, Expected]:
        return {job_id: job for job_id, job in self.expected.items() if job.status is status}

    def active(self) -> list[str]:
        return [job_id for job_id, job in self.expected.items() if not job.status.terminal]

    def held_by(self, worker: str) -> dict[str, Expected]:
        return {job_id: job for job_id, job in self.expected.items() if job.holder == worker}

    def known(self, grip: Grip) -> Expected:
        return self.expected.get(grip.job_id, Expected("", "", "", timer=False))

    # Owners

    @rule(owner=st.sampled_from("ab"), key=st.sampled_from(["k", "l"]), body=st.sampled_from("xy"), twice=twice)
    def submit(self, owner: str, key: str, body: str, twice: bool) -> None:
        with sent(self.jobs, "_enqueue", twice):
            self.accept(owner, key, body)

    def accept(self, owner: str, key: str, body: str) -> None:
        first = [i for i, job in self.expected.items() if (job.owner, job.key) == (owner, key)]
        asked = Request(MODEL, 9, Sampling(0.0), prompt=body)
        marks = (owner + "1" * 15, "2" * 16) if body == "x" else ()
        submission = Submission(asked, owner, idempotency_key=key, fingerprint=body, marks=marks)
        if first and self.expected[first[0]].fingerprint != body:
            with pytest.raises(KeyReused):
                self.jobs.create(submission)
            return
        job, new = self.jobs.create(submission)
        assert new == (not first)
        assert job.id in (first or {job.id} - self.expected.keys())
        self.expected.setdefault(job.id, Expected(owner, key, body, marks=marks))
        self.made.append(job.id)

    @rule(job_id=jobs, twice=twice)
    def cancel(self, job_id: str, twice: bool) -> None:
        expected = self.expected.get(job_id)
        with sent(self.jobs, "_stop", twice):
            if expected is None:
                with pytest.raises(NotFound):
                    self.jobs.stop(job_id, "a")
            elif expected.status.terminal and expected.status is not Status.CANCELLED:
                with pytest.raises(Conflict):
                    self.jobs.stop(job_id, expected.owner)
            else:
                self.jobs.stop(job_id, expected.owner)
                if expected.status is Status.QUEUED:
                    expected.end(Status.CANCELLED)
                elif expected.status is Status.RUNNING:
                    expected.stop_as = expected.stop_as or Status.CANCELLED

    @rule(job_id=jobs, twice=twice)
    def forget(self, job_id: str, twice: bool) -> None:
        expected = self.expected.get(job_id)
        with sent(self.jobs, "_forget", twice):
            if expected is None:
                with pytest.raises(NotFound):
                    self.jobs.forget(job_id, "a")
            elif not expected.status.terminal:
                with pytest.raises(Conflict):
                    self.jobs.forget(job_id, expected.owner)
            else:
                self.jobs.forget(job_id, expected.owner)
                del self.expected[job_id]

    # Clocks

    @rule(job_id=jobs)
    def time_to_start_is_up(self, job_id: str) -> None:
        expected = self.expected.get(job_id)
        if expected and expected.status is Status.QUEUED and not expected.attempt:
            self.redis.zadd("mlxq:timers", {job_id: LONG_AGO})
            expected.time_is_up = True

    @rule(job_id=jobs, reaps=st.booleans())
    def deadline_is_over(self, job_id: str, reaps: bool) -> None:
        expected = self.expected.get(job_id)
        if expected and not expected.status.terminal:
            self.redis.hset("mlxq:job:" + job_id, "end_by", LONG_AGO)
            self.redis.zadd("mlxq:timers", {job_id: LONG_AGO}, xx=True)
            expected.time_is_up = True
            if reaps:
                self.take_back()

    @rule(worker=workers)
    def lapse(self, worker: str) -> None:
        if worker in self.leases:
            self.redis.zadd("mlxq:leases", {worker: LONG_AGO})
            self.leases[worker] = False

    @rule(twice=twice)
    def reap(self, twice: bool) -> None:
        with sent(self.reaper, "_reap", twice):
            self.take_back()

    def take_back(self) -> None:
        self.redis.hset("mlxq:passed", "at", time.time())  # slow as this run may be, it is no outage
        self.reaper.reap()
        self.reaped()

    @rule(twice=twice)
    def outage(self, twice: bool) -> None:
        """Redis comes back as another server, or was long out of reach: the next pass renews all leases, but once."""
        self.redis.hset("mlxq:passed", mapping={"server": "another", "at": time.time() - 60})
        for worker in self.graced & self.leases.keys():
            self.leases[worker] = True
        self.graced.clear()
        with sent(self.reaper, "_reap", twice):
            self.reaper.reap()
        self.reaped()

    def reaped(self) -> None:
        for worker in [name for name, holds in self.leases.items() if not holds]:
            self.end_lease(worker)
            for expected in self.held_by(worker).values():
                expected.lose()
        for expected in [job for job in self.expected.values() if job.due]:
            if expected.status is Status.QUEUED:
                expected.end(Status.EXPIRED)
            else:
                expected.stop_as = expected.stop_as or Status.EXPIRED
                expected.timer = False

    @rule()
    def copy_is_taken(self) -> None:
        names = self.raw.keys("*")
        keys = {name: (max(0, self.raw.pttl(name)), self.raw.dump(name)) for name in names}
        self.copy = (keys, deepcopy((self.expected, self.leases, self.graced, self.keepers)))

    @rule()
    def redis_loses_its_last_writes(self) -> None:
        """As when an older copy takes over. Workers do not know: they believe in claims that have never been."""
        if self.copy is not None:
            keys, model = self.copy
            self.redis.flushall()
            for name, (lives_ms, value) in keys.items():
                self.raw.restore(name, lives_ms, value)
            self.expected, self.leases, self.graced, self.keepers = deepcopy(model)

    # Workers

    @rule(worker=workers, twice=twice)
    def renew(self, worker: str, twice: bool) -> None:
        with sent(self.claims[worker], "_renew", twice):
            self.hold_lease(worker, twice)

    def hold_lease(self, worker: str, twice: bool = False) -> None:
        lease = self.claims[worker].renew(3600)
        assert lease.unbroken == (twice or worker in self.leases)
        self.leases[worker] = True
        self.graced.add(worker)
        card = WorkerInfo(worker, "node-" + worker, "h", 1, MODEL, "ready", SLOTS, 0, 0.0, time.time(), {}, {})
        self.registry.announce_worker(card, 3600)
        told = {held.job_id: (held.attempt, held.stop_as) for held in lease.held}
        assert told == {i: (job.attempt, job.stop_as) for i, job in self.held_by(worker).items()}

    @rule(worker=workers, renews=st.booleans(), answer_lost=st.booleans(), said=st.lists(words, max_size=2))
    def claim(self, worker: str, renews: bool, answer_lost: bool, said: list[tuple[str, int]]) -> None:
        """Sent again, a claim takes another job: of the first the worker does not know until it renews."""
        if renews:
            self.hold_lease(worker)
        if not self.of(Status.QUEUED):
            self.accept("a", f"new-{len(self.made)}", "x")
        if answer_lost:
            self.take(worker, [])
        self.take(worker, said)

    @rule(job_id=jobs)
    def no_longer_left(self, job_id: str) -> None:
        expected = self.expected.get(job_id)
        if expected and expected.left and not expected.status.terminal:
            expected.anybodys = True
            self.redis.hset("mlxq:job:" + job_id, "left_at", LONG_AGO)

    def may_be_left(self, job: Expected, worker: str) -> bool:
        """Whether this worker leaves a job to another."""
        keeper = None if job.alone or job.anybodys or len(self.leases) == 1 else self.keeper(job, worker)
        return keeper not in (None, worker)

    def keeper(self, job: Expected, worker: str) -> str | None:
        for names in (self.keepers.get(mark, []) for mark in job.marks):
            able = [worker] if worker in names else [name for name in names if self.is_as_good_as_free(name, worker)]
            if able:
                return able[0]
        return None

    def is_as_good_as_free(self, other: str, worker: str) -> bool:
        busy, own = (len(self.held_by(name)) for name in (other, worker))
        return self.leases.get(other, False) and busy < SLOTS and busy - own <= 1

    def note_keeper(self, job: Expected, worker: str) -> None:
        if len(self.leases) > 1:
            for mark in job.marks:
                others = [name for name in self.keepers.get(mark, []) if name != worker]
                self.keepers[mark] = [worker, *others[:2]]

    def no_time_passes(self) -> None:
        """However slow this run is: what is left to another stays so until `no_longer_left`."""
        for job_id, expected in self.of(Status.QUEUED).items():
            if expected.left and not expected.anybodys:
                self.redis.hset("mlxq:job:" + job_id, "left_at", time.time())

    def take(self, worker: str, said: list[tuple[str, int]]) -> None:
        self.no_time_passes()
        told = ()
        try:
            job = self.claims[worker].claim(MODEL)
        except NoLease:
            assert not self.leases.get(worker)
            return
        except LeftToOthers as left:
            job, told = None, left.jobs
        assert self.leases[worker]
        self.expire_those_before()
        waiting, held = self.of(Status.QUEUED), self.held_by(worker).values()
        to_leave = {job_id for job_id, e in waiting.items() if self.may_be_left(e, worker)}
        for job_id in (i for i in waiting if self.redis.hexists("mlxq:job:" + i, "left_at")):
            assert waiting[job_id].left or job_id in to_leave
            waiting[job_id].left = True
        for each in told:
            expected = waiting[each.job_id]
            assert each.job_id in to_leave and not expected.seen_to
            assert each.node == f"node-{self.keeper(expected, worker)}" and each.seconds <= 0.2
            expected.seen_to = True
        if job is None:
            must_be_free = any(e.alone for e in held) or (held and any(e.alone for e in waiting.values()))
            assert must_be_free or to_leave == waiting.keys()
            assert must_be_free or all(waiting[i].left and waiting[i].seen_to for i in to_leave)
            return
        expected = waiting[job.id]
        assert not any(e.alone for e in held)
        assert not (expected.alone and held)
        assert not expected.due
        most_left = min(MOST_LEFT, SLOTS - len(held) - 1)  # a slot is kept for each
        assert job.id not in to_leave or len(to_leave) > most_left or sum(e.left for e in waiting.values()) >= MOST_LEFT
        expected.start(worker, job.claimed_at)
        self.note_keeper(expected, worker)
        assert job.attempt == expected.attempt
        self.grips.append(Grip(job.id, job.attempt, worker, job.claimed_at))
        for word in said:
            self.say(self.grips[-1], *word)

    def expire_those_before(self) -> None:
        """A claim ends those that stand before what it takes and whose time is up; how many these are is the line's."""
        for job_id, expected in self.of(Status.QUEUED).items():
            if expected.due and self.jobs.get(job_id, expected.owner).status is Status.EXPIRED:
                expected.end(Status.EXPIRED)

    @rule(grip=grips, word=words, twice=twice)
    def write(self, grip: Grip, word: tuple[str, int], twice: bool) -> None:
        with sent(self.claims[grip.worker], "_append", twice):
            self.say(grip, *word)

    def say(self, grip: Grip, text: str, count: int) -> None:
        expected = self.known(grip)
        holds = expected.is_held_by(grip)
        row = Append(grip.job_id, grip.attempt, grip.claimed_at, len(expected.events) + 1, text, (1,) * count)
        (verdict,) = self.claims[grip.worker].append([row])
        assert verdict == (Verdict(expected.stop_as or "ok") if holds else Verdict.FENCED)
        if holds:
            expected.text += text
            expected.tokens += count
            expected.events.append("chunk")

    @rule(
        grip=grips,
        status=st.sampled_from([status for status in Status if status.terminal]),
        knows_text=st.booleans(),
        twice=twice,
    )
    def end(self, grip: Grip, status: Status, knows_text: bool, twice: bool) -> None:
        expected = self.known(grip)
        holds = expected.is_held_by(grip)
        already = (expected.status, expected.attempt, expected.claimed_at) == (status, grip.attempt, grip.claimed_at)
        code = "engine_error" if status is Status.FAILED else None
        ending = Ending(
            status, expected.text if knows_text else None, completion_tokens=expected.tokens, error_code=code
        )
        row = Append(grip.job_id, grip.attempt, grip.claimed_at, len(expected.events) + 1, ending=ending)
        with sent(self.claims[grip.worker], "_append", twice):
            (verdict,) = self.claims[grip.worker].append([row])
        if holds:
            assert verdict == (Verdict.OK if twice else Verdict(expected.stop_as or "ok"))
            expected.end(status, code)
        else:
            assert verdict is (Verdict.OK if already else Verdict.FENCED)

    @rule(grip=grips, lost=st.booleans(), twice=twice)
    def hand_back(self, grip: Grip, lost: bool, twice: bool) -> None:
        """Also what the worker was told that it holds and does not know of: that counts as lost."""
        claims = self.claims[grip.worker]
        with sent(claims, "_release", twice):
            claims.release([(grip.job_id, grip.attempt)], max_attempts=MAX_ATTEMPTS if lost else None)
        expected = self.known(grip)
        if expected.has_number(grip):
            expected.lose() if lost else expected.wait_again(AttemptEnd.HANDED_BACK)

    @rule(worker=workers, lost=st.booleans(), twice=twice)
    def retire(self, worker: str, lost: bool, twice: bool) -> None:
        with sent(self.claims[worker], "_retire", twice):
            self.claims[worker].retire(max_attempts=MAX_ATTEMPTS if lost else None)
        self.end_lease(worker)
        for expected in self.held_by(worker).values():
            expected.lose() if lost else expected.wait_again(AttemptEnd.HANDED_BACK)

    def end_lease(self, worker: str) -> None:
        self.leases.pop(worker, None)
        self.graced.discard(worker)

    # What always holds

    @invariant()
    def all_is_as_expected(self) -> None:
        """One look at Redis a step: nothing is missing, nothing is wrong, nothing is left over."""
        keys = {i: ("mlxq:job:" + i, "mlxq:log:" + i, self.idempotency_key(job)) for i, job in self.expected.items()}
        with self.redis.pipeline() as pipe:
            pipe.keys("*")
            for record, log, idempotency in keys.values():
                pipe.hgetall(record).xrange(log).ttl(record).ttl(log).ttl(idempotency)
            pipe.zrange("mlxq:queue:m", 0, -1).zrange("mlxq:timers", 0, -1, withscores=True).zrange(
                "mlxq:leases", 0, -1
            )
            for worker in WORKERS:
                pipe.smembers("mlxq:running:" + worker)
            there, *found = pipe.execute()
        records = dict(zip(keys, found[: 5 * len(keys) : 5], strict=True))
        for n, (job_id, expected) in enumerate(self.expected.items()):
            record, log, *lives = found[5 * n : 5 * n + 5]
            assert len({life == -1 for life in lives}) == 1 and (lives[0] == -1) != expected.status.terminal
            self.check_record(Job.from_record(record), expected)
            assert [(entry_id, entry["e"]) for entry_id, entry in log] == [
                (f"{n}-0", kind) for n, kind in enumerate(expected.events, 1)
            ]
            assert job_id == record["id"] and record["seq"] == str(len(log))
        waiting, timers, leases, *running = found[5 * len(keys) :]
        assert set(waiting) == self.of(Status.QUEUED).keys()
        assert dict(timers).keys() == {i for i, job in self.expected.items() if job.timer}
        started = [i for i, _ in timers if self.expected[i].attempt]
        assert all(dict(timers)[i] == float(records[i]["end_by"]) for i in started), "then only the deadline counts"
        assert set(leases) == self.leases.keys()
        assert running == [{*self.held_by(worker)} for worker in WORKERS]
        assert waiting or "mlxq:clock:m" not in there
        mine = [name for name in there if name.split(":")[1] in ("job", "log", "idem")]
        assert sorted(mine) == sorted({name for names in keys.values() for name in names})

    def idempotency_key(self, job: Expected) -> str:
        return f"mlxq:idem:{job.owner}:{job.key}"

    def check_record(self, job: Job, expected: Expected) -> None:
        assert (job.status, job.error_code, job.attempt) == (expected.status, expected.code, expected.attempt)
        assert [(each.number, each.worker, each.how) for each in job.history] == expected.history[-20:]
        assert [each.ended_at is None for each in job.history] == [how is None for *_, how in expected.history[-20:]]
        assert (job.started_at is None) == (expected.attempt == 0)
        assert (job.finished_at is not None) == expected.status.terminal
        if expected.status.terminal:
            assert (job.text, job.completion_tokens) == (expected.text, expected.tokens)

    def teardown(self) -> None:
        """What readers and the next attempt make of it."""
        for job_id, expected in self.expected.items():
            job = self.jobs.get(job_id, expected.owner)
            written = self.log.written(job_id, job.last_event)
            assert (written.text, len(written.tokens)) == (expected.text, expected.tokens)
            assert self.jobs.text(job) == expected.text
            assert self.log.ended(job_id) == expected.status.terminal


def test_whatever_happens_the_queue_is_as_the_model_says(valkey_client: Redis) -> None:
    # The real server, because it is also several times faster here than the fake one.
    bounds = settings(max_examples=150, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(lambda: Queue(valkey_client), settings=bounds)
