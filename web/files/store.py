"""Files on disk.

Each API key has a folder, and each file in it has a content and a description:

    FILES_DIR/<key id>/<file id>.data
    FILES_DIR/<key id>/<file id>.json    written last: a file exists once it has one
    FILES_DIR/<key id>/<name>.part       a file that is being written

Several API hosts can share the folder. Nothing is kept in memory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Final, Self

from shared.errors import NotFound, RateLimited, TooLarge, Unavailable
from shared.wire import known_fields
from web.http.threadpool import LARGE, run_in_threadpool

log = logging.getLogger(__name__)

MAX_FILES: Final = 1000
"""Maximum files of an API key."""
MAX_UPLOADS: Final = 8
"""Maximum concurrent uploads of an API key."""
ABANDONED_S: Final = 600.0
"""A `.part` file that has not been written for this long belongs to a process that was killed."""
_FILE_ID: Final = re.compile(r"file-[0-9a-f]{28}")
_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RETRY_S: Final = 30


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed because there is no space left."""
    return error.errno in _DISK_FULL


def new_file_id() -> str:
    """Return `file-` and 28 hexadecimal digits; ids sort by creation time."""
    return f"file-{time.time_ns():016x}{secrets.token_hex(6)}"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The description of a file. Times are seconds since the epoch.

    Attributes:
        owner: id of the API key.
        purpose: `batch` for uploads, `batch_output` for the results of batches.
    """

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: float
    expires_at: float

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse the content of a `.json` file, also one of another version."""
        return cls(**known_fields(cls, json.loads(text)))


class PartialFile:
    """A file that is being written. It does not exist for readers until `FileStore.commit`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._file: IO[bytes] = path.open("xb", buffering=0)

    def write(self, data: bytes) -> None:
        """Append data.

        Raises:
            OSError: the disk is full or fails. The file must be discarded.
        """
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self.bytes += len(data)

    def sync(self) -> None:
        """Return when everything written is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def discard(self) -> None:
        """Delete the file unless it was committed."""
        self.close()
        self.path.unlink(missing_ok=True)


