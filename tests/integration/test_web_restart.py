"""Stopping or killing the API process: jobs continue, streams end with a hint, and readers miss no event."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from scripts.client.api import Client
from shared.jobs.log import EventKind
from shared.settings import ROOT
from tests.plugins.web_stack import StubWorker, WebStack, running_web
from tests.support.waiting import eventually

DRAIN_S = 3


@pytest.fixture
def web() -> Iterator[WebStack]:
    """An API for each test, because tests stop it."""
    with running_web(DRAIN_S=str(DRAIN_S)) as stack:
        yield stack


@contextmanager
def worker(web: WebStack, **options: Any) -> Iterator[StubWorker]:
    started = StubWorker(web.redis_url, **options)
    started.announce()
    started.start()
    try:
        yield started
    finally:
        started.stop()


class EventSource:
    """Behaves like a browser's EventSource: reconnects after `retry` ms with the last id, until it gets status 204."""

    def __init__(self, web: WebStack, path: str) -> None:
        self._url, self._key = web.url + path, web.key
        self._last_id, self._retry_s = "", 3.0
        self.connections = 0
        self.events: list[tuple[str, str, str]] = []

    def read(self) -> None:
        while self._connect():
            time.sleep(self._retry_s)

    def _connect(self) -> bool:
        headers = {"X-API-Key": self._key, "Accept": "text/event-stream", "Cache-Control": "no-store"}
        if self._last_id:
            headers["Last-Event-ID"] = self._last_id
        try:
            with httpx2.stream("GET", self._url, headers=headers, timeout=30) as response:
                if response.status_code != 200:
                    return False
                self.connections += 1
                self._parse(response)
        except httpx2.HTTPError:
            pass
        return True

    def _parse(self, response: httpx2.Response) -> None:
        fields: dict[str, str] = {}
        rest = ""
        for part in response.iter_text():
            *lines, rest = (rest + part).split("\n")
            for line in lines:
                name, _, value = line.partition(":")
                fields[name] = value.removeprefix(" ")
                if line == "":
                    self._dispatch(fields)
                    fields = {}

    def _dispatch(self, fields: dict[str, str]) -> None:
        self._last_id = fields.get("id", self._last_id)
        if "retry" in fields:
            self._retry_s = int(fields["retry"]) / 1000
        if "data" in fields:
            self.events.append((self._last_id, fields.get("event", "message"), fields["data"]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_event_source_continues_at_the_next_process_without_a_gap(web: WebStack, number: signal.Signals) -> None:
    with worker(web, pause_s=0.02), ThreadPoolExecutor(1) as pool:
        job = web.submit(max_tokens=150)
        source = EventSource(web, job["urls"]["stream"])
        reading = pool.submit(source.read)
        eventually(lambda: len(source.events) > 10)
        web.restart(number)
        reading.result(60)
    ids = [int(last_id) for last_id, _, _ in source.events]
    assert ids == list(range(1, len(ids) + 1))
    kinds = [kind for _, kind, _ in source.events]
    assert (kinds.count("done"), kinds[-1], source.connections) == (1, "done", 2)
    text = "".join(json.loads(data)["text"] for _, kind, data in source.events if kind == "chunk")
    assert text == json.loads(source.events[-1][2])["output"]["text"]


def test_an_event_source_keeps_reconnecting_while_redis_is_unavailable(web: WebStack) -> None:
    with ThreadPoolExecutor(1) as pool:
        job = web.submit(max_tokens=5)
        source = EventSource(web, job["urls"]["stream"])
        reading = pool.submit(source.read)
        eventually(lambda: source.events)
        web.kill_redis()
        web.restart()
        eventually(lambda: source.connections >= 3 or reading.done())
        assert not reading.done(), "it got an error and stopped reconnecting"
        web.start_redis()
        with worker(web):
            reading.result(60)
    assert [last_id for last_id, _, _ in source.events] == [str(n + 1) for n in range(len(source.events))]
    assert source.events[-1][1] == "done"


def test_only_a_reconnecting_event_source_gets_an_empty_stream_without_redis(web: WebStack) -> None:
    job, reconnecting = web.submit(), {"Last-Event-ID": "1"}
    path, forged = job["urls"]["stream"], "/v1/jobs/x%0Adata:%20forged%0A%0A/stream"
    web.kill_redis()
    for target in (path, forged):
        response = web.http.get(target, headers=reconnecting)
        assert response.status_code == 200 and response.headers["Content-Type"].startswith("text/event-stream")
        assert {line.partition(":")[0] for line in response.text.split("\n")} == {"", "retry"}, "no event"
    for headers in ({}, {**reconnecting, "Accept": "application/x-ndjson"}):
        response = web.http.get(path, headers=headers)
        assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    web.start_redis()
    assert web.http.get("/v1/jobs/not-mine/stream", headers=reconnecting).status_code == 404


def test_the_python_client_continues_a_stream(web: WebStack) -> None:
    with worker(web, pause_s=0.02), ThreadPoolExecutor(1) as pool, Client(web.url, web.key) as client:
        job = web.submit(max_tokens=150)
        reading = pool.submit(lambda: [event.n for event in client.events(job["id"])])
        eventually(lambda: "w20" in web.job(job["id"])["output"]["text"])
        web.restart()
        numbers = reading.result(60)
        last = client.events(job["id"], after=numbers[-1] - 1)
        assert [event.kind for event in last] == [EventKind.DONE]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_batch_continues(web: WebStack, tmp_path: Path) -> None:
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {n}", "max_tokens": 40}) + "\n" for n in range(60)))
    command = [sys.executable, "-m", "scripts.client.batch", str(prompts), "-o", str(results)]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "ENV_FILE": os.devnull, "MLXQ_API_KEY": web.key}
    with (
        worker(web, slots=4, pause_s=0.01),
        subprocess.Popen([*command, "--url", web.url], env=env, stderr=subprocess.PIPE, text=True) as batch,
    ):
        eventually(lambda: results.exists() and results.read_text().count("\n") > 5)
        web.restart()
        assert batch.poll() is None
        _, stderr = batch.communicate(timeout=60)
    assert batch.returncode == 0, stderr
    assert sorted(json.loads(line)["line"] for line in results.read_text().splitlines()) == list(range(1, 61))
    jobs = web.http.get("/v1/jobs", params={"limit": 100}).json()["data"]
    assert [job["status"] for job in jobs] == ["succeeded"] * 60, "each prompt was submitted once"


def streamed(web: WebStack, method: str, path: str, accept: str, **request: Any) -> str:
    headers = {"X-API-Key": web.key, "Accept": accept}
    with httpx2.stream(method, web.url + path, headers=headers, timeout=30, **request) as response:
        assert response.status_code == 200
        return response.headers.get("Location", path.removesuffix("/stream")) + "\n" + "".join(response.iter_text())


def location_of(text: str) -> str:
    return text.split("\n", 1)[0]


@pytest.mark.parametrize("idle", [True, False])
def test_every_kind_of_response_ends_within_the_drain_time_and_jobs_continue(web: WebStack, idle: bool) -> None:
    endless: dict[str, Any] = {"prompt": "hi", "max_tokens": 3000}
    with worker(web, pause_s=0.01) as stub, ThreadPoolExecutor(8) as pool:
        job = web.submit(max_tokens=3000)
        path, sse, lines = job["urls"]["stream"], "text/event-stream", "application/x-ndjson"
        streams = [
            pool.submit(streamed, web, "GET", path, sse),
            pool.submit(streamed, web, "POST", "/inference", sse, json={**endless, "stream": True}),
            pool.submit(streamed, web, "GET", path, lines),
            pool.submit(streamed, web, "POST", "/inference", lines, json={**endless, "stream": True}),
        ]
        poll = pool.submit(web.job, job["id"], 25)
        key = {"X-API-Key": web.key}
        whole = pool.submit(httpx2.post, web.url + "/inference", json=endless, headers=key, timeout=30)
        eventually(lambda: running(web) == 4)
        if idle:
            stub.hold.set()
        stopped_at = time.monotonic()
        web.process.send_signal(signal.SIGTERM)
        bodies = [stream.result(20) for stream in streams]
        response = whole.result(20)
        assert poll.result(20)["status"] == "running"
        assert web.process.wait(20) == 0
        assert time.monotonic() - stopped_at < DRAIN_S + 3

        for text in bodies[:2]:
            location = text.split("\n", 1)[0]
            assert text.endswith(
                f"retry: 1000\n: the job continues; reconnect to {location}/stream with Last-Event-ID\n\n"
            )
        for text in bodies[2:]:
            hint = json.loads(text.splitlines()[-1])
            assert hint == {"event": "reconnect", "stream": f"{location_of(text)}/stream"}
        assert (response.status_code, response.json()["code"]) == (503, "restarting")
        stub.hold.clear()
        web.restart()
        for location in [response.headers["Location"], *map(location_of, bodies)]:
            assert web.http.get(location).json()["status"] == "running", "no job is cancelled"


def running(web: WebStack) -> int:
    return sum(each["status"] == "running" for each in web.http.get("/v1/jobs").json()["data"])


def test_a_response_that_is_ready_soon_is_sent_before_the_shutdown(
    web: WebStack, eventually: Callable[..., None]
) -> None:
    with worker(web) as stub, ThreadPoolExecutor(1) as pool:
        stub.hold.set()
        headers = {"X-API-Key": web.key}
        body = {"prompt": "hi", "max_tokens": 3}
        whole = pool.submit(httpx2.post, web.url + "/inference", json=body, headers=headers, timeout=30)
        eventually(lambda: running(web) == 1)
        web.process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses(web))
        stub.hold.clear()
        response = whole.result(20)
    assert (response.status_code, response.json()["usage"]["completion_tokens"]) == (200, 3)


def refuses(web: WebStack) -> bool:
    """Whether new connections are refused."""
    try:
        httpx2.get(web.url + "/livez", timeout=1)
    except httpx2.HTTPError:
        return True
    return False
