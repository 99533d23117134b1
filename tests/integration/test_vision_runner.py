"""The runner with a real (random) Qwen2.5-VL, beside mlx-vlm's own `generate`."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_vlm")

import mlx.core as mx
from mlx_vlm import load as load_with_mlx_vlm
from mlx_vlm import stream_generate
from mlx_vlm.prompt_utils import apply_chat_template
from PIL import Image

from shared.errors import JobFailure, PromptRefused
from shared.jobs.request import Request, Sampling
from tests.support.runner import plan, step
from worker.models.load import LoadedModel
from worker.runner import model_runner
from worker.runner.base import IMAGE_TOKENS, EncodeWork, Prompt, Row, StepPlan
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.vision import qwen_encoder
from worker.runner.vision.family import VisionFamily
from worker.runner.vision.images import Grid, ImageMedia, opened
from worker.runner.vision.load import load_vision_model
from worker.runner.vision.qwen_encoder import QwenEncoder

GREEDY = Sampling(temperature=0.0)
CHUNK = 32
TOKENS = 24
SAMPLINGS = (
    GREEDY,
    Sampling(1.0, seed=11),
    Sampling(0.8, top_p=0.9, seed=2**63),
    Sampling(1.2, top_k=40, min_p=0.02, seed=13, repetition_penalty=1.1),
    Sampling(0.0, presence_penalty=0.7, frequency_penalty=0.3),
)
SIZES = ((300, 200), (64, 480), (640, 480), (56, 56))


class Pictures(dict[str, bytes]):
    """Files by digest, as the worker gets them; and the parts of messages that name them."""

    def part(self, width: int, height: int, seed: int) -> dict[str, Any]:
        """A picture of coloured squares; another seed gives another."""
        dots = np.random.default_rng(seed).integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(dots).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
        digest = hashlib.sha256(file.getvalue()).hexdigest()
        self[digest] = file.getvalue()
        return {"type": "image", "image": digest, "width": width, "height": height}


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


def ask(text: str, *images: dict[str, Any], sampling: Sampling = GREEDY) -> Request:
    content = [*images, {"type": "text", "text": text}] if images else text
    return Request("m", TOKENS, sampling, messages=({"role": "user", "content": content},))


def mixed(pictures: Pictures) -> list[Request]:
    """Sixteen: with no image, one or several of all sizes, sampled in all ways."""
    asked = []
    for number in range(16):
        images = [pictures.part(*SIZES[(number + i) % len(SIZES)], seed=number // 2) for i in range(number % 4)]
        asked.append(ask(f"Question {number}?", *images, sampling=SAMPLINGS[number % len(SAMPLINGS)]))
    return asked


def prompt_of(runner: MLXRunner, asked: Request, files: Pictures) -> Prompt:
    """As the tokenizing helper gives it to the runner."""
    assert asked.messages is not None
    messages = [{**message, "content": parts(message["content"])} for message in asked.messages]
    tokens = runner._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return runner.prompt(tokens, 0, asked, files)


def parts(content: Any) -> Any:
    """Templates know images by the type of their part alone."""
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image" else part for part in content]


def row(prompt: Prompt, asked: Request, uid: int, owner: str | None = None) -> Row:
    return Row(uid, asked, prompt.tokens, 0, asked.max_tokens, owner, media=prompt.media)


def run(runner: MLXRunner, rows: Sequence[Row], every: int = 0) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Step until all have all their tokens; a row joins `every` so many steps. Tokens, and how many were reused."""
    said: dict[int, list[int]] = defaultdict(list)
    reused: dict[int, int] = {}
    waiting, steps = list(rows), 0
    while any(len(said[each.uid]) < each.max_new_tokens for each in rows):
        while waiting and (not every or steps % every == 0):
            runner.insert([waiting.pop(0)])
            if every:
                break
        output = step(runner)
        assert not output.failed
        reused |= output.prefilled
        for each in output.tokens:
            said[each.uid].append(each.token)
        steps += 1
        assert steps < 3000
    return said, reused


