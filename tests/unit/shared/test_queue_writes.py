"""Workers' writes: admission, output, fencing, and handing back."""

from __future__ import annotations

import json

import pytest

from shared.errors import JobFailure
from shared.jobs.log import EventKind, JobLog
from shared.jobs.record import AttemptEnd, Ending, Priority, Status
from shared.jobs.store import Jobs
from shared.queue.claims import Append, Claims, WriteResult
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import (
    MODEL,
    SUCCESS,
    end,
    held,
    kinds,
    lapse,
    lease,
    reap,
    row,
    started,
    submit,
    taken,
)


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return Jobs(client, Settings(max_queue=50, max_queue_per_key=50, durable=False))


@pytest.fixture
def worker(client: Redis) -> Claims:
    return lease(client, "w1")


def test_admission_starts_the_attempt_of_the_claim(client: Redis, jobs: Jobs, worker: Claims) -> None:
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


def test_the_record_names_the_stop_string_that_ended_the_text(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    ending = Ending(Status.SUCCEEDED, "stop", stop_string='é"\n')
    worker.append([row(taken(worker), 3, "text", 1, start=True, ending=ending)])
    assert jobs.get(job.id, "a").stop_string == 'é"\n'


def test_repeated_writes_have_no_effect(client: Redis, jobs: Jobs, worker: Claims) -> None:
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
def test_any_text_is_stored_unchanged(client: Redis, jobs: Jobs, worker: Claims, text: str) -> None:
    job = submit(jobs)
    claimed = started(worker)
    worker.append([row(claimed, 3, text, 7, extra='"logprobs":[{"token":7}]')])
    (chunk,) = JobLog(client).read(job.id, after=2)
    assert json.loads(chunk.data) == {"text": text, "logprobs": [{"token": 7}]}
    assert chunk.text == jobs.text(jobs.get(job.id, "a")) == text


def test_prompt_tokens_of_a_worker_are_stored_for_later_attempts(client: Redis, jobs: Jobs, worker: Claims) -> None:
    submit(jobs)
    claimed = taken(worker)
    worker.append([row(claimed, start=True, prompt=(5, 6))])
    worker.release([held(claimed)])
    assert taken(worker).tokens == (5, 6)


def test_write_of_an_older_attempt_is_fenced(client: Redis, jobs: Jobs, worker: Claims) -> None:
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


def test_write_that_would_leave_a_gap_is_fenced(client: Redis, jobs: Jobs, worker: Claims) -> None:
    submit(jobs)
    claimed = started(worker)
    worker.append([row(claimed, 3, "he", 1)])
    assert worker.append([row(claimed, 5, "o", 3)]) == [WriteResult.FENCED]
    assert worker.append([row(claimed, 5, "o", 3, ending=SUCCESS)]) == [WriteResult.FENCED]
    assert worker.append([row(claimed, 5, ending=SUCCESS)]) == [WriteResult.FENCED], "the end of the text is missing"
    worker.release([held(claimed)])
    again = started(worker)
    assert (again.job.attempt, JobLog(client).written(again.job.id).text) == (2, "he")


def test_write_of_another_claim_with_the_same_attempt_is_fenced(client: Redis, jobs: Jobs, worker: Claims) -> None:
    """A Redis that has lost its last writes may give the same attempt number to two claims."""
    submit(jobs)
    first = taken(worker)
    worker.release([held(first)])
    second = taken(worker)
    assert first.job.attempt == second.job.attempt
    assert worker.append([row(first, start=True)]) == [WriteResult.FENCED]
    assert worker.append([row(second, start=True)]) == [WriteResult.OK]


def test_published_events_equal_those_in_the_log(client: Redis, jobs: Jobs, worker: Claims) -> None:
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


def test_large_events_are_only_in_the_log(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    claimed = taken(worker)
    listener = client.pubsub(ignore_subscribe_messages=True)
    listener.subscribe(keys.LIVE + job.id)
    listener.get_message(timeout=1)
    worker.append([row(claimed, start=True)])
    worker.append([row(claimed, 3, "x" * 2**18, 1)])
    worker.append([row(claimed, 4, "y", 1, ending=SUCCESS)])
    published = [listener.get_message(timeout=1)["data"] for _ in range(3)]
    listener.close()
    assert [each.partition(" ")[0] for each in published] == ["2", "4", "5"], "the gap makes readers read the log"
    assert [event.n for event in JobLog(client).read(job.id)] == [1, 2, 3, 4, 5]


# Handing back


@pytest.mark.parametrize("how", ["release", "retire"])
def test_released_reservation_counts_as_no_attempt(client: Redis, jobs: Jobs, worker: Claims, how: str) -> None:
    job = submit(jobs)
    claimed = taken(worker)
    assert (worker.retire() if how == "retire" else worker.release([held(claimed)])) == [MODEL]
    assert not client.exists(keys.RESERVED + "w1")
    again = taken(lease(client, "w2"))
    assert (again.job.id, again.job.attempt, again.job.started_at) == (job.id, 1, None)
    assert kinds(client, job) == ["queued"]


def test_job_that_is_handed_back_returns_to_the_front_of_its_class(client: Redis, jobs: Jobs, worker: Claims) -> None:
    first = submit(jobs)
    submit(jobs, "b")
    urgent = submit(jobs, priority=Priority.HIGH)
    running = [started(worker) for _ in range(2)]
    assert [each.job.id for each in running] == [urgent.id, first.id]
    worker.release(map(held, running))
    assert [jobs.position(jobs.get(job.id, "a")) for job in (urgent, first)] == [1, 2]


def test_handing_back_does_not_count_as_a_crash(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    for attempt in range(1, 6):
        claimed = started(worker)
        assert claimed.job.attempt == attempt
        assert worker.release([held(claimed)]) == [MODEL]
    assert jobs.get(job.id, "a").status is Status.QUEUED
    assert not client.hexists(keys.JOB + job.id, "deaths")


def test_release_of_an_earlier_claim_does_not_release_a_later_one(jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    first = started(worker)
    worker.release([held(first)])
    second = started(worker)
    assert worker.release([held(first)]) == []
    assert jobs.get(job.id, "a").status is Status.RUNNING
    end(worker, second)


def test_retiring_worker_leaves_no_keys(client: Redis, jobs: Jobs, worker: Claims) -> None:
    running, reserved = submit(jobs), submit(jobs)
    started(worker), taken(worker)
    client.set(keys.WORKER + "w1", "{}")
    assert worker.retire() == [MODEL]
    assert not client.exists(
        *(key + "w1" for key in (keys.RUNNING, keys.RESERVED, keys.WORKER)), keys.LEASES, keys.EXTENSIONS
    )
    assert [jobs.get(job.id, "a").status for job in (running, reserved)] == [Status.QUEUED] * 2


def test_history_contains_the_end_of_each_attempt(client: Redis, jobs: Jobs, worker: Claims) -> None:
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
    times = [time for each in history for time in (each.started_at, each.ended_at)]
    assert times == sorted(times, key=float), "attempts do not overlap"
    reasons = [json.loads(event.data) for event in JobLog(client).read(job.id) if event.kind is EventKind.QUEUED]
    assert reasons == [{"reason": "accepted"}, {"reason": "worker_lost"}, {"reason": "handed_back"}]


def test_history_keeps_the_last_attempts(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    for _ in range(30):
        worker.release([held(started(worker))])
    assert [each.number for each in jobs.get(job.id, "a").history] == list(range(11, 31))
    assert len([name for name in client.hkeys(keys.JOB + job.id) if name.startswith("attempt:")]) == 20


def test_empty_append_changes_nothing(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    claimed = started(worker)
    before = client.hgetall(keys.JOB + job.id)
    assert worker.append([Append(job.id, 1, claimed.job.claimed_at, 3)]) == [WriteResult.OK]
    assert client.hgetall(keys.JOB + job.id) == before


def test_failed_attempt_keeps_the_token_count_of_earlier_ones(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    first = started(worker)
    worker.append([row(first, 3, "one two", 1, 2)])
    worker.release([held(first)])
    second = taken(worker)
    ending = Ending(Status.FAILED, error_code=JobFailure.ENGINE, error_message="The worker could not start this job.")
    worker.append([row(second, start=True, ending=ending)])
    ended = jobs.get(job.id, "a")
    assert (ended.status, ended.attempt, jobs.text(ended), ended.completion_tokens) == (Status.FAILED, 2, "one two", 2)
