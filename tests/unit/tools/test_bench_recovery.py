"""The scenes of recovery: pauses of streams, and the goals in the table."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from shared.settings import ROOT
from tests.bench import recovery
from tests.bench.checkouts import Checkout
from tests.bench.recovery import Figures, Scene
from tests.bench.samples import Outcome, Sample


def stream(*arrivals: float, error: str = "") -> Sample:
    return Sample(0, "", 0.0, list(arrivals), len(arrivals), arrivals[-1], error)


def test_the_longest_pause_is_that_of_any_stream() -> None:
    streams = [stream(1, 2, 3), stream(1, 21, 22), stream(1, 4, 5, error="gone")]
    assert recovery.pauses(Outcome(streams, 30.0)) == {
        "longest_pause_s": 20, "median_stream_s": 3, "paused_15_s": 1, "failed": 1, "wall_s": 30.0,
    }  # fmt: skip


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two scenes that measure nothing; returns the checkouts that were measured, in order."""
    measured: list[Path] = []

    def pause(model: Path, checkout: Checkout) -> Figures:
        measured.append(checkout.root)
        return {"pause_s": 3.0 if checkout.root == ROOT else 63.0 + len(measured)}

    def rate(model: Path, checkout: Checkout) -> Figures:
        return {"rate": 0.9 if checkout.root == ROOT else 0.2, "more": 7}

    scenes = {"pauses": Scene(pause, "pause_s", 15), "rates": Scene(rate, "rate", 0.8, at_most=False)}
    monkeypatch.setattr(recovery, "SCENES", scenes)
    return measured


def shown(results: dict[str, object]) -> str:
    out = io.StringIO()
    Console(width=160, file=out).print(recovery.table(results))
    return out.getvalue()


def test_scenes_are_measured_on_both_checkouts_and_the_worst_round_is_judged(
    scenes: list[Path], tmp_path: Path
) -> None:
    results = recovery.recovery(tmp_path, 2, tmp_path)

    assert scenes == [tmp_path, ROOT, tmp_path, ROOT]
    text = shown(results)
    assert "66.00 MISSED" in text
    assert "3.00 reached" in text
    assert "0.20 MISSED" in text
    assert "0.90 reached" in text
    assert "more 7.00" in text


def test_without_an_earlier_checkout_the_present_one_is_measured_alone(scenes: list[Path], tmp_path: Path) -> None:
    results = recovery.recovery(tmp_path, 1, None)
    assert scenes == [ROOT]
    assert "before" not in shown(results)
