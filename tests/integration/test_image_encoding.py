"""Image encoding in the model runner: in parts while rows decode, and with broken images."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
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
from tests.support.vision_runner import TOKENS, ImageFiles, answer, ask, prompt_of, row, run
from worker.models.load import LoadedModel
from worker.runner.base import IMAGE_TOKENS, EncodeWork, StepPlan
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.vision import qwen_encoder
from worker.runner.vision.half import VisionHalf
from worker.runner.vision.images import Grid, ImageMedia, decode_image
from worker.runner.vision.load import load_vision_model
from worker.runner.vision.qwen_encoder import QwenEncoder, WindowEncoder

CHUNK = 32


@pytest.fixture
def files() -> ImageFiles:
    return ImageFiles()


@pytest.fixture(scope="module")
def model(tiny_vision_path: Path) -> tuple[LoadedModel, VisionHalf]:
    return load_vision_model(tiny_vision_path)


@pytest.fixture
def runner(model: tuple[LoadedModel, VisionHalf]) -> Iterator[MLXRunner]:
    loaded, vision = model
    runner = MLXRunner(loaded, CHUNK, Memory(2**30, 2**28), None, vision, speculation_tokens=4)
    yield runner
    runner.close()


def test_the_stages_give_the_features_of_mlx_vlm(model: tuple[LoadedModel, VisionHalf]) -> None:
    encoder = model[1].encoder
    rng = np.random.default_rng(3)
    for rows, columns in ((4, 4), (16, 8), (14, 22), (34, 46), (2, 40)):
        grid = Grid(rows, columns, 2)
        pixels = rng.normal(size=(grid.patches, 3 * 2 * 14 * 14)).astype(np.float32)
        *_, ours = encoder.stages(pixels, grid)
        theirs = encoder.tower(mx.array(pixels), mx.array([[1, rows, columns]]))
        assert mx.allclose(ours[0], theirs, atol=1e-5), grid
        assert ours.shape[:2] == (1, grid.tokens)


def test_a_broken_image_fails_only_the_rows_that_contain_it(runner: MLXRunner, files: ImageFiles) -> None:
    good, bad = files.part(300, 200, 1), files.part(300, 200, 2)
    expected = answer(runner, ask("Good?", good), files)
    files[bad["image"]] = files[bad["image"]][:200]
    requests = [ask("Good?", good), ask("Bad?", bad), ask("Both?", good, bad)]
    runner.insert([row(prompt_of(runner, each, files), each, uid) for uid, each in enumerate(requests)])
    tokens: dict[int, list[int]] = defaultdict(list)
    failed: dict[int, Exception] = {}
    while len(tokens[0]) < TOKENS:
        output = step(runner)
        failed |= dict(output.failed)
        for each in output.tokens:
            tokens[each.uid].append(each.token)
    assert failed.keys() == {1, 2}
    assert tokens.pop(0) == expected
    assert not tokens


def test_any_error_of_an_image_decoder_fails_only_the_rows_of_the_image(
    runner: MLXRunner, files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_image = qwen_encoder.decode_image

    def raise_for_bad(data: bytes, max_pixels: int) -> Image.Image:
        if data == files[bad["image"]]:
            raise SyntaxError("broken PNG file")  # one of the exceptions that Pillow raises
        return decode_image(data, max_pixels)

    good, bad = files.part(300, 200, 1), files.part(300, 200, 2)
    monkeypatch.setattr(qwen_encoder, "decode_image", raise_for_bad)
    runner.insert(
        [row(prompt_of(runner, ask("?", part), files), ask("?", part), uid) for uid, part in enumerate((good, bad))]
    )
    failed: dict[int, Exception] = {}
    tokens = 0
    while tokens < TOKENS:
        output = step(runner)
        failed |= dict(output.failed)
        tokens += len(output.tokens)
    assert failed.keys() == {1}


def test_large_images_that_the_api_accepted_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(file, "PNG")
    monkeypatch.setattr(Image.Image, "convert", lambda image, _mode: image)  # avoid allocating 600 MB
    assert decode_image(file.getvalue(), 20_000 * 10_000).size == (20_000, 10_000)


def test_no_failures_are_reported_for_rows_before_a_reset(
    model: tuple[LoadedModel, VisionHalf],
    runner: MLXRunner,
    files: ImageFiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad, worse, good = (files.part(56, 56, seed) for seed in range(3))
    files[bad["image"]] = files[bad["image"]][:100]
    stages = WindowEncoder.stages

    def raises(encoder: WindowEncoder, pixels: Any, grid: Grid) -> Iterator[mx.array]:
        monkeypatch.setattr(WindowEncoder, "stages", stages)
        raise RuntimeError("the device failed")

    requests = [ask("?", part) for part in (bad, worse, good)]
    rows = [row(prompt_of(runner, each, files), each, uid) for uid, each in enumerate(requests)]
    monkeypatch.setattr(WindowEncoder, "stages", raises)
    runner.insert(rows[:2])
    wait([task.pixels for task in runner._vision._tasks.values() if task.pixels])
    with pytest.raises(RuntimeError, match="failed"):
        step(runner)
    runner.reset()
    runner.insert(rows[2:])
    while not (output := step(runner)).tokens:
        assert not output.failed


def test_an_image_of_another_size_than_in_the_request_fails_its_row(runner: MLXRunner, files: ImageFiles) -> None:
    part = files.part(300, 200, 1) | {"width": 500}
    runner.insert([row(prompt_of(runner, ask("?", part), files), ask("?", part), 1)])
    while not (failed := step(runner).failed):
        pass
    assert failed[0][0] == 1


def test_rows_can_be_removed_at_every_stage(runner: MLXRunner, files: ImageFiles) -> None:
    requests = [ask(f"{number}?", files.part(640, 480, number)) for number in range(4)]
    expected = answer(runner, requests[3], files)
    for steps in range(12):
        rows = [row(prompt_of(runner, each, files), each, uid) for uid, each in enumerate(requests)]
        runner.insert(rows)
        for _ in range(steps):
            step(runner)
        runner.remove([0, 1, 2])
        runner.remove([3])
        assert answer(runner, requests[3], files) == expected
        runner.reset()


def test_images_are_encoded_in_parts_while_rows_decode(runner: MLXRunner, files: ImageFiles) -> None:
    runner.warm()
    text = ask("Hello")
    expected = answer(runner, text, files)
    images = [ask(f"{number}?", files.part(640, 480, number)) for number in range(3)]
    single = [answer(runner, each, files) for each in images]
    rows = [row(prompt_of(runner, each, files), each, uid) for uid, each in enumerate([text, *images])]
    tokens, _ = run(runner, rows, every=4)
    assert [tokens[uid] for uid in range(4)] == [expected, *single]


def test_a_step_encodes_for_about_the_planned_time(
    runner: MLXRunner, files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step encodes at least one block, and reports its predicted cost."""
    monkeypatch.setattr(QwenEncoder, "seconds", lambda encoder, grid: 1.0)
    request = ask("?", files.part(640, 480, 1))
    runner.insert([row(prompt_of(runner, request, files), request, 1)])
    assert not runner.prefillable()
    while runner.next_image_s() is None:
        runner.execute(StepPlan())
    assert runner._vision is not None
    blocks = runner._vision._encoder.blocks
    remaining = [runner.next_image_s()]
    while remaining[-1] is not None:
        assert runner.execute(StepPlan(encode=EncodeWork(0.01))).predicted_s == pytest.approx(1 / blocks)
        remaining.append(runner.next_image_s())
    assert remaining[:-1] == pytest.approx([1 - done / blocks for done in range(blocks)])
    assert list(runner.prefillable()) == [1]
    assert plan(runner).encode is None


