"""LLaVA-NeXT against transformers, with each kind of language model that it is published with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

pytest.importorskip("mlx_vlm")

import mlx.core as mx
import numpy as np

from shared.settings import ROOT
from tests.architectures.vision_checks import Subject, answers, asking, text_of
from tests.architectures.vision_models import VISION_MODELS, build
from tests.support.oracles import environment_with
from worker.runner.vision.llava_next import packed, padding

ORACLE: Final = ("torch==2.13.0", "sympy", "networkx", "mpmath")
_SIZES: Final = ((300, 200), (64, 480), (1300, 40), (20, 30))


def test_rows_end_with_a_newline_and_have_no_padding() -> None:
    """Two tiles of 2 × 2 tokens beside each other, for an image that is 4 times as wide as high."""
    features = mx.arange(12).reshape(3, 4, 1)  # the whole image, then the tiles
    found = packed(features, mx.array([-1]), (1, 2), np.array([100, 400]))
    assert found[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]
    assert padding((100, 400), 8, 8) == (3, 0)
    assert padding((400, 101), 8, 8) == (0, 3)
    assert packed(features, mx.array([-1]), (1, 2), np.array([1, 400])).shape == (4, 1), "all rows are padding"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with torch."""
    return environment_with(tmp_path_factory.mktemp("oracle") / "venv", *ORACLE)


def _with_text(folder: Path, kind: str) -> None:
    """Turn a folder into one with another kind of language model, which does not state the defaults of transformers."""
    config = json.loads((folder / "config.json").read_text())
    weights: Any = mx.load(str(folder / "model.safetensors"))
    text = config["text_config"]
    text |= {"model_type": kind}
    del text["rope_theta"], text["tie_word_embeddings"]
    if kind == "qwen2":
        for name in [name for name in weights if name.startswith("language_model.") and "_proj.weight" in name]:
            if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
                bias = name.removesuffix("weight") + "bias"
                weights[bias] = 0.1 * mx.random.normal(weights[name].shape[:1])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2"])
def test_the_log_probabilities_of_transformers(kind: str, tmp_path: Path, oracle: Path) -> None:
    folder = build("llava_next", tmp_path / "model")
    _with_text(folder, kind)
    subject = Subject.of(VISION_MODELS["llava_next"], folder)
    images = [subject.image(*size, seed) for seed, size in enumerate(_SIZES)]
    requests = [*(asking([image, "What?"]) for image in images), asking([images[0], "and", images[2], "differ?"])]
    with subject.runner() as runner:
        found, _ = answers(runner, [subject.row(runner, uid, each) for uid, each in enumerate(requests)])
        texts = [text_of(runner._tokenizer, each) for each in requests]
    prompts = []
    for number, (each, text) in enumerate(zip(requests, texts, strict=True)):
        paths = [tmp_path / f"{number}-{index}.png" for index in range(len(each.image_parts))]
        for path, part in zip(paths, each.image_parts, strict=True):
            path.write_bytes(subject.files[part["image"]])
        prompts.append({"text": text, "images": list(map(str, paths))})
    program = [str(oracle), "-P", str(ROOT / "tests/support/llava_next_logits.py"), str(folder)]
    output = subprocess.run(program, input=json.dumps(prompts), check=True, capture_output=True, text=True)
    theirs = json.loads(output.stdout.splitlines()[-1])
    for uid, logprobs in enumerate(theirs):
        for token, logprob in found[uid].logprobs[0].items():
            assert logprob == pytest.approx(logprobs[token], abs=1e-3)
