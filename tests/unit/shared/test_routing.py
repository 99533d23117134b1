"""Prefix affinity: claims defer jobs to workers that have their prefix cached."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shared.jobs.record import Job, Priority, Status
from shared.jobs.store import Jobs
from shared.models.registry import Registry, WorkerInfo
from shared.queue.claims import Claim, ClaimedJob, Claims, Demand
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import MODEL, MUCH, end, held, lapse, lease, reap, reserved, row, submit

FIRST, SECOND, OTHER = "1111" + "a" * 12, "2222" + "b" * 12, "3333" + "c" * 12


class Harness:
    """A queue and its workers."""

    def __init__(self, client: Redis) -> None:
        self.client = client
        self.jobs = Jobs(client, Settings(durable=False))
        self.registry = Registry(client)

    def worker(self, name: str, *, model: str = MODEL, state: str = "ready", slots: int = 4) -> Claims:
        claims = lease(self.client, name)
        card = WorkerInfo(name, f"node-{name}", "h", 1, model, state, slots, 0, 0.0, 0.0, {"steps": 1.0}, {"a": [1]})
        self.registry.announce_worker(card, 60)
        return claims

    def submit(self, *prefixes: str, priority: Priority = Priority.NORMAL) -> Job:
        return submit(self.jobs, prefixes=prefixes, priority=priority)

    def get(self, job: Job) -> Job:
        return self.jobs.get(job.id, "a")

    def end_deferral(self, job: Job) -> None:
        """Let the time pass for which a job is deferred."""
        self.client.hincrbyfloat(keys.JOB + job.id, "deferred_at", -0.2)

    def routed(self) -> dict[str, int]:
        return {outcome: n for (_, outcome), n in self.registry.routed().items()}


@pytest.fixture
def harness(client: Redis) -> Harness:
    return Harness(client)


def ask(worker: Claims, rows: int = 1, spare: int = 0) -> Claim:
    return worker.claim(MODEL, Demand(rows, MUCH, spare))


def take(worker: Claims, job: Job) -> ClaimedJob:
    """Claim and admit one job, which must be this one."""
    (claimed,) = ask(worker).jobs
    assert claimed.job.id == job.id
    worker.append([row(claimed, start=True)])
    return claimed


def assert_deferred(worker: Claims, rows: int = 1) -> float:
    """Claim; all queued jobs must be deferred. Returns the seconds until the next claim may succeed."""
    claim = ask(worker, rows)
    assert claim.jobs == () and claim.again_s is not None
    return claim.again_s


def cache_prefixes(harness: Harness, worker: Claims, *prefixes: str) -> None:
    """Run a job with these prefixes on a worker."""
    end(worker, take(worker, harness.submit(*prefixes)))


def test_job_is_claimed_by_the_worker_with_its_prefix(harness: Harness) -> None:
    w1, w2 = harness.worker("w1"), harness.worker("w2")
    cache_prefixes(harness, w1, FIRST)
    job = harness.submit(SECOND, FIRST)
    assert 0.1 < assert_deferred(w2) <= 0.2
    take(w1, job)
    continued = harness.submit(OTHER, SECOND)
    assert_deferred(w2)
    take(w1, continued)
    assert harness.routed() == {"deferred": 2, "preferred": 2}


def test_deferred_job_is_counted_once(harness: Harness) -> None:
    w1, w2, w3 = (harness.worker(name) for name in ("w1", "w2", "w3"))
    cache_prefixes(harness, w1, FIRST)
    job = harness.submit(FIRST)
    for worker in (w2, w3, w2):
        assert_deferred(worker)
    assert harness.get(job).status is Status.QUEUED and harness.routed() == {"deferred": 1}


def test_any_worker_may_claim_after_the_deferral(harness: Harness) -> None:
    w1, w2 = harness.worker("w1"), harness.worker("w2")
    cache_prefixes(harness, w1, FIRST)
    job = harness.submit(FIRST)
    assert_deferred(w2)
    harness.end_deferral(job)
    take(w2, job)
    assert harness.routed() == {"deferred": 1, "another": 1}
    harness.worker("w3")
    for worker in (w1, w2):
        take(worker, harness.submit(FIRST))  # both have the prefix cached now


def test_job_without_a_cached_prefix_is_not_counted(harness: Harness) -> None:
    w1, _ = harness.worker("w1"), harness.worker("w2")
    take(w1, harness.submit(FIRST))
    take(w1, harness.submit())
    assert harness.routed() == {}


def test_last_three_workers_are_stored_per_prefix(harness: Harness) -> None:
    names = [f"w{n}" for n in range(5)]
    workers = {name: harness.worker(name) for name in names}
    for name in names[:4]:
        job = harness.submit(FIRST)
        harness.client.hset(keys.JOB + job.id, "deferred_at", 1)
        end(workers[name], take(workers[name], job))
    harness.submit(FIRST)
    assert_deferred(workers["w0"])
    for name in ("w3", "w2", "w1"):
        assert ask(workers["w4"]).jobs == (), "another stored worker is preferred"
        workers[name].retire()
    assert ask(workers["w4"]).jobs


def test_clock_that_is_set_back_does_not_extend_the_deferral(harness: Harness) -> None:
    w1, w2 = harness.worker("w1"), harness.worker("w2")
    cache_prefixes(harness, w1, FIRST)
    job = harness.submit(FIRST)
    assert_deferred(w2)
    harness.client.hincrbyfloat(keys.JOB + job.id, "deferred_at", 3600)
    take(w2, job)


def test_other_jobs_keep_their_order_and_are_not_deferred(harness: Harness) -> None:
    w1, w2 = harness.worker("w1"), harness.worker("w2")
    cache_prefixes(harness, w1, FIRST)
    deferred, *others = harness.submit(FIRST), harness.submit(), harness.submit(OTHER)
    claim = ask(w2, 3)
    assert [each.job.id for each in claim.jobs] == [job.id for job in others]
    assert claim.again_s is not None
    take(w1, deferred)


def test_one_row_is_kept_free_for_each_deferred_job(harness: Harness) -> None:
    """A deferred job must not wait for a job of lower rank, even if the preferred worker never claims it."""
    w1, w2 = harness.worker("w1"), harness.worker("w2")
    cache_prefixes(harness, w1, FIRST)
    high = harness.submit(FIRST, priority=Priority.HIGH)
    low, lower = (harness.submit(priority=Priority.BATCH) for _ in range(2))
    assert [each.job.id for each in ask(w2, 2).jobs] == [low.id]
    assert_deferred(w2)
    harness.end_deferral(high)
    take(w2, high)
    take(w1, lower)
    assert harness.routed() == {"deferred": 1, "another": 1}


def test_deferred_job_is_not_claimed_as_a_spare(harness: Harness) -> None:
    w1, w2 = harness.worker("w1"), harness.worker("w2")
    cache_prefixes(harness, w1, FIRST)
    job = harness.submit(FIRST)
    claim = ask(w2, rows=0, spare=4)
    assert claim.jobs == () and claim.again_s is not None
    take(w1, job)


Change = Callable[[Harness, Claims], object]


def fill(harness: Harness, worker: Claims, count: int) -> None:
    for _ in range(count):
        take(worker, harness.submit())


@pytest.mark.parametrize(
    "change",
    [
        lambda harness, w1: w1.retire(),
        lambda harness, w1: lapse(harness.client, "w1"),
        lambda harness, w1: harness.client.delete(keys.WORKER + "w1"),
        lambda harness, w1: harness.worker("w1", state="draining"),
        lambda harness, w1: harness.worker("w1", model="n"),
        lambda harness, w1: (harness.worker("w1", slots=1), fill(harness, w1, 1)),
        lambda harness, w1: fill(harness, w1, 2),
    ],
    ids=["retired", "lease expired", "no state", "draining", "another model", "full", "too far ahead"],
)
def test_job_is_not_deferred_to_a_worker_that_cannot_claim_it(harness: Harness, change: Change) -> None:
    w1, w2, _ = harness.worker("w1"), harness.worker("w2"), harness.worker("w3")
    cache_prefixes(harness, w1, FIRST)
    change(harness, w1)
    take(w2, harness.submit(FIRST))
    assert "deferred" not in harness.routed()


def test_reserved_jobs_count_as_held(harness: Harness) -> None:
    w1, w2 = harness.worker("w1"), harness.worker("w2")
    cache_prefixes(harness, w1, FIRST)
    for _ in range(2):
        harness.submit()
    assert len(ask(w1, 2).jobs) == 2
    take(w2, harness.submit(FIRST))


def test_next_longest_prefix_counts_if_its_worker_is_missing(harness: Harness) -> None:
    w1, w2, w3 = (harness.worker(name) for name in ("w1", "w2", "w3"))
    cache_prefixes(harness, w1, FIRST)
    cache_prefixes(harness, w2, SECOND)
    w2.retire()
    job = harness.submit(SECOND, FIRST)
    assert_deferred(w3)
    take(w1, job)


def test_the_longest_prefix_decides(harness: Harness) -> None:
    w1, w2 = harness.worker("w1"), harness.worker("w2")
    cache_prefixes(harness, w1, FIRST)
    cache_prefixes(harness, w2, SECOND)
    job = harness.submit(SECOND, FIRST)
    assert_deferred(w1)
    take(w2, job)


def test_at_most_one_job_per_free_row_is_deferred(harness: Harness) -> None:
    w1, w2 = harness.worker("w1", slots=64), harness.worker("w2", slots=64)
    cache_prefixes(harness, w1, FIRST)
    jobs = [harness.submit(FIRST) for _ in range(9)]
    assert_deferred(w2, rows=8)
    assert [harness.client.hexists(keys.JOB + job.id, "deferred_at") for job in jobs] == [True] * 8 + [False]
    assert len(ask(w1, 9).jobs) == 9


def test_single_worker_stores_no_prefixes(harness: Harness) -> None:
    w1 = harness.worker("w1")
    for _ in range(2):
        cache_prefixes(harness, w1, FIRST)
    assert not harness.client.exists(keys.PREFIXES + MODEL, keys.ROUTED)


def test_job_that_has_started_before_is_not_deferred(harness: Harness) -> None:
    w1, w2 = harness.worker("w1"), harness.worker("w2")
    cache_prefixes(harness, w1, FIRST)
    job = harness.submit(FIRST)
    w1.release([held(take(w1, job))])
    take(w2, job)


def test_job_of_a_dead_worker_is_not_deferred(harness: Harness) -> None:
    w1, w2 = harness.worker("w1"), harness.worker("w2")
    job = harness.submit(FIRST)
    take(w1, job)
    lapse(harness.client, "w1")
    reap(harness.client)
    harness.worker("w3")
    assert take(w2, job).job.attempt == 2


def test_hash_with_the_same_first_digits_replaces_the_entry(harness: Harness) -> None:
    w1, w2 = harness.worker("w1"), harness.worker("w2")
    cache_prefixes(harness, w1, FIRST)
    cache_prefixes(harness, w2, FIRST[:4] + "f" * 12)
    take(w2, harness.submit(FIRST))
    assert harness.client.hlen(keys.PREFIXES + MODEL) == 1
    assert 0 < harness.client.ttl(keys.PREFIXES + MODEL) <= 3600


def test_common_prefix_of_one_claim_is_stored_once(harness: Harness) -> None:
    w1, w2 = harness.worker("w1"), harness.worker("w2")
    for _ in range(3):
        harness.submit(FIRST)
    assert len(ask(w1, 3).jobs) == 3
    assert harness.client.hgetall(keys.PREFIXES + MODEL) == {FIRST[:4]: f"{FIRST[4:]} w1"}
    assert ask(w2, 1).again_s is None


def test_prefix_hashes_of_a_newer_version_are_ignored(client: Redis, settings: Settings) -> None:
    worker, _other = lease(client, "w1"), lease(client, "w2")
    job = submit(Jobs(client, settings), prefixes=("v2:xyz",))
    assert [each.job.id for each in reserved(worker)] == [job.id]
