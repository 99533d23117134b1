"""The runner with a real (random) Qwen2.5-VL, beside mlx-vlm's own `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_vlm")

from mlx_vlm import load as load_with_mlx_vlm
from mlx_vlm import stream_generate
from mlx_vlm.prompt_utils import apply_chat_template

from shared.jobs.request import Request, Sampling
from tests.support.runner import GREEDY
from tests.support.vision_runner import TOKENS, Pictures, answer, ask, prompt_of, row, run
from worker.models.load import LoadedModel
from worker.runner import model_runner
from worker.runner.base import IMAGE_TOKENS, Row
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.vision.family import VisionFamily
from worker.runner.vision.load import load_vision_model

CHUNK = 32
SAMPLINGS = (
    GREEDY,
    Sampling(1.0, seed=11),
    Sampling(0.8, top_p=0.9, seed=2**63),
    Sampling(1.2, top_k=40, min_p=0.02, seed=13, repetition_penalty=1.1),
    Sampling(0.0, presence_penalty=0.7, frequency_penalty=0.3),
)
SIZES = ((300, 200), (64, 480), (640, 480), (56, 56))


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


def mixed(pictures: Pictures) -> list[Request]:
    """Sixteen: with no image, one or several of all sizes, sampled in all ways."""
    asked = []
    for number in range(16):
        images = [pictures.part(*SIZES[(number + i) % len(SIZES)], seed=number // 2) for i in range(number % 4)]
        asked.append(ask(f"Question {number}?", *images, sampling=SAMPLINGS[number % len(SAMPLINGS)]))
    return asked


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
    monkeypatch.setattr(model_runner, "MAX_FEATURE_BYTES", 30_000)
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
