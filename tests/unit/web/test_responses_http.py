"""Requests for responses that are repeated or fail halfway, through the API with a real queue and no worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis
from flask import Flask
from flask.testing import FlaskClient

from shared.jobs.record import Ending, Status
from shared.jobs.store import Jobs
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import MODEL, end, lease, row, started
from web.access.api_keys import KeyStore
from web.app import create_app

BODY = {"model": MODEL, "input": "hi", "background": True, "max_output_tokens": 4}


@pytest.fixture
def app(valkey_client: Redis, tmp_path: Path) -> Flask:
    return create_app(Settings(data_dir=tmp_path, model_path=Path(MODEL), durable=False), valkey_client)


@pytest.fixture
def api(app: Flask) -> FlaskClient:
    client = app.test_client()
    settings = app.extensions["mlxq"].settings
    client.environ_base["HTTP_X_API_KEY"] = KeyStore(settings.keys_file).create("key", ["infer"])
    return client


def answer_next(client: Redis) -> None:
    worker = lease(client, "w")
    job = started(worker)
    worker.append([row(job, 0, "One", 1, extra='"delta":{"content":"One"}')])
    end(worker, job, Ending(Status.SUCCEEDED, finish_reason="stop", prompt_tokens=1, completion_tokens=1))


def test_repeated_request_for_a_background_response_that_has_ended_returns_its_output(
    api: FlaskClient, valkey_client: Redis
) -> None:
    headers = {"Idempotency-Key": "k"}
    first = api.post("/v1/responses", json=BODY, headers=headers)
    assert (first.status_code, first.get_json()["status"]) == (200, "queued"), first.get_json()
    assert api.post("/v1/responses", json=BODY, headers=headers).get_json() == first.get_json()
    answer_next(valkey_client)
    repeated = api.post("/v1/responses", json=BODY, headers=headers).get_json()
    assert (repeated["status"], repeated["output"][0]["content"][0]["text"]) == ("completed", "One")
    assert repeated == api.get(f"/v1/responses/{first.get_json()['id']}").get_json()


def test_response_is_kept_if_the_connection_to_redis_is_lost_after_its_job_was_accepted(
    api: FlaskClient, valkey_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_all = Jobs.create_all

    def lost(*args: Any) -> None:
        create_all(*args)
        raise redis.ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(Jobs, "create_all", lost)
        assert api.post("/v1/responses", json=BODY).status_code == 503
    ((member, _),) = valkey_client.zrange(keys.UNANSWERED, 0, -1, withscores=True)
    response = api.get(f"/v1/responses/{member.split()[1]}")
    assert (response.status_code, response.get_json()["status"]) == (200, "queued")
