"""Images in chat completions give the answer that they give on the native route."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.plugins.stack import Stack
from tests.support.image_files import data_url, picture


def test_image_parts(vision_stack: Stack) -> None:
    answers = []
    for seed in (1, 2):
        image: Any = {"type": "image_url", "image_url": {"url": data_url(picture(seed=seed)), "detail": "low"}}
        messages: Any = [{"role": "user", "content": [image, {"type": "text", "text": "What is in this picture?"}]}]
        with openai.OpenAI(base_url=f"{vision_stack.url}/v1", api_key=vision_stack.key) as client:
            completion = client.chat.completions.create(
                model=vision_stack.model, messages=messages, temperature=0, max_completion_tokens=8, n=2
            )
        first, second = (choice.message.content for choice in completion.choices)
        with vision_stack.client() as native:
            body = {"messages": messages, "temperature": 0, "max_tokens": 8}
            expected = native.request("POST", "/inference", json=body).json()
        assert first == second == expected["text"]
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == expected["usage"]["prompt_tokens"]
        answers.append(first)
    assert answers[0] != answers[1]


def test_images_in_responses(vision_stack: Stack) -> None:
    url = data_url(picture(seed=1))
    parts: Any = [{"type": "input_text", "text": "What is in this picture?"}, {"type": "input_image", "image_url": url}]
    call: Any = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    output: Any = {"type": "function_call_output", "call_id": "c", "output": [parts[1]]}
    fields: Any = {"model": vision_stack.model, "temperature": 0, "max_output_tokens": 8}
    with openai.OpenAI(base_url=f"{vision_stack.url}/v1", api_key=vision_stack.key, max_retries=0) as client:
        first = client.responses.create(input=[{"role": "user", "content": parts}], **fields)
        messages: Any = [
            {"role": "user", "content": [{"type": "text", "text": parts[0]["text"]}, _chat_image(url)]},
        ]
        expected = client.chat.completions.create(
            model=vision_stack.model, messages=messages, temperature=0, max_completion_tokens=8
        )
        assert first.output_text == expected.choices[0].message.content
        assert first.usage is not None and expected.usage is not None
        assert first.usage.input_tokens == expected.usage.prompt_tokens
        second = client.responses.create(input="And now?", previous_response_id=first.id, **fields)
        assert second.usage is not None and second.usage.input_tokens > first.usage.input_tokens
        items = [*client.responses.input_items.list(second.id, order="asc")]
        assert [item.type for item in items] == ["message"] * 3
        assert items[0].to_dict()["content"] == [parts[0], {**parts[1], "detail": "auto"}]
        user: Any = {"role": "user", "content": "Look."}
        seen = client.responses.create(input=[user, call, output], **fields)
        assert seen.usage is not None and seen.usage.input_tokens > 64, "the image of an output is read"
        broken: Any = [{"role": "user", "content": [parts[0], {**parts[1], "image_url": "data:image/png;base64,AA"}]}]
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(input=broken, **fields)
        assert refused.value.param == "input[0].content[1]"


def _chat_image(url: str) -> Any:
    return {"type": "image_url", "image_url": {"url": url}}
