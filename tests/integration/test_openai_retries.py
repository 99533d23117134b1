"""OpenAI's client repeats requests by itself; this never creates a second job. Without its client, a job ends."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import psutil
import pytest

from shared.jobs.readers import GRACE_S
from shared.redis import keys
from tests.plugins.web_stack import MODEL, StubWorker, WebStack, running_web

StartWorker = Callable[..., StubWorker]
Eventually = Callable[..., None]
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(web: WebStack) -> Iterator[openai.OpenAI]:
    with sdk(web) as client:
        yield client


def sdk(web: WebStack, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{web.url}/v1", api_key=web.key, **{"max_retries": 5, **options})


def jobs(web: WebStack, marker: str) -> list[dict[str, Any]]:
    data = web.http.get("/v1/jobs", params={"limit": 100}).json()["data"]
    return [job for job in data if job["metadata"].get("marker") == marker]


def ask(client: openai.OpenAI, marker: str, **fields: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=MESSAGES, metadata={"marker": marker}, **{"max_tokens": 5, **fields}
    )


def test_a_request_that_times_out_is_continued_by_its_retry(
    web: WebStack, client: openai.OpenAI, start_worker: StartWorker, eventually: Eventually
) -> None:
    worker = start_worker()
    worker.hold.set()
    with ThreadPoolExecutor(1) as pool:
        answer: Future[Any] = pool.submit(ask, client.with_options(timeout=1.0), "timeout", n=2)
        # The record is shown as read by the second try: the first one is over.
        eventually(lambda: web.log.read_text().count('"status": 499') >= 1, within_s=20)
        worker.hold.clear()
        assert [choice.message.content for choice in answer.result(30).choices] == ["w0 é🙂\nw1 w2 w3 w4 "] * 2
    assert [job["status"] for job in jobs(web, "timeout")] == ["succeeded"] * 2


def test_equal_requests_are_different_jobs(web: WebStack, client: openai.OpenAI, start_worker: StartWorker) -> None:
    start_worker()
    ids = {ask(client, "equal").id for _ in range(3)}
    assert len(ids) == len(jobs(web, "equal")) == 3


def test_a_retry_does_not_join_a_request_that_has_its_client(
    web: WebStack, client: openai.OpenAI, start_worker: StartWorker, eventually: Eventually
) -> None:
    """The first try of such a request was refused, for example because the queue was full."""
    worker = start_worker()
    worker.hold.set()
    retrying = client.with_options(default_headers={"X-Stainless-Retry-Count": "1"})
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, client, "refused")]
        eventually(lambda: running(web, "refused") == 1)
        answers.append(pool.submit(ask, retrying, "refused"))
        eventually(lambda: running(web, "refused") == 2)
        worker.hold.clear()
        assert len({answer.result(30).id for answer in answers}) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_come_back_frees_all_its_rows(
    web: WebStack, start_worker: StartWorker, eventually: Eventually, stream: bool
) -> None:
    worker = start_worker()
    worker.hold.set()
    marker = f"gone-{stream}"
    body = {"model": MODEL, "messages": MESSAGES, "n": 3, "stream": stream, "metadata": {"marker": marker}}
    for headers, kept in (("", False), ("X-Stainless-Retry-Count: 0\r\n", True)):
        before = len(jobs(web, marker))
        connection = send(web, body, headers)
        eventually(lambda: running(web, marker) == 3)
        assert len(jobs(web, marker)) == before + 3
        connection.close()
        eventually(lambda: running(web, marker) == 0, within_s=GRACE_S + 10)
        if kept:
            assert min(job["finished_at"] - job["started_at"] for job in jobs(web, marker)[:3]) >= GRACE_S
    assert {job["status"] for job in jobs(web, marker)} == {"cancelled"}


def test_a_stream_that_the_client_closes_frees_its_row_at_once(
    web: WebStack, client: openai.OpenAI, start_worker: StartWorker, eventually: Eventually
) -> None:
    worker = start_worker(pause_s=0.05)
    with ask(client, "closed", stream=True, max_tokens=1000) as stream:
        for number, _ in enumerate(stream):
            if number == 2:
                break
    eventually(lambda: [job["status"] for job in jobs(web, "closed")] == ["cancelled"], within_s=GRACE_S)
    worker.hold.set()


def test_an_idempotency_key_keeps_the_job(
    web: WebStack, client: openai.OpenAI, start_worker: StartWorker, eventually: Eventually
) -> None:
    worker = start_worker()
    worker.hold.set()
    headers = {"Idempotency-Key": "once"}
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=1.0, max_retries=0), "key", extra_headers=headers)
    worker.hold.clear()
    first = ask(client, "key", extra_headers=headers)
    assert ask(client, "key", extra_headers=headers).id == first.id
    assert len(jobs(web, "key")) == 1
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "key", extra_headers=headers, max_tokens=6)
    assert caught.value.code == "idempotency_key_reused"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_api_process_that_ends_loses_no_request(number: signal.Signals, eventually: Eventually) -> None:
    with running_web(DRAIN_S="1") as web:
        worker = StubWorker(web.redis_url)
        worker.announce()
        worker.start()
        worker.hold.set()
        try:
            with ThreadPoolExecutor(1) as pool, sdk(web, timeout=60.0) as client:
                answer: Future[Any] = pool.submit(ask, client, "restart")
                eventually(lambda: running(web, "restart") == 1)
                (job,) = jobs(web, "restart")
                before = reader(web, job["id"])
                if number == signal.SIGKILL:
                    kill_workers(web)
                else:
                    web.restart(number)
                eventually(lambda: reader(web, job["id"]) != before, within_s=60)
                worker.hold.clear()
                assert answer.result(60).choices[0].message.content == "w0 é🙂\nw1 w2 w3 w4 "
            assert len(jobs(web, "restart")) == 1
        finally:
            worker.stop()


def reader(web: WebStack, job_id: str) -> str | None:
    """The API process that reads a job."""
    with web.client() as redis:
        name: str | None = redis.hget(keys.JOB + job_id, "reader")
    return name


def kill_workers(web: WebStack) -> None:
    """Kill gunicorn's worker processes; the main process starts others."""
    for child in psutil.Process(web.process.pid).children():
        child.kill()


def running(web: WebStack, marker: str) -> int:
    return sum(job["status"] == "running" for job in jobs(web, marker))


def send(web: WebStack, body: dict[str, Any], headers: str) -> socket.socket:
    """Send a chat request on a socket that the test can close."""
    address = urlsplit(web.url)
    connection = socket.create_connection((address.hostname, address.port))
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-API-Key: {web.key}\r\n{headers}"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection
