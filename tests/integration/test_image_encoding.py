"""How the runner reads and encodes images: in parts beside decoding rows, and when one is broken."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_vlm")

import mlx.core as mx
from PIL import Image

from shared.errors import JobFailure, PromptRefused
from shared.jobs.request import Request
from tests.support.runner import plan, step
from tests.support.vision_runner import TOKENS, Pictures, answer, ask, prompt_of, row, run
from worker.models.load import LoadedModel
from worker.runner.base import IMAGE_TOKENS, EncodeWork, StepPlan
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.vision import qwen_encoder
from worker.runner.vision.family import VisionFamily
from worker.runner.vision.images import Grid, ImageMedia, opened
from worker.runner.vision.load import load_vision_model
from worker.runner.vision.qwen_encoder import QwenEncoder

CHUNK = 32


@pytest.fixture
def pictures() -> Pictures:
    return Pictures()


@pytest.fixture(scope="module")
def model(tiny_vision_path: Path) -> tuple[LoadedModel, VisionFamily]:
    return load_vision_model(tiny_vision_path)


@pytest.fixture
def runner(model: tuple[LoadedModel, VisionFamily]) -> Iterator[MLXRunner]:
    loaded, family = model
    runner = MLXRunner(loaded, CHUNK, Memory(2**30, 2**28), None, family, speculation_tokens=4)
    yield runner
    runner.close()


def test_the_stages_give_what_the_library_gives(model: tuple[LoadedModel, VisionFamily]) -> None:
    encoder = model[1].encoder
    rng = np.random.default_rng(3)
    for high, wide in ((4, 4), (16, 8), (14, 22), (34, 46), (2, 40)):
        grid = Grid(high, wide, 2)
        pixels = rng.normal(size=(grid.patches, 3 * 2 * 14 * 14)).astype(np.float32)
        *_, ours = encoder.stages(pixels, grid)
        theirs = encoder.tower(mx.array(pixels), mx.array([[1, high, wide]]))
        assert mx.allclose(ours, theirs, atol=1e-5), grid
        assert ours.shape[0] == grid.tokens


def test_a_broken_image_fails_the_rows_that_show_it_and_no_other(runner: MLXRunner, pictures: Pictures) -> None:
    good, bad = pictures.part(300, 200, 1), pictures.part(300, 200, 2)
    whole = answer(runner, ask("Good?", good), pictures)
    pictures[bad["image"]] = pictures[bad["image"]][:200]
    asked = [ask("Good?", good), ask("Bad?", bad), ask("Both?", good, bad)]
    runner.insert([row(prompt_of(runner, each, pictures), each, uid) for uid, each in enumerate(asked)])
    said: dict[int, list[int]] = defaultdict(list)
    failed: dict[int, Exception] = {}
    while len(said[0]) < TOKENS:
        output = step(runner)
        failed |= dict(output.failed)
        for each in output.tokens:
            said[each.uid].append(each.token)
    assert failed.keys() == {1, 2}
    assert said.pop(0) == whole
    assert not said


def test_whatever_reading_an_image_raises_fails_its_rows_and_no_other(
    runner: MLXRunner, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = qwen_encoder.opened

    def bad_one(data: bytes) -> Image.Image:
        if data == pictures[bad["image"]]:
            raise SyntaxError("broken PNG file")  # as Pillow does, and others of its own
        return opened(data)

    good, bad = pictures.part(300, 200, 1), pictures.part(300, 200, 2)
    monkeypatch.setattr(qwen_encoder, "opened", bad_one)
    runner.insert(
        [row(prompt_of(runner, ask("?", part), pictures), ask("?", part), uid) for uid, part in enumerate((good, bad))]
    )
    failed: dict[int, Exception] = {}
    said = 0
    while said < TOKENS:
        output = step(runner)
        failed |= dict(output.failed)
        said += len(output.tokens)
    assert failed.keys() == {1}


def test_an_image_is_as_large_as_the_api_has_let_it_be(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(file, "PNG")
    monkeypatch.setattr(Image.Image, "convert", lambda image, _mode: image)  # 600 MB are not needed to see it
    assert opened(file.getvalue()).size == (20_000, 10_000)


def test_no_failure_is_told_of_rows_that_are_gone(
    model: tuple[LoadedModel, VisionFamily],
    runner: MLXRunner,
    pictures: Pictures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad, worse, good = (pictures.part(56, 56, seed) for seed in range(3))
    pictures[bad["image"]] = pictures[bad["image"]][:100]
    stages = QwenEncoder.stages

    def raises(encoder: QwenEncoder, pixels: Any, grid: Grid) -> Iterator[mx.array]:
        monkeypatch.setattr(QwenEncoder, "stages", stages)
        raise RuntimeError("the device is away")

    asked = [ask("?", part) for part in (bad, worse, good)]
    rows = [row(prompt_of(runner, each, pictures), each, uid) for uid, each in enumerate(asked)]
    monkeypatch.setattr(QwenEncoder, "stages", raises)
    runner.insert(rows[:2])
    wait([task.pixels for task in runner._vision._tasks.values() if task.pixels])
    with pytest.raises(RuntimeError, match="away"):
        step(runner)
    runner.reset()
    runner.insert(rows[2:])
    while not (output := step(runner)).tokens:
        assert not output.failed


def test_an_image_of_another_size_than_was_said_fails_its_row(runner: MLXRunner, pictures: Pictures) -> None:
    part = pictures.part(300, 200, 1) | {"width": 500}
    runner.insert([row(prompt_of(runner, ask("?", part), pictures), ask("?", part), 1)])
    while not (failed := step(runner).failed):
        pass
    assert failed[0][0] == 1


def test_rows_leave_in_every_stage(runner: MLXRunner, pictures: Pictures) -> None:
    asked = [ask(f"{number}?", pictures.part(640, 480, number)) for number in range(4)]
    expected = answer(runner, asked[3], pictures)
    for steps in range(12):
        rows = [row(prompt_of(runner, each, pictures), each, uid) for uid, each in enumerate(asked)]
        runner.insert(rows)
        for _ in range(steps):
            step(runner)
        runner.remove([0, 1, 2])
        runner.remove([3])
        assert answer(runner, asked[3], pictures) == expected
        runner.reset()


def test_images_are_encoded_in_parts_while_rows_decode(runner: MLXRunner, pictures: Pictures) -> None:
    runner.warm()
    text = ask("Hello")
    expected = answer(runner, text, pictures)
    images = [ask(f"{number}?", pictures.part(640, 480, number)) for number in range(3)]
    alone = [answer(runner, each, pictures) for each in images]
    rows = [row(prompt_of(runner, each, pictures), each, uid) for uid, each in enumerate([text, *images])]
    said, _ = run(runner, rows, every=4)
    assert [said[uid] for uid in range(4)] == [expected, *alone]


def test_a_step_encodes_about_as_long_as_it_was_told(
    runner: MLXRunner, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least a block of the image, and it says how long that takes."""
    monkeypatch.setattr(QwenEncoder, "seconds", lambda encoder, grid: 1.0)
    asked = ask("?", pictures.part(640, 480, 1))
    runner.insert([row(prompt_of(runner, asked, pictures), asked, 1)])
    assert not runner.prefillable()
    while runner.images_waiting() is None:
        runner.execute(StepPlan())
    assert runner._vision is not None
    blocks = runner._vision._encoder.blocks
    left = [runner.images_waiting()]
    while left[-1] is not None:
        assert runner.execute(StepPlan(encode=EncodeWork(0.01))).predicted_s == pytest.approx(1 / blocks)
        left.append(runner.images_waiting())
    assert left[:-1] == pytest.approx([1 - done / blocks for done in range(blocks)])
    assert list(runner.prefillable()) == [1]
    assert plan(runner).encode is None


