"""Checks of the API: how it is, who may use it, and each way a job can be asked for."""

from __future__ import annotations

import json
from typing import Any

from scripts.client.api import Refused, RemoteJob
from shared.jobs.log import EventKind
from shared.jobs.record import Status
from tests.smoke.probe import Probe, require, require_json, require_refusal

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16}
ENDLESS = {"prompt": "Once upon a time", "max_tokens": 4096, "temperature": 1.0}
CANCELS = 3


def live(probe: Probe) -> None:
    """The API's process answers."""
    probe.stranger.request("GET", "/livez")


def ready(probe: Probe) -> None:
    """It can take jobs."""
    probe.stranger.request("GET", "/readyz")


def health(probe: Probe) -> None:
    """Health says how the queue and each worker are."""
    report = require_json(probe.client.request("GET", "/health"), "status", "reasons", "redis", "workers", "queues")
    require(report["status"] == "ok", f"{report['status']}: {report['reasons']}")
    require(report["workers"], "no worker")


def no_key(probe: Probe) -> None:
    """Nobody gets in without a key."""
    require_refusal(probe.stranger, "/v1/jobs")


def wrong_key(probe: Probe) -> None:
    """Nobody gets in with a wrong key."""
    require_refusal(probe.impostor, "/v1/jobs")


def right_key(probe: Probe) -> None:
    """The key opens."""
    require_json(probe.client.request("GET", "/v1/jobs"), "data")


def poll(probe: Probe) -> None:
    """A job is accepted, and its answer can be asked for."""
    job = probe.succeed(probe.client.submit(QUESTION))
    require(job.text, "the answer is empty")
    require(job.usage.get("completion_tokens"), "no tokens were counted")


def stream(probe: Probe) -> None:
    """The chunks of a stream are the job's text."""
    job = probe.client.submit(QUESTION)
    events = list(probe.client.events(job.id))
    require([event.n for event in events] == list(range(1, len(events) + 1)), "events are not numbered 1, 2, 3…")
    require(events[-1].kind is EventKind.DONE, "the last event is not `done`")
    done = RemoteJob.from_json(json.loads(events[-1].data))
    require("".join(event.text for event in events) == done.text, "the chunks differ from output.text")
    require(done.text and done == probe.client.job(job.id), "`done` differs from the job")


def ndjson(probe: Probe) -> None:
    """The same events are to be had as NDJSON, from a cursor."""
    job = probe.succeed(probe.client.submit(QUESTION))
    everything = _lines(probe, job.id, 0)
    cursor = int(everything[len(everything) // 2]["id"])
    rest = _lines(probe, job.id, cursor)
    require(rest == everything[len(everything) // 2 + 1 :], "what follows a cursor is not what came after it")
    require(rest and rest[-1]["event"] == EventKind.DONE, "the last line is not `done`")


def cancel(probe: Probe) -> None:
    """A long job that runs ends when it is cancelled."""
    # More than once, because a quick engine may end a long job before it hears of us.
    statuses = [_cancelled(probe) for _ in range(CANCELS)]
    require(Status.CANCELLED in statuses, f"{CANCELS} jobs ended {', '.join(statuses)}")


def inference(probe: Probe) -> None:
    """One request, one answer."""
    response = probe.client.request("POST", "/inference", json=QUESTION, wait_s=60)
    answer = require_json(response, "id", "model", "text", "finish_reason", "usage", "timings")
    require(answer["text"], "the answer is empty")


def metrics(probe: Probe) -> None:
    """Prometheus finds numbers."""
    text = probe.client.request("GET", "/metrics").text
    require(any(line and not line.startswith("#") for line in text.splitlines()), "no metric")


def openapi(probe: Probe) -> None:
    """The API describes itself."""
    document = require_json(probe.stranger.request("GET", "/openapi.json"), "openapi", "paths")
    require(str(document["openapi"]).startswith("3.1"), f"OpenAPI {document['openapi']}")
    paths: Any = document["paths"]
    require("/v1/jobs" in paths, "/v1/jobs is not described")


def _cancelled(probe: Probe) -> Status:
    """How a job ends that is cancelled at its first token."""
    job = probe.client.submit(ENDLESS)
    next(event for event in probe.client.events(job.id) if event.kind in (EventKind.CHUNK, EventKind.DONE))
    try:
        probe.client.cancel(job.id)
    except Refused as error:
        require(error.code == "job_ended", str(error))
    return probe.finish(job).status


def _lines(probe: Probe, job_id: str, after: int) -> list[dict[str, Any]]:
    path = f"/v1/jobs/{job_id}/stream?starting_after={after}"
    with probe.client.stream("GET", path, headers={"Accept": "application/x-ndjson"}) as response:
        return [json.loads(line) for line in response.iter_lines() if line.strip()]


CHECKS = (
    live,
    ready,
    health,
    no_key,
    wrong_key,
    right_key,
    poll,
    stream,
    ndjson,
    cancel,
    inference,
    metrics,
    openapi,
)
