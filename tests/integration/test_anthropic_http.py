"""The Messages API with Anthropic's own client, over sockets: messages, streams and errors."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import pytest
from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter

from tests.plugins.web_stack import MODEL, StubWorker, WebStack, running_web
from tests.support.image_files import picture

StartWorker = Callable[..., StubWorker]
Eventually = Callable[..., None]
EVENT = TypeAdapter[Any](RawMessageStreamEvent)
MESSAGES: Any = [{"role": "user", "content": "hi"}]
_SOURCE = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(picture()).decode()}
PICTURE = [{"role": "user", "content": [{"type": "image", "source": _SOURCE}]}]
RESULT = [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "3"}]}]
TOOL = {"name": "add", "input_schema": {"type": "object"}}


@pytest.fixture(scope="module")
def web() -> Iterator[WebStack]:
    with running_web(MAX_BODY_BYTES="100000", MAX_STREAMS_PER_KEY="3") as stack:
        yield stack


def sdk(web: WebStack, key: str = "") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=web.url, api_key=key or web.key, max_retries=0)


@pytest.fixture
def client(web: WebStack) -> Iterator[anthropic.Anthropic]:
    with sdk(web) as client:
        yield client


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 9, "messages": MESSAGES, **fields}


def newest(web: WebStack) -> dict[str, Any]:
    jobs = web.http.get("/v1/jobs", params={"limit": 1}).json()["data"]
    return jobs[0] if jobs else {}


def test_a_message_and_its_stream_are_equal(client: anthropic.Anthropic, start_worker: StartWorker) -> None:
    start_worker()
    whole = client.messages.create(**body())
    with client.messages.stream(**body()) as stream:
        for event in stream:
            assert event.type != "error"
        streamed = stream.get_final_message()
    ignored = {"id"}
    assert whole.model_dump(exclude=ignored) == streamed.model_dump(exclude=ignored)
    assert (whole.stop_reason, whole.stop_sequence, whole.model) == ("max_tokens", None, MODEL)
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (3, 9)
    (block,) = whole.content
    assert block.type == "text"
    assert block.text.startswith("w0 é🙂\nw1 w2 ")


def test_the_events_of_a_stream(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    with web.http.stream("POST", "/v1/messages?beta=true", json=body(stream=True)) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        raw = response.read().decode()
    events = []
    for part in raw.split("\n\n")[:-1]:
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[3:-3]) <= {"content_block_delta", "ping"}
    for event in events:
        if event["type"] != "ping":
            EVENT.validate_python(event)


def test_the_list_of_models(client: anthropic.Anthropic, start_worker: StartWorker) -> None:
    start_worker()
    page = client.models.list()
    assert [model.id for model in page] == [MODEL]
    assert not page.has_next_page()
    model = client.models.retrieve(MODEL)
    assert (model.type, model.display_name) == ("model", MODEL)
    assert model.created_at.year > 1970
    with pytest.raises(anthropic.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")


def test_a_retry_joins_the_first_try(web: WebStack, start_worker: StartWorker, eventually: Eventually) -> None:
    worker = start_worker()
    worker.hold.set()
    before = len(web.http.get("/v1/jobs", params={"limit": 100}).json()["data"])

    def release_after_a_retry() -> None:
        eventually(lambda: web.log.read_text().count("retried-once") >= 2)
        worker.hold.clear()

    request = body(metadata={"user_id": "retried"}, extra_headers={"X-Request-ID": "retried-once"})
    with sdk(web) as client, ThreadPoolExecutor(1) as threads:
        released = threads.submit(release_after_a_retry)
        message = client.with_options(timeout=1, max_retries=5).messages.create(**request)
        released.result()
    assert message.usage.output_tokens == 9
    assert len(web.http.get("/v1/jobs", params={"limit": 100}).json()["data"]) == before + 1


def test_beta_requests(client: anthropic.Anthropic, start_worker: StartWorker) -> None:
    start_worker()
    message = client.beta.messages.create(**body(), betas=["context-management-2025-06-27", "one-of-tomorrow"])
    assert message.content[0].type == "text"


def test_ids_lead_to_the_job_and_to_the_log(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    response = web.http.post("/v1/messages", json=body(metadata={"user_id": "someone"}))
    job = web.http.get(response.headers["Location"]).json()
    assert response.json()["id"] == job["id"].replace("job_", "msg_")
    assert job["metadata"] == {"user_id": "someone"}
    assert response.headers["request-id"] == response.headers["X-Request-ID"]


def test_a_bearer_token_is_a_key(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    with anthropic.Anthropic(base_url=web.url, auth_token=web.key, max_retries=0) as client:
        assert client.messages.create(**body()).role == "assistant"


@pytest.mark.parametrize(
    ("fields", "error", "status", "message"),
    [
        ({"model": "nobody"}, anthropic.NotFoundError, 404, "nobody"),
        ({"max_tokens": 0}, anthropic.BadRequestError, 400, "max_tokens: "),
        ({"messages": []}, anthropic.BadRequestError, 400, "messages: "),
        ({"extra_body": {"colour": 1}}, anthropic.BadRequestError, 400, "colour: "),
        ({"messages": PICTURE}, anthropic.BadRequestError, 400, "stub is a text model"),
        ({"messages": RESULT}, anthropic.BadRequestError, 400, "messages[0].content[0].tool_use_id: "),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "sub"}}, anthropic.BadRequestError, 400, "sub"),
        ({"extra_query": {"colour": 1}}, anthropic.BadRequestError, 400, "colour: "),
        ({"messages": [{"role": "user", "content": "a" * 100_000}]}, anthropic.RequestTooLargeError, 413, "larger"),
        ({"extra_headers": {"Content-Type": "text/plain"}}, anthropic.APIStatusError, 415, "application/json"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(
    web: WebStack,
    start_worker: StartWorker,
    fields: dict[str, Any],
    error: type[anthropic.APIStatusError],
    status: int,
    message: str,
    stream: bool,
) -> None:
    start_worker()  # announces what the model supports
    assert web.http.get("/inference/models").is_success  # the API reads it now
    with sdk(web) as client, pytest.raises(error) as raised:
        client.with_options(timeout=20).messages.create(**body(stream=stream) | fields)
    check(raised.value, status, message)


def check(error: BaseException, status: int, message: str) -> None:
    """Check that an error is in Anthropic's format."""
    kinds = {
        400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large",
        429: "rate_limit_error", 529: "overloaded_error",
    }  # fmt: skip
    assert isinstance(error, anthropic.APIStatusError)
    assert isinstance(error.body, dict)
    details = error.body["error"]
    assert (error.status_code, error.body["type"]) == (status, "error")
    assert details["type"] == kinds.get(status, "invalid_request_error")
    assert message in details["message"]
    assert error.body["request_id"] == error.request_id


