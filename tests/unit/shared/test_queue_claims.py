"""How jobs enter the queue and how workers reserve them: acceptance, reservation and fairness."""

from __future__ import annotations

import pytest

from shared.errors import Expiry, JobFailure, KeyReused, Unavailable
from shared.jobs.record import Priority, Status
from shared.jobs.store import Jobs
from shared.queue import keys
from shared.queue.claims import Claims, Demand, NoLease, WriteResult
from shared.queue.redis import Redis
from shared.settings import Settings
from tests.support.queueing import (
    MODEL,
    MUCH,
    kinds,
    lapse,
    lease,
    over,
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
    return Jobs(client, Settings(max_queue=50, durable=False))


@pytest.fixture
def worker(client: Redis) -> Claims:
    return lease(client, "w1")


# Acceptance


def test_a_job_has_its_record_place_and_first_event_once_created(client: Redis, jobs: Jobs) -> None:
    accepted = jobs.create(submission(metadata={"k": "v"}, request_id="r1"))
    job = accepted.job
    assert (accepted.new, accepted.position) == (True, 1)
    assert (job.status, job.metadata, job.request_id) == (Status.QUEUED, {"k": "v"}, "r1")
    assert kinds(client, job) == ["queued"]


def test_workers_are_woken_once_until_somebody_claims(client: Redis, jobs: Jobs, worker: Claims) -> None:
    assert [jobs.create(submission()).wake for _ in range(3)] == [True, False, False]
    assert 0 < client.pttl(keys.WAKE + MODEL) <= 1000
    assert jobs.create(submission(model="other")).wake
    taken(worker)
    assert jobs.create(submission()).wake


def test_the_same_idempotency_key_gives_the_same_job(jobs: Jobs) -> None:
    first, again = (jobs.create(submission(idempotency_key="k", fingerprint="f")) for _ in range(2))
    other = jobs.create(submission("b", idempotency_key="k", fingerprint="g"))
    assert (first.new, again.new, again.wake) == (True, False, False)
    assert first.job.id == again.job.id != other.job.id
    with pytest.raises(KeyReused):
        jobs.create(submission(idempotency_key="k", fingerprint="another"))


def test_a_full_queue_refuses_and_keeps_nothing(client: Redis) -> None:
    jobs = Jobs(client, Settings(max_queue=2, durable=False))
    for _ in range(2):
        submit(jobs)
    before = client.dbsize()
    with pytest.raises(Unavailable) as refused:
        jobs.create(submission("b", idempotency_key="k"))
    assert refused.value.code == "queue_full" and client.dbsize() == before


def test_an_acceptance_sent_again_is_still_a_new_job(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue = jobs._enqueue

    def sent_again(args: list[object]) -> object:  # as redis-py does when the first answer is lost
        enqueue(args=args)
        return enqueue(args=args)

    monkeypatch.setattr(jobs, "_enqueue", sent_again)
    accepted = jobs.create(submission())
    assert accepted.new and accepted.position == 1


# Reservation


def test_a_reserved_job_keeps_its_place_and_its_state(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    claimed = taken(worker)
    assert (claimed.job.id, claimed.job.attempt, claimed.job.started_at) == (job.id, 1, None)
    waiting = jobs.get(job.id, "a")
    assert (waiting.status, waiting.attempt, waiting.history, jobs.position(waiting)) == (Status.QUEUED, 0, (), 1)
    assert reserved(worker) == [], "it is reserved once"
    assert kinds(client, job) == ["queued"]


def test_a_claim_carries_request_tokens_and_age(client: Redis, jobs: Jobs, worker: Claims) -> None:
    asked = submission(tokens=(1, 70_000, 3), shared=2)
    jobs.create(asked)
    submit(jobs)
    known, unknown = reserved(worker, 2)
    assert (known.request, known.tokens, known.shared) == (asked.request, (1, 70_000, 3), 2)
    assert (unknown.tokens, unknown.shared) == (None, 0)
    assert 0 <= known.age_s < 5 and known.rank < unknown.rank


def test_a_claim_takes_as_many_as_there_are_rows_and_a_few_spare_ones(
    jobs: Jobs, worker: Claims, client: Redis
) -> None:
    made = [submit(jobs).id for _ in range(5)]
    claimed = reserved(worker, 2, spare=1)
    assert [each.job.id for each in claimed] == made[:3]
    assert [client.hget(keys.JOB + job_id, "spare") for job_id in made[:3]] == [None, None, "1"]


def test_a_claim_takes_no_more_tokens_than_there_is_memory_for(jobs: Jobs, worker: Claims) -> None:
    big = submit(jobs, tokens=(1,) * 500)
    small = [submit(jobs, tokens=(1,) * 90) for _ in range(4)]  # with its answer 100
    claimed = reserved(worker, 9, tokens=250)
    assert [each.job.id for each in claimed] == [job.id for job in small[:2]], "a smaller one that fits overtakes"
    assert [each.job.id for each in reserved(worker, 9, tokens=0, spare=1)] == [big.id], "at hand when there is room"


def test_a_worker_without_a_lease_claims_nothing(client: Redis, jobs: Jobs) -> None:
    submit(jobs)
    with pytest.raises(NoLease):
        Claims(client, "stranger").claim(MODEL, Demand(1, MUCH))
    assert client.hget(keys.JOB + jobs.recent("a", limit=1)[0].id, "worker") == ""


def test_a_spare_job_moves_to_a_worker_with_room(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    (spare,) = reserved(worker, 0, spare=1)
    other = lease(client, "w2")
    assert reserved(other, 0, spare=4) == [], "one that has no room either leaves it where it is"
    (moved,) = reserved(other, 1)
    assert moved.job.id == job.id
    assert worker.append([row(spare, start=True)]) == [WriteResult.FENCED]
    assert worker.claim(MODEL, Demand(0, 0, waiting=(job.id,))).lost == (job.id,)
    assert other.append([row(moved, start=True)]) == [WriteResult.OK]
    assert kinds(client, job) == ["queued", "started"]
    assert not client.exists(keys.RESERVED + "w1", keys.RESERVED + "w2")


def test_a_job_that_waits_in_a_full_worker_moves_to_a_worker_with_room(
    client: Redis, jobs: Jobs, worker: Claims
) -> None:
    job = submit(jobs)
    taken(worker)
    other = lease(client, "w2")
    assert reserved(other, 1) == []
    answer = worker.claim(MODEL, Demand(0, 0, waiting=(job.id,)))
    assert (answer.jobs, answer.lost) == ((), ())
    assert [each.job.id for each in reserved(other, 1)] == [job.id]


def test_a_job_that_was_taken_over_stays_so_that_memory_can_be_kept_for_it(
    client: Redis, jobs: Jobs, worker: Claims
) -> None:
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


def test_what_a_worker_without_a_lease_has_reserved_is_free_at_once(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    late = taken(worker)
    lapse(client, "w1")
    other = lease(client, "w2")
    assert taken(other).job.id == job.id
    assert worker.append([row(late, start=True)]) == [WriteResult.FENCED]
    assert reap(client) == []
    assert jobs.get(job.id, "a").attempt == 0


def test_a_reserved_job_can_be_cancelled(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    claimed = taken(worker)
    assert jobs.stop(job.id, "a").status is Status.CANCELLED
    assert worker.append([row(claimed, start=True)]) == [WriteResult.FENCED]
    assert kinds(client, job) == ["queued", "done"]
    assert not client.exists(keys.RESERVED + "w1")


def test_a_reserved_job_expires_when_its_time_to_start_is_over(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs, start_within_s=5)
    claimed = taken(worker)
    over(client, job, 60)
    reap(client)
    assert jobs.get(job.id, "a").error_code == Expiry.START
    assert worker.append([row(claimed, start=True)]) == [WriteResult.FENCED]
    assert not client.exists(keys.RESERVED + "w1")


def test_a_later_job_of_a_higher_class_is_claimed_before_those_that_wait(jobs: Jobs, worker: Claims) -> None:
    batch = [submit(jobs, priority=Priority.BATCH).id for _ in range(4)]
    assert [each.job.id for each in reserved(worker, 1, spare=1)] == batch[:2]
    urgent = submit(jobs, "b", priority=Priority.HIGH)
    assert jobs.position(urgent) == 1, "before the reserved ones, too"
    assert [each.job.id for each in reserved(worker, 2)] == [urgent.id, batch[2]]


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


def test_a_newcomer_is_served_next_and_not_behind_all(jobs: Jobs, worker: Claims) -> None:
    for _ in range(10):
        submit(jobs, "a")
    assert [started(worker).job.owner for _ in range(4)] == ["a"] * 4
    submit(jobs, "b")
    assert {started(worker).job.owner for _ in range(2)} == {"a", "b"}


def test_an_owner_gains_nothing_by_having_waited_before(client: Redis, jobs: Jobs, worker: Claims) -> None:
    submit(jobs, "a")
    assert client.exists(keys.TURNS + MODEL)
    started(worker)
    assert not client.exists(keys.TURNS + MODEL), "an empty queue keeps no turns"


def test_a_row_that_runs_or_was_preempted_is_neither_spare_nor_lost(client: Redis, jobs: Jobs, worker: Claims) -> None:
    submit(jobs)
    claimed = started(worker)
    assert worker.claim(MODEL, Demand(0, 0, waiting=(claimed.job.id,))).lost == ()
    assert not client.hexists(keys.JOB + claimed.job.id, "spare")


def test_a_job_whose_record_or_request_cannot_be_read_fails_alone(client: Redis, jobs: Jobs, worker: Claims) -> None:
    bad, lost, newer, other, good = (submit(jobs) for _ in range(5))
    client.hset(keys.JOB + bad.id, "metadata", "{")
    client.delete(keys.REQUEST + lost.id)
    client.hset(keys.REQUEST + newer.id, "request", '{"format": 2}')
    client.hset(keys.REQUEST + other.id, "request", "[]")
    assert [each.job.id for each in reserved(worker, 5)] == [good.id]
    for job in (bad, lost, newer, other):
        assert client.hmget(keys.JOB + job.id, "status", "error_code") == ["failed", JobFailure.ENGINE]
    assert client.smembers(keys.RESERVED + "w1") == {good.id}
