"""The model runner with a Qwen2.5-VL with random weights, compared with mlx-vlm's `generate`."""

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
from tests.support.vision_runner import TOKENS, ImageFiles, answer, ask, prompt_of, row, run
from worker.models.load import LoadedModel
from worker.runner import model_runner
from worker.runner.base import IMAGE_TOKENS, Row
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.vision.half import VisionHalf
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


def mixed(files: ImageFiles) -> list[Request]:
    """Return sixteen requests with none to three images of all sizes and all sampling options."""
    requests = []
    for number in range(16):
        images = [files.part(*SIZES[(number + i) % len(SIZES)], seed=number // 2) for i in range(number % 4)]
        requests.append(ask(f"Question {number}?", *images, sampling=SAMPLINGS[number % len(SAMPLINGS)]))
    return requests


def reference(folder: Path, tmp_path: Path, requests: Sequence[Request], files: ImageFiles) -> list[list[int]]:
    """Return the tokens that mlx-vlm generates greedily."""
    model, processor = load_with_mlx_vlm(str(folder))
    tokens = []
    for each in requests:
        assert each.messages is not None
        content = each.messages[0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        paths = [tmp_path / f"{part['image']}.png" for part in each.image_parts]
        for path in paths:
            path.write_bytes(files[path.stem])
        prompt = apply_chat_template(processor, model.config, text, num_images=len(paths))
        images = [str(path) for path in paths] or None
        stream = stream_generate(model, processor, prompt, image=images, max_tokens=TOKENS, temperature=0.0)
        tokens.append([int(part.token) for part in stream][:TOKENS])
    return tokens


def test_greedy_rows_generate_the_tokens_of_mlx_vlm(
    runner: MLXRunner, files: ImageFiles, tiny_vision_path: Path, tmp_path: Path
) -> None:
    requests = [replace(each, sampling=GREEDY) for each in mixed(files)[:8]]
    rows = [row(prompt_of(runner, each, files), each, uid) for uid, each in enumerate(requests)]
    tokens, _ = run(runner, rows)
    assert [tokens[uid] for uid in range(len(requests))] == reference(tiny_vision_path, tmp_path, requests, files)


@pytest.mark.parametrize("every", [0, 3])
def test_sixteen_batched_rows_generate_the_same_tokens_as_single_rows(
    runner: MLXRunner, files: ImageFiles, every: int
) -> None:
    requests = mixed(files)
    single = [answer(runner, each, files) for each in requests]
    rows = [row(prompt_of(runner, each, files), each, uid) for uid, each in enumerate(requests)]
    tokens, _ = run(runner, rows, every)
    assert [tokens[uid] for uid in range(16)] == single
    assert len({tuple(each) for each in single}) == 16, "the tokens do not depend on images and seeds"


def test_prompts_differ_by_images_and_their_order(runner: MLXRunner, files: ImageFiles) -> None:
    one, other = files.part(300, 200, 1), files.part(300, 200, 2)
    combinations = [(one,), (other,), (one, other), (other, one)]
    requests = [ask("What?", *images, sampling=GREEDY) for images in combinations]
    prompts = [prompt_of(runner, each, files).tokens for each in requests]
    assert len(set(prompts)) == 4
    assert len({tuple(answer(runner, each, files, "me")) for each in requests}) == 4


def test_a_resumed_row_continues_with_the_same_tokens(runner: MLXRunner, files: ImageFiles) -> None:
    for sampling in (GREEDY, SAMPLINGS[1]):
        request = ask("Describe this.", files.part(300, 200, 5), sampling=sampling)
        prompt = prompt_of(runner, request, files)
        whole = answer(runner, request, files)
        continued = (*prompt.tokens, *whole[:10])
        rest = Row(7, request, continued, 10, TOKENS - 10, media=prompt_of(runner, request, files).media)
        assert run(runner, [rest])[0][7] == whole[10:]


def test_the_same_image_is_encoded_once_per_owner(runner: MLXRunner, files: ImageFiles) -> None:
    image = files.part(300, 200, 1)
    first = answer(runner, ask("What is it?", image), files, "me")
    assert runner.stats()["images_encoded_total"] == 1
    answer(runner, ask("Where is it, and why?", image), files, "me")
    assert runner.stats()["images_encoded_total"] == 1
    # The time to the first token reveals whether an image was cached, so owners do not share features.
    assert answer(runner, ask("What is it?", image), files, "you") == first
    assert runner.stats()["images_encoded_total"] == 2


def test_simultaneous_rows_with_the_same_image_encode_it_once(runner: MLXRunner, files: ImageFiles) -> None:
    image = files.part(300, 200, 1)
    requests = [ask(f"{number}?", image) for number in range(6)]
    rows = [row(prompt_of(runner, each, files), each, uid, "me") for uid, each in enumerate(requests)]
    run(runner, rows)
    assert runner.stats()["images_encoded_total"] == 1


def test_features_are_evicted_when_they_exceed_the_limit(
    model: tuple[LoadedModel, VisionHalf], files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, vision = model
    monkeypatch.setattr(model_runner, "MAX_FEATURE_BYTES", 30_000)
    runner = MLXRunner(loaded, CHUNK, vision=vision)
    for seed in (1, 2, 1):
        answer(runner, ask("What?", files.part(300, 200, seed)), files, "me")
    assert runner.stats()["images_encoded_total"] == 3
    assert 0 < runner.stats()["image_cache_bytes"] <= 30_000
    runner.close()


def test_features_are_evicted_when_the_prefix_limit_falls(runner: MLXRunner, files: ImageFiles) -> None:
    request = ask("What is it?", files.part(300, 200, 1))
    tokens = answer(runner, request, files, owner="me")
    cached = runner.stats()["image_cache_bytes"]
    assert cached > 0
    runner.set_prefix_limit(1000)
    assert runner.stats()["image_cache_bytes"] == 0
    runner.set_prefix_limit(2**30)
    assert answer(runner, request, files, owner="me") == tokens
    assert runner.stats()["image_cache_bytes"] == cached


def test_a_conversation_reuses_prefixes_with_screenshots(runner: MLXRunner, files: ImageFiles) -> None:
    shots = [files.part(300, 200, seed) for seed in range(3)]
    turns: list[dict[str, Any]] = []
    encoded = []
    for number, shot in enumerate(shots):
        turns.append({"role": "user", "content": [shot, {"type": "text", "text": f"Step {number}."}]})
        request = Request("m", TOKENS, GREEDY, messages=tuple(turns))
        prompt = prompt_of(runner, request, files)
        tokens, reused = run(runner, [row(prompt, request, number, "me")])
        encoded.append(runner.stats()["images_encoded_total"])
        before = len(prompt_of(runner, replace(request, messages=tuple(turns[:-1])), files).tokens) if number else 0
        assert reused[number] >= before - 8, "less was reused than the previous turn without its generation prompt"
        fresh = run(runner, [row(prompt_of(runner, request, files), request, 99)])[0][99]
        assert tokens[number] == fresh, "reuse changed the tokens"
        turns.append({"role": "assistant", "content": "Done."})
    assert encoded[0] == 1, "the first turn has one image"


def test_a_prefix_may_end_within_an_image(runner: MLXRunner, files: ImageFiles) -> None:
    request = ask("What is it?", files.part(640, 480, 3))
    expected = answer(runner, request, files)
    prompt = prompt_of(runner, request, files)
    cut = next(index for index, token in enumerate(prompt.tokens) if token >= IMAGE_TOKENS) + 40
    # A row that shares only the first tokens of the image.
    media = prompt_of(runner, request, files).media
    other = Row(1, request, (*prompt.tokens[:cut], 5, 6, 7), 0, 2, "me", media=media)
    run(runner, [other])
    tokens, reused = run(runner, [row(prompt_of(runner, request, files), request, 2, "me")])
    assert reused[2] >= cut - 1
    assert tokens[2] == expected
