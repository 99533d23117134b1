"""Usage counts each job once; token limits are checked when jobs are accepted and corrected when they end."""

from __future__ import annotations

from datetime import timedelta

import pytest

from shared.jobs.limits import OwnerLimits, TokensExceeded
from shared.jobs.record import Ending, Status
from shared.jobs.store import Jobs, new_job_id
from shared.jobs.usage import Counters, UsageStore
from shared.queue.claims import Claims
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import MODEL, end, lapse, lease, reap, row, run, started, submission, submit

PROMPT = tuple(range(40))
ENDING = Ending(Status.SUCCEEDED, finish_reason="stop", prompt_tokens=40, completion_tokens=10, cached_tokens=32)


@pytest.fixture
def client(valkey_client: Redis) -> Redis:
    return valkey_client


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return Jobs(client, Settings(durable=False))


@pytest.fixture
def worker(client: Redis) -> Claims:
    return lease(client, "w")


def used(client: Redis, owner: str = "a") -> Counters:
    usage = UsageStore(client)
    today = usage.today()
    return sum((each.counters for each in usage.read([owner], today - timedelta(days=1), today)), Counters())


def test_usage_is_kept_by_key_model_and_day(client: Redis, jobs: Jobs, worker: Claims) -> None:
    for owner in "aab":
        submit(jobs, owner)
        end(worker, started(worker), ENDING)
    jobs.create(submission("a", "other"))
    rows = UsageStore(client).read(
        ["a", "b", "c"], UsageStore(client).today() - timedelta(days=3), UsageStore(client).today()
    )
    assert [(each.key_id, each.model, each.counters) for each in rows] == [
        ("a", MODEL, Counters(succeeded=2, prompt=80, cached=64, completion=20)),
        ("b", MODEL, Counters(succeeded=1, prompt=40, cached=32, completion=10)),
    ]
    (key,) = client.keys(f"{keys.USAGE}b:*")
    assert client.ttl(key) == 400 * 86400
    assert client.memory_usage(key) < 200


def test_job_of_several_attempts_counts_once_with_all_its_tokens(client: Redis, jobs: Jobs, worker: Claims) -> None:
    submit(jobs, tokens=PROMPT)
    first = started(worker)
    worker.append([row(first, 0, "ab", 1, 2)])
    lapse(client, "w")
    reap(client)
    worker.renew(60)
    end(worker, started(worker), ENDING)
    assert used(client) == Counters(succeeded=1, prompt=40, cached=32, completion=10)


def test_tokens_of_a_job_that_ends_without_its_worker_are_counted_in_its_log(
    client: Redis, jobs: Jobs, worker: Claims
) -> None:
    job = submit(jobs, tokens=PROMPT)
    worker.append([row(started(worker), 0, "abc", 1, 2, 3)])
    jobs.stop(job.id, "a")
    lapse(client, "w")
    reap(client)
    assert jobs.get(job.id, "a").status is Status.CANCELLED
    assert used(client) == Counters(cancelled=1, prompt=40, completion=3)


def test_job_that_never_started_uses_no_tokens(client: Redis, jobs: Jobs) -> None:
    jobs.stop(submit(jobs, tokens=PROMPT).id, "a")
    assert used(client) == Counters(cancelled=1)


def test_prompt_of_several_choices_counts_once(client: Redis, jobs: Jobs, worker: Claims) -> None:
    choices = [submission(tokens=PROMPT, repeats_prompt=n > 0) for n in range(3)]
    jobs.create_all(choices, [new_job_id() for _ in choices])
    for _ in choices:
        end(worker, started(worker), ENDING)
    assert used(client) == Counters(succeeded=3, prompt=40, cached=32, completion=30)


def test_counters_of_a_newer_version_are_kept(client: Redis, jobs: Jobs, worker: Claims) -> None:
    submit(jobs)
    run(worker)
    (key,) = client.keys(f"{keys.USAGE}*")
    client.hset(key, MODEL, client.hget(key, MODEL) + " 7")
    submit(jobs)
    run(worker)
    assert client.hget(key, MODEL) == "2 0 0 0 6 0 4 0 7"
    assert used(client).jobs == 2


