"""Progress of commands: what lines without a terminal say, and what a terminal is sent."""

from __future__ import annotations

import pytest

from scripts.client.progress import Display, Tally
from scripts.lib import progress
from scripts.lib.progress import ProgressBar


@pytest.fixture
def every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain line for each update."""
    monkeypatch.setattr(progress, "EVERY_S", 0.0)


def test_plain_lines_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("Copying") as bar:
        for step in range(100):
            bar.update(step / 100)
    assert capsys.readouterr().err == "Copying\n"


def test_plain_lines_have_the_texts_of_the_bar(every_update: None, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("Copying [x]", 8) as bar:
        bar.update(2)
        bar.print("a note with [brackets]")
        bar.update(8)
    first, quarter, note, end = capsys.readouterr().err.splitlines()
    assert (first, note) == ("Copying [x]", "a note with [brackets]")
    assert quarter.startswith("Copying [x]  25% ")
    assert end.startswith("Copying [x] 100% ")


def test_a_batch_shows_its_tally(every_update: None, capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally(total=40, done=9, failed=1)
    with Display(tally) as display:
        tally.done, tally.failed = 10, 2
        display.refresh()
        display.note_once("slowed down")
        display.note_once("slowed down")
    line, *notes = capsys.readouterr().err.splitlines()
    assert line.startswith("10/40 0 tok/s ")
    assert " ETA " in line
    assert line.endswith(" 2 failed")
    assert notes == ["slowed down"]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar("Copying") as bar:
        bar.update(1.0)
    shown = capsys.readouterr().err
    assert "Copying" in shown and "━" in shown and "100%" in shown
