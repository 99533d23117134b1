"""A client that goes away from /inference frees its slot; one that leaves a job's stream does not end the job."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.plugins.web_stack import PretendWorker, WebStack

Pretend = Callable[..., PretendWorker]
Eventually = Callable[..., None]


def send(web: WebStack, method: str, path: str, body: object = None, key: str = "") -> socket.socket:
    """A request on a bare socket, to be closed at will."""
    address = urlsplit(web.url)
    connection = socket.create_connection((address.hostname, address.port))
    content = json.dumps(body).encode() if body else b""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {web.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        + (f"Idempotency-Key: {key}\r\n\r\n" if key else "\r\n")
    )
    connection.sendall(head.encode() + content)
    return connection


def newest(web: WebStack) -> dict[str, object]:
    jobs = web.http.get("/v1/jobs", params={"limit": 1}).json()["data"]
    return jobs[0] if jobs else {}


@pytest.mark.parametrize("stream", [False, True])
def test_a_gone_client_cancels_its_inference(
    web: WebStack, pretend: Pretend, eventually: Eventually, stream: bool
) -> None:
    worker = pretend()
    worker.hold.set()
    marker = f"gone-{stream}"
    connection = send(web, "POST", "/inference", {"prompt": "hi", "stream": stream, "metadata": {"marker": marker}})
    eventually(lambda: newest(web).get("metadata") == {"marker": marker} and newest(web)["status"] == "running")
    job_id = str(newest(web)["id"])
    left_at = time.monotonic()
    connection.close()
    assert web.job(job_id, wait=10)["status"] == "cancelled"
    assert time.monotonic() - left_at < 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_may_come_again_outlasts_its_connection(
    web: WebStack, pretend: Pretend, eventually: Eventually, stream: bool
) -> None:
    worker = pretend()
    worker.hold.set()
    key = f"again-{stream}"
    body = {"prompt": "hi", "stream": stream, "max_tokens": 2, "metadata": {"marker": key}}
    connection = send(web, "POST", "/inference", body, key)
    eventually(lambda: newest(web).get("metadata") == {"marker": key} and newest(web)["status"] == "running")
    job_id = str(newest(web)["id"])
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}

    def again() -> httpx2.Response:
        return web.http.post("/inference", content=json.dumps(body), headers=headers)

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(again)
        connection.close()
        gone = send(web, "POST", "/inference", {"prompt": "gone", "metadata": {"marker": f"after {key}"}})
        eventually(lambda: newest(web).get("metadata") == {"marker": f"after {key}"})
        next_id = str(newest(web)["id"])
        gone.close()
        # The API notices clients in the order they leave: by now it has noticed the first.
        assert web.job(next_id, wait=10)["status"] == "cancelled"
        worker.hold.clear()
        assert second.result(30).status_code == 200
    assert web.job(job_id)["status"] == "succeeded"
    third = again()
    assert (third.status_code, third.headers["Location"]) == (200, f"/v1/jobs/{job_id}")


def test_a_gone_reader_does_not_end_the_job(web: WebStack, pretend: Pretend) -> None:
    worker = pretend()
    worker.hold.set()
    job = web.submit(max_tokens=5)
    connection = send(web, "GET", job["urls"]["stream"])
    seen = b""
    while b"event: queued" not in seen:
        seen += connection.recv(4096)
    connection.close()
    worker.hold.clear()
    assert web.job(job["id"], wait=20)["status"] == "succeeded"


def test_a_connection_serves_on_after_an_answer(web: WebStack, pretend: Pretend) -> None:
    pretend()
    for _ in range(3):  # one kept connection: the watch on it must end with each answer
        assert web.http.post("/inference", json={"prompt": "hi", "max_tokens": 2}).status_code == 200
