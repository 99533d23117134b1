"""Tokenizers as files with gzip, named for their content: on the disk of every host, and in Redis on their way there.

A worker puts the file of its model's tokenizer into both; an API host fetches what it lacks. Nothing here reads what is
in them: a process that loads one compares it with its name (`shared.tokenizing.encoder`), and fetches a wrong one
again.
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

from shared.queue import keys
from shared.queue.redis import Redis

_MOST_FILES: Final = 64
"""Maximum tokenizers in the folder. The oldest are deleted, and fetched again when they are needed."""


class TokenizerFiles:
    """The tokenizers that a host has.

    Args:
        fetch: returns the file of a missing tokenizer by its digest, or None.
    """

    def __init__(self, folder: Path, fetch: Callable[[str], bytes | None] = lambda _: None) -> None:
        self._folder = folder
        self._fetch = fetch
        self._fetching = threading.Lock()

    def path(self, digest: str) -> Path | None:
        """The file of a tokenizer; None when neither this host nor Redis has it.

        Raises:
            OSError: it cannot be written.
            redis.RedisError: it cannot be fetched.
        """
        file = self._file(digest)
        if file.is_file():
            return file
        with self._fetching:  # single flight
            if not file.is_file():
                content = self._fetch(digest)
                if content is None:
                    return None
                self._write(file, content)
        return file

    def put(self, digest: str, text: str) -> Path:
        """Keep a tokenizer; its file."""
        file = self._file(digest)
        self._write(file, gzip.compress(text.encode(), compresslevel=6, mtime=0))
        return file

    def discard(self, digest: str) -> None:
        """Delete a file that has the wrong content."""
        self._file(digest).unlink(missing_ok=True)

    def _file(self, digest: str) -> Path:
        return self._folder / f"{digest}.json.gz"

    def _write(self, file: Path, content: bytes) -> None:
        write_private(file, content)
        files = sorted(self._folder.glob("*.json.gz"), key=_age, reverse=True)
        for old in files[_MOST_FILES:]:
            old.unlink(missing_ok=True)


class TokenizerStore:
    """The tokenizers in Redis.

    Args:
        client: with answers in bytes, and used for nothing that must not wait: a tokenizer may have megabytes.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client

    def get(self, digest: str) -> bytes | None:
        """A tokenizer's file. Raises `redis.RedisError` when Redis is away."""
        content: bytes | None = self._client.get(keys.TOKENIZER + digest)
        return content

    def put(self, digest: str, content: bytes) -> None:
        """Keep a tokenizer's file, as long as a model's card names it (`announce_model.lua`)."""
        self._client.set(keys.TOKENIZER + digest, content)


def write_private(file: Path, content: bytes) -> None:
    """Write a file atomically, readable by this user only. Raises OSError."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
