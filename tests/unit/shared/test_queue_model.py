"""The scripts against a model in Python: whatever workers, owners, clocks and the reaper do in whatever order.

Every call that may be sent twice, because its first answer was lost, is: what it does and answers is the same.
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
from shared.jobs.record import AttemptEnd, Ending, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Submission
from shared.queue import keys
from shared.queue.claims import Append, Demand, NoLease, WriteResult
from shared.queue.redis import Redis
from tests.support.queue_model import LONG_AGO, MODEL, MUCH, WORKERS, Expected, ExpectedQueue, Grip


def one_of(choose: Callable[[Queue], Sequence[Any]]) -> st.SearchStrategy[Any]:
    """One of what the queue under test has now."""
    return st.runner().flatmap(lambda queue: st.sampled_from(choose(queue)))


workers = st.sampled_from(WORKERS)
twice = st.booleans()
jobs = one_of(lambda queue: queue.active() * 3 + queue.made)  # also forgotten ones
grips = one_of(lambda queue: (queue.right_grips() or queue.grips) * 2 + queue.grips[-3:])
chunks = st.tuples(st.text(min_size=1, max_size=3), st.integers(1, 3))


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


class Queue(ExpectedQueue):
    @initialize()
    def begin(self) -> None:
        # Hypothesis leaves rules out of an example; so there is something to happen to in each.
        for owner in "aab":
            self.accept(owner, f"k{len(self.made)}", "x")
        for worker in WORKERS:
            self.hold_lease(worker)
        self.take(WORKERS[0], 1, 1)
        self.admit(self.grips[-2], False)
        self.write(self.grips[-2], ("é", 2), False)

    # Owners

    @rule(owner=st.sampled_from("ab"), key=st.sampled_from(["k", "l"]), body=st.sampled_from("xy"), twice=twice)
    def submit(self, owner: str, key: str, body: str, twice: bool) -> None:
        with sent(self.jobs, "_enqueue", twice):
            self.accept(owner, key, body)

    def accept(self, owner: str, key: str, body: str) -> None:
        first = [i for i, job in self.expected.items() if (job.owner, job.key) == (owner, key)]
        asked = Request(MODEL, 9, Sampling(0.0), prompt=body)
        submission = Submission(asked, owner, idempotency_key=key, fingerprint=body)
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
                del self.expected[job_id]

    # Clocks

    @rule(job_id=jobs)
    def time_to_start_is_up(self, job_id: str) -> None:
        expected = self.expected.get(job_id)
        if expected and expected.status is Status.QUEUED and not expected.attempt:
            self.redis.zadd(keys.TIMERS, {job_id: LONG_AGO})
            expected.time_is_up = True

    @rule(job_id=jobs, reaps=st.booleans())
    def deadline_is_over(self, job_id: str, reaps: bool) -> None:
        expected = self.expected.get(job_id)
        if expected and not expected.status.terminal:
            self.redis.hset(keys.JOB + job_id, "end_by", LONG_AGO)
            self.redis.zadd(keys.TIMERS, {job_id: LONG_AGO}, xx=True)
            expected.time_is_up = expected.deadline_is_up = True
            if reaps:
                self.take_back()

    @rule(worker=workers)
    def lapse(self, worker: str) -> None:
        if worker in self.leases:
            self.redis.zadd(keys.LEASES, {worker: LONG_AGO})
            self.leases[worker] = False

    @rule(twice=twice)
    def reap(self, twice: bool) -> None:
        with sent(self.reaper, "_reap", twice):
            self.take_back()

    def take_back(self) -> None:
        self.redis.hset(keys.PASSED, "at", time.time())  # slow as this run may be, it is no outage
        self.reaper.reap()
        self.reaped()

    @rule(twice=twice)
    def outage(self, twice: bool) -> None:
        """Redis comes back as another server, or was long out of reach: the next pass renews all leases, but once."""
        self.redis.hset(keys.PASSED, mapping={"server": "another", "at": time.time() - 60})
        for worker in self.graced & self.leases.keys():
            self.leases[worker] = True
        self.graced.clear()
        with sent(self.reaper, "_reap", twice):
            self.reaper.reap()
        self.reaped()

    def reaped(self) -> None:
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
    def copy_is_taken(self) -> None:
        names = self.raw.keys("*")
        values = {name: (max(0, self.raw.pttl(name)), self.raw.dump(name)) for name in names}
        self.copy = (values, deepcopy((self.expected, self.leases, self.graced)))

    @rule()
    def redis_loses_its_last_writes(self) -> None:
        """As when an older copy takes over. Workers do not know: they believe in claims that have never been."""
        if self.copy is not None:
            values, model = self.copy
            self.redis.flushall()
            for name, (lives_ms, value) in values.items():
                self.raw.restore(name, lives_ms, value)
            self.expected, self.leases, self.graced = deepcopy(model)

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
        """Sent again, a claim reserves other jobs: of the first the worker does not know until it renews."""
        if renews:
            self.hold_lease(worker)
        if not any(not job.holder for job in self.of(Status.QUEUED).values()):
            self.accept("a", f"new-{len(self.made)}", "x")
        if lost:
            self.take(worker, rows, spare)
        self.take(worker, rows, spare)

    def is_free(self, job: Expected, worker: str, *, room: bool) -> bool:
        if not job.holder:
            return True
        return job.holder != worker and (not self.leases.get(job.holder) or (job.spare and room and not job.moved))

    def take(self, worker: str, rows: int, spare: int) -> None:
        waiting = self.of(Status.QUEUED)
        try:
            claim = self.claims[worker].claim(MODEL, Demand(rows, MUCH, spare))
        except NoLease:
            assert not self.leases.get(worker)
            return
        assert self.leases[worker] and claim.again_s is None and claim.lost == ()
        self.expire_those_before()
        assert len(claim.jobs) <= rows + spare
        for n, claimed in enumerate(claim.jobs):
            expected = waiting[claimed.job.id]
            assert not expected.due and self.is_free(expected, worker, room=n < rows)
            assert claimed.job.attempt == expected.attempt + 1
            assert (claimed.job.started_at is not None) == (expected.attempt > 0)
            assert claimed.request.prompt == expected.fingerprint
            expected.reserve(worker, claimed.job.claimed_at, spare=n >= rows)
            self.grips.append(Grip(claimed.job.id, claimed.job.attempt, worker, claimed.job.claimed_at))
        ranks = [claimed.rank for claimed in claim.jobs]
        assert ranks == sorted(ranks)
        if len(claim.jobs) < rows:
            left = self.of(Status.QUEUED).items()
            free = [job_id for job_id, job in left if self.is_free(job, worker, room=True)]
            assert all(int(self.redis.hget(keys.JOB + job_id, "suspicion") or 0) >= 2 for job_id in free)

    def expire_those_before(self) -> None:
        """A claim ends those that stand before what it takes and whose time is up."""
        for job_id, expected in self.of(Status.QUEUED).items():
            if expected.due and self.jobs.get(job_id, expected.owner).status is Status.EXPIRED:
                expected.end(Status.EXPIRED)

    @rule(grip=grips, twice=twice)
    def full(self, grip: Grip, twice: bool) -> None:
        """A worker with too many jobs offers what waits in it; it learns what is not its own any more."""
        claims, expected = self.claims[grip.worker], self.known(grip)
        if not self.leases.get(grip.worker):
            return
        with sent(claims, "_claim", twice):
            claim = claims.claim(MODEL, Demand(0, 0, -1, waiting=(grip.job_id,)))
        assert claim.jobs == ()
        holds = expected.holder == grip.worker
        assert claim.lost == (() if holds else (grip.job_id,))
        if holds and not expected.runs:
            expected.spare = True

    @rule(grip=grips, twice=twice)
    def admit(self, grip: Grip, twice: bool) -> None:
        expected = self.known(grip)
        starts, runs = expected.is_reserved_by(grip), expected.is_run_by(grip)
        row = Append(grip.job_id, grip.attempt, grip.claimed_at, len(expected.events) + 2, start=True)
        with sent(self.claims[grip.worker], "_append", twice):
            (write_result,) = self.claims[grip.worker].append([row])
        if starts:
            expected.start()
        assert write_result == (WriteResult(expected.stop_as or "ok") if starts or runs else WriteResult.FENCED)

    @rule(grip=grips, chunk=chunks, twice=twice)
    def write(self, grip: Grip, chunk: tuple[str, int], twice: bool) -> None:
        expected = self.known(grip)
        holds, (text, count) = expected.is_run_by(grip), chunk
        row = Append(grip.job_id, grip.attempt, grip.claimed_at, len(expected.events) + 1, text, (1,) * count)
        with sent(self.claims[grip.worker], "_append", twice):
            (write_result,) = self.claims[grip.worker].append([row])
        assert write_result == (WriteResult(expected.stop_as or "ok") if holds else WriteResult.FENCED)
        if holds:
            expected.text += text
            expected.tokens += count
            expected.events.append("chunk")

    @rule(
        grip=grips,
        status=st.sampled_from([status for status in Status if status.terminal]),
        counts=st.booleans(),
        begins=st.booleans(),
        twice=twice,
    )
    def end(self, grip: Grip, status: Status, counts: bool, begins: bool, twice: bool) -> None:
        """Also that of a job whose attempt begins and ends at once."""
        expected = self.known(grip)
        starts = begins and expected.is_reserved_by(grip)
        already = (expected.status, expected.attempt, expected.claimed_at) == (status, grip.attempt, grip.claimed_at)
        code = "engine_error" if status is Status.FAILED else None
        ending = Ending(status, completion_tokens=expected.tokens if counts else None, error_code=code)
        n = len(expected.events) + 1 + starts
        row = Append(grip.job_id, grip.attempt, grip.claimed_at, n, start=begins, ending=ending)
        if starts:
            expected.start()
        holds = expected.is_run_by(grip)
        with sent(self.claims[grip.worker], "_append", twice):
            (write_result,) = self.claims[grip.worker].append([row])
        if holds:
            assert write_result == (WriteResult.OK if twice else WriteResult(expected.stop_as or "ok"))
            expected.end(status, code)
        else:
            assert write_result is (WriteResult.OK if already else WriteResult.FENCED)

    @rule(grip=grips, twice=twice)
    def hand_back(self, grip: Grip, twice: bool) -> None:
        """Also what the worker was told that it holds and does not know of."""
        claims, expected = self.claims[grip.worker], self.known(grip)
        with sent(claims, "_release", twice):
            models = claims.release([(grip.job_id, grip.claimed_at)])
        if (expected.holder, expected.claimed_at) == (grip.worker, grip.claimed_at) and not expected.status.terminal:
            expected.give_up(AttemptEnd.HANDED_BACK)
            waits = expected.status is Status.QUEUED
            assert twice or models == ([MODEL] if waits else [])

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
        self.graced.discard(worker)


def test_whatever_happens_the_queue_is_as_the_model_says(valkey_client: Redis) -> None:
    # The real server, because it is also several times faster here than the fake one.
    bounds = settings(max_examples=80, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(lambda: Queue(valkey_client), settings=bounds)
