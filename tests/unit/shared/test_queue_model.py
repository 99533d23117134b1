"""Compares the scripts with a model in Python, for random actions of owners, workers, clocks and the reaper.

Calls that may be repeated because a reply was lost are also sent twice; the effect and the reply must be the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from shared.errors import Conflict, KeyReused, NotFound
from shared.jobs.limits import STANDARD, OwnerLimits
from shared.jobs.record import AttemptEnd, Ending, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import DELETED_S
from shared.jobs.submission import Submission
from shared.queue.claims import Append, Demand, NoLease, WriteResult
from shared.redis import keys
from shared.redis.client import Redis
from tests.support.queue_model import LONG_AGO, MODEL, MUCH, WORKERS, Belief, Expected, ExpectedQueue


def one_of(choose: Callable[[Queue], Sequence[Any]]) -> st.SearchStrategy[Any]:
    """Draw from a list that depends on the current state of the queue under test."""
    return st.runner().flatmap(lambda queue: st.sampled_from(choose(queue)))


workers = st.sampled_from(WORKERS)
twice = st.booleans()
jobs = one_of(lambda queue: queue.active() * 3 + queue.submitted)  # deleted ones included
beliefs = one_of(lambda queue: (queue.true_beliefs() or queue.beliefs) * 2 + queue.beliefs[-3:])
chunks = st.tuples(st.text(min_size=1, max_size=3), st.integers(1, 3))


@contextmanager
def sent(caller: object, script: str, again: bool) -> Iterator[None]:
    """Send a script's calls twice if `again`, as after the loss of the first reply. The second reply counts."""
    send = getattr(caller, script)

    def send_twice(args: list[object]) -> object:
        send(args=args)
        return send(args=args)

    setattr(caller, script, send_twice if again else send)
    yield
    setattr(caller, script, send)


