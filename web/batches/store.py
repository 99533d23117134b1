"""The records of batches in Redis. The requests and results are files (`web.files`, `web.batches.results`)."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self

from shared.errors import Conflict, NotFound, RateLimited
from shared.redis import keys
from shared.redis.client import Redis, script
from shared.redis.durability import ProvenScript
from shared.wire import enum_member, pairs_to_dict

MAX_UNFINISHED: Final = 100
"""Maximum unfinished batches of an API key."""
MAX_KEPT: Final = 1000
"""Maximum batches of an API key, unfinished ones included. The oldest that have ended are deleted first."""
_RETRY_S: Final = 60


class BatchStatus(StrEnum):
    """A batch's state, as in OpenAI's API."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether the state is final."""
        return self in (BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED)


@dataclass(frozen=True, slots=True)
class BatchError:
    """Why a batch failed or is paused. `line` is the line of its input file, from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """The lines of a batch, and the tokens of those that succeeded."""

    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch's record. Times are seconds since the epoch.

    Attributes:
        owner: id of the API key.
        max_queued: the key's maximum of waiting jobs per model; None for the default.
        window_ends_at: when lines that have not ended expire.
        times: when each status was reached, by status.
        output_id, error_id: ids of the result files, which exist once the batch has ended.
        end_as: the status in which finalizing ends.
        output_lifetime_s: requested lifetime of the result files; None for the default.
        traceparent: W3C trace context of the request that created it; empty if it is not traced.
    """

    id: str
    owner: str
    status: BatchStatus
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    window_ends_at: float
    metadata: dict[str, str]
    max_queued: int | None = None
    request_id: str = ""
    model: str | None = None
    counts: Counts = Counts()
    errors: tuple[BatchError, ...] = ()
    times: Mapping[str, float] | None = None
    output_id: str | None = None
    error_id: str | None = None
    end_as: str = BatchStatus.COMPLETED
    output_lifetime_s: float | None = None
    traceparent: str = ""

    @classmethod
    def from_record(cls, record: Mapping[str, str]) -> Self:
        """Parse a record."""
        times = {name.removeprefix("at:"): float(value) for name, value in record.items() if name.startswith("at:")}
        return cls(
            id=record["id"],
            owner=record["owner"],
            status=enum_member(BatchStatus, record["status"], BatchStatus.IN_PROGRESS),
            endpoint=record["endpoint"],
            input_file_id=record["input_file_id"],
            completion_window=record["completion_window"],
            created_at=float(record["created_at"]),
            window_ends_at=float(record["window_ends_at"]),
            metadata=json.loads(record["metadata"]),
            max_queued=int(record["max_queued"]) if record.get("max_queued") else None,
            request_id=record.get("request_id", ""),
            model=record.get("model") or None,
            counts=Counts(**json.loads(record.get("counts", "{}"))),
            errors=tuple(BatchError(**error) for error in json.loads(record.get("errors", "[]"))),
            times=times,
            output_id=record.get("output_id") or None,
            error_id=record.get("error_id") or None,
            end_as=record.get("end_as") or BatchStatus.COMPLETED,
            output_lifetime_s=float(record["output_lifetime_s"]) if record.get("output_lifetime_s") else None,
            traceparent=record.get("traceparent", ""),
        )


class NotLeader(Exception):
    """Another process leads now. What this process wanted to write is not written."""


def new_batch_id() -> str:
    """Return `batch_` and 28 hexadecimal digits; ids sort by creation time."""
    return f"batch_{time.time_ns():016x}{secrets.token_hex(6)}"


