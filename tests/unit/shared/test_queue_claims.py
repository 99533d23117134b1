"""Submission of jobs, and their reservation by workers, including fairness between owners."""

from __future__ import annotations

import pytest

from shared.errors import Expiry, JobFailure, KeyReused, Unavailable
from shared.jobs.record import Priority, Status
from shared.jobs.store import Jobs
from shared.queue.claims import Claims, Demand, NoLease, WriteResult
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import (
    MODEL,
    MUCH,
    age,
    kinds,
    lapse,
    lease,
    reap,
    reserved,
    row,
    run,
    started,
    submission,
    submit,
    taken,
)


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return Jobs(client, Settings(max_queue=50, max_queue_per_key=50, durable=False))


@pytest.fixture
def worker(client: Redis) -> Claims:
    return lease(client, "w1")


# Submission


def test_submission_creates_record_place_and_first_event(client: Redis, jobs: Jobs) -> None:
    accepted = jobs.create(submission(metadata={"k": "v"}, request_id="r1"))
    job = accepted.job
    assert accepted.new and accepted.place is not None and accepted.place.position == 1
    assert (job.status, job.metadata, job.request_id) == (Status.QUEUED, {"k": "v"}, "r1")
    assert kinds(client, job) == ["queued"]


def test_workers_are_woken_once_until_the_next_claim(client: Redis, jobs: Jobs, worker: Claims) -> None:
    assert [jobs.create(submission()).wake for _ in range(3)] == [True, False, False]
    assert 0 < client.pttl(keys.WAKE + MODEL) <= 1000
    assert jobs.create(submission(model="other")).wake
    taken(worker)
    assert jobs.create(submission()).wake


def test_same_idempotency_key_returns_the_same_job(jobs: Jobs) -> None:
    first, again = (jobs.create(submission(idempotency_key="k", fingerprint="f")) for _ in range(2))
    other = jobs.create(submission("b", idempotency_key="k", fingerprint="g"))
    assert (first.new, again.new, again.wake) == (True, False, False)
    assert first.job.id == again.job.id != other.job.id
    with pytest.raises(KeyReused):
        jobs.create(submission(idempotency_key="k", fingerprint="another"))


def test_full_queue_rejects_a_job_and_stores_nothing(client: Redis) -> None:
    jobs = Jobs(client, Settings(max_queue=2, max_queue_per_key=2, durable=False))
    for _ in range(2):
        submit(jobs)
    before = client.dbsize()
    with pytest.raises(Unavailable) as caught:
        jobs.create(submission("b", idempotency_key="k"))
    assert caught.value.code == "queue_full" and client.dbsize() == before