def test_tokens_per_minute_are_charged_at_once_and_corrected_at_the_end(
    client: Redis, jobs: Jobs, worker: Claims
) -> None:
    options = {"limits": OwnerLimits(tokens_per_minute=120), "tokens": PROMPT}  # 50 tokens are expected
    left = [jobs.create(submission(**options)).tokens for _ in range(2)]
    assert [each and each.minute_left for each in left] == [70, 20]
    with pytest.raises(TokensExceeded) as refused:
        jobs.create(submission(**options))
    assert refused.value.code == "tokens_per_minute" and refused.value.retry_after == pytest.approx(15, abs=1)
    assert refused.value.left.minute_limit == 120
    jobs.create(submission("b", **options))  # another key
    end(worker, started(worker), Ending(Status.SUCCEEDED, prompt_tokens=20, completion_tokens=0))
    accepted = jobs.create(submission(**options)).tokens  # 30 tokens fewer than expected
    assert accepted is not None and accepted.minute_left in (0, 1)
    client.hincrbyfloat(keys.CHARGES + "a", "at", -60)
    filled = jobs.create(submission(**options)).tokens
    assert filled is not None and filled.minute_left == 70


def test_job_above_the_whole_limit_runs_and_is_paid_for_later(client: Redis, jobs: Jobs) -> None:
    limits = OwnerLimits(tokens_per_minute=10)
    jobs.create(submission(limits=limits, tokens=PROMPT))
    with pytest.raises(TokensExceeded) as refused:
        jobs.create(submission(limits=limits, tokens=PROMPT))
    assert refused.value.retry_after == pytest.approx(300, abs=2)  # 50 tokens at 10 per minute


def test_tokens_per_day_include_those_that_unfinished_jobs_may_use(client: Redis, jobs: Jobs, worker: Claims) -> None:
    options = {"limits": OwnerLimits(tokens_per_day=110), "tokens": PROMPT}
    jobs.create(submission(**options))
    job = jobs.create(submission(**options)).job
    with pytest.raises(TokensExceeded) as refused:
        jobs.create(submission(**options))
    assert refused.value.code == "tokens_per_day" and (refused.value.retry_after or 0) <= 10
    jobs.stop(job.id, "a")  # what it would have used is free again
    end(worker, started(worker), ENDING)
    jobs.create(submission(**options))
    end(worker, started(worker), ENDING)
    assert used(client).tokens == 100
    with pytest.raises(TokensExceeded) as refused:
        jobs.create(submission(**options))
    assert refused.value.retry_after == pytest.approx(86400 - UsageStoreClock.now(client) % 86400, abs=5)


class UsageStoreClock:
    """Redis's clock."""

    @staticmethod
    def now(client: Redis) -> float:
        return float(client.time()[0])


def test_reservations_of_jobs_that_an_old_process_ended_are_dropped(client: Redis, jobs: Jobs) -> None:
    options = {"limits": OwnerLimits(tokens_per_day=60), "tokens": PROMPT}
    client.hset(keys.CHARGES + "a", mapping={"reserved": 1000, "debt": 1000, "at": 0})
    accepted = jobs.create(submission(**options)).tokens
    assert accepted is not None and accepted.day_left == 10


def test_in_use_shows_what_the_limits_count(client: Redis, jobs: Jobs, worker: Claims) -> None:
    options = {"limits": OwnerLimits(tokens_per_minute=1000, tokens_per_day=1000), "tokens": PROMPT}
    for _ in range(3):
        jobs.create(submission(**options))
    end(worker, started(worker), ENDING)
    started(worker)
    found = UsageStore(client).in_use("a", 1000, [MODEL, "other"])
    assert (found.reserved, found.today, found.queued, found.running) == (100, 50, {MODEL: 1}, 1)
    assert 100 < found.debt <= 150 and found.bytes > 0 and 0 < found.day_left_s <= 86400
