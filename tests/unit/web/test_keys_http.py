"""`/v1/keys`: admins manage API keys, others see their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from web.access.api_keys import KeyStore
from web.app import create_app


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    return create_app(Settings(data_dir=tmp_path, model_path=tmp_path / "default", durable=False), FakeRedis())


@pytest.fixture
def store(app: Flask) -> KeyStore:
    keys: KeyStore = app.extensions["mlxq"].keys
    return keys


@pytest.fixture
def call(app: Flask, store: KeyStore) -> Any:
    """Calls the API, by default with an admin's key."""
    admin, client = store.create("root", {"infer", "admin"}), app.test_client()

    def send(method: str, path: str = "", body: Any = None, key: str = admin) -> tuple[int, Any]:
        answer = client.open(f"/v1/keys{path}", method=method, json=body, headers={"X-API-Key": key})
        return answer.status_code, answer.json

    return send


def test_a_key_is_created_limited_and_revoked(store: KeyStore, call: Any) -> None:
    status, made = call("POST", body={"name": "chat", "scopes": ["infer"], "max_queued": 5})
    assert status == 201 and store.find(made["key"]) is not None
    assert call("GET", key=made["key"])[1]["data"] == [{name: made[name] for name in made if name != "key"}]
    status, limited = call("PUT", f"/{made['id']}/limits", {"rate_limit": "7/minute", "max_priority": "batch"})
    assert status == 200
    assert (limited["rate_limit"], limited["max_queued"], limited["max_priority"]) == ("7/minute", None, "batch")
    status, revoked = call("DELETE", f"/{made['id']}")
    assert status == 200 and revoked["revoked_at"] is not None and store.find(made["key"]) is None
    assert call("DELETE", f"/{made['id']}")[0] == call("PUT", f"/{made['id']}/limits", {})[0] == 404
    assert [each["name"] for each in call("GET")[1]["data"]] == ["root", "chat"]


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [({"name": "root"}, 409, "name"), ({"name": ""}, 422, "name"), ({"name": "a\nb"}, 422, "name"),
     ({"name": "x", "rate_limit": "fast"}, 422, "rate_limit"), ({"name": "x", "scopes": []}, 422, "scopes"),
     ({"name": "x", "scopes": ["root"]}, 422, "scopes[0]"), ({"name": "x", "max_queued": 0}, 422, "max_queued")],
)  # fmt: skip
def test_invalid_keys_are_refused(call: Any, body: dict[str, Any], status: int, field: str) -> None:
    refused, problem = call("POST", body=body)
    assert (refused, problem["field"]) == (status, field)


def test_only_admins_change_keys_and_none_revokes_itself(store: KeyStore, call: Any) -> None:
    user, root = store.create("user", {"infer"}), store.list()[0].id
    for method, path, body in (
        ("POST", "", {"name": "y"}),
        ("PUT", f"/{root}/limits", {}),
        ("DELETE", f"/{root}", None),
    ):
        assert call(method, path, body, user)[0] == 403
    assert call("DELETE", f"/{root}")[0] == 403
    assert store.get(root) is not None
