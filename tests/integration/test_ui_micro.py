"""The bundled vision model: its accuracy, and its use in the whole stack."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from scripts.stack.model import VISION
from scripts.ui_micro.answers import PIXELS
from scripts.ui_micro.evaluation import Trial, held_out, load_predictor
from tests.plugins.stack import Stack, made_stack
from tests.support.image_files import data_url

pytest.importorskip("mlx_vlm")

MAX_BYTES = 8_000_000
TRIALS = 120


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    for stack in made_stack(VISION, {"SLOTS": "16"}):
        stack.start_web()
        stack.start_worker()
        yield stack


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=stack.url, headers={"X-API-Key": stack.key}, timeout=60) as client:
        yield client


def body(trial: Trial, **more: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": data_url(trial.png)}}
    text = {"type": "text", "text": trial.instruction.text}
    return {"messages": [{"role": "user", "content": [part, text]}], "max_tokens": 16, "temperature": 0, **more}


def test_the_model_is_small_enough_to_be_bundled() -> None:
    assert sum(file.stat().st_size for file in VISION.iterdir()) <= MAX_BYTES
    assert json.loads((VISION / "config.json").read_text())["model_type"] == "qwen2_5_vl"


@pytest.mark.parametrize("by_colour", [0.0, 1.0])
def test_nine_of_ten_clicks_hit_the_target_on_unseen_screenshots(http: httpx2.Client, by_colour: float) -> None:
    trials = list(held_out(TRIALS, first=10_000, by_colour=by_colour))
    assert sum(trial.instruction.by_colour for trial in trials) >= (0.25 + by_colour / 3) * TRIALS
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda trial: http.post("/inference", json=body(trial)).json()["text"], trials))
    assert sum(trial.hit(answer, PIXELS) for trial, answer in zip(trials, answers, strict=True)) >= 0.9 * TRIALS


def test_the_stack_gives_the_answers_of_mlx_vlm(http: httpx2.Client) -> None:
    predict = load_predictor(VISION)
    trials = list(held_out(16, first=20_000))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda trial: http.post("/inference", json=body(trial)).json()["text"], trials))
    assert answers == [predict(trial.png, trial.instruction.text) for trial in trials]


def test_clicks_are_returned_as_actions_in_pixels_of_the_screenshot(http: httpx2.Client) -> None:
    trials = [trial for trial in held_out(60, first=30_000) if trial.instruction.form in ("name", "name alone")][:12]
    hits = 0
    for trial in trials:
        (action,) = http.post("/inference", json=body(trial, parse="ui_tars")).json()["actions"]
        assert action["action"] == "click"
        hits += trial.instruction.target.contains(action["start"]["x"], action["start"]["y"])
    assert hits >= len(trials) * 3 // 4
