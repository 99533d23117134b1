"""Prefix affinity: which worker a claim gives a job whose prompt begins as an earlier one did."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shared.jobs.record import Job, Priority, Status
from shared.jobs.store import Jobs
from shared.models.registry import Registry, WorkerInfo
from shared.queue import keys
from shared.queue.claims import Claim, ClaimedJob, Claims, Demand
from shared.queue.redis import Redis
from shared.settings import Settings
from tests.support.queueing import MODEL, MUCH, end, held, lapse, lease, reap, reserved, row, submit

FIRST, SECOND, OTHER = "1111" + "a" * 12, "2222" + "b" * 12, "3333" + "c" * 12


class Desk:
    """A queue, and workers that are told what to do."""

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

    def time_passes(self, job: Job) -> None:
        """The time for which it is deferred is over."""
        self.client.hincrbyfloat(keys.JOB + job.id, "deferred_at", -0.2)

    def routed(self) -> dict[str, int]:
        return {outcome: n for (_, outcome), n in self.registry.routed().items()}


@pytest.fixture
def desk(client: Redis) -> Desk:
    return Desk(client)


def ask(worker: Claims, rows: int = 1, spare: int = 0) -> Claim:
    return worker.claim(MODEL, Demand(rows, MUCH, spare))


def take(worker: Claims, job: Job) -> ClaimedJob:
    """It reserves this one and admits it."""
    (claimed,) = ask(worker).jobs
    assert claimed.job.id == job.id
    worker.append([row(claimed, start=True)])
    return claimed


def defers(worker: Claims, rows: int = 1) -> float:
    """All that waits is deferred; in how many seconds it is worth asking again."""
    claim = ask(worker, rows)
    assert claim.jobs == () and claim.again_s is not None
    return claim.again_s


def known_to(desk: Desk, worker: Claims, *prefixes: str) -> None:
    """A job with these prefixes was run there."""
    end(worker, take(worker, desk.submit(*prefixes)))


def test_a_job_goes_to_the_worker_that_holds_its_prefix(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    job = desk.submit(SECOND, FIRST)
    assert 0.1 < defers(w2) <= 0.2
    take(w1, job)
    continued = desk.submit(OTHER, SECOND)
    defers(w2)
    take(w1, continued)
    assert desk.routed() == {"deferred": 2, "preferred": 2}


def test_a_job_is_counted_as_deferred_once(desk: Desk) -> None:
    w1, w2, w3 = (desk.worker(name) for name in ("w1", "w2", "w3"))
    known_to(desk, w1, FIRST)
    job = desk.submit(FIRST)
    for worker in (w2, w3, w2):
        defers(worker)
    assert desk.get(job).status is Status.QUEUED and desk.routed() == {"deferred": 1}


def test_what_the_preferred_worker_does_not_take_in_time_goes_to_any(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    job = desk.submit(FIRST)
    defers(w2)
    desk.time_passes(job)
    take(w2, job)
    assert desk.routed() == {"deferred": 1, "another": 1}
    desk.worker("w3")
    for worker in (w1, w2):
        take(worker, desk.submit(FIRST))  # now both hold it


def test_a_job_that_nobody_holds_a_prefix_of_is_not_counted(desk: Desk) -> None:
    w1, _ = desk.worker("w1"), desk.worker("w2")
    take(w1, desk.submit(FIRST))
    take(w1, desk.submit())
    assert desk.routed() == {}


def test_of_those_that_hold_a_prefix_the_last_three_are_known(desk: Desk) -> None:
    names = [f"w{n}" for n in range(5)]
    workers = {name: desk.worker(name) for name in names}
    for name in names[:4]:
        job = desk.submit(FIRST)
        desk.client.hset(keys.JOB + job.id, "deferred_at", 1)
        end(workers[name], take(workers[name], job))
    desk.submit(FIRST)
    defers(workers["w0"])
    for name in ("w3", "w2", "w1"):
        assert ask(workers["w4"]).jobs == (), "there is another"
        workers[name].retire()
    assert ask(workers["w4"]).jobs


def test_a_clock_that_is_set_back_makes_no_job_wait(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    job = desk.submit(FIRST)
    defers(w2)
    desk.client.hincrbyfloat(keys.JOB + job.id, "deferred_at", 3600)
    take(w2, job)


def test_other_jobs_keep_their_order_and_do_not_wait(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    begun, *others = desk.submit(FIRST), desk.submit(), desk.submit(OTHER)
    claim = ask(w2, 3)
    assert [each.job.id for each in claim.jobs] == [job.id for job in others]
    assert claim.again_s is not None
    take(w1, begun)


def test_a_row_is_kept_free_for_each_deferred_job(desk: Desk) -> None:
    """Whatever becomes of the other worker: what was deferred must not wait for a job of lower rank."""
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    high = desk.submit(FIRST, priority=Priority.HIGH)
    low, lower = (desk.submit(priority=Priority.BATCH) for _ in range(2))
    assert [each.job.id for each in ask(w2, 2).jobs] == [low.id]
    defers(w2)
    desk.time_passes(high)
    take(w2, high)
    take(w1, lower)
    assert desk.routed() == {"deferred": 1, "another": 1}


def test_a_deferred_job_is_not_taken_as_a_spare_one_either(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    job = desk.submit(FIRST)
    claim = ask(w2, rows=0, spare=4)
    assert claim.jobs == () and claim.again_s is not None
    take(w1, job)


Change = Callable[[Desk, Claims], object]


def fill(desk: Desk, worker: Claims, count: int) -> None:
    for _ in range(count):
        take(worker, desk.submit())


@pytest.mark.parametrize(
    "change",
    [
        lambda desk, w1: w1.retire(),
        lambda desk, w1: lapse(desk.client, "w1"),
        lambda desk, w1: desk.client.delete(keys.WORKER + "w1"),
        lambda desk, w1: desk.worker("w1", state="draining"),
        lambda desk, w1: desk.worker("w1", model="n"),
        lambda desk, w1: (desk.worker("w1", slots=1), fill(desk, w1, 1)),
        lambda desk, w1: fill(desk, w1, 2),
    ],
    ids=["retired", "lapsed", "unknown", "draining", "another model", "full", "ahead"],
)
def test_a_job_is_not_deferred_to_a_worker_that_will_not_take_it(desk: Desk, change: Change) -> None:
    w1, w2, _ = desk.worker("w1"), desk.worker("w2"), desk.worker("w3")
    known_to(desk, w1, FIRST)
    change(desk, w1)
    take(w2, desk.submit(FIRST))
    assert "deferred" not in desk.routed()


def test_reserved_jobs_count_as_held(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    for _ in range(2):
        desk.submit()
    assert len(ask(w1, 2).jobs) == 2
    take(w2, desk.submit(FIRST))


def test_where_the_holder_of_the_longest_prefix_has_no_room_the_next_counts(desk: Desk) -> None:
    w1, w2, w3 = (desk.worker(name) for name in ("w1", "w2", "w3"))
    known_to(desk, w1, FIRST)
    known_to(desk, w2, SECOND)
    w2.retire()
    job = desk.submit(SECOND, FIRST)
    defers(w3)
    take(w1, job)


def test_the_longest_prefix_decides(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    known_to(desk, w2, SECOND)
    job = desk.submit(SECOND, FIRST)
    defers(w1)
    take(w2, job)


def test_a_worker_idles_for_no_more_jobs_than_it_has_rows(desk: Desk) -> None:
    w1, w2 = desk.worker("w1", slots=64), desk.worker("w2", slots=64)
    known_to(desk, w1, FIRST)
    jobs = [desk.submit(FIRST) for _ in range(9)]
    defers(w2, rows=8)
    assert [desk.client.hexists(keys.JOB + job.id, "deferred_at") for job in jobs] == [True] * 8 + [False]
    assert len(ask(w1, 9).jobs) == 9


def test_a_single_worker_keeps_no_table(desk: Desk) -> None:
    w1 = desk.worker("w1")
    for _ in range(2):
        known_to(desk, w1, FIRST)
    assert not desk.client.exists(keys.PREFIXES + MODEL, keys.ROUTED)


def test_a_job_that_was_started_before_is_deferred_to_nobody(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    job = desk.submit(FIRST)
    w1.release([held(take(w1, job))])
    take(w2, job)


def test_a_job_whose_worker_died_is_anybodys(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    job = desk.submit(FIRST)
    take(w1, job)
    lapse(desk.client, "w1")
    reap(desk.client)
    desk.worker("w3")
    assert take(w2, job).job.attempt == 2


def test_what_falls_on_the_same_place_replaces_and_is_not_taken_for_the_other(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    known_to(desk, w2, FIRST[:4] + "f" * 12)
    take(w2, desk.submit(FIRST))
    assert desk.client.hlen(keys.PREFIXES + MODEL) == 1
    assert 0 < desk.client.ttl(keys.PREFIXES + MODEL) <= 3600


def test_jobs_of_one_claim_that_begin_alike_are_remembered_once(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    for _ in range(3):
        desk.submit(FIRST)
    assert len(ask(w1, 3).jobs) == 3
    assert desk.client.hgetall(keys.PREFIXES + MODEL) == {FIRST[:4]: f"{FIRST[4:]} w1"}
    assert ask(w2, 1).again_s is None


def test_prefix_hashes_of_a_newer_version_do_not_stop_claims(client: Redis, settings: Settings) -> None:
    worker, _other = lease(client, "w1"), lease(client, "w2")
    job = submit(Jobs(client, settings), prefixes=("v2:xyz",))
    assert [each.job.id for each in reserved(worker)] == [job.id]
