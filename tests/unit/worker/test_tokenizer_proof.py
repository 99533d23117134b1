"""API hosts may tokenise for a model only if they get exactly the tokens of mlx-lm's tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import tokenizer_utils
from mlx_vlm.models.base import load_chat_template

from shared.jobs.request import Request
from shared.models.registry import ModelCard, Registry
from shared.redis.client import connect
from shared.settings import ROOT, Settings
from shared.tokenizing.client import Tokenizing
from shared.tokenizing.files import TokenizerStore
from tests.support.tokenizers import ENDLESS, chat, plain
from worker.models import tokenizer_proof
from worker.models.load import tokenizer_config, tokenizer_defaults
from worker.models.tokenizer_announcer import TokenizerAnnouncer
from worker.models.tokenizer_helper import probes
from worker.models.tokenizer_proof import HELPER, ModelTokenizer, prove, remembered, unproved

UI_MICRO = ROOT / "models/ui-micro"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja")


def text_card(folder: Path) -> ModelCard:
    return ModelCard(folder.name, "text", 100)


@pytest.fixture
def folder(smollm2_path: Path, tmp_path: Path) -> Path:
    """SmolLM2's tokenizer, without the model."""
    copied = tmp_path / "model"
    copied.mkdir()
    for name in TOKENIZER_FILES:
        if (smollm2_path / name).exists():
            shutil.copy(smollm2_path / name, copied / name)
    return copied


