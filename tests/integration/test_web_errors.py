"""Invalid requests are refused with a stable code and the name of the field, and create no job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.plugins.web_stack import WebStack, running_web

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def web() -> Iterator[WebStack]:
    with running_web(MAX_BODY_BYTES="100000") as stack:
        yield stack


def prompt(**more: Any) -> dict[str, Any]:
    return {"prompt": "hi", **more}


@pytest.mark.parametrize("path", ["/v1/jobs", "/inference"])
@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (prompt(unknown=1), "invalid_request", "unknown"),
        (prompt(max_tokens="5"), "invalid_request", "max_tokens"),
        (prompt(max_tokens=-1), "invalid_request", "max_tokens"),
        (prompt(max_tokens=0), "invalid_request", "max_tokens"),
        (prompt(temperature=3), "invalid_request", "temperature"),
        (prompt(top_p=0), "invalid_request", "top_p"),
        (prompt(stop=["a", ""]), "invalid_request", "stop[1]"),
        (prompt(priority="urgent"), "invalid_request", "priority"),
        (prompt(deadline_s=1e9), "invalid_request", "deadline_s"),
        (prompt(metadata={"a": 1}), "invalid_request", "metadata.a"),
        (prompt(model="nobody"), "model_not_found", "model"),
        ({"prompt": ""}, "invalid_request", "prompt"),
        ({"messages": []}, "invalid_request", "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "invalid_request", "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "invalid_request", "messages[0].role"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "invalid_request", "messages"),
        ({}, "invalid_request", "messages"),
    ],
)
def test_an_invalid_field_is_named(web: WebStack, path: str, body: Any, code: str, field: str) -> None:
    response = web.http.post(path, content=json.dumps(body), headers=JSON)
    problem = response.json()
    assert response.headers["Content-Type"] == "application/problem+json"
    status = 404 if code == "model_not_found" else 422
    assert (response.status_code, problem["status"], problem["code"], problem["field"]) == (status, status, code, field)
    assert problem["request_id"] == response.headers["X-Request-ID"]
    check_no_job(web)


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", JSON, 400, "invalid_json"),
        (b"[]", JSON, 400, "invalid_json"),
        (b"", JSON, 400, "invalid_json"),
        (b'{"prompt": "\xff"}', JSON, 400, "invalid_utf8"),
        (b'{"prompt": "a", "temperature": NaN}', JSON, 400, "invalid_json"),
        (b'{"prompt": "a", "prompt": "b"}', JSON, 400, "invalid_json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", JSON, 400, "invalid_json"),
        (b"[" * 20000, JSON, 400, "invalid_json"),
        (b'{"prompt": "\\ud800"}', JSON, 400, "invalid_json"),
        (b"prompt=hi", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        (b'{"prompt": "hi"}', {}, 415, "unsupported_media_type"),
        (b'{"prompt": "' + b"a" * 100_000 + b'"}', JSON, 413, "body_too_large"),
    ],
)
def test_an_unreadable_body(web: WebStack, content: bytes, headers: dict[str, str], status: int, code: str) -> None:
    response = web.http.post("/v1/jobs", content=content, headers=headers)
    assert (response.status_code, response.json()["code"]) == (status, code)
    check_no_job(web)


def test_a_chunked_body_over_the_limit(web: WebStack) -> None:
    response = web.http.post("/v1/jobs", content=iter([b"a" * 60_000] * 3), headers=JSON)
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


def test_routes_and_methods_that_do_not_exist(web: WebStack) -> None:
    missing = web.http.get("/v2/jobs")
    assert (missing.status_code, missing.json()["code"]) == (404, "route_not_found")
    wrong = web.http.put("/v1/jobs")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert wrong.headers["Allow"] == "GET, HEAD, OPTIONS, POST"


@pytest.mark.parametrize("key", ["", "wrong", "mlxq_00000000_" + "a" * 43, "é"])
def test_requests_without_a_valid_key_are_refused(web: WebStack, key: str) -> None:
    response = web.http.post("/v1/jobs", json=prompt(), headers={b"X-API-Key": key.encode()})
    assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
    assert "WWW-Authenticate" in response.headers
    check_no_job(web)


def test_invalid_headers_and_parameters_are_named(web: WebStack) -> None:
    def refused(field: str, *, headers: dict[str, str] | None = None, **params: str) -> None:
        response = web.http.get("/v1/jobs", headers=headers, params=params)
        assert (response.status_code, response.json()["field"]) == (422, field)

    refused("limit", limit="0")
    refused("limit", limit="ten")
    refused("before", before="nan")
    for value in ("x" * 256, "two words", "é"):
        response = web.http.post("/v1/jobs", json=prompt(), headers={b"Idempotency-Key": value.encode()})
        assert (response.status_code, response.json()["field"]) == (422, "Idempotency-Key")
    check_no_job(web)


def test_a_malformed_request_id_is_replaced(web: WebStack) -> None:
    for sent in ("with space", "a" * 129, "<script>"):
        assert web.http.get("/livez", headers={"X-Request-ID": sent}).headers["X-Request-ID"] != sent


def test_an_unknown_parameter_is_refused(web: WebStack) -> None:
    response = web.http.get("/v1/jobs", params={"limit": "1", "state": "running"})
    assert (response.status_code, response.json()["code"], response.json()["field"]) == (
        422,
        "unknown_parameter",
        "state",
    )
    assert web.http.get("/livez", params={"at": "1"}).status_code == 200, "probes may send any parameter"


def test_an_empty_job_id_is_not_found(web: WebStack) -> None:
    assert web.http.get("/v1/jobs//stream").status_code == 404


def test_invalid_cursors(web: WebStack) -> None:
    job = web.submit()
    for params, headers, field in (
        ({"starting_after": "-1"}, {}, "starting_after"),
        ({"starting_after": "x"}, {}, "starting_after"),
        ({}, {"Last-Event-ID": "1-0"}, "Last-Event-ID"),
    ):
        response = web.http.get(job["urls"]["stream"], params=params, headers=headers)
        assert (response.status_code, response.json()["field"]) == (422, field)
    assert web.http.get(job["urls"]["stream"], headers={"Accept": "text/html"}).status_code == 406
    assert web.http.get(job["urls"]["self"], params={"wait": "nan"}).json()["field"] == "wait"
    web.http.post(job["urls"]["cancel"])
    web.http.delete(job["urls"]["self"])


def check_no_job(web: WebStack) -> None:
    assert web.http.get("/v1/jobs").json()["data"] == []
