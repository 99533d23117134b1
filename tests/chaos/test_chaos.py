"""The short run: every kind of fault, under load, and no job notices. `scripts/chaos` has the long ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.commands.chaos import main


@pytest.mark.slow
def test_no_job_is_lost_duplicated_or_wrong_whatever_breaks(
    tiny_model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "chaos.json"
    options = ["--seed", "1", "--minutes", "1.5", "--requests", "30", "--clients", "16", "--json", str(figures)]
    status = main([*options, "--model", str(tiny_model_path)])
    seen = "".join(capfd.readouterr())
    report = json.loads(figures.read_text())
    assert status == 0, seen
    assert (report["lost"], report["duplicated"], report["wrong"], report["left_behind"]) == (0, 0, 0, [])
    assert report["jobs"] >= 100
    assert report["resumed"] >= 5
    assert all(count >= 1 for count in report["faults"].values())
