"""Requests that are sent again: the same job, whatever has become of what they name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
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


class Site:
    """Has a picture, another one each time, until it is gone."""

    def __init__(self) -> None:
        self.asked = 0
        self.gone = False

    def fetch(self, url: str, most: int, caller: str) -> bytes:
        self.asked += 1
        if self.gone:
            raise Invalid("It is gone.", code="image_unreachable")
        return picture(seed=self.asked)


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def app(settings: Settings, site: Site) -> Flask:
    app = create_app(settings, FakeRedis())
    app.extensions[EXTENSION] = replace(app.extensions[EXTENSION], image_loader=ImageLoader(settings, site.fetch))
    return app


@pytest.fixture
def caller(settings: Settings) -> dict[str, str]:
    return {"X-API-Key": KeyStore(settings.keys_file).create("caller", ["infer"])}


def sent(
    app: Flask, caller: dict[str, str], key: str, url: str = "https://example.com/a.png", **more: Any
) -> TestResponse:
    body, headers = {"prompt": "?", "images": [url], **more}, {**caller, "Idempotency-Key": key}
    return app.test_client().post("/v1/jobs", json=body, headers=headers)


def test_an_image_at_a_url_is_not_read_again_for_the_same_request(
    app: Flask, site: Site, caller: dict[str, str]
) -> None:
    first = sent(app, caller, "k")
    assert (first.status_code, site.asked) == (202, 1)
    site.gone = True
    again = sent(app, caller, "k")
    assert (again.status_code, again.headers["Idempotency-Replayed"], site.asked) == (202, "true", 1)
    assert again.get_json()["id"] == first.get_json()["id"]
    for other in ({"url": "https://example.com/b.png"}, {"prompt": "!"}):
        refused = sent(app, caller, "k", **other)
        assert (refused.status_code, refused.get_json()["code"]) == (422, "idempotency_key_reused")
    assert site.asked == 1
    new = sent(app, caller, "k2")
    assert (new.status_code, new.get_json()["code"], site.asked) == (422, "image_unreachable", 2)