def answer(runner: MLXRunner, asked: Request, files: Pictures, owner: str | None = None) -> list[int]:
    prompt = prompt_of(runner, asked, files)
    return run(runner, [row(prompt, asked, 1, owner)])[0][1]


def of_mlx_vlm(folder: Path, tmp_path: Path, asked: Sequence[Request], files: Pictures) -> list[list[int]]:
    """What its own `generate` says to these."""
    model, processor = load_with_mlx_vlm(str(folder))
    said = []
    for each in asked:
        assert each.messages is not None
        content = each.messages[0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        paths = [tmp_path / f"{part['image']}.png" for part in each.image_parts]
        for path in paths:
            path.write_bytes(files[path.stem])
        prompt = apply_chat_template(processor, model.config, text, num_images=len(paths))
        images = [str(path) for path in paths] or None
        stream = stream_generate(model, processor, prompt, image=images, max_tokens=TOKENS, temperature=0.0)
        said.append([int(part.token) for part in stream][:TOKENS])
    return said


def test_greedy_rows_say_what_mlx_vlm_says(
    runner: MLXRunner, pictures: Pictures, tiny_vision_path: Path, tmp_path: Path
) -> None:
    asked = [replace(each, sampling=GREEDY) for each in mixed(pictures)[:8]]
    rows = [row(prompt_of(runner, each, pictures), each, uid) for uid, each in enumerate(asked)]
    said, _ = run(runner, rows)
    assert [said[uid] for uid in range(len(asked))] == of_mlx_vlm(tiny_vision_path, tmp_path, asked, pictures)


@pytest.mark.parametrize("every", [0, 3])
def test_sixteen_mixed_rows_say_together_what_each_says_alone(
    runner: MLXRunner, pictures: Pictures, every: int
) -> None:
    asked = mixed(pictures)
    alone = [answer(runner, each, pictures) for each in asked]
    rows = [row(prompt_of(runner, each, pictures), each, uid) for uid, each in enumerate(asked)]
    said, _ = run(runner, rows, every)
    assert [said[uid] for uid in range(16)] == alone
    assert len({tuple(each) for each in alone}) == 16, "the images and seeds make a difference"


def test_an_image_in_another_place_or_another_image_is_another_prompt(runner: MLXRunner, pictures: Pictures) -> None:
    one, other = pictures.part(300, 200, 1), pictures.part(300, 200, 2)
    shown = [(one,), (other,), (one, other), (other, one)]
    asked = [ask("What?", *images, sampling=GREEDY) for images in shown]
    prompts = [prompt_of(runner, each, pictures).tokens for each in asked]
    assert len(set(prompts)) == 4
    assert len({tuple(answer(runner, each, pictures, "me")) for each in asked}) == 4


def test_a_row_goes_on_where_an_earlier_attempt_ended(runner: MLXRunner, pictures: Pictures) -> None:
    for sampling in (GREEDY, SAMPLINGS[1]):
        asked = ask("Describe this.", pictures.part(300, 200, 5), sampling=sampling)
        prompt = prompt_of(runner, asked, pictures)
        whole = answer(runner, asked, pictures)
        begun = (*prompt.tokens, *whole[:10])
        rest = Row(7, asked, begun, 10, TOKENS - 10, media=prompt_of(runner, asked, pictures).media)
        assert run(runner, [rest])[0][7] == whole[10:]


def test_the_same_image_is_encoded_once_for_a_key(runner: MLXRunner, pictures: Pictures) -> None:
    picture = pictures.part(300, 200, 1)
    first = answer(runner, ask("What is it?", picture), pictures, "me")
    assert runner.stats()["images_encoded_total"] == 1
    answer(runner, ask("Where is it, and why?", picture), pictures, "me")
    assert runner.stats()["images_encoded_total"] == 1
    # Whether an image was there can be told from the time: another key must not learn what this one sent.
    assert answer(runner, ask("What is it?", picture), pictures, "you") == first
    assert runner.stats()["images_encoded_total"] == 2


def test_rows_that_come_together_with_the_same_image_encode_it_once(runner: MLXRunner, pictures: Pictures) -> None:
    picture = pictures.part(300, 200, 1)
    asked = [ask(f"{number}?", picture) for number in range(6)]
    rows = [row(prompt_of(runner, each, pictures), each, uid, "me") for uid, each in enumerate(asked)]
    run(runner, rows)
    assert runner.stats()["images_encoded_total"] == 1


def test_what_was_encoded_is_forgotten_when_there_is_no_room(
    model: tuple[LoadedModel, VisionFamily], pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, family = model
    monkeypatch.setattr(model_runner, "MOST_FEATURES", 30_000)
    runner = MLXRunner(loaded, CHUNK, family=family)
    for seed in (1, 2, 1):
        answer(runner, ask("What?", pictures.part(300, 200, seed)), pictures, "me")
    assert runner.stats()["images_encoded_total"] == 3
    assert 0 < runner.stats()["image_cache_bytes"] <= 30_000
    runner.close()


def test_what_was_encoded_gives_way_to_another_model(runner: MLXRunner, pictures: Pictures) -> None:
    asked = ask("What is it?", pictures.part(300, 200, 1))
    said = answer(runner, asked, pictures, owner="me")
    kept = runner.stats()["image_cache_bytes"]
    assert kept > 0
    runner.set_prefix_limit(1000)
    assert runner.stats()["image_cache_bytes"] == 0
    runner.set_prefix_limit(2**30)
    assert answer(runner, asked, pictures, owner="me") == said
    assert runner.stats()["image_cache_bytes"] == kept


def test_a_conversation_reuses_its_screenshots_with_its_prefix(runner: MLXRunner, pictures: Pictures) -> None:
    shots = [pictures.part(300, 200, seed) for seed in range(3)]
    turns: list[dict[str, Any]] = []
    encoded = []
    for number, shot in enumerate(shots):
        turns.append({"role": "user", "content": [shot, {"type": "text", "text": f"Step {number}."}]})
        asked = Request("m", TOKENS, GREEDY, messages=tuple(turns))
        prompt = prompt_of(runner, asked, pictures)
        said, reused = run(runner, [row(prompt, asked, number, "me")])
        encoded.append(runner.stats()["images_encoded_total"])
        before = len(prompt_of(runner, replace(asked, messages=tuple(turns[:-1])), pictures).tokens) if number else 0
        assert reused[number] >= before - 8, "all but the generation prompt of the turn before"
        fresh = run(runner, [row(prompt_of(runner, asked, pictures), asked, 99)])[0][99]
        assert said[number] == fresh, "what is reused changes nothing"
        turns.append({"role": "assistant", "content": "Done."})
    assert encoded[0] == 1, "one image"


def test_a_prefix_may_end_within_an_image(runner: MLXRunner, pictures: Pictures) -> None:
    asked = ask("What is it?", pictures.part(640, 480, 3))
    expected = answer(runner, asked, pictures)
    prompt = prompt_of(runner, asked, pictures)
    cut = next(place for place, token in enumerate(prompt.tokens) if token >= IMAGE_TOKENS) + 40
    # Something that shares the beginning of the image and goes on in another way.
    media = prompt_of(runner, asked, pictures).media
    other = Row(1, asked, (*prompt.tokens[:cut], 5, 6, 7), 0, 2, "me", media=media)
    run(runner, [other])
    said, reused = run(runner, [row(prompt_of(runner, asked, pictures), asked, 2, "me")])
    assert reused[2] >= cut - 1
    assert said[2] == expected


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

    assert "stands for an image" in str(refused(ask("<|image_pad|>", picture)))
    assert "stands for an image" in str(refused(ask("<|image_pad|>")))
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
