"""Prompts are tokenised beside streams and requests, whatever their length and their model's template."""

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
from shared.queue.redis import connect
from shared.tokenizing.client import MODULE
from shared.tokenizing.messages import digest
from tests.plugins.web_stack import PretendWorker, WebStack, running_web
from tests.support.tokenizers import CHATML, HARM, announce, word_tokenizer
from tests.support.waiting import eventually

WORDS = 1_000_000
"""Five bytes each; the context has room for them, but only counting can tell."""


@pytest.fixture
def patient_model(web: WebStack) -> str:
    """A model that takes such a prompt, known and without a worker; the helpers that tokenise for it run."""
    client = connect(web.redis_url, decode_responses=False)
    text = word_tokenizer()
    card = ModelCard("patient", "text", 3 * WORDS // 2, chat_template=CHATML, tokenizer=digest(text))
    announce(client, card, text)
    client.close()
    for prompt in ("short", "word " * 20_000):  # each has a helper of its own
        web.http.post("/v1/jobs", json={"model": "patient", "prompt": prompt})
    return "patient"


class Neighbours(threading.Thread):
    """Reads one stream, makes one request after another, and counts what it gets."""

    def __init__(self, web: WebStack, job_id: str) -> None:
        super().__init__(daemon=True)
        self._web = web
        self._job_id = job_id
        self.chunks = self.answers = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        asking = threading.Thread(target=self._ask, daemon=True)
        asking.start()
        with httpx2.stream("GET", f"{self._web.url}/v1/jobs/{self._job_id}/stream", headers=self._key()) as answer:
            for _ in answer.iter_bytes():
                self.chunks += 1
                if self.stopped.is_set():
                    break
        asking.join()

    def _ask(self) -> None:
        with httpx2.Client(base_url=self._web.url, headers=self._key()) as client:
            while not self.stopped.is_set():
                assert client.get(f"/v1/jobs/{self._job_id}").status_code == 200
                self.answers += 1

    def _key(self) -> dict[str, str]:
        return {"X-API-Key": self._web.key}

    def go_on(self) -> None:
        """Wait until the stream and the requests have got on by many steps."""
        chunks, answers = self.chunks + 50, self.answers + 50
        eventually(lambda: self.chunks >= chunks and self.answers >= answers, "neighbours go on")


def body_of(form: str, model: str) -> dict[str, Any]:
    text = "word " * WORDS
    asked = {"prompt": text} if form == "prompt" else {"messages": [{"role": "user", "content": text}]}
    return {"model": model, "max_tokens": 1, **asked}


@contextmanager
def tokenizing_suspended(web: WebStack) -> Iterator[None]:
    """The API's helpers do not get on: whoever waits for one waits until the end of this."""
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
def test_while_five_megabytes_are_counted_others_go_on(
    web: WebStack, pretend: Callable[..., PretendWorker], patient_model: str, form: str
) -> None:
    pretend(pause_s=0.005)
    neighbours = Neighbours(web, web.submit(max_tokens=4000)["id"])
    body = json.dumps(body_of(form, patient_model)).encode()
    headers = {"Content-Type": "application/json"}
    neighbours.start()
    try:
        with ThreadPoolExecutor(1) as pool, tokenizing_suspended(web):
            posted = pool.submit(web.http.post, "/v1/jobs", content=body, headers=headers)
            neighbours.go_on()
            assert not posted.done()
        assert posted.result().status_code == 202, posted.result().text
    finally:
        neighbours.stopped.set()
        neighbours.join(30)


@pytest.fixture(scope="module")
def hasty_web() -> Iterator[WebStack]:
    """An API that gives templates a second."""
    text = word_tokenizer()
    models = {"good": (CHATML, 2**20), "short": (CHATML, 64), **{name: (HARM[name], 2**20) for name in HARM}}
    with running_web(TEMPLATE_TIMEOUT_S="1") as stack:
        client = connect(stack.redis_url, decode_responses=False)
        for name, (template, context) in models.items():
            card = ModelCard(name, "text", context, chat_template=template, tokenizer=digest(text))
            announce(client, card, text)
        client.close()
        eventually(lambda: stack.http.post("/v1/jobs", json={"model": name, "prompt": "hello"}).is_success)
        yield stack


@pytest.mark.parametrize("route", ["/v1/jobs", "/inference"])
@pytest.mark.parametrize("harm", HARM)
def test_a_harmful_template_is_refused_and_another_is_not(hasty_web: WebStack, harm: str, route: str) -> None:
    hello = [{"role": "user", "content": "hello"}]
    answer = hasty_web.http.post(route, json={"model": harm, "messages": hello}, timeout=60)
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (422, "template_error", "messages")
    assert hasty_web.http.post("/v1/jobs", json={"model": "good", "messages": hello}).status_code == 202


@pytest.mark.parametrize("route", ["/v1/jobs", "/inference"])
@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_a_prompt_longer_than_the_context_is_refused_on_every_route(hasty_web: WebStack, route: str, form: str) -> None:
    for words in (64, 100_000):
        said = "word " * words
        asked = {"prompt": said} if form == "prompt" else {"messages": [{"role": "user", "content": said}]}
        answer = hasty_web.http.post(route, json={"model": "short", **asked})
        assert (answer.status_code, answer.json()["code"]) == (422, "context_length_exceeded")
        assert answer.json()["field"] == form
