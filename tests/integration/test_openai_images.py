"""Images in chat completions give the answer that they give on the native route."""

from __future__ import annotations

from typing import Any

import openai

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