class FileStore:
    """The files of all API keys.

    Args:
        lifetime_s: how long a file is kept unless the upload asks for less.
        quota_bytes: maximum size of all files of an API key. The results of batches count, but are never refused.
    """

    def __init__(self, root: Path, lifetime_s: float, quota_bytes: int) -> None:
        self._root = root
        self._lifetime_s = lifetime_s
        self._quota_bytes = quota_bytes

    @contextmanager
    def upload(self, owner: str, size: int = 0) -> Iterator[PartialFile]:
        """Begin a file of an API key; discard it at the end of the block unless it was committed.

        Args:
            size: the expected number of bytes, as far as it is known.

        Raises:
            RateLimited: the key has too many uploads at this moment.
            TooLarge: the key's files would exceed its quota.
            Unavailable: the disk is full.
        """
        with self._reporting_full_disk():
            if self._uploads(owner) >= MAX_UPLOADS:
                detail = f"This API key has {MAX_UPLOADS} uploads at this moment, which is the maximum."
                raise RateLimited(detail, code="too_many_uploads", retry_after=_RETRY_S)
            self._check_quota(owner, size)
            partial = self.begin(owner)
            try:
                yield partial
            finally:
                partial.discard()

    def begin(self, owner: str) -> PartialFile:
        """Begin a file. Raises OSError."""
        folder = self._root / owner
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return PartialFile(folder / f"{secrets.token_hex(12)}.part")

    def commit_upload(self, partial: PartialFile, file: StoredFile) -> None:
        """Make an upload durable and visible.

        Raises:
            TooLarge: the key's files would exceed its quota.
            OSError: the disk is full or fails.
        """
        with self._locked(file.owner):  # otherwise concurrent uploads could each fit, but not all of them
            self._check_quota(file.owner, 0)
            self.commit(partial, file)

    def commit(self, partial: PartialFile, file: StoredFile) -> None:
        """Make a file durable and visible, or replace it by another one with the same id. Raises OSError."""
        run_in_threadpool(LARGE, partial.sync)
        partial.close()
        data = self._data(file.owner, file.id)
        description = data.with_suffix(".json.part")
        description.write_text(json.dumps(asdict(file)))
        partial.path.replace(data)
        description.replace(data.with_suffix(".json"))
        run_in_threadpool(LARGE, lambda: sync_folder(data.parent))

    def describe(
        self,
        partial: PartialFile,
        owner: str,
        filename: str,
        purpose: str,
        file_id: str = "",
        lifetime_s: float | None = None,
    ) -> StoredFile:
        """Describe a file that is complete now.

        Args:
            lifetime_s: how long it is to be kept, if that is shorter than the default.
        """
        now = time.time()
        expires_at = now + min(self._lifetime_s, lifetime_s or self._lifetime_s)
        return StoredFile(file_id or new_file_id(), owner, filename, purpose, partial.bytes, now, expires_at)

    def get(self, file_id: str, owner: str) -> StoredFile:
        """Return the description of an API key's file.

        Raises:
            NotFound: the file does not exist, has expired or belongs to another key.
        """
        if _FILE_ID.fullmatch(file_id):
            file = _read(self._data(owner, file_id).with_suffix(".json"))
            if file is not None and file.expires_at > time.time():
                return file
        raise NotFound("There is no such file.", code="file_not_found")

    def path(self, file: StoredFile) -> Path:
        """Return the path of a file's content."""
        return self._data(file.owner, file.id)

    def all_of(self, owner: str) -> list[StoredFile]:
        """Return an API key's files, oldest first."""
        now = time.time()
        return [file for file in self._all(owner) if file.expires_at > now]

    def delete(self, file_id: str, owner: str) -> None:
        """Delete an API key's file. Batches that use it have their own link to its content.

        Raises:
            NotFound: as `get`.
        """
        self._remove(self.get(file_id, owner))

    def remove_expired(self) -> int:
        """Delete expired files, and what killed processes left behind. Returns how many files were deleted."""
        now, removed = time.time(), 0
        for folder in self._owners():
            for file in self._all(folder.name):
                if file.expires_at <= now:
                    self._remove(file)
                    removed += 1
            for part in folder.glob("*.part"):
                if _is_older(part, ABANDONED_S):
                    part.unlink(missing_ok=True)
            for data in folder.glob("*.data"):
                if not data.with_suffix(".json").exists() and _is_older(data, ABANDONED_S):
                    data.unlink(missing_ok=True)
        return removed

    def _remove(self, file: StoredFile) -> None:
        data = self._data(file.owner, file.id)
        data.with_suffix(".json").unlink(missing_ok=True)
        data.unlink(missing_ok=True)

    def _data(self, owner: str, file_id: str) -> Path:
        return self._root / owner / f"{file_id}.data"

    def _owners(self) -> list[Path]:
        with suppress(FileNotFoundError):
            return [folder for folder in self._root.iterdir() if folder.is_dir()]
        return []

    def _all(self, owner: str) -> list[StoredFile]:
        descriptions = sorted((self._root / owner).glob("*.json"))
        return [file for path in descriptions if (file := _read(path)) is not None]

    def _uploads(self, owner: str) -> int:
        return sum(not _is_older(part, ABANDONED_S) for part in (self._root / owner).glob("*.part"))

    def _check_quota(self, owner: str, size: int) -> None:
        count, used = 0, size
        for path in (self._root / owner).glob("file-*.data"):
            with suppress(FileNotFoundError):
                used += path.stat().st_size
                count += 1
        for part in (self._root / owner).glob("*.part"):
            with suppress(FileNotFoundError):
                used += part.stat().st_size
        if used > self._quota_bytes or count >= MAX_FILES:
            detail = (
                f"This API key can have at most {MAX_FILES:,} files with {self._quota_bytes:,} bytes "
                "(FILES_BYTES_PER_KEY). Delete some with DELETE /v1/files/{id}."
            )
            raise TooLarge(detail, code="files_quota_exceeded", field="file")

    @contextmanager
    def _locked(self, owner: str) -> Iterator[None]:
        with (self._root / owner / ".lock").open("w") as lock:
            run_in_threadpool(LARGE, lambda: fcntl.flock(lock, fcntl.LOCK_EX))
            yield

    @contextmanager
    def _reporting_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not is_disk_full(error):
                raise
            log.error("files_disk_full", extra={"path": str(self._root)})
            detail = "The disk of FILES_DIR is full. Try again later."
            raise Unavailable(detail, code="disk_full", retry_after=_RETRY_S) from error


def sync_folder(folder: Path) -> None:
    """Return when the folder's entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> StoredFile | None:
    try:
        return StoredFile.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        log.error("file_description_damaged", extra={"path": str(path)})
        return None


def _is_older(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime > seconds
    except FileNotFoundError:
        return False
