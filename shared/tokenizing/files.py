"""Gzipped tokenizer files, named by digest: on the disk of every host, and in Redis to distribute them.

A worker stores its model's tokenizer in both; API hosts fetch missing files from Redis. The content is not checked here
but when it is loaded (`shared.tokenizing.chat_tokenizer`). A file that does not match its digest is discarded and
fetched again.
"""

from __future__ import annotations

import gzip
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from shared.redis import keys
from shared.redis.client import Redis

_MAX_FILES: Final = 64
"""Maximum files in the folder. The oldest are deleted; if needed, they are fetched again."""


class TokenizerFiles:
    """The tokenizer files of a host.

    Args:
        fetch: returns the content of a missing file by its digest, or None.
    """

    def __init__(self, folder: Path, fetch: Callable[[str], bytes | None] = lambda _: None) -> None:
        self._folder = folder
        self._fetch = fetch
        self._fetching = threading.Lock()

    def path(self, digest: str) -> Path | None:
        """Return the file of a tokenizer, and fetch it if necessary. None if it is not available.

        Raises:
            OSError: the file cannot be written.
            redis.RedisError: the file cannot be fetched.
        """
        file = self._file(digest)
        if file.is_file():
            return file
        with self._fetching:  # only one thread fetches
            if not file.is_file():
                content = self._fetch(digest)
                if content is None:
                    return None
                self._write(file, content)
        return file

    def put(self, digest: str, text: str) -> Path:
        """Store the text of a `tokenizer.json` and return its file."""
        file = self._file(digest)
        self._write(file, gzip.compress(text.encode(), compresslevel=6, mtime=0))
        return file

    def discard(self, digest: str) -> None:
        """Delete a file that does not match its digest."""
        self._file(digest).unlink(missing_ok=True)

    def _file(self, digest: str) -> Path:
        return self._folder / f"{digest}.json.gz"

    def _write(self, file: Path, content: bytes) -> None:
        write_private(file, content)
        files = sorted(self._folder.glob("*.json.gz"), key=_age, reverse=True)
        for old in files[_MAX_FILES:]:
            old.unlink(missing_ok=True)


class TokenizerStore:
    """The tokenizer files in Redis.

    Args:
        client: a client that returns bytes. It must not be used for latency-critical calls: files may have megabytes.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client

    def get(self, digest: str) -> bytes | None:
        """Return a tokenizer's file; None if Redis does not have it.

        Raises:
            redis.RedisError: Redis is unreachable.
        """
        content: bytes | None = self._client.get(keys.TOKENIZER + digest)
        return content

    def put(self, digest: str, content: bytes) -> None:
        """Store a tokenizer's file. `announce_model.lua` deletes it when no model card names it any more."""
        self._client.set(keys.TOKENIZER + digest, content)


def write_private(file: Path, content: bytes) -> None:
    """Write a file atomically, readable only by this user.

    Raises:
        OSError: the file cannot be written.
    """
    for folder in (file.parent.parent, file.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.parent.chmod(0o700)
    part = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
            opened.write(content)
        part.replace(file)
    finally:
        with suppress(OSError):
            part.unlink()


def _age(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # another process has removed it
        return 0.0
