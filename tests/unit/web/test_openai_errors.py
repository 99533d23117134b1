"""Errors below `/v1/` that OpenAI's SDKs meet are in the format that they show to users."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from flask import Flask
from flask.testing import FlaskClient

from shared import errors
from shared.errors import MlxqError
from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from tests.unit.web.test_problems import subclasses
from web.app import create_app
from web.http import problems

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
OPENAI_PATHS = (
    "/v1/chat", "/v1/chat/completions/a", "/v1/conversations", "/v1/moderations", "/v1/uploads",
    "/v1/fine_tuning/jobs", "/v1/images/generations", "/v1/audio/speech", "/v1/modelsearch",
    "/v1/jobsearch", "/v1/",
)  # fmt: skip
NATIVE_PATHS = ("/v1/jobs/a/b", "/v1/jobs//stream", "/v2/jobs", "/inference/nothing", "/nothing", "/v1")


@pytest.fixture
def client(tmp_path: Path) -> FlaskClient:
    return create_app(Settings(data_dir=tmp_path), FakeRedis()).test_client()


@pytest.mark.parametrize("path", OPENAI_PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_a_path_that_does_not_exist_names_the_routes_that_do(client: FlaskClient, path: str, method: str) -> None:
    response = client.open(path, method=method)
    assert (response.status_code, response.content_type) == (404, "application/json")
    error = (response.json or {})["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "route_not_found")
    for part in (
        f"{method} {path}",
        "POST /inference",
        "POST /v1/jobs,",
        "GET /v1/jobs,",
        "/v1/jobs/{job_id}/stream",
        "/v1/models",
    ):
        assert part in error["message"]


@pytest.mark.parametrize("path", NATIVE_PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_other_paths_that_do_not_exist_are_problem_documents(client: FlaskClient, path: str, method: str) -> None:
    response = client.open(path, method=method)
    assert (response.status_code, response.content_type) == (404, "application/problem+json")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
@pytest.mark.parametrize(
    ("path", "allowed"), [("/v1/models", "GET, HEAD, OPTIONS"), ("/v1/models/a", "DELETE, GET, HEAD, OPTIONS")]
)
def test_a_method_that_a_route_does_not_have(client: FlaskClient, method: str, path: str, allowed: str) -> None:
    response = client.open(path, method=method)
    assert (response.status_code, response.headers["Allow"]) == (405, allowed)
    assert (response.json or {})["error"]["code"] == "method_not_allowed"
    assert client.put("/v1/jobs").content_type == "application/problem+json"


def test_a_missing_key(client: FlaskClient) -> None:
    response = client.get("/v1/models")
    assert (response.status_code, (response.json or {})["error"]["type"]) == (401, "authentication_error")
    assert "WWW-Authenticate" in response.headers


@pytest.mark.parametrize("kind", subclasses())
def test_every_error_has_both_formats(kind: type[MlxqError]) -> None:
    app = Flask("test")
    problems.register(app)

    def view(path: str) -> str:
        raise kind("What happened.", field="f", retry_after=5)

    app.add_url_rule("/<path:path>", view_func=view)
    response, native = app.test_client().get("/v1/models"), app.test_client().get("/v1/jobs")
    assert (native.status_code, response.status_code) == (kind.status, 400 if kind.status == 422 else kind.status)
    assert response.headers["Retry-After"] == native.headers["Retry-After"] == "5"
    error = (response.json or {})["error"]
    assert (error["message"], error["param"], error["code"]) == ("What happened.", "f", kind.code)
    assert (native.json or {})["code"] == kind.code


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (errors.Unavailable("", retry_after=1), "true"),
        (errors.RateLimited(""), "true"),
        (errors.RequestTimeout(""), "true"),
        (errors.Conflict("The job was cancelled."), "false"),
        (errors.Expired(""), "false"),
        (errors.Internal("The job failed."), "false"),
        (errors.Invalid(""), None),
        (errors.NotFound(""), None),
    ],
)
def test_clients_repeat_only_requests_that_may_succeed_later(error: MlxqError, retry: str | None) -> None:
    app = Flask("test")
    problems.register(app)

    @app.get("/v1/models")
    def view() -> str:
        raise error

    assert app.test_client().get("/v1/models").headers.get("X-Should-Retry") == retry


def test_an_error_of_the_service_is_a_server_error() -> None:
    app = Flask("test")
    problems.register(app)

    @app.get("/v1/models")
    def view() -> str:
        raise redis.ConnectionError("host:6379")

    error = (app.test_client().get("/v1/models").json or {})["error"]
    assert (error["type"], error["code"]) == ("server_error", errors.Unavailable.code)
    assert "6379" not in error["message"]