def test_repeated_call_still_reports_a_new_job(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue = jobs._enqueue

    def send_twice(args: list[object]) -> object:  # as redis-py does if the first reply is lost
        enqueue(args=args)
        return enqueue(args=args)

    monkeypatch.setattr(jobs, "_enqueue", send_twice)
    accepted = jobs.create(submission())
    assert accepted.new and accepted.place is not None and accepted.place.position == 1


# Reservation


def test_reserved_job_keeps_its_place_and_its_status(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    claimed = taken(worker)
    assert (claimed.job.id, claimed.job.attempt, claimed.job.started_at) == (job.id, 1, None)
    waiting = jobs.get(job.id, "a")
    assert (waiting.status, waiting.attempt, waiting.history, jobs.position(waiting)) == (Status.QUEUED, 0, (), 1)
    assert reserved(worker) == [], "a job is reserved once"
    assert kinds(client, job) == ["queued"]


def test_claim_returns_request_tokens_and_age(client: Redis, jobs: Jobs, worker: Claims) -> None:
    tokenised = submission(tokens=(1, 70_000, 3), shared=2)
    jobs.create(tokenised)
    submit(jobs)
    known, unknown = reserved(worker, 2)
    assert (known.request, known.tokens, known.shared) == (tokenised.request, (1, 70_000, 3), 2)
    assert (unknown.tokens, unknown.shared) == (None, 0)
    assert 0 <= known.age_s < 5 and known.rank < unknown.rank


def test_claim_fills_free_rows_and_takes_a_few_spare_jobs(jobs: Jobs, worker: Claims, client: Redis) -> None:
    submitted = [submit(jobs).id for _ in range(5)]
    claimed = reserved(worker, 2, spare=1)
    assert [each.job.id for each in claimed] == submitted[:3]
    assert [client.hget(keys.JOB + job_id, "spare") for job_id in submitted[:3]] == [None, None, "1"]


def test_claim_takes_only_jobs_that_fit_in_memory(jobs: Jobs, worker: Claims) -> None:
    big = submit(jobs, tokens=(1,) * 500)
    small = [submit(jobs, tokens=(1,) * 90) for _ in range(4)]  # 100 with the answer
    claimed = reserved(worker, 9, tokens=250)
    assert [each.job.id for each in claimed] == [job.id for job in small[:2]], "smaller jobs that fit overtake"
    assert [each.job.id for each in reserved(worker, 9, tokens=0, spare=1)] == [big.id], "the large one can be a spare"


def test_worker_without_a_lease_cannot_claim(client: Redis, jobs: Jobs) -> None:
    submit(jobs)
    with pytest.raises(NoLease):
        Claims(client, "stranger").claim(MODEL, Demand(1, MUCH))
    assert client.hget(keys.JOB + jobs.recent("a", limit=1)[0].id, "worker") == ""


def test_spare_job_moves_to_a_worker_with_a_free_row(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    (spare,) = reserved(worker, 0, spare=1)
    other = lease(client, "w2")
    assert reserved(other, 0, spare=4) == [], "a worker without a free row does not take it over"
    (moved,) = reserved(other, 1)
    assert moved.job.id == job.id
    assert worker.append([row(spare, start=True)]) == [WriteResult.FENCED]
    assert worker.claim(MODEL, Demand(0, 0, waiting=(job.id,))).lost == (job.id,)
    assert other.append([row(moved, start=True)]) == [WriteResult.OK]
    assert kinds(client, job) == ["queued", "started"]
    assert not client.exists(keys.RESERVED + "w1", keys.RESERVED + "w2")


def test_job_that_waits_in_a_full_worker_moves_to_a_worker_with_a_free_row(
    client: Redis, jobs: Jobs, worker: Claims
) -> None:
    job = submit(jobs)
    taken(worker)
    other = lease(client, "w2")
    assert reserved(other, 1) == []
    claim = worker.claim(MODEL, Demand(0, 0, waiting=(job.id,)))
    assert (claim.jobs, claim.lost) == ((), ())
    assert [each.job.id for each in reserved(other, 1)] == [job.id]


def test_job_that_was_taken_over_stays_for_a_minimum_time(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    taken(worker)
    other = lease(client, "w2")
    waiting = Demand(0, 0, waiting=(job.id,))
    for holder, taker, stays_s in ((worker, other, 0), (other, worker, 10), (worker, other, 20)):
        holder.claim(MODEL, waiting)
        if stays_s:
            assert reserved(taker, 1) == []
            claimed_at = float(client.hget(keys.JOB + job.id, "claimed_at"))
            client.hset(keys.JOB + job.id, "claimed_at", claimed_at - stays_s + 1)
            assert reserved(taker, 1) == []
            client.hset(keys.JOB + job.id, "claimed_at", claimed_at - stays_s)
        (moved,) = reserved(taker, 1)
    assert other.append([row(moved, start=True)]) == [WriteResult.OK]
    assert not client.hexists(keys.JOB + job.id, "moves")


def test_reservation_ends_with_the_lease(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    late = taken(worker)
    lapse(client, "w1")
    other = lease(client, "w2")
    assert taken(other).job.id == job.id
    assert worker.append([row(late, start=True)]) == [WriteResult.FENCED]
    assert reap(client) == []
    assert jobs.get(job.id, "a").attempt == 0


def test_reserved_job_can_be_cancelled(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    claimed = taken(worker)
    assert jobs.stop(job.id, "a").status is Status.CANCELLED
    assert worker.append([row(claimed, start=True)]) == [WriteResult.FENCED]
    assert kinds(client, job) == ["queued", "done"]
    assert not client.exists(keys.RESERVED + "w1")


def test_reserved_job_expires_if_it_does_not_start_in_time(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs, start_within_s=5)
    claimed = taken(worker)
    age(client, job, 60)
    reap(client)
    assert jobs.get(job.id, "a").error_code == Expiry.START
    assert worker.append([row(claimed, start=True)]) == [WriteResult.FENCED]
    assert not client.exists(keys.RESERVED + "w1")


def test_later_job_of_a_higher_class_is_claimed_first(jobs: Jobs, worker: Claims) -> None:
    batch = [submit(jobs, priority=Priority.BATCH).id for _ in range(4)]
    assert [each.job.id for each in reserved(worker, 1, spare=1)] == batch[:2]
    urgent = submit(jobs, "b", priority=Priority.HIGH)
    assert jobs.position(urgent) == 1, "also before reserved jobs"
    assert [each.job.id for each in reserved(worker, 2)] == [urgent.id, batch[2]]


def test_batch_jobs_leave_rows_free_for_others(jobs: Jobs, worker: Claims) -> None:
    batch = [submit(jobs, priority=Priority.BATCH).id for _ in range(6)]
    assert [each.job.id for each in reserved(worker, 5, spare=2, reserve=2)] == batch[:3]
    assert reserved(worker, 2, spare=2, reserve=2) == []
    normal = [submit(jobs, "b").id for _ in range(3)]
    assert [each.job.id for each in reserved(worker, 2, spare=1, reserve=2)] == normal, "two rows and a spare job"
    assert [each.job.id for each in reserved(worker, 3, reserve=2)] == batch[3:4]


# Fairness


def test_owners_take_turns(jobs: Jobs, worker: Claims) -> None:
    for owner in "aaaaabbc":
        submit(jobs, owner)
    assert [run(worker).job.owner for _ in range(8)] == list("abcabaaa")


def test_owners_take_turns_within_one_claim(jobs: Jobs, worker: Claims) -> None:
    for owner in "aaaaabbc":
        submit(jobs, owner)
    claims = [reserved(worker, 3), reserved(worker, 2, spare=1), reserved(worker, 9)]
    assert [each.job.owner for claim in claims for each in claim] == list("abcabaaa")


def test_new_owner_does_not_wait_for_all_jobs_of_another(jobs: Jobs, worker: Claims) -> None:
    for _ in range(10):
        submit(jobs, "a")
    assert [started(worker).job.owner for _ in range(4)] == ["a"] * 4
    submit(jobs, "b")
    assert {started(worker).job.owner for _ in range(2)} == {"a", "b"}


def test_turns_are_reset_when_the_queue_is_empty(client: Redis, jobs: Jobs, worker: Claims) -> None:
    submit(jobs, "a")
    assert client.exists(keys.TURNS + MODEL)
    started(worker)
    assert not client.exists(keys.TURNS + MODEL), "an empty queue has no turns"


def test_running_or_preempted_job_is_neither_spare_nor_lost(client: Redis, jobs: Jobs, worker: Claims) -> None:
    submit(jobs)
    claimed = started(worker)
    assert worker.claim(MODEL, Demand(0, 0, waiting=(claimed.job.id,))).lost == ()
    assert not client.hexists(keys.JOB + claimed.job.id, "spare")


def test_job_that_cannot_be_parsed_fails_alone(client: Redis, jobs: Jobs, worker: Claims) -> None:
    bad, lost, newer, other, good = (submit(jobs) for _ in range(5))
    client.hset(keys.JOB + bad.id, "metadata", "{")
    client.delete(keys.REQUEST + lost.id)
    client.hset(keys.REQUEST + newer.id, "request", '{"format": 2}')
    client.hset(keys.REQUEST + other.id, "request", "[]")
    assert [each.job.id for each in reserved(worker, 5)] == [good.id]
    for job in (bad, lost, newer, other):
        assert client.hmget(keys.JOB + job.id, "status", "error_code") == ["failed", JobFailure.ENGINE]
    assert client.smembers(keys.RESERVED + "w1") == {good.id}
