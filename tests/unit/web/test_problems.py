"""Error responses: complete, and without internal details."""

from __future__ import annotations

import pytest
import redis
from flask import Flask
from flask.testing import FlaskClient
from pydantic import ValidationError

from shared import errors
from shared.errors import MlxqError
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs
from shared.jobs.submission import Submission
from shared.redis.client import Redis
from shared.settings import Settings
from web.http import problems
from web.http.request_id import RequestIdMiddleware
from web.schemas.models import LoadRequest
from web.schemas.requests import JobRequest


def subclasses(parent: type[MlxqError] = MlxqError) -> list[type[MlxqError]]:
    return [kind for child in parent.__subclasses__() for kind in (child, *subclasses(child))]


@pytest.fixture
def app() -> Flask:
    app = Flask("test")
    app.wsgi_app = RequestIdMiddleware(app.wsgi_app)  # type: ignore[method-assign]
    problems.register(app)
    return app


def raising(app: Flask, error: Exception) -> FlaskClient:
    @app.get("/")
    def view() -> str:
        raise error

    return app.test_client()


@pytest.mark.parametrize("kind", subclasses())
def test_every_mlxq_error_is_a_problem(app: Flask, kind: type[MlxqError]) -> None:
    response = raising(app, kind("What happened.", field="f", retry_after=0.2)).get("/", headers={"X-Request-ID": "r"})
    assert response.content_type == "application/problem+json"
    assert response.status_code == kind.status
    assert response.json == {
        "type": f"urn:mlxq:problem:{kind.code}",
        "title": kind.title,
        "status": kind.status,
        "detail": "What happened.",
        "code": kind.code,
        "field": "f",
        "request_id": "r",
    }
    assert response.headers["Retry-After"] == "1"
    assert ("WWW-Authenticate" in response.headers) == (kind is errors.Unauthorized)


def test_an_unexpected_error_is_logged_but_not_revealed(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    response = raising(app, RuntimeError("/secret/path")).get("/")
    assert (response.status_code, response.json["code"]) == (500, "internal")  # type: ignore[index]
    assert "secret" not in response.text
    assert caplog.records[-1].exc_info is not None and "/secret/path" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("host:6379"),
        redis.TimeoutError(),
        redis.BusyLoadingError(),
        redis.ReadOnlyError(),
        redis.ResponseError("MISCONF Redis is configured to save snapshots"),
        redis.ResponseError("BUSY Redis is busy running a script"),
    ],
)
def test_an_unavailable_redis_is_503_with_a_retry_time(app: Flask, error: redis.RedisError) -> None:
    response = raising(app, error).get("/")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert response.json["code"] == "unavailable" and "6379" not in response.text  # type: ignore[index]


def test_a_redis_without_memory_has_a_code_of_its_own(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    response = raising(app, redis.exceptions.OutOfMemoryError("used memory > 'maxmemory'")).get("/")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "10")
    assert response.json["code"] == "queue_memory_full" and "maxmemory" not in response.text  # type: ignore[index]
    assert caplog.records[-1].levelname == "ERROR"


def test_an_error_in_a_script_is_an_internal_error(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    response = raising(app, redis.ResponseError("ERR user_script:12: attempt to index a nil value")).get("/")
    assert (response.status_code, response.json["code"]) == (500, "internal")  # type: ignore[index]
    assert "Retry-After" not in response.headers and "user_script" not in response.text
    assert caplog.records[-1].exc_info is not None and "nil value" in caplog.text


def test_a_redis_without_memory_refuses_a_job(app: Flask, valkey_client: Redis, settings: Settings) -> None:
    jobs = Jobs(valkey_client, settings)

    @app.get("/")
    def view() -> str:
        jobs.create(Submission(Request("m", 1, Sampling(0.0), prompt="hi"), owner="me"))
        return ""

    before = valkey_client.config_get("maxmemory")["maxmemory"]
    valkey_client.config_set("maxmemory", 1)
    try:
        response = app.test_client().get("/")
    finally:
        valkey_client.config_set("maxmemory", before)
    assert (response.status_code, response.json["code"]) == (503, "queue_memory_full")  # type: ignore[index]


def test_a_request_id_is_generated_unless_the_client_sends_a_valid_one(app: Flask) -> None:
    client = app.test_client()
    generated = client.get("/nothing", headers={"X-Request-ID": "no spaces allowed"})
    assert generated.json["request_id"] == generated.headers["X-Request-ID"] != "no spaces allowed"  # type: ignore[index]
    assert client.get("/nothing", headers={"X-Request-ID": "a.b-C_9"}).headers["X-Request-ID"] == "a.b-C_9"


def test_an_unknown_field_is_called_unknown(app: Flask) -> None:
    with pytest.raises(ValidationError) as caught:
        LoadRequest.model_validate({"model": "m", "modell": "n"})
    response = raising(app, caught.value).get("/")
    assert response.json is not None
    assert response.json["detail"] == "modell: Unknown field. Remove it, or correct its name"
    assert response.json["errors"][0]["code"] == "extra_forbidden"


@pytest.mark.parametrize("field", ["webhook_events", "response_format", "logit_bias", "metadata"])
def test_details_of_invalid_fields_name_no_classes(field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        JobRequest.model_validate({"prompt": "hi", field: 5})
    assert all(found.field == field for found in problems.errors_of(caught.value))
    assert not any(word in found.detail for found in problems.errors_of(caught.value) for word in ("instance", "dict"))
