"""A long prompt is read and counted beside the streams and requests of the same process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx2
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from shared.models.registry import ModelCard, Registry, digest
from tests.plugins.web_stack import PretendWorker, WebStack

CHATML = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
WORDS = 1_000_000
"""Five bytes each; the context has room for them, but only counting can tell."""


@pytest.fixture
def patient_model(web: WebStack) -> str:
    """A model that takes such a prompt, known and without a worker."""
    tokenizer = Tokenizer(models.WordLevel({"word": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = tokenizer.to_str()
    client = web.client()
    card = ModelCard("patient", "text", 3 * WORDS // 2, chat_template=CHATML, tokenizer=digest(text))
    Registry(client).announce_model(card, text)
    client.close()
    web.http.post("/v1/jobs", json={"model": "patient", "prompt": "short"})  # the roster is half a second old
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
