"""The command that measures a GPU: it keeps what it has when the time is used up or a measurement fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench import gpu
from tests.bench.gpu import Run, lines


def test_a_failed_measurement_does_not_stop_the_others(tmp_path: Path) -> None:
    run = Run(tmp_path / "found.json", time.monotonic() + 600)
    assert not run.step("bad", [sys.executable, "-c", "raise SystemExit('no memory')"])
    assert not run.step("worse", [sys.executable, "-c", "print('no figures')"])
    assert run.step("good", [sys.executable, "-c", "print('{\"copy\": 1.0}')"])
    written = json.loads((tmp_path / "found.json").read_text())
    assert written == run.results
    assert written["bad"]["failed"] == "no memory"
    assert written["good"]["copy"] == 1.0


def test_a_command_that_is_out_of_time_stops_what_it_has_started(tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu._run(
            ["sh", "-c", f"trap 'kill $child; touch {stopped}; exit' TERM; sleep 600 >/dev/null 2>&1 & child=$!; wait"],
            2.0,
        )
    assert stopped.exists()


def test_nothing_begins_shortly_before_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path / "found.json", time.monotonic() + 5)
    assert not run.step("late", [sys.executable, "-c", "raise AssertionError"])
    assert run.results == {"late": {"skipped": "no time left"}}


def test_the_figures_stand_beside_the_limit_of_the_bandwidth() -> None:
    measured = {
        "bytes_per_token": 10**10,
        "decode_tokens_per_s": {"1": 300.0, "8": 2000.0},
        "prefill_tokens_per_s": 4000.0,
        "ttft_s": 1.0,
        "equal_tokens": 63,
        "compared_tokens": 64,
    }
    results = {"memory bandwidth": {"copy": 4e12}, "x, 16 bits": measured, "x, 4 bits": {"failed": "out of time"}}
    first, second = lines(results, ["x"])
    assert "1 rows 300, 8 rows 2000 (bandwidth allows 400 at one row" in first
    assert "63 of 64 tokens as alone" in first
    assert second == "x, 4 bits: out of time"


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "_has_gpu", lambda: False)
    assert gpu.main([]) == 2
    assert "there is no GPU" in capsys.readouterr().err
