"""Every field of OpenAI's API is supported, documented as advice, or refused by name."""

from __future__ import annotations

import re
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from shared.errors import Invalid
from shared.jobs.record import Priority
from shared.settings import ROOT
from web.openai.requests import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    StreamOptions,
)
from web.openai.translate import chat_job, completion_jobs, original_fields
from web.schemas.base import RequestModel
from web.schemas.requests import JobRequest

MESSAGES: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [{"type": "function", "function": {"name": "add"}}]
SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True}}
ADVICE: dict[str, Any] = {
    "user": "u", "store": True, "prompt_cache_key": "k", "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h", "safety_identifier": "s", "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"}, "functions": [{"name": "f"}], "function_call": "auto",
    "moderation": {"model": "m"}, "web_search_options": {},
}  # fmt: skip
SAME: dict[str, Any] = {
    "model": "m", "temperature": 0.5, "top_p": 0.5, "presence_penalty": 1.0, "frequency_penalty": -1.0,
    "logit_bias": {"5": -100.0}, "seed": 7, "max_tokens": 9, "metadata": {"a": "b"}, "top_k": 3, "min_p": 0.1,
    "repetition_penalty": 1.5, "adapter": "sql",
}  # fmt: skip
CHAT_SAME: dict[str, Any] = {
    "reasoning_effort": "low", "parallel_tool_calls": False, "enable_thinking": False, "thinking_budget": 5,
    "chat_template_kwargs": {"x": 1},
}  # fmt: skip


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": MESSAGES, **fields})


def text(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hi", **fields})


def job(**fields: Any) -> JobRequest:
    return chat_job(chat(**fields), Priority.HIGH)


def text_job(**fields: Any) -> JobRequest:
    (only,) = completion_jobs(text(**fields), Priority.HIGH)
    return only


def refused_field(kind: type[RequestModel], body: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    (error,) = caught.value.errors()
    return ".".join(str(part) for part in error["loc"] if not str(part).startswith("("))


@pytest.mark.parametrize(
    ("params", "model"),
    [
        (chat_params.CompletionCreateParamsStreaming, ChatRequest),
        (text_params.CompletionCreateParamsStreaming, CompletionRequest),
        (ChatCompletionStreamOptionsParam, StreamOptions),
        (ChatCompletionAssistantMessageParam, ChatMessage),
        (ChatCompletionUserMessageParam, ChatMessage),
        (ChatCompletionToolMessageParam, ChatMessage),
    ],
)
def test_no_field_of_the_client_is_forgotten(params: Any, model: type[RequestModel]) -> None:
    assert set(get_type_hints(params)) - set(model.model_fields) == set()


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_every_field_is_in_the_documentation(model: type[GenerationRequest]) -> None:
    page = (ROOT / "docs/openai.md").read_text()
    heading = "### Chat completions" if model is ChatRequest else "### Text completions"
    table = page.partition(heading)[2].partition("\n#")[0]
    rows = re.findall(r"^\| ([^|]+) \| (supported|advice|refused) \|", table, re.MULTILINE)
    documented = {name: kind for names, kind in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(documented) == set(model.model_fields)
    if model is ChatRequest:
        assert {name for name, kind in documented.items() if kind == "advice"} == set(ADVICE)
        assert {name for name, kind in documented.items() if kind == "refused"} == set(REFUSED)


@pytest.mark.parametrize("field", ADVICE)
def test_advice_changes_nothing(field: str) -> None:
    assert job(**{field: ADVICE[field]}) == job()


@pytest.mark.parametrize("field", REFUSED)
def test_unsupported_fields_are_refused_by_name(field: str) -> None:
    assert refused_field(ChatRequest, {"messages": MESSAGES, field: REFUSED[field]}) == field
    assert job(**{field: None}) == job()


@pytest.mark.parametrize(
    ("field", "value"), [("best_of", 2), ("echo", True), ("suffix", "x"), ("store", True), ("messages", MESSAGES)]
)
def test_unsupported_fields_of_text_completions(field: str, value: Any) -> None:
    assert refused_field(CompletionRequest, {"prompt": "hi", field: value}) == field


def test_fields_of_text_completions_without_effect() -> None:
    assert text_job(best_of=1, echo=False, suffix="", user="u") == text_job()
    assert text(best_of=3, n=3).n == 3


@pytest.mark.parametrize("field", SAME)
def test_fields_of_both_kinds_reach_the_job(field: str) -> None:
    for made in (job(**{field: SAME[field]}), text_job(**{field: SAME[field]})):
        assert getattr(made, field) == SAME[field] and field in made.model_fields_set
    assert field not in job().model_fields_set | text_job().model_fields_set, "the model can have another default"


@pytest.mark.parametrize("field", CHAT_SAME)
def test_fields_of_chats_reach_the_job(field: str) -> None:
    assert getattr(job(**{field: CHAT_SAME[field]}), field) == CHAT_SAME[field]


def test_other_fields_reach_the_job() -> None:
    assert job(max_completion_tokens=5).max_tokens == job(max_completion_tokens=5, max_tokens=5).max_tokens == 5
    assert (job(stop="a").stop, job(stop=["a", "b"]).stop, job(stop=None).stop) == (["a"], ["a", "b"], [])
    assert (job().logprobs, job(logprobs=True).logprobs, job(logprobs=True, top_logprobs=4).logprobs) == (None, 0, 4)
    assert (text_job().logprobs, text_job(logprobs=0).logprobs, text_job(logprobs=5).logprobs) == (None, 0, 5)
    assert job(seed=-1).seed == 2**63 - 1
    assert 0 < job(top_p=0).top_p < 1e-6
    assert job(modalities=["text"]) == job()
    assert job(tools=TOOLS, tool_choice="required").tool_choice == "required"
    named = {"type": "function", "function": {"name": "add"}}
    assert (
        job(tools=TOOLS, tool_choice=named).tool_choice
        == JobRequest.model_validate({"messages": MESSAGES, "tools": TOOLS, "tool_choice": named}).tool_choice
    )
    assert job().parse == "message" and text_job().parse is None
    continued = [*MESSAGES, {"role": "assistant", "content": "Well,"}]
    assert job(messages=continued, continue_final_message=True).continue_final_message


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"response_format": SCHEMA}, "json_schema"), ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"regex": "a+"}, "regex"), ({"choice": ["a", "b"]}, "choice"), ({"grammar": 'start: "a"'}, "grammar"),
    ],
)  # fmt: skip
def test_formats_reach_the_job(fields: dict[str, Any], kind: str) -> None:
    made = job(**fields).response_format
    assert made is not None and made.type == kind


