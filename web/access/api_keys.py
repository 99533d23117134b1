"""API keys: one JSON file, mode 600, that holds hashes and never a key.

A key is `mlxq_`, its public id, `_`, and 256 random bits. So much randomness needs no slow hash, and the id in the
key makes looking it up one comparison. The file is read again whenever it changes: keys made or revoked by
`scripts/keys` hold without a restart.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from limits import parse_many

log = logging.getLogger(__name__)

SCOPES: Final = frozenset({"infer", "admin"})
LOCK_S: Final = 10.0
"""Longest wait for another writer, who has a file to read and to write."""
_FORM: Final = re.compile(r"mlxq_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_NOBODY: Final = hashlib.sha256(secrets.token_bytes()).hexdigest()
"""What the key of an unknown id is compared with, so that it takes as long as a known one."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key.

    Attributes:
        id: its public part, safe to show and to log; it owns the jobs submitted with the key.
        hash: SHA-256 of the whole key.
        scopes: what it may do: `infer`, `admin`.
        rate_limit: as in `100/minute`; None for the service's default.
        created_at, revoked_at: seconds since the epoch; a revoked key opens nothing.
    """

    id: str
    name: str
    hash: str
    scopes: frozenset[str]
    rate_limit: str | None
    created_at: float
    revoked_at: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {**asdict(self), "scopes": sorted(self.scopes)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ApiKey:
        """Read what `to_dict` gave."""
        return cls(**{**data, "scopes": frozenset(data["scopes"])})


def new_key() -> str:
    """A key nobody has."""
    return f"mlxq_{secrets.token_hex(4)}_{secrets.token_urlsafe(32)}"


class KeyStore:
    """The keys of one file. Any number of processes may read and write it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._keys: dict[str, ApiKey] = {}

    def ensure(self, key: str, name: str, scopes: Iterable[str]) -> ApiKey:
        """Make a given key known, unless its id is known already, and the only one of its name that is valid.

        A key that was revoked stays so.

        Raises:
            ValueError: it does not have the form of a key, or its id belongs to another one.
        """
        match = _FORM.fullmatch(key)
        if match is None:
            raise ValueError("An API key is mlxq_, 8 hex digits, _ and 43 characters of A-Z a-z 0-9 _ -")
        entry = ApiKey(match[1], name, _hash(key), _checked(scopes), None, time.time())
        with self._writing() as keys:
            known = keys.setdefault(entry.id, entry)
            if known.hash != entry.hash:
                raise ValueError(f"Another API key has the id {entry.id}")
            for other in [*keys.values()]:
                if other.name == name and other.id != known.id and other.revoked_at is None:
                    keys[other.id] = replace(other, revoked_at=entry.created_at)
        if known.revoked_at is not None:
            log.warning("api_key_stays_revoked", extra={"key_id": known.id})
        return known

    def create(self, name: str, scopes: Iterable[str], rate_limit: str | None = None) -> str:
        """Make a key. It is shown this once: only its hash is kept.

        Raises:
            ValueError: an unknown scope, a rate limit that cannot be read, or a name in use.
        """
        granted = _checked(scopes)
        if rate_limit is not None:
            parse_many(rate_limit)
        key = new_key()
        entry = ApiKey(key.split("_")[1], name, _hash(key), granted, rate_limit, time.time())
        with self._writing() as keys:
            if any(other.name == name and other.revoked_at is None for other in keys.values()):
                raise ValueError(f"There is a key named {name!r} already")
            keys[entry.id] = entry
        return key

    def revoke(self, id_or_name: str) -> ApiKey:
        """Make a key useless, from the next request on.

        Raises:
            KeyError: no such key, or it is revoked already.
        """
        with self._writing() as keys:
            for entry in keys.values():
                if id_or_name in (entry.id, entry.name) and entry.revoked_at is None:
                    keys[entry.id] = replace(entry, revoked_at=time.time())
                    return keys[entry.id]
        raise KeyError(id_or_name)

    def list(self) -> list[ApiKey]:
        """All keys, revoked ones too, oldest first."""
        self._refresh()
        return sorted(self._keys.values(), key=lambda entry: entry.created_at)

    def find(self, key: str) -> ApiKey | None:
        """The entry of a key that is valid now. Takes as long for a wrong key as for a right one."""
        self._refresh()
        match = _FORM.fullmatch(key)
        entry = self._keys.get(match[1]) if match else None
        same = hmac.compare_digest(entry.hash if entry else _NOBODY, _hash(key))
        return entry if entry and same and entry.revoked_at is None else None

    def _refresh(self) -> None:
        """Read the file if it changed. One that cannot be read leaves what was known."""
        try:
            stat = self._path.stat()
            mark = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if mark == self._seen:
                return
            self._seen = mark
            self._keys = _read(self._path)
        except FileNotFoundError:
            self._seen, self._keys = None, {}
        except (OSError, ValueError, TypeError, KeyError):
            log.exception("api_keys_not_read", extra={"path": str(self._path)})  # those read before stay in force

    @contextmanager
    def _writing(self) -> Iterator[dict[str, ApiKey]]:
        """The keys as they are now; what the block leaves in them is written, whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _private(self._path.with_suffix(".lock")) as lock:
            _lock(lock)
            # Not the cached ones: a file that cannot be read must stop a writer, who would replace it.
            keys = _read(self._path) if self._path.exists() else {}
            before = dict(keys)
            yield keys
            if keys != before:
                self._replace(keys)

    def _replace(self, keys: dict[str, ApiKey]) -> None:
        scratch = self._path.with_suffix(".new")
        with _private(scratch) as file:
            file.truncate()
            json.dump({"keys": [entry.to_dict() for entry in keys.values()]}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self._path)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _checked(scopes: Iterable[str]) -> frozenset[str]:
    granted = frozenset(scopes)
    if not granted or not granted <= SCOPES:
        raise ValueError(f"Scopes are {' and '.join(sorted(SCOPES))}")
    return granted


def _read(path: Path) -> dict[str, ApiKey]:
    entries = map(ApiKey.from_dict, json.loads(path.read_text())["keys"])
    return {entry.id: entry for entry in entries}


def _lock(file: Any) -> None:
    """Take the lock of a file that other processes write with.

    Raises:
        TimeoutError: another process has held it for too long.
    """
    until = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(f"Another process has held the lock of the API keys for {LOCK_S:.0f} s") from None
            time.sleep(0.02)
        else:
            return


def _private(path: Path) -> Any:
    """The file, opened for writing and readable by its owner alone from the first byte on."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "w")
