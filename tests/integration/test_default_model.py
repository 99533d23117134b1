"""The converted default model in mlx-lm, without this project's runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from tokenizers import Tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = [
    "plain words, and  two spaces",
    " leading and trailing ",
    "lines\n\n\n\tand\ttabs\r\n",
    "it's don't we'll 2nd 12345 3.14159",
    "naïve Ünïcödé Ελληνικά русский 日本語 العربية",
    "👩‍👩‍👧‍👦 🎉🏳️‍🌈 \u00a0\u200b\ufeff",
    "<|im_start|>user\nin one piece<|im_end|>",
    "\x01\x7f",
]


@pytest.fixture(scope="module")
def loaded(smollm2_path: Path) -> tuple[Any, Any]:
    model, tokenizer = mlx_lm.load(str(smollm2_path))[:2]
    return model, tokenizer


@pytest.fixture(scope="module")
def tokenizer(loaded: tuple[Any, Any]) -> Any:
    return loaded[1]


def test_it_answers_paris(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)

    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=16) == "The capital of France is Paris."


def test_the_template_adds_the_system_prompt(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)

    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("20 12345")) == ["2", "0", "Ġ", "1", "2", "3", "4", "5"]


def test_special_tokens(tokenizer: Any) -> None:
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.decode([1, 19556, 2], skip_special_tokens=True) == "Hello"


def test_a_plain_prompt_gets_no_special_tokens(tokenizer: Any) -> None:
    assert tokenizer.encode("Hello world") == [19556, 905]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()

    assert tokenizer.decode(ids) == text
    # mlx-lm's detokenizer drops one space at the very beginning.
    assert detokenizer.text == text.removeprefix(" ")


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_file_gives_the_same_ids_without_mlx_lm(smollm2_path: Path, tokenizer: Any, text: str) -> None:
    # The API counts prompt tokens with the `tokenizers` library and this file, without mlx-lm.
    assert Tokenizer.from_file(str(smollm2_path / "tokenizer.json")).encode(text).ids == tokenizer.encode(text)


def test_the_4bit_model_computes_the_same(smollm2_4bit_path: Path, loaded: tuple[Any, Any]) -> None:
    quantized: Any = mlx_lm.load(str(smollm2_4bit_path))[0]
    token = mx.array([[1]])

    ours, reference = quantized(token).astype(mx.float32), loaded[0](token).astype(mx.float32)
    largest = float(mx.abs(reference).max())

    # The weights are the same; one model has float16 activations.
    assert mx.allclose(ours, reference, rtol=0, atol=0.02 * largest)
    assert ours.argmax().item() == reference.argmax().item()


def test_the_4bit_model_declares_its_quantisation(smollm2_4bit_path: Path) -> None:
    quantization = json.loads((smollm2_4bit_path / "config.json").read_text("utf-8"))["quantization"]

    assert quantization == {"group_size": 32, "bits": 4, "model.embed_tokens": {"group_size": 32, "bits": 8}}


def test_tiny_model_generates(tiny_model_path: Path) -> None:
    model, tokenizer = mlx_lm.load(str(tiny_model_path))[:2]

    def tokens() -> list[int]:
        return [step.token for step in mlx_lm.stream_generate(model, tokenizer, "hello", max_tokens=64)]

    assert tokens() == tokens()
    assert len(set(tokens())) > 8
