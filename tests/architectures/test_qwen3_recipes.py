"""Qwen3-Reranker and Qwen3-Embedding against the recipes of their model cards, computed with mlx-lm for one input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx_lm.models import qwen3
from tokenizers import Tokenizer

from shared.jobs.request import EMBED, RERANK, Request
from shared.models.catalog import CatalogModel
from shared.tokenizing.chat_tokenizer import FileTokenizer
from shared.tokenizing.input_tokenizer import tokenize_inputs
from shared.tokenizing.inputs import helper_fields
from shared.tokenizing.messages import TokenizerSource
from tests.support.embedding_models import TEXTS, make_embedding_model
from tests.support.runner import GREEDY
from worker.runner.embedding.load import _card, load_embedding_model

TASK: Final = "Given a web search query, retrieve relevant passages that answer the query"
QUERY: Final = "What is the capital of France?"
PREFIX: Final = (
    "<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
SUFFIX: Final = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def computed(folder: Path, kind: str, **fields: Any) -> Any:
    """Return vectors or scores as a worker computes them, in one padded batch."""
    model = load_embedding_model(folder, kind)
    card = _card(CatalogModel("m", folder, kind=kind), model)
    request = Request("m", 1, GREEDY, kind=kind, **fields)
    tokenizer = FileTokenizer.load(TokenizerSource(str(folder / "tokenizer.json")))
    inputs = tokenize_inputs(tokenizer, helper_fields(request, card))
    lengths = [len(each.tokens) for each in inputs]
    padded = np.zeros((len(inputs), max(lengths)), np.int32)
    for row, each in zip(padded, inputs, strict=True):
        row[: len(each.tokens)] = each.tokens
    result = np.array(model.compute(mx.array(padded), mx.array(lengths), mx.array(lengths)))
    return np.array([model.shorten(each, None) for each in result])


def library_model(folder: Path) -> Any:
    """Return mlx-lm's model with the weights of a folder."""
    model = qwen3.Model(qwen3.ModelArgs.from_dict(json.loads((folder / "config.json").read_text())))
    weights: Any = mx.load(str(folder / "model.safetensors"))
    model.load_weights([(f"model.{path}", array) for path, array in weights.items()])
    return model


def encode(folder: Path, text: str, *, special: bool) -> list[int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=special).ids


@pytest.mark.parametrize("instruction", [None, "Find rivers"])
def test_scores_are_the_probability_of_yes_against_no(tmp_path: Path, instruction: str | None) -> None:
    folder = make_embedding_model(tmp_path / "tiny-Reranker", "qwen3")
    scores = computed(folder, RERANK, inputs=TEXTS, query=QUERY, instruction=instruction)[:, 0]
    model = library_model(folder)
    yes, no = (Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(each) for each in ("yes", "no"))
    expected = []
    for document in TEXTS:
        pair = f"<Instruct>: {instruction or TASK}\n<Query>: {QUERY}\n<Document>: {document}"
        ids = [token for part in (PREFIX, pair, SUFFIX) for token in encode(folder, part, special=False)]
        logits = np.array(model(mx.array([ids])))[0, -1].astype(np.float64)
        odds = np.exp(logits[[yes, no]])
        expected.append(odds[0] / odds.sum())
    assert np.ptp(np.log(expected)) > 1, "the scores differ"
    assert scores == pytest.approx(np.array(expected), rel=1e-4)


def test_vectors_are_the_last_token_after_the_instruction(tmp_path: Path) -> None:
    folder = make_embedding_model(tmp_path / "tiny-Embedding", "qwen3", pooling="lasttoken")
    prompts = {"prompts": {"query": f"Instruct: {TASK}\nQuery:", "document": ""}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    model = library_model(folder)
    for name, prefix in (("query", f"Instruct: {TASK}\nQuery:"), (None, "")):
        vectors = computed(folder, EMBED, inputs=TEXTS, prompt_name=name)
        for text, vector in zip(TEXTS, vectors, strict=True):
            ids = encode(folder, prefix + text, special=True)
            assert ids[-1] == encode(folder, "<|endoftext|>", special=False)[0]
            state = np.array(model.model(mx.array([ids])))[0, -1]
            assert np.abs(vector - state / np.linalg.norm(state)).max() < 1e-5