def test_prompts_with_unusable_images_are_refused_with_a_reason(runner: MLXRunner, files: ImageFiles) -> None:
    image = files.part(300, 200, 1)

    def refusal(request: Request) -> PromptRefused:
        with pytest.raises(PromptRefused) as caught:
            prompt_of(runner, request, files)
        return caught.value

    assert "image placeholder" in str(refusal(ask("<|image_pad|>", image)))
    assert "image placeholder" in str(refusal(ask("<|image_pad|>")))
    assert "shape" in str(refusal(ask("?", image | {"width": 3000, "height": 2})))
    runner.card = replace(runner.card, context=1000)
    too_many = refusal(ask("?", *[image] * 20))
    assert too_many.code == JobFailure.CONTEXT_LENGTH
    assert "1540 of them are of 20 images" in str(too_many)


def test_the_memory_for_encoding_is_that_of_the_largest_image(runner: MLXRunner, files: ImageFiles) -> None:
    small, large = files.part(56, 56, 1), files.part(640, 480, 1)
    assert runner._vision is not None
    encoder = runner._vision._encoder
    several = prompt_of(runner, ask("?", small, large, small), files)
    assert runner.encode_bytes(several.media) == encoder.bytes(encoder.layout(640, 480)) > 0
    assert runner.encode_bytes(prompt_of(runner, ask("?"), files).media) == 0


def test_image_tokens_depend_on_the_content_of_the_image(runner: MLXRunner, files: ImageFiles) -> None:
    prompt = prompt_of(runner, ask("?", files.part(300, 200, 1)), files)
    media = prompt.media
    assert isinstance(media, ImageMedia)
    (image,) = media.images
    tokens = prompt.tokens[image.start : image.stop]
    assert len(set(tokens)) == len(tokens) == 77 == image.layout.tokens
    assert all(IMAGE_TOKENS <= token < 2**32 for token in tokens)
    assert media.shift == 11 - 77
