"""Jobs as their owners see them: place in line, estimated start, and few questions to Redis."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.jobs.record import Job
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.models.registry import Registry, WorkerInfo
from shared.queue.claims import Append, Claims
from shared.queue.redis import Redis
from shared.settings import Settings
from web.cluster import Roster, Snapshot
from web.views import Views

MODEL = "m"
WORKER = WorkerInfo(
    id="w", node="w@h", host="h", pid=1, model=MODEL, state="ready", slots=4, slots_used=4, started_at=0.0,
    heartbeat_at=0.0, stats={}, about={},
)  # fmt: skip


def snapshot(*workers: WorkerInfo, mean_s: float | None = 10.0) -> Snapshot:
    return Snapshot({}, workers, {} if mean_s is None else {MODEL: mean_s}, taken_at=0.0)


@pytest.mark.parametrize(
    ("seen", "position", "start_s"),
    [
        (snapshot(WORKER), 1, 2.5),  # of four slots one comes free every 10 s / 4
        (snapshot(WORKER), 4, 10.0),
        (snapshot(WORKER, replace(WORKER, slots=6, slots_used=6)), 5, 5.0),
        (snapshot(replace(WORKER, slots_used=2)), 2, 0.0),
        (snapshot(replace(WORKER, slots_used=2)), 3, 2.5),
        (snapshot(replace(WORKER, slots_used=3), mean_s=None), 1, 0.0),
        (snapshot(WORKER, mean_s=None), 1, None),
        (snapshot(), 1, None),
        (snapshot(replace(WORKER, state="loading")), 1, None),
        (snapshot(replace(WORKER, model="other")), 1, None),
        (snapshot(replace(WORKER, slots=3), mean_s=1.0), 1, 0.667),
    ],
)
def test_the_estimated_start_is_the_time_until_enough_slots_come_free(
    seen: Snapshot, position: int, start_s: float | None
) -> None:
    assert seen.estimated_start_s(MODEL, position) == start_s


@pytest.fixture
def jobs(client: Redis, settings: Settings) -> Jobs:
    return Jobs(client, settings)


def submit(jobs: Jobs) -> Job:
    return jobs.create(Submission(Request(MODEL, 1, Sampling(0.0), prompt="hi"), owner="me"))[0]


def test_a_list_tells_the_places_in_line_of_those_that_wait(client: Redis, jobs: Jobs) -> None:
    for _ in range(4):
        submit(jobs)
    claims = Claims(client, "w")
    claims.renew(30)
    claims.claim(MODEL)
    shown = Views(jobs, Roster(Registry(client))).brief(jobs.recent("me", limit=10))
    assert [view.queue_position for view in shown] == [3, 2, 1, None]


def test_a_job_is_shown_without_its_text_when_a_part_of_that_is_lost(client: Redis, jobs: Jobs) -> None:
    job = submit(jobs)
    claims = Claims(client, "w")
    claims.renew(30)
    claimed = claims.claim(MODEL)
    assert claimed is not None
    claims.append([Append.of(claimed, n, f"{n} ", (n,)) for n in (3, 4)])
    views = Views(jobs, Roster(Registry(client)))
    whole = views.full(jobs.get(job.id, "me")).output
    assert whole and whole.text == "3 4 "
    client.xtrim("mlxq:log:" + job.id, maxlen=1, approximate=False)
    assert views.full(jobs.get(job.id, "me")).output is None


def test_the_history_names_no_host(client: Redis, jobs: Jobs) -> None:
    job = submit(jobs)
    for name in ("host-0-a", "host-0-b", "host-0-a"):
        claims = Claims(client, name)
        claims.renew(30)
        claims.claim(MODEL)
        if name.endswith("b"):
            claims.release([(job.id, 2)])
        else:
            claims.retire()
    Claims(client, "host-0-b").renew(30)
    Claims(client, "host-0-b").claim(MODEL)
    view = Views(jobs, Roster(Registry(client))).full(jobs.get(job.id, "me"))
    workers = [each.worker for each in view.history]
    assert workers == [workers[0], workers[1], workers[0], workers[1]] and workers[0] != workers[1]
    assert "host" not in view.model_dump_json()
    assert [each.outcome for each in view.history] == [*["handed_back"] * 3, None]
    assert view.history[-1].ended_at is None


def test_places_in_line_are_one_question_however_many_jobs(
    valkey_client: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(valkey_client, settings)
    waiting = [submit(jobs) for _ in range(20)]
    monkeypatch.setattr(valkey_client, "execute_command", None)  # one command, one round trip
    assert sorted(jobs.positions(waiting).values()) == [*range(1, 21)]


def test_a_job_that_left_the_line_meanwhile_has_no_place(jobs: Jobs) -> None:
    job = submit(jobs)
    jobs.stop(job.id, "me")
    assert jobs.positions([job]) == {}
