"""The queue's scripts, one behaviour a test: accept, claim, write, stop, hand back, lapse."""

import json

import pytest

from shared.errors import Conflict, Expiry, Gone, JobFailure, KeyReused, NotFound, Unavailable
from shared.jobs.attempts import AttemptEnd
from shared.jobs.log import EventKind, JobLog
from shared.jobs.record import Ending, Job, Priority, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.queue.claims import Append, Claims, NoLease, Reaper, Verdict, Waiting
from shared.queue.redis import Redis
from shared.settings import Settings

MODEL = "m"
SUCCESS = Ending(Status.SUCCEEDED, text="hello", finish_reason="stop", prompt_tokens=3, completion_tokens=2)


def submission(owner: str = "a", model: str = MODEL, **more: object) -> Submission:
    return Submission(Request(model, 10, Sampling(0.0), prompt="hi"), owner, **more)  # type: ignore[arg-type]


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return Jobs(client, Settings(max_queue=50, durable=False))


@pytest.fixture
def worker(client: Redis) -> Claims:
    claims = Claims(client, "w1")
    claims.renew(60)
    return claims


def lapse(client: Redis, worker: str) -> None:
    """The worker's lease runs out now."""
    client.zadd("mlxq:leases", {worker: 1.0})


def taken(worker: Claims) -> Job:
    job = worker.claim(MODEL)
    assert job is not None
    return job


def kinds(client: Redis, job: Job) -> list[str]:
    return [event.kind.value for event in JobLog(client).read(job.id)]


def test_a_job_is_durable_with_its_first_event_once_created(client: Redis, jobs: Jobs) -> None:
    job, new = jobs.create(submission(metadata={"k": "v"}, request_id="r1"))
    assert new and job.status is Status.QUEUED and job.metadata == {"k": "v"} and job.request_id == "r1"
    assert jobs.position(job) == 1
    assert kinds(client, job) == ["queued"]


