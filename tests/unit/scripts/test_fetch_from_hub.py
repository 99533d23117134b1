"""scripts/fetch_model with a hub over HTTP: downloads, continuation, verification, progress and errors."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx2
import mlx.core as mx
import pytest
from huggingface_hub import HfApi, constants, errors, file_download

from scripts.lib import progress
from scripts.model_files import download, fetch, hub
from scripts.model_files.manifest import Origin, is_intact, read_origin
from scripts.model_files.weights import save_weights
from shared.settings import ROOT
from tests.support.model_hub import COMMIT, ModelHub, model_hub
from tests.support.small_models import make_folder
from tests.support.waiting import eventually

WEIGHTS = "model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[ModelHub]:
    """A hub with a complete folder of four megabytes, though not of a real model."""
    folder = make_folder(tmp_path / "complete")
    save_weights(folder / WEIGHTS, {"weight": mx.random.normal((1024, 1024), key=mx.random.key(1))})
    with model_hub(folder) as found:
        yield found


@pytest.fixture
def here(source: ModelHub, monkeypatch: pytest.MonkeyPatch) -> ModelHub:
    """The same hub for downloads in this process, without pauses between attempts."""
    monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint=source.url, token=False))
    monkeypatch.setattr(download, "PAUSE_S", 0)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _seconds: None))
    return source


def run(models: Path, *arguments: object) -> int:
    return fetch.main([str(argument) for argument in ("org/model", "-o", models, *arguments)])


def visible(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir() if not path.name.startswith("."))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only error line on stderr."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fetch_model: ")]
    return line


def test_a_model_is_downloaded_once_without_code_and_pickles(here: ModelHub, tmp_path: Path) -> None:
    (here.folder / "original").mkdir()
    for name in ("modeling.py", "pytorch_model.bin", "chat_template.jinja", "original/model.safetensors"):
        (here.folder / name).touch()
    (here.folder / "1_Pooling").mkdir()
    (here.folder / "1_Pooling/config.json").write_text("{}")
    models = tmp_path / "models"

    assert run(models, "--revision", "main") == 0
    files = ["1_Pooling/config.json", "chat_template.jinja", "config.json", WEIGHTS, "tokenizer.json"]
    assert sorted({sent.name for sent in here.sent} | {"chat_template.jinja"}) == files
    kept = [path.relative_to(models / "model").as_posix() for path in (models / "model").rglob("*") if path.is_file()]
    assert sorted(kept) == sorted([*files, "mlxq.json"])
    assert read_origin(models / "model") == Origin("org/model", COMMIT, requested="main")
    assert is_intact(models / "model")
    assert all((models / "model" / name).read_bytes() == (here.folder / name).read_bytes() for name in files)
    assert visible(models) == ["model"]

    here.requests.clear()
    assert run(models) == 0
    assert run(models, "--revision", "main") == 0
    assert here.requests == []


def test_a_revision_is_resolved_to_its_commit(here: ModelHub, tmp_path: Path) -> None:
    assert run(tmp_path / "models", "--revision", "v2") == 0
    assert here.requests[0] == "/api/models/org/model/revision/v2"
    assert {path for path in here.requests if "resolve" in path} == {
        f"/org/model/resolve/{COMMIT}/{name}" for name in ("config.json", WEIGHTS, "tokenizer.json")
    }


def test_a_model_of_pickles_is_refused(here: ModelHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here.folder / WEIGHTS).rename(here.folder / "pytorch_model.bin")

    assert run(tmp_path / "models") == 1
    assert "pickle files (pytorch_model.bin)" in one_line(capsys)
    assert here.sent == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama", "model_file": "evil.py"}, "its own code (evil.py), which is not allowed"),
        ({"architectures": ["X"]}, "has no model_type"),
    ],
)
def test_an_unsupported_model_is_refused_before_its_weights_are_downloaded(
    here: ModelHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, object], reason: str
) -> None:
    (here.folder / "config.json").write_text(json.dumps(config))

    assert run(tmp_path / "models") == 1
    assert reason in one_line(capsys)
    assert here.of(WEIGHTS) == []
    assert visible(tmp_path / "models") == []


def test_a_model_of_another_owner_with_the_same_name_is_kept(
    here: ModelHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "models") == 0
    assert fetch.main(["other/model", "-o", str(tmp_path / "models")]) == 1
    assert "contains org/model" in one_line(capsys)


# Continuation


def test_a_cut_connection_continues_after_the_last_whole_chunk(here: ModelHub, tmp_path: Path) -> None:
    chunk = constants.DOWNLOAD_CHUNK_SIZE
    here.cuts[WEIGHTS] = [2 * chunk, chunk + 7]

    assert run(tmp_path / "models") == 0
    assert [sent.first for sent in here.of(WEIGHTS)] == [0, 2 * chunk, 3 * chunk]
    assert is_intact(tmp_path / "models/model")


def test_a_reset_connection_is_opened_again(here: ModelHub, tmp_path: Path) -> None:
    here.cuts[WEIGHTS], here.resets = [2**21, 2**20], True

    assert run(tmp_path / "models") == 0
    assert len(here.of(WEIGHTS)) == 3
    assert is_intact(tmp_path / "models/model")


def test_a_local_folder_does_not_hide_a_hub_id(here: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "models") == 1, "the folder holds no model"
    assert run(tmp_path / "models", "--hub") == 0
    assert is_intact(tmp_path / "models/model")


def test_the_next_process_continues_after_a_kill(source: ModelHub, tmp_path: Path) -> None:
    size, half = (source.folder / WEIGHTS).stat().st_size, 3 * 2**20
    source.stalls[WEIGHTS] = half
    models = tmp_path / "models"
    command = [sys.executable, "-m", "scripts.model_files.fetch", "org/model", "-o", str(models)]
    environment = {"HF_ENDPOINT": source.url, "HF_HOME": str(tmp_path / "hub"), "PATH": os.environ["PATH"]}

    def fetch() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    with fetch() as first:
        parts = models / ".model.partial"
        eventually(
            lambda: sum(path.stat().st_size for path in parts.glob(".*.part")) == half, "half of it is downloaded", 60
        )
        first.kill()
    assert visible(models) == []
    source.stopping.set()
    source.stalls.clear()
    with fetch() as second:
        out, err = second.communicate(timeout=60)

    assert (second.returncode, out) == (0, f"{models / 'model'} is ready\n"), err
    assert "already downloaded" in err
    assert [(sent.first, sent.bytes) for sent in source.of(WEIGHTS)] == [(0, half), (half, size - half)]
    assert [len(source.of(name)) for name in ("config.json", "tokenizer.json")] == [1, 1]
    assert (models / "model" / WEIGHTS).read_bytes() == (source.folder / WEIGHTS).read_bytes()


def test_a_server_without_range_support_sends_the_whole_file_again(here: ModelHub, tmp_path: Path) -> None:
    here.ignores_ranges = True
    here.cuts[WEIGHTS] = [2**21]

    assert run(tmp_path / "models") == 0
    assert [sent.first for sent in here.of(WEIGHTS)] == [0, 0]
    assert is_intact(tmp_path / "models/model")


def test_a_part_of_another_version_is_not_used(here: ModelHub, tmp_path: Path) -> None:
    here.cuts[WEIGHTS] = [2**21, *[0] * 10]
    assert run(tmp_path / "models") == 1
    save_weights(here.folder / WEIGHTS, {"weight": mx.zeros((1024, 1024))})
    here.cuts.clear()
    here.sent.clear()

    assert run(tmp_path / "models") == 0
    assert [sent.first for sent in here.of(WEIGHTS)] == [0]
    assert (tmp_path / "models/model" / WEIGHTS).read_bytes() == (here.folder / WEIGHTS).read_bytes()


def test_an_overloaded_server_is_retried(here: ModelHub, tmp_path: Path) -> None:
    here.statuses[WEIGHTS] = [503, 429]
    assert run(tmp_path / "models") == 0


def test_a_permanently_overloaded_server_is_an_error(
    here: ModelHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here.statuses[WEIGHTS] = [503] * 100
    assert run(tmp_path / "models") == 1
    assert "answered with an error for org/model: 503" in one_line(capsys)
    assert len(here.statuses[WEIGHTS]) == 100 - download.RETRIES


def test_a_server_that_sends_nothing_is_an_error(
    here: ModelHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here.cuts[WEIGHTS] = [0] * 100
    assert run(tmp_path / "models") == 1
    assert "cannot be reached" in one_line(capsys)
    assert len(here.of(WEIGHTS)) == 1 + download.RETRIES
    assert visible(tmp_path / "models") == []


# Verification


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
@pytest.mark.parametrize(
    "change",
    [lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]), lambda whole: whole[:-1], lambda whole: whole + bytes(2**22)],
    ids=["another hash", "shorter", "longer"],
)
def test_a_file_that_differs_from_its_listing_is_deleted(
    here: ModelHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    change: Callable[[bytes], bytes],
) -> None:
    here.content[name] = change((here.folder / name).read_bytes())

    assert run(tmp_path / "models") == 1
    assert f"{name} was received with another size or hash than the hub lists" in one_line(capsys)
    assert [sent.first for sent in here.of(name)] == [0]
    assert visible(tmp_path / "models") == []
    here.content.clear()
    assert run(tmp_path / "models") == 0, "no part of it was kept"


def test_a_file_damaged_after_its_download_is_downloaded_again(here: ModelHub, tmp_path: Path) -> None:
    here.cuts[WEIGHTS] = [2**21, *[0] * 10]
    assert run(tmp_path / "models") == 1
    (tmp_path / "models/.model.partial/tokenizer.json").write_text("[]")  # of the same length

    assert run(tmp_path / "models") == 0
    assert [len(here.of(name)) for name in ("config.json", "tokenizer.json")] == [1, 2]


def test_the_hubs_token_is_not_sent_to_another_host(
    here: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with model_hub(here.folder) as content:
        here.redirect_to = content.url.replace("127.0.0.1", "localhost")
        assert run(tmp_path / "models") == 0
    assert here.sent == []
    assert {sent.authorization for sent in content.sent} == {None}


# Progress


def test_without_a_terminal_progress_is_printed_as_lines(
    here: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0)
    assert run(tmp_path / "models") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Downloading org/model (0.00 GB)"
    assert lines[-1].split() == ["Downloading", "org/model", "(0.00", "GB)", "100%", "0:00:00"]
    assert len(lines) > 4


def test_a_terminal_shows_a_bar(source: ModelHub, tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "scripts.model_files.fetch", "org/model", "-o", str(tmp_path / "models")]
    environment = {"HF_ENDPOINT": source.url, "HF_HOME": str(tmp_path / "hub"), "PATH": os.environ["PATH"]}
    environment |= {"TERM": "xterm", "COLUMNS": "120"}
    ended = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=terminal, timeout=60
    )
    os.close(terminal)
    shown = os.read(master, 2**16).decode()
    os.close(master)
    assert ended.returncode == 0
    assert "Downloading org/model" in shown and "━" in shown and "100%" in shown


# Errors


def answer(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.invalid"))


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (httpx2.ConnectError("refused"), "cannot be reached"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (errors.RepositoryNotFoundError("no", response=answer(404)), "no model org/model"),
        (errors.GatedRepoError("no", response=answer(403)), "gated"),
        (errors.RevisionNotFoundError("no", response=answer(404)), "no such revision"),
        (errors.HfHubHTTPError("no", response=answer(500)), "500"),
    ],
)
def test_errors_of_the_hubs_library_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: Exception,
    reason: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(HfApi, "model_info", fail)
    assert run(tmp_path / "models") == 1
    assert reason in one_line(capsys)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (401, "GatedRepo", "gated"),
        (404, "RepoNotFound", "no model org/model"),
        (404, "RevisionNotFound", "no such revision"),
        (400, "", "answered with an error for org/model: 400"),
    ],
)
def test_error_responses_of_the_hub_are_one_line(
    here: ModelHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, code: str, reason: str
) -> None:
    here.info_status, here.info_error = status, code
    assert run(tmp_path / "models") == 1
    assert reason in one_line(capsys)


def test_a_forbidden_file_is_one_line(here: ModelHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here.statuses[WEIGHTS] = [403]
    assert run(tmp_path / "models") == 1
    assert "answered with an error for org/model: 403" in one_line(capsys)
