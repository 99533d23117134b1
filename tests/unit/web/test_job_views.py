"""Jobs as their owners see them: place in line, estimated start, and few questions to Redis."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from shared.jobs.log import JobLog
from shared.jobs.record import Ending, Job, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.models.registry import Registry, WorkerInfo
from shared.queue import keys
from shared.queue.claims import Append, Claims, Demand, WriteResult
from shared.queue.redis import Redis
from shared.settings import Settings
from web.cluster.snapshot import Cluster, ClusterSnapshot
from web.results.job_views import Views

MODEL = "m"
WORKER = WorkerInfo(
    id="w", node="w@h", host="h", pid=1, model=MODEL, state="ready", slots=4, slots_used=4, started_at=0.0,
    heartbeat_at=0.0, stats={}, about={},
)  # fmt: skip


def snapshot(*workers: WorkerInfo, mean_s: float | None = 10.0) -> ClusterSnapshot:
    return ClusterSnapshot({}, workers, {} if mean_s is None else {MODEL: mean_s}, taken_at=0.0)


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
    seen: ClusterSnapshot, position: int, start_s: float | None
) -> None:
    assert seen.estimated_start_s(MODEL, position) == start_s


@pytest.fixture
def jobs(client: Redis, settings: Settings) -> Jobs:
    return Jobs(client, settings)


def submit(jobs: Jobs, **asked: Any) -> Job:
    return jobs.create(Submission(Request(MODEL, 1, Sampling(0.0), prompt="hi", **asked), owner="me")).job


def said(job: Job, n: int, text: str = "", tokens: tuple[int, ...] = (), **more: Any) -> Append:
    return Append(job.id, job.attempt, job.claimed_at, n, text, tokens, **more)


def start(client: Redis, name: str = "w") -> tuple[Claims, Job]:
    """The next job, admitted to a worker's batch."""
    claims = Claims(client, name)
    claims.renew(30)
    (claimed,) = claims.claim(MODEL, Demand(rows=1, tokens=10**6)).jobs
    assert claims.append([said(claimed.job, claimed.job.last_event, start=True)]) == [WriteResult.OK]
    return claims, claimed.job


@pytest.fixture
def views(client: Redis, jobs: Jobs) -> Views:
    return Views(jobs, Cluster(Registry(client)), JobLog(client))


def shown(views: Views, jobs: Jobs, job: Job) -> dict[str, Any]:
    view: dict[str, Any] = json.loads(views.full(jobs.get(job.id, "me")))
    return view


def test_a_list_tells_the_places_in_the_queue_of_those_that_wait(client: Redis, jobs: Jobs, views: Views) -> None:
    for _ in range(4):
        submit(jobs)
    start(client)
    listed = views.brief(jobs.recent("me", limit=10))
    assert [view.queue_position for view in listed] == [3, 2, 1, None]


def test_a_list_shows_the_texts_of_those_that_have_ended(client: Redis, jobs: Jobs, views: Views) -> None:
    for _ in range(2):
        submit(jobs)
    for text, ending in (("all of it", Ending(Status.SUCCEEDED, "stop")), ("a part", None)):
        claims, job = start(client)
        claims.append([said(job, job.last_event + 2, text, (1,), ending=ending)])
    running, ended = views.brief(jobs.recent("me", limit=10))
    assert running.output is None
    assert ended.output and (ended.output.text, ended.output.finish_reason) == ("all of it", "stop")


def test_the_text_of_a_running_job_needs_no_log(client: Redis, jobs: Jobs, views: Views) -> None:
    submit(jobs)
    claims, job = start(client)
    claims.append([said(job, n, f"{n} ", (n,)) for n in (3, 4)])
    client.xtrim(keys.LOG + job.id, maxlen=1, approximate=False)
    assert shown(views, jobs, job)["output"]["text"] == "3 4 "


def test_the_history_names_no_host(client: Redis, jobs: Jobs, views: Views) -> None:
    job = submit(jobs)
    for name in ("host-0-a", "host-0-b", "host-0-a"):
        start(client, name)[0].retire()
    start(client, "host-0-b")
    view = shown(views, jobs, job)
    workers = [each["worker"] for each in view["history"]]
    assert workers == [workers[0], workers[1], workers[0], workers[1]] and workers[0] != workers[1]
    assert "host" not in json.dumps(view)
    assert [each["outcome"] for each in view["history"]] == [*["handed_back"] * 3, None]
    assert view["history"][-1]["ended_at"] is None


