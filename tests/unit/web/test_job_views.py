"""Job views: queue position, estimated start, text, history and log-probabilities."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from shared.jobs.log import JobLog
from shared.jobs.record import Ending, Job, Priority, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Place
from shared.jobs.submission import Submission
from shared.models.registry import Registry, Speed, Starts, WorkerInfo
from shared.queue.claims import Append, Claims, Demand, WriteResult
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from web.cluster.snapshot import Cluster, ClusterSnapshot
from web.results.job_views import JobViews

MODEL = "m"
WORKER = WorkerInfo(
    id="w", node="w@h", host="h", pid=1, model=MODEL, state="ready", slots=4, slots_used=4, started_at=0.0,
    heartbeat_at=0.0, stats={}, about={},
)  # fmt: skip


def snapshot(*workers: WorkerInfo, mean_s: float | None = 10.0) -> ClusterSnapshot:
    return ClusterSnapshot({}, workers, {MODEL: Speed(mean_s)}, taken_at=0.0)


@pytest.mark.parametrize(
    ("cluster_snapshot", "position", "start_s"),
    [
        (snapshot(WORKER), 1, 2.5),  # one of four slots becomes free every 10 s / 4
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
    cluster_snapshot: ClusterSnapshot, position: int, start_s: float | None
) -> None:
    assert cluster_snapshot.estimated_start_s(MODEL, Place(position)) == start_s


@pytest.mark.parametrize(
    ("place", "start_s"),
    [
        (Place(position=10, turns=20.0), 100.0),
        (Place(position=3, turns=1.0), 7.5),
        (Place(position=3, higher=2, turns=1.0), 5.0),
    ],
)
def test_the_estimated_start_is_after_the_turn_and_after_the_jobs_in_front(place: Place, start_s: float) -> None:
    """A job starts every 2.5 s, and a turn takes 5 s."""
    starts: dict[int, Starts] = {Priority.NORMAL: Starts(number=1000, turns=500, seconds=2500)}
    measured = ClusterSnapshot({}, (WORKER,), {MODEL: Speed(10.0, starts)}, taken_at=0.0)
    assert measured.estimated_start_s(MODEL, place) == pytest.approx(start_s, rel=0.01)


@pytest.fixture
def jobs(client: Redis, settings: Settings) -> Jobs:
    return Jobs(client, settings)


def submit(jobs: Jobs, **fields: Any) -> Job:
    return jobs.create(Submission(Request(MODEL, 1, Sampling(0.0), prompt="hi", **fields), owner="me")).job


def write(job: Job, n: int, text: str = "", tokens: tuple[int, ...] = (), **more: Any) -> Append:
    return Append(job.id, job.attempt, job.claimed_at, n, text, tokens, **more)


def start(client: Redis, name: str = "w") -> tuple[Claims, Job]:
    """Claim the next job and start it."""
    claims = Claims(client, name)
    claims.renew(30)
    (claimed,) = claims.claim(MODEL, Demand(rows=1, tokens=10**6)).jobs
    assert claims.append([write(claimed.job, claimed.job.last_event, start=True)]) == [WriteResult.OK]
    return claims, claimed.job


@pytest.fixture
def views(client: Redis, jobs: Jobs) -> JobViews:
    return JobViews(jobs, Cluster(Registry(client)), JobLog(client))


def read_view(views: JobViews, jobs: Jobs, job: Job) -> dict[str, Any]:
    view: dict[str, Any] = json.loads(views.job_json(jobs.get(job.id, "me")))
    return view


def test_a_list_has_the_queue_positions_of_waiting_jobs(client: Redis, jobs: Jobs, views: JobViews) -> None:
    for _ in range(4):
        submit(jobs)
    start(client)
    listed = views.list_items(jobs.recent("me", limit=10))
    assert [view.queue_position for view in listed] == [3, 2, 1, None]


def test_a_list_has_the_texts_of_ended_jobs(client: Redis, jobs: Jobs, views: JobViews) -> None:
    for _ in range(2):
        submit(jobs)
    for text, ending in (("all of it", Ending(Status.SUCCEEDED, "stop")), ("a part", None)):
        claims, job = start(client)
        claims.append([write(job, job.last_event + 2, text, (1,), ending=ending)])
    running, ended = views.list_items(jobs.recent("me", limit=10))
    assert running.output is None
    assert ended.output and (ended.output.text, ended.output.finish_reason) == ("all of it", "stop")


def test_the_text_of_a_running_job_does_not_depend_on_the_log(client: Redis, jobs: Jobs, views: JobViews) -> None:
    submit(jobs)
    claims, job = start(client)
    claims.append([write(job, n, f"{n} ", (n,)) for n in (3, 4)])
    client.xtrim(keys.LOG + job.id, maxlen=1, approximate=False)
    assert read_view(views, jobs, job)["output"]["text"] == "3 4 "


def test_the_history_does_not_reveal_host_names(client: Redis, jobs: Jobs, views: JobViews) -> None:
    job = submit(jobs)
    for name in ("host-0-a", "host-0-b", "host-0-a"):
        start(client, name)[0].retire()
    start(client, "host-0-b")
    view = read_view(views, jobs, job)
    workers = [each["worker"] for each in view["history"]]
    assert workers == [workers[0], workers[1], workers[0], workers[1]] and workers[0] != workers[1]
    assert "host" not in json.dumps(view)
    assert [each["outcome"] for each in view["history"]] == [*["handed_back"] * 3, None]
    assert view["history"][-1]["ended_at"] is None


def test_queue_positions_of_all_jobs_are_read_in_one_round_trip(
    valkey_client: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(valkey_client, settings)
    waiting = [submit(jobs) for _ in range(20)]
    jobs.places(waiting[:1])  # loads the script
    sent: list[str] = []
    execute = valkey_client.execute_command
    monkeypatch.setattr(valkey_client, "execute_command", lambda *call: sent.append(call[0]) or execute(*call))
    assert sorted(place.position for place in jobs.places(waiting).values()) == [*range(1, 21)]
    assert sent == ["EVALSHA"]


def test_a_job_that_has_left_the_queue_has_no_position(jobs: Jobs) -> None:
    job = submit(jobs)
    jobs.stop(job.id, "me")
    assert jobs.places([job]) == {}


def token(n: int) -> dict[str, Any]:
    return {"token": f'"{n}" é', "logprob": -n / 2, "top": [{"token": '\\","logprobs":null', "logprob": -0.25}]}


def run_with_logprobs(client: Redis, jobs: Jobs, chunks: int, *, ends: bool = True) -> Job:
    """A job with this many chunks of one token each, with log-probabilities."""
    submit(jobs, logprobs=1)
    claims, job = start(client)
    claims.append([
        write(job, n, '"logprobs":null', (n,), extra=f'"logprobs":{json.dumps([token(n)])},"novel":[1]')
        for n in range(3, chunks + 3)
    ])  # fmt: skip
    if ends:
        claims.append([write(job, chunks + 3, ending=Ending(Status.SUCCEEDED, "stop"))])
    return jobs.get(job.id, "me")


@pytest.mark.parametrize("chunks", [1, 199, 200, 201, 1000])
def test_logprobs_are_collected_from_the_log(client: Redis, jobs: Jobs, views: JobViews, chunks: int) -> None:
    job = run_with_logprobs(client, jobs, chunks)
    expected = [token(n) for n in range(3, chunks + 3)]
    assert read_view(views, jobs, job)["output"]["logprobs"] == expected
    inference = json.loads(views.inference_json(job))
    assert inference["logprobs"] == expected
    assert inference["text"] == '"logprobs":null' * chunks, "a text that looks like the field is not replaced"


def test_logprobs_are_complete_or_null(client: Redis, jobs: Jobs, views: JobViews) -> None:
    running = run_with_logprobs(client, jobs, 3, ends=False)
    assert read_view(views, jobs, running)["output"]["logprobs"] is None
    for damage in ("trimmed at its start", "expired", "cut at its end"):
        job = run_with_logprobs(client, jobs, 5)
        if damage == "expired":
            client.delete(keys.LOG + job.id)
        elif damage == "trimmed at its start":
            client.xtrim(keys.LOG + job.id, maxlen=3, approximate=False)
        else:
            client.xdel(keys.LOG + job.id, f"{job.last_event}-0")
        view = read_view(views, jobs, job)
        assert (view["output"]["logprobs"], view["status"]) == (None, "succeeded"), damage


def test_the_log_is_not_read_for_a_job_without_logprobs(
    valkey_client: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(valkey_client, settings)
    submit(jobs)
    claims, job = start(valkey_client)
    claims.append([write(job, 3, "text", (1,), ending=Ending(Status.SUCCEEDED, "stop"))])
    monkeypatch.setattr(JobLog, "read", None)
    views = JobViews(jobs, Cluster(Registry(valkey_client)), JobLog(valkey_client))
    assert read_view(views, jobs, job)["output"] == {"text": "text", "finish_reason": "stop", "logprobs": None}


@pytest.mark.parametrize(
    ("parse", "field", "text"),
    [
        (None, None, "wait()"),
        ("ui_tars", "actions", "wait()"),
        ("computer_use", "actions", '{"name": "mobile_use", "arguments": {"action": "wait", "time": 1}}'),
        ("grounding", "regions", '{"point_2d": [1, 2]}'),
    ],
)
def test_parsed_fields_are_present_only_if_requested(
    client: Redis, jobs: Jobs, views: JobViews, parse: str | None, field: str | None, text: str
) -> None:
    fields = {"actions", "regions", "parse_error", "message"}
    submit(jobs, parse=parse)
    claims, job = start(client)
    waiting = read_view(views, jobs, job)
    assert fields & set(waiting) == ({field, "parse_error"} if parse else set())
    claims.append([write(job, 3, text, (1,), ending=Ending(Status.SUCCEEDED, "stop"))])
    ended = jobs.get(job.id, "me")
    answers = [read_view(views, jobs, job), json.loads(views.inference_json(ended))]
    answers.append(json.loads(views.list_items([ended])[0].model_dump_json()))
    for answer in answers:
        assert fields & set(answer) == ({field, "parse_error"} if parse else set())
        assert field is None or len(answer[field]) == 1


def test_an_unknown_value_of_parse_leaves_the_text_unparsed(client: Redis, jobs: Jobs, views: JobViews) -> None:
    submit(jobs, parse="newer_format")
    claims, job = start(client)
    claims.append([write(job, 3, "wait()", (1,), ending=Ending(Status.SUCCEEDED, "stop"))])
    view = read_view(views, jobs, job)
    assert (view["actions"], view["parse_error"], view["output"]["text"]) == (None, None, "wait()")
