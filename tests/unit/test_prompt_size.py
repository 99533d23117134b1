"""Counting prompts: exactly where it matters, not at all where it does not."""

import json
from typing import Any

import gevent
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from shared.errors import Invalid
from shared.jobs.request import Request, Sampling
from shared.models.registry import ModelCard, Registry, digest
from shared.queue.redis import Redis
from web.admission_tokens import PromptSizer, render

CHATML = (
    "{% for message in messages %}\n<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def check(
    sizer: PromptSizer, card: ModelCard, prompt: str | None = None, messages: list[dict[str, Any]] | None = None
) -> None:
    conversation = tuple(messages) if messages else None
    generation = Request("m", 1, Sampling(0.0), prompt=prompt, messages=conversation)
    sizer.check(card, generation, "messages" if messages else "prompt")


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    """One token a word, `word`, which has four bytes."""
    tokenizer = Tokenizer(models.WordLevel({"word": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text: str = tokenizer.to_str()
    return text


def known(client: Redis, text: str | None, **card: Any) -> tuple[PromptSizer, ModelCard]:
    registry = Registry(client)
    made = ModelCard("m", "text", context=100, tokenizer=digest(text) if text else None, **card)
    registry.announce_model(made, text)
    return PromptSizer(registry), made


def test_a_prompt_is_counted_in_tokens(client: Redis, tokenizer_json: str) -> None:
    sizer, card = known(client, tokenizer_json)
    check(sizer, card, "word " * 99)
    with pytest.raises(Invalid) as caught:
        check(sizer, card, "word " * 100)
    assert (caught.value.code, caught.value.field) == ("context_length_exceeded", "prompt")


def test_messages_are_counted_as_the_template_renders_them(client: Redis, tokenizer_json: str) -> None:
    sizer, card = known(client, tokenizer_json, chat_template="{{ (messages[0].content + ' ') * 2 }}")
    check(sizer, card, messages=[{"role": "user", "content": "word " * 49}])
    with pytest.raises(Invalid) as caught:
        check(sizer, card, messages=[{"role": "user", "content": "word " * 50}])
    assert caught.value.field == "messages"


def test_a_short_prompt_needs_no_tokenizer(client: Redis) -> None:
    sizer, card = known(client, "not a tokenizer at all")
    check(sizer, card, "word " * 10)


def test_a_huge_prompt_is_not_even_counted(client: Redis, tokenizer_json: str) -> None:
    sizer, card = known(client, tokenizer_json)
    with pytest.raises(Invalid):
        check(sizer, card, "x" * 10_000_000)


def test_huge_messages_are_not_even_rendered(client: Redis, tokenizer_json: str) -> None:
    sizer, card = known(client, tokenizer_json, chat_template="{{ raise_exception('rendered') }}")
    with pytest.raises(Invalid) as caught:
        check(sizer, card, messages=[{"role": "user", "content": "x" * 1000}] * 1000)
    assert caught.value.code == "context_length_exceeded"


def test_counting_lets_others_go_on(client: Redis, tokenizer_json: str) -> None:
    registry = Registry(client)
    card = ModelCard("m", "text", context=200_000, tokenizer=digest(tokenizer_json), chat_template=CHATML)
    registry.announce_model(card, tokenizer_json)
    long: list[dict[str, Any]] = [{"role": "user", "content": "word " * 150_000}]
    sizer = PromptSizer(registry)
    check(sizer, card, messages=long)  # the tokenizer is loaded once
    turns = 0

    def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            gevent.sleep(0.001)

    greenlet = gevent.spawn(others)
    check(sizer, card, messages=long)
    greenlet.kill()
    assert turns > 10


@pytest.mark.parametrize("template", [None, "{% nonsense %}", "{{ messages[7].content.nothing }}"])
def test_where_nobody_can_tell_the_worker_will(client: Redis, template: str | None) -> None:
    sizer, card = known(client, None, chat_template=template)
    check(sizer, card, messages=[{"role": "user", "content": "word " * 1000}])
    check(sizer, card, "word " * 1000)


def test_a_tokenizer_is_read_once(client: Redis, tokenizer_json: str) -> None:
    sizer, card = known(client, tokenizer_json)
    check(sizer, card, "word " * 60)
    client.flushall()
    check(sizer, card, "word " * 60)


def test_templates_render_as_transformers_renders_them() -> None:
    card = ModelCard("m", "text", 100, chat_template=CHATML)
    assert render(card, [{"role": "user", "content": "<hi>"}]) == "<|user|><hi>\n<|assistant|>"
    as_json = ModelCard("m", "text", 100, chat_template="{{ messages[0] | tojson }}{{ bos_token }}", bos_token="<s>")
    assert render(as_json, [{"a": "<é>"}]) == json.dumps({"a": "<é>"}, ensure_ascii=False) + "<s>"


def test_a_template_may_refuse_and_may_not_escape() -> None:
    refusing = ModelCard("m", "text", 100, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(Invalid, match="roles must alternate") as caught:
        render(refusing, [])
    assert (caught.value.code, caught.value.field) == ("template_error", "messages")
    escaping = ModelCard("m", "text", 100, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    assert not render(escaping, [])
