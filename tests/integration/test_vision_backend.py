"""The vision backend on a real (random) Qwen2.5-VL, beside mlx-vlm's own `generate`."""

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

from shared.errors import JobFailure
from shared.jobs.request import Request, Sampling
from worker.models.load import LoadedModel
from worker.runner.base import IMAGE_TOKENS, Fit, Prompt, PromptError, Row
from worker.runner.memory import Memory
from worker.runner.vision import family as vision
from worker.runner.vision import qwen_encoder as image_encoder
from worker.runner.vision.family import SHARE_OF_FEATURES, VisionBackend, load_vision_model
from worker.runner.vision.images import Grid, ImageMedia, opened
from worker.runner.vision.qwen_encoder import ImageEncoder

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
def model(tiny_vision_path: Path) -> tuple[LoadedModel, ImageEncoder]:
    return load_vision_model(tiny_vision_path)


@pytest.fixture
def backend(model: tuple[LoadedModel, ImageEncoder]) -> Iterator[VisionBackend]:
    loaded, encoder = model
    backend = VisionBackend(encoder, loaded, CHUNK, Memory(2**30, 2**28), speculation_tokens=4)
    yield backend
    backend.close()


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


def row(prompt: Prompt, sampling: Sampling, uid: int, owner: str | None = None, room: int = TOKENS) -> Row:
    return Row(uid, prompt.tokens, 0, room, sampling, owner, media=prompt.media)


