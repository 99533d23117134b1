"""What requests without a key see, and the headers that browsers and proxies respect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from shared import VERSION
from shared.models.registry import HostInfo, ModelCard, Registry, WorkerInfo
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from web.access.api_keys import KeyStore
from web.app import create_app

NAMES = ("secret-host", "secret-node", "secret-model", VERSION)
"""Parts of answers that strangers must not see. The OpenAPI document has the version."""
STRANGER = {"REMOTE_ADDR": "203.0.113.7"}
PUBLIC = (
    "/health",
    "/livez",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/docs/start.js",
    "/nothing",
    "/v1/nothing",
)


def app_with(tmp_path: Path, client: Redis | None = None, **settings: Any) -> Flask:
    client = client or FakeRedis()
    registry = Registry(client)
    registry.announce_model(ModelCard("secret-model", "text", 100))
    registry.announce_worker(
        WorkerInfo("w", "secret-node", "secret-host", 1, "secret-model", "ready", 4, 0, 1.0, 2.0, {}, {}), 60
    )
    registry.announce_host(HostInfo("secret-node", "secret-host", 1, 1.0, 2.0, ("secret-model",), 100, 50), 60)
    return create_app(Settings(data_dir=tmp_path, model_path=tmp_path / "default", **settings), client)


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    return app_with(tmp_path)


@pytest.fixture
def key(app: Flask) -> str:
    return KeyStore(app.extensions["mlxq"].settings.keys_file).create("prometheus", ["infer"])


@pytest.mark.parametrize("path", PUBLIC)
@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "mlxq_00000000_" + "a" * 43}])
def test_strangers_see_no_names(app: Flask, path: str, headers: dict[str, str]) -> None:
    with app.test_client().get(path, headers=headers, environ_base=STRANGER) as response:
        assert [name for name in NAMES if name in response.text and path != "/openapi.json"] == []
        assert "secret-" not in response.text or path == "/openapi.json"


def test_health_has_a_summary_for_strangers_and_details_with_a_key(tmp_path: Path, valkey_client: Redis) -> None:
    app = app_with(tmp_path, valkey_client)
    key = KeyStore(app.extensions["mlxq"].settings.keys_file).create("prometheus", ["infer"])
    client = app.test_client()
    summary = client.get("/health").json
    assert summary == {"status": "degraded", "models": 1}
    for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
        details = client.get("/health", headers=headers, environ_base=STRANGER).json
        assert details is not None
        assert (details["status"], details["models"], details["version"]) == ("degraded", 1, VERSION)
        assert details["workers"][0]["host"] == "secret-host"


def scraped(client: FlaskClient, address: str, **headers: str) -> int:
    return client.get("/metrics", headers=headers, environ_base={"REMOTE_ADDR": address}).status_code


@pytest.mark.parametrize("address", ["203.0.113.7", "10.0.0.1", "172.17.0.1", "::ffff:203.0.113.7", "2001:db8::1", ""])
def test_metrics_need_a_key_from_elsewhere(app: Flask, key: str, tmp_path: Path, address: str) -> None:
    client = app.test_client()
    assert scraped(client, address) == 401
    assert scraped(client, address, **{"X-API-Key": "wrong"}) == 401
    assert scraped(client, address, Authorization=f"Bearer {key}") == 200
    assert scraped(app_with(tmp_path, metrics_public=True).test_client(), address) == 200


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_metrics_need_no_key_on_the_same_machine_unless_a_proxy_forwarded_the_request(app: Flask, address: str) -> None:
    client = app.test_client()
    assert scraped(client, address) == 200
    for header in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"):
        assert scraped(client, address, **{header: "203.0.113.7"}) == 401


@pytest.mark.parametrize("path", [*PUBLIC, "/v1/jobs", "/v1/models", "/inference/models"])
def test_every_answer_has_the_security_headers(app: Flask, path: str) -> None:
    with app.test_client().get(path) as response:
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"


def test_the_page_cannot_be_embedded_and_does_not_store_the_key(app: Flask) -> None:
    client = app.test_client()
    policy = client.get("/docs").headers["Content-Security-Policy"]
    for directive in ("frame-ancestors 'none'", "object-src 'none'", "base-uri 'none'", "default-src 'self'"):
        assert directive in policy
    assert "persistAuthorization" not in client.get("/docs/start.js").text
