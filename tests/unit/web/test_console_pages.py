"""The console without a browser: sessions, CSRF tokens, headers, and what clients of the API see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from flask import Flask
from flask.testing import FlaskClient

from shared.jobs.record import Ending, Status
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from tests.support.queueing import end, lease, started, submit
from web.access.api_keys import KeyStore
from web.access.sessions import COOKIE
from web.app import create_app
from web.console.formats import duration, size
from web.console.layout import NAVIGATION
from web.schemas.batches import BatchEndpoint
from web.schemas.webhooks import WebhookEvent

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
NONE = "\N{EN DASH}"
PATHS = [path for _, path, _ in NAVIGATION]


@pytest.fixture
def redis() -> Redis:
    return FakeRedis()


@pytest.fixture
def app(tmp_path: Path, redis: Redis) -> Flask:
    return create_app(Settings(data_dir=tmp_path, model_path=tmp_path / "default", durable=False), redis)


@pytest.fixture
def store(app: Flask) -> KeyStore:
    keys: KeyStore = app.extensions["mlxq"].keys
    return keys


def sign_in(client: FlaskClient, key: str, path: str = "/console/sign-in", **fields: str) -> Any:
    form = client.get(path, headers=HTML).text
    token = re.search(r'name="csrf_token" value="([^"]+)"', form)
    assert token is not None
    return client.post("/console/sign-in", data={"key": key, "csrf_token": token[1], **fields})


@pytest.fixture
def admin(app: Flask, store: KeyStore) -> FlaskClient:
    client = app.test_client()
    assert sign_in(client, store.create("root", {"infer", "admin"})).status_code == 303
    return client


def csrf_token(client: FlaskClient) -> str:
    match = re.search(r'name="csrf-token" content="(\w+)"', client.get("/console/keys", headers=HTML).text)
    assert match is not None
    return match[1]


@pytest.mark.parametrize("accept", ["*/*", "application/json", ""])
def test_clients_of_the_api_get_the_same_answer_at_the_root_as_before(app: Flask, accept: str) -> None:
    answer = app.test_client().get("/", headers={"Accept": accept} if accept else {})
    assert answer.status_code == 404 and answer.json is not None and answer.json["code"] == "route_not_found"


@pytest.mark.parametrize("path", PATHS)
def test_strangers_are_led_to_the_sign_in_page(app: Flask, path: str) -> None:
    answer = app.test_client().get(path, headers=HTML)
    assert answer.status_code == 302 and answer.location.startswith("/console/sign-in")


@pytest.mark.parametrize(
    "path", [*PATHS, "/console/jobs?status=failed&within=1h&metadata=a%3Db", "/console/jobs?before=x"]
)
def test_pages_have_no_inline_code_and_strict_headers(admin: FlaskClient, path: str) -> None:
    answer = admin.get(path, headers=HTML)
    assert answer.status_code == 200
    assert not re.search(r"\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)|<style", answer.text)
    policy = answer.headers["Content-Security-Policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert answer.headers["Cache-Control"] == "no-store"
    for asset in re.findall(r'(?:src|href)="(/console/static/[^"]+)"', answer.text):
        with admin.get(asset) as file:
            assert file.status_code == 200 and "immutable" in file.headers["Cache-Control"]


def test_wrong_keys_and_forms_of_other_sites_are_refused(app: Flask, store: KeyStore) -> None:
    key = store.create("user", {"infer"})
    client = app.test_client()
    assert sign_in(client, "mlxq_00000000_" + "a" * 43).status_code == 401
    assert client.post("/console/sign-in", data={"key": key, "csrf_token": ""}).status_code == 403
    assert app.test_client().post("/console/sign-in", data={"key": key, "csrf_token": "x"}).status_code == 403
    assert client.get_cookie(COOKIE) is None


@pytest.mark.parametrize(
    ("target", "leads_to"),
    [("/console/jobs?status=failed", "/console/jobs?status=failed"), ("//evil.example", "/"),
     ("https://evil.example", "/"), ("/\\evil.example", "/"), ("/v1/jobs", "/"), ("javascript:alert(1)", "/")],
)  # fmt: skip
def test_the_sign_in_leads_only_to_pages_of_the_console(
    app: Flask, store: KeyStore, target: str, leads_to: str
) -> None:
    answer = sign_in(app.test_client(), store.create("user", {"infer"}), next=target)
    assert answer.status_code == 303 and answer.location == leads_to


def test_the_cookie_is_strict_and_redis_has_only_its_hash(app: Flask, redis: Redis, store: KeyStore) -> None:
    client = app.test_client()
    cookie = sign_in(client, store.create("user", {"infer"})).headers.getlist("Set-Cookie")[0]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Secure" not in cookie
    (name,) = redis.keys(keys.SESSION + "*")
    session = client.get_cookie(COOKIE)
    assert session is not None and session.value not in name + redis.get(name)
    client = app.test_client()
    client.get("/console/sign-in", base_url="https://localhost")
    assert client.get_cookie("mlxq_sign_in", path="/console").secure  # type: ignore[union-attr]


def test_unsafe_requests_of_a_session_need_its_csrf_token(admin: FlaskClient) -> None:
    assert admin.get("/v1/jobs").status_code == 200
    refused = admin.post("/v1/jobs/job_1/cancel")
    assert refused.status_code == 403 and refused.json is not None and refused.json["code"] == "csrf_token"
    assert admin.post("/v1/jobs/job_1/cancel", headers={"X-CSRF-Token": "é" * 64}).status_code == 403
    assert admin.post("/v1/jobs/job_1/cancel", headers={"X-CSRF-Token": csrf_token(admin)}).status_code == 404
    assert admin.post("/console/sign-out").status_code == 403
    assert admin.post("/console/sign-out", data={"csrf_token": csrf_token(admin)}).status_code == 303
    assert admin.get("/", headers=HTML).status_code == 302


def test_a_session_ends_when_its_key_is_revoked(app: Flask, store: KeyStore, admin: FlaskClient) -> None:
    store.revoke("root")
    assert admin.get("/", headers=HTML).status_code == 302
    assert admin.get("/v1/jobs").status_code == 401


def test_attempts_to_sign_in_are_limited(app: Flask) -> None:
    client = app.test_client()
    statuses = [client.post("/console/sign-in", data={"key": "x"}).status_code for _ in range(12)]
    assert statuses[:10] == [403] * 10 and statuses[10:] == [429, 429]
    assert client.get("/console/sign-in").status_code == 200


def test_admins_see_all_jobs_and_others_their_own(app: Flask, store: KeyStore, admin: FlaskClient) -> None:
    user = {"X-API-Key": store.create("user", {"infer"})}
    job = submit(app.extensions["mlxq"].jobs, "someone")
    for path in (f"/v1/jobs/{job.id}", f"/v1/jobs/{job.id}/request", f"/console/jobs/{job.id}"):
        assert admin.get(path, headers=HTML).status_code == 200
    anyone = app.test_client()
    assert anyone.get(f"/v1/jobs/{job.id}", headers=user).status_code == 404
    assert anyone.get(f"/v1/jobs/{job.id}/request", headers=user).status_code == 404
    assert anyone.get("/v1/jobs?key=all", headers=user).status_code == 403
    assert anyone.get("/v1/jobs?metadata=x", headers=user).status_code == 422
    assert anyone.get("/v1/jobs?status=lost", headers=user).status_code == 422


def test_an_unknown_page_and_an_unknown_job_are_pages_too(admin: FlaskClient) -> None:
    for path in ("/console/nothing", "/console/jobs/job_1"):
        answer = admin.get(path, headers=HTML)
        assert answer.status_code == 404 and "Back to the overview" in answer.text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, NONE),
        (0.0421, "42 ms"),
        (1.23, "1.2 s"),
        (59.4, "59 s"),
        (125, "2 min 5 s"),
        (7500, "2 h 5 min"),
        (180_000, "2 d 2 h"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(None, NONE), (512, "512 B"), (1536, "1.5 KiB"), (500 * 2**30, "500 GiB")])
def test_sizes(count: int | None, text: str) -> None:
    assert size(count) == text


def test_a_failed_job_runs_again_for_its_owner_unless_the_key_is_revoked(
    app: Flask, redis: Redis, store: KeyStore, admin: FlaskClient
) -> None:
    owner = store.create("user", {"infer"}).split("_")[1]
    job = submit(app.extensions["mlxq"].jobs, owner, metadata={"a": "b"})
    headers = {"X-CSRF-Token": csrf_token(admin)}
    assert admin.post(f"/v1/jobs/{job.id}/retry", headers=headers).status_code == 409
    worker = lease(redis, "w1")
    end(worker, started(worker), Ending(Status.FAILED, error_code="generation_error", error_message="It failed."))
    again = admin.post(f"/v1/jobs/{job.id}/retry", headers=headers)
    assert again.status_code == 202 and again.json is not None
    assert (again.json["key_id"], again.json["metadata"], again.json["status"]) == (owner, {"a": "b"}, "queued")
    assert again.headers["Location"] == f"/v1/jobs/{again.json['id']}"
    assert admin.get("/v1/jobs?key=all&status=failed", headers=HTML).json["data"][0]["id"] == job.id  # type: ignore[index]
    store.revoke("user")
    assert admin.post(f"/v1/jobs/{job.id}/retry", headers=headers).status_code == 409


def test_forms_offer_what_the_api_accepts(admin: FlaskClient) -> None:
    batches, webhooks = (admin.get(f"/console/{page}", headers=HTML).text for page in ("batches", "webhooks"))
    assert all(f"<option>{endpoint}</option>" in batches for endpoint in get_args(BatchEndpoint))
    assert all(f'value="{event}"' in webhooks for event in get_args(WebhookEvent))


def test_the_playground_offers_the_adapters_of_a_model(tmp_path: Path, redis: Redis) -> None:
    for folder in ("chat", "sql"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text('{"model_type": "llama"}')
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(f'[models.chat]\npath = "{tmp_path}/chat"\nadapters = {{ sql = "{tmp_path}/sql" }}\n')
    app = create_app(Settings(data_dir=tmp_path, models_file=catalog, backend="scripted", durable=False), redis)
    client = app.test_client()
    sign_in(client, app.extensions["mlxq"].keys.create("root", {"infer", "admin"}))
    page = client.get("/console/playground", headers=HTML).text
    assert '<option value="chat:sql">chat:sql (cold)</option>' in page
