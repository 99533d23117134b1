"""Stored and background responses with OpenAI's client, on disk and in Redis, and with processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import Response

from shared.jobs.readers import GRACE_S
from shared.redis import keys
from tests.plugins.stack import Stack, made_stack
from tests.support.receivers import Receiver
from tests.support.responses import Json, checked, kinds, known
from tests.support.waiting import eventually
from web.access.api_keys import SCOPES, KeyStore
from web.webhooks.receivers import Receivers

CALL = f"<tool_call>\n{json.dumps({'name': 'add', 'arguments': {'a': 1}})}\n</tool_call>"
ANSWER = f"<think>One, and « é🙂 », and two.</think>\n\nI call the tool, and I say so in a few more words.\n{CALL}"
SLOW = "!every=0.05"
SCRIPT = (
    {"match": "^slow", "text": ANSWER, "directives": SLOW},
    {"match": "^endless", "text": "word " * 2000, "directives": SLOW},
    {"match": "first question.*It is 1\\..*second question", "in": "any", "text": "I remember."},
    {"match": "first question", "text": "It is 1."},
    {"match": "^sum: 3$", "text": "The sum is 3."},
    {"match": "^fail", "text": "one two three", "directives": "!row-fails=2"},
    {"match": "^count", "text": "one two three four five"},
)
TOOL: Any = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}


@pytest.fixture(scope="module", params=["disk", pytest.param("redis", marks=pytest.mark.long)])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    script = tmp_path_factory.mktemp("script") / "script.jsonl"
    script.write_text("\n".join(map(json.dumps, SCRIPT)))
    variables = {
        "BACKEND": "scripted",
        "SCRIPT_FILE": str(script),
        "LEASE_S": "1",
        "RESPONSES_STORE": request.param,
        "WEBHOOK_NETWORKS": "127.0.0.1/32",
    }
    for stack in made_stack(Path("fake"), variables):
        stack.start_web()
        stack.start_worker()
        stack.start_background()
        yield stack


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.key, max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, text: Any, **fields: Any) -> Any:
    return client.responses.create(model="fake", input=text, **fields)


def ended(client: openai.OpenAI, response_id: str) -> Response:
    def read() -> Response | None:
        response = client.responses.retrieve(response_id)
        return None if response.status in ("queued", "in_progress") else response

    found = eventually(read, "the response has ended")
    assert found is not None
    return found


def wait_until_stored(stack: Stack) -> None:
    eventually(lambda: not stack.redis.zcard(keys.UNANSWERED), "all answers are stored")


def refusal(kind: type[openai.APIStatusError], call: Any) -> tuple[str | None, str | None]:
    """Return the code and the param of the error of a call."""
    with pytest.raises(kind) as refused:
        call()
    return refused.value.code, refused.value.param


def test_a_conversation_is_continued_from_the_log_and_from_the_store(client: openai.OpenAI, stack: Stack) -> None:
    first = create(client, "the first question", instructions="Be brief.")
    second = create(client, "the second question", previous_response_id=first.id)
    assert (first.output_text, second.output_text) == ("It is 1.", "I remember.")
    wait_until_stored(stack)
    again = create(client, "the second question", previous_response_id=first.id)
    assert again.output_text == "I remember." and again.previous_response_id == first.id
    assert client.responses.retrieve(second.id).to_dict() == second.to_dict()
    items = client.responses.input_items.list(second.id, order="asc", limit=2)
    texts = [item.content[0].text for item in items if item.type == "message"]  # type: ignore[union-attr]
    assert texts == ["the first question", "It is 1.", "the second question"], "the pages of the whole conversation"
    client.responses.delete(first.id)
    assert refusal(openai.NotFoundError, lambda: client.responses.retrieve(first.id)) == ("response_not_found", None)
    for continued in (first, second):
        call = lambda continued=continued: create(client, "x", previous_response_id=continued.id)  # noqa: E731
        assert refusal(openai.NotFoundError, call) == ("response_not_found", "previous_response_id")
    assert client.responses.retrieve(second.id).output_text == "I remember."


def test_an_expired_response_is_gone(client: openai.OpenAI, stack: Stack) -> None:
    first = create(client, "the first question")
    second = create(client, "the second question", previous_response_id=first.id)
    wait_until_stored(stack)
    for path in (stack.home / "data").glob(f"responses/*/{first.id}.request.json"):
        os.utime(path, (0, 0))
    for name in stack.redis.scan_iter(f"{keys.RESPONSE}*{first.id}"):
        stack.redis.expire(name, 0)
    assert refusal(openai.NotFoundError, lambda: client.responses.retrieve(first.id)) == ("response_not_found", None)
    for continued in (first, second):
        call = lambda continued=continued: create(client, "x", previous_response_id=continued.id)  # noqa: E731
        assert refusal(openai.NotFoundError, call) == ("response_not_found", "previous_response_id")


def test_an_answer_outlives_its_job(client: openai.OpenAI, stack: Stack) -> None:
    first = create(client, "the first question")
    wait_until_stored(stack)
    for prefix in (keys.JOB, keys.LOG, keys.OUTPUT):
        stack.redis.delete(prefix + first.id.replace("resp_", "job_"))
    assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
    with pytest.raises(openai.APIStatusError) as gone:
        client.responses.retrieve(first.id, stream=True)
    assert (gone.value.status_code, gone.value.code) == (410, "log_expired")
    assert create(client, "the second question", previous_response_id=first.id).output_text == "I remember."
    client.responses.delete(first.id)


@pytest.mark.long
def test_a_stream_that_lost_its_client_can_be_resumed_for_some_seconds(client: openai.OpenAI) -> None:
    """Reading it again keeps the job; without a reader it is cancelled after the grace period."""
    with create(client, "endless", stream=True) as stream:
        first = next(stream)
    events = client.responses.retrieve(first.response.id, stream=True, starting_after=0)
    deltas, opened_at = 0, time.monotonic()
    for event in events:
        deltas += event.type == "response.output_text.delta"
        if deltas > 20 and time.monotonic() - opened_at > GRACE_S + 2:
            break
    assert client.responses.retrieve(first.response.id).status == "in_progress"
    events.close()
    assert ended(client, first.response.id).status == "cancelled"


def test_the_output_of_a_function_continues_a_response(client: openai.OpenAI) -> None:
    first = create(client, "slow", tools=[TOOL])
    (call,) = [item for item in first.output if item.type == "function_call"]
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sum: 3"}]
    second = create(client, result, previous_response_id=first.id, tools=[TOOL])
    assert second.output_text == "The sum is 3."
    result[0]["call_id"] = "call_of_nobody"
    wrong = lambda: create(client, result, previous_response_id=first.id, tools=[TOOL])  # noqa: E731
    assert refusal(openai.BadRequestError, wrong) == ("invalid_request", "input[0].call_id")


def test_items_of_stored_responses_can_be_referenced(client: openai.OpenAI) -> None:
    first = create(client, "slow", tools=[TOOL])
    (call,) = [item for item in first.output if item.type == "function_call"]
    references: Any = [{"type": "item_reference", "id": item.id} for item in first.output]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sum: 3"}
    user: Any = {"role": "user", "content": "slow"}
    second = create(client, [user, *references, output], tools=[TOOL])
    assert second.output_text == "The sum is 3."
    items = client.responses.input_items.list(second.id, order="asc")
    assert [item.type for item in items] == ["message", *(item.type for item in first.output), output["type"]]
    for unknown in (f"{call.id}9", "msg_1"):
        wrong: Any = [user, {"type": "item_reference", "id": unknown}]
        call_it = lambda wrong=wrong: create(client, wrong)  # noqa: E731
        assert refusal(openai.NotFoundError, call_it) == ("item_not_found", "input[1]")


def test_another_key_cannot_see_a_response(client: openai.OpenAI, stack: Stack) -> None:
    response = create(client, "count")
    other = KeyStore(stack.home / "data/keys.json").create("other", SCOPES)
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=other, max_retries=0) as stranger:
        for call in (
            lambda: stranger.responses.retrieve(response.id),
            lambda: stranger.responses.delete(response.id),
            lambda: stranger.responses.cancel(response.id),
            lambda: stranger.responses.input_items.list(response.id),
        ):
            assert refusal(openai.NotFoundError, call) == ("response_not_found", None)
        continued = lambda: create(stranger, "x", previous_response_id=response.id)  # noqa: E731
        assert refusal(openai.NotFoundError, continued) == ("response_not_found", "previous_response_id")


def test_without_store_nothing_is_left(client: openai.OpenAI, stack: Stack) -> None:
    def stored() -> set[str]:
        files = (str(path) for path in (stack.home / "data").glob("responses/*/*"))
        return {*stack.redis.scan_iter("mlxq:response:*"), *files}

    wait_until_stored(stack)
    before = stored()
    response = create(client, "count", store=False)
    assert refusal(openai.NotFoundError, lambda: client.responses.retrieve(response.id)) == ("response_not_found", None)
    assert stored() == before and not stack.redis.zcard(keys.UNANSWERED)


def test_a_repeated_request_is_stored_once_and_a_refused_one_not_at_all(client: openai.OpenAI, stack: Stack) -> None:
    def stored() -> int:
        files = [*(stack.home / "data").glob("responses/*/*.request.json")]
        return len(files) + len([*stack.redis.scan_iter(f"{keys.RESPONSE}*")])

    before, headers = stored(), {"Idempotency-Key": "once"}
    first = create(client, "count", extra_headers=headers)
    assert create(client, "count", extra_headers=headers).to_dict() == first.to_dict()
    other = lambda: create(client, "another text", extra_headers=headers)  # noqa: E731
    assert refusal(openai.BadRequestError, other) == ("idempotency_key_reused", "Idempotency-Key")
    assert stored() == before + 1
    wait_until_stored(stack)


def test_a_background_response(client: openai.OpenAI, stack: Stack) -> None:
    queued = create(client, "slow", tools=[TOOL], background=True)
    assert (queued.status, queued.output, queued.background) == ("queued", [], True)
    too_early = lambda: create(client, "x", previous_response_id=queued.id)  # noqa: E731
    assert refusal(openai.ConflictError, too_early) == ("response_active", "previous_response_id")
    assert refusal(openai.ConflictError, lambda: client.responses.delete(queued.id)) == ("response_active", None)
    finished = ended(client, queued.id)
    undisturbed = create(client, "slow", tools=[TOOL])
    assert known(finished) == {**known(undisturbed), "background": True}
    assert refusal(openai.ConflictError, lambda: client.responses.cancel(finished.id)) == ("response_ended", None)
    not_in_background = lambda: client.responses.cancel(undisturbed.id)  # noqa: E731
    assert refusal(openai.BadRequestError, not_in_background) == ("invalid_request", "background")


def test_cancelling(client: openai.OpenAI, stack: Stack) -> None:
    queued = create(client, "endless", background=True)
    events = client.responses.retrieve(queued.id, stream=True)
    eventually(lambda: next(events).type == "response.output_text.delta", "the answer has begun")
    cancelled = client.responses.cancel(queued.id)
    assert cancelled.status == "cancelled" and cancelled.output_text.startswith("word")
    assert client.responses.cancel(queued.id).to_dict() == cancelled.to_dict(), "again: nothing changes"
    *_, last = checked(client.responses.retrieve(queued.id, stream=True))
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
    wait_until_stored(stack)
    assert client.responses.retrieve(queued.id).to_dict() == cancelled.to_dict()


def test_a_response_that_fails(client: openai.OpenAI) -> None:
    failed = ended(client, create(client, "fail", background=True).id)
    assert failed.status == "failed" and failed.error is not None and failed.error.code == "server_error"
    (message,) = failed.output
    assert message.type == "message" and message.status == "incomplete"
    *_, last = checked(client.responses.retrieve(failed.id, stream=True))
    assert (last["type"], last["response"]) == ("response.failed", failed.to_dict())
    with pytest.raises(openai.InternalServerError):
        create(client, "fail")


def test_ends_of_background_responses_are_events_for_webhooks(client: openai.OpenAI, stack: Stack) -> None:
    kinds = ("completed", "incomplete", "failed", "cancelled")
    receivers = Receivers(stack.redis)
    with Receiver() as receiver:
        endpoint = receivers.register(receiver.url, [f"response.{kind}" for kind in kinds], "")
        create(client, "count")  # the client has its answer
        cut = create(client, "count", background=True, max_output_tokens=2)
        ids = [create(client, text, background=True).id for text in ("count", "fail", "endless")]
        client.responses.cancel(ids[-1])
        eventually(lambda: len(receiver.confirmed) == 4, "all webhooks arrive")
        secret = endpoint.secrets[0].text
        events = [client.webhooks.unwrap(each.body, each.headers, secret=secret) for each in receiver.received]
        receivers.remove(endpoint.id)
    sent = {(event.type, event.data.id) for event in events}
    expected = zip(("completed", "failed", "cancelled", "incomplete"), [*ids, cut.id], strict=True)
    assert sent == {(f"response.{kind}", response_id) for kind, response_id in expected}


def test_starting_after(client: openai.OpenAI, stack: Stack) -> None:
    response = create(client, "count")
    events = checked(client.responses.retrieve(response.id, stream=True))
    assert kinds(events)[:2] == ["created", "in_progress"]
    last = events[-1]["sequence_number"]
    assert checked(client.responses.retrieve(response.id, stream=True, starting_after=last)) == []
    with client.responses.stream(response_id=response.id, starting_after=2) as stream:
        numbers = [event.sequence_number for event in stream]  # type: ignore[union-attr]
        assert numbers == list(range(3, last + 1))
        assert stream.get_final_response().output_text == response.output_text
    for text in (str(last + 1), "x", "-1"):
        extra = {"stream": "true", "starting_after": text}
        call = lambda extra=extra: client.responses.retrieve(response.id, extra_query=extra)  # noqa: E731
        assert refusal(openai.BadRequestError, call)[1] == "starting_after"


def kill_all(stack: Stack) -> None:
    for process in stack.processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("background", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_stream_is_resumed_after_api_and_worker_were_killed(
    client: openai.OpenAI, stack: Stack, background: bool
) -> None:
    """The events after every number are the same, whatever died in between."""
    undisturbed = checked(create(client, "slow", tools=[TOOL], background=background, stream=True))
    received: list[Json] = []
    with suppress(httpx2.HTTPError, openai.APIError):  # the connection breaks
        for event in create(client, "slow", tools=[TOOL], background=background, stream=True):
            received.append(event.to_dict())
            if event.type == "response.output_text.delta":
                kill_all(stack)
    assert received[-1]["type"] == "response.output_text.delta"
    stack.start_web()
    stack.start_worker()
    stack.start_background()
    response_id = received[0]["response"]["id"]
    rest = checked(client.responses.retrieve(response_id, stream=True, starting_after=received[-1]["sequence_number"]))
    events = [*received, *rest]
    assert kinds(events) == kinds(undisturbed)
    final, expected = (Response.model_validate(each[-1]["response"]) for each in (events, undisturbed))
    assert known(final) == known(expected)
    for number in range(len(events)):
        assert (
            checked(client.responses.retrieve(response_id, stream=True, starting_after=number)) == events[number + 1 :]
        )
