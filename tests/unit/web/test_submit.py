"""Repeated requests return the same job, even if the images at their URLs have changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import redis
from flask import Flask
from werkzeug.test import TestResponse

from shared.errors import Invalid
from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from tests.support.image_files import picture
from web.access.api_keys import KeyStore
from web.admission.image_loader import ImageLoader
from web.app import create_app
from web.services import EXTENSION


class ChangingImage:
    """An image URL that has different content at each request, until it disappears."""

    def __init__(self) -> None:
        self.requests = 0
        self.gone = False

    def fetch(self, url: str, max_bytes: int, caller: str) -> bytes:
        self.requests += 1
        if self.gone:
            raise Invalid("Not found.", code="image_unreachable")
        return picture(seed=self.requests)


@pytest.fixture
def image() -> ChangingImage:
    return ChangingImage()


@pytest.fixture
def app(settings: Settings, image: ChangingImage) -> Flask:
    app = create_app(settings, FakeRedis())
    app.extensions[EXTENSION] = replace(app.extensions[EXTENSION], image_loader=ImageLoader(settings, image.fetch))
    return app


@pytest.fixture
def caller(settings: Settings) -> dict[str, str]:
    return {"X-API-Key": KeyStore(settings.keys_file).create("caller", ["infer"])}


def submit(
    app: Flask, caller: dict[str, str], key: str, url: str = "https://example.com/a.png", **more: Any
) -> TestResponse:
    body, headers = {"prompt": "?", "images": [url], **more}, {**caller, "Idempotency-Key": key}
    return app.test_client().post("/v1/jobs", json=body, headers=headers)


def test_a_repeated_request_does_not_fetch_its_images_again(
    app: Flask, image: ChangingImage, caller: dict[str, str]
) -> None:
    first = submit(app, caller, "k")
    assert (first.status_code, image.requests) == (202, 1)
    image.gone = True
    again = submit(app, caller, "k")
    assert (again.status_code, again.headers["Idempotency-Replayed"], image.requests) == (202, "true", 1)
    assert again.get_json()["id"] == first.get_json()["id"]
    for other in ({"url": "https://example.com/b.png"}, {"prompt": "!"}):
        refused = submit(app, caller, "k", **other)
        assert (refused.status_code, refused.get_json()["code"]) == (422, "idempotency_key_reused")
    assert image.requests == 1
    new = submit(app, caller, "k2")
    assert (new.status_code, new.get_json()["code"], image.requests) == (422, "image_unreachable", 2)


def test_a_retry_finds_the_job_of_a_submission_whose_reply_was_lost(
    app: Flask, caller: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = app.extensions[EXTENSION].jobs
    create = jobs._enqueue

    def lose_reply(args: Any) -> None:
        create(args=args)
        raise redis.ConnectionError

    def send(retries: int) -> Any:
        headers = {**caller, "X-Stainless-Retry-Count": str(retries)}
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        with app.test_client().post("/v1/chat/completions", json=body, headers=headers) as response:
            return response

    monkeypatch.setattr(jobs, "_enqueue", lose_reply)
    lost = send(0)
    assert (lost.status_code, lost.headers["X-Should-Retry"]) == (503, "true")
    monkeypatch.setattr(jobs, "_enqueue", create)
    (key,) = jobs._client.keys("mlxq:job:*")
    again = send(1)
    assert (again.status_code, again.headers["Location"]) == (200, f"/v1/jobs/{key.removeprefix('mlxq:job:')}")
    assert len(jobs._client.keys("mlxq:job:*")) == 1
