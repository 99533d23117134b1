"""A short run of `scripts/chaos`: every kind of fault, under load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.stack import processes
from shared.settings import ROOT
from tests.chaos import workspaces
from tests.chaos.cli import main
from tests.chaos.command import INTERRUPTED
from tests.chaos.faults import FaultKind


@pytest.mark.parametrize(
    "model", [pytest.param("fake", marks=pytest.mark.slow), pytest.param("tiny-random-llama", marks=pytest.mark.long)]
)
def test_no_job_is_lost_duplicated_or_wrong(
    model: str, tiny_model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "chaos.json"
    options = ["--seed", "1", "--minutes", "0.6", "--requests", "30", "--clients", "24", "--json", str(figures)]
    backend = ["--backend", "fake"] if model == "fake" else ["--model", str(tiny_model_path)]
    status = main([*options, *backend])
    output = "".join(capfd.readouterr())
    report = json.loads(figures.read_text())
    assert status == 0, output
    assert (report["lost"], report["duplicated"], report["wrong"], report["left_behind"]) == (0, 0, 0, [])
    assert report["jobs"] >= 24
    assert report["resumed"] > 0
    hit = {kind for kind, count in report["faults"].items() if count}
    assert hit | set(report["impossible"]) == {kind.value for kind in FaultKind}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a short path: the path of a Unix socket is limited."""
    folder = Path(tempfile.mkdtemp(prefix="mlxq-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_behind(
    number: int,
    tiny_model_path: Path,
    short_folder: Path,
    eventually: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = short_folder / "log"
    options = ["--minutes", "5", "--requests", "3", "--clients", "2", "--model", str(tiny_model_path)]
    with log.open("wb") as out:
        run = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.cli", *options],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(short_folder)},
            stdout=out,
            stderr=out,
        )
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    try:
        eventually(lambda: b"number" in log.read_bytes(), within_s=120)  # the first fault was injected
        (home,) = short_folder.glob("mlxq-chaos-*")
        assert processes.find(home)
        run.send_signal(number)
        assert run.wait(60) == (INTERRUPTED if number == signal.SIGTERM else -number), log.read_text()
        if number == signal.SIGKILL:
            workspaces.clean_up()
        assert not processes.find(home)
        assert not (home / "data/valkey").is_mount()
        assert not list(Path("/run/netns").glob(f"mq{run.pid}*"))
    finally:
        run.kill()
        run.wait()
        workspaces.clean_up()
