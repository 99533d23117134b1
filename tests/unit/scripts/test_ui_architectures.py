"""The training's forward pass and files of each architecture are those of the model that is in the repository."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from scripts.ui_micro.architectures.architecture import PATCH, Architecture, Grid
from scripts.ui_micro.architectures.gemma import GEMMA
from scripts.ui_micro.architectures.qwen import QWEN
from scripts.ui_micro.batches import QUESTION_TOKENS, to_patches
from scripts.ui_micro.drawing import draw
from scripts.ui_micro.evaluation import Trial, held_out, prompt_for
from scripts.ui_micro.scenes import SIZES
from scripts.ui_micro.tokenizer import make_tokenizer
from scripts.ui_micro.training import Learner
from shared.settings import ROOT

vlm: Any = pytest.importorskip("mlx_vlm")
both = pytest.mark.parametrize("architecture", [QWEN, GEMMA], ids=lambda each: each.name)


@both
def test_the_recipe_writes_the_files_of_the_folder(architecture: Architecture) -> None:
    folder, tokenizer = ROOT / "models" / architecture.folder, make_tokenizer(architecture)
    files = {**architecture.files(), "config.json": architecture.config(tokenizer)}
    assert {name: json.loads((folder / name).read_bytes()) for name in files} == files
    assert (folder / "tokenizer.json").read_text("utf-8") == tokenizer.to_str(pretty=True)


@both
def test_training_gives_the_logits_of_mlx_vlm_for_each_of_several_instructions(architecture: Architecture) -> None:
    model, processor = vlm.load(str(ROOT / "models" / architecture.folder))
    trials = trials_of_every_size()
    tokenizer = make_tokenizer(architecture)
    learner = Learner(architecture, model, tokenizer)
    questions = [tokenizer.encode(f"{trial.instruction.text}{architecture.tokens.answer}").ids for trial in trials]
    ids = mx.array([[question + [0] * (QUESTION_TOKENS - len(question)) for question in questions]])
    for trial in trials:
        expected = [library_logits(model, processor, trial, other.instruction.text) for other in trials]
        patches = mx.array(to_patches([draw(trial.scene)], architecture.image))
        _, merged = architecture.encode_images(model, patches, grid_of(architecture, trial))
        layout = learner.layout(grid_of(architecture, trial), len(trials))
        _, states = learner.read(merged, ids, layout)
        logits = model.language_model.model.embed_tokens.as_linear(states[0, layout.shared :])
        for i, (question, one) in enumerate(zip(questions, expected, strict=True)):
            np.testing.assert_allclose(logits[i * QUESTION_TOKENS + len(question) - 1], one, atol=2e-3)


def trials_of_every_size() -> list[Trial]:
    trials = list(held_out(30))
    return [next(trial for trial in trials if (trial.scene.width, trial.scene.height) == size) for size in SIZES]


def grid_of(architecture: Architecture, trial: Trial) -> Grid:
    width, height = architecture.image.size or (trial.scene.width, trial.scene.height)
    return height // PATCH, width // PATCH


def library_logits(model: Any, processor: Any, trial: Trial, text: str) -> mx.array:
    """Return mlx-vlm's logits of the first token of the answer."""
    images = [Image.open(BytesIO(trial.png))]
    inputs = vlm.prepare_inputs(processor, images=images, prompts=prompt_for(processor, text))
    ids, pixels, mask = (inputs.pop(name) for name in ("input_ids", "pixel_values", "attention_mask"))
    embeddings = model.get_input_embeddings(ids, pixels, mask=mask, **inputs).inputs_embeds
    logits: mx.array = model.language_model(ids, inputs_embeds=embeddings, pixel_values=pixels, **inputs).logits[0, -1]
    return logits
