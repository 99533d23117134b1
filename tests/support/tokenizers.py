"""A tokenizer with a few words, harmful chat templates, and requests."""

from __future__ import annotations

import gzip
import os
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from shared.jobs.request import Request, Sampling
from shared.models.registry import ModelCard, Registry, WorkerInfo
from shared.redis.client import Redis
from shared.tokenizing.files import TokenizerStore
from shared.tokenizing.messages import digest

WORDS = {"word": 0, "[UNK]": 1, "<s>": 2, "user": 3, "system": 4, "assistant": 5, "<image>": 6}
CHATML = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
ENDLESS = "{% for n in range(99999) %}" * 3 + "{% endfor %}" * 3
HARM = {
    "endless": ENDLESS,
    "nested": "{% macro m(n) %}{% for i in range(9) %}{{ m(n - 1) if n }}{% endfor %}{% endmacro %}{{ m(60) }}",
    "recursive": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "huge": "{{ 'x' * 10 ** 11 }}",
    "doubling": "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "formatted": "{{ '%099999999999d' % 1 }}",
    "talkative": "{% for n in range(99999) %}{{ 'word ' * 999 }}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
}
"""Templates that need too much time or memory, or produce too much output, by name."""


def word_tokenizer() -> str:
    """Return the `tokenizer.json` of a tokenizer with one token per word, which adds `<s>` in front."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<s>", "<image>"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    text: str = tokenizer.to_str()
    return text


def announce(client: Redis, card: ModelCard, tokenizer: str | None = None) -> None:
    """Announce a model and store its tokenizer."""
    if tokenizer is not None:
        TokenizerStore(client).put(digest(tokenizer), gzip.compress(tokenizer.encode()))
    Registry(client).announce_model(card)


def announce_idle_worker(client: Redis, model: str) -> None:
    """Announce a worker that has a model and takes no jobs: models that nobody has are rejected."""
    now = time.time()
    worker = WorkerInfo(
        id=f"idle-{model}", node="idle@stub", host="stub", pid=os.getpid(), model=model, state="ready", slots=1,
        slots_used=1, started_at=now, heartbeat_at=now, stats={}, about={}, protocol=1,
    )  # fmt: skip
    Registry(client).announce_worker(worker, 3600)


def plain(text: str) -> Request:
    """Return a request with a prompt."""
    return Request("m", 1, Sampling(0.0), prompt=text)


def chat(*messages: dict[str, Any] | str, share: bool = False) -> Request:
    """Return a request with messages; a string is the content of a user message."""
    turns = tuple({"role": "user", "content": m} if isinstance(m, str) else m for m in messages)
    return Request("m", 1, Sampling(0.0), messages=turns, share_system_prompt=share)


def written(folder: Path, text: str | None = None) -> Path:
    """Write a `tokenizer.json`, by default that of `word_tokenizer`."""
    path = folder / "tokenizer.json"
    path.write_text(word_tokenizer() if text is None else text)
    return path


def byte_tokenizer() -> str:
    """Return the `tokenizer.json` of a tokenizer with one token for each of the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text: str = tokenizer.to_str()
    return text
