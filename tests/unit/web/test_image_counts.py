"""Images count as many tokens as they take, in every API, whatever the model's family."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from shared.models.image_tokens import FixedTokens, to_record
from shared.models.registry import ModelCard, Registry
from shared.redis import keys
from shared.settings import Settings
from shared.tokenizing.messages import digest
from tests.support.fake_redis import FakeRedis
from tests.support.image_files import data_url, picture
from tests.support.tokenizers import announce_idle_worker, word_tokenizer
from web.access.api_keys import KeyStore
from web.app import create_app
from web.background.endpoints import make_endpoints
from web.batches.lines import Line
from web.batches.requests import LineRequests
from web.batches.results import Result

CONTEXT, PER_IMAGE = 64, 21
TEMPLATE = "{% for part in messages[0].content if part.type == 'image' %}<image> {% endfor %}word"
URLS = [data_url(picture(20, 20, seed)) for seed in range(4)]
OPENAI = [{"type": "image_url", "image_url": {"url": url}} for url in URLS]
ANTHROPIC = [
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}}
    for url in URLS
]
RESPONSES = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in URLS]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flask]:
    """An API with two models of a context of 64 tokens, of which only `known` has a tokenizer."""
    client, text = FakeRedis(), word_tokenizer()
    settings = Settings(data_dir=tmp_path_factory.mktemp("data"), model_path=Path("known"), durable=False)
    settings.tokenizers_dir.mkdir(parents=True)
    (settings.tokenizers_dir / f"{digest(text)}.json.gz").write_bytes(gzip.compress(text.encode()))
    for name, tokenizer in (("known", digest(text)), ("unknown", None)):
        rule = to_record(FixedTokens(PER_IMAGE))
        card = ModelCard(name, "vision", CONTEXT, TEMPLATE, tokenizer=tokenizer, image_tokens=rule)
        Registry(client).announce_model(card)
        announce_idle_worker(client, name)
    app = create_app(settings, client)
    yield app
    app.extensions["mlxq"].prompt_tokenizer._tokenizing.close()


@pytest.fixture(scope="module")
def api(app: Flask) -> FlaskClient:
    client = app.test_client()
    store = KeyStore(app.extensions["mlxq"].settings.keys_file)
    client.environ_base["HTTP_X_API_KEY"] = store.create("key", ["infer"])
    return client


def bodies(images: int, model: str) -> dict[str, dict[str, Any]]:
    """Return a request with images for each route that generates."""

    def user(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": parts[:images]}]

    native = {"model": model, "messages": user(OPENAI)}
    return {
        "/inference": native,
        "/v1/jobs": {"model": model, "prompt": "word", "images": URLS[:images]},
        "/v1/chat/completions": native,
        "/v1/messages": {"model": model, "max_tokens": 5, "messages": user(ANTHROPIC)},
        "/v1/responses": {"model": model, "input": user(RESPONSES)},
    }


FIELDS = {"/v1/jobs": "prompt", "/v1/responses": "input"}


@pytest.mark.parametrize("route", bodies(0, ""))
def test_more_images_than_the_context_holds_are_refused_with_the_name_of_the_field(
    api: FlaskClient, route: str
) -> None:
    for model, images, message in (("known", 3, "take more than 60"), ("unknown", 4, "take 84 tokens")):
        response = api.post(route, json=bodies(images, model)[route])
        answer = response.get_json()
        error = answer.get("error", answer)
        field, text = FIELDS.get(route, "messages"), error.get("detail") or error["message"]
        assert message in text
        if route == "/v1/messages":  # whose errors have no other place for a field, and no code
            assert (response.status_code, error["type"]) == (400, "invalid_request_error")
            assert text.startswith("messages: ")
        else:
            assert response.status_code in (400, 422)
            assert (error["code"], error.get("field") or error["param"]) == ("context_length_exceeded", field)


@pytest.mark.parametrize(("route", "field"), [("/v1/chat/completions", "messages"), ("/v1/responses", "input")])
def test_lines_of_batches_with_too_many_images_fail_with_the_name_of_the_field(
    app: Flask, route: str, field: str
) -> None:
    current = app.extensions["mlxq"]
    batch: Any = SimpleNamespace(
        id="batch_1", owner="me", endpoint=route, request_id="", max_queued=None, window_ends_at=time.time() + 100
    )
    with app.app_context():
        requests = LineRequests(
            current.settings, current.admission, current.image_loader, current.jobs, make_endpoints(current)
        )
        found = requests.submit(batch, Line(1, "a", bodies(3, "known")[route]))
    assert isinstance(found, Result)
    error = found.entry["response"]["body"]["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", field)


def test_images_are_counted_before_and_when_a_job_is_accepted(api: FlaskClient, app: Flask) -> None:
    sent, prompt_tokens = bodies(2, "known"), 2 * PER_IMAGE + 1
    del sent["/v1/messages"]["max_tokens"]
    count = api.post("/v1/messages/count_tokens", json=sent["/v1/messages"]).get_json()
    assert count["input_tokens"] == prompt_tokens
    count = api.post("/v1/responses/input_tokens", json=sent["/v1/responses"]).get_json()
    assert count["input_tokens"] == prompt_tokens
    job = api.post("/v1/jobs", json=sent["/v1/jobs"] | {"max_tokens": 5})
    assert job.status_code == 202
    record = app.extensions["mlxq"].jobs._client.hgetall(keys.JOB + job.get_json()["id"])
    assert record["size"] == str(prompt_tokens + 5), "the limits of API keys count images"


def test_a_repeated_request_does_not_need_the_size_of_images_at_urls(
    api: FlaskClient, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.extensions["mlxq"].image_loader, "_fetch", lambda *_: picture(20, 20))
    body = {"model": "known", "prompt": "word", "images": ["https://example.com/a.png"], "max_tokens": 5}
    first, again = (api.post("/v1/jobs", json=body, headers={"Idempotency-Key": "a"}) for _ in range(2))
    assert (again.status_code, again.get_json()["id"]) == (202, first.get_json()["id"])
