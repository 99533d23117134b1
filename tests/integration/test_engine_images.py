"""Jobs with images in the engine, on a Qwen2.5-VL with random weights."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_vlm")

from PIL import Image

from shared.errors import JobFailure
from shared.jobs.record import Status
from shared.jobs.request import Sampling
from shared.tokenizing.chat_tokenizer import ChatTokenizer, tokenize
from shared.tokenizing.messages import TokenizerSource, request_fields
from tests.plugins.work import claimed
from tests.support import engine
from worker.engine.sequence import Sequence as Job
from worker.models.tokenizer_helper import load_tokenizer
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.vision.load import load_vision_model

SIZES = ((300, 200), (64, 480), (640, 480), (56, 56))


class Model:
    """A runner, its tokenizer, and the image files of all jobs created so far."""

    def __init__(self, folder: Path) -> None:
        loaded, vision = load_vision_model(folder)
        self.runner = MLXRunner(loaded, 32, Memory(2**30, 2**28), None, vision)
        self.encoder: ChatTokenizer = load_tokenizer(TokenizerSource(str(folder), vision=True))
        self.files: dict[str, bytes] = {}

    def job(self, text: str, *parts: dict[str, Any], seed: int = 0) -> Job:
        content = [*parts, {"type": "text", "text": text}] if parts else text
        job = claimed(
            text, max_tokens=16, sampling=Sampling(0.9, seed=seed), messages=({"role": "user", "content": content},)
        )
        tokens, shared = tokenize(self.encoder, request_fields(job.request))
        return Job(job, self.runner.prompt(tokens, shared, job.request, self.files), self.runner)

    def image(self, width: int, height: int, seed: int) -> dict[str, Any]:
        """Create an image and return the message part that names it."""
        dots = np.random.default_rng(seed).integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(dots).resize((width, height)).save(file, "PNG")
        return self.add(file.getvalue(), width, height)

    def add(self, data: bytes, width: int, height: int) -> dict[str, Any]:
        """Add an image file and return the message part that names it."""
        digest = hashlib.sha256(data).hexdigest()
        self.files[digest] = data
        return {"type": "image", "image": digest, "width": width, "height": height}

    def mixed(self) -> list[Job]:
        """Return jobs with none to two images of all sizes."""
        return [
            self.job(
                f"Question {number}?",
                *(self.image(*SIZES[(number + i) % 4], seed=number // 2) for i in range(number % 3)),
                seed=number,
            )
            for number in range(9)
        ]

    def texts(self, jobs: Sequence[Job]) -> list[str | None]:
        """Submit all jobs at once. Returns their texts; None for each that failed."""
        texts = engine.run(self.runner, jobs)
        return [text if job.ending and job.ending.status is Status.SUCCEEDED else None for job, text in texts.items()]


@pytest.fixture(scope="module")
def model(tiny_vision_path: Path) -> Iterator[Model]:
    model = Model(tiny_vision_path)
    yield model
    model.runner.close()


def test_batched_image_and_text_jobs_give_the_same_texts_as_single_jobs(model: Model) -> None:
    single = [text for job in model.mixed() for text in model.texts([job])]
    model.runner.reset()
    assert None not in single
    assert model.texts(model.mixed()) == single


def test_a_broken_image_fails_only_its_job(model: Model) -> None:
    before, after = model.mixed()[1:3], model.mixed()[3:5]
    expected = model.texts([*model.mixed()[1:5]])
    model.runner.reset()
    whole = next(iter(model.files.values()))
    bad = model.job("What is this?", model.add(whole[: len(whole) // 2], 300, 200))
    assert model.texts([*before, bad, *after]) == [*expected[:2], None, *expected[2:]]
    assert bad.ending is not None and bad.ending.error_code == JobFailure.ROW
