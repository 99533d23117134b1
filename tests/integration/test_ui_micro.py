"""The bundled vision models: their accuracy, and their use in the whole stack."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from scripts.ui_micro.architectures.architecture import Architecture
from scripts.ui_micro.architectures.gemma import GEMMA
from scripts.ui_micro.architectures.qwen import QWEN
from scripts.ui_micro.evaluation import Trial, held_out, load_predictor
from shared.settings import ROOT
from tests.plugins.stack import Stack, catalog_stack
from tests.support.image_files import data_url

pytest.importorskip("mlx_vlm")

MAX_BYTES = 8_000_000
TRIALS = 40
ARCHITECTURES = (QWEN, GEMMA)
CATALOG = f'default = "{QWEN.folder}"\n' + "".join(
    f'[models.{each.folder}]\npath = "{ROOT}/models/{each.folder}"\n' for each in ARCHITECTURES
)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Yield a stack whose worker has both models."""
    with catalog_stack(CATALOG, SLOTS="16") as stack:
        stack.start_worker(WORKER_MODELS=",".join(each.folder for each in ARCHITECTURES))
        yield stack


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=stack.url, headers={"X-API-Key": stack.key}, timeout=60) as client:
        yield client


@pytest.fixture(params=ARCHITECTURES, ids=lambda each: each.name)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    chosen: Architecture = request.param
    return chosen


def answers_to(http: httpx2.Client, architecture: Architecture, trials: list[Trial]) -> list[dict[str, Any]]:
    """Return the answers, of which 16 at a time are generated together."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda trial: http.post("/inference", json=body(architecture, trial)).json(), trials))


def body(architecture: Architecture, trial: Trial) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": data_url(trial.png)}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": trial.instruction.text}]}]
    return {
        "model": architecture.folder,
        "messages": messages,
        "max_tokens": 16,
        "temperature": 0,
        "parse": "ui_tars",
    }


def test_the_model_is_small_enough_to_be_bundled(architecture: Architecture) -> None:
    folder = ROOT / "models" / architecture.folder
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MAX_BYTES
    assert json.loads((folder / "config.json").read_text())["model_type"] == architecture.name


@pytest.mark.parametrize("by_colour", [0.0, 1.0])
def test_nine_of_ten_clicks_hit_the_target_on_unseen_screenshots(
    http: httpx2.Client, architecture: Architecture, by_colour: float
) -> None:
    trials = list(held_out(TRIALS, first=10_000, by_colour=by_colour))
    assert sum(trial.instruction.by_colour for trial in trials) >= (0.25 + by_colour / 3) * TRIALS
    answers = answers_to(http, architecture, trials)
    clicks = [answer["actions"][0]["start"] for answer in answers]
    hits = [
        trial.instruction.target.contains(click["x"], click["y"]) for trial, click in zip(trials, clicks, strict=True)
    ]
    assert sum(hits) >= 0.9 * TRIALS
    assert hits == [
        trial.hit(answer["text"], architecture.answers) for trial, answer in zip(trials, answers, strict=True)
    ]


def test_the_stack_gives_the_answers_of_mlx_vlm(http: httpx2.Client, architecture: Architecture) -> None:
    predict = load_predictor(ROOT / "models" / architecture.folder)
    trials = list(held_out(16, first=20_000))
    expected = [predict(trial.png, trial.instruction.text) for trial in trials]
    assert [answer["text"] for answer in answers_to(http, architecture, trials)] == expected
