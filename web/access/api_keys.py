"""API keys, stored as hashes in one JSON file with mode 600.

A key has the form `mlxq_<public id>_<secret>`. The secret has 256 random bits, so a fast hash is enough, and thanks to
the id a lookup compares one hash. The file is read again whenever it changes: keys that `scripts/keys` creates or
revokes take effect without a restart.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from limits import parse_many

from shared.jobs.limits import STANDARD, OwnerLimits
from shared.jobs.record import Priority
from shared.wire import known_fields

log = logging.getLogger(__name__)

SCOPES: Final = frozenset({"infer", "admin"})
LOCAL_SCOPES: Final = frozenset({"infer"})
"""Scopes of MLXQ_API_KEY. Loading and unloading models needs a key that was created with the scope `admin`."""
LOCK_TIMEOUT_S: Final = 10.0
"""Longest wait for another process that is writing the file."""
_KEY_FORMAT: Final = re.compile(r"mlxq_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_DUMMY_HASH: Final = hashlib.sha256(secrets.token_bytes()).hexdigest()
"""Compared with keys of unknown ids, so that a lookup takes the same time for known and unknown ids."""


class KeyFileDamaged(ValueError):
    """The key file exists but has no valid content. The message names the file and the fix."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The stored entry of a key.

    Attributes:
        id: the public part of the key, safe to show and to log; it owns the jobs submitted with the key.
        hash: SHA-256 of the whole key.
        scopes: permissions: `infer`, `admin`.
        rate_limit: for example `100/minute`; None for the service's default.
        created_at, revoked_at: seconds since the epoch; `revoked_at` is None for a valid key.
        limits: what the key may use.
        max_priority: highest priority that jobs may have. Entries without one were created before there was a limit.
    """

    id: str
    name: str
    hash: str
    scopes: frozenset[str]
    rate_limit: str | None
    created_at: float
    revoked_at: float | None = None
    limits: OwnerLimits = STANDARD
    max_priority: Priority = Priority.HIGH

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as it is stored in the file."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "limits"}
        max_queued = self.limits.max_queued  # processes of earlier versions need this one
        stored = {"scopes": sorted(self.scopes), "max_priority": self.max_priority.label, "max_queued": max_queued}
        return own | stored | self.limits.to_dict()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ApiKey:
        """Read an entry that `to_dict` wrote, also that of another version."""
        known = known_fields(cls, {"max_priority": Priority.HIGH.label, **data})
        values = {
            "scopes": frozenset(known["scopes"]),
            "max_priority": Priority[known["max_priority"].upper()],
            "limits": OwnerLimits.from_dict(data),
        }
        return cls(**known | values)


def new_key() -> str:
    """Generate a random key."""
    return f"mlxq_{secrets.token_hex(4)}_{secrets.token_urlsafe(32)}"


class KeyStore:
    """The keys in one file, which any number of processes may read and write."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_version: tuple[int, int, int] | None = None
        self._keys: dict[str, ApiKey] = {}
        self._unreadable = False

    def ensure(self, key: str, name: str, scopes: Iterable[str]) -> ApiKey:
        """Store a given key unless it is stored already, and revoke all other keys with the same name.

        A revoked key stays revoked.

        Raises:
            ValueError: the key is malformed, or another key has the same id.
        """
        match = _KEY_FORMAT.fullmatch(key)
        if match is None:
            raise ValueError("an API key is mlxq_, 8 hex digits, _ and 43 characters of A-Z a-z 0-9 _ -")
        entry = ApiKey(match[1], name, _hash(key), _valid_scopes(scopes), None, time.time())
        with self._editing() as keys:
            known = keys.setdefault(entry.id, entry)
            if known.hash != entry.hash:
                raise ValueError(f"another API key has the id {entry.id}")
            for other in [*keys.values()]:
                if other.name == name and other.id != known.id and other.revoked_at is None:
                    keys[other.id] = replace(other, revoked_at=entry.created_at)
        if known.revoked_at is not None:
            log.warning("api_key_stays_revoked", extra={"key_id": known.id})
        return known

    def create(
        self,
        name: str,
        scopes: Iterable[str],
        rate_limit: str | None = None,
        *,
        limits: OwnerLimits = STANDARD,
        max_priority: Priority = Priority.NORMAL,
    ) -> str:
        """Create a key and return it. It cannot be read again later: only its hash is stored.

        Raises:
            ValueError: a scope is unknown, a limit is invalid, or the name is in use.
        """
        granted = _valid_scopes(scopes)
        _check_limits(rate_limit, limits)
        key = new_key()
        entry = ApiKey(
            id=key.split("_")[1],
            name=name,
            hash=_hash(key),
            scopes=granted,
            rate_limit=rate_limit,
            created_at=time.time(),
            limits=limits,
            max_priority=max_priority,
        )
        with self._editing() as keys:
            if any(other.name == name and other.revoked_at is None for other in keys.values()):
                raise ValueError(f"the name {name!r} is in use by another API key")
            keys[entry.id] = entry
        return key

    def change(self, id_or_name: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey:
        """Change the limits of a key, from the next request on. Jobs that were accepted before keep their place.

        Raises:
            KeyError: there is no valid key with this id or name.
            ValueError: a limit is invalid.
        """

        def checked(entry: ApiKey) -> ApiKey:
            changed = change(entry)
            _check_limits(changed.rate_limit, changed.limits)
            return changed

        return self._replace_entry(id_or_name, checked)

    def revoke(self, id_or_name: str) -> ApiKey:
        """Revoke a key. It is refused from the next request on.

        Raises:
            KeyError: there is no valid key with this id or name.
        """
        return self._replace_entry(id_or_name, lambda entry: replace(entry, revoked_at=time.time()))

    def _replace_entry(self, id_or_name: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey:
        with self._editing() as keys:
            for entry in keys.values():
                if id_or_name in (entry.id, entry.name) and entry.revoked_at is None:
                    keys[entry.id] = change(entry)
                    return keys[entry.id]
        raise KeyError(id_or_name)

    def list(self) -> list[ApiKey]:
        """Return all keys, including revoked ones, oldest first.

        Raises:
            KeyFileDamaged: the file has no valid content.
        """
        return sorted(_read(self._path).values(), key=lambda entry: entry.created_at)

    def find(self, key: str) -> ApiKey | None:
        """Return the entry of a valid key, otherwise None. Takes the same time for valid and invalid keys."""
        self._refresh()
        match = _KEY_FORMAT.fullmatch(key)
        entry = self._keys.get(match[1]) if match else None
        matches = hmac.compare_digest(entry.hash if entry else _DUMMY_HASH, _hash(key))
        return entry if entry and matches and entry.revoked_at is None else None

    def get(self, key_id: str) -> ApiKey | None:
        """Return the entry of a key by its id; None if there is none or it is revoked."""
        self._refresh()
        entry = self._keys.get(key_id)
        return entry if entry is not None and entry.revoked_at is None else None

    def is_valid(self, key_id: str) -> bool:
        """Whether a key with this id exists and is not revoked."""
        return self.get(key_id) is not None

    def limits_of(self, key_id: str) -> OwnerLimits | None:
        """Return the limits of a valid key; None if there is none with this id."""
        entry = self.get(key_id)
        return None if entry is None else entry.limits

    def entries(self) -> Mapping[str, ApiKey]:
        """Return all keys by id, including revoked ones. If the file cannot be read, those read before."""
        self._refresh()
        return self._keys

    def _refresh(self) -> None:
        """Read the file if it has changed. If it cannot be read, the keys read before stay valid."""
        try:
            stat = self._path.stat()
            version = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if version == self._file_version:
                return
            self._keys = _read(self._path)
            # Only now: if reading fails, the next request must try again.
            self._file_version, self._unreadable = version, False
        except FileNotFoundError:
            self._file_version, self._keys = None, {}
        except (OSError, KeyFileDamaged) as error:
            if not self._unreadable:
                log.error("api_keys_unreadable", extra={"path": str(self._path), "reason": str(error)})
            self._unreadable = True

    @contextmanager
    def _editing(self) -> Iterator[dict[str, ApiKey]]:
        """Yield the stored keys by id, under a lock; write the changes that the block makes atomically."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _open_private(self._path.with_suffix(".lock")) as lock:
            _acquire(lock)
            # Read the file, not the cache: if it is unreadable, this must fail rather than overwrite it.
            keys = _read(self._path)
            before = dict(keys)
            yield keys
            if keys != before:
                self._replace(keys)

    def _replace(self, keys: dict[str, ApiKey]) -> None:
        new_file = self._path.with_suffix(".new")
        with _open_private(new_file) as file:
            file.truncate()
            json.dump({"keys": [entry.to_dict() for entry in keys.values()]}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new_file.replace(self._path)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _check_limits(rate_limit: str | None, limits: OwnerLimits) -> None:
    """Raise ValueError if a limit is invalid."""
    limits.check()
    if rate_limit is not None:
        try:
            parse_many(rate_limit)
        except ValueError:
            raise ValueError(f"rate_limit must be a rate such as 100/minute, not {rate_limit!r}") from None


def _valid_scopes(scopes: Iterable[str]) -> frozenset[str]:
    granted = frozenset(scopes)
    if not granted or not granted <= SCOPES:
        raise ValueError(f"an API key needs one or more of the scopes {', '.join(sorted(SCOPES))}")
    return granted


def _read(path: Path) -> dict[str, ApiKey]:
    """Read the keys; none if the file does not exist."""
    try:
        entries = map(ApiKey.from_dict, json.loads(path.read_text())["keys"])
        return {entry.id: entry for entry in entries}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise KeyFileDamaged(
            f"{path} is damaged: restore it from a backup, or delete it and create the API keys again"
        ) from None


def _acquire(file: Any) -> None:
    """Lock a file against other processes.

    Raises:
        TimeoutError: another process held the lock for `LOCK_TIMEOUT_S`.
    """
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                held = f"another process has held the lock of the API keys file for {LOCK_TIMEOUT_S:.0f} s"
                raise TimeoutError(held) from None
            time.sleep(0.02)
        else:
            return


def _open_private(path: Path) -> Any:
    """Open a file for writing that only its owner may read, from its creation on."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "w")