def set_tokenizer_config(folder: Path, **more: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_file_and_folder_give_the_tokens_of_the_model_library(smollm2_path: Path, tmp_path: Path, kind: str) -> None:
    model = UI_MICRO if kind == "vision" else smollm2_path
    proved = prove(unproved(model, ModelCard("m", kind, 100)), tmp_path)
    assert proved.file is not None and len(proved.sources) == 2
    wrapper: Any = tokenizer_utils.load(model, {"trust_remote_code": False})
    if kind == "vision":
        load_chat_template(wrapper, model)  # type: ignore[no-untyped-call]
    assert proved.fields is not None
    with Tokenizing(60.0, HELPER) as safe, Tokenizing(60.0, HELPER, special_tokens_in_text=True) as unsafe:
        compared = 0
        for probe in probes(proved.fields, kind == "vision"):
            if probe.keys() & {"tools", "template_variables", "continue_final"} or _is_converted(probe["messages"]):
                continue
            request = plain(probe["prompt"]) if probe["messages"] is None else chat(*probe["messages"])
            is_unsafe = probe.get("special_tokens", False)
            try:
                expected = expected_tokens(wrapper, request, sanitized=not is_unsafe)
            except Exception:  # noqa: BLE001 - a template may refuse
                continue
            if expected:
                compared += 1
                for source in proved.sources:
                    tokens = (unsafe if is_unsafe else safe).tokenize(source, request).tokens
                    assert list(tokens) == expected, probe
    assert compared > 30


def expected_tokens(wrapper: Any, request: Request, sanitized: bool) -> list[int]:
    if request.messages is None:
        bos, text = wrapper.bos_token, request.prompt or ""
        ids: list[int] = wrapper.encode(text, add_special_tokens=bos is None or not text.startswith(bos))
        return ids
    options = {"sanitize_control_tokens": True} if sanitized else {}
    messages = list(request.messages)
    return list(wrapper.apply_chat_template(messages, add_generation_prompt=True, **options))


def _is_converted(messages: list[dict[str, Any]] | None) -> bool:
    """Whether messages are converted before the template gets them, which has tests of its own."""
    return any(message["role"] in ("developer", "tool") or "tool_calls" in message for message in messages or ())


def test_the_card_has_what_the_api_needs(folder: Path, tmp_path: Path) -> None:
    proved = prove(unproved(folder, text_card(folder)), tmp_path)
    card = proved.card(text_card(folder))
    assert proved.file is not None and card.tokenizer == proved.file.digest
    assert card.bos_token == "<|im_start|>" and card.template_variables is not None
    assert card.template_variables["eos_token"] == "<|im_end|>"
    assert ModelCard.from_json(card.to_json()) == card


@pytest.mark.parametrize(
    "change",
    [
        {"chat_template_type": "deepseek_v32"},  # a template in Python
        {"tokenizer_class": "NewlineTokenizer"},  # a tokenizer that changes texts in Python
    ],
)
def test_a_tokenizer_that_is_not_equivalent_is_not_announced(
    folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    set_tokenizer_config(folder, **change)
    proved = prove(unproved(folder, text_card(folder)), tmp_path)
    assert proved.file is None and len(proved.sources) == 1
    assert proved.card(text_card(folder)).tokenizer is None
    with Tokenizing(60.0, HELPER) as tokenizing:  # this worker can still tokenise
        expected = tokenizer_utils.load(folder, {}).encode("two\nlines")
        assert list(tokenizing.tokenize(proved.sources[0], plain("two\nlines")).tokens) == expected


def test_the_template_named_default_is_used(folder: Path, tmp_path: Path) -> None:
    for_tools = "{{ messages[0].content }}{{ tools | length }}"
    named = [{"name": "default", "template": "{{ messages[0].content }}"}, {"name": "tool_use", "template": for_tools}]
    set_tokenizer_config(folder, chat_template=named)
    proved = prove(unproved(folder, text_card(folder)), tmp_path)
    card = proved.card(text_card(folder))
    assert (card.chat_template, card.tool_template) == ("{{ messages[0].content }}", for_tools)
    with Tokenizing(60.0, HELPER) as tokenizing:
        request = replace(chat("one"), tools=({"type": "function", "function": {"name": "add"}},))
        one, other = (tokenizing.tokenize(source, request).tokens for source in proved.sources)
        assert one == other != tokenizing.tokenize(proved.sources[0], chat("one")).tokens


def test_a_template_in_a_file_of_its_own_is_used(folder: Path, tmp_path: Path) -> None:
    set_tokenizer_config(folder, chat_template=None)
    template = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    proved = prove(unproved(folder, text_card(folder)), tmp_path)
    assert proved.card(text_card(folder)).chat_template == template
    with Tokenizing(60.0, HELPER) as tokenizing:
        one, other = (tokenizing.tokenize(source, chat("two")).tokens for source in proved.sources)
        assert one == other
    assert tokenizer_config(folder)["chat_template"] == template


def test_a_template_that_does_not_end_fails_its_proof(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_proof, "PROOF_S", 8.0)
    set_tokenizer_config(folder, chat_template=ENDLESS)
    assert prove(unproved(folder, text_card(folder)), tmp_path).file is None
    assert remembered(unproved(folder, text_card(folder)), tmp_path) is None  # it may succeed on a faster machine


def test_a_proof_is_stored_until_something_changes(folder: Path, tmp_path: Path) -> None:
    plain_source = unproved(folder, text_card(folder))
    assert remembered(plain_source, tmp_path) is None
    proved = prove(plain_source, tmp_path)
    assert remembered(plain_source, tmp_path) == proved
    set_tokenizer_config(folder, clean_up_tokenization_spaces=True)
    assert remembered(plain_source, tmp_path) is None
    assert prove(plain_source, tmp_path).file == proved.file
    for file in tmp_path.glob("*.json.gz"):
        file.unlink()
    assert remembered(plain_source, tmp_path) is None
    for file in tmp_path.glob("*.proof.json"):
        file.write_text("torn")
    assert remembered(plain_source, tmp_path) is None


def test_a_folder_that_cannot_be_loaded_is_not_proved(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert prove(unproved(tmp_path, text_card(tmp_path)), tmp_path / "t").file is None


def test_defaults_of_tokenizers_come_from_the_models_own_module(folder: Path) -> None:
    assert tokenizer_defaults(folder) is None
    (folder / "config.json").write_text('{"model_type": "muse_spark"}')
    assert (tokenizer_defaults(folder) or {})["chat_template_type"] == "muse_spark"


# The announcer


@pytest.fixture
def announcer_of(settings: Settings, valkey_client: Any, valkey: Any) -> Callable[..., TokenizerAnnouncer]:
    url = f"unix://{valkey.unix_socket_path}"
    placed = settings.model_copy(update={"redis_url": url})
    return lambda on_change: TokenizerAnnouncer(placed, on_change)


def test_a_tokenizer_is_proved_in_the_background_and_uploaded(
    folder: Path,
    announcer_of: Callable[..., TokenizerAnnouncer],
    valkey: Any,
    eventually: Callable[..., None],
) -> None:
    changes: list[bool] = []
    announcer = announcer_of(lambda: changes.append(True))
    card = text_card(folder)
    assert announcer.card(card) == card and announcer.sources == ()
    announcer.begin(folder, card, None)
    assert [source.path for source in announcer.sources] == [str(folder)]  # it can be used before the proof
    eventually(lambda: changes, within_s=60)
    assert len(announcer.sources) == 2
    client = connect(f"unix://{valkey.unix_socket_path}", decode_responses=False)
    proved = announcer.card(card)
    assert Registry(client).announce_model(proved)
    announcer.upload()
    eventually(lambda: TokenizerStore(client).get(str(proved.tokenizer)))
    assert not Registry(client).announce_model(proved)
    client.close()

    again = announcer_of(lambda: changes.append(True))
    again.begin(folder, card, None)
    assert again.card(card) == proved and len(changes) == 1  # the stored proof was used


def test_an_upload_waits_for_redis(
    folder: Path, settings: Settings, eventually: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings.model_copy(update={"redis_url": "unix:///nowhere"})
    announcer = TokenizerAnnouncer(settings, lambda: None)
    source = unproved(folder, text_card(folder))
    announcer._tokenizer = ModelTokenizer(source.folder, file=source.folder)
    put: list[str] = []
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"x")
    announcer.upload()
    eventually(announcer._uploading.locked)
    monkeypatch.setattr(TokenizerStore, "put", lambda _, digest, __: put.append(digest))
    eventually(lambda: put)
    eventually(lambda: not announcer._uploading.locked())
    announcer.close()
