"""Tokenising in helper processes: correct ids, time and memory limits, and isolation of templates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from shared.errors import PromptRefused
from shared.settings import ROOT
from shared.tokenizing.client import (
    TokenizerBroken,
    TokenizerBusy,
    TokenizerCorrupt,
    Tokenizing,
)
from shared.tokenizing.messages import Tokenized, TokenizerSource, digest
from tests.support.tokenizers import CHATML, ENDLESS, HARM, chat, plain, word_tokenizer, written

LONG = "word " * 20_000


@pytest.fixture
def tokenizing() -> Iterator[Tokenizing]:
    with Tokenizing(20.0) as made:
        yield made


@pytest.fixture
def hasty() -> Iterator[Tokenizing]:
    with Tokenizing(1.0) as made:
        yield made


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., TokenizerSource]:
    path = written(tmp_path)
    return lambda template=CHATML, **more: TokenizerSource(str(path), chat_template=template, **more)


_others: set[int] = set()


@pytest.fixture(autouse=True)
def _note_other_processes() -> None:
    """Exclude processes of the test session, such as the shared Valkey server."""
    _others.clear()
    _others.update(child.pid for child in psutil.Process().children(recursive=True))


def helpers(of: int | None = None) -> list[psutil.Process]:
    """Return the helper processes of a process, by default of this one."""
    return [child for child in psutil.Process(of).children(recursive=True) if child.pid not in _others]


def refusal(tokenizing: Tokenizing, *args: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(PromptRefused) as caught:
        tokenizing.tokenize(*args, **options)
    return caught.value.code, str(caught.value)


def test_prompt_is_tokenised(tokenizing: Tokenizing, source: Callable[..., TokenizerSource]) -> None:
    assert tokenizing.tokenize(source(), plain("word other")) == Tokenized((2, 0, 1))
    # No second special token is added to a prompt that begins with it.
    assert tokenizing.tokenize(source(bos_token="<s>"), plain("<s> word")) == Tokenized((2, 0))
    assert tokenizing.tokenize(source(), chat("word")) == Tokenized((3, 0, 5))
    assert len(helpers()) == 1


def test_shared_prefix_ends_with_the_system_message(
    tokenizing: Tokenizing, source: Callable[..., TokenizerSource]
) -> None:
    system = {"role": "system", "content": "word word"}
    assert tokenizing.tokenize(source(), chat(system, "x", share=True)) == Tokenized((4, 0, 0, 3, 1, 5), shared=3)
    assert tokenizing.tokenize(source(), chat(system, "x")).shared == 0
    strict = "{% if messages|length < 2 %}{{ raise_exception('alone') }}{% endif %}" + CHATML
    assert tokenizing.tokenize(source(strict), chat(system, "x", share=True)).shared == 0


def test_image_is_one_token_and_templates_see_only_its_type(
    tokenizing: Tokenizing, source: Callable[..., TokenizerSource]
) -> None:
    template = (
        "{% for part in messages[0].content %}{{ '<image>' if part == {'type': 'image'} else part.text }} {% endfor %}"
    )
    image = {"type": "image", "image": "a" * 64, "width": 8, "height": 8}
    message = {"role": "user", "content": [image, {"type": "text", "text": "word"}, image]}
    assert tokenizing.tokenize(source(template), chat(message)).tokens == (6, 0, 6)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "This model has no chat template. Send a prompt instead of messages."),
        ("{{ raise_exception('roles must alternate') }}", "The model's chat template rejected the messages: roles"),
        ("{{ messages[7].content.nothing }}", "The model's chat template rejected the messages."),
        ("{% nonsense %}", "The model's chat template rejected the messages."),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "The model's chat template rejected the messages."),
        ("", "The prompt is empty: it has no tokens."),
    ],
)
def test_rejection_names_the_reason(
    tokenizing: Tokenizing, source: Callable[..., TokenizerSource], template: str | None, message: str
) -> None:
    code, text = refusal(tokenizing, source(template), chat("x"))
    assert code == "template_error" and text.startswith(message)


@pytest.mark.parametrize("request_of", [plain, chat])
def test_prompt_longer_than_the_context_is_rejected(
    tokenizing: Tokenizing, source: Callable[..., TokenizerSource], request_of: Any
) -> None:
    fits = len(tokenizing.tokenize(source(), request_of("word " * 50)).tokens)
    assert len(tokenizing.tokenize(source(), request_of("word " * 50), context=fits + 1).tokens) == fits
    code, text = refusal(tokenizing, source(), request_of("word " * 50), context=fits)
    assert code == "context_length_exceeded" and f"{fits} tokens: it has {fits}, and the answer needs" in text
    assert refusal(tokenizing, source(), request_of("word " * 50), context=fits + 2, reserved=2)[0] == code
    # Prompts that are far too long are rejected before they are tokenised completely.
    for many in (2_000, 3_000_000):
        assert refusal(tokenizing, source(), request_of("word " * many), context=100) == (
            code,
            "The prompt is longer than the model's context of 100 tokens.",
        )


@pytest.mark.parametrize("harm", HARM)
def test_harmful_template_fails_only_its_request(
    hasty: Tokenizing, source: Callable[..., TokenizerSource], harm: str
) -> None:
    assert refusal(hasty, source(HARM[harm]), chat("x"), context=2**20)[0] == "template_error"
    assert hasty.tokenize(source(), chat("word")).tokens == (3, 0, 5)
    assert len(helpers()) <= 2


def test_waiting_requests_use_the_next_helper_after_a_timeout(
    hasty: Tokenizing, source: Callable[..., TokenizerSource]
) -> None:
    results: list[object] = []

    def ask(template: str) -> None:
        try:
            results.append(hasty.tokenize(source(template), chat("word")).tokens)
        except PromptRefused as error:
            results.append(error.code)

    threads = [threading.Thread(target=ask, args=[template]) for template in (ENDLESS, *[CHATML] * 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, results)) == [*["(3, 0, 5)"] * 8, "template_error"]


def test_short_prompts_wait_neither_for_long_prompts_nor_for_slow_models(
    source: Callable[..., TokenizerSource], eventually: Callable[..., None]
) -> None:
    with Tokenizing(1.0) as tokenizing:
        refusal(tokenizing, source(ENDLESS), chat("x"))
        for slow in (chat("x"), chat(LONG)):  # of a model that has timed out before; a long prompt
            late = threading.Thread(target=refusal, args=[tokenizing, source(ENDLESS), slow])
            late.start()
            eventually(tokenizing._long._lock.locked)
            assert tokenizing.tokenize(source(), chat("word")).tokens
            assert late.is_alive()
            late.join()


def test_waiting_for_a_helper_is_limited(
    source: Callable[..., TokenizerSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.tokenizing.client._MAX_WAIT", 0.01)
    with Tokenizing(5.0) as tokenizing:
        with tokenizing._short._lock, pytest.raises(TokenizerBusy):
            tokenizing.tokenize(source(), plain("word"))
        assert tokenizing.tokenize(source(), plain("word")).tokens


def test_killed_helper_is_replaced(
    tokenizing: Tokenizing, source: Callable[..., TokenizerSource], eventually: Callable[..., None]
) -> None:
    tokenizing.tokenize(source(), plain("word"))
    [helper] = helpers()
    helper.kill()
    eventually(lambda: helper.status() == psutil.STATUS_ZOMBIE)
    assert tokenizing.tokenize(source(), plain("word")).tokens == (2, 0)


def test_prompt_that_crashes_helpers_is_rejected(
    tokenizing: Tokenizing, source: Callable[..., TokenizerSource], eventually: Callable[..., None]
) -> None:
    messages: list[str] = []
    thread = threading.Thread(target=lambda: messages.append(refusal(tokenizing, source(ENDLESS), chat("x"))[1]))
    thread.start()
    killed: set[int] = set()

    def kill() -> bool:
        for helper in helpers():
            if helper.pid not in killed and helper.cpu_times().user > 0.5:
                killed.add(helper.pid)
                helper.kill()
        return not thread.is_alive()

    eventually(kill, within_s=60.0)
    assert len(killed) == 2 and messages == ["The model's chat template or tokenizer crashed twice on this prompt."]


def test_helper_that_cannot_start_is_not_blamed_on_the_prompt(source: Callable[..., TokenizerSource]) -> None:
    with Tokenizing(5.0, "shared.no_such_helper") as tokenizing, pytest.raises(TokenizerBusy):
        tokenizing.tokenize(source(), plain("word"))


def test_file_must_match_its_digest(tokenizing: Tokenizing, tmp_path: Path) -> None:
    path = written(tmp_path)
    good = digest(word_tokenizer())
    assert tokenizing.tokenize(TokenizerSource(str(path), good), plain("word")).tokens == (2, 0)
    with pytest.raises(TokenizerCorrupt):
        tokenizing.tokenize(TokenizerSource(str(path), "0" * 32), plain("word"))
    with pytest.raises(TokenizerCorrupt):
        tokenizing.tokenize(TokenizerSource(str(tmp_path / "missing.json.gz")), plain("word"))
    (tmp_path / "damaged.json.gz").write_bytes(b"\x1f\x8b damaged")
    with pytest.raises(TokenizerCorrupt):
        tokenizing.tokenize(TokenizerSource(str(tmp_path / "damaged.json.gz")), plain("word"))


@pytest.mark.parametrize("text", ["{}", "no tokenizer", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_invalid_tokenizer_file_is_reported_as_broken(tokenizing: Tokenizing, tmp_path: Path, text: str) -> None:
    with pytest.raises(TokenizerBroken):
        tokenizing.tokenize(TokenizerSource(str(written(tmp_path, text))), plain("word"))


def test_invalid_unicode_does_not_end_the_helper(
    tokenizing: Tokenizing, source: Callable[..., TokenizerSource]
) -> None:
    assert refusal(tokenizing, source(), plain("word \ud800"))[0] == "template_error"
    assert refusal(tokenizing, source(), chat("word \ud800"))[0] == "template_error"
    assert len(helpers()) == 1


# Properties of the helper process


def test_helper_inherits_no_files_or_secrets_and_ignores_ctrl_c(
    tokenizing: Tokenizing, source: Callable[..., TokenizerSource], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:secret@nowhere")
    monkeypatch.setenv("MLXQ_API_KEY", "secret")
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        tokenizing.tokenize(source(), plain("word"))
    [helper] = helpers()
    helper.send_signal(signal.SIGINT)
    assert tokenizing.tokenize(source(), plain("word")).tokens == (2, 0)
    assert helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE
    assert "secret" not in str(helper.environ())
    assert not [opened for opened in helper.open_files() if opened.path.endswith("/open")]
    assert helper.num_fds() <= 5  # the socket twice, /dev/null, and stderr of the tests


PARENT = """
import sys
from shared.tokenizing.client import Tokenizing
from tests.support.tokenizers import CHATML, ENDLESS, chat
from shared.tokenizing.messages import TokenizerSource
tokenizing = Tokenizing(2.0)
tokenizing.tokenize(TokenizerSource(sys.argv[1], chat_template=CHATML), chat("word"))
print("ready", flush=True)
sys.stdin.readline()
tokenizing.tokenize(TokenizerSource(sys.argv[1], chat_template=ENDLESS), chat("word"))
"""


@pytest.mark.parametrize("busy", [False, True])
def test_helper_ends_with_its_client(tmp_path: Path, eventually: Callable[..., None], busy: bool) -> None:
    command = [sys.executable, "-c", PARENT, str(written(tmp_path))]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        [helper] = helpers(parent.pid)
        if busy:
            parent.stdin.write(b"\n")
            parent.stdin.flush()
            used = helper.cpu_times().user
            eventually(lambda: helper.cpu_times().user > used + 0.2)
        parent.kill()
    eventually(lambda: not helper.is_running() or helper.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("large", [0, 1_200_000_000], ids=["small", "large"])
def test_helper_that_has_grown_is_replaced(
    tokenizing: Tokenizing, source: Callable[..., TokenizerSource], eventually: Callable[..., None], large: int
) -> None:
    memory = b"x" * large  # in the process that starts the helper
    grow = "{% if messages[0].content == 'grow' %}{{ ('x' * 10 ** 9)[:0] }}{% endif %}" + CHATML
    tokenizing.tokenize(source(grow), chat("word"))
    del memory
    [helper] = helpers()
    assert tokenizing.tokenize(source(grow), chat("grow")).tokens == (3, 1, 5)
    eventually(lambda: not helper.is_running() or helper.status() == psutil.STATUS_ZOMBIE)
    assert tokenizing.tokenize(source(grow), chat("word")).tokens == (3, 0, 5)


def test_waiting_greenlet_does_not_block_others(tmp_path: Path) -> None:
    script = ROOT / "tests/support/tokenizing_under_gevent.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(script), str(written(tmp_path))], env=environment, capture_output=True, check=True
    )
    output = json.loads(result.stdout)
    assert output["tokens"] == [[2, 0, 0]]
    assert output["slow_code"] == "template_error"
    assert output["turns_of_others"] > 1
    assert output["tokens_after_kill"] == [2, 0, 0]
