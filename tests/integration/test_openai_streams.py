"""Streams of chat completions stay open while the job waits, and say so when the API process stops."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.plugins.web_stack import MODEL, StubWorker, WebStack, running_web

MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def web() -> Iterator[WebStack]:
    with running_web(HEARTBEAT_S="0.2", DRAIN_S="1") as web:
        yield web


@pytest.fixture
def worker(web: WebStack) -> Iterator[StubWorker]:
    worker = StubWorker(web.redis_url)
    worker.announce()
    worker.hold.set()
    worker.start()
    yield worker
    worker.stop()


@pytest.mark.parametrize("n", [1, 2])
def test_comments_keep_a_stream_open_during_a_long_prefill(web: WebStack, worker: StubWorker, n: int) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "stream": True, "max_tokens": 3, "n": n}
    with web.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = filter(None, response.iter_lines())
        comments = [next(lines) for _ in range(5)]
        worker.hold.clear()
        rest = [*lines]
    assert all(line.startswith(":") for line in comments)
    assert rest[-1] == "data: [DONE]"


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_where_its_job_continues(web: WebStack, worker: StubWorker, n: int) -> None:
    with (
        openai.OpenAI(base_url=f"{web.url}/v1", api_key=web.key) as client,
        client.chat.completions.with_streaming_response.create(
            model=MODEL, messages=MESSAGES, stream=True, max_tokens=3, n=n
        ) as response,
    ):
        path, stream = response.headers["Location"], response.parse()
        web.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError) as caught:
            next(iter(stream))
    assert caught.value.code == "restarting" and path in caught.value.message
    web.restart()
    worker.hold.clear()
    job = web.http.get(path, params={"wait": 20}).json()
    assert (job["status"], job["output"]["text"]) == ("succeeded", "w0 é🙂\nw1 w2 ")
