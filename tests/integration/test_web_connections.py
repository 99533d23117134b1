"""Connections are bounded, and none is held longer than needed."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.plugins.web_stack import StubWorker, WebStack, running_web
from tests.support.raw_http import Raw
from tests.support.waiting import eventually

MAX = 40


@pytest.fixture(scope="module")
def web() -> Iterator[WebStack]:
    with running_web(MAX_CONNECTIONS_PER_ADDRESS=str(MAX), MAX_STREAMS_PER_KEY="3") as stack:
        yield stack


def server(web: WebStack) -> psutil.Process:
    """The process that serves requests."""
    (child,) = psutil.Process(web.process.pid).children()
    return child


def connections(web: WebStack) -> int:
    return sum(each.status == psutil.CONN_ESTABLISHED for each in server(web).net_connections("tcp"))


def get(web: WebStack, path: str) -> Raw:
    return Raw(web.url).send(f"GET {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {web.key}\r\n\r\n".encode())


def test_more_connections_than_an_address_may_have_are_refused(web: WebStack) -> None:
    with ExitStack() as stack:
        for _ in range(MAX):
            stack.enter_context(Raw(web.url))
        eventually(lambda: connections(web) >= MAX)
        status, headers, body = Raw(web.url).exchange(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (status, json.loads(body)["code"]) == (429, "too_many_connections")
        assert int(headers["retry-after"]) >= 1
    eventually(lambda: web.http.get("/livez").status_code == 200)


@pytest.mark.parametrize("path", ["/v1/jobs/{id}?wait=60", "/v1/jobs/{id}/stream"])
def test_an_abandoned_wait_or_stream_releases_its_connection(web: WebStack, path: str) -> None:
    job = web.submit()
    before = connections(web)
    with get(web, path.format(id=job["id"])):
        eventually(lambda: connections(web) == before + 1)
    eventually(lambda: connections(web) == before, within_s=10)


def test_streams_and_waits_of_a_key_are_bounded(web: WebStack) -> None:
    job = web.submit()
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(get(web, job["urls"]["stream"])).receive_until(b"event: queued")
        refused = web.http.get(job["urls"]["stream"])
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
        assert int(refused.headers["Retry-After"]) >= 1
        assert web.http.get(job["urls"]["self"], params={"wait": 60}).status_code == 429
        assert web.http.post("/inference", json={"prompt": "hi"}).status_code == 429
        preferring = web.http.post("/v1/jobs", json={"prompt": "hi"}, headers={"Prefer": "wait=60"})
        assert preferring.status_code == 202, "a preference is not a reason to refuse a job"
    worker = StubWorker(web.redis_url)
    worker.start()
    eventually(lambda: web.http.get(job["urls"]["self"], params={"wait": 60}).json().get("status") == "succeeded")
    worker.stop()


def test_the_streams_and_waits_of_a_revoked_key_end(web: WebStack) -> None:
    key = web.keys.create("revoked", ["infer"])
    headers = f"Host: x\r\nX-API-Key: {key}\r\n\r\n".encode()
    job = web.http.post("/v1/jobs", json={"prompt": "hi"}, headers={"X-API-Key": key}).json()
    with Raw(web.url) as stream, Raw(web.url) as wait:
        stream.send(f"GET {job['urls']['stream']} HTTP/1.1\r\n".encode() + headers).receive_until(b"event: queued")
        wait.send(f"GET {job['urls']['self']}?wait=60 HTTP/1.1\r\n".encode() + headers)
        eventually(lambda: connections(web) >= 2)
        web.keys.revoke("revoked")
        stream.receive_until_end()
        wait.receive_until_end()


def test_connections_without_a_descriptor_are_refused_and_a_revoked_key_stays_revoked(web: WebStack) -> None:
    process = server(web)
    soft, hard = process.rlimit(resource.RLIMIT_NOFILE)
    key = web.keys.create("short", ["infer"])
    assert web.http.get("/v1/jobs", headers={"X-API-Key": key}).status_code == 200
    web.keys.revoke("short")
    with ExitStack() as stack:
        used = {int(each.name) for each in Path(f"/proc/{process.pid}/fd").iterdir()}
        process.rlimit(resource.RLIMIT_NOFILE, (max(used) + 1, hard))
        stack.callback(process.rlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(max(used) + 1 - len(used)):
            stack.enter_context(Raw(web.url))
        eventually(lambda: process.num_fds() == max(used) + 1)
        status, _, body = Raw(web.url).exchange(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (status, json.loads(body)["code"]) == (503, "too_many_connections")
        web.http.get("/v1/jobs", headers={"X-API-Key": key})  # reading the keys fails, whatever the answer
    assert web.http.get("/v1/jobs", headers={"X-API-Key": key}).status_code == 401
    assert "greenlet_failed" not in web.log.read_text()


def test_a_graceful_stop_does_not_wait_for_idle_connections() -> None:
    with running_web(DRAIN_S="3600") as web, Raw(web.url) as idle, Raw(web.url) as silent:
        assert idle.exchange(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", close=False)[0] == 200
        web.process.send_signal(signal.SIGTERM)
        web.process.wait(30)
        idle.receive_until_end()
        silent.receive_until_end()
        assert '"level": "ERROR"' not in web.log.read_text()
