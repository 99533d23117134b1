"""Which worker a claim gives a job to that begins as an earlier one did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from shared.jobs.record import Ending, Job, Priority, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.models.registry import Registry, WorkerInfo
from shared.queue import keys
from shared.queue.claims import Append, Claims, Left, LeftToOthers, Reaper
from shared.queue.redis import Redis
from shared.settings import Settings

MODEL = "m"
FIRST, SECOND, OTHER = "1111" + "a" * 12, "2222" + "b" * 12, "3333" + "c" * 12


class Desk:
    """A queue, and workers that are told what to do."""

    def __init__(self, client: Redis) -> None:
        self.client = client
        self.jobs = Jobs(client, Settings(_env_file=None, durable=False))
        self.registry = Registry(client)

    def worker(self, name: str, *, model: str = MODEL, state: str = "ready", slots: int = 4) -> Claims:
        claims = Claims(self.client, name)
        claims.renew(60)
        card = WorkerInfo(name, f"node-{name}", "h", 1, model, state, slots, 0, 0.0, 0.0, {"steps": 1.0}, {"a": [1]})
        self.registry.announce_worker(card, 60)
        return claims

    def submit(self, *marks: str, **more: Priority) -> Job:
        asked = Request(MODEL, 9, Sampling(0.0), prompt="x")
        return self.jobs.create(Submission(asked, "a", marks=marks, **more))[0]

    def get(self, job: Job) -> Job:
        return self.jobs.get(job.id, "a")

    def time_passes(self, job: Job) -> None:
        """The time for which it is left to another is over."""
        self.client.hincrbyfloat(keys.JOB + job.id, "left_at", -0.2)

    def routed(self) -> dict[str, int]:
        return {outcome: n for (_, outcome), n in self.registry.routed().items()}


@pytest.fixture
def desk(client: Redis) -> Desk:
    return Desk(client)


def take(worker: Claims, job: Job) -> Job:
    """It claims this one."""
    claimed = worker.claim(MODEL)
    assert claimed is not None and claimed.id == job.id
    return claimed


def end(worker: Claims, job: Job) -> None:
    worker.append([Append.of(job, job.last_event + 1, ending=Ending(Status.SUCCEEDED, text="x"))])


def left(worker: Claims) -> tuple[Left, ...]:
    """What it is told to see to, when all is left to others."""
    with pytest.raises(LeftToOthers) as told:
        worker.claim(MODEL)
    return told.value.jobs


def known_to(desk: Desk, worker: Claims, *marks: str) -> None:
    """A job that began so was worked on there."""
    end(worker, take(worker, desk.submit(*marks)))


def test_a_job_goes_to_the_worker_that_has_its_beginning(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    job = desk.submit(SECOND, FIRST)
    (told,) = left(w2)
    assert (told.job_id, told.node) == (job.id, "node-w1") and 0.1 < told.seconds <= 0.2
    take(w1, job)
    goes_on = desk.submit(OTHER, SECOND)
    assert [each.job_id for each in left(w2)] == [goes_on.id]
    take(w1, goes_on)
    assert desk.routed() == {"left": 2, "keeper": 2}


def test_one_worker_sees_to_a_job_that_is_left(desk: Desk) -> None:
    w1, w2, w3 = (desk.worker(name) for name in ("w1", "w2", "w3"))
    known_to(desk, w1, FIRST)
    job = desk.submit(FIRST)
    assert [each.job_id for each in left(w2)] == [job.id]
    assert w3.claim(MODEL) is None and w2.claim(MODEL) is None
    assert desk.get(job).status is Status.QUEUED


def test_what_the_keeper_does_not_take_in_time_is_anybodys(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    job = desk.submit(FIRST)
    left(w2)
    desk.time_passes(job)
    take(w2, job)
    assert desk.routed() == {"left": 1, "another": 1}
    desk.worker("w3")
    for worker in (w1, w2):
        take(worker, desk.submit(FIRST))  # now both have it


def test_of_those_that_have_a_beginning_the_last_three_are_known(desk: Desk) -> None:
    names = [f"w{n}" for n in range(5)]
    workers = {name: desk.worker(name) for name in names}
    for name in names[:4]:
        job = desk.submit(FIRST)
        desk.client.hset(keys.JOB + job.id, "left_at", 1)
        end(workers[name], take(workers[name], job))
    desk.submit(FIRST)
    assert [each.node for each in left(workers["w0"])] == ["node-w3"]
    for name in ("w3", "w2", "w1"):
        workers[name].retire()
        if name != "w1":
            assert workers["w4"].claim(MODEL) is None, "there is another"
    assert workers["w4"].claim(MODEL) is not None


def test_a_clock_that_is_set_back_makes_no_job_wait(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    job = desk.submit(FIRST)
    left(w2)
    desk.client.hincrbyfloat(keys.JOB + job.id, "left_at", 3600)
    take(w2, job)


def test_others_in_line_keep_their_order_and_do_not_wait(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    begun, *others = desk.submit(FIRST), desk.submit(), desk.submit(OTHER)
    for job in others:
        take(w2, job)
    assert [each.job_id for each in left(w2)] == [begun.id], "told when there is nothing else to do"
    take(w1, begun)


def test_a_lower_class_gains_no_more_than_the_time_a_job_is_left(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    high = desk.submit(FIRST, priority=Priority.HIGH)
    low, lower = desk.submit(priority=Priority.BATCH), desk.submit(priority=Priority.BATCH)
    take(w2, low)
    desk.time_passes(high)
    take(w2, high)
    take(w2, lower)


def test_a_worker_keeps_a_place_for_each_job_that_it_leaves(desk: Desk) -> None:
    """Whatever becomes of the other worker: what it left must not wait for what it took instead."""
    w1, w2 = desk.worker("w1"), desk.worker("w2", slots=2)
    known_to(desk, w1, FIRST)
    high = desk.submit(FIRST, priority=Priority.HIGH)
    low, lower = desk.submit(priority=Priority.BATCH), desk.submit(priority=Priority.BATCH)
    take(w2, low)
    take(w2, high)
    assert desk.routed() == {"left": 1, "another": 1}
    take(w1, lower)


def test_a_worker_with_one_slot_leaves_a_job_only_where_nothing_else_waits(desk: Desk) -> None:
    w1, w2 = desk.worker("w1", slots=1), desk.worker("w2", slots=1)
    known_to(desk, w1, FIRST)
    job = desk.submit(FIRST)
    assert [each.job_id for each in left(w2)] == [job.id]
    desk.submit()
    take(w2, job)


def test_a_job_that_is_left_before_one_that_must_run_alone_is_told_of(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    alone = desk.submit()
    for attempt in (1, 2):
        take(w2, alone)
        w2.release([(alone.id, attempt)], max_attempts=3)
    job = desk.submit(FIRST, priority=Priority.HIGH)
    busy = desk.submit(priority=Priority.HIGH)
    take(w2, busy)
    assert [each.job_id for each in left(w2)] == [job.id]


def test_a_worker_that_takes_fewer_rows_than_it_has_slots_is_full_with_those(desk: Desk) -> None:
    w1, w2, _ = desk.worker("w1"), desk.worker("w2"), desk.worker("w3")
    known_to(desk, w1, FIRST)
    assert w1.claim(MODEL) is None
    desk.submit()
    assert w1.claim(MODEL)
    card = next(card for card in desk.registry.workers() if card.id == "w1")
    desk.registry.announce_worker(replace(card, stats={"row_cap": 1}), 60)
    take(w2, desk.submit(FIRST))
    assert "left" not in desk.routed()


Change = Callable[[Desk, Claims], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda desk, w1: w1.retire(),
        lambda desk, w1: desk.client.zadd(keys.LEASES, {"w1": 1.0}),
        lambda desk, w1: desk.client.delete(keys.WORKER + "w1"),
        lambda desk, w1: desk.worker("w1", state="draining"),
        lambda desk, w1: desk.worker("w1", model="n"),
        lambda desk, w1: (desk.worker("w1", slots=1), desk.submit(), w1.claim(MODEL)),
        lambda desk, w1: [desk.submit() and w1.claim(MODEL) for _ in range(2)],
    ],
    ids=["retired", "lapsed", "unknown", "draining", "another model", "full", "ahead"],
)
def test_a_job_is_not_left_to_who_will_not_take_it(desk: Desk, change: Change) -> None:
    w1, w2, _ = desk.worker("w1"), desk.worker("w2"), desk.worker("w3")
    known_to(desk, w1, FIRST)
    change(desk, w1)
    take(w2, desk.submit(FIRST))
    assert "left" not in desk.routed()


def test_where_the_longest_beginning_cannot_be_had_the_next_counts(desk: Desk) -> None:
    w1, w2, w3 = (desk.worker(name) for name in ("w1", "w2", "w3"))
    known_to(desk, w1, FIRST)
    known_to(desk, w2, SECOND)
    w2.retire()
    job = desk.submit(SECOND, FIRST)
    assert [each.node for each in left(w3)] == ["node-w1"]
    take(w1, job)


def test_the_longest_beginning_decides(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    known_to(desk, w2, SECOND)
    job = desk.submit(SECOND, FIRST)
    assert [each.node for each in left(w1)] == ["node-w2"]
    take(w2, job)


def test_no_more_jobs_are_left_than_a_worker_may_idle_for(desk: Desk) -> None:
    w1, w2 = desk.worker("w1", slots=64), desk.worker("w2", slots=64)
    known_to(desk, w1, FIRST)
    jobs = [desk.submit(FIRST) for _ in range(9)]
    take(w2, jobs[-1])
    assert [desk.get(job).status for job in jobs[:-1]] == [Status.QUEUED] * 8
    take(w1, jobs[0])
    take(w2, jobs[1])  # it has the beginning now, as well


def test_a_single_worker_keeps_no_table(desk: Desk) -> None:
    w1 = desk.worker("w1")
    for _ in range(2):
        known_to(desk, w1, FIRST)
    assert not desk.client.exists(keys.PREFIXES + MODEL, keys.ROUTED)


def test_the_last_try_of_a_job_waits_for_nobody(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    job = desk.submit(FIRST)
    for attempt in (1, 2):
        take(w1, job)
        w1.release([(job.id, attempt)], max_attempts=3)
    assert take(w2, job).alone


def test_a_job_whose_keeper_died_with_it_is_anybodys(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    job = desk.submit(FIRST)
    take(w1, job)
    desk.client.zadd(keys.LEASES, {"w1": 1.0})
    Reaper(desk.client, 3).reap()
    desk.worker("w3")
    assert take(w2, job).attempt == 2


def test_what_falls_on_the_same_place_replaces_and_is_not_taken_for_the_other(desk: Desk) -> None:
    w1, w2 = desk.worker("w1"), desk.worker("w2")
    known_to(desk, w1, FIRST)
    known_to(desk, w2, FIRST[:4] + "f" * 12)
    take(w2, desk.submit(FIRST))
    assert desk.client.hlen(keys.PREFIXES + MODEL) == 1
    assert 0 < desk.client.ttl(keys.PREFIXES + MODEL) <= 3600
