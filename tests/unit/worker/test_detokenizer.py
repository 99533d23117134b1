"""Texts of single tokens add up to the decoded text of all of them, for every kind of tokenizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shared.settings import ROOT
from worker.runner.detokenizer import make_detokenizer

CORPUS = ["The capital of France is Paris.", " a  b\n\tc", "naïve café 日本語 👩‍👩‍👧 Ġ ▁ ##s", "0123456789"] * 3


def trained(model: Any, trainer: Any, pre: Any, decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoder
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level(decoder: Any) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), decoder)


def sentencepiece() -> Tokenizer:
    """As Llama 2's: `▁` for spaces, a dummy prefix, and bytes for unknown characters."""
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model = models.BPE(byte_fallback=True, unk_token="<unk>")
    return trained(model, trainer, pre_tokenizers.Metaspace(), decoders.Sequence(parts))


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())


def word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    pre = pre_tokenizers.Whitespace()
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, pre, decoders.WordPiece(cleanup=False))


TOKENIZERS = {
    "SmolLM2": Tokenizer.from_file(str(ROOT / "models/SmolLM2-135M-Instruct/tokenizer.json")),
    "ui-micro": Tokenizer.from_file(str(ROOT / "models/ui-micro/tokenizer.json")),
    "byte level": byte_level(decoders.ByteLevel()),
    "byte level in a sequence": byte_level(decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])),
    "sentencepiece": sentencepiece(),
    "unigram": unigram(),
    "word piece": word_piece(),
}


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    detokenizer = make_detokenizer(SimpleNamespace(backend_tokenizer=tokenizer))
    return [*map(detokenizer.add, tokens), detokenizer.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(max_size=30) | st.sampled_from(CORPUS))
@settings(max_examples=60, deadline=None)
def test_the_stream_is_the_decoded_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["SmolLM2", "byte level", "byte level in a sequence"])
def test_the_first_space_is_part_of_the_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode(" Paris.", add_special_tokens=False).ids
    assert "".join(streamed(tokenizer, tokens)) == " Paris."


# Not sentencepiece: it turns a whole run of bytes invalid because of its last one, which a stream cannot foresee.
@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "sentencepiece"])
@given(numbers=st.lists(st.integers(0, 10**6), max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_stream_of_any_tokens_is_the_decoded_text(kind: str, numbers: list[int]) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens = [number % tokenizer.get_vocab_size() for number in numbers]
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=False)


def test_endless_invalid_bytes_are_streamed_too() -> None:
    tokenizer = TOKENIZERS["SmolLM2"]
    tokens = [tokenizer.token_to_id("Ã")] * 200
    texts = streamed(tokenizer, tokens)
    assert set("".join(texts)) == {"\N{REPLACEMENT CHARACTER}"}
    assert sum(map(bool, texts)) >= 10


def test_a_tokenizer_in_python_is_decoded_by_its_library() -> None:
    class Inner:
        last_segment = ""

        def _maybe_trim_space(self, text: str) -> str:
            return text[1:]

        def add_token(self, token: int) -> None:
            self.last_segment = self._maybe_trim_space(f" {token}")

        def finalize(self) -> None:
            self.last_segment = "."

    detokenizer = make_detokenizer(SimpleNamespace(detokenizer=Inner()))
    assert [detokenizer.add(1), detokenizer.add(2), detokenizer.finish()] == [" 1", " 2", "."]