def test_places_in_the_queue_are_one_question_however_many_jobs(
    valkey_client: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(valkey_client, settings)
    waiting = [submit(jobs) for _ in range(20)]
    monkeypatch.setattr(valkey_client, "execute_command", None)  # one command, one round trip
    assert sorted(jobs.positions(waiting).values()) == [*range(1, 21)]


def test_a_job_that_left_the_queue_meanwhile_has_no_place(jobs: Jobs) -> None:
    job = submit(jobs)
    jobs.stop(job.id, "me")
    assert jobs.positions([job]) == {}


def token(n: int) -> dict[str, Any]:
    return {"token": f'"{n}" é', "logprob": -n / 2, "top": [{"token": '\\","logprobs":null', "logprob": -0.25}]}


def run_with_logprobs(client: Redis, jobs: Jobs, chunks: int, *, ends: bool = True) -> Job:
    """A job that wrote so many chunks of a token each, with what it asked for."""
    submit(jobs, logprobs=1)
    claims, job = start(client)
    claims.append([
        said(job, n, '"logprobs":null', (n,), extra=f'"logprobs":{json.dumps([token(n)])},"novel":[1]')
        for n in range(3, chunks + 3)
    ])  # fmt: skip
    if ends:
        claims.append([said(job, chunks + 3, ending=Ending(Status.SUCCEEDED, "stop"))])
    return jobs.get(job.id, "me")


@pytest.mark.parametrize("chunks", [1, 199, 200, 201, 1000])
def test_log_probabilities_are_put_together_from_the_log(client: Redis, jobs: Jobs, views: Views, chunks: int) -> None:
    job = run_with_logprobs(client, jobs, chunks)
    expected = [token(n) for n in range(3, chunks + 3)]
    assert shown(views, jobs, job)["output"]["logprobs"] == expected
    answer = json.loads(views.answer(job))
    assert answer["logprobs"] == expected
    assert answer["text"] == '"logprobs":null' * chunks, "a text that looks like the member's name is no member"


def test_log_probabilities_are_shown_whole_or_not_at_all(client: Redis, jobs: Jobs, views: Views) -> None:
    running = run_with_logprobs(client, jobs, 3, ends=False)
    assert shown(views, jobs, running)["output"]["logprobs"] is None
    for damage in ("trimmed at its start", "expired", "cut at its end"):
        job = run_with_logprobs(client, jobs, 5)
        if damage == "expired":
            client.delete(keys.LOG + job.id)
        elif damage == "trimmed at its start":
            client.xtrim(keys.LOG + job.id, maxlen=3, approximate=False)
        else:
            client.xdel(keys.LOG + job.id, f"{job.last_event}-0")
        view = shown(views, jobs, job)
        assert (view["output"]["logprobs"], view["status"]) == (None, "succeeded"), damage


def test_a_job_that_asked_for_none_has_its_log_left_alone(
    valkey_client: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(valkey_client, settings)
    submit(jobs)
    claims, job = start(valkey_client)
    claims.append([said(job, 3, "text", (1,), ending=Ending(Status.SUCCEEDED, "stop"))])
    monkeypatch.setattr(JobLog, "read", None)
    views = Views(jobs, Cluster(Registry(valkey_client)), JobLog(valkey_client))
    assert shown(views, jobs, job)["output"] == {"text": "text", "finish_reason": "stop", "logprobs": None}


def test_an_answer_that_is_to_be_parsed_in_a_way_only_a_newer_version_knows_is_shown_unparsed(
    client: Redis, jobs: Jobs, views: Views
) -> None:
    submit(jobs, parse="of a newer version")
    claims, job = start(client)
    claims.append([said(job, 3, "wait()", (1,), ending=Ending(Status.SUCCEEDED, "stop"))])
    view = shown(views, jobs, job)
    assert (view["actions"], view["parse_error"], view["output"]["text"]) == (None, None, "wait()")
