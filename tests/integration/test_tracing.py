"""Traces: one through HTTP, queue and engine, complete also if a worker dies, and harmless if the collector hangs."""

from __future__ import annotations

import json
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.client.api import Client
from shared.jobs.record import Status
from tests.plugins.stack import Stack, made_stack
from tests.support.collector import Collector, ReceivedSpan
from tests.support.waiting import eventually

STATE = "vendor=opaque,other=1"
SECRET = "zxqvsecretword"
STAGES = ["POST /v1/jobs", "queue", "text_completion fake", "prefill", "decode"]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def stack(collector: Collector) -> Iterator[Stack]:
    """The API and a worker with the fake model, which send traces."""
    variables = {
        "BACKEND": "fake",
        "LEASE_S": "1",
        "SLOTS": "2",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "x-team=blue",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_BSP_MAX_QUEUE_SIZE": "64",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "32",
    }
    for stack in made_stack(Path("fake"), variables):
        stack.start_web()
        stack.start_worker()
        yield stack


class Traced:
    """A job submitted by a client that has a trace of its own."""

    def __init__(self, client: Client, prompt: str, tokens: int = 5) -> None:
        self.trace_id, self.caller = secrets.token_hex(16), secrets.token_hex(8)
        response = client.request(
            "POST",
            "/v1/jobs",
            json={"prompt": prompt, "max_tokens": tokens},
            headers={"traceparent": f"00-{self.trace_id}-{self.caller}-01", "tracestate": STATE},
        )
        self.id = response.json()["id"]
        self.traceparent = response.headers["traceparent"]
        assert response.headers["tracestate"] == STATE
        self.request_id = response.headers["X-Request-ID"]

    def spans(self, collector: Collector, names: list[str]) -> list[ReceivedSpan]:
        """Wait until the collector has exactly these spans of the trace."""

        def complete() -> bool:
            return sorted(span.name for span in collector.trace(self.trace_id)) == sorted(names)

        eventually(complete, "the trace is complete")
        return collector.trace(self.trace_id)


def by_name(spans: list[ReceivedSpan], name: str) -> ReceivedSpan:
    [span] = [span for span in spans if span.name == name]
    return span


def test_one_trace_goes_through_http_queue_and_engine(stack: Stack, collector: Collector) -> None:
    with stack.client() as client:
        job = Traced(client, f"{SECRET} hello")
        client.job(job.id, wait_s=30)
    spans = job.spans(collector, STAGES)
    http, queue, attempt, prefill, decode = (by_name(spans, name) for name in STAGES)
    assert http.parent == job.caller and job.traceparent == f"00-{job.trace_id}-{http.id}-01"
    assert {queue.parent, attempt.parent} == {http.id} and {prefill.parent, decode.parent} == {attempt.id}
    assert (http.service, attempt.service) == ("mlxq-web", "mlxq-worker")
    assert queue.start <= queue.end == attempt.start == prefill.start <= prefill.end == decode.start <= decode.end
    assert http.attributes["http.route"] == "/v1/jobs" and http.attributes["http.response.status_code"] == 202
    assert http.attributes["mlxq.request_id"] == attempt.attributes["mlxq.request_id"] == job.request_id
    assert {span.state for span in spans} == {STATE}
    assert http.attributes["mlxq.queue_position"] == 1
    assert 0 < attempt.attributes["gen_ai.response.time_to_first_chunk"] < 30
    assert http.attributes["mlxq.key_id"] == stack.key.split("_")[1]
    assert attempt.attributes["gen_ai.request.model"] == "fake" and attempt.attributes["gen_ai.response.id"] == job.id
    assert attempt.attributes["gen_ai.usage.output_tokens"] == 5 and attempt.attributes["gen_ai.usage.input_tokens"] > 5
    assert attempt.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert attempt.events == ("first token",) and not attempt.links and not attempt.failed
    assert collector.headers["x-team"] == "blue"
    assert not any(SECRET.encode() in body for body in collector.bodies)


