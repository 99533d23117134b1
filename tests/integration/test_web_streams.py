"""Streams over HTTP: whoever reads, from wherever, whenever, gets exactly the job's events."""

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
from tests.plugins.web_stack import PretendWorker, WebStack, running_web
from tests.support.waiting import eventually

Pretend = Callable[..., PretendWorker]
Event = tuple[int, str, dict[str, Any]]


def sse_events(lines: Iterator[str]) -> Iterator[Event]:
    """Read Server-Sent Events as the standard says, so that the test does not share the writer's mistakes."""
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
    ) as answer:  # fmt: skip
        assert answer.status_code == 200
        return list(sse_events(raw_lines(answer)))


def raw_lines(answer: httpx2.Response) -> Iterator[str]:
    """Lines that end with a newline only: what else splits lines elsewhere may stand inside of JSON."""
    rest = ""
    for part in answer.iter_text():
        *lines, rest = (rest + part).split("\n")
        yield from lines


def text_of(events: list[Event]) -> str:
    return "".join(data["text"] for _, kind, data in events if kind == "chunk")


def check_whole(events: list[Event], after: int = 0) -> None:
    assert [n for n, _, _ in events] == list(range(after + 1, after + 1 + len(events)))
    assert [kind for _, kind, _ in events].count("done") == 1 and events[-1][1] == "done"


def test_streams_opened_at_random_moments_each_get_exactly_the_jobs_text(web: WebStack, pretend: Pretend) -> None:
    pretend(pause_s=0.01)
    chance = random.Random(7)
    jobs = [web.submit(max_tokens=120)["id"] for _ in range(32)]
    readers = [(job_id, chance.random() * 2) for job_id in jobs * 2]

    def read(reader: tuple[str, float]) -> tuple[str, list[Event]]:
        threading.Event().wait(reader[1])
        return reader[0], read_stream(web, reader[0])

    with ThreadPoolExecutor(64) as pool:
        results = list(pool.map(read, readers))
    for job_id, events in results:
        check_whole(events)
        assert text_of(events) == events[-1][2]["output"]["text"] == web.job(job_id)["output"]["text"]


def test_a_stream_can_be_read_from_every_cursor(web: WebStack, pretend: Pretend) -> None:
    pretend()
    job_id = web.submit(max_tokens=20)["id"]
    assert web.job(job_id, wait=20)["status"] == "succeeded"
    whole = read_stream(web, job_id)
    check_whole(whole)
    for cursor in range(len(whole)):
        by_parameter = read_stream(web, job_id, params={"starting_after": cursor})
        by_header = read_stream(web, job_id, headers={"Last-Event-ID": str(cursor)}, params={"starting_after": 3})
        assert by_parameter == by_header == whole[cursor:]


def test_past_the_end_of_an_ended_job_nothing_comes_and_nobody_reconnects(web: WebStack, pretend: Pretend) -> None:
    pretend()
    job = web.submit(max_tokens=1)
    web.job(job["id"], wait=20)
    for cursor in (4, 1000):
        answer = web.http.get(job["urls"]["stream"], params={"starting_after": cursor})
        assert (answer.status_code, answer.content) == (204, b"")


def test_a_cursor_past_the_log_of_a_live_job_gets_its_end(web: WebStack, pretend: Pretend) -> None:
    job = web.submit(max_tokens=3)
    with web.http.stream("GET", job["urls"]["stream"], params={"starting_after": 1000}) as answer:
        pretend()
        assert [kind for _, kind, _ in sse_events(raw_lines(answer))] == ["done"]


def test_ndjson_carries_the_same(web: WebStack, pretend: Pretend) -> None:
    pretend()
    job = web.submit(max_tokens=9)
    web.job(job["id"], wait=20)
    answer = web.http.get(job["urls"]["stream"], headers={"Accept": "application/x-ndjson"})
    assert answer.headers["Content-Type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in answer.text.split("\n") if line]
    assert [(line["id"], line["event"], line["data"]) for line in lines] == read_stream(web, job["id"])


def test_headers_keep_proxies_from_holding_a_stream_back(web: WebStack, pretend: Pretend) -> None:
    pretend()
    job = web.submit(max_tokens=1)
    answer = web.http.get(job["urls"]["stream"], headers={"X-Request-ID": "streamed"})
    assert answer.headers["X-Accel-Buffering"] == "no" and answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Request-ID"] == "streamed"
    assert answer.text.startswith("retry: 1000\n")


def test_inference_streams_the_same_events(web: WebStack, pretend: Pretend) -> None:
    pretend()
    with web.http.stream("POST", "/inference", json={"prompt": "hi", "max_tokens": 5, "stream": True}) as answer:
        events = list(sse_events(raw_lines(answer)))
    check_whole(events)
    assert text_of(events) == events[-1][2]["output"]["text"] == "w0 é🙂\nw1 w2 w3 w4 "


def test_a_stream_goes_on_after_its_live_connection_was_cut(web: WebStack, pretend: Pretend) -> None:
    pretend(pause_s=0.02)
    job_id = web.submit(max_tokens=100)["id"]
    client = web.client()
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(read_stream, web, job_id) for _ in range(8)]
        for _ in range(5):
            threading.Event().wait(0.3)
            client.client_kill_filter(_type="pubsub")
        for stream in streams:
            events = stream.result(60)
            check_whole(events)
            assert text_of(events) == events[-1][2]["output"]["text"]
    client.close()


