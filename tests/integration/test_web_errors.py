"""Bad input is refused with a stable code and the field named, and nothing is enqueued."""

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
        ({"prompt": "\ud800"}, "invalid_request", "prompt"),
    ],
)
def test_a_field_that_does_not_fit(web: WebStack, path: str, body: Any, code: str, field: str) -> None:
    answer = web.http.post(path, content=json.dumps(body), headers=JSON)
    problem = answer.json()
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (answer.status_code, problem["status"], problem["code"], problem["field"]) == (422, 422, code, field)
    assert problem["request_id"] == answer.headers["X-Request-ID"]
    nothing_enqueued(web)


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
        (b"prompt=hi", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        (b'{"prompt": "hi"}', {}, 415, "unsupported_media_type"),
        (b'{"prompt": "' + b"a" * 100_000 + b'"}', JSON, 413, "body_too_large"),
    ],
)
def test_a_body_that_cannot_be_read(
    web: WebStack, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    answer = web.http.post("/v1/jobs", content=content, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    nothing_enqueued(web)


def test_a_chunked_body_over_the_limit(web: WebStack) -> None:
    answer = web.http.post("/v1/jobs", content=iter([b"a" * 60_000] * 3), headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_routes_and_methods_that_do_not_exist(web: WebStack) -> None:
    missing = web.http.get("/v2/jobs")
    assert (missing.status_code, missing.json()["code"]) == (404, "route_not_found")
    wrong = web.http.put("/v1/jobs")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert wrong.headers["Allow"] == "GET, HEAD, OPTIONS, POST"


@pytest.mark.parametrize("key", ["", "wrong", "mlxq_00000000_" + "a" * 43, "é"])
def test_no_key_no_service(web: WebStack, key: str) -> None:
    answer = web.http.post("/v1/jobs", json=prompt(), headers={b"X-API-Key": key.encode()})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert "WWW-Authenticate" in answer.headers
    nothing_enqueued(web)


def test_headers_and_parameters_that_do_not_fit(web: WebStack) -> None:
    def refused(field: str, *, headers: dict[str, str] | None = None, **params: str) -> None:
        answer = web.http.get("/v1/jobs", headers=headers, params=params)
        assert (answer.status_code, answer.json()["field"]) == (422, field)

    refused("limit", limit="0")
    refused("limit", limit="ten")
    refused("before", before="nan")
    for value in ("x" * 256, "two words", "é"):
        answer = web.http.post("/v1/jobs", json=prompt(), headers={b"Idempotency-Key": value.encode()})
        assert (answer.status_code, answer.json()["field"]) == (422, "Idempotency-Key")
    nothing_enqueued(web)


def test_a_request_id_that_is_not_well_formed_is_replaced(web: WebStack) -> None:
    for sent in ("with space", "a" * 129, "<script>"):
        assert web.http.get("/livez", headers={"X-Request-ID": sent}).headers["X-Request-ID"] != sent


def test_a_parameter_that_nobody_reads_is_refused(web: WebStack) -> None:
    answer = web.http.get("/v1/jobs", params={"limit": "1", "status": "running"})
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (422, "unknown_parameter", "status")
    assert web.http.get("/livez", params={"at": "1"}).status_code == 200, "probes may carry what they like"


def test_an_empty_job_id_is_no_job(web: WebStack) -> None:
    assert web.http.get("/v1/jobs//stream").status_code == 404


def test_cursors_that_are_none(web: WebStack) -> None:
    job = web.submit()
    for params, headers, field in (
        ({"starting_after": "-1"}, {}, "starting_after"),
        ({"starting_after": "x"}, {}, "starting_after"),
        ({}, {"Last-Event-ID": "1-0"}, "Last-Event-ID"),
    ):
        answer = web.http.get(job["urls"]["stream"], params=params, headers=headers)
        assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert web.http.get(job["urls"]["stream"], headers={"Accept": "text/html"}).status_code == 406
    assert web.http.get(job["urls"]["self"], params={"wait": "nan"}).json()["field"] == "wait"
    web.http.post(job["urls"]["cancel"])
    web.http.delete(job["urls"]["self"])


def nothing_enqueued(web: WebStack) -> None:
    assert web.http.get("/v1/jobs").json()["data"] == []