def test_a_claim_starts_the_job_and_fences_its_number(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job, _ = jobs.create(submission())
    claimed = taken(worker)
    assert (claimed.id, claimed.attempt, claimed.status) == (job.id, 1, Status.RUNNING)
    assert claimed.generation == job.generation
    assert worker.claim(MODEL) is None
    assert jobs.position(job) is None
    assert kinds(client, job) == ["queued", "started"]


def test_a_worker_without_a_lease_claims_nothing(client: Redis, jobs: Jobs) -> None:
    jobs.create(submission())
    with pytest.raises(NoLease):
        Claims(client, "stranger").claim(MODEL)
    assert jobs.recent("a", limit=1)[0].status is Status.QUEUED


def test_writes_and_the_end_arrive_once_however_often_they_are_sent(client: Redis, jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission())
    job = taken(worker)
    rows = [Append.of(job, 3, "hel", (1, 2)), Append.of(job, 4, "lo", (3,), SUCCESS)]
    for _ in range(3):
        assert worker.append(rows) == [Verdict.OK, Verdict.OK]
    done = jobs.get(job.id, "a")
    assert (done.status, done.text, done.finish_reason, done.completion_tokens) == (
        Status.SUCCEEDED,
        "hello",
        "stop",
        2,
    )
    assert kinds(client, job) == ["queued", "started", "chunk", "chunk", "done"]
    assert JobLog(client).written(job.id).tokens == (1, 2, 3)


def test_an_older_attempt_writes_nothing(client: Redis, jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission())
    job = taken(worker)
    lapse(client, "w1")
    assert Reaper(client, 3).reap() == [Waiting(MODEL, job.id)]
    assert worker.append([Append.of(job, 4, "late", (1,))]) == [Verdict.FENCED]
    worker.renew(60)
    assert taken(worker).attempt == 2
    assert worker.append([Append.of(job, 4, "late", (1,), SUCCESS)]) == [Verdict.FENCED]
    assert kinds(client, job) == ["queued", "started", "queued", "resumed"]


def test_a_lost_job_goes_to_the_front_of_its_class(client: Redis, jobs: Jobs, worker: Claims) -> None:
    first, _ = jobs.create(submission())
    jobs.create(submission("b"))
    urgent, _ = jobs.create(submission(priority=Priority.HIGH))
    assert taken(worker).id == urgent.id
    assert taken(worker).id == first.id
    lapse(client, "w1")
    Reaper(client, 3).reap()
    assert [jobs.position(jobs.get(job.id, "a")) for job in (urgent, first)] == [1, 2]


def test_a_job_that_loses_its_workers_too_often_fails(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job, _ = jobs.create(submission())
    for _ in range(3):
        worker.renew(60)
        taken(worker)
        lapse(client, "w1")
        Reaper(client, 3).reap()
    lost = jobs.get(job.id, "a")
    assert (lost.status, lost.error_code) == (Status.FAILED, "worker_lost")
    assert kinds(client, job)[-1] == "done"


def test_the_history_tells_what_became_of_each_attempt(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job, _ = jobs.create(submission())
    assert job.history == ()
    taken(worker)
    lapse(client, "w1")
    Reaper(client, 3).reap()
    other = Claims(client, "w2")
    other.renew(60)
    other.release([(job.id, taken(other).attempt)])
    third = taken(other)
    assert [(each.number, each.worker, each.how) for each in third.history] == [
        (1, "w1", AttemptEnd.WORKER_LOST),
        (2, "w2", AttemptEnd.HANDED_BACK),
        (3, "w2", None),
    ]
    other.append([Append.of(third, third.last_event + 1, ending=SUCCESS)])
    *_, last = history = jobs.get(job.id, "a").history
    assert (last.number, last.how) == (3, AttemptEnd.ENDED)
    moments = [moment for each in history for moment in (each.started_at, each.ended_at)]
    assert moments == sorted(moments, key=float), "one attempt after the other"
    reasons = [json.loads(event.data) for event in JobLog(client).read(job.id) if event.kind is EventKind.QUEUED]
    assert reasons == [{"reason": "accepted"}, {"reason": "worker_lost"}, {"reason": "handed_back"}]


def test_a_job_lost_too_often_says_how_often_and_when(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job, _ = jobs.create(submission())
    for attempt in range(1, 5):
        worker.renew(60)
        taken(worker)
        if attempt == 2:
            worker.release([(job.id, attempt)])  # no loss
        else:
            client.hset("mlxq:job:" + job.id, "claimed_at", float(client.time()[0]) - 100 * attempt)
            lapse(client, "w1")
            Reaper(client, 3).reap()
    lost = jobs.get(job.id, "a")
    said = lost.error_message or ""
    assert said.startswith("The job was lost with its worker 3 times: attempt 1 after 10")
    assert ", attempt 3 after 30" in said and ", attempt 4 after 40" in said and "attempt 2" not in said
    assert [each.how for each in lost.history] == ["worker_lost", "handed_back", "worker_lost", "worker_lost"]


def test_the_history_of_an_endless_to_and_fro_has_an_end(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job, _ = jobs.create(submission())
    for attempt in range(1, 31):
        taken(worker)
        worker.release([(job.id, attempt)])
    assert [each.number for each in jobs.get(job.id, "a").history] == list(range(11, 31))
    assert len([name for name in client.hkeys("mlxq:job:" + job.id) if name.startswith("attempt:")]) == 20


def test_an_attempt_of_an_older_record_began_with_the_job(client: Redis, jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission())
    job = taken(worker)
    client.hdel("mlxq:job:" + job.id, "claimed_at")
    assert [each.started_at for each in jobs.get(job.id, "a").history] == [job.started_at]
    worker.release([(job.id, 1)])
    assert [each.started_at for each in jobs.get(job.id, "a").history] == [job.started_at]


def test_the_last_try_of_a_job_is_made_alone(client: Redis, jobs: Jobs, worker: Claims) -> None:
    made = [jobs.create(submission())[0].id for _ in range(2)]
    for _ in range(2):
        worker.renew(60)
        assert {taken(worker).id for _ in made} == set(made)
        lapse(client, "w1")
        Reaper(client, 3).reap()
    worker.renew(60)
    killer = taken(worker)
    assert killer.alone and worker.claim(MODEL) is None, "its neighbour has to wait"
    lapse(client, "w1")
    Reaper(client, 3).reap()
    worker.renew(60)
    neighbour = taken(worker)
    assert {killer.id, neighbour.id} == set(made)
    assert jobs.get(killer.id, "a").status is Status.FAILED
    worker.append([Append.of(neighbour, neighbour.last_event + 1, ending=SUCCESS)])
    assert jobs.get(neighbour.id, "a").status is Status.SUCCEEDED


def test_handing_back_counts_as_no_loss(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job, _ = jobs.create(submission())
    for attempt in range(1, 6):
        assert taken(worker).attempt == attempt
        assert worker.release([(job.id, attempt)]) == [Waiting(MODEL, job.id)]
    assert jobs.get(job.id, "a").status is Status.QUEUED


def test_handing_back_what_was_lost_counts_until_it_fails(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job, _ = jobs.create(submission())
    for attempt in (1, 2):
        assert not taken(worker).alone
        assert worker.release([(job.id, attempt)], max_attempts=3) == [Waiting(MODEL, job.id)]
    assert taken(worker).alone
    assert worker.release([(job.id, 3)], max_attempts=3) == []
    assert jobs.get(job.id, "a").error_code == "worker_lost"


def test_a_worker_that_retires_leaves_nothing_behind(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job, _ = jobs.create(submission())
    taken(worker)
    assert worker.retire() == [Waiting(MODEL, job.id)]
    assert not client.exists("mlxq:running:w1") and client.zscore("mlxq:leases", "w1") is None


def test_cancelling_a_waiting_job_ends_it(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job, _ = jobs.create(submission())
    assert jobs.stop(job.id, "a").status is Status.CANCELLED
    assert worker.claim(MODEL) is None
    assert jobs.stop(job.id, "a").status is Status.CANCELLED, "asking again is no error"
    assert kinds(client, job) == ["queued", "done"]


def test_cancelling_a_running_job_asks_its_worker(client: Redis, jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission())
    job = taken(worker)
    assert jobs.stop(job.id, "a").status is Status.RUNNING
    assert worker.append([Append.of(job, 3, "he", (1,))]) == [Verdict.CANCELLED]
    assert [held.stop_as for held in worker.renew(60).held] == [Verdict.CANCELLED]
    worker.append([Append.of(job, 4, ending=Ending(Status.CANCELLED, text="he"))])
    assert jobs.get(job.id, "a").status is Status.CANCELLED


def test_cancelling_what_has_ended_is_refused(jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission())
    job = taken(worker)
    worker.append([Append.of(job, 3, ending=SUCCESS)])
    with pytest.raises(Conflict):
        jobs.stop(job.id, "a")


def test_a_job_asked_to_stop_is_not_taken_up_again(client: Redis, jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission())
    job = taken(worker)
    worker.append([Append.of(job, 3, "he", (1,))])
    jobs.stop(job.id, "a")
    lapse(client, "w1")
    assert Reaper(client, 3).reap() == []
    ended = jobs.get(job.id, "a")
    assert (ended.status, jobs.text(ended)) == (Status.CANCELLED, "he")


def over(client: Redis, job: Job, seconds: float) -> None:
    """Moves a job so far into the past that so many seconds of its life are over; its place in line stays."""
    for name in ("created_at", "end_by"):
        moment = float(client.hget("mlxq:job:" + job.id, name))
        client.hset("mlxq:job:" + job.id, name, f"{moment - seconds:.6f}")
    client.zincrby("mlxq:timers", -seconds, job.id)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"start_within_s": 5}, "5 s (start_within_s)"),
        ({"start_within_s": 0.25, "deadline_s": 600}, "0.25 s (start_within_s)"),
        ({"start_within_s": 600, "deadline_s": 100}, "100 s (deadline_s)"),
    ],
)
@pytest.mark.parametrize("by", ["reaper", "claim"])
def test_a_job_that_never_starts_in_its_time_expires(
    client: Redis, jobs: Jobs, worker: Claims, limits: dict[str, float], said: str, by: str
) -> None:
    job, _ = jobs.create(submission(**limits))
    following, _ = jobs.create(submission())
    over(client, job, 200)
    if by == "reaper":
        assert Reaper(client, 3).reap() == []
    assert taken(worker).id == following.id, "nothing starts after its time, however late the reaper comes"
    ended = jobs.get(job.id, "a")
    assert (ended.status, ended.error_code, ended.started_at) == (Status.EXPIRED, Expiry.START, None)
    assert ended.error_message == f"The job did not start within {said}."
    assert (ended.text, ended.completion_tokens, ended.history) == ("", 0, ())


def test_a_running_job_is_cut_off_at_its_deadline(client: Redis, jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission(start_within_s=5, deadline_s=90))
    job = taken(worker)
    over(client, job, 60)
    Reaper(client, 3).reap()
    assert worker.append([Append.of(job, 3, "he", (1,))]) == [Verdict.OK], "the time to start is another's matter"
    over(client, job, 60)
    Reaper(client, 3).reap()
    assert worker.append([Append.of(job, 4, "l", (2,))]) == [Verdict.EXPIRED]
    worker.append([Append.of(job, 5, ending=Ending(Status.EXPIRED, "hel", completion_tokens=2))])
    ended = jobs.get(job.id, "a")
    assert (ended.status, ended.error_code) == (Status.EXPIRED, Expiry.DEADLINE)
    assert ended.error_message == "The job did not end within 90 s (deadline_s)."
    assert (ended.text, ended.completion_tokens) == ("hel", 2)


@pytest.mark.parametrize("by", ["reaper", "claim"])
def test_once_started_only_the_deadline_counts(client: Redis, jobs: Jobs, worker: Claims, by: str) -> None:
    job, _ = jobs.create(submission(start_within_s=5, deadline_s=90))
    job = taken(worker)
    worker.append([Append.of(job, 3, "né🙂\n", (1, 2, 3)), Append.of(job, 4, "!", (4,))])
    worker.release([(job.id, 1)])
    over(client, job, 60)
    Reaper(client, 3).reap()
    assert jobs.get(job.id, "a").status is Status.QUEUED
    over(client, job, 60)
    if by == "reaper":
        Reaper(client, 3).reap()
    assert worker.claim(MODEL) is None
    ended = jobs.get(job.id, "a")
    assert (ended.status, ended.error_code) == (Status.EXPIRED, Expiry.DEADLINE)
    assert (ended.text, ended.completion_tokens) == ("né🙂\n!", 4)


def test_a_job_that_ends_without_its_worker_keeps_its_text(client: Redis, jobs: Jobs, worker: Claims) -> None:
    poison, _ = jobs.create(submission())
    cancelled, _ = jobs.create(submission())
    for attempt in range(1, 4):
        worker.renew(60)
        for _ in range(2 if attempt == 1 else 1):
            job = taken(worker)
            worker.append([Append.of(job, job.last_event + 1, f"{attempt}é ", (attempt, attempt))])
        lapse(client, "w1")
        Reaper(client, 3).reap()
        if attempt == 1:
            jobs.stop(cancelled.id, "a")
    lost, stopped = jobs.get(poison.id, "a"), jobs.get(cancelled.id, "a")
    assert (lost.error_code, lost.text, lost.completion_tokens) == (JobFailure.WORKER_LOST, "1é 2é 3é ", 6)
    assert (stopped.status, stopped.text, stopped.completion_tokens) == (Status.CANCELLED, "1é ", 2)


def test_a_text_with_a_hole_is_not_kept_as_the_jobs_text(client: Redis, jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission())
    job = taken(worker)
    worker.append([Append.of(job, 3, "he", (1,)), Append.of(job, 4, "llo", (2,))])
    client.xdel("mlxq:log:" + job.id, "3-0")
    worker.release([(job.id, 1)])
    jobs.stop(job.id, "a")
    ended = jobs.get(job.id, "a")
    assert (ended.status, ended.text, ended.completion_tokens) == (Status.CANCELLED, None, None)


def test_starting_ends_the_time_to_start(client: Redis, jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission(start_within_s=0.5, deadline_s=1000))
    job = taken(worker)
    assert client.zscore("mlxq:timers", job.id) == pytest.approx(job.created_at + 1000, abs=1)


def test_owners_take_turns(jobs: Jobs, worker: Claims) -> None:
    for owner in "aaaaabbc":
        jobs.create(submission(owner))
    assert [taken(worker).owner for _ in range(8)] == list("abcabaaa")


def test_a_newcomer_is_served_next_and_not_behind_all(jobs: Jobs, worker: Claims) -> None:
    for _ in range(10):
        jobs.create(submission("a"))
    assert [taken(worker).owner for _ in range(4)] == ["a"] * 4
    jobs.create(submission("b"))
    assert [taken(worker).owner for _ in range(2)] in (["a", "b"], ["b", "a"])


def test_an_owner_gains_nothing_by_having_waited_before(client: Redis, jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission("a"))
    taken(worker)
    assert not client.exists("mlxq:clock:m"), "an empty line keeps no turns"


def test_the_same_idempotency_key_gives_the_same_job(jobs: Jobs) -> None:
    first, new = jobs.create(submission(idempotency_key="k", fingerprint="f"))
    again, new_again = jobs.create(submission(idempotency_key="k", fingerprint="f"))
    other, _ = jobs.create(submission("b", idempotency_key="k", fingerprint="g"))
    assert (new, new_again) == (True, False)
    assert first.id == again.id != other.id
    with pytest.raises(KeyReused):
        jobs.create(submission(idempotency_key="k", fingerprint="another"))


def test_a_full_queue_refuses_and_keeps_nothing(client: Redis) -> None:
    jobs = Jobs(client, Settings(max_queue=2, durable=False))
    for _ in range(2):
        jobs.create(submission())
    before = client.dbsize()
    with pytest.raises(Unavailable) as refused:
        jobs.create(submission("b", idempotency_key="k"))
    assert refused.value.code == "queue_full" and client.dbsize() == before


def test_another_owner_sees_no_job(jobs: Jobs, worker: Claims) -> None:
    job, _ = jobs.create(submission())
    for call in (jobs.get, jobs.stop, jobs.forget):
        with pytest.raises(NotFound):
            call(job.id, "b")
    assert jobs.get(job.id, "a").status is Status.QUEUED


def test_only_an_ended_job_is_forgotten(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job, _ = jobs.create(submission(idempotency_key="k"))
    with pytest.raises(Conflict):
        jobs.forget(job.id, "a")
    jobs.stop(job.id, "a")
    jobs.forget(job.id, "a")
    assert not [name for name in client.keys("*") if job.id in name or "idem" in name]
    assert jobs.recent("a", limit=5) == []


@pytest.mark.parametrize("missing", [1, 3, 4, 5])
def test_a_log_with_a_gap_is_not_read_over_it(client: Redis, jobs: Jobs, worker: Claims, missing: int) -> None:
    jobs.create(submission())
    job = taken(worker)
    worker.append([Append.of(job, n, str(n), (n,)) for n in (3, 4, 5)])
    log = JobLog(client)
    assert log.written(job.id, 5).text == "345"
    client.xdel("mlxq:log:" + job.id, f"{missing}-0")
    with pytest.raises(Gone, match=f"event {missing} "):
        log.written(job.id, 5)
    with pytest.raises(Gone):
        jobs.text(jobs.get(job.id, "a"))
    assert [event.n for event in log.read(job.id, after=missing)] == list(range(missing + 1, 6))
    client.delete("mlxq:log:" + job.id)
    with pytest.raises(Gone):
        log.written(job.id, 5)


def test_a_job_has_ended_whatever_became_of_its_log(client: Redis, jobs: Jobs) -> None:
    job, _ = jobs.create(submission())
    log = JobLog(client)
    client.delete("mlxq:log:" + job.id)
    assert not log.ended(job.id)
    jobs.stop(job.id, "a")
    client.delete("mlxq:log:" + job.id)
    assert log.ended(job.id)
    jobs.forget(job.id, "a")
    assert log.ended(job.id)


@pytest.mark.parametrize(("log_retention_s", "lives_s"), [(None, 77), (33, 33)])
def test_a_log_may_be_kept_for_less_long_than_its_job(client: Redis, log_retention_s: int | None, lives_s: int) -> None:
    jobs = Jobs(client, Settings(retention_s=77, log_retention_s=log_retention_s, durable=False))
    job, _ = jobs.create(submission(idempotency_key="k"))
    jobs.stop(job.id, "a")
    assert client.ttl("mlxq:log:" + job.id) == lives_s
    assert {client.ttl(key) for key in ("mlxq:job:" + job.id, "mlxq:idem:a:k")} == {77}


def test_what_has_ended_lives_as_long_as_its_retention(client: Redis) -> None:
    jobs = Jobs(client, Settings(retention_s=77, durable=False))
    job, _ = jobs.create(submission(idempotency_key="k"))
    assert client.ttl("mlxq:job:" + job.id) == -1
    jobs.stop(job.id, "a")
    for key in ("mlxq:job:" + job.id, "mlxq:log:" + job.id, "mlxq:idem:a:k"):
        assert client.ttl(key) == 77


def test_a_log_that_lost_its_tail_gets_no_gap(client: Redis, jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission())
    job = taken(worker)
    worker.append([Append.of(job, 3, "he", (1,))])
    assert worker.append([Append.of(job, 5, "o", (3,))]) == [Verdict.FENCED]
    assert worker.append([Append.of(job, 5, ending=SUCCESS)]) == [Verdict.FENCED]
    worker.release([(job.id, 1)])
    assert (taken(worker).attempt, JobLog(client).written(job.id).text) == (2, "he")


def test_an_acceptance_sent_again_is_still_a_new_job(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue = jobs._enqueue

    def sent_again(args: list[object]) -> object:  # as redis-py does when the first answer is lost
        enqueue(args=args)
        return enqueue(args=args)

    monkeypatch.setattr(jobs, "_enqueue", sent_again)
    job, new = jobs.create(submission())
    assert new and jobs.position(job) == 1


def test_handing_an_old_attempt_back_leaves_the_new_one_to_be_found(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job, _ = jobs.create(submission())
    taken(worker)
    lapse(client, "w1")
    Reaper(client, 3).reap()
    worker.renew(60)
    assert taken(worker).attempt == 2
    assert worker.release([(job.id, 1)]) == []
    lapse(client, "w1")
    assert Reaper(client, 3).reap() == [Waiting(MODEL, job.id)]


def test_a_list_of_jobs_long_gone_is_cleared_however_long_it_is(client: Redis, jobs: Jobs) -> None:
    client.zadd("mlxq:owner:a", {f"job_{n}": n for n in range(1100)})
    assert jobs.recent("a", limit=1) == []
    assert client.zcard("mlxq:owner:a") == 0


def test_the_list_of_an_owner_who_never_looks_does_not_grow(client: Redis, jobs: Jobs) -> None:
    client.zadd("mlxq:owner:a", {f"job_{n}": n for n in range(10)})
    made = {jobs.create(submission())[0].id for _ in range(6)}
    assert set(client.zrange("mlxq:owner:a", 0, -1)) == made


def test_the_list_is_newest_first_and_pages(jobs: Jobs) -> None:
    made = [jobs.create(submission())[0] for _ in range(5)]
    page = jobs.recent("a", limit=2)
    rest = jobs.recent("a", limit=9, before=page[-1].created_at)
    assert [job.id for job in page + rest] == [job.id for job in reversed(made)]


def test_live_copies_carry_what_the_log_has(client: Redis, jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission())
    job = taken(worker)
    listener = client.pubsub(ignore_subscribe_messages=True)
    listener.subscribe("mlxq:live:" + job.id)
    listener.get_message(timeout=1)
    worker.append([Append.of(job, 3, 'a "quoted"\nline', (1,))])
    message = listener.get_message(timeout=1)
    assert message is not None
    assert message["data"].startswith("3 chunk ")
    assert JobLog(client).read(job.id, after=2)[0].kind is EventKind.CHUNK
    listener.close()


def test_for_a_suspect_one_worker_empties_itself_and_the_others_go_on(client: Redis, jobs: Jobs) -> None:
    first, second = workers = [Claims(client, name) for name in ("w1", "w2")]
    for each in workers:
        each.renew(60)
        jobs.create(submission())
        taken(each)
    suspect, _ = jobs.create(submission())
    client.hset("mlxq:job:" + suspect.id, "alone", 1)
    behind = [jobs.create(submission())[0].id for _ in range(2)]
    assert first.claim(MODEL) is None, "it takes nothing more until it is empty"
    assert taken(second).id == behind[0]
    assert first.claim(MODEL) is None
    assert taken(second).id == behind[1]
    lapse(client, "w1")
    assert second.claim(MODEL) is None, "a worker that is gone empties itself for nobody"


def test_a_suspect_goes_to_whoever_is_empty(client: Redis, jobs: Jobs, worker: Claims) -> None:
    jobs.create(submission())
    taken(worker)
    suspect, _ = jobs.create(submission())
    client.hset("mlxq:job:" + suspect.id, "alone", 1)
    assert worker.claim(MODEL) is None
    other = Claims(client, "w2")
    other.renew(60)
    assert taken(other).id == suspect.id
    behind, _ = jobs.create(submission())
    assert taken(worker).id == behind.id


def test_a_suspect_has_a_process_to_itself_whatever_models_that_has(client: Redis, jobs: Jobs, worker: Claims) -> None:
    beside = Claims(client, "w1-of-another-model")
    beside.renew(60)

    def claimed(model: str = MODEL) -> str | None:
        job = worker.claim(MODEL, ["w1-of-another-model"]) if model == MODEL else beside.claim(model, ["w1"])
        return job.id if job else None

    others = [jobs.create(submission(model="other"))[0] for _ in range(2)]
    assert claimed("other") == others[0].id
    running = jobs.get(others[0].id, "a")
    suspect, _ = jobs.create(submission())
    client.hset("mlxq:job:" + suspect.id, "alone", 1)
    assert claimed() is None, "a job of another model runs there"
    assert claimed("other") is None, "and no further one is begun"
    beside.append([Append.of(running, running.last_event + 1, ending=SUCCESS)])
    assert claimed() == suspect.id
    assert claimed("other") is None
    alone = jobs.get(suspect.id, "a")
    worker.append([Append.of(alone, alone.last_event + 1, ending=SUCCESS)])
    assert claimed("other") == others[1].id


def test_a_line_of_jobs_whose_time_is_over_is_gone_through_in_parts(client: Redis, worker: Claims) -> None:
    jobs = Jobs(client, Settings(durable=False))
    late = [jobs.create(submission())[0].id for _ in range(150)]
    client.zadd("mlxq:timers", dict.fromkeys(late, 1.0))
    good, _ = jobs.create(submission())
    assert worker.claim(MODEL) is None
    assert client.zcard("mlxq:queue:m") == 51
    assert taken(worker).id == good.id


def test_a_cancelled_job_is_cancelled_even_when_its_last_worker_is_lost(
    client: Redis, jobs: Jobs, worker: Claims
) -> None:
    job, _ = jobs.create(submission())
    taken(worker)
    jobs.stop(job.id, "a")
    lapse(client, "w1")
    Reaper(client, 1).reap()
    assert jobs.get(job.id, "a").status is Status.CANCELLED