class Batches:
    """The batches in Redis. Methods raise `redis.RedisError` if Redis is unreachable.

    Args:
        durable: whether a batch is accepted only when Redis confirms that it is on disk.
        retention_s: how long the record of an ended batch is kept.
    """

    def __init__(self, client: Redis, *, durable: bool, retention_s: int) -> None:
        self._client = client
        self._create = ProvenScript(client, "create_batch") if durable else script(client, "create_batch")
        self._change = script(client, "change_batch")
        self._retention_s = retention_s

    def create(
        self,
        batch_id: str,
        owner: str,
        *,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        window_s: float,
        metadata: Mapping[str, str],
        max_queued: int | None = None,
        request_id: str = "",
        output_lifetime_s: float | None = None,
        traceparent: str = "",
    ) -> Batch:
        """Create a batch. When this returns, it is durable.

        Raises:
            RateLimited: the API key has too many unfinished batches.
            NotDurable: Redis did not confirm that the batch is on disk.
        """
        now = time.time()
        fields = {
            "id": batch_id,
            "owner": owner,
            "status": BatchStatus.VALIDATING.value,
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "completion_window": completion_window,
            "created_at": repr(now),
            "window_ends_at": repr(now + window_s),
            "metadata": json.dumps(dict(metadata)),
            "max_queued": "" if max_queued is None else str(max_queued),
            "request_id": request_id,
            "output_lifetime_s": "" if output_lifetime_s is None else repr(output_lifetime_s),
            "traceparent": traceparent,
        }
        request = {"id": batch_id, "owner": owner, "max_unfinished": MAX_UNFINISHED, "max_kept": MAX_KEPT}
        flat = [part for item in fields.items() for part in item]
        if self._create(args=[json.dumps(request), *flat]) == "full":
            detail = f"This API key has {MAX_UNFINISHED} unfinished batches, which is the maximum."
            raise RateLimited(detail, code="too_many_batches", retry_after=_RETRY_S)
        return Batch.from_record(fields)

    def get(self, batch_id: str, owner: str) -> Batch:
        """Return an API key's batch.

        Raises:
            NotFound: the batch does not exist or belongs to another key.
        """
        batch = self.find(batch_id)
        if batch is None or batch.owner != owner:
            raise NotFound("There is no such batch.", code="batch_not_found")
        return batch

    def find(self, batch_id: str) -> Batch | None:
        """Return a batch of any API key; None if it does not exist."""
        record = self._client.hgetall(keys.BATCH + batch_id)
        return Batch.from_record(record) if record else None

    def ids(self, owner: str) -> list[str]:
        """Return the ids of an API key's batches, newest first."""
        return [*self._client.zrange(keys.BATCHES + owner, 0, -1)][::-1]

    def read(self, batch_ids: Sequence[str]) -> list[Batch]:
        """Return those of the batches that exist."""
        with self._client.pipeline(transaction=False) as pipe:
            for batch_id in batch_ids:
                pipe.hgetall(keys.BATCH + batch_id)
            return [Batch.from_record(record) for record in pipe.execute() if record]

    def unfinished(self) -> list[str]:
        """Return the ids of all unfinished batches, oldest first."""
        return [*self._client.zrange(keys.UNFINISHED_BATCHES, 0, -1)]

    def remove(self, batch_id: str, owner: str) -> None:
        """Delete the record of a batch that has ended."""
        with self._client.pipeline() as pipe:
            pipe.unlink(keys.BATCH + batch_id)
            pipe.zrem(keys.BATCHES + owner, batch_id)
            pipe.execute()

    def cancel(self, batch_id: str, owner: str) -> Batch:
        """Begin to cancel a batch. The leader ends it.

        Raises:
            NotFound: the batch does not exist or belongs to another key.
            Conflict: it has ended, or its result files are being written.
        """
        batch = self.get(batch_id, owner)
        cancellable = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)
        changed = self._changed(batch_id, BatchStatus.CANCELLING, cancellable, "", {})
        if changed is not None:
            return changed
        batch = self.get(batch_id, owner)
        if batch.status is not BatchStatus.CANCELLING:
            raise Conflict(f"The batch can no longer be cancelled: its status is {batch.status}.", code="batch_ended")
        return batch

    def change(
        self,
        batch_id: str,
        status: BatchStatus,
        allowed: Collection[BatchStatus],
        leader: str,
        fields: Mapping[str, str] | None = None,
    ) -> Batch | None:
        """Change the record, and the status if it has one of the `allowed` values; None if it has another value.

        Raises:
            NotLeader: `leader` is not the leader's token.
        """
        return self._changed(batch_id, status, allowed, leader, fields or {})

    def _changed(
        self,
        batch_id: str,
        status: BatchStatus,
        allowed: Collection[BatchStatus],
        leader: str,
        fields: Mapping[str, str],
    ) -> Batch | None:
        request: dict[str, Any] = {
            "id": batch_id,
            "status": status.value,
            "allowed": [each.value for each in allowed],
            "terminal": status.terminal,
            "retention_s": self._retention_s,
            "leader": leader,
        }
        result, *flat = self._change(args=[json.dumps(request), *(part for item in fields.items() for part in item)])
        if result == "not leader":
            raise NotLeader
        return Batch.from_record(pairs_to_dict(flat)) if result == "changed" else None
