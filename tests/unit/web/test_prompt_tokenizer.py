"""Tokenising at admission, and leaving it to the worker if the API does not have the tokenizer."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.errors import Invalid, Unavailable
from shared.jobs.request import Constraint, Request
from shared.models.image_tokens import FixedTokens
from shared.models.registry import ModelCard
from shared.tokenizing.client import TokenizerBusy, Tokenizing
from shared.tokenizing.files import TokenizerFiles, TokenizerStore
from shared.tokenizing.messages import Tokenized, digest
from tests.support.fake_redis import FakeRedis
from tests.support.tokenizers import CHATML, announce, chat, plain, word_tokenizer
from web.admission.prompt_tokenizer import PromptTokenizer

TOKENIZER = word_tokenizer()
GEOMETRY = {"factor": 28, "min_pixels": 3136, "max_pixels": 1_000_000}


class Api:
    """An API host that fetches tokenizers from Redis."""

    def __init__(self, folder: Path) -> None:
        self.redis = FakeRedis(decode_responses=False)
        self.folder = folder
        self.tokenizing = Tokenizing(20.0)
        self.files = TokenizerFiles(folder, TokenizerStore(self.redis).get)
        self.prompts = PromptTokenizer(self.tokenizing, self.files)

    def announce(self, text: str | None = TOKENIZER, **more: Any) -> ModelCard:
        fields = {"context": 100, "chat_template": CHATML, **more}
        card = ModelCard("m", "text", tokenizer=digest(text) if text is not None else None, **fields)
        announce(self.redis, card, text)
        return card

    def tokenize(self, card: ModelCard, request: Request) -> Tokenized | None:
        return self.prompts.tokenize(card, request, "prompt" if request.messages is None else "messages")

    def refusal(self, card: ModelCard, request: Request) -> tuple[str, str | None]:
        with pytest.raises(Invalid) as caught:
            self.tokenize(card, request)
        assert caught.value.status == 422
        return caught.value.code, caught.value.field


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = Api(tmp_path / "tokenizers")
    with api.tokenizing:
        yield api


def test_prompts_are_tokenised_up_to_the_context_and_refused_beyond(api: Api) -> None:
    card = api.announce()
    assert api.tokenize(card, plain("word")) == Tokenized((2, 0))
    assert len(api.tokenize(card, plain("word " * 98)).tokens) == 99  # type: ignore[union-attr]
    assert api.refusal(card, plain("word " * 99)) == ("context_length_exceeded", "prompt")
    assert api.tokenize(card, chat("word " * 97))
    assert api.refusal(card, chat("word " * 98)) == ("context_length_exceeded", "messages")


def test_a_refusal_of_the_template_names_the_field(api: Api) -> None:
    card = api.announce(chat_template="{{ raise_exception('roles must alternate') }}")
    assert api.refusal(card, chat("x")) == ("template_error", "messages")
    assert api.refusal(api.announce(chat_template=None), chat("x")) == ("template_error", "messages")


def test_images_count_as_many_tokens_as_their_model_uses(api: Api) -> None:
    template = "{% for part in messages[0].content %}<image> {% endfor %}"
    card = api.announce(chat_template=template, image=GEOMETRY)
    side = 28 * 7  # 49 tokens
    image = {"type": "image", "image": "a" * 64, "width": side, "height": side}
    assert api.tokenize(card, chat({"role": "user", "content": [image, image]})) == Tokenized((6, 6))
    assert api.refusal(card, chat({"role": "user", "content": [image] * 3}))[0] == "context_length_exceeded"
    other = api.announce(chat_template=template, image_tokens={"rule": "fixed", "number": 49, "of_later_versions": 1})
    assert other.token_rule == FixedTokens(49)
    assert api.refusal(other, chat({"role": "user", "content": [image] * 3}))[0] == "context_length_exceeded"
    for unknown in ({"rule": "of_later_versions"}, {"rule": "fixed", "other": 1}, {}):
        assert api.tokenize(replace(other, image_tokens=unknown), chat({"role": "user", "content": [image] * 3}))
    odd = {**image, "height": 1}
    assert api.refusal(card, chat({"role": "user", "content": [{**odd, "width": 1000}]}))[1] == "messages"


def test_tokenizers_are_loaded_before_the_first_prompt(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown, card = api.announce(text=None), api.announce()
    assert not api.prompts.load([unknown])
    assert api.prompts.load([unknown, card])
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a second helper was started"))
    assert api.tokenize(card, plain("word")) == Tokenized((2, 0))


def test_a_tokenizer_that_cannot_be_loaded_is_no_error_before_the_first_prompt(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    card = api.announce()
    path = api.files.path(str(card.tokenizer))
    assert path is not None
    path.write_bytes(b"damaged")
    assert api.prompts.load([card])
    assert caplog.messages == ["tokenizer_not_loaded"]
    assert api.tokenize(card, plain("word")) == Tokenized((2, 0))


def test_without_a_tokenizer_the_worker_tokenises(api: Api) -> None:
    card = api.announce(text=None)
    assert api.tokenize(card, plain("word " * 1000)) is None
    known = api.announce()
    api.redis.flushall()  # the card is cached, but its tokenizer is not stored yet
    assert api.tokenize(known, plain("word " * 1000)) is None


def test_a_tokenizer_is_fetched_once(api: Api) -> None:
    card = api.announce()
    assert api.tokenize(card, plain("word"))
    api.redis.flushall()
    assert api.tokenize(card, plain("word"))


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b torn", b"other"])
def test_a_corrupt_tokenizer_file_is_fetched_again(api: Api, content: bytes) -> None:
    card = api.announce()
    file = api.folder / f"{card.tokenizer}.json.gz"
    file.parent.mkdir()
    file.write_bytes(content)
    assert api.tokenize(card, plain("word")) == Tokenized((2, 0))
    assert file.read_bytes() != content


@pytest.mark.parametrize("text", ["{}", "not a tokenizer at all"])
def test_a_broken_tokenizer_is_not_tried_again_for_a_while(api: Api, text: str) -> None:
    card = api.announce(text=text)
    assert api.tokenize(card, plain("word")) is None
    api.tokenizing.close()
    assert api.tokenize(card, plain("word")) is None
    assert api.tokenizing._short._helper is None  # no helper was started


def test_a_corrupt_tokenizer_in_redis_leaves_the_prompt_to_the_worker(api: Api) -> None:
    card = api.announce()
    TokenizerStore(api.redis).put(str(card.tokenizer), b"torn")
    assert api.tokenize(card, plain("word")) is None


def test_a_full_disk_leaves_the_prompt_to_the_worker(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: str) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(api.files, "path", full)
    assert api.tokenize(api.announce(), plain("word")) is None


def test_a_busy_helper_refuses_with_a_retry_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, **__: object) -> Tokenized:
        raise TokenizerBusy

    monkeypatch.setattr(api.tokenizing, "tokenize", busy)
    with pytest.raises(Unavailable) as caught:
        api.tokenize(api.announce(), plain("word"))
    assert caught.value.retry_after


def test_a_token_that_the_model_has_no_embedding_for_is_refused_by_name(api: Api) -> None:
    """`<image>` is the last token of the tokenizer."""
    template = "<image> " + CHATML
    for request, field in ((plain("word <image>"), "prompt"), (chat("word"), "messages")):
        assert api.tokenize(api.announce(vocabulary=7, chat_template=template), request)
        card = api.announce(vocabulary=None, chat_template=template)
        assert api.tokenize(card, request), "a card of an earlier version"
        with pytest.raises(Invalid, match=r"'<image>' \(id 6\), .*it has 6 tokens") as caught:
            api.tokenize(api.announce(vocabulary=6, chat_template=template), request)
        assert caught.value.field == field


def test_a_constraint_that_cannot_be_honoured_is_refused_by_name(api: Api) -> None:
    request = replace(plain("word"), constraint=Constraint("json_schema", '{"items": {"not": {}}}'))
    with pytest.raises(Invalid, match="at items: the keyword 'not' is not supported") as caught:
        api.prompts.check_constraints(request)
    assert (caught.value.code, caught.value.field) == ("constraint_error", "response_format.json_schema.schema")


def test_a_constraint_is_left_to_the_worker_while_the_helper_is_busy(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(_: Request) -> None:
        raise TokenizerBusy("too many")

    monkeypatch.setattr(api.tokenizing, "check_constraints", busy)
    api.prompts.check_constraints(replace(plain("word"), constraint=Constraint("regex", "(?=a)b")))


def test_a_refused_option_is_named_instead_of_the_prompt(api: Api) -> None:
    card = api.announce()
    tool = {"type": "function", "function": {"name": "add"}}
    for options, field in (
        ({"tools": (tool,)}, "tools"),
        ({"template_variables": {"x": 1}}, "chat_template_kwargs.x"),
        ({"template_variables": {"enable_thinking": True}}, "enable_thinking"),
    ):
        assert api.refusal(card, replace(chat("x"), **options)) == ("template_error", field)
    assert api.tokenize(card, replace(chat("word"), tools=(tool,), tool_choice="none")) == Tokenized((3, 0, 5))


@pytest.mark.parametrize("allowed", [True, False])
def test_special_tokens_in_messages_are_tokens_only_if_that_is_configured(api: Api, allowed: bool) -> None:
    with Tokenizing(20.0, special_tokens_in_text=allowed) as tokenizing:
        prompts = PromptTokenizer(tokenizing, api.files)
        tokenized = prompts.tokenize(api.announce(), chat("word <image>"), "messages")
        assert tokenized and (6 in tokenized.tokens) is allowed
        tokenized = prompts.tokenize(api.announce(), plain("word <image>"), "prompt")
        assert tokenized and 6 in tokenized.tokens, "a raw prompt is continued as it is"