def test_a_wrong_key(web: WebStack) -> None:
    with sdk(web, "wrong") as client, pytest.raises(anthropic.AuthenticationError) as raised:
        client.messages.create(**body())
    check(raised.value, 401, "API key")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/messages", 405), ("POST", "/v1/messages/x", 404)])
def test_other_routes(web: WebStack, method: str, path: str, status: int) -> None:
    response = web.http.request(method, path)
    assert (response.status_code, response.json()["type"]) == (status, "error")


def test_a_full_queue_and_too_many_streams() -> None:
    with running_web(MAX_QUEUE="1", MAX_QUEUE_PER_KEY="5") as web, sdk(web) as client:
        web.submit(model=MODEL)
        with pytest.raises(anthropic.APIStatusError) as full:
            client.messages.create(**body())
        check(full.value, 529, "MAX_QUEUE")
        assert full.value.response.headers["Retry-After"]
    with running_web(MAX_STREAMS_PER_KEY="1") as web, sdk(web) as client:
        with client.messages.create(**body(stream=True)), pytest.raises(anthropic.RateLimitError) as limited:
            client.messages.create(**body())
        check(limited.value, 429, "maximum")


def test_a_disconnect_cancels_the_job(web: WebStack, start_worker: StartWorker, eventually: Eventually) -> None:
    start_worker().hold.set()
    with sdk(web) as client:
        with pytest.raises(anthropic.APITimeoutError):
            client.with_options(timeout=1).messages.create(**body(metadata={"user_id": "waits"}))
        eventually(lambda: newest(web)["metadata"] == {"user_id": "waits"})
        assert web.job(newest(web)["id"], wait=10)["status"] == "cancelled"
        with client.messages.create(**body(stream=True, metadata={"user_id": "streams"})) as stream:
            assert next(iter(stream)).type == "message_start"
        assert newest(web)["metadata"] == {"user_id": "streams"}
        assert web.job(newest(web)["id"], wait=10)["status"] == "cancelled"


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeated_request_gets_the_same_message(
    client: anthropic.Anthropic, start_worker: StartWorker, stream: bool
) -> None:
    start_worker()
    headers = {"Idempotency-Key": f"once-{stream}"}

    def message() -> anthropic.types.Message:
        if not stream:
            return client.messages.create(**body(), extra_headers=headers)
        with client.messages.stream(**body(), extra_headers=headers) as events:
            return events.get_final_message()

    assert message() == message()


def test_a_cancelled_job_ends_a_stream_with_an_error(web: WebStack, start_worker: StartWorker) -> None:
    start_worker().hold.set()
    with sdk(web) as client, client.messages.create(**body(stream=True)) as stream:
        events = iter(stream)
        assert next(events).type == "message_start"
        assert web.http.post(f"/v1/jobs/{newest(web)['id']}/cancel").is_success
        with pytest.raises(anthropic.APIStatusError, match="cancelled"):
            list(events)