def run(backend: VisionBackend, rows: Sequence[Row], every: int = 0) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Step until all have had their room; a row joins `every` so many steps. Tokens, and how many were reused."""
    said: dict[int, list[int]] = defaultdict(list)
    reused: dict[int, int] = {}
    waiting, steps = list(rows), 0
    while any(len(said[each.uid]) < each.room for each in rows):
        while waiting and (not every or steps % every == 0):
            backend.insert([waiting.pop(0)])
            if every:
                break
        result = backend.step()
        assert not result.failed
        reused |= result.prefilled
        for uid, token in result.tokens:
            said[uid].append(token)
        steps += 1
        assert steps < 3000
    return said, reused


def answer(backend: VisionBackend, asked: Request, files: Pictures, owner: str | None = None) -> list[int]:
    prompt = backend.encode(asked, files)
    return run(backend, [row(prompt, asked.sampling, 1, owner)])[0][1]


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
    backend: VisionBackend, pictures: Pictures, tiny_vision_path: Path, tmp_path: Path
) -> None:
    asked = [replace(each, sampling=GREEDY) for each in mixed(pictures)[:8]]
    rows = [row(backend.encode(each, pictures), GREEDY, uid) for uid, each in enumerate(asked)]
    said, _ = run(backend, rows)
    assert [said[uid] for uid in range(len(asked))] == of_mlx_vlm(tiny_vision_path, tmp_path, asked, pictures)


@pytest.mark.parametrize("every", [0, 3])
def test_sixteen_mixed_rows_say_together_what_each_says_alone(
    backend: VisionBackend, pictures: Pictures, every: int
) -> None:
    asked = mixed(pictures)
    alone = [answer(backend, each, pictures) for each in asked]
    rows = [row(backend.encode(each, pictures), each.sampling, uid) for uid, each in enumerate(asked)]
    said, _ = run(backend, rows, every)
    assert [said[uid] for uid in range(16)] == alone
    assert len({tuple(each) for each in alone}) == 16, "the images and seeds make a difference"


def test_an_image_in_another_place_or_another_image_is_another_prompt(
    backend: VisionBackend, pictures: Pictures
) -> None:
    one, other = pictures.part(300, 200, 1), pictures.part(300, 200, 2)
    shown = [(one,), (other,), (one, other), (other, one)]
    asked = [ask("What?", *images, sampling=GREEDY) for images in shown]
    prompts = [backend.encode(each, pictures).tokens for each in asked]
    assert len(set(prompts)) == 4
    assert len({tuple(answer(backend, each, pictures, "me")) for each in asked}) == 4


def test_a_row_goes_on_where_an_earlier_attempt_ended(backend: VisionBackend, pictures: Pictures) -> None:
    for sampling in (GREEDY, SAMPLINGS[1]):
        asked = ask("Describe this.", pictures.part(300, 200, 5), sampling=sampling)
        prompt = backend.encode(asked, pictures)
        whole = answer(backend, asked, pictures)
        begun = (*prompt.tokens, *whole[:10])
        rest = Row(7, begun, 10, TOKENS - 10, sampling, media=backend.encode(asked, pictures).media)
        assert run(backend, [rest])[0][7] == whole[10:]


def test_the_same_image_is_encoded_once_for_a_key(backend: VisionBackend, pictures: Pictures) -> None:
    picture = pictures.part(300, 200, 1)
    first = answer(backend, ask("What is it?", picture), pictures, "me")
    assert backend.stats()["images_encoded_total"] == 1
    answer(backend, ask("Where is it, and why?", picture), pictures, "me")
    assert backend.stats()["images_encoded_total"] == 1
    # Whether an image was there can be told from the time: another key must not learn what this one sent.
    assert answer(backend, ask("What is it?", picture), pictures, "you") == first
    assert backend.stats()["images_encoded_total"] == 2


def test_rows_that_come_together_with_the_same_image_encode_it_once(backend: VisionBackend, pictures: Pictures) -> None:
    picture = pictures.part(300, 200, 1)
    asked = [ask(f"{number}?", picture) for number in range(6)]
    rows = [row(backend.encode(each, pictures), GREEDY, uid, "me") for uid, each in enumerate(asked)]
    run(backend, rows)
    assert backend.stats()["images_encoded_total"] == 1


def test_what_was_encoded_is_forgotten_when_there_is_no_room(
    model: tuple[LoadedModel, ImageEncoder], pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, encoder = model
    monkeypatch.setattr(vision, "MOST_FEATURES", 30_000)
    backend = VisionBackend(encoder, loaded, CHUNK)
    for seed in (1, 2, 1):
        answer(backend, ask("What?", pictures.part(300, 200, seed)), pictures, "me")
    assert backend.stats()["images_encoded_total"] == 3
    assert 0 < backend.stats()["image_cache_bytes"] <= 30_000
    backend.close()


def test_what_was_encoded_gives_way_to_another_model(backend: VisionBackend, pictures: Pictures) -> None:
    asked = ask("What is it?", pictures.part(300, 200, 1))
    said = answer(backend, asked, pictures, owner="me")
    kept = backend.stats()["image_cache_bytes"]
    assert kept > 0
    backend.grant(1000)
    assert backend.stats()["image_cache_bytes"] == 0
    backend.grant(2**30)
    assert answer(backend, asked, pictures, owner="me") == said
    assert backend.stats()["image_cache_bytes"] == kept


def test_a_conversation_reuses_its_screenshots_with_its_prefix(backend: VisionBackend, pictures: Pictures) -> None:
    shots = [pictures.part(300, 200, seed) for seed in range(3)]
    turns: list[dict[str, Any]] = []
    encoded = []
    for number, shot in enumerate(shots):
        turns.append({"role": "user", "content": [shot, {"type": "text", "text": f"Step {number}."}]})
        asked = Request("m", TOKENS, GREEDY, messages=tuple(turns))
        prompt = backend.encode(asked, pictures)
        said, reused = run(backend, [row(prompt, GREEDY, number, "me")])
        encoded.append(backend.stats()["images_encoded_total"])
        before = len(backend.encode(replace(asked, messages=tuple(turns[:-1])), pictures).tokens) if number else 0
        assert reused[number] >= before - 8, "all but the generation prompt of the turn before"
        fresh = run(backend, [row(backend.encode(asked, pictures), GREEDY, 99)])[0][99]
        assert said[number] == fresh, "what is reused changes nothing"
        turns.append({"role": "assistant", "content": "Done."})
    assert encoded[0] == 1, "one image"


def test_a_prefix_may_end_within_an_image(backend: VisionBackend, pictures: Pictures) -> None:
    asked = ask("What is it?", pictures.part(640, 480, 3))
    expected = answer(backend, asked, pictures)
    prompt = backend.encode(asked, pictures)
    cut = next(place for place, token in enumerate(prompt.tokens) if token >= IMAGE_TOKENS) + 40
    # Something that shares the beginning of the image and goes on in another way.
    other = Row(1, (*prompt.tokens[:cut], 5, 6, 7), 0, 2, GREEDY, "me", media=backend.encode(asked, pictures).media)
    run(backend, [other])
    said, reused = run(backend, [row(backend.encode(asked, pictures), GREEDY, 2, "me")])
    assert reused[2] >= cut - 1
    assert said[2] == expected


def test_the_stages_give_what_the_library_gives(model: tuple[LoadedModel, ImageEncoder]) -> None:
    _, encoder = model
    rng = np.random.default_rng(3)
    for high, wide in ((4, 4), (16, 8), (14, 22), (34, 46), (2, 40)):
        grid = Grid(high, wide, 2)
        pixels = rng.normal(size=(grid.patches, 3 * 2 * 14 * 14)).astype(np.float32)
        *_, ours = encoder.stages(pixels, grid)
        theirs = encoder.tower(mx.array(pixels), mx.array([[1, high, wide]]))
        assert mx.allclose(ours, theirs, atol=1e-5), grid
        assert ours.shape[0] == grid.tokens


def test_a_broken_image_fails_the_rows_that_show_it_and_no_other(backend: VisionBackend, pictures: Pictures) -> None:
    good, bad = pictures.part(300, 200, 1), pictures.part(300, 200, 2)
    whole = answer(backend, ask("Good?", good), pictures)
    pictures[bad["image"]] = pictures[bad["image"]][:200]
    asked = [ask("Good?", good), ask("Bad?", bad), ask("Both?", good, bad)]
    backend.insert([row(backend.encode(each, pictures), GREEDY, uid) for uid, each in enumerate(asked)])
    said: dict[int, list[int]] = defaultdict(list)
    failed: dict[int, Exception] = {}
    while len(said[0]) < TOKENS:
        result = backend.step()
        failed |= dict(result.failed)
        for uid, token in result.tokens:
            said[uid].append(token)
    assert failed.keys() == {1, 2}
    assert said.pop(0) == whole
    assert not said


def test_whatever_reading_an_image_raises_fails_its_rows_and_no_other(
    backend: VisionBackend, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = image_encoder.opened

    def bad_one(data: bytes) -> Image.Image:
        if data == pictures[bad["image"]]:
            raise SyntaxError("broken PNG file")  # as Pillow does, and others of its own
        return opened(data)

    good, bad = pictures.part(300, 200, 1), pictures.part(300, 200, 2)
    monkeypatch.setattr(image_encoder, "opened", bad_one)
    backend.insert([row(backend.encode(ask("?", part), pictures), GREEDY, uid) for uid, part in enumerate((good, bad))])
    failed: dict[int, Exception] = {}
    said = 0
    while said < TOKENS:
        result = backend.step()
        failed |= dict(result.failed)
        said += len(result.tokens)
    assert failed.keys() == {1}


def test_an_image_is_as_large_as_the_api_has_let_it_be(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(file, "PNG")
    monkeypatch.setattr(Image.Image, "convert", lambda image, _mode: image)  # 600 MB are not needed to see it
    assert opened(file.getvalue()).size == (20_000, 10_000)


def test_no_failure_is_told_of_rows_that_are_gone(
    model: tuple[LoadedModel, ImageEncoder],
    backend: VisionBackend,
    pictures: Pictures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad, worse, good = (pictures.part(56, 56, seed) for seed in range(3))
    pictures[bad["image"]] = pictures[bad["image"]][:100]
    stages = ImageEncoder.stages

    def raises(encoder: ImageEncoder, pixels: Any, grid: Grid) -> Iterator[mx.array]:
        monkeypatch.setattr(ImageEncoder, "stages", stages)
        raise RuntimeError("the device is away")

    asked = [ask("?", part) for part in (bad, worse, good)]
    rows = [row(backend.encode(each, pictures), GREEDY, uid) for uid, each in enumerate(asked)]
    monkeypatch.setattr(ImageEncoder, "stages", raises)
    backend.insert(rows[:2])
    wait([task.pixels for task in backend._encoding._tasks.values() if task.pixels])
    with pytest.raises(RuntimeError, match="away"):
        backend.step()
    backend.reset()
    backend.insert(rows[2:])
    while not (result := backend.step()).tokens:
        assert not result.failed


def test_an_image_of_another_size_than_was_said_fails_its_row(backend: VisionBackend, pictures: Pictures) -> None:
    part = pictures.part(300, 200, 1) | {"width": 500}
    backend.insert([row(backend.encode(ask("?", part), pictures), GREEDY, 1)])
    while not (failed := backend.step().failed):
        pass
    assert failed[0][0] == 1


def test_rows_leave_in_every_stage(backend: VisionBackend, pictures: Pictures) -> None:
    asked = [ask(f"{number}?", pictures.part(640, 480, number)) for number in range(4)]
    expected = answer(backend, asked[3], pictures)
    for steps in range(12):
        rows = [row(backend.encode(each, pictures), GREEDY, uid) for uid, each in enumerate(asked)]
        backend.insert(rows)
        for _ in range(steps):
            backend.step()
        backend.remove([0, 1, 2])
        backend.remove([3])
        assert answer(backend, asked[3], pictures) == expected
        backend.reset()


def test_images_are_encoded_by_and_by_while_rows_decode(backend: VisionBackend, pictures: Pictures) -> None:
    backend.warm()
    text = ask("Hello")
    expected = answer(backend, text, pictures)
    images = [ask(f"{number}?", pictures.part(640, 480, number)) for number in range(3)]
    alone = [answer(backend, each, pictures) for each in images]
    rows = [row(backend.encode(each, pictures), GREEDY, uid) for uid, each in enumerate([text, *images])]
    said, _ = run(backend, rows, every=4)
    assert [said[uid] for uid in range(4)] == [expected, *alone]


def test_prompts_that_cannot_be_read_say_why(backend: VisionBackend, pictures: Pictures) -> None:
    picture = pictures.part(300, 200, 1)

    def refused(asked: Request) -> PromptError:
        with pytest.raises(PromptError) as told:
            backend.encode(asked, pictures)
        return told.value

    assert "stands for an image" in str(refused(ask("<|image_pad|>", picture)))
    assert "stands for an image" in str(refused(ask("<|image_pad|>")))
    assert "shape" in str(refused(ask("?", picture | {"width": 3000, "height": 2})))
    long = refused(ask("?", *[picture] * 200))
    assert long.code == JobFailure.CONTEXT_LENGTH


def test_an_image_that_memory_does_not_suffice_for_is_refused(
    model: tuple[LoadedModel, ImageEncoder], pictures: Pictures
) -> None:
    loaded, encoder = model
    backend = VisionBackend(encoder, loaded, CHUNK, Memory(2**24, 0))
    backend.encode(ask("?", pictures.part(300, 200, 1)), pictures)
    large = pictures.part(640, 480, 1) | {"width": 3000, "height": 2000}
    with pytest.raises(PromptError) as refused:
        backend.encode(ask("?", large), pictures)
    assert refused.value.code == JobFailure.MEMORY
    assert "GiB to be encoded" in str(refused.value)
    backend.close()


def test_rows_wait_for_the_memory_that_encoding_an_image_takes(
    model: tuple[LoadedModel, ImageEncoder], pictures: Pictures
) -> None:
    loaded, encoder = model
    shown = ask("What?", pictures.part(640, 480, 1))
    widest = encoder.bytes(encoder.grid(640, 480))
    enough = widest * SHARE_OF_FEATURES // (SHARE_OF_FEATURES - 1) + SHARE_OF_FEATURES
    backend = VisionBackend(encoder, loaded, CHUNK, Memory(enough, widest // 3))
    prompt, other = backend.encode(shown, pictures), backend.encode(ask("And?"), pictures)
    longest, short = len(prompt.tokens) + TOKENS, len(other.tokens) + TOKENS
    assert backend.fits(longest, prompt.media) is Fit.NOW
    backend.insert([row(prompt, GREEDY, 1, "me")])
    assert backend.fits(short) is Fit.LATER, "beside an image that is being encoded"
    while not backend.step().prefilled:
        pass
    assert backend.fits(short) is Fit.NOW
    assert backend.fits(longest, prompt.media) is Fit.LATER
    backend.remove([1])
    assert backend.fits(longest, prompt.media) is Fit.NOW
    backend.close()


def test_pieces_of_images_are_told_by_content(backend: VisionBackend, pictures: Pictures) -> None:
    prompt = backend.encode(ask("?", pictures.part(300, 200, 1)), pictures)
    media = prompt.media
    assert isinstance(media, ImageMedia)
    (image,) = media.images
    pieces = prompt.tokens[image.start : image.stop]
    assert len(set(pieces)) == len(pieces) == 77 == image.grid.tokens
    assert all(IMAGE_TOKENS <= piece < 2**32 for piece in pieces)
    assert media.shift == 11 - 77