def test_prompts_that_cannot_be_read_say_why(runner: MLXRunner, pictures: Pictures) -> None:
    picture = pictures.part(300, 200, 1)

    def refused(asked: Request) -> PromptRefused:
        with pytest.raises(PromptRefused) as told:
            prompt_of(runner, asked, pictures)
        return told.value

    assert "image placeholder" in str(refused(ask("<|image_pad|>", picture)))
    assert "image placeholder" in str(refused(ask("<|image_pad|>")))
    assert "shape" in str(refused(ask("?", picture | {"width": 3000, "height": 2})))
    long = refused(ask("?", *[picture] * 200))
    assert long.code == JobFailure.CONTEXT_LENGTH


def test_what_encoding_takes_is_known_beforehand(runner: MLXRunner, pictures: Pictures) -> None:
    """They are encoded one after another: the largest counts."""
    small, large = pictures.part(56, 56, 1), pictures.part(640, 480, 1)
    assert runner._vision is not None
    encoder = runner._vision._encoder
    several = prompt_of(runner, ask("?", small, large, small), pictures)
    assert runner.encode_bytes(several.media) == encoder.bytes(encoder.grid(640, 480)) > 0
    assert runner.encode_bytes(prompt_of(runner, ask("?"), pictures).media) == 0


def test_pieces_of_images_are_told_by_content(runner: MLXRunner, pictures: Pictures) -> None:
    prompt = prompt_of(runner, ask("?", pictures.part(300, 200, 1)), pictures)
    media = prompt.media
    assert isinstance(media, ImageMedia)
    (image,) = media.images
    pieces = prompt.tokens[image.start : image.stop]
    assert len(set(pieces)) == len(pieces) == 77 == image.grid.tokens
    assert all(IMAGE_TOKENS <= piece < 2**32 for piece in pieces)
    assert media.shift == 11 - 77
