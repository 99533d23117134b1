"""Files over HTTP that are what was announced: an interrupted one goes on where it stopped, also in another process.

The hub's own library begins a file again when the process that loaded it has ended.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2
from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # it has no __all__

from scripts.model_files.manifest import sha256
from shared.models.folder import ModelError

TRIES: Final = 5
"""Without a single new byte; after that it is given up."""
PAUSE_S: Final = 1.0
_TIMEOUT_S: Final = 30.0
_PARTIAL, _NOT_SATISFIABLE = 206, 416
_BUSY: Final = (429, 500, 502, 503, 504)


class _LaterPerhaps(httpx2.TransportError):
    """The server cannot answer now."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as its server announces it.

    Attributes:
        sha256: of its content; empty: not told, as of small files.
        git_id: what git names its content by; empty: not told. Of large files it is not the content's.
    """

    name: str
    size: int
    sha256: str = ""
    git_id: str = ""

    def is_in(self, folder: Path) -> bool:
        """Whether the folder has it, whole and as announced."""
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.size and self.is_like(path)

    def is_like(self, path: Path) -> bool:
        """Whether a file has the announced content."""
        if self.sha256:
            return sha256(path) == self.sha256
        return not self.git_id or _git_id(path) == self.git_id

    def part(self, folder: Path) -> Path:
        """Where it is put together; another content of the same name has another place."""
        return folder / f".{self.name}.{(self.sha256 or self.git_id)[:16]}.part"


def download(
    client: httpx2.Client, url: str, headers: dict[str, str], file: RemoteFile, folder: Path, tick: Callable[[], None]
) -> None:
    """Have a file in a folder, whole and checked.

    Args:
        tick: called whenever there is more of it.

    Raises:
        ModelError: its content is not what was announced.
        httpx2.HTTPError: the server does not give it, or cannot be reached for long.
    """
    part = file.part(folder)
    part.touch()
    failures = 0
    while (have := _size(part)) != file.size:
        try:
            _read_on(client, url, headers, file, part, tick)
        except httpx2.TransportError:
            failures = 0 if _size(part) > have else failures + 1
            if failures == TRIES:
                raise
            time.sleep(PAUSE_S)
    if not file.is_like(part):
        part.unlink()
        raise ModelError(f"what came as {file.name} is not what the hub announced (its hash differs): not used")
    part.replace(folder / file.name)


def _read_on(
    client: httpx2.Client, url: str, headers: dict[str, str], file: RemoteFile, part: Path, tick: Callable[[], None]
) -> None:
    """Add to a part what it lacks."""
    have = _size(part)
    if have > file.size:
        part.write_bytes(b"")
        have = 0
    # Whole bytes: ranges of what is compressed on the way would be of something else.
    asked = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with client.stream("GET", url, headers=asked, timeout=_TIMEOUT_S, follow_redirects=True) as answer:
        if answer.status_code == _NOT_SATISFIABLE and have:
            part.unlink()
            raise ModelError(f"{file.name} ends before the {file.size:,} bytes that the hub announced: not used")
        if answer.status_code in _BUSY:
            raise _LaterPerhaps(f"the server answers with {answer.status_code}")
        hf_raise_for_status(answer)
        goes_on = answer.status_code == _PARTIAL and answer.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        with part.open("ab" if goes_on else "wb") as sink:
            for chunk in answer.iter_bytes():  # as it comes: what has come is kept
                sink.write(chunk)
                sink.flush()
                tick()
                if sink.tell() > file.size:
                    raise ModelError(f"{file.name} has more than the {file.size:,} bytes that the hub announced")
    if _size(part) < file.size:
        raise httpx2.RemoteProtocolError("the answer ended early")


def _size(path: Path) -> int:
    return path.stat().st_size


def _git_id(path: Path) -> str:
    content = path.read_bytes()
    # Not our choice; git itself trusts it with all of a repository.
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
