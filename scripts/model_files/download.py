"""Downloads of single hub files that continue where an earlier process stopped.

`huggingface_hub.hf_hub_download` starts a file again in every process: its partial file has a random name (2.4.0). Its
`http_get`, which continues and retries, takes the partial file from the caller, so the partial file is kept here.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get

from scripts.model_files.manifest import sha256
from shared.models.folder import ModelError

# A broken connection or a killed process loses the chunk that is being received. The library's 10 MiB take minutes on
# slow connections.
constants.DOWNLOAD_CHUNK_SIZE = 2**20

RETRIES: Final = 5
"""Attempts without a new byte before the download fails."""
PAUSE_S: Final = 1.0
_OVERLOADED: Final = (500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it.

    Attributes:
        sha256: of its content; empty for small files, which the hub stores in git.
        git_id: git's object id. For files with a `sha256` it is that of a pointer file, not of the content.
    """

    name: str
    size: int
    sha256: str = ""
    git_id: str = ""

    def is_in(self, folder: Path) -> bool:
        """Whether the folder contains the complete file."""
        path = folder / self.name
        return path.is_file() and self.matches(path)

    def matches(self, path: Path) -> bool:
        """Whether a local file has the listed size and hash."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256:
            return sha256(path) == self.sha256
        return not self.git_id or _git_id(path) == self.git_id

    def partial(self, folder: Path) -> Path:
        """The partial file; its name contains the hash, so two versions of a file are never mixed."""
        return folder / f".{self.name.replace('/', '.')}.{(self.sha256 or self.git_id)[:16]}.part"


class _ReportingFile(io.BufferedWriter):
    """A file that calls `tick` after each write, with the bytes already handed to the kernel."""

    def __init__(self, path: Path, tick: Callable[[], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._tick = tick

    def write(self, data: Any, /) -> int:
        count = super().write(data)
        self.flush()
        self._tick()
        return count


def download(url: str, headers: dict[str, str], file: RemoteFile, folder: Path, tick: Callable[[], None]) -> None:
    """Download a file into a folder, continuing its partial file if there is one, and verify it.

    Args:
        tick: called after each chunk.

    Raises:
        ModelError: the content differs from what the hub lists.
        httpx2.HTTPError: the server refuses, or the connection failed `RETRIES` times without a new byte.
    """
    partial = file.partial(folder)
    partial.touch()
    failures = 0
    while (have := partial.stat().st_size) < file.size:
        try:
            _continue(url, headers, partial, tick)
            break
        except (httpx2.NetworkError, HfHubHTTPError) as error:
            failures = 0 if partial.stat().st_size > have else failures + 1
            if failures == RETRIES or not _is_temporary(error):
                raise
            time.sleep(PAUSE_S)
    if not file.matches(partial):
        partial.unlink()
        raise ModelError(f"{file.name} was received with another size or hash than the hub lists: deleted")
    target = folder / file.name
    target.parent.mkdir(exist_ok=True)
    partial.replace(target)


def _continue(url: str, headers: dict[str, str], partial: Path, tick: Callable[[], None]) -> None:
    # In a compressed response, a byte range would refer to the compressed bytes.
    headers = {**headers, "Accept-Encoding": "identity"}
    with _ReportingFile(partial, tick) as sink:
        http_get(url, sink, resume_size=sink.tell(), headers=headers)


def _is_temporary(error: httpx2.NetworkError | HfHubHTTPError) -> bool:
    """Failures that `http_get` does not retry itself: a reset connection and an overloaded server."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in _OVERLOADED


def _git_id(path: Path) -> str:
    content = path.read_bytes()
    # Git identifies content by SHA-1.
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
