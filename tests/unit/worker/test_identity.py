"""A worker process's name: no two living processes share one, and restarts create no new ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from shared.settings import ROOT, Settings
from worker.process import identity
from worker.process.identity import Identity, claim_identity, process_name, worker_index


@pytest.fixture
def living() -> Iterator[ExitStack]:
    """The processes that live during a test: each holds its breadcrumb open."""
    with ExitStack() as living:
        yield living


def claim(settings: Settings, living: ExitStack, index: int | None = None, token: str = "token") -> Identity:
    claimed = claim_identity(settings, index, token)
    living.enter_context(closing(claimed.breadcrumb))
    return claimed


def test_processes_without_an_index_take_the_lowest_free_names(settings: Settings, living: ExitStack) -> None:
    claims = [claim(settings, living, token=token) for token in ("a", "b", "c")]
    assert [each.label for each in claims] == ["standalone-0", "standalone-1", "standalone-2"]
    assert [each.name for each in claims] == [process_name(settings, each.label) for each in claims]
    claims[1].breadcrumb.close()
    assert claim(settings, living, token="d").name == claims[1].name


def test_an_indexed_process_keeps_its_name_after_a_restart(settings: Settings, living: ExitStack) -> None:
    first = claim(settings, living, 3, "a")
    assert (first.label, first.name) == ("worker-3", process_name(settings, "worker-3"))
    first.breadcrumb.close()
    assert claim(settings, living, 3, "b").name == first.name


def test_a_second_process_with_the_same_index_gets_another_name(
    settings: Settings, living: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "CLAIM_S", 0.1)
    settings = settings.model_copy(update={"drain_s": 0.0})
    claims = [claim(settings, living, 0, token) for token in ("a", "b")]
    assert [each.label for each in claims] == ["worker-0", "standalone-0"]


def test_workers_of_several_data_folders_have_different_names(settings: Settings, living: ExitStack) -> None:
    other = settings.model_copy(update={"data_dir": settings.data_dir / "other"})
    assert claim(settings, living, 0).name != claim(other, living, 0).name


@pytest.mark.parametrize(("index", "label"), [(2, "worker-2"), (None, "standalone-f00")])
def test_a_process_that_cannot_write_its_breadcrumb_has_a_name_all_the_same(
    settings: Settings, caplog: pytest.LogCaptureFixture, living: ExitStack, index: int | None, label: str
) -> None:
    settings.run_dir.parent.mkdir(parents=True, exist_ok=True)
    settings.run_dir.write_text("a file in place of the folder")
    claimed = claim(settings, living, index, "f00")
    assert (claimed.label, claimed.breadcrumb.path) == (label, None)
    assert [record.message for record in caplog.records] == ["breadcrumb_not_written"]


CLAIMS = """
import sys
from pathlib import Path
from shared.settings import Settings
from worker.process.identity import claim_identity
sys.stdin.readline()
claimed = claim_identity(Settings(data_dir=Path(sys.argv[1])), None, sys.argv[2])
print(claimed.name, flush=True)
sys.stdin.readline()
"""


def test_processes_that_start_at_the_same_moment_get_different_names(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMS, str(tmp_path), f"token{i}"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for i in range(4)
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        names = [process.stdout.readline().strip() for process in processes if process.stdout]
        settings = Settings(data_dir=tmp_path)
        assert sorted(names) == [process_name(settings, f"standalone-{i}") for i in range(4)]
    finally:
        for process in processes:
            process.communicate("\n", timeout=30)


@pytest.mark.parametrize(("variable", "index"), [("3", 3), ("", None), (None, None)])
def test_the_index_comes_from_the_supervisor(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, index: int | None
) -> None:
    monkeypatch.delenv("MLXQ_WORKER_INDEX", raising=False)
    if variable is not None:
        monkeypatch.setenv("MLXQ_WORKER_INDEX", variable)
    assert worker_index() == index
