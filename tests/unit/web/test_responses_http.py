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
from web.background.response_keeper import ResponseKeeper
from web.responses import stored
from web.responses.store import DiskResponses, Entry
from web.responses.stored import Responses, StoredResponse
from web.services import Services

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


def keeper(app: Flask) -> ResponseKeeper:
    current: Services = app.extensions["mlxq"]
    return ResponseKeeper(current.settings, current.responses, current.response_store, current.jobs)


def test_response_whose_job_has_lost_its_end_by_a_failover_is_kept(
    app: Flask, api: FlaskClient, valkey_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The background process sees the end of the job, and reads the job after the failover."""
    name = api.post("/v1/responses", json=BODY).get_json()["id"]
    valkey_client.zadd(keys.UNANSWERED, {valkey_client.zrange(keys.UNANSWERED, 0, 0)[0]: 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(Jobs, "ended", lambda _, job_ids: set(job_ids))
        keeper(app).round()
    assert api.get(f"/v1/responses/{name}").status_code == 200
    answer_next(valkey_client)
    keeper(app).round()
    assert not valkey_client.exists(keys.UNANSWERED)
    assert api.get(f"/v1/responses/{name}").get_json()["status"] == "completed"


def test_folder_that_cannot_be_read_does_not_keep_other_responses_from_being_deleted(
    app: Flask, api: FlaskClient, answered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    current: Services = app.extensions["mlxq"]
    store, path = current.response_store, f"/v1/responses/{answered['id']}"
    keeper(app).round()  # stores the answer
    owners, entries = [*store.owners()], DiskResponses.entries

    def unreadable(self: DiskResponses, owner: str) -> list[Entry]:
        if owner == "lost+found":
            raise PermissionError
        return [each._replace(used_at=1.0) for each in entries(self, owner)]

    monkeypatch.setattr(DiskResponses, "owners", lambda _: iter(["lost+found", *owners]))
    monkeypatch.setattr(DiskResponses, "entries", unreadable)
    keeper(app).clean()
    assert api.get(path).status_code == 404


def test_response_in_progress_is_kept_however_large_or_old(
    app: Flask, api: FlaskClient, valkey_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, entries = api.post("/v1/responses", json=BODY).get_json()["id"], DiskResponses.entries

    def old(self: DiskResponses, owner: str) -> list[Entry]:
        return [each._replace(used_at=1.0) for each in entries(self, owner)]

    monkeypatch.setattr(DiskResponses, "entries", old)
    keeper(app).clean()
    assert api.get(f"/v1/responses/{name}").status_code == 200
    answer_next(valkey_client)
    keeper(app).round()  # stores the answer, and then cleans
    assert api.get(f"/v1/responses/{name}").status_code == 404


@pytest.fixture
def answered(api: FlaskClient, valkey_client: Redis) -> dict[str, Any]:
    """A response that has ended."""
    name = api.post("/v1/responses", json=BODY).get_json()["id"]
    answer_next(valkey_client)
    answered: dict[str, Any] = api.get(f"/v1/responses/{name}").get_json()
    return answered


def test_response_is_read_once_however_often_its_items_are_referenced(
    api: FlaskClient, answered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, get = list[str](), Responses.get

    def counted(self: Responses, response_id: str, owner: str) -> StoredResponse:
        read.append(response_id)
        return get(self, response_id, owner)

    monkeypatch.setattr(Responses, "get", counted)
    references = [{"type": "item_reference", "id": answered["output"][0]["id"]}] * 50
    user = {"role": "user", "content": "hi"}
    created = api.post("/v1/responses", json={**BODY, "input": [user, *references, user]})
    assert (created.status_code, read) == (200, [answered["id"]]), created.get_json()
    items = api.get(f"/v1/responses/{created.get_json()['id']}/input_items?limit=100").get_json()["data"]
    assert [item["content"][0]["text"] for item in items] == ["hi", *["One"] * 50, "hi"]


def test_size_of_what_a_request_continues_and_references_is_limited(
    api: FlaskClient, answered: dict[str, Any], valkey_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "MAX_BYTES", 1000)
    reference = {"type": "item_reference", "id": answered["output"][0]["id"]}
    user = {"role": "user", "content": "hi"}
    assert api.post("/v1/responses", json={**BODY, "input": [user, reference, user]}).status_code == 200
    answer_next(valkey_client)
    refused = api.post("/v1/responses", json={**BODY, "input": [user, *[reference] * 20, user]})
    assert refused.status_code == 400
    assert refused.get_json()["error"]["param"].startswith("input[")
    monkeypatch.setattr(stored, "MAX_BYTES", 100)
    following = api.post("/v1/responses", json={**BODY, "previous_response_id": answered["id"]})
    assert following.status_code == 200
    answer_next(valkey_client)
    refused = api.post("/v1/responses", json={**BODY, "previous_response_id": following.get_json()["id"]})
    assert (refused.status_code, refused.get_json()["error"]["param"]) == (400, "previous_response_id")
