"""Tokenizers of the kinds that models have, trained on a few words, with the special tokens of `chat_templates`."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.support.chat_templates import MARKERS, SPECIAL

_TEXTS = ["the im_start and im_end of a user's system assistant message, think tool call", "1 2 3 {}[]:,.\"'<>|/_\n\n"]


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return _with_tokens(tokenizer)


@cache
def _sentence_piece() -> str:
    """Byte fallback, and a space before each text, as in Llama 2."""
    pieces = sorted({character for text in _TEXTS for character in text.replace(" ", "▁")} | {"▁"})
    vocabulary = {token: n for n, token in enumerate(["<unk>", *(f"<0x{n:02X}>" for n in range(256)), *pieces])}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _with_tokens(tokenizer)


@cache
def _unigram() -> str:
    """A model that could produce the special tokens from plain text, because its vocabulary has them."""
    characters = sorted({character for text in _TEXTS for character in text} | {"▁"})
    scored = [("<unk>", 0.0), *((token, 0.0) for token in SPECIAL), *((character, -5.0) for character in characters)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    return _with_tokens(tokenizer)


def _with_tokens(tokenizer: Tokenizer) -> str:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKERS])
    text: str = tokenizer.to_str()
    return text


def byte_level() -> Tokenizer:
    """Return a byte-level BPE, as in GPT-2, Llama 3 and Qwen."""
    return Tokenizer.from_str(_byte_level())


TOKENIZERS = {"byte_level": _byte_level, "sentence_piece": _sentence_piece, "unigram": _unigram}
"""Functions that return a `tokenizer.json`, by kind."""
