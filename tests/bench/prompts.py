"""Prompts: short questions, and texts of a given length."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from tests.bench.plans import Json

TOPICS = (
    "the capital of France", "how bread rises", "why the sky is blue", "the rules of chess", "how a bicycle stays up",
    "the life of a star", "what a prime number is", "how rivers shape land", "the history of tea", "why cats purr",
    "how vaccines work", "the phases of the moon", "what makes glass clear", "how bees find home", "the use of zero",
    "how clouds form",
)  # fmt: skip


def question(index: int, system: str = "") -> list[Json]:
    """The messages of request `index`: a short question, different for each index, with an optional system prompt."""
    topic = TOPICS[index % len(TOPICS)]
    message = {"role": "user", "content": f"Question {index}: explain {topic} in a few sentences."}
    return [{"role": "system", "content": system}, message] if system else [message]


def text_of(tokens: int, seed: int, model: Path) -> str:
    """A text with this many tokens of the model; texts of different seeds differ from the first words on."""
    draw = random.Random(seed)
    # One sentence per token is always too long, whatever the tokenizer; the text is then cut.
    sentences = [f"Text {seed}."] + [
        f"Note {draw.randrange(10_000)} is on {draw.choice(TOPICS)}." for _ in range(tokens)
    ]
    text = " ".join(sentences)
    offsets = _tokenizer(model).encode(text, add_special_tokens=False).offsets
    return text[: offsets[tokens - 1][1]]


@cache
def _tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))
