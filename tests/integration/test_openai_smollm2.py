"""OpenAI's client with a real model: every field changes the answer as it does at OpenAI."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from tests.plugins.stack import Stack

pytestmark = pytest.mark.slow
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
COUNT: Any = [{"role": "user", "content": "Count from one to ten in words."}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
OWN_FIELDS = {"top_k", "min_p", "repetition_penalty", "continue_final_message", "regex", "choice", "grammar"}
OTHER_TOOL: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def client(smollm2_stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{smollm2_stack.url}/v1", api_key=smollm2_stack.key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(smollm2_stack: Stack) -> str:
    return smollm2_stack.model


def request_of(model: str, messages: Any, fields: dict[str, Any]) -> dict[str, Any]:
    extra = {name: fields.pop(name) for name in OWN_FIELDS & fields.keys()}
    defaults = {"messages": messages, "max_completion_tokens": 24, "seed": 1}
    return {**defaults, "extra_body": extra, **fields, "model": model}


def text(client: openai.OpenAI, model: str, messages: Any = QUESTION, **fields: Any) -> str:
    """Return the text of the whole answer."""
    completion: ChatCompletion = client.chat.completions.create(**request_of(model, messages, fields))
    return content(completion)


def ask(client: openai.OpenAI, model: str, messages: Any = QUESTION, **fields: Any) -> ChatCompletion:
    """Return the whole answer; the stream of the same request adds up to the same text."""
    request = request_of(model, messages, fields)
    whole: ChatCompletion = client.chat.completions.create(**request)
    texts = [""] * len(whole.choices)
    reasons: list[str | None] = [None] * len(whole.choices)
    for chunk in client.chat.completions.create(stream=True, **request):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert [choice.message.content or "" for choice in whole.choices] == texts
    assert [choice.finish_reason for choice in whole.choices] == reasons
    return whole


def content(completion: ChatCompletion) -> str:
    return completion.choices[0].message.content or ""


def test_sampling_fields_change_the_answer(client: openai.OpenAI, model: str) -> None:
    greedy = content(ask(client, model, temperature=0))
    assert "Paris" in greedy
    sampled: dict[str, Any] = {"temperature": 1.5, "max_completion_tokens": 12}
    hot = content(ask(client, model, **sampled))
    assert text(client, model, **sampled) == hot, "the same seed"
    assert text(client, model, **sampled, seed=2) != hot
    for field in ({"top_p": 0}, {"top_k": 1}, {"min_p": 1}):
        assert greedy.startswith(text(client, model, **sampled, **field)), field


def test_penalties_and_biases_change_the_answer(client: openai.OpenAI, model: str) -> None:
    plain = text(client, model, COUNT, temperature=0)
    for field in ({"repetition_penalty": 1.9}, {"presence_penalty": 2}, {"frequency_penalty": 2}):
        assert text(client, model, COUNT, temperature=0, **field) != plain, field
    biased = content(ask(client, model, COUNT, temperature=0, logit_bias={"28": 100}, max_completion_tokens=4))
    assert len(set(biased)) == 1, "always the same token"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, model, logit_bias={"999999": 1})
    assert caught.value.param == "logit_bias.999999"


def test_limits_and_stops(client: openai.OpenAI, model: str) -> None:
    short = ask(client, model, temperature=0, max_completion_tokens=3)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None and short.usage.completion_tokens == 3
    stopped = ask(client, model, temperature=0, stop=" Paris")
    assert (stopped.choices[0].finish_reason, "Paris" in content(stopped)) == ("stop", False)
    unlimited = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    assert unlimited.choices[0].finish_reason == "stop"
    assert client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=3
    ).choices[0].message.content == content(short)  # fmt: skip


def test_choices_differ_and_share_their_prompt(client: openai.OpenAI, model: str, smollm2_stack: Stack) -> None:
    messages: Any = [{"role": "user", "content": f"Answer the question. {'Think well. ' * 20}{QUESTION[0]['content']}"}]
    completion = ask(client, model, messages, n=4, temperature=1.2, max_completion_tokens=12)
    texts = [choice.message.content for choice in completion.choices]
    assert len(set(texts)) > 1
    assert texts[1] == content(ask(client, model, messages, temperature=1.2, max_completion_tokens=12, seed=2))
    with smollm2_stack.client() as native:
        first = native.request("GET", f"/v1/jobs/{completion.id.removeprefix('chatcmpl-')}").json()
        usages = [native.request("GET", f"/v1/jobs/{child}").json()["usage"] for child in first["children"]]
    assert all(usage["cached_tokens"] > usage["prompt_tokens"] / 2 for usage in usages), "it is processed once"
    assert completion.usage is not None and completion.usage.prompt_tokens == usages[0]["prompt_tokens"]


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    completion = ask(client, model, temperature=0, logprobs=True, top_logprobs=3)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    assert "".join(token.token for token in logprobs.content) == content(completion)
    for token in logprobs.content:
        assert bytes(token.bytes or ()).decode() == token.token
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert math.isclose(token.top_logprobs[0].logprob, token.logprob), "greedy takes the first"


class Place(BaseModel):
    city: Literal["Paris", "London"]
    continent: Literal["Europe", "Asia", "Africa"]
    large: bool


def test_the_parse_helper_with_a_strict_schema(client: openai.OpenAI, model: str) -> None:
    completion = client.chat.completions.parse(
        model=model, messages=QUESTION, response_format=Place, temperature=0, max_completion_tokens=100
    )
    place = completion.choices[0].message.parsed
    assert isinstance(place, Place)
    with client.chat.completions.stream(
        model=model, messages=QUESTION, response_format=Place, temperature=0, max_completion_tokens=100
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == place


@pytest.mark.parametrize(
    ("fields", "matches"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
        (
            {"regex": r"(yes|no), [a-z]{3,5}\."},
            lambda text: text.split(", ")[0] in ("yes", "no") and text.endswith("."),
        ),
        ({"choice": ["Berlin", "Madrid"]}, lambda text: text in ("Berlin", "Madrid")),
        ({"grammar": 'start: "a" "b"+ "!"'}, lambda text: text == "a" + "b" * (len(text) - 2) + "!"),
    ],
)
def test_structured_answers(client: openai.OpenAI, model: str, fields: dict[str, Any], matches: Any) -> None:
    completion = ask(
        client, model, temperature=0, max_completion_tokens=30 if "response_format" in fields else 60, **fields
    )
    if completion.choices[0].finish_reason == "stop":
        assert matches(content(completion))
    else:
        assert fields == {"response_format": {"type": "json_object"}}, "others are short"


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ({"type": "nonsense"}, "response_format"),
        ({"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}, "response_format"),
    ],
)
def test_a_schema_that_cannot_be_honoured(client: openai.OpenAI, model: str, schema: Any, part: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, model, response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})
    assert (caught.value.param or "").startswith(part)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_demanded_tool_is_called(client: openai.OpenAI, model: str, choice: Any) -> None:
    tools = [TOOL] if choice == "required" else [TOOL, OTHER_TOOL]
    completion = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=0,
        max_completion_tokens=100,
    )
    (picked,) = completion.choices
    (call,) = (picked.message.tool_calls or [])[:1]
    assert call.type == "function" and call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Paris", "Oslo") and arguments["unit"] in ("celsius", "fahrenheit")
    assert picked.finish_reason == "tool_calls"


def test_service_tier_and_metadata(client: openai.OpenAI, model: str, smollm2_stack: Stack) -> None:
    completion = client.chat.completions.create(
        model=model, messages=QUESTION, max_completion_tokens=2, service_tier="flex", metadata={"a": "b"}
    )
    assert completion.service_tier == "flex"
    with smollm2_stack.client() as native:
        job = native.request("GET", f"/v1/jobs/{completion.id.removeprefix('chatcmpl-')}").json()
    assert (job["priority"], job["metadata"]) == ("batch", {"a": "b"})


def test_text_completions(client: openai.OpenAI, model: str) -> None:
    request: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 8}
    prompts = ["The capital of France is", "One, two, three,"]
    whole = client.completions.create(prompt=prompts, n=2, logprobs=2, seed=1, **request)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].text == whole.choices[1].text != whole.choices[2].text
    assert "Paris" in whole.choices[0].text
    texts = [""] * 4
    tokens: list[list[str]] = [[], [], [], []]
    for chunk in client.completions.create(
        prompt=prompts, n=2, logprobs=2, seed=1, stream=True, stream_options={"include_usage": True}, **request
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens or [] if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    for choice, streamed in zip(whole.choices, tokens, strict=True):
        assert choice.logprobs is not None and choice.logprobs.tokens == streamed
        assert "".join(streamed) == choice.text
        assert choice.logprobs.text_offset is not None and choice.logprobs.text_offset[1] == len(streamed[0])
        assert all(len(each) == 2 for each in choice.logprobs.top_logprobs or ())
    assert whole.usage is not None and whole.usage.completion_tokens == 32
    one = client.completions.create(prompt=[1, 2, 3], **request)
    assert one.usage is not None and one.usage.prompt_tokens == 3


def test_a_stored_answer_can_be_continued(client: openai.OpenAI, model: str) -> None:
    started = [*QUESTION, {"role": "assistant", "content": "The capital of Fra"}]
    continued = content(ask(client, model, started, temperature=0, continue_final_message=True))
    assert "Paris" in continued and not continued.startswith("The")
