"""Streams over HTTP: every reader gets exactly the job's events, from any cursor at any time."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from scripts.client.api import Client
from shared.jobs.log import EventKind
from tests.plugins.web_stack import StubWorker, WebStack, running_web
from tests.support.waiting import eventually

StartWorker = Callable[..., StubWorker]
Event = tuple[int, str, dict[str, Any]]


def sse_events(lines: Iterator[str]) -> Iterator[Event]:
    """Parse Server-Sent Events independently of the code under test."""
    fields: dict[str, str] = {}
    for line in lines:
        if line == "":
            if "data" in fields:
                yield int(fields["id"]), fields["event"], json.loads(fields["data"])
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


def read_stream(web: WebStack, job_id: str, **request: Any) -> list[Event]:
    with httpx2.stream(
        "GET", f"{web.url}/v1/jobs/{job_id}/stream", timeout=60,
        **{"headers": {"X-API-Key": web.key} | request.pop("headers", {}), **request},
    ) as response:  # fmt: skip
        assert response.status_code == 200
        return list(sse_events(raw_lines(response)))


def raw_lines(response: httpx2.Response) -> Iterator[str]:
    """Split at newlines only: other line separators can occur inside JSON."""
    rest = ""
    for part in response.iter_text():
        *lines, rest = (rest + part).split("\n")
        yield from lines


def text_of(events: list[Event]) -> str:
    return "".join(data["text"] for _, kind, data in events if kind == "chunk")


def check_complete(events: list[Event], after: int = 0) -> None:
    assert [n for n, _, _ in events] == list(range(after + 1, after + 1 + len(events)))
    assert [kind for _, kind, _ in events].count("done") == 1 and events[-1][1] == "done"


def test_streams_opened_at_random_times_get_the_complete_text(web: WebStack, start_worker: StartWorker) -> None:
    start_worker(pause_s=0.01)
    rng = random.Random(7)
    jobs = [web.submit(max_tokens=120)["id"] for _ in range(32)]
    readers = [(job_id, rng.random() * 2) for job_id in jobs * 2]

    def read(reader: tuple[str, float]) -> tuple[str, list[Event]]:
        threading.Event().wait(reader[1])
        return reader[0], read_stream(web, reader[0])

    with ThreadPoolExecutor(64) as pool:
        results = list(pool.map(read, readers))
    for job_id, events in results:
        check_complete(events)
        assert text_of(events) == events[-1][2]["output"]["text"] == web.job(job_id)["output"]["text"]


def test_a_stream_can_be_read_from_every_cursor(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    job_id = web.submit(max_tokens=20)["id"]
    assert web.job(job_id, wait=20)["status"] == "succeeded"
    whole = read_stream(web, job_id)
    check_complete(whole)
    for cursor in range(len(whole)):
        by_parameter = read_stream(web, job_id, params={"starting_after": cursor})
        by_header = read_stream(web, job_id, headers={"Last-Event-ID": str(cursor)}, params={"starting_after": 3})
        assert by_parameter == by_header == whole[cursor:]


def test_a_cursor_past_the_end_of_an_ended_job_gets_204(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    job = web.submit(max_tokens=1)
    web.job(job["id"], wait=20)
    for cursor in (4, 1000):
        response = web.http.get(job["urls"]["stream"], params={"starting_after": cursor})
        assert (response.status_code, response.content) == (204, b"")


def test_a_cursor_past_the_log_of_a_running_job_gets_its_end(web: WebStack, start_worker: StartWorker) -> None:
    job = web.submit(max_tokens=3)
    with web.http.stream("GET", job["urls"]["stream"], params={"starting_after": 1000}) as response:
        start_worker()
        assert [kind for _, kind, _ in sse_events(raw_lines(response))] == ["done"]


def test_ndjson_has_the_same_events(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    job = web.submit(max_tokens=9)
    web.job(job["id"], wait=20)
    response = web.http.get(job["urls"]["stream"], headers={"Accept": "application/x-ndjson"})
    assert response.headers["Content-Type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in response.text.split("\n") if line]
    assert [(line["id"], line["event"], line["data"]) for line in lines] == read_stream(web, job["id"])


def test_headers_prevent_buffering_by_proxies(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    job = web.submit(max_tokens=1)
    response = web.http.get(job["urls"]["stream"], headers={"X-Request-ID": "streamed"})
    assert (
        response.headers["X-Accel-Buffering"] == "no" and response.headers["Cache-Control"] == "no-store, no-transform"
    )
    assert response.headers["X-Request-ID"] == "streamed"
    assert response.text.startswith("retry: 1000\n")


def test_inference_streams_the_same_events(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    with web.http.stream("POST", "/inference", json={"prompt": "hi", "max_tokens": 5, "stream": True}) as response:
        events = list(sse_events(raw_lines(response)))
    check_complete(events)
    assert text_of(events) == events[-1][2]["output"]["text"] == "w0 é🙂\nw1 w2 w3 w4 "


def test_streams_are_complete_although_the_pubsub_connection_is_lost(web: WebStack, start_worker: StartWorker) -> None:
    start_worker(pause_s=0.02)
    job_id = web.submit(max_tokens=100)["id"]
    client = web.client()
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(read_stream, web, job_id) for _ in range(8)]
        for _ in range(5):
            eventually(lambda: client.client_list(_type="pubsub"), "the hub has connected")
            client.client_kill_filter(_type="pubsub")
        for stream in streams:
            events = stream.result(60)
            check_complete(events)
            assert text_of(events) == events[-1][2]["output"]["text"]
    client.close()


def refusal_code(web: WebStack, job: dict[str, Any], cursor: int) -> str:
    """The error code of a stream from a cursor whose events are gone."""
    response = web.http.get(job["urls"]["stream"], params={"starting_after": cursor})
    assert response.status_code == 410
    assert response.headers["Content-Type"] == "application/problem+json"
    return str(response.json()["code"])


def test_an_expired_log_is_410_and_the_job_keeps_its_text() -> None:
    with running_web(RETENTION_S="600", LOG_RETENTION_S="2") as web:
        worker = StubWorker(web.redis_url)
        worker.start()
        job = web.submit(max_tokens=5)
        assert web.job(job["id"], wait=20)["status"] == "succeeded"
        events = read_stream(web, job["id"])
        check_complete(events)
        client = web.client()
        eventually(lambda: not client.exists(f"mlxq:log:{job['id']}"), "the log expires")
        assert [refusal_code(web, job, cursor) for cursor in (0, 3, len(events) - 1)] == ["log_expired"] * 3
        assert web.http.get(job["urls"]["stream"], params={"starting_after": len(events)}).status_code == 204
        assert web.job(job["id"])["output"]["text"] == text_of(events)
        assert 500 < client.ttl(f"mlxq:job:{job['id']}") <= 600
        with Client(web.url, web.key) as reader:
            (end,) = reader.events(job["id"], after=3)
        assert (end.n, end.kind) == (0, EventKind.DONE)
        assert json.loads(end.data)["output"]["text"] == text_of(events)
        client.close()
        worker.stop()


def test_a_trimmed_log_is_410_before_the_remaining_events_and_readable_after(
    web: WebStack, start_worker: StartWorker
) -> None:
    start_worker()
    job = web.submit(max_tokens=10)
    web.job(job["id"], wait=20)
    whole = read_stream(web, job["id"])
    client = web.client()
    client.xtrim(f"mlxq:log:{job['id']}", minid="6-0", approximate=False)
    client.xdel(f"mlxq:log:{job['id']}", "9-0")
    client.close()
    assert {refusal_code(web, job, cursor) for cursor in (0, 1, 4, 5, 8)} == {"log_trimmed"}
    for cursor in range(9, len(whole)):
        assert read_stream(web, job["id"], params={"starting_after": cursor}) == whole[cursor:]
    assert web.job(job["id"])["output"]["text"] == text_of(whole)


@pytest.mark.parametrize(
    ("accept", "hint"), [("text/event-stream", "reconnect to"), ("application/x-ndjson", '"reconnect"')]
)
def test_a_log_that_expires_during_a_stream_ends_it_and_is_then_410(
    web: WebStack, start_worker: StartWorker, accept: str, hint: str
) -> None:
    worker = start_worker()
    worker.hold.set()
    job = web.submit(max_tokens=5)
    eventually(lambda: web.job(job["id"])["status"] == "running", "it starts")
    client = web.client()
    lines: list[str] = []
    with web.http.stream("GET", job["urls"]["stream"], headers={"Accept": accept}) as response:
        for line in raw_lines(response):
            lines.append(line)
            if "started" in line:
                client.delete(f"mlxq:log:{job['id']}")
                client.client_kill_filter(_type="pubsub")
    client.close()
    assert any(hint in line for line in lines[-3:])
    assert not any("done" in line for line in lines)
    assert refusal_code(web, job, 2) == "log_expired"
    assert web.job(job["id"])["output"]["text"] == "", "the text is stored separately from the log"
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(web.job, job["id"], 20)
        with Client(web.url, web.key) as reader:
            reading = pool.submit(lambda: list(reader.events(job["id"], after=1)))
            assert not waiting.done()
            worker.hold.clear()
            ended = waiting.result(20)
            (end,) = reading.result(20)
    assert (ended["status"], ended["output"]["text"]) == ("succeeded", "w0 é🙂\nw1 w2 w3 w4 ")
    assert json.loads(end.data) == ended
    assert refusal_code(web, job, 0) == "log_trimmed"


def test_idle_streams_get_heartbeats_and_a_reconnect_hint_at_shutdown() -> None:
    with running_web(HEARTBEAT_S="0.2") as web:
        job = web.submit()
        lines: list[str] = []
        with web.http.stream("GET", job["urls"]["stream"]) as response:
            for line in raw_lines(response):
                lines.append(line)
                if lines.count(": heartbeat") == 3:
                    stopped_at = time.monotonic()
                    web.process.send_signal(signal.SIGTERM)
        assert time.monotonic() - stopped_at < 2.5
        assert "retry: 1000" in lines[-4:] and any("reconnect" in line for line in lines[-4:])
        assert web.process.wait(20) == 0