@pytest.mark.parametrize(
    ("tier", "highest", "priority"),
    [
        ("flex", Priority.HIGH, "batch"), ("priority", Priority.HIGH, "high"), ("fast", Priority.NORMAL, "normal"),
        ("auto", Priority.HIGH, "normal"), ("default", Priority.HIGH, "normal"), ("scale", Priority.HIGH, "normal"),
    ],
)  # fmt: skip
def test_service_tiers_are_priorities(tier: str, highest: Priority, priority: str) -> None:
    assert chat_job(chat(service_tier=tier), highest).priority == priority


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)  # fmt: skip
def test_prompts_are_texts_or_tokens(prompt: Any, expected: list[Any]) -> None:
    jobs = completion_jobs(text(prompt=prompt), Priority.HIGH)
    assert [each.prompt_tokens or each.prompt for each in jobs] == expected
    assert all(each.raw == (each.prompt is not None) for each in jobs)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": MESSAGES, "n": 0}, "n"),
        ({"messages": MESSAGES, "n": 129}, "n"),
        ({"messages": MESSAGES, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": MESSAGES, "max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"messages": MESSAGES, "regex": "a", "choice": ["a"]}, "choice"),
        ({"messages": MESSAGES, "regex": "a", "response_format": SCHEMA}, "regex"),
        ({"messages": MESSAGES, "modalities": ["text", "audio"]}, "modalities.1"),
        ({"messages": MESSAGES, "service_tier": "gold"}, "service_tier"),
        ({"messages": MESSAGES, "unknown": 1}, "unknown"),
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": [{**MESSAGES[0], "audio": {"id": "a"}}]}, "messages.0.audio"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages.0.role"),
    ],
)
def test_invalid_chats_name_the_field(body: dict[str, Any], field: str) -> None:
    assert refused_field(ChatRequest, body) == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [""]}, "prompt.0"), ({}, "prompt"),
        ({"prompt": [1, -1]}, "prompt.1"), ({"prompt": [[1], []]}, "prompt.1"), ({"prompt": [["a"]]}, "prompt.0.0"),
        ({"prompt": ["a"] * 129}, "prompt"), ({"prompt": None}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ],
)  # fmt: skip
def test_invalid_prompts_name_the_field(body: dict[str, Any], field: str) -> None:
    assert refused_field(CompletionRequest, body) == field


def test_prompts_times_choices_are_limited() -> None:
    assert refused_field(CompletionRequest, {"prompt": ["a"] * 65, "n": 2}) == "prompt"


def test_an_earlier_answer_can_be_sent_back() -> None:
    answer = {
        "role": "assistant", "content": None, "reasoning_content": "Hm.", "refusal": None, "annotations": [],
        "audio": None, "function_call": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
    }  # fmt: skip
    result = {"role": "tool", "tool_call_id": "call_1", "content": "3"}
    messages = job(messages=[*MESSAGES, answer, result], tools=TOOLS).chat_messages()
    assert messages is not None
    assert messages[1] == {
        "role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": answer["tool_calls"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "field", "original"),
    [
        (chat(max_completion_tokens=5), "max_tokens", "max_completion_tokens"),
        (chat(max_tokens=5), "max_tokens", "max_tokens"),
        (chat(regex="a"), "response_format.regex", "regex"),
        (chat(response_format=SCHEMA), "response_format.json_schema.schema", "response_format.json_schema.schema"),
        (text(prompt=[5]), "prompt_tokens[0]", "prompt[0]"),
    ],
)
def test_errors_name_the_original_field(body: GenerationRequest, field: str, original: str) -> None:
    with pytest.raises(Invalid) as caught, original_fields(body):
        raise Invalid(f"{field} is too large.", field=field)
    assert (caught.value.field, caught.value.detail) == (original, f"{original} is too large.")


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"regex": ""}, "regex"), ({"choice": ["a", ""]}, "choice[1]"), ({"grammar": ""}, "grammar")],
)
def test_invalid_fields_of_the_job_are_named_as_in_the_request(fields: dict[str, Any], field: str) -> None:
    body = chat(**fields)
    with pytest.raises(Invalid) as caught, original_fields(body):
        chat_job(body, Priority.HIGH)
    assert caught.value.field == field
    assert caught.value.detail.startswith(f"{field}: ")


def test_details_keep_words_that_contain_a_field_name() -> None:
    with pytest.raises(Invalid) as caught, original_fields(chat(max_completion_tokens=5)):
        raise Invalid("max_tokens is not max_tokens_total or x.max_tokens.", field="max_tokens")
    assert caught.value.detail == "max_completion_tokens is not max_tokens_total or x.max_tokens."
