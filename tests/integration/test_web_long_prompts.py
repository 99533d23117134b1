"""Tokenising long prompts and harmful templates does not block streams or other requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2
import psutil
import pytest

from shared.models.registry import ModelCard
from shared.redis.client import connect
from shared.tokenizing.client import MODULE
from shared.tokenizing.messages import digest
from tests.plugins.web_stack import StubWorker, WebStack, running_web
from tests.support.tokenizers import CHATML, HARM, announce, announce_idle_worker, word_tokenizer
from tests.support.waiting import eventually

WORDS = 1_000_000
"""Five bytes each. They fit into the context, but only tokenising shows that."""


@pytest.fixture
def large_context_model(web: WebStack) -> str:
    """A model with a context of over a million tokens and no worker. The helpers that tokenise for it are running."""
    client = connect(web.redis_url, decode_responses=False)
    text = word_tokenizer()
    card = ModelCard("large", "text", 3 * WORDS // 2, chat_template=CHATML, tokenizer=digest(text))
    announce(client, card, text)
    announce_idle_worker(client, card.id)
    client.close()
    for prompt in ("short", "word " * 20_000):  # short and long prompts have separate helpers
        web.http.post("/v1/jobs", json={"model": "large", "prompt": prompt})
    return "large"


class OtherClients(threading.Thread):
    """Reads a stream and sends requests one after another; counts chunks and responses."""

    def __init__(self, web: WebStack, job_id: str) -> None:
        super().__init__(daemon=True)
        self._web = web
        self._job_id = job_id
        self.chunks = self.responses = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        polling = threading.Thread(target=self._poll, daemon=True)
        polling.start()
        with httpx2.stream("GET", f"{self._web.url}/v1/jobs/{self._job_id}/stream", headers=self._key()) as response:
            for _ in response.iter_bytes():
                self.chunks += 1
                if self.stopped.is_set():
                    break
        polling.join()

    def _poll(self) -> None:
        with httpx2.Client(base_url=self._web.url, headers=self._key()) as client:
            while not self.stopped.is_set():
                assert client.get(f"/v1/jobs/{self._job_id}").status_code == 200
                self.responses += 1

    def _key(self) -> dict[str, str]:
        return {"X-API-Key": self._web.key}

    def wait_for_progress(self) -> None:
        """Wait until 50 further chunks and 50 further responses have arrived."""
        chunks, responses = self.chunks + 50, self.responses + 50
        eventually(lambda: self.chunks >= chunks and self.responses >= responses, "other clients are served")


def body_of(form: str, model: str) -> dict[str, Any]:
    text = "word " * WORDS
    prompt = {"prompt": text} if form == "prompt" else {"messages": [{"role": "user", "content": text}]}
    return {"model": model, "max_tokens": 1, **prompt}


@contextmanager
def tokenizing_suspended(web: WebStack) -> Iterator[None]:
    """Suspend the API's tokenizer helpers during the block."""
    processes = psutil.Process(web.process.pid).children(recursive=True)
    helpers = [process for process in processes if MODULE in process.cmdline()]
    assert helpers
    for helper in helpers:
        helper.suspend()
    try:
        yield
    finally:
        for helper in helpers:
            helper.resume()


@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_tokenising_five_megabytes_does_not_block_other_clients(
    web: WebStack, start_worker: Callable[..., StubWorker], large_context_model: str, form: str
) -> None:
    start_worker(pause_s=0.005)
    others = OtherClients(web, web.submit(max_tokens=4000)["id"])
    body = json.dumps(body_of(form, large_context_model)).encode()
    headers = {"Content-Type": "application/json"}
    others.start()
    try:
        with ThreadPoolExecutor(1) as pool, tokenizing_suspended(web):
            submission = pool.submit(web.http.post, "/v1/jobs", content=body, headers=headers)
            others.wait_for_progress()
            assert not submission.done()
        assert submission.result().status_code == 202, submission.result().text
    finally:
        others.stopped.set()
        others.join(30)


@pytest.fixture(scope="module")
def short_timeout_web() -> Iterator[WebStack]:
    """An API with a template timeout of one second."""
    text = word_tokenizer()
    models = {"good": (CHATML, 2**20), "short": (CHATML, 64), **{name: (HARM[name], 2**20) for name in HARM}}
    with running_web(TEMPLATE_TIMEOUT_S="1") as stack:
        client = connect(stack.redis_url, decode_responses=False)
        for name, (template, context) in models.items():
            card = ModelCard(name, "text", context, chat_template=template, tokenizer=digest(text))
            announce(client, card, text)
            announce_idle_worker(client, name)
        client.close()
        eventually(lambda: stack.http.post("/v1/jobs", json={"model": "good", "prompt": "hello"}).is_success)
        yield stack


@pytest.mark.parametrize("route", ["/v1/jobs", "/inference"])
@pytest.mark.parametrize("harm", HARM)
def test_a_harmful_template_is_refused_and_others_still_work(
    short_timeout_web: WebStack, harm: str, route: str
) -> None:
    hello = [{"role": "user", "content": "hello"}]
    response = short_timeout_web.http.post(route, json={"model": harm, "messages": hello}, timeout=60)
    assert (response.status_code, response.json()["code"], response.json()["field"]) == (
        422,
        "template_error",
        "messages",
    )
    assert short_timeout_web.http.post("/v1/jobs", json={"model": "good", "messages": hello}).status_code == 202


@pytest.mark.parametrize("route", ["/v1/jobs", "/inference"])
@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_a_prompt_longer_than_the_context_is_refused_on_every_route(
    short_timeout_web: WebStack, route: str, form: str
) -> None:
    for words in (64, 100_000):
        text = "word " * words
        prompt = {"prompt": text} if form == "prompt" else {"messages": [{"role": "user", "content": text}]}
        response = short_timeout_web.http.post(route, json={"model": "short", **prompt})
        assert (response.status_code, response.json()["code"]) == (422, "context_length_exceeded")
        assert response.json()["field"] == form
