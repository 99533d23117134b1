"""Commands to download models, with a downloader that tests control."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.models.additions import AddedModel, CatalogAdditions
from shared.models.operations import Operation, Operations, OperationState
from shared.redis.client import Redis
from tests.support.waiting import eventually
from worker.service import downloads as module
from worker.service.downloads import DownloadCommand, Downloads

SCRIPTS = {
    "done": """
        import json, pathlib, sys
        for done in (0, 50, 100):
            print(json.dumps({"done": done, "total": 100}), flush=True)
        pathlib.Path("arguments").write_text("\\n".join(sys.argv[1:]))
    """,
    "fails": """
        import pathlib, sys
        folder = next(each for each in sys.argv if each.startswith("--models-dir=")).partition("=")[2]
        print("a warning", file=sys.stderr)
        print(f"fetch_model: the disk of {folder} is full: {folder}/model", file=sys.stderr)
        sys.exit(1)
    """,
    "hangs": """
        import json, time
        print(json.dumps({"done": 30, "total": 100}), flush=True)
        time.sleep(60)
    """,
}


@pytest.fixture
def operations(client: Redis) -> Operations:
    return Operations(client)


@pytest.fixture
def downloads(
    client: Redis, operations: Operations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Downloads]:
    """Downloads whose downloader is the script `scripts/model_files/fetch.py` of a temporary folder."""
    folder = tmp_path / "scripts/model_files"
    folder.mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "_DOWNLOADER", folder / "fetch.py")
    downloads = Downloads(tmp_path / "models", operations, CatalogAdditions(client))
    yield downloads
    downloads.close()
    if downloads.ident is not None:
        downloads.join(30)


@pytest.fixture
def put(downloads: Downloads, operations: Operations, tmp_path: Path) -> Callable[[str], Callable[[], Operation]]:
    """Queues a download with a script; returns a function that reads its operation."""

    def queue(script: str) -> Callable[[], Operation]:
        (tmp_path / "scripts/model_files/fetch.py").write_text(textwrap.dedent(SCRIPTS[script]))
        operation = operations.begin("download", "model", "here", "org/model")
        downloads.put(DownloadCommand(operation.id, "org/model", "v1", "model"))

        def read() -> Operation:
            found = operations.read(operation.id)
            assert found is not None
            return found

        return read

    return queue


def ended(read: Callable[[], Operation]) -> Operation:
    eventually(lambda: read().state.terminal, "the download ends", 30)
    return read()


Put = Callable[[str], Callable[[], Operation]]


def test_a_downloaded_model_is_added_to_the_catalog(
    downloads: Downloads, put: Put, client: Redis, tmp_path: Path
) -> None:
    downloads.start()
    operation = ended(put("done"))
    assert (operation.state, operation.progress, operation.bytes_total) == (OperationState.SUCCEEDED, 1.0, 100)
    assert CatalogAdditions(client).read().models == {"model": AddedModel("model", "org/model", "v1")}
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[-2:] == ["--", "org/model"], "a name that begins with - is no option"
    assert {"--hub", "--revision=v1", "--name=model", f"--models-dir={tmp_path / 'models'}"} <= set(arguments)
    eventually(lambda: downloads.operations == (), "the operation is no longer listed")


def test_a_failure_is_shown_without_paths(downloads: Downloads, put: Put, client: Redis) -> None:
    downloads.start()
    operation = ended(put("fails"))
    assert (operation.state, operation.error_code) == (OperationState.FAILED, "download_failed")
    assert operation.error_message == "the disk of the models folder is full: model"
    assert CatalogAdditions(client).read().models == {}


def test_running_and_waiting_downloads_are_cancelled(downloads: Downloads, put: Put, client: Redis) -> None:
    running, waiting = put("hangs"), put("hangs")
    downloads.start()
    eventually(lambda: running().bytes_done == 30, "the first one runs", 30)
    assert running().state is OperationState.DOWNLOADING and waiting().state is OperationState.PENDING
    for each in (waiting, running):
        downloads.cancel(each().id)
    downloads.cancel("unknown")
    assert ended(running).state is ended(waiting).state is OperationState.CANCELLED
    assert CatalogAdditions(client).read().models == {}


def test_the_end_of_the_process_ends_the_download(downloads: Downloads, put: Put) -> None:
    running = put("hangs")
    downloads.start()
    eventually(lambda: running().bytes_done == 30, "it runs", 30)
    downloads.close()
    downloads.join(30)
    assert not downloads.is_alive()
    assert running().state is OperationState.FAILED


def test_an_installation_without_the_downloader_says_so(downloads: Downloads, put: Put, tmp_path: Path) -> None:
    read = put("done")
    (tmp_path / "scripts/model_files/fetch.py").unlink()
    downloads.start()
    assert "has no downloader" in (ended(read).error_message or "")


def test_a_command_that_is_delivered_twice_runs_once(downloads: Downloads, put: Put) -> None:
    read = put("done")
    downloads.put(DownloadCommand(read().id, "org/model", "v1", "model"))
    assert downloads.operations == (read().id,)


def test_the_hub_is_reachable_unless_the_operator_says_otherwise(
    downloads: Downloads, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as the worker sets it for the model libraries
    monkeypatch.setitem(SCRIPTS, "offline", "import os, sys; sys.exit('HF_HUB_OFFLINE' in os.environ)")
    downloads.start()
    assert ended(put("offline")).state is OperationState.SUCCEEDED
    monkeypatch.setattr(module, "_OFFLINE_IS_SET", True)
    assert ended(put("offline")).state is OperationState.FAILED