def gone(web: WebStack, job: dict[str, Any], cursor: int) -> str:
    """The code with which reading from a cursor is refused."""
    answer = web.http.get(job["urls"]["stream"], params={"starting_after": cursor})
    assert answer.status_code == 410
    assert answer.headers["Content-Type"] == "application/problem+json"
    return str(answer.json()["code"])


def test_a_log_that_has_expired_is_410_and_the_job_keeps_its_text() -> None:
    with running_web(RETENTION_S="600", LOG_RETENTION_S="2") as web:
        worker = PretendWorker(web.redis_url)
        worker.start()
        job = web.submit(max_tokens=5)
        assert web.job(job["id"], wait=20)["status"] == "succeeded"
        events = read_stream(web, job["id"])
        check_whole(events)
        client = web.client()
        eventually(lambda: not client.exists(f"mlxq:log:{job['id']}"), "the log expires")
        assert [gone(web, job, cursor) for cursor in (0, 3, len(events) - 1)] == ["log_expired"] * 3
        assert web.http.get(job["urls"]["stream"], params={"starting_after": len(events)}).status_code == 204
        assert web.job(job["id"])["output"]["text"] == text_of(events)
        assert 500 < client.ttl(f"mlxq:job:{job['id']}") <= 600
        with Client(web.url, web.key) as reader:
            (end,) = reader.events(job["id"], after=3)
        assert (end.n, end.kind) == (0, EventKind.DONE)
        assert json.loads(end.data)["output"]["text"] == text_of(events)
        client.close()
        worker.stop()


def test_a_trimmed_log_is_410_before_what_is_left_and_readable_from_there(web: WebStack, pretend: Pretend) -> None:
    pretend()
    job = web.submit(max_tokens=10)
    web.job(job["id"], wait=20)
    whole = read_stream(web, job["id"])
    client = web.client()
    client.xtrim(f"mlxq:log:{job['id']}", minid="6-0", approximate=False)
    client.xdel(f"mlxq:log:{job['id']}", "9-0")
    client.close()
    assert {gone(web, job, cursor) for cursor in (0, 1, 4, 5, 8)} == {"log_trimmed"}
    for cursor in range(9, len(whole)):
        assert read_stream(web, job["id"], params={"starting_after": cursor}) == whole[cursor:]
    assert web.job(job["id"])["output"]["text"] == text_of(whole)


@pytest.mark.parametrize(
    ("accept", "farewell"), [("text/event-stream", "reconnect to"), ("application/x-ndjson", '"reconnect"')]
)
def test_a_log_that_goes_in_mid_stream_ends_the_stream_and_is_then_410(
    web: WebStack, pretend: Pretend, accept: str, farewell: str
) -> None:
    worker = pretend()
    worker.hold.set()
    job = web.submit(max_tokens=5)
    eventually(lambda: web.job(job["id"])["status"] == "running", "it starts")
    client = web.client()
    got: list[str] = []
    with web.http.stream("GET", job["urls"]["stream"], headers={"Accept": accept}) as answer:
        for line in raw_lines(answer):
            got.append(line)
            if "started" in line:
                client.delete(f"mlxq:log:{job['id']}")
                client.client_kill_filter(_type="pubsub")
    client.close()
    assert any(farewell in line for line in got[-3:])
    assert not any("done" in line for line in got)
    assert gone(web, job, 2) == "log_expired"
    assert web.job(job["id"])["output"]["text"] == "", "the text so far is kept apart from the log"
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
    assert gone(web, job, 0) == "log_trimmed"


def test_idle_streams_get_heartbeats_and_a_hint_when_the_server_stops() -> None:
    with running_web(HEARTBEAT_S="0.2") as web:
        job = web.submit()
        got: list[str] = []
        with web.http.stream("GET", job["urls"]["stream"]) as answer:
            for line in raw_lines(answer):
                got.append(line)
                if got.count(": heartbeat") == 3:
                    stopped_at = time.monotonic()
                    web.process.send_signal(signal.SIGTERM)
        assert time.monotonic() - stopped_at < 2.5
        assert "retry: 1000" in got[-4:] and any("reconnect" in line for line in got[-4:])
        assert web.process.wait(20) == 0
