"""Downloads models from the hub into the folder of the catalog, one after another, in a thread.

`scripts/fetch_model` does the work in a process of its own: it neither holds the interpreter lock of the engine nor
survives this process, and continues a download that was interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Final

from redis import RedisError

from shared.models.additions import AddedModel, CatalogAdditions
from shared.models.operations import Operations, OperationState
from shared.settings import ROOT
from worker.service.operation_progress import PUBLISH_EVERY_S, OperationProgress, log_unpublished, retry

logger = logging.getLogger(__name__)

_DOWNLOADER: Final = ROOT / "scripts/model_files/fetch.py"
_OFFLINE: Final = "HF_HUB_OFFLINE"
_OFFLINE_IS_SET: Final = _OFFLINE in os.environ
"""Whether the operator set it. Otherwise `worker.app` sets it, for the model libraries only."""
_ERROR_BYTES: Final = 4096
_PREFIX: Final = "fetch_model: "
_PUBLISH_SHARE: Final = 0.05
"""Progress that is published at once, so that the last report before a pause is not far behind."""
_END_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class DownloadCommand:
    """A command to download a model.

    Attributes:
        operation: id of its operation.
        hub: id of the repository.
        revision: branch, tag or commit; empty for the default branch.
        model: id of the model, and name of its folder.
    """

    operation: str
    hub: str
    revision: str
    model: str


class Downloads(threading.Thread):
    """Carries out commands one after another.

    Args:
        models_dir: the folder for the models' folders.
        announce_soon: announces the operations of this process, in another thread.
    """

    def __init__(
        self,
        models_dir: Path,
        operations: Operations,
        additions: CatalogAdditions,
        announce_soon: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(name="downloads", daemon=True)
        self._models_dir = models_dir
        self._operations = operations
        self._additions = additions
        self._announce_soon = announce_soon
        self._commands: SimpleQueue[DownloadCommand | None] = SimpleQueue()
        self._unfinished: tuple[str, ...] = ()
        self._cancelled: set[str] = set()
        self._process: subprocess.Popen[str] | None = None
        self._current = ""
        self._closing = False
        self._lock = threading.Lock()

    @property
    def operations(self) -> tuple[str, ...]:
        """Ids of the operations that are queued or under way here."""
        return self._unfinished

    def put(self, command: DownloadCommand) -> None:
        """Queue a command."""
        with self._lock:
            if command.operation in self._unfinished:
                return  # the broker delivered the command twice
            self._unfinished = (*self._unfinished, command.operation)
        self._announce_soon()
        self._commands.put(command)

    def cancel(self, operation: str) -> None:
        """End a download, or take it out of the queue. What was received stays, for the next download."""
        with self._lock:
            if operation in self._unfinished:
                self._cancelled.add(operation)
            if operation == self._current and self._process is not None:
                self._process.terminate()

    def close(self) -> None:
        """End the thread, and the download that is under way."""
        with self._lock:
            self._closing = True
            if self._process is not None:
                self._process.terminate()
        self._commands.put(None)

    def run(self) -> None:
        """Carry out commands until closed."""
        while (command := self._commands.get()) is not None and not self._closing:
            try:
                self._execute(command)
            except RedisError as error:
                log_unpublished(command.operation, error)
            except Exception:  # such as an operation that cannot be read: it must not stop the following commands
                logger.exception("download_failed", extra={"operation": command.operation})
            with self._lock:
                self._cancelled.discard(command.operation)
                self._unfinished = tuple(name for name in self._unfinished if name != command.operation)
            self._announce_soon()

    def _execute(self, command: DownloadCommand) -> None:
        operation = retry(lambda: self._operations.read(command.operation))
        if operation is None or operation.state.terminal:
            logger.warning("operation_unknown_or_ended", extra={"operation": command.operation})
            return
        progress = OperationProgress(self._operations, operation)
        progress.publish(OperationState.WAITING)
        error = self._download(command, progress)
        if command.operation in self._cancelled:
            progress.publish(OperationState.CANCELLED)
        elif error:
            logger.warning("model_not_downloaded", extra={"model": command.hub, "reason": error})
            progress.publish(OperationState.FAILED, error_code="download_failed", error_message=error)
        else:
            retry(lambda: self._additions.add(AddedModel(command.model, command.hub, command.revision)))
            logger.info("model_downloaded", extra={"model": command.model, "hub": command.hub})
            progress.publish(OperationState.SUCCEEDED, progress=1.0)

    def _download(self, command: DownloadCommand, progress: OperationProgress) -> str:
        """Run the downloader, and publish its progress; return why it failed, or an empty string."""
        if not _DOWNLOADER.is_file():
            return "This worker's installation has no downloader. Run scripts/fetch_model on its host."
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            process = self._start(command, errors)
            if process is None:
                return ""
            try:
                _publish_progress(process, progress)
            finally:
                process.terminate()  # does nothing if it has ended
                status = _wait(process)
                with self._lock:
                    self._process, self._current = None, ""
            return "" if status == 0 else self._reason(errors)

    def _start(self, command: DownloadCommand, errors: IO[str]) -> subprocess.Popen[str] | None:
        """Start the downloader; None if the command was cancelled before."""
        revision = [f"--revision={command.revision}"] if command.revision else []
        environment = {name: value for name, value in os.environ.items() if name != _OFFLINE or _OFFLINE_IS_SET}
        with self._lock:
            if command.operation in self._cancelled or self._closing:
                return None
            self._current = command.operation
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "scripts.model_files.fetch", "--hub", "--progress=json", *revision),
                    *(f"--name={command.model}", f"--models-dir={self._models_dir}", "--", command.hub),
                ],
                cwd=ROOT,
                env=environment | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            return self._process

    def _reason(self, errors: IO[str]) -> str:
        """Return the downloader's last line, without the paths of this machine."""
        errors.seek(0, os.SEEK_END)
        errors.seek(max(0, errors.tell() - _ERROR_BYTES))
        lines = errors.read().strip().splitlines() or ["The downloader was ended."]
        reason = lines[-1].removeprefix(_PREFIX).replace(f"{self._models_dir}{os.sep}", "")
        return reason.replace(str(self._models_dir), "the models folder")


def _publish_progress(process: subprocess.Popen[str], progress: OperationProgress) -> None:
    """Publish what the downloader reports, until it ends."""
    published_at, published = float("-inf"), 0.0
    for done, total in _reports(process):
        share = round(done / total, 4) if total else 0.0
        if time.monotonic() - published_at >= PUBLISH_EVERY_S or share - published >= _PUBLISH_SHARE:
            published_at, published = time.monotonic(), share
            progress.publish(OperationState.DOWNLOADING, progress=share, bytes_done=done, bytes_total=total)


def _reports(process: subprocess.Popen[str]) -> Iterator[tuple[int, int]]:
    """Yield the bytes that have been received, and their total."""
    for line in process.stdout or ():
        try:
            report: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        yield report["done"], report["total"]


def _wait(process: subprocess.Popen[str]) -> int:
    """Wait for the end of a process, close its pipe, and return its exit status."""
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
    with process:  # closes the pipe
        return process.wait()
