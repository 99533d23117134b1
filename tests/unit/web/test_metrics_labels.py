"""Clients cannot create series: every label of every metric has known values."""

from __future__ import annotations

import itertools
import random
import string
from http import HTTPMethod
from pathlib import Path

import pytest
from flask import Flask
from prometheus_client.parser import text_string_to_metric_families

from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from web.access import rate_limits
from web.access.api_keys import KeyStore
from web.app import create_app
from web.http.environ import OTHER

NO_LIMIT = "1000000/minute"
ROUTES = ("/v1/jobs", "/v1/jobs/{}", "/v1/jobs/{}/stream", "/inference", "/v1/models/{}", "/livez", "/docs/{}", "/{}")
BODIES = ("", "{", '{"prompt": "hi", "model": "{}"}', '{"messages": 1, "{}": 2}')


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flask:
    monkeypatch.setattr(rate_limits, "ANONYMOUS_LIMIT", NO_LIMIT)
    return create_app(Settings(data_dir=tmp_path, rate_limit=NO_LIMIT, read_rate_limit=NO_LIMIT), FakeRedis())


def word(source: random.Random) -> str:
    return "".join(source.choices(string.ascii_letters, k=8))


def series(app: Flask) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    page = app.test_client().get("/metrics").text
    samples = itertools.chain.from_iterable(family.samples for family in text_string_to_metric_families(page))
    return {(each.name, tuple(sorted(each.labels.items()))) for each in samples}


def send_one_of_each(app: Flask, source: random.Random) -> None:
    key = KeyStore(app.extensions["mlxq"].settings.keys_file).create(word(source), ["infer"])
    client = app.test_client()
    methods = ("GET", "POST", "DELETE", word(source), word(source).upper(), word(source) + "!")
    for method, route, body, sent_key in itertools.product(methods, ROUTES, BODIES, (key, word(source))):
        client.open(
            route.replace("{}", word(source)),
            method=method,
            data=body.replace("{}", word(source)),
            headers={"X-API-Key": sent_key, "Content-Type": "application/json", word(source): word(source)},
        ).close()


def test_requests_with_other_values_create_no_further_series(app: Flask) -> None:
    send_one_of_each(app, random.Random(1))
    app.test_client().get("/metrics")
    before = series(app)
    send_one_of_each(app, random.Random(2))
    assert series(app) == before
    labels = {name: {dict(labels).get(name) for _, labels in before} for name in ("method", "url_rule")}
    assert labels["method"] - {None} <= {*HTTPMethod, OTHER}
    assert labels["url_rule"] - {None, "None"} <= {rule.rule for rule in app.url_map.iter_rules()}
