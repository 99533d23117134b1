"""Prompts are tokenised beside streams and requests, whatever their length and their model's template."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import httpx2
import pytest

from shared.models.registry import ModelCard
from shared.queue.redis import connect
from shared.tokenizing.messages import digest
from tests.plugins.web_stack import PretendWorker, WebStack, running_web
from tests.support.tokenizers import CHATML, HARM, announce, word_tokenizer
from tests.support.waiting import eventually

WORDS = 1_000_000
"""Five bytes each; the context has room for them, but only counting can tell."""


@pytest.fixture
def patient_model(web: WebStack) -> str:
    """A model that takes such a prompt, known and without a worker."""
    client = connect(web.redis_url, decode_responses=False)
    text = word_tokenizer()
    card = ModelCard("patient", "text", 3 * WORDS // 2, chat_template=CHATML, tokenizer=digest(text))
    announce(client, card, text)
    client.close()
    web.http.post("/v1/jobs", json={"model": "patient", "prompt": "short"})  # the cluster is half a second old
    return "patient"


class Neighbours(threading.Thread):
    """One stream and one request after another, and the moments at which they got on."""

    def __init__(self, web: WebStack, job_id: str) -> None:
        super().__init__(daemon=True)
        self._web = web
        self._job_id = job_id
        self.chunks: list[float] = []
        self.answers: list[float] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        asking = threading.Thread(target=self._ask, daemon=True)
        asking.start()
        with httpx2.stream("GET", f"{self._web.url}/v1/jobs/{self._job_id}/stream", headers=self._key()) as answer:
            for _ in answer.iter_bytes():
                self.chunks.append(time.monotonic())
                if self.stopped.is_set():
                    break
        asking.join()

    def _ask(self) -> None:
        with httpx2.Client(base_url=self._web.url, headers=self._key()) as client:
            while not self.stopped.is_set():
                assert client.get(f"/v1/jobs/{self._job_id}").status_code == 200
                self.answers.append(time.monotonic())

    def _key(self) -> dict[str, str]:
        return {"X-API-Key": self._web.key}


def body_of(form: str, model: str) -> dict[str, Any]:
    text = "word " * WORDS
    asked = {"prompt": text} if form == "prompt" else {"messages": [{"role": "user", "content": text}]}
    return {"model": model, "max_tokens": 1, **asked}


def longest_gap(moments: list[float], begin: float, end: float) -> float:
    inside = [begin, *(moment for moment in moments if begin < moment < end), end]
    return max(later - earlier for earlier, later in pairwise(inside))


@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_while_five_megabytes_are_counted_others_go_on(
    web: WebStack,
    pretend: Callable[..., PretendWorker],
    patient_model: str,
    eventually: Callable[..., None],
    form: str,
) -> None:
    pretend(pause_s=0.005)
    neighbours = Neighbours(web, web.submit(max_tokens=4000)["id"])
    body = json.dumps(body_of(form, patient_model)).encode()
    neighbours.start()
    try:
        eventually(lambda: len(neighbours.chunks) > 3 and len(neighbours.answers) > 3)
        begin = time.monotonic()
        answer = web.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        end = time.monotonic()
        assert answer.status_code == 202, answer.text
    finally:
        neighbours.stopped.set()
        neighbours.join(30)
    # Held up for the whole of it, they would have one gap as long as it took.
    for moments in (neighbours.chunks, neighbours.answers):
        assert longest_gap(moments, begin, end) < (end - begin) / 2


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
def test_a_harmful_template_is_refused_and_holds_up_nobody(hasty_web: WebStack, harm: str, route: str) -> None:
    hello = [{"role": "user", "content": "hello"}]
    answers: list[httpx2.Response] = []

    def ask() -> None:
        body = {"model": harm, "messages": hello}
        answers.append(hasty_web.http.post(route, json=body, timeout=60))

    asking = threading.Thread(target=ask)
    asking.start()
    slowest = 0.0
    while asking.is_alive():
        begin = time.monotonic()
        assert hasty_web.http.get("/livez").status_code == 200
        slowest = max(slowest, time.monotonic() - begin)
        asking.join(0.02)
    [answer] = answers
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (422, "template_error", "messages")
    assert slowest < 0.5
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
