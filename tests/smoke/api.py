"""Checks of the API: health, keys, and every way to run a job."""

from __future__ import annotations

import json
from typing import Any

from scripts.client.api import Refused, RemoteJob
from shared.jobs.log import EventKind
from shared.jobs.record import Status
from tests.smoke.probe import Probe, require, require_json, require_unauthorized

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16}
ENDLESS = {"prompt": "Once upon a time", "max_tokens": 4096, "temperature": 1.0}
CANCELS = 3


def live(probe: Probe) -> None:
    """The API process answers."""
    probe.without_key.request("GET", "/livez")


def ready(probe: Probe) -> None:
    """The API accepts jobs."""
    probe.without_key.request("GET", "/readyz")


def health(probe: Probe) -> None:
    """The health report covers Redis, queues and workers."""
    report = require_json(probe.client.request("GET", "/health"), "status", "reasons", "redis", "workers", "queues")
    require(report["status"] == "ok", f"{report['status']}: {report['reasons']}")
    require(report["workers"], "no worker")


def no_key(probe: Probe) -> None:
    """A request without a key is rejected."""
    require_unauthorized(probe.without_key, "/v1/jobs")


def wrong_key(probe: Probe) -> None:
    """A request with a wrong key is rejected."""
    require_unauthorized(probe.wrong_key, "/v1/jobs")


def right_key(probe: Probe) -> None:
    """The key is accepted."""
    require_json(probe.client.request("GET", "/v1/jobs"), "data")


def poll(probe: Probe) -> None:
    """A job is accepted and can be polled."""
    job = probe.succeed(probe.client.submit(QUESTION))
    require(job.text, "the answer is empty")
    require(job.usage.get("completion_tokens"), "no tokens were counted")


def stream(probe: Probe) -> None:
    """The chunks of a stream add up to the job's text."""
    job = probe.client.submit(QUESTION)
    events = list(probe.client.events(job.id))
    require([event.n for event in events] == list(range(1, len(events) + 1)), "events are not numbered 1, 2, 3…")
    require(events[-1].kind is EventKind.DONE, "the last event is not `done`")
    done = RemoteJob.from_json(json.loads(events[-1].data))
    require("".join(event.text for event in events) == done.text, "the chunks differ from output.text")
    require(done.text and done == probe.client.job(job.id), "`done` differs from the job")


def ndjson(probe: Probe) -> None:
    """The same events are available as NDJSON, from a cursor on."""
    job = probe.succeed(probe.client.submit(QUESTION))
    everything = _lines(probe, job.id, 0)
    cursor = int(everything[len(everything) // 2]["id"])
    rest = _lines(probe, job.id, cursor)
    require(
        rest == everything[len(everything) // 2 + 1 :],
        "the events after a cursor differ",
    )
    require(rest and rest[-1]["event"] == EventKind.DONE, "the last line is not `done`")


def cancel(probe: Probe) -> None:
    """A running job ends when it is cancelled."""
    # Several times: a fast engine may finish a job before the cancellation arrives.
    statuses = [_cancelled(probe) for _ in range(CANCELS)]
    require(Status.CANCELLED in statuses, f"{CANCELS} jobs ended {', '.join(statuses)}")


def inference(probe: Probe) -> None:
    """A synchronous request returns the answer."""
    response = probe.client.request("POST", "/inference", json=QUESTION, wait_s=60)
    answer = require_json(response, "id", "model", "text", "finish_reason", "usage", "timings")
    require(answer["text"], "the answer is empty")


def metrics(probe: Probe) -> None:
    """There are metrics for Prometheus."""
    text = probe.client.request("GET", "/metrics").text
    require(any(line and not line.startswith("#") for line in text.splitlines()), "no metric")


def openapi(probe: Probe) -> None:
    """The OpenAPI document describes the API."""
    document = require_json(probe.without_key.request("GET", "/openapi.json"), "openapi", "paths")
    require(str(document["openapi"]).startswith("3.1"), f"OpenAPI {document['openapi']}")
    paths: Any = document["paths"]
    require("/v1/jobs" in paths, "/v1/jobs is not described")


def _cancelled(probe: Probe) -> Status:
    """Cancel a job at its first token; return its final status."""
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
