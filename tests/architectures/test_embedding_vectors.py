"""Embedding models and rerankers: padded batches, predicted memory, and the vectors of mlx-embeddings."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
from tokenizers import Encoding, Tokenizer

from shared.jobs.request import EMBED, RERANK
from shared.models.folder import ModelError
from shared.settings import ROOT
from tests.support.embedding_models import TEXTS, make_embedding_model
from tests.support.oracles import environment_with
from worker.runner.embedding.load import load_embedding_model
from worker.runner.embedding.model import EmbeddingModel

MODELS: Final = [
    ("bert", False, "mean_tokens"),
    ("bert", False, "cls_token"),
    ("bert", False, "max_tokens"),
    ("bert", True, None),
    ("xlm-roberta", False, "mean_tokens"),
    ("xlm-roberta", True, None),
    ("modernbert", False, "mean_tokens"),
    ("modernbert", True, None),
    ("qwen3", False, "lasttoken"),
]
ORACLE: Final = "mlx-embeddings==0.1.0"
TOLERANCE: Final = 1e-4


class TinyModel:
    """A tiny model with its tokenizer."""

    def __init__(self, folder: Path, model_type: str, rerank: bool, pooling: str | None) -> None:
        self.folder = make_embedding_model(folder / model_type, model_type, rerank=rerank, pooling=pooling)
        self.rerank = rerank
        self.model: EmbeddingModel = load_embedding_model(self.folder, RERANK if rerank else EMBED)
        self._tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def encode(self, texts: Sequence[str] = TEXTS) -> list[Encoding]:
        return [
            self._tokenizer.encode("What is it?", text) if self.rerank else self._tokenizer.encode(text)
            for text in texts
        ]

    def compute(self, encoded: Sequence[Encoding]) -> Any:
        lengths = [len(each.ids) for each in encoded]
        padded = np.zeros((len(encoded), max(lengths)), np.int32)
        for row, each in zip(padded, encoded, strict=True):
            row[: len(each.ids)] = each.ids
        second = [each.type_ids.index(1) if 1 in each.type_ids else len(each.ids) for each in encoded]
        return np.array(self.model.compute(mx.array(padded), mx.array(lengths), mx.array(second)))


@pytest.fixture(params=MODELS, ids=lambda each: "-".join(map(str, each)))
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> TinyModel:
    return TinyModel(tmp_path, *request.param)


def test_a_padded_batch_gives_what_each_input_gives_alone(tiny: TinyModel) -> None:
    encoded = tiny.encode()
    batched = tiny.compute(encoded)
    alone = np.concatenate([tiny.compute([each]) for each in encoded])
    assert batched.std() > 0.01, "the inputs differ"
    assert np.abs(batched - alone).max() < 1e-5


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta"])
def test_the_head_of_a_cross_encoder(tmp_path: Path, model_type: str) -> None:
    """The weights are applied by hand: mlx-embeddings has no such heads."""
    tiny = TinyModel(tmp_path, model_type, True, None)
    weights = {name: np.array(array) for name, array in mx.load(str(tiny.folder / "model.safetensors")).items()}  # type: ignore[union-attr]
    pooler = "bert.pooler.dense" if model_type == "bert" else "classifier.dense"
    output = "classifier" if model_type == "bert" else "classifier.out_proj"
    for each in tiny.encode():
        length = len(each.ids)
        second = each.type_ids.index(1) if 1 in each.type_ids else length
        states = tiny.model.encoder(mx.array([each.ids]), mx.array([length]), mx.array([second]))
        pooled = np.tanh(np.array(states)[0, 0] @ weights[f"{pooler}.weight"].T + weights[f"{pooler}.bias"])
        logit = pooled @ weights[f"{output}.weight"].T + weights[f"{output}.bias"]
        assert tiny.compute([each])[0] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)


def test_attention_in_blocks_gives_the_same(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = tiny.encode()
    whole = tiny.compute(encoded)
    monkeypatch.setattr("worker.runner.embedding.attention.SCORE_BYTES", 8000)
    assert np.abs(tiny.compute(encoded) - whole).max() < 1e-5


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "qwen3"])
def test_a_pass_takes_no_more_memory_than_predicted(tmp_path: Path, model_type: str) -> None:
    model = TinyModel(tmp_path, model_type, False, "mean_tokens").model
    mx.eval(model.module.parameters())
    for rows, length in ((1, 128), (16, 128), (32, 64), (4, 16)):
        tokens, lengths = mx.ones((rows, length), mx.int32), mx.full((rows,), length, mx.int32)
        mx.eval(tokens, lengths)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(model.compute(tokens, lengths, lengths))
        held, predicted = mx.get_peak_memory() - before, model.pass_bytes(rows, length)
        assert held <= predicted <= 3 * held, (rows, length, held, predicted)


def test_folders_that_need_more_are_refused(tmp_path: Path) -> None:
    folder = make_embedding_model(tmp_path / "dense", "bert", pooling="mean_tokens")
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"type": "sentence_transformers.models.Dense", "path": "2_Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="the module 'Dense' is not supported"):
        load_embedding_model(folder, EMBED)
    classes = make_embedding_model(tmp_path / "classes", "bert", rerank=True)
    config = json.loads((classes / "config.json").read_text())
    (classes / "config.json").write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(ModelError, match="2 classes"):
        load_embedding_model(classes, RERANK)


def test_decoders_that_read_in_both_directions_are_refused(tmp_path: Path) -> None:
    folder = make_embedding_model(tmp_path / "both", "qwen3", pooling="lasttoken")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_bidirectional_attention": True}))
    with pytest.raises(ModelError, match="both directions"):
        load_embedding_model(folder, EMBED)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with mlx-embeddings and the packages of this one."""
    return environment_with(tmp_path_factory.mktemp("oracle") / "venv", ORACLE)


@pytest.mark.long
def test_the_vectors_of_mlx_embeddings(tiny: TinyModel, oracle: Path) -> None:
    encoded = tiny.encode()
    kind = json.loads((tiny.folder / "config.json").read_text())["model_type"]
    if tiny.rerank and kind != "modernbert":
        pytest.skip("mlx-embeddings does not load this model")
    program = [str(oracle), "-P", str(ROOT / "tests/support/mlx_embeddings_vectors.py"), str(tiny.folder)]
    inputs = json.dumps([{"ids": each.ids, "types": each.type_ids} for each in encoded])
    output = subprocess.run(program, input=inputs, check=True, capture_output=True, text=True, env={"PATH": "/usr/bin"})
    theirs = json.loads(output.stdout[output.stdout.index("[{") :])
    ours = tiny.compute(encoded)
    if tiny.rerank:
        assert np.abs(ours - np.array([each["result"] for each in theirs])).max() < TOLERANCE
        return
    assert tiny.model.pooling is not None
    pooled = {"cls": lambda states: states[0], "max": lambda states: states.max(axis=0)}.get(tiny.model.pooling.mode)
    for vector, each in zip(ours, theirs, strict=True):
        # The library knows only the mean and the last token.
        own = np.array(each["vector"]) if pooled is None else pooled(np.array(each["states"]))
        assert np.abs(vector / np.linalg.norm(vector) - own / np.linalg.norm(own)).max() < TOLERANCE
