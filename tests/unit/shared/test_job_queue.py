"""The queue's scripts, one behaviour per test: accept, reserve, admit, write, stop, hand back."""

from __future__ import annotations

import json

import pytest

from shared.errors import Conflict, Expiry, Gone, JobFailure, KeyReused, NotFound, Unavailable
from shared.jobs.attempts import AttemptEnd
from shared.jobs.log import EventKind, JobLog
from shared.jobs.record import Ending, Job, Priority, Status
from shared.jobs.store import Jobs
from shared.queue import keys
from shared.queue.claims import Append, Claims, Demand, NoLease, WriteResult
from shared.queue.redis import Redis
from shared.settings import Settings
from tests.support.queueing import (
    MODEL,
    MUCH,
    SUCCESS,
    end,
    held,
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
    return Jobs(client, Settings(max_queue=50, durable=False))


@pytest.fixture
def worker(client: Redis) -> Claims:
    return lease(client, "w1")


def kinds(client: Redis, job: Job) -> list[str]:
    return [str(event.kind) for event in JobLog(client).read(job.id)]


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


# Admission and writes


def test_admission_starts_the_attempt_that_the_claim_foretold(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    claimed = taken(worker)
    assert worker.append([row(claimed, start=True)]) == [WriteResult.OK]
    running = jobs.get(job.id, "a")
    assert (running.status, running.attempt, jobs.position(running)) == (Status.RUNNING, claimed.job.attempt, None)
    assert running.started_at is not None and running.started_at >= job.created_at
    events = JobLog(client).read(job.id)
    assert [(event.n, event.kind) for event in events] == [(1, EventKind.QUEUED), (2, EventKind.STARTED)]
    assert json.loads(events[1].data) == {"attempt": 1}
    assert client.smembers(keys.RUNNING + "w1") == {job.id} and not client.exists(keys.RESERVED + "w1")


def test_writes_and_the_end_arrive_once_however_often_they_are_sent(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    claimed = taken(worker)
    rows = [row(claimed, 3, "hel", 1, 2, start=True), row(claimed, 4, "lo", 3, ending=SUCCESS)]
    for each in rows:
        assert [worker.append([each]) for _ in range(3)] == [[WriteResult.OK]] * 3
    done = jobs.get(job.id, "a")
    assert (done.status, jobs.text(done), done.finish_reason, done.completion_tokens) == (
        Status.SUCCEEDED, "hello", "stop", 2,
    )  # fmt: skip
    assert kinds(client, job) == ["queued", "started", "chunk", "chunk", "done"]
    assert JobLog(client).written(job.id).tokens == (1, 2, 3)


@pytest.mark.parametrize("text", ["né🙂\n", 'a "quoted"\\ line/', "\x00\x7f\u2028", "0", "null"])
def test_any_text_arrives_as_it_was(client: Redis, jobs: Jobs, worker: Claims, text: str) -> None:
    job = submit(jobs)
    claimed = started(worker)
    worker.append([row(claimed, 3, text, 7, extra='"logprobs":[{"token":7}]')])
    (chunk,) = JobLog(client).read(job.id, after=2)
    assert json.loads(chunk.data) == {"text": text, "logprobs": [{"token": 7}]}
    assert chunk.text == jobs.text(jobs.get(job.id, "a")) == text


def test_a_prompt_that_a_worker_tokenised_is_kept_for_later_attempts(client: Redis, jobs: Jobs, worker: Claims) -> None:
    submit(jobs)
    claimed = taken(worker)
    worker.append([row(claimed, start=True, prompt=(5, 6))])
    worker.release([held(claimed)])
    assert taken(worker).tokens == (5, 6)


def test_an_older_attempt_writes_nothing(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    first = started(worker)
    lapse(client, "w1")
    assert reap(client) == [MODEL]
    late = [row(first, 4, "late", 1), row(first, 4, "late", 1, ending=SUCCESS), row(first, start=True)]
    assert worker.append(late) == [WriteResult.FENCED] * 3
    worker.renew(60)
    assert started(worker).job.attempt == 2
    assert worker.append(late) == [WriteResult.FENCED] * 3
    assert kinds(client, job) == ["queued", "started", "queued", "resumed"]


def test_a_log_that_lost_its_tail_gets_no_gap(client: Redis, jobs: Jobs, worker: Claims) -> None:
    submit(jobs)
    claimed = started(worker)
    worker.append([row(claimed, 3, "he", 1)])
    assert worker.append([row(claimed, 5, "o", 3)]) == [WriteResult.FENCED]
    assert worker.append([row(claimed, 5, "o", 3, ending=SUCCESS)]) == [WriteResult.FENCED]
    assert worker.append([row(claimed, 5, ending=SUCCESS)]) == [WriteResult.FENCED], "its text would lack its end"
    worker.release([held(claimed)])
    again = started(worker)
    assert (again.job.attempt, JobLog(client).written(again.job.id).text) == (2, "he")


def test_a_write_by_another_claim_with_the_same_number_is_fenced(client: Redis, jobs: Jobs, worker: Claims) -> None:
    """A Redis that came back without its last writes gives the same attempt number to two claims."""
    submit(jobs)
    first = taken(worker)
    worker.release([held(first)])
    second = taken(worker)
    assert first.job.attempt == second.job.attempt
    assert worker.append([row(first, start=True)]) == [WriteResult.FENCED]
    assert worker.append([row(second, start=True)]) == [WriteResult.OK]


def test_live_copies_carry_what_the_log_has(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    claimed = started(worker)
    listener = client.pubsub(ignore_subscribe_messages=True)
    listener.subscribe(keys.LIVE + job.id, keys.DONE + job.id)
    listener.get_message(timeout=1), listener.get_message(timeout=1)
    worker.append([row(claimed, 3, 'a "quoted"\nline', 1)])
    worker.append([row(claimed, 4, ending=SUCCESS)])
    messages = [listener.get_message(timeout=1)["data"] for _ in range(3)]
    listener.close()
    (chunk, done) = JobLog(client).read(job.id, after=2)
    assert messages == [f"3 chunk {chunk.data}", f"4 done {done.data}", "succeeded"]


# Handing back


@pytest.mark.parametrize("how", ["release", "retire"])
def test_a_reserved_job_that_is_given_up_costs_no_attempt(client: Redis, jobs: Jobs, worker: Claims, how: str) -> None:
    job = submit(jobs)
    claimed = taken(worker)
    assert (worker.retire() if how == "retire" else worker.release([held(claimed)])) == [MODEL]
    assert not client.exists(keys.RESERVED + "w1")
    again = taken(lease(client, "w2"))
    assert (again.job.id, again.job.attempt, again.job.started_at) == (job.id, 1, None)
    assert kinds(client, job) == ["queued"]


def test_a_handed_back_job_goes_to_the_front_of_its_class(client: Redis, jobs: Jobs, worker: Claims) -> None:
    first = submit(jobs)
    submit(jobs, "b")
    urgent = submit(jobs, priority=Priority.HIGH)
    running = [started(worker) for _ in range(2)]
    assert [each.job.id for each in running] == [urgent.id, first.id]
    worker.release(map(held, running))
    assert [jobs.position(jobs.get(job.id, "a")) for job in (urgent, first)] == [1, 2]


def test_handing_back_blames_nobody(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    for attempt in range(1, 6):
        claimed = started(worker)
        assert claimed.job.attempt == attempt
        assert worker.release([held(claimed)]) == [MODEL]
    assert jobs.get(job.id, "a").status is Status.QUEUED
    assert not client.hexists(keys.JOB + job.id, "deaths")


def test_a_later_claim_of_the_same_worker_is_not_released_with_an_earlier_one(jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    first = started(worker)
    worker.release([held(first)])
    second = started(worker)
    assert worker.release([held(first)]) == []
    assert jobs.get(job.id, "a").status is Status.RUNNING
    end(worker, second)


def test_a_worker_that_retires_leaves_nothing_behind(client: Redis, jobs: Jobs, worker: Claims) -> None:
    ran, waited = submit(jobs), submit(jobs)
    started(worker), taken(worker)
    client.set(keys.WORKER + "w1", "{}")
    assert worker.retire() == [MODEL]
    assert not client.exists(
        *(key + "w1" for key in (keys.RUNNING, keys.RESERVED, keys.WORKER)), keys.LEASES, keys.EXTENSIONS
    )
    assert [jobs.get(job.id, "a").status for job in (ran, waited)] == [Status.QUEUED] * 2


def test_the_history_names_the_end_of_each_attempt(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    assert job.history == ()
    started(worker)
    lapse(client, "w1")
    reap(client)
    other = lease(client, "w2")
    other.release([held(started(other))])
    third = started(other)
    history = jobs.get(job.id, "a").history
    assert [(each.number, each.worker, each.how) for each in history] == [
        (1, "w1", AttemptEnd.WORKER_LOST),
        (2, "w2", AttemptEnd.HANDED_BACK),
        (3, "w2", None),
    ]
    end(other, third)
    *_, last = history = jobs.get(job.id, "a").history
    assert (last.number, last.how) == (3, AttemptEnd.ENDED)
    moments = [moment for each in history for moment in (each.started_at, each.ended_at)]
    assert moments == sorted(moments, key=float), "one attempt after the other"
    reasons = [json.loads(event.data) for event in JobLog(client).read(job.id) if event.kind is EventKind.QUEUED]
    assert reasons == [{"reason": "accepted"}, {"reason": "worker_lost"}, {"reason": "handed_back"}]


def test_the_history_keeps_the_newest_attempts(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    for _ in range(30):
        worker.release([held(started(worker))])
    assert [each.number for each in jobs.get(job.id, "a").history] == list(range(11, 31))
    assert len([name for name in client.hkeys(keys.JOB + job.id) if name.startswith("attempt:")]) == 20


# Stopping and expiring


def test_cancelling_a_waiting_job_ends_it(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    assert jobs.stop(job.id, "a").status is Status.CANCELLED
    assert reserved(worker) == []
    assert jobs.stop(job.id, "a").status is Status.CANCELLED, "asking again is no error"
    assert kinds(client, job) == ["queued", "done"]


def test_cancelling_a_running_job_asks_its_worker(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    claimed = started(worker)
    assert jobs.stop(job.id, "a").status is Status.RUNNING
    assert worker.append([row(claimed, 3, "he", 1)]) == [WriteResult.CANCELLED]
    assert [each.stop_as for each in worker.renew(60).running] == [WriteResult.CANCELLED]
    worker.append([row(claimed, 4, ending=Ending(Status.CANCELLED))])
    ended = jobs.get(job.id, "a")
    assert (ended.status, jobs.text(ended)) == (Status.CANCELLED, "he")


def test_cancelling_what_has_ended_is_refused(jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    run(worker)
    with pytest.raises(Conflict):
        jobs.stop(job.id, "a")


@pytest.mark.parametrize("how", ["lost", "handed back"])
def test_a_job_that_was_asked_to_stop_is_not_continued(client: Redis, jobs: Jobs, worker: Claims, how: str) -> None:
    job = submit(jobs)
    claimed = started(worker)
    worker.append([row(claimed, 3, "hé", 1, 2)])
    jobs.stop(job.id, "a")
    if how == "lost":
        lapse(client, "w1")
        assert reap(client, max_deaths=1) == []
    else:
        assert worker.release([held(claimed)]) == []
    ended = jobs.get(job.id, "a")
    assert (ended.status, jobs.text(ended), ended.completion_tokens) == (Status.CANCELLED, "hé", 2)


def over(client: Redis, job: Job, seconds: float) -> None:
    """Move a job so far into the past that so many seconds of its life are over; its place in the queue stays."""
    for name in ("created_at", "end_by"):
        moment = float(client.hget(keys.JOB + job.id, name))
        client.hset(keys.JOB + job.id, name, f"{moment - seconds:.6f}")
    client.zincrby(keys.TIMERS, -seconds, job.id)


@pytest.mark.parametrize(
    ("limits", "stated"),
    [
        ({"start_within_s": 5}, "5 s (start_within_s)"),
        ({"start_within_s": 0.25, "deadline_s": 600}, "0.25 s (start_within_s)"),
        ({"start_within_s": 600, "deadline_s": 100}, "100 s (deadline_s)"),
    ],
)
@pytest.mark.parametrize("by", ["reaper", "claim"])
def test_a_job_that_never_starts_in_its_time_expires(
    client: Redis, jobs: Jobs, worker: Claims, limits: dict[str, float], stated: str, by: str
) -> None:
    job = submit(jobs, **limits)
    following = submit(jobs)
    over(client, job, 200)
    if by == "reaper":
        assert reap(client) == []
    assert taken(worker).job.id == following.id, "nothing starts after its time, however late the reaper comes"
    ended = jobs.get(job.id, "a")
    assert (ended.status, ended.error_code, ended.started_at) == (Status.EXPIRED, Expiry.START, None)
    assert ended.error_message == f"The job did not start within {stated}."
    assert (jobs.text(ended), ended.history) == ("", ())


def test_a_running_job_is_cut_off_at_its_deadline(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs, start_within_s=5, deadline_s=90)
    claimed = started(worker)
    over(client, job, 60)
    reap(client)
    assert worker.append([row(claimed, 3, "he", 1)]) == [WriteResult.OK], "the time to start is over and done with"
    over(client, job, 60)
    reap(client)
    assert worker.append([row(claimed, 4, "l", 2)]) == [WriteResult.EXPIRED]
    worker.append([row(claimed, 5, ending=Ending(Status.EXPIRED, completion_tokens=2))])
    ended = jobs.get(job.id, "a")
    assert (ended.status, ended.error_code) == (Status.EXPIRED, Expiry.DEADLINE)
    assert ended.error_message == "The job did not end within 90 s (deadline_s)."
    assert (jobs.text(ended), ended.completion_tokens) == ("hel", 2)


@pytest.mark.parametrize("by", ["reaper", "claim"])
def test_once_started_only_the_deadline_counts(client: Redis, jobs: Jobs, worker: Claims, by: str) -> None:
    job = submit(jobs, start_within_s=5, deadline_s=90)
    claimed = started(worker)
    worker.append([row(claimed, 3, "né🙂\n", 1, 2, 3), row(claimed, 4, "!", 4)])
    worker.release([held(claimed)])
    over(client, job, 60)
    reap(client)
    assert jobs.get(job.id, "a").status is Status.QUEUED
    over(client, job, 60)
    if by == "reaper":
        reap(client)
    assert reserved(worker) == []
    ended = jobs.get(job.id, "a")
    assert (ended.status, ended.error_code) == (Status.EXPIRED, Expiry.DEADLINE)
    assert (jobs.text(ended), ended.completion_tokens) == ("né🙂\n!", 4)


def test_admission_ends_the_time_to_start(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs, start_within_s=100, deadline_s=1000)
    claimed = taken(worker)
    assert client.zscore(keys.TIMERS, job.id) == pytest.approx(job.created_at + 100, abs=1), "a reservation does not"
    worker.append([row(claimed, start=True)])
    assert client.zscore(keys.TIMERS, job.id) == pytest.approx(job.created_at + 1000, abs=1)


def test_a_queue_of_jobs_whose_time_is_over_is_gone_through_in_parts(client: Redis, worker: Claims) -> None:
    jobs = Jobs(client, Settings(durable=False))
    late = [submit(jobs).id for _ in range(250)]
    client.zadd(keys.TIMERS, dict.fromkeys(late, 1.0))
    good = submit(jobs)
    assert reserved(worker) == []
    assert 1 < client.zcard(keys.QUEUE + MODEL) <= 51
    assert taken(worker).job.id == good.id


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


# Owners' views, and what is kept


def test_another_owner_sees_no_job(jobs: Jobs) -> None:
    job = submit(jobs)
    for call in (jobs.get, jobs.stop, jobs.forget):
        with pytest.raises(NotFound):
            call(job.id, "b")
    assert jobs.get(job.id, "a").status is Status.QUEUED


def test_only_an_ended_job_is_forgotten(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs, idempotency_key="k")
    for advance in (lambda: None, lambda: taken(worker)):
        advance()
        with pytest.raises(Conflict):
            jobs.forget(job.id, "a")
    jobs.stop(job.id, "a")
    jobs.forget(job.id, "a")
    assert not [name for name in client.keys("*") if job.id in name or "idem" in name]
    assert jobs.recent("a", limit=5) == []


@pytest.mark.parametrize("missing", [1, 3, 4, 5])
def test_a_log_with_a_gap_is_not_read_over_it(client: Redis, jobs: Jobs, worker: Claims, missing: int) -> None:
    job = submit(jobs)
    claimed = started(worker)
    worker.append([row(claimed, n, str(n), n) for n in (3, 4, 5)])
    log = JobLog(client)
    assert log.written(job.id, 5).text == "345"
    client.xdel(keys.LOG + job.id, f"{missing}-0")
    with pytest.raises(Gone, match=f"event {missing} "):
        log.written(job.id, 5)
    assert [event.n for event in log.read(job.id, after=missing)] == list(range(missing + 1, 6))
    assert jobs.text(jobs.get(job.id, "a")) == "345", "the text has a key of its own"
    client.delete(keys.LOG + job.id)
    with pytest.raises(Gone):
        log.written(job.id, 5)


def test_a_job_has_ended_whatever_became_of_its_log(client: Redis, jobs: Jobs) -> None:
    job, log = submit(jobs), JobLog(client)
    client.delete(keys.LOG + job.id)
    assert not log.ended(job.id)
    jobs.stop(job.id, "a")
    client.delete(keys.LOG + job.id)
    assert log.ended(job.id)
    jobs.forget(job.id, "a")
    assert log.ended(job.id)


@pytest.mark.parametrize(("log_retention_s", "lives_s"), [(None, 77), (33, 33)])
def test_what_has_ended_lives_as_long_as_its_retention(
    client: Redis, worker: Claims, log_retention_s: int | None, lives_s: int
) -> None:
    jobs = Jobs(client, Settings(retention_s=77, log_retention_s=log_retention_s, durable=False))
    job = submit(jobs, idempotency_key="k")
    claimed = started(worker)
    worker.append([row(claimed, 3, "x", 1)])
    own = [keys.JOB + job.id, keys.OUTPUT + job.id, f"{keys.IDEM}a:k"]
    assert {client.ttl(key) for key in (*own, keys.LOG + job.id)} == {-1}
    end(worker, claimed)
    assert {client.ttl(key) for key in own} == {77}
    assert client.ttl(keys.LOG + job.id) == lives_s


def test_a_list_of_jobs_long_gone_is_cleared_however_long_it_is(client: Redis, jobs: Jobs) -> None:
    client.zadd(keys.OWNER + "a", {f"job_{n}": n for n in range(1100)})
    assert jobs.recent("a", limit=1) == []
    assert client.zcard(keys.OWNER + "a") == 0


def test_the_list_of_an_owner_who_never_looks_does_not_grow(client: Redis, jobs: Jobs) -> None:
    client.zadd(keys.OWNER + "a", {f"job_{n}": n for n in range(10)})
    made = {submit(jobs).id for _ in range(6)}
    assert set(client.zrange(keys.OWNER + "a", 0, -1)) == made


def test_the_list_is_newest_first_and_pages(jobs: Jobs) -> None:
    made = [submit(jobs) for _ in range(5)]
    page = jobs.recent("a", limit=2)
    rest = jobs.recent("a", limit=9, before=page[-1].created_at)
    assert [job.id for job in page + rest] == [job.id for job in reversed(made)]


def test_an_append_without_news_changes_nothing(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    claimed = started(worker)
    before = client.hgetall(keys.JOB + job.id)
    assert worker.append([Append(job.id, 1, claimed.job.claimed_at, 3)]) == [WriteResult.OK]
    assert client.hgetall(keys.JOB + job.id) == before


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


def test_a_failed_attempt_keeps_the_count_of_what_was_written_before(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    first = started(worker)
    worker.append([row(first, 3, "one two", 1, 2)])
    worker.release([held(first)])
    second = taken(worker)
    ending = Ending(Status.FAILED, error_code=JobFailure.ENGINE, error_message="The worker could not start this job.")
    worker.append([row(second, start=True, ending=ending)])
    ended = jobs.get(job.id, "a")
    assert (ended.status, ended.attempt, jobs.text(ended), ended.completion_tokens) == (Status.FAILED, 2, "one two", 2)
