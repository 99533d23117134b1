"""Errors as answers: all that may be told, nothing that may not."""

from __future__ import annotations

import pytest
import redis
from flask import Flask
from flask.testing import FlaskClient

from shared import errors
from shared.errors import MlxqError
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.queue.redis import Redis
from shared.settings import Settings
from web.http import problems
from web.http.request_id import Correlation


def kinds(of: type[MlxqError] = MlxqError) -> list[type[MlxqError]]:
    return [kind for each in of.__subclasses__() for kind in (each, *kinds(each))]


@pytest.fixture
def app() -> Flask:
    app = Flask("test")
    app.wsgi_app = Correlation(app.wsgi_app)  # type: ignore[method-assign]
    problems.register(app)
    return app


def raising(app: Flask, error: Exception) -> FlaskClient:
    @app.get("/")
    def view() -> str:
        raise error

    return app.test_client()


@pytest.mark.parametrize("kind", kinds())
def test_every_error_of_ours_is_a_problem(app: Flask, kind: type[MlxqError]) -> None:
    answer = raising(app, kind("What happened.", field="f", retry_after=0.2)).get("/", headers={"X-Request-ID": "r"})
    assert answer.content_type == "application/problem+json"
    assert answer.status_code == kind.status
    assert answer.json == {
        "type": f"urn:mlxq:problem:{kind.code}",
        "title": kind.title,
        "status": kind.status,
        "detail": "What happened.",
        "code": kind.code,
        "field": "f",
        "request_id": "r",
    }
    assert answer.headers["Retry-After"] == "1"
    assert ("WWW-Authenticate" in answer.headers) == (kind is errors.Unauthorized)


def test_a_fault_of_ours_is_logged_and_not_told(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    answer = raising(app, RuntimeError("/secret/path")).get("/")
    assert (answer.status_code, answer.json["code"]) == (500, "internal")  # type: ignore[index]
    assert "secret" not in answer.text
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
def test_redis_away_means_try_again(app: Flask, error: redis.RedisError) -> None:
    answer = raising(app, error).get("/")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json["code"] == "unavailable" and "6379" not in answer.text  # type: ignore[index]


def test_a_redis_without_memory_is_told_apart(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    answer = raising(app, redis.exceptions.OutOfMemoryError("used memory > 'maxmemory'")).get("/")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
    assert answer.json["code"] == "queue_memory_full" and "maxmemory" not in answer.text  # type: ignore[index]
    assert caplog.records[-1].levelname == "ERROR"


def test_a_fault_in_what_redis_was_asked_is_ours(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    answer = raising(app, redis.ResponseError("ERR user_script:12: attempt to index a nil value")).get("/")
    assert (answer.status_code, answer.json["code"]) == (500, "internal")  # type: ignore[index]
    assert "Retry-After" not in answer.headers and "user_script" not in answer.text
    assert caplog.records[-1].exc_info is not None and "nil value" in caplog.text


def test_a_redis_without_memory_refuses_a_job_with_that_code(
    app: Flask, valkey_client: Redis, settings: Settings
) -> None:
    jobs = Jobs(valkey_client, settings)

    @app.get("/")
    def view() -> str:
        jobs.create(Submission(Request("m", 1, Sampling(0.0), prompt="hi"), owner="me"))
        return ""

    before = valkey_client.config_get("maxmemory")["maxmemory"]
    valkey_client.config_set("maxmemory", 1)
    try:
        answer = app.test_client().get("/")
    finally:
        valkey_client.config_set("maxmemory", before)
    assert (answer.status_code, answer.json["code"]) == (503, "queue_memory_full")  # type: ignore[index]


def test_a_request_id_is_made_when_none_fits(app: Flask) -> None:
    client = app.test_client()
    made = client.get("/nothing", headers={"X-Request-ID": "no spaces allowed"})
    assert made.json["request_id"] == made.headers["X-Request-ID"] != "no spaces allowed"  # type: ignore[index]
    assert client.get("/nothing", headers={"X-Request-ID": "a.b-C_9"}).headers["X-Request-ID"] == "a.b-C_9"
