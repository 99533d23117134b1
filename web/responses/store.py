"""Where stored responses are: on disk or in Redis.

A response has two parts, which never change: its request, written before its job is accepted, and its answer, written
after the job has ended (`web.background.response_keeper`). Until then, the job's log has the answer.

    RESPONSES_DIR/<key id>/<response id>.request.json
    RESPONSES_DIR/<key id>/<response id>.answer.json

The modification time of the first file is the time of the last use. In Redis, see `shared.redis.keys`.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from shared.errors import Unavailable
from shared.redis import keys
from shared.redis.client import Redis
from web.files.store import ABANDONED_S, is_disk_full, sync_folder
from web.http.threadpool import LARGE, run_in_threadpool

log = logging.getLogger(__name__)

_REQUEST, _ANSWER = ".request.json", ".answer.json"
_RETRY_S: Final = 30


class Stored(NamedTuple):
    """The parts of a response as JSON. The answer is None until it has been written."""

    request: str
    answer: str | None


class Entry(NamedTuple):
    """A stored response: its size, and the time of its last use in seconds since the epoch."""

    id: str
    bytes: int
    used_at: float


class ResponseStore(Protocol):
    """Stores the responses of all API keys. Ids have been validated."""

    def put(self, owner: str, response_id: str, request: str) -> None:
        """Store a request. When this returns, it is durable. Raises `Unavailable` if the disk is full."""
        ...

    def put_answer(self, owner: str, response_id: str, answer: str) -> None:
        """Store the answer to a stored request. Raises as `put`."""
        ...

    def get(self, owner: str, response_id: str) -> Stored | None:
        """Return a response; None if it does not exist or has expired."""
        ...

    def touch(self, owner: str, response_ids: Sequence[str]) -> None:
        """Begin the lifetime of responses anew."""
        ...

    def delete(self, owner: str, response_id: str) -> None:
        """Delete a response, if it exists."""
        ...

    def owners(self) -> Iterator[str]:
        """Yield the ids of all API keys that have responses."""
        ...

    def entries(self, owner: str) -> list[Entry]:
        """Return all responses of an API key, also expired ones that are still stored."""
        ...


class DiskResponses:
    """Responses in files.

    Args:
        lifetime_s: how long a response is kept after its last use.
    """

    def __init__(self, root: Path, lifetime_s: float) -> None:
        self._root = root
        self._lifetime_s = lifetime_s

    def put(self, owner: str, response_id: str, request: str) -> None:
        """See `ResponseStore.put`."""
        self._write(self._path(owner, response_id, _REQUEST), request)

    def put_answer(self, owner: str, response_id: str, answer: str) -> None:
        """See `ResponseStore.put_answer`."""
        self._write(self._path(owner, response_id, _ANSWER), answer)

    def get(self, owner: str, response_id: str) -> Stored | None:
        """See `ResponseStore.get`."""
        path = self._path(owner, response_id, _REQUEST)
        with suppress(FileNotFoundError):
            if path.stat().st_mtime + self._lifetime_s > time.time():
                return Stored(path.read_text("utf-8"), _text(self._path(owner, response_id, _ANSWER)))
        return None

    def touch(self, owner: str, response_ids: Sequence[str]) -> None:
        """See `ResponseStore.touch`."""
        for response_id in response_ids:
            with suppress(FileNotFoundError):
                os.utime(self._path(owner, response_id, _REQUEST))

    def delete(self, owner: str, response_id: str) -> None:
        """See `ResponseStore.delete`."""
        for part in (_REQUEST, _ANSWER):
            self._path(owner, response_id, part).unlink(missing_ok=True)

    def owners(self) -> Iterator[str]:
        """See `ResponseStore.owners`."""
        with suppress(FileNotFoundError):
            yield from [folder.name for folder in self._root.iterdir() if folder.is_dir()]

    def entries(self, owner: str) -> list[Entry]:
        """See `ResponseStore.entries`. Also deletes what killed processes left behind."""
        sizes, used = dict[str, int](), dict[str, float]()
        for path in (self._root / owner).iterdir():
            response_id, _, part = path.name.partition(".")
            with suppress(FileNotFoundError):
                stat = path.stat()
                if path.suffix == ".part" and time.time() - stat.st_mtime > ABANDONED_S:
                    path.unlink()
                elif path.suffix != ".part":
                    sizes[response_id] = sizes.get(response_id, 0) + stat.st_size
                    used[response_id] = stat.st_mtime if f".{part}" == _REQUEST else used.get(response_id, 0.0)
        return [Entry(response_id, size, used[response_id]) for response_id, size in sizes.items()]

    def _path(self, owner: str, response_id: str, part: str) -> Path:
        return self._root / owner / f"{response_id}{part}"

    def _write(self, path: Path, text: str) -> None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            run_in_threadpool(LARGE, lambda: _write_durably(path, text))
        except OSError as error:
            if not is_disk_full(error):
                raise
            log.error("responses_disk_full", extra={"path": str(self._root)})
            detail = "The disk of RESPONSES_DIR is full. Try again later, or with store: false."
            raise Unavailable(detail, code="disk_full", retry_after=_RETRY_S) from error


def _write_durably(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{secrets.token_hex(6)}.part")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None


class RedisResponses:
    """Responses in Redis. Methods raise `redis.RedisError` if Redis is unreachable.

    Args:
        lifetime_s: how long a response is kept after its last use.
    """

    def __init__(self, client: Redis, lifetime_s: int) -> None:
        self._client = client
        self._lifetime_s = lifetime_s

    def put(self, owner: str, response_id: str, request: str) -> None:
        """See `ResponseStore.put`. The proof that the job is on disk covers everything written before it."""
        self._put(owner, response_id, "request", request)

    def put_answer(self, owner: str, response_id: str, answer: str) -> None:
        """See `ResponseStore.put_answer`."""
        self._put(owner, response_id, "answer", answer)
        if not self._client.hexists(_key(owner, response_id), "request"):  # it has been deleted since it was read
            self.delete(owner, response_id)

    def get(self, owner: str, response_id: str) -> Stored | None:
        """See `ResponseStore.get`."""
        request, answer = self._client.hmget(_key(owner, response_id), "request", "answer")
        return None if request is None else Stored(request, answer)

    def touch(self, owner: str, response_ids: Sequence[str]) -> None:
        """See `ResponseStore.touch`."""
        now = time.time()
        with self._client.pipeline(transaction=False) as pipe:
            for response_id in response_ids:
                pipe.expire(_key(owner, response_id), self._lifetime_s)
                pipe.zadd(keys.RESPONSES + owner, {response_id: now}, xx=True)
            pipe.expire(keys.RESPONSES + owner, self._lifetime_s)
            pipe.execute()

    def delete(self, owner: str, response_id: str) -> None:
        """See `ResponseStore.delete`."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.unlink(_key(owner, response_id))
            pipe.zrem(keys.RESPONSES + owner, response_id)
            pipe.execute()

    def owners(self) -> Iterator[str]:
        """See `ResponseStore.owners`."""
        for key in self._client.scan_iter(match=f"{keys.RESPONSES}*", count=1000):
            yield key.removeprefix(keys.RESPONSES)

    def entries(self, owner: str) -> list[Entry]:
        """See `ResponseStore.entries`."""
        used = self._client.zrange(keys.RESPONSES + owner, 0, -1, withscores=True)
        with self._client.pipeline(transaction=False) as pipe:
            for response_id, _ in used:
                pipe.hstrlen(_key(owner, response_id), "request")
                pipe.hstrlen(_key(owner, response_id), "answer")
            sizes = pipe.execute() if used else []
        pairs = zip(used, sizes[::2], sizes[1::2], strict=True)
        return [Entry(response_id, first + second, at) for (response_id, at), first, second in pairs]

    def _put(self, owner: str, response_id: str, part: str, text: str) -> None:
        with self._client.pipeline(transaction=False) as pipe:
            pipe.zadd(keys.RESPONSES + owner, {response_id: time.time()})
            pipe.expire(keys.RESPONSES + owner, self._lifetime_s)
            pipe.hset(_key(owner, response_id), part, text)
            pipe.expire(_key(owner, response_id), self._lifetime_s)
            pipe.execute()


def _key(owner: str, response_id: str) -> str:
    return f"{keys.RESPONSE}{owner}:{response_id}"