class Queue(ExpectedQueue):
    @initialize()
    def begin(self) -> None:
        # Hypothesis omits rules in some examples, so each example starts with jobs in several states.
        for owner in "aab":
            self.accept(owner, f"k{len(self.submitted)}", "x")
        for worker in WORKERS:
            self.hold_lease(worker)
        self.take(WORKERS[0], 1, 1)
        self.admit(self.beliefs[-2], False)
        self.write(self.beliefs[-2], ("é", 2), False)

    # Owners

    @rule(owner=st.sampled_from("ab"), key=st.sampled_from(["k", "l"]), body=st.sampled_from("xy"), twice=twice)
    def submit(self, owner: str, key: str, body: str, twice: bool) -> None:
        with sent(self.jobs, "_enqueue", twice):
            self.accept(owner, key, body)

    def accept(self, owner: str, key: str, body: str) -> None:
        first = [i for i, job in self.expected.items() if (job.owner, job.key) == (owner, key)]
        request = Request(MODEL, 9, Sampling(0.0), prompt=body)
        limits = OwnerLimits(tokens_per_day=10**9) if owner == "a" else STANDARD
        submission = Submission(request, owner, idempotency_key=key, fingerprint=body, limits=limits)
        if first and self.expected[first[0]].fingerprint != body:
            with pytest.raises(KeyReused):
                self.jobs.create(submission)
            return
        accepted = self.jobs.create(submission)
        job = accepted.job
        assert accepted.new == (not first)
        assert job.id in (first or {job.id} - self.expected.keys())
        if not first:
            size, growth = map(int, self.redis.hmget(keys.JOB + job.id, "bytes", "growth_bytes"))
            self.expected[job.id] = Expected(owner, key, body, bytes=size, growth=growth)
        self.submitted.append(job.id)

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
                elif expected.runs:
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
                self.forgotten.append(self.expected.pop(job_id))
                with pytest.raises(NotFound):
                    self.jobs.get(job_id, expected.owner)
                for name in self.redis.keys(f"*{job_id}*"):
                    assert 0 < self.redis.ttl(name) <= DELETED_S
                    self.redis.delete(name)  # as its expiry will

    # Clocks

    @rule(job_id=jobs)
    def start_limit_is_exceeded(self, job_id: str) -> None:
        expected = self.expected.get(job_id)
        if expected and expected.status is Status.QUEUED and not expected.attempt:
            self.redis.zadd(keys.TIMERS, {job_id: LONG_AGO})
            expected.time_is_up = True

    @rule(job_id=jobs, reap=st.booleans())
    def deadline_is_exceeded(self, job_id: str, reap: bool) -> None:
        expected = self.expected.get(job_id)
        if expected and not expected.status.terminal:
            self.redis.hset(keys.JOB + job_id, "end_by", LONG_AGO)
            self.redis.zadd(keys.TIMERS, {job_id: LONG_AGO}, xx=True)
            expected.time_is_up = expected.deadline_is_up = True
            if reap:
                self.make_pass()

    @rule(worker=workers)
    def lapse(self, worker: str) -> None:
        if worker in self.leases:
            self.redis.zadd(keys.LEASES, {worker: LONG_AGO})
            self.leases[worker] = False

    @rule(twice=twice)
    def reap(self, twice: bool) -> None:
        with sent(self.reaper, "_reap", twice):
            self.make_pass()

    def make_pass(self) -> None:
        self.redis.hset(keys.PASSED, "at", time.time())  # a slow test run must not look like an outage
        self.reaper.reap()
        self.apply_pass()

    @rule(twice=twice)
    def outage(self, twice: bool) -> None:
        """Redis fails over or was unreachable: the next pass extends each lease, once per renewal."""
        self.redis.hset(keys.PASSED, mapping={"server": "another", "at": time.time() - 60})
        for worker in self.extensible & self.leases.keys():
            self.leases[worker] = True
        self.extensible.clear()
        with sent(self.reaper, "_reap", twice):
            self.reaper.reap()
        self.apply_pass()

    def apply_pass(self) -> None:
        for worker in [name for name, holds in self.leases.items() if not holds]:
            self.end_lease(worker)
            self.give_up_all(worker, AttemptEnd.WORKER_LOST)
        for expected in [job for job in self.expected.values() if job.due]:
            if expected.status is Status.QUEUED:
                expected.end(Status.EXPIRED)
            else:
                expected.stop_as = expected.stop_as or Status.EXPIRED
                expected.timer = False

    @rule()
    def take_snapshot(self) -> None:
        names = self.raw.keys("*")
        values = {name: (max(0, self.raw.pttl(name)), self.raw.dump(name)) for name in names}
        self.copy = (values, deepcopy((self.expected, self.leases, self.extensible, self.forgotten)))

    @rule()
    def redis_loses_its_last_writes(self) -> None:
        """An outdated replica takes over. Workers still believe in claims that Redis has lost."""
        if self.copy is not None:
            values, model = self.copy
            self.redis.flushall()
            for name, (ttl_ms, value) in values.items():
                self.raw.restore(name, ttl_ms, value)
            self.expected, self.leases, self.extensible, self.forgotten = deepcopy(model)

    # Workers

    @rule(worker=workers, twice=twice)
    def renew(self, worker: str, twice: bool) -> None:
        with sent(self.claims[worker], "_renew", twice):
            self.hold_lease(worker, twice)

    def hold_lease(self, worker: str, twice: bool = False) -> None:
        lease = self.claims[worker].renew(3600)
        assert lease.unbroken == (twice or worker in self.leases)
        self.leases[worker] = True
        self.extensible.add(worker)
        running = {held.job_id: (held.attempt, held.claimed_at, held.stop_as) for held in lease.running}
        expected = self.held_by(worker, running=True)
        assert running == {i: (job.attempt, job.claimed_at, job.stop_as) for i, job in expected.items()}
        assert dict(lease.reserved) == {
            i: job.claimed_at for i, job in self.held_by(worker, running=False).items()
        }  # fmt: skip

    @rule(
        worker=workers, renews=st.booleans(), lost=st.booleans(), rows=st.integers(0, 3), spare=st.integers(0, 2),
    )  # fmt: skip
    def claim(self, worker: str, renews: bool, lost: bool, rows: int, spare: int) -> None:
        """A repeated claim reserves further jobs; the worker learns of the first ones when it renews."""
        if renews:
            self.hold_lease(worker)
        if not any(not job.holder for job in self.of(Status.QUEUED).values()):
            self.accept("a", f"new-{len(self.submitted)}", "x")
        if lost:
            self.take(worker, rows, spare)
        self.take(worker, rows, spare)

    def is_free(self, job: Expected, worker: str, *, has_room: bool) -> bool:
        if not job.holder:
            return True
        return job.holder != worker and (not self.leases.get(job.holder) or (job.spare and has_room and not job.moved))

    def take(self, worker: str, rows: int, spare: int) -> None:
        queued = self.of(Status.QUEUED)
        try:
            claim = self.claims[worker].claim(MODEL, Demand(rows, MUCH, spare))
        except NoLease:
            assert not self.leases.get(worker)
            return
        assert self.leases[worker] and claim.again_s is None and claim.lost == ()
        self.apply_expiry()
        assert len(claim.jobs) <= rows + spare
        for n, claimed in enumerate(claim.jobs):
            expected = queued[claimed.job.id]
            assert not expected.due and self.is_free(expected, worker, has_room=n < rows)
            assert claimed.job.attempt == expected.attempt + 1
            assert (claimed.job.started_at is not None) == (expected.attempt > 0)
            assert claimed.request.prompt == expected.fingerprint
            expected.reserve(worker, claimed.job.claimed_at, spare=n >= rows)
            self.beliefs.append(Belief(claimed.job.id, claimed.job.attempt, worker, claimed.job.claimed_at))
        ranks = [claimed.rank for claimed in claim.jobs]
        assert ranks == sorted(ranks)
        if len(claim.jobs) < rows:
            remaining = self.of(Status.QUEUED).items()
            free = [job_id for job_id, job in remaining if self.is_free(job, worker, has_room=True)]
            assert all(int(self.redis.hget(keys.JOB + job_id, "suspicion") or 0) >= 2 for job_id in free)

    def apply_expiry(self) -> None:
        """A claim expires late jobs that it examines."""
        for job_id, expected in self.of(Status.QUEUED).items():
            if expected.due and self.jobs.get(job_id, expected.owner).status is Status.EXPIRED:
                expected.end(Status.EXPIRED)

    @rule(belief=beliefs, twice=twice)
    def offer(self, belief: Belief, twice: bool) -> None:
        """A full worker offers a waiting job to others, and learns whether it still holds the job."""
        claims, expected = self.claims[belief.worker], self.known(belief)
        if not self.leases.get(belief.worker):
            return
        with sent(claims, "_claim", twice):
            claim = claims.claim(MODEL, Demand(0, 0, -1, waiting=(belief.job_id,)))
        assert claim.jobs == ()
        holds = expected.holder == belief.worker
        assert claim.lost == (() if holds else (belief.job_id,))
        if holds and not expected.runs:
            expected.spare = True

    @rule(belief=beliefs, twice=twice)
    def admit(self, belief: Belief, twice: bool) -> None:
        expected = self.known(belief)
        starts, runs = expected.is_reserved_by(belief), expected.is_run_by(belief)
        row = Append(belief.job_id, belief.attempt, belief.claimed_at, len(expected.events) + 2, start=True)
        with sent(self.claims[belief.worker], "_append", twice):
            (write_result,) = self.claims[belief.worker].append([row])
        if starts:
            expected.start()
        assert write_result == (WriteResult(expected.stop_as or "ok") if starts or runs else WriteResult.FENCED)

    @rule(belief=beliefs, chunk=chunks, twice=twice)
    def write(self, belief: Belief, chunk: tuple[str, int], twice: bool) -> None:
        expected = self.known(belief)
        holds, (text, count) = expected.is_run_by(belief), chunk
        row = Append(belief.job_id, belief.attempt, belief.claimed_at, len(expected.events) + 1, text, (1,) * count)
        with sent(self.claims[belief.worker], "_append", twice):
            (write_result,) = self.claims[belief.worker].append([row])
        assert write_result == (WriteResult(expected.stop_as or "ok") if holds else WriteResult.FENCED)
        if holds:
            expected.text += text
            expected.tokens += count
            expected.events.append("chunk")

    @rule(
        belief=beliefs,
        status=st.sampled_from([status for status in Status if status.terminal]),
        counts=st.booleans(),
        begins=st.booleans(),
        twice=twice,
    )
    def end(self, belief: Belief, status: Status, counts: bool, begins: bool, twice: bool) -> None:
        """End a job; with `begins`, in the same write that starts its attempt."""
        expected = self.known(belief)
        starts = begins and expected.is_reserved_by(belief)
        already = (expected.status, expected.attempt, expected.claimed_at) == (
            status,
            belief.attempt,
            belief.claimed_at,
        )
        code = "engine_error" if status is Status.FAILED else None
        ending = Ending(status, completion_tokens=expected.tokens if counts else None, error_code=code)
        n = len(expected.events) + 1 + starts
        row = Append(belief.job_id, belief.attempt, belief.claimed_at, n, start=begins, ending=ending)
        if starts:
            expected.start()
        holds = expected.is_run_by(belief)
        with sent(self.claims[belief.worker], "_append", twice):
            (write_result,) = self.claims[belief.worker].append([row])
        if holds:
            assert write_result == (WriteResult.OK if twice else WriteResult(expected.stop_as or "ok"))
            expected.end(status, code)
        else:
            assert write_result is (WriteResult.OK if already else WriteResult.FENCED)

    @rule(belief=beliefs, twice=twice)
    def hand_back(self, belief: Belief, twice: bool) -> None:
        claims, expected = self.claims[belief.worker], self.known(belief)
        with sent(claims, "_release", twice):
            models = claims.release([(belief.job_id, belief.claimed_at)])
        if (expected.holder, expected.claimed_at) == (
            belief.worker,
            belief.claimed_at,
        ) and not expected.status.terminal:
            expected.give_up(AttemptEnd.HANDED_BACK)
            is_queued = expected.status is Status.QUEUED
            assert twice or models == ([MODEL] if is_queued else [])

    @rule(worker=workers, twice=twice)
    def retire(self, worker: str, twice: bool) -> None:
        with sent(self.claims[worker], "_retire", twice):
            self.claims[worker].retire()
        self.end_lease(worker)
        self.give_up_all(worker, AttemptEnd.HANDED_BACK)

    def give_up_all(self, worker: str, how: AttemptEnd) -> None:
        for running in (True, False):
            for expected in self.held_by(worker, running=running).values():
                expected.give_up(how)

    def end_lease(self, worker: str) -> None:
        self.leases.pop(worker, None)
        self.extensible.discard(worker)


def test_queue_behaves_like_the_model(valkey_client: Redis) -> None:
    # Only the real server, which is several times faster than the fake one.
    limits = settings(max_examples=80, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(lambda: Queue(valkey_client), settings=limits)
