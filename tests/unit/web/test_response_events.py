"""The events of a response are a function of its job's log."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from shared.jobs.log import Event, EventKind
from shared.jobs.record import Job, Priority, Status
from tests.support.responses import EVENTS, Json
from web.responses.events import ResponseEvents
from web.responses.output import Shown
from web.responses.requests import ResponseRequest
from web.responses.view import echoed_fields, status_of

JOB = Job(
    id="job_" + "0" * 28, owner="key", model="m", status=Status.QUEUED, attempt=0, claimed_at="",
    priority=Priority.NORMAL, metadata={}, request_id="", last_event=0, created_at=1.5, started_at=None,
    finished_at=None, finish_reason=None, prompt_tokens=None, completion_tokens=None, cached_tokens=None, timings={},
    error_code=None, error_message=None,
)  # fmt: skip
ENDED = replace(
    JOB, status=Status.SUCCEEDED, finish_reason="stop", finished_at=3.5, prompt_tokens=3, completion_tokens=4
)
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
CHUNKS: list[Json] = [
    {"reasoning_content": "Hm, "}, {"reasoning_content": "so."}, {"content": "\n\n"}, {"content": "One"},
    {"content": " two"}, {"content": "\n", "tool_calls": [CALL]},
]  # fmt: skip


def log(*chunks: Json, requeued: bool = False, started: bool = True) -> list[Event]:
    kinds: list[tuple[str, Json]] = [(EventKind.QUEUED, {"reason": "accepted"})]
    kinds += [(EventKind.STARTED, {"attempt": 1})] if started else []
    kinds += [(EventKind.CHUNK, {"text": "x", "delta": chunk}) for chunk in chunks]
    if requeued:
        kinds[4:4] = [(EventKind.QUEUED, {"reason": "worker_lost"}), (EventKind.RESUMED, {"attempt": 2})]
    kinds.append((EventKind.DONE, {}))
    return [Event(n, kind, json.dumps(data)) for n, (kind, data) in enumerate(kinds, 1)]


def translator(shown: Shown = Shown(), **fields: Any) -> ResponseEvents:  # noqa: B008 - it is frozen
    return ResponseEvents(JOB, echoed_fields(ResponseRequest.model_validate({"input": "hi", **fields})), shown)


def events(events: list[Event], ended: Job = ENDED, shown: Shown = Shown(), **fields: Any) -> list[Json]:  # noqa: B008
    made = translator(shown, **fields).of(events, ended)
    for event in made:
        EVENTS.validate_python(event)
    assert [event["sequence_number"] for event in made] == list(range(len(made)))
    return made


def test_events_do_not_depend_on_how_the_log_is_read() -> None:
    entries = log(*CHUNKS)
    expected = events(entries)
    one_by_one = translator()
    assert [each for entry in entries for each in one_by_one.of([entry], ENDED)] == expected
    in_parts = translator()
    assert [*in_parts.of(entries[:5], JOB), *in_parts.of(entries[5:], ENDED)] == expected


def test_a_new_attempt_changes_no_number() -> None:
    assert events(log(*CHUNKS, requeued=True)) == events(log(*CHUNKS))


def test_white_space_between_items_is_no_item() -> None:
    output = events(log(*CHUNKS))[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call"]
    assert output[1]["content"][0]["text"] == "\n\nOne two\n"


@pytest.mark.parametrize(("background", "first"), [(True, ["created", "queued"]), (False, ["created"])])
def test_only_background_responses_are_queued(background: bool, first: list[str]) -> None:
    kinds = [event["type"].removeprefix("response.") for event in events(log(), background=background)]
    assert kinds[: len(first) + 1] == [*first, "in_progress"]


@pytest.mark.parametrize(
    ("ended", "kind", "status"),
    [
        ({"finish_reason": "length"}, "incomplete", "incomplete"),
        ({"status": Status.CANCELLED}, "incomplete", "cancelled"),
        ({"status": Status.FAILED, "error_code": "worker_lost"}, "failed", "failed"),
        ({"status": Status.EXPIRED, "error_code": "start_timeout"}, "failed", "failed"),
    ],
)
def test_ends(ended: Json, kind: str, status: str) -> None:
    for entries in (log({"content": "One"}), log(started=False)):
        last = events(entries, replace(ENDED, **ended))[-1]
        assert (last["type"], last["response"]["status"]) == (f"response.{kind}", status)
        assert all(item["status"] == "incomplete" for item in last["response"]["output"])
        assert (last["response"]["error"] is None) == (status != "failed")


def test_errors_have_the_codes_that_clients_know() -> None:
    for code, known in (("context_length_exceeded", "invalid_prompt"), ("worker_lost", "server_error")):
        failed = replace(ENDED, status=Status.FAILED, error_code=code, error_message="No.")
        assert events(log(), failed)[-1]["response"]["error"] == {"code": known, "message": "No."}


def test_an_empty_answer_is_an_empty_message() -> None:
    for entries in (log(), log({"reasoning_content": "Hm."}), log({"content": "\n"})):
        item = events(entries)[-1]["response"]["output"][-1]
        assert (item["type"], item["content"][0]["text"]) == ("message", "")


def test_a_custom_call_without_a_text_keeps_its_arguments() -> None:
    texts = {'{"input": "é"}': "é", r'{"input": "\ud800"}': "\ufffd"}
    for arguments, given in (*texts.items(), ('{"a": 1}', '{"a": 1}'), ('{"input": 5}', '{"input": 5}')):
        call = {**CALL, "function": {"name": "patch", "arguments": arguments}}
        made = events(log({"tool_calls": [call]}), shown=Shown(custom_tools=frozenset({"patch"})))
        assert made[-1]["response"]["output"][0]["input"] == given


def test_a_response_that_lost_its_worker_is_still_in_progress() -> None:
    assert status_of(JOB) == "queued"
    assert status_of(replace(JOB, started_at=2.5, attempt=1)) == "in_progress"
