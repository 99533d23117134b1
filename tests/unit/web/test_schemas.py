"""Validation of generation requests, and their canonical form."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from shared.errors import Expiry, JobFailure
from web.openai.requests import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest, StreamOptions
from web.schemas.base import RequestModel, ResponseModel
from web.schemas.batches import BatchRequest, ExpiresAfter
from web.schemas.inputs import EmbeddingRequest, InputsRequest, RerankRequest
from web.schemas.jobs import JobError
from web.schemas.keys import KeyLimits, KeyRequest
from web.schemas.messages import ImageUrl, Message, Part, StoredImage
from web.schemas.models import AliasesRequest, DownloadRequest, LoadRequest, UnloadRequest
from web.schemas.openai_fields import SampledRequest
from web.schemas.requests import InferenceRequest, JobRequest, ParseOptions
from web.schemas.response_format import (
    ChoiceFormat,
    GrammarFormat,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    RegexFormat,
    TextFormat,
)
from web.schemas.tools import CalledFunction, FunctionDefinition, NamedFunction, NamedTool, Tool, ToolCall
from web.schemas.webhooks import EndpointRequest, RotationRequest

TURN = {"role": "user", "content": "hi"}
ADD = {"type": "function", "function": {"name": "add"}}


def error_locations(**body: object) -> list[tuple[int | str, ...]]:
    with pytest.raises(ValidationError) as caught:
        JobRequest.model_validate(body)
    return [error["loc"] for error in caught.value.errors()]


def test_all_models_are_complete_after_the_import() -> None:
    """gevent has patched the lock with which pydantic completes models: threads that wait for it never continue."""
    assert all(model.__pydantic_complete__ for model in _descendants(RequestModel, ResponseModel))


def _descendants(*models: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for model in models:
        yield model
        yield from _descendants(*model.__subclasses__())


def test_fields_with_a_default_of_the_service_are_none() -> None:
    request = JobRequest.model_validate({"prompt": "hi"})
    assert (request.model, request.max_tokens, request.temperature, request.seed) == (None, None, None, None)
    assert (request.top_p, request.stop, request.priority, request.metadata) == (1.0, [], "normal", {})


@pytest.mark.parametrize(("stop", "stops"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([], [])])
def test_a_single_stop_string_is_a_list_of_one(stop: object, stops: list[str]) -> None:
    assert JobRequest.model_validate({"prompt": "hi", "stop": stop}).stop == stops


def test_parse_is_a_name_or_an_object() -> None:
    assert JobRequest.model_validate({"prompt": "hi", "parse": "ui_tars"}).parse == "ui_tars"
    options = {"format": "ui_tars", "coordinates": "pixels"}
    assert JobRequest.model_validate({"prompt": "hi", "parse": options}).parse == ParseOptions(**options)
    for unknown in ("html", 5, ["ui_tars"]):
        assert error_locations(prompt="hi", parse=unknown) == [("parse", "(name)")]
    assert error_locations(prompt="hi", parse={"format": "message"}) == [("parse", "(options)", "format")]


def test_many_invalid_messages_give_one_error() -> None:
    assert error_locations(messages=[TURN, *[1] * 1000]) == [("messages", 1)]


def test_the_number_of_messages_is_limited() -> None:
    assert len(JobRequest.model_validate({"messages": [TURN] * 10_000}).messages or ()) == 10_000
    assert error_locations(messages=[TURN] * 10_001) == [("messages",)]


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": [TURN]}, {"messages": []}])
def test_exactly_one_of_prompt_and_messages_is_needed(body: dict[str, object]) -> None:
    assert error_locations(**body) == [("messages",)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""), ("prompt", 1), ("prompt", "\ud800"), ("max_tokens", 0), ("max_tokens", True),
        ("max_tokens", 1.5), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1),
        ("top_k", -1), ("min_p", 2), ("repetition_penalty", 0), ("presence_penalty", 3), ("seed", -1),
        ("seed", 2**63), ("stop", ["a"] * 17), ("stop", ["a" * 1000] * 5), ("stop", ["é" * 1000] * 3),
        ("stop", [""]), ("stop", 1), ("priority", "now"),
        ("start_within_s", 0), ("deadline_s", float("inf")), ("metadata", {str(n): "" for n in range(17)}),
        ("metadata", {"a": None}), ("unknown", 1),
        ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("logprobs", "3"), ("logprobs", 1.5),
    ],
)  # fmt: skip
def test_an_invalid_value_names_its_field(field: str, value: object) -> None:
    assert {loc[0] for loc in error_locations(**{"prompt": "hi", field: value})} == {field}


@pytest.mark.parametrize("turn", [{"role": "king", "content": "a"}, {"role": "user"}, {**TURN, "x": "x"}, "hi"])
def test_a_message_needs_a_role_and_content(turn: object) -> None:
    assert error_locations(messages=[TURN, turn])[0][:2] == ("messages", 1)


def test_only_a_system_message_at_the_beginning_can_be_shared() -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    assert JobRequest.model_validate({"messages": [system, user], "share_system_prompt": True}).share_system_prompt
    for body in ({"messages": [user, system]}, {"prompt": "Hi"}):
        with pytest.raises(ValidationError, match="must be a system message"):
            JobRequest.model_validate({**body, "share_system_prompt": True})


def test_an_integer_is_a_valid_float() -> None:
    assert JobRequest.model_validate({"prompt": "hi", "temperature": 1}).temperature == 1.0


EQUIVALENT = [
    {"prompt": "hi", "temperature": 1, "metadata": {"a": "1", "b": "2"}, "stop": "x"},
    {"metadata": {"b": "2", "a": "1"}, "stop": ["x"], "prompt": "hi", "temperature": 1.0},
    {"prompt": "hi", "temperature": 1.0, "metadata": {"a": "1", "b": "2"}, "stop": "x", "top_p": 1, "model": None},
]


def test_equivalent_requests_have_the_same_canonical_form() -> None:
    canonical_forms = {JobRequest.model_validate(body).canonical_json() for body in EQUIVALENT}
    assert len(canonical_forms) == 1
    for other in (
        {"prompt": "ho"},
        {"temperature": 0.9},
        {"metadata": {}},
        {"stop": "y"},
        {"seed": 0},
        {"top_p": 0.5},
        {"logprobs": 0},
        {"tools": [ADD]},
        {"tools": [ADD], "tool_choice": "required"},
        {"parallel_tool_calls": False},
        {"chat_template_kwargs": {"x": 1}},
        {"enable_thinking": False},
        {"reasoning_effort": "low"},
        {"thinking_budget": 0},
        {"logit_bias": {"1": 1}},
        {"response_format": {"type": "regex", "regex": "a"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}},
    ):
        canonical_form = JobRequest.model_validate({**EQUIVALENT[0], **other}).canonical_json()
        assert canonical_form not in canonical_forms
        canonical_forms.add(canonical_form)
    turns = [TURN, {**TURN, "content": "ho"}]
    first, reversed_ = (JobRequest.model_validate({"messages": each}).canonical_json() for each in (turns, turns[::-1]))
    assert first != reversed_


def test_an_explicit_value_counts_if_the_model_has_a_default() -> None:
    def canonical_json(**more: object) -> str:
        return JobRequest.model_validate({"prompt": "hi", **more}).canonical_json("id", {"top_p", "temperature"})

    assert canonical_json(top_p=1.0) != canonical_json() == canonical_json(temperature=None) == canonical_json(top_k=0)
    assert canonical_json(model="alias") == canonical_json(model="id") != canonical_json()


def test_only_an_inference_request_can_stream() -> None:
    assert InferenceRequest.model_validate({"prompt": "hi", "stream": True}).stream
    assert error_locations(prompt="hi", stream=True) == [("stream",)]


@pytest.mark.parametrize("kind", [JobRequest, InferenceRequest])
def test_raw_needs_a_prompt(kind: type[JobRequest]) -> None:
    assert kind.model_validate({"prompt": "hi", "raw": True}).raw
    assert kind.model_validate({"prompt": "hi"}).chat_messages() is None
    with pytest.raises(ValidationError, match="raw needs a prompt"):
        kind.model_validate({"messages": [{"role": "user", "content": "hi"}], "raw": True})


def test_all_error_codes_of_jobs_are_documented() -> None:
    documented = re.findall("`(.+?)`", JobError.model_fields["code"].description or "")
    assert sorted(documented) == sorted([*JobFailure, *Expiry])


REQUESTS: dict[type[RequestModel], dict[str, Any]] = {
    JobRequest: {"prompt": "hi"},
    InferenceRequest: {"prompt": "hi"},
    ParseOptions: {"format": "grounding"},
    SampledRequest: {},
    KeyLimits: {},
    KeyRequest: {"name": "alice"},
    GenerationRequest: {},
    ChatRequest: {"messages": [TURN]},
    CompletionRequest: {"prompt": "hi"},
    ChatMessage: TURN,
    InputsRequest: {"model": "m"},
    EmbeddingRequest: {"model": "m", "input": "hi"},
    RerankRequest: {"model": "m", "query": "q", "documents": ["a"]},
    StreamOptions: {},
    BatchRequest: {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"},
    ExpiresAfter: {"anchor": "created_at", "seconds": 3600},
    EndpointRequest: {"url": "https://example.org/", "events": ["job.failed"]},
    RotationRequest: {},
    LoadRequest: {"model": "m"},
    DownloadRequest: {"hub": "org/model"},
    AliasesRequest: {"aliases": ["small"]},
    UnloadRequest: {"model": "m"},
    Message: TURN,
    Part: {"type": "text", "text": "hi"},
    ImageUrl: {"url": "data:,"},
    StoredImage: {"image": "a", "width": 1, "height": 1},
    Tool: ADD,
    FunctionDefinition: {"name": "add"},
    NamedTool: {"type": "function", "function": {"name": "add"}},
    NamedFunction: {"name": "add"},
    ToolCall: {"id": "call_1", "function": {"name": "add", "arguments": "{}"}},
    CalledFunction: {"name": "add", "arguments": "{}"},
    TextFormat: {"type": "text"},
    JsonObjectFormat: {"type": "json_object"},
    JsonSchemaFormat: {"type": "json_schema", "json_schema": {"schema": {}}},
    JsonSchema: {"schema": {}},
    RegexFormat: {"type": "regex", "regex": "a+"},
    ChoiceFormat: {"type": "choice", "choice": ["a"]},
    GrammarFormat: {"type": "grammar", "grammar": 'start: "a"'},
}


def test_the_list_of_request_models_is_complete() -> None:
    def children(parent: type[RequestModel]) -> set[type[RequestModel]]:
        found = {
            child for child in parent.__subclasses__() if child.__module__.startswith(("web.schemas.", "web.openai."))
        }
        return found.union(*(children(child) for child in found))

    assert children(RequestModel) == set(REQUESTS)


@pytest.mark.parametrize("kind", REQUESTS)
def test_null_means_that_an_optional_field_is_absent(kind: type[RequestModel]) -> None:
    required = REQUESTS[kind]
    fields = {field.alias or name: field for name, field in kind.model_fields.items()}
    names = set(fields) - set(required)
    nulls = dict.fromkeys(names)
    request = kind.model_validate({**nulls, **required})
    assert request == kind.model_validate(required)
    assert len(request.model_fields_set) == len(required), "model defaults apply"
    schema = kind.model_json_schema()["properties"]
    for name in names:
        assert {"type": "null"} in schema[name]["anyOf"], name
    for name, field in fields.items():
        if field.is_required():
            with pytest.raises(ValidationError):
                kind.model_validate({**required, name: None})
    with pytest.raises(ValidationError):
        kind.model_validate({**required, "unknown": None})


@pytest.mark.parametrize("roles", [["assistant"], ["user", "assistant"], ["system", "user", "assistant"]])
@pytest.mark.parametrize("kind", [JobRequest, InferenceRequest])
def test_a_conversation_does_not_end_with_the_assistant(kind: type[JobRequest], roles: list[str]) -> None:
    turns = [{"role": role, "content": "hi"} for role in roles]
    with pytest.raises(ValidationError, match="use a user message last"):
        kind.model_validate({"messages": turns})
    assert kind.model_validate({"messages": [*turns, TURN]}).messages
