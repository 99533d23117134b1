"""The executables: --help installs nothing, and no file of the current folder is imported."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from shared.settings import ROOT

EXECUTABLES = sorted(path.name for path in (ROOT / "scripts").iterdir() if path.is_file())


def run(script: Path, cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment: Mapping[str, str] = {"PATH": os.environ["PATH"], "HOME": str(cwd), "ENV_FILE": os.devnull, **variables}
    return subprocess.run(
        [script, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout without packages and models."""
    folder = tmp_path_factory.mktemp("fresh")
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("name", EXECUTABLES)
def test_help_installs_nothing(fresh: Path, name: str) -> None:
    before = sorted(fresh.rglob("*"))
    shown = run(fresh / "scripts" / name, fresh, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    first_comment = (ROOT / "scripts" / name).read_text().splitlines()[1].removeprefix("# ")
    assert first_comment in shown.stdout
    assert sorted(fresh.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [each for each in EXECUTABLES if each not in ("check", "compile_requirements", "test", "test-clients", "worker")],
)
def test_no_file_of_the_current_folder_is_imported(tmp_path: Path, name: str) -> None:
    for module in ("secrets", "web", "shared", "scripts", "tests", "redis", "rich", "pydantic"):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise SystemExit('the wrong module')\n")
    shown = run(ROOT / "scripts" / name, tmp_path, "--help", PYTHONPATH=str(tmp_path))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "usage: " in shown.stdout