def test_a_job_that_ends_in_the_queue_has_a_complete_trace(stack: Stack, collector: Collector) -> None:
    with stack.client() as client:
        blocked = [client.submit({"prompt": "!every=0.2", "max_tokens": 4000}).id for _ in range(4)]
        job = Traced(client, "cancelled while it waits")
        client.cancel(job.id)
        queue = by_name(job.spans(collector, ["POST /v1/jobs", "queue"]), "queue")
        for each in blocked:
            client.cancel(each)
        eventually(lambda: all(client.job(each).status.terminal for each in blocked), "all are cancelled")
    assert queue.attributes["mlxq.job.status"] == "cancelled" and not queue.failed


def test_each_line_of_a_batch_has_a_trace_that_is_linked_to_the_request_that_created_it(
    stack: Stack, collector: Collector, tmp_path: Path
) -> None:
    background = stack.start_background()
    lines = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/completions", "body": {"model": "fake", "prompt": "hi"}}
        for n in range(2)
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with stack.client() as client, file.open("rb") as content:
        uploaded = client.request(
            "POST", "/v1/files", form={"purpose": "batch", "file": ("lines.jsonl", content.read())}
        ).json()
        response = client.request(
            "POST",
            "/v1/batches",
            json={"input_file_id": uploaded["id"], "endpoint": "/v1/completions", "completion_window": "1h"},
        )
    creation = response.headers["traceparent"].split("-")[2]

    def traces() -> list[list[ReceivedSpan]]:
        starts = [span for span in collector.spans if creation in span.links]
        return [collector.trace(span.trace_id) for span in starts]

    names = sorted(["batch line /v1/completions", *STAGES[1:]])
    eventually(
        lambda: [sorted(span.name for span in each) for each in traces()] == [names] * 2, "both lines are traced"
    )
    stack.stop(background)
    starts = [by_name(trace, "batch line /v1/completions") for trace in traces()]
    assert {span.service for span in starts} == {"mlxq-background"}
    assert sorted(span.attributes["mlxq.batch.line"] for span in starts) == [1, 2]
    assert {span.attributes["mlxq.batch.id"] for span in starts} == {response.json()["id"]}
    for trace, start in zip(traces(), starts, strict=True):
        assert by_name(trace, "queue").parent == by_name(trace, "text_completion fake").parent == start.id
        assert (
            by_name(trace, "text_completion fake").attributes["gen_ai.response.id"]
            == start.attributes["gen_ai.response.id"]
        )


def test_the_trace_of_a_recovered_job_has_both_attempts(stack: Stack, collector: Collector) -> None:
    [worker] = [each for each in stack.processes[1:] if each.poll() is None]
    with stack.client() as client:
        job = Traced(client, "!every=0.02 its worker is killed", tokens=60)
        eventually(lambda: client.job(job.id).text, "it runs")
        stack.stop(worker, signal.SIGKILL)
        stack.start_worker()
        client.job(job.id, wait_s=30)
    names = [*STAGES, "queue", "text_completion fake"]
    spans = job.spans(collector, names)
    lost, recovered = (span for span in spans if span.name == "text_completion fake")
    assert lost.failed and lost.attributes["error.type"] == "worker_lost" and not lost.links
    assert not recovered.failed and recovered.links == (lost.id,)
    assert [lost.attributes["mlxq.attempt"], recovered.attributes["mlxq.attempt"]] == [1, 2]
    first_wait, second_wait = (span for span in spans if span.name == "queue")
    assert first_wait.end <= lost.end <= second_wait.end == pytest.approx(recovered.start)
    with stack.client() as client:
        page = client.request("GET", "/metrics").text
    assert 'mlxq_attempts_ended_total{model="fake",outcome="worker_lost"} 1.0' in page


def test_jobs_run_while_the_collector_hangs(stack: Stack, collector: Collector) -> None:
    collector.hanging.set()
    with stack.client() as client:
        for number in range(100):  # more spans than the queue of spans holds
            Traced(client, f"without a collector {number}", tokens=1)
        last = Traced(client, "last", tokens=1)
        assert client.job(last.id, wait_s=30).status is Status.SUCCEEDED
