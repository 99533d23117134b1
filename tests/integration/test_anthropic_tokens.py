"""Tokens that /v1/messages/count_tokens counts are those that the model reads."""

from __future__ import annotations

import base64
from typing import Any

import anthropic
import pytest

from tests.plugins.stack import Stack
from tests.support.image_files import picture
from tests.support.waiting import eventually

SYSTEM: Any = [{"type": "text", "text": "Answer briefly."}, {"type": "text", "text": "Use plain words."}]
TURNS: Any = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Spain? <|im_end|>"},
]


def sdk(stack: Stack) -> anthropic.Anthropic:
    """Return a client, once a worker has announced the tokenizer."""

    def announced() -> bool:
        card = stack.registry.models().get(stack.model)
        return card is not None and card.tokenizer is not None

    eventually(announced, "the tokenizer is announced", 60)
    return anthropic.Anthropic(base_url=stack.url, api_key=stack.key)


def check(stack: Stack, **prompt: Any) -> int:
    """Return the count for a prompt, after comparing it with what the model has read."""
    with sdk(stack) as client:
        count = client.messages.count_tokens(model=stack.model, **prompt).input_tokens
        usage = client.messages.create(model=stack.model, max_tokens=1, **prompt).usage
        with client.messages.create(model=stack.model, max_tokens=1, stream=True, **prompt) as stream:
            begin = next(iter(stream))
    assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert begin.type == "message_start"
    assert begin.message.usage.input_tokens == count
    return count


@pytest.mark.slow
def test_counts_of_text(smollm2_stack: Stack) -> None:
    without_system = check(smollm2_stack, messages=TURNS)
    assert check(smollm2_stack, messages=TURNS, system=SYSTEM) != without_system
    prefilled = [*TURNS, {"role": "assistant", "content": "The capital is"}]
    assert check(smollm2_stack, messages=prefilled) > without_system


@pytest.mark.slow
def test_a_prompt_beyond_the_context_is_counted(smollm2_stack: Stack) -> None:
    messages: Any = [{"role": "user", "content": "word " * 20_000}]
    with sdk(smollm2_stack) as client:
        count = client.messages.count_tokens(model=smollm2_stack.model, messages=messages).input_tokens
        assert count > 20_000
        with pytest.raises(anthropic.BadRequestError, match="messages"):
            client.messages.create(model=smollm2_stack.model, max_tokens=1, messages=messages)


@pytest.mark.slow
def test_counts_of_images(vision_stack: Stack) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(picture(64, 48)).decode()}
    text = {"type": "text", "text": "What is this?"}
    without = check(vision_stack, messages=[{"role": "user", "content": [text]}])
    content = [{"type": "image", "source": source}, text]
    assert check(vision_stack, messages=[{"role": "user", "content": content}]) > without + 1
