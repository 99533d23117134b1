"""A client that disconnects from /inference cancels its job; one that disconnects from a job's stream does not."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.plugins.web_stack import StubWorker, WebStack

StartWorker = Callable[..., StubWorker]
Eventually = Callable[..., None]


def send(web: WebStack, method: str, path: str, body: object = None, key: str = "") -> socket.socket:
    """Send a request on a socket that the test can close."""
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
def test_a_disconnect_from_inference_cancels_the_job(
    web: WebStack, start_worker: StartWorker, eventually: Eventually, stream: bool
) -> None:
    worker = start_worker()
    worker.hold.set()
    marker = f"disconnected-{stream}"
    connection = send(web, "POST", "/inference", {"prompt": "hi", "stream": stream, "metadata": {"marker": marker}})
    eventually(lambda: newest(web).get("metadata") == {"marker": marker} and newest(web)["status"] == "running")
    job_id = str(newest(web)["id"])
    connection.close()
    assert web.job(job_id, wait=10)["status"] == "cancelled"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_with_an_idempotency_key_is_not_cancelled_by_a_disconnect(
    web: WebStack, start_worker: StartWorker, eventually: Eventually, stream: bool
) -> None:
    worker = start_worker()
    worker.hold.set()
    key = f"repeated-{stream}"
    body = {"prompt": "hi", "stream": stream, "max_tokens": 2, "metadata": {"marker": key}}
    connection = send(web, "POST", "/inference", body, key)
    eventually(lambda: newest(web).get("metadata") == {"marker": key} and newest(web)["status"] == "running")
    job_id = str(newest(web)["id"])
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}

    def repeat() -> httpx2.Response:
        return web.http.post("/inference", content=json.dumps(body), headers=headers)

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(repeat)
        connection.close()
        other = send(web, "POST", "/inference", {"prompt": "other", "metadata": {"marker": f"after {key}"}})
        eventually(lambda: newest(web).get("metadata") == {"marker": f"after {key}"})
        next_id = str(newest(web)["id"])
        other.close()
        # The API notices disconnects in order, so by now it has noticed the first one.
        assert web.job(next_id, wait=10)["status"] == "cancelled"
        worker.hold.clear()
        assert second.result(30).status_code == 200
    assert web.job(job_id)["status"] == "succeeded"
    third = repeat()
    assert (third.status_code, third.headers["Location"]) == (200, f"/v1/jobs/{job_id}")


def test_a_disconnect_from_a_stream_does_not_cancel_the_job(web: WebStack, start_worker: StartWorker) -> None:
    worker = start_worker()
    worker.hold.set()
    job = web.submit(max_tokens=5)
    connection = send(web, "GET", job["urls"]["stream"])
    received = b""
    while b"event: queued" not in received:
        received += connection.recv(4096)
    connection.close()
    worker.hold.clear()
    assert web.job(job["id"], wait=20)["status"] == "succeeded"


def test_a_connection_can_be_reused_after_a_response(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    for _ in range(3):  # on one connection: the watch for a disconnect must end with each response
        assert web.http.post("/inference", json={"prompt": "hi", "max_tokens": 2}).status_code == 200
