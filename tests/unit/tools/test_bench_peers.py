"""Servers of other projects in the bench: measured if they are installed, otherwise reported with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import peers
from tests.bench.contenders import CONTENDERS, OWN
from tests.bench.results import Absence
from tests.bench.scenarios.base import Sizes
from tests.bench.turns import Selection, turns


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    return tmp_path


def planned(*names: str) -> tuple[list[str], list[Absence]]:
    absences: list[Absence] = []
    selection = Selection({Path("tiny"): Sizes()}, ["closed"], names, 1)
    return [turn.contender.name for turn in turns(selection, absences.append)], absences


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_that_is_not_installed_is_reported_with_the_command_that_installs_it(
    nothing_installed: Path, name: str
) -> None:
    names, (absence,) = planned(name, OWN)
    assert names == [OWN]
    assert (absence.who, absence.fault) == (name, False)
    assert f"scripts/bench --install {name}" in absence.why


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_that_is_installed_takes_part(nothing_installed: Path, name: str) -> None:
    (nothing_installed / name / "bin").mkdir(parents=True)
    (nothing_installed / name / "bin/python").touch()
    assert planned(name, OWN) == ([name, OWN], [])


def test_every_peer_is_a_contender_with_pinned_requirements() -> None:
    for name, peer in peers.PEERS.items():
        assert CONTENDERS[name].name == name
        assert all("==" in requirement for requirement in peer.requirements)
        assert peer.requirements[0].startswith(f"{name}==")


def test_a_failed_installation_leaves_nothing_behind(nothing_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed(Exception):
        pass

    def run(command: list[str], *, check: bool) -> None:
        if "pip" in command:
            raise Failed
        Path(command[-1]).mkdir()

    monkeypatch.setattr(peers.subprocess, "run", run)
    with pytest.raises(Failed):
        peers.PEERS["vllm-mlx"].install()
    assert list(nothing_installed.iterdir()) == []
