"""The Responses API with a real model: constraints, log-probabilities, and tools whose input is text of a grammar."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.plugins.stack import Stack
from tests.support.responses import checked

pytestmark = pytest.mark.slow
QUESTION = "What is the capital of France?"
PATCH = 'start: "*** Begin" LF line "*** End"\nline: "+" /[a-z ]{1,12}/ LF\n%import common.LF\n'


@pytest.fixture(scope="module")
def client(smollm2_stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{smollm2_stack.url}/v1", api_key=smollm2_stack.key, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, stack: Stack, **fields: Any) -> Any:
    fields = {"input": QUESTION, "max_output_tokens": 24, "temperature": 0, **fields}
    return client.responses.create(model=stack.model, **fields)


def test_answers_are_parsed(client: openai.OpenAI, smollm2_stack: Stack) -> None:
    class Capital(BaseModel):
        city: Literal["Paris", "Oslo"]

    response = client.responses.parse(
        model=smollm2_stack.model, input=QUESTION, text_format=Capital, max_output_tokens=24, temperature=0
    )
    assert response.output_parsed == Capital(city="Paris")


def test_log_probabilities_are_those_of_the_text(client: openai.OpenAI, smollm2_stack: Stack) -> None:
    response = ask(client, smollm2_stack, top_logprobs=2)
    (message,) = response.output
    (part,) = message.content
    assert "".join(each.token for each in part.logprobs) == part.text == response.output_text
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in part.logprobs)
    assert math.isclose(part.logprobs[0].logprob, part.logprobs[0].top_logprobs[0].logprob)
    stream = ask(client, smollm2_stack, include=["message.output_text.logprobs"], stream=True)
    deltas = [event for event in checked(stream) if event["type"] == "response.output_text.delta"]
    tokens = [each["token"] for event in deltas for each in event["logprobs"]]
    assert tokens == [each.token for each in part.logprobs]
    assert ask(client, smollm2_stack).output[0].content[0].logprobs == []


def test_a_custom_tool_gets_text_of_its_grammar(client: openai.OpenAI, smollm2_stack: Stack) -> None:
    for form, pattern in (
        ({"type": "grammar", "syntax": "lark", "definition": PATCH}, r"\*\*\* Begin\n\+[a-z ]{1,12}\n\*\*\* End"),
        ({"type": "grammar", "syntax": "regex", "definition": "[a-z]{3}-[0-9]{2}"}, "[a-z]{3}-[0-9]{2}"),
    ):
        tool: Any = {"type": "custom", "name": "apply", "description": "Applies a patch.", "format": form}
        choice: Any = {"type": "custom", "name": "apply"}
        response = ask(client, smollm2_stack, tools=[tool], tool_choice=choice, max_output_tokens=200)
        (call,) = response.output
        assert (call.type, call.name) == ("custom_tool_call", "apply") and re.fullmatch(pattern, call.input)


def test_malformed_grammars_and_schemas_are_refused_by_name(client: openai.OpenAI, smollm2_stack: Stack) -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: missing_rule"}
    schema = {"type": "json_schema", "name": "s", "schema": {"type": "nothing"}}
    for fields, param in (
        ({"tools": [{"type": "custom", "name": "t", "format": grammar}]}, "tools[0].format.definition"),
        ({"text": {"format": schema}}, "text.format.schema"),
        ({"max_output_tokens": 10**8}, "max_output_tokens"),
        ({"input": "word " * 20_000}, "input"),
        ({"model": "nobody"}, "model"),
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            client.responses.create(**{"model": smollm2_stack.model, "input": QUESTION, **fields})
        assert refused.value.param == param, fields


def test_tokens_are_counted_as_the_model_reads_them(client: openai.OpenAI, smollm2_stack: Stack) -> None:
    count = client.responses.input_tokens.count(model=smollm2_stack.model, input=QUESTION, instructions="Be brief.")
    response = ask(client, smollm2_stack, instructions="Be brief.")
    assert count.input_tokens == response.usage.input_tokens
