"""OpenAI's client shows a clear error for each kind of invalid request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest

from tests.plugins.web_stack import MODEL, StubWorker, WebStack, running_web
from tests.support.image_files import data_url, picture

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TURN: Any = {"role": "user", "content": "hi"}
MESSAGES: Any = [TURN]
TOOL: Any = {"type": "function", "function": {"name": "add"}}
CALL: Any = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
PIXEL = data_url(picture(32, 32))
BROKEN_CALL: Any = CALL | {"function": {"name": "add", "arguments": "{"}}


@pytest.fixture(scope="module")
def web() -> Iterator[WebStack]:
    with running_web(MAX_BODY_BYTES="200000", QUEUE_BYTES_PER_KEY="2000000") as web:
        worker = StubWorker(web.redis_url)
        worker.announce()
        worker.start()
        try:
            yield web
        finally:
            worker.stop()


@pytest.fixture
def client(web: WebStack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{web.url}/v1", api_key=web.key, max_retries=0) as client:
        yield client


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}


INVALID: list[tuple[dict[str, Any], str | None]] = [
    ({"model": "nobody"}, "model"),
    ({"temprature": 1}, "temprature"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"temperature": "hot"}, "temperature"),
    ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [TURN, {"role": "assistant", "content": "Well"}]}, "messages"),
    ({"messages": [TURN, {"role": "tool", "tool_call_id": "none", "content": "3"}]}, "messages"),
    (
        {"messages": [TURN, {"role": "assistant", "tool_calls": [BROKEN_CALL]}]},
        "messages[1].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]}, "model"),
    ({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]}, "messages[0].content[0].type"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"stop": [""]}, "stop[0]"),
    ({"n": 0}, "n"),
    ({"n": 100, "max_tokens": 4000}, "max_tokens"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": json_schema("object")}, "response_format.json_schema.schema"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), INVALID)
@pytest.mark.parametrize("stream", [False, True])
def test_invalid_requests_name_the_field_and_leave_nothing(
    web: WebStack, client: openai.OpenAI, fields: dict[str, Any], param: str | None, stream: bool
) -> None:
    before = web.http.get("/v1/jobs").json()["data"]
    body = {"model": MODEL, "messages": MESSAGES, "stream": stream, **fields}
    if "stream_options" in fields:
        body["stream"] = False
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    error = caught.value
    assert error.param == param, error.message
    assert error.status_code == (404 if "model" in fields else 400)
    assert error.type == "invalid_request_error" and error.code
    assert isinstance(error.body, dict) and set(error.body) == {"message", "type", "param", "code"}
    assert web.http.get("/v1/jobs").json()["data"] == before


@pytest.mark.parametrize(
    "schema", [nested(200), {"enum": [str(number) * 50 for number in range(5000)]}, nested(20)], ids=str
)
def test_extreme_schemas_are_answered_in_time(web: WebStack, schema: Any) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "response_format": json_schema(schema), "max_tokens": 1}
    assert web.http.post(CHAT, json=body).status_code in (200, 400, 413)


def refused(response: httpx2.Response, status: int, kind: str, code: str) -> None:
    assert (response.status_code, response.headers["Content-Type"]) == (status, "application/json")
    error = response.json()["error"]
    assert (error["type"], error["code"]) == (kind, code) and error["message"]
    assert response.headers["X-Request-ID"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_errors_of_http(web: WebStack, path: str) -> None:
    invalid = "invalid_request_error"
    post: Callable[..., httpx2.Response] = web.http.post
    refused(httpx2.post(web.url + path, json={}), 401, "authentication_error", "unauthorized")
    key = {"Authorization": "Bearer mlxq_00000000_" + "x" * 43}
    refused(httpx2.post(web.url + path, json={}, headers=key), 401, "authentication_error", "unauthorized")
    refused(web.http.get(path), 405, invalid, "method_not_allowed")
    refused(post(path + "/x", json={}), 404, invalid, "route_not_found")
    refused(post(path, content=b"{", headers={"Content-Type": "application/json"}), 400, invalid, "invalid_json")
    refused(post(path, content=b"[1]", headers={"Content-Type": "application/json"}), 400, invalid, "invalid_json")
    refused(post(path, content=b"x", headers={"Content-Type": "text/plain"}), 415, invalid, "unsupported_media_type")
    refused(post(path, json={"messages": "x" * 300000}), 413, invalid, "body_too_large")
    refused(post(path, json={}, params={"a": "b"}), 400, invalid, "unknown_parameter")
    refused(post(path, json={"surprise": 1}), 400, invalid, "invalid_request")


def test_a_full_queue_can_be_tried_again_later() -> None:
    with running_web(MAX_QUEUE="1", MAX_QUEUE_PER_KEY="1", RATE_LIMIT="6/minute") as web:
        web.submit(model=MODEL)
        body = {"model": MODEL, "messages": MESSAGES}
        full = web.http.post(CHAT, json=body)
        refused(full, 429, "rate_limit_error", "key_queue_full")
        assert (full.headers["X-Should-Retry"], int(full.headers["Retry-After"]) > 0) == ("true", True)
        limited = [web.http.post(CHAT, json=body) for _ in range(8)][-1]
        refused(limited, 429, "rate_limit_error", "rate_limited")
        assert (limited.headers["X-Should-Retry"], int(limited.headers["Retry-After"]) > 0) == ("true", True)
        web.stop_redis()
        away = web.http.post(CHAT, json=body)
        refused(away, 503, "server_error", "unavailable")
        assert away.headers["X-Should-Retry"] == "true"
        web.start_redis()


def test_a_job_that_did_not_succeed_is_not_repeated(eventually: Callable[..., None]) -> None:
    with running_web() as web, openai.OpenAI(base_url=f"{web.url}/v1", api_key=web.key, max_retries=3) as client:
        for stream in (False, True):
            marker = {"stream": str(stream)}

            def ask(stream: bool = stream, marker: dict[str, str] = marker) -> None:
                answer: Any = client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, stream=stream, metadata=marker
                )
                assert "".join(map(str, answer))

            def jobs(marker: dict[str, str] = marker) -> list[Any]:
                return [job for job in web.http.get("/v1/jobs").json()["data"] if job["metadata"] == marker]

            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(ask)
                eventually(jobs)
                web.http.post(jobs()[0]["urls"]["cancel"])
                error = answer.exception(30)
            assert isinstance(error, openai.APIError) and error.code == "job_cancelled"
            assert isinstance(error, openai.ConflictError) != stream
            assert len(jobs()) == 1
