"""Operations: loads, unloads and downloads of models by running workers, with progress and result."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Final, Self

from shared.models.registry import HostInfo
from shared.redis import keys
from shared.redis.client import Redis, script
from shared.wire import enum_member, known_fields

LIFETIME_S: Final = 24 * 3600
"""How long operations are kept."""
SILENT_S: Final = 15.0
"""An operation fails if its live worker has not listed it for this long after the last update."""
GONE_S: Final = 5.0
"""An operation fails if its worker process has not been seen for this long after the last update."""


FAILURE_S: Final = 600
"""How long a model that does not load is not tried again, unless its folder changes or a new worker process starts."""


class OperationState(StrEnum):
    """The state of an operation. A state that only newer processes know is read as `loading`."""

    PENDING = "pending"
    """The command was sent to the worker."""
    WAITING = "waiting"
    """The worker has queued the operation."""
    DRAINING = "draining"
    """The worker waits for the jobs of a model that must be unloaded."""
    LOADING = "loading"
    DOWNLOADING = "downloading"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether the state is final."""
        return self in (OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELLED)


@dataclass(frozen=True, slots=True)
class Operation:
    """One load, unload or download. Times are seconds since the epoch, by Redis's clock.

    Attributes:
        kind: `load`, `unload` or `download`.
        node: Celery node name of the worker process.
        progress: share of the weights that is loaded, or of the files that is downloaded, from 0 to 1.
        error_code, error_message: why it failed.
        unloaded: models that were unloaded to free memory for it.
        memory_before, memory_after: bytes in use by MLX.
        source: of a download: the repository on the hub, and the revision after an `@` if one was requested.
        bytes_done, bytes_total: of a download.
    """

    id: str
    kind: str
    model: str
    node: str
    state: OperationState
    created_at: float
    updated_at: float
    progress: float = 0.0
    error_code: str | None = None
    error_message: str | None = None
    unloaded: tuple[str, ...] = ()
    memory_before: int | None = None
    memory_after: int | None = None
    source: str | None = None
    bytes_done: int | None = None
    bytes_total: int | None = None

    @classmethod
    def from_record(cls, record: dict[str, str]) -> Self:
        """Parse a record."""
        data: dict[str, Any] = known_fields(cls, record)
        for name in ("created_at", "updated_at", "progress"):
            data[name] = float(data[name])
        for name in ("memory_before", "memory_after", "bytes_done", "bytes_total"):
            data[name] = int(data[name]) if data.get(name) else None
        for name in ("error_code", "error_message", "source"):
            data[name] = data.get(name) or None
        data["unloaded"] = tuple(data["unloaded"].split())
        data["state"] = enum_member(OperationState, data["state"], OperationState.LOADING)
        return cls(**data)

    def to_record(self) -> dict[str, str]:
        """Encode as a record without the times, which `operation.lua` adds."""
        fields = asdict(self) | {"unloaded": " ".join(self.unloaded)}
        del fields["created_at"], fields["updated_at"]
        return {name: "" if value is None else str(value) for name, value in fields.items()}


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A model that does not load.

    Attributes:
        operation: id of the operation that failed.
        folder: identifies the state of the model's files.
        processes: the worker processes that were running then.
    """

    operation: str
    message: str
    folder: str
    processes: list[str]


class Operations:
    """The operations in Redis. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._write = script(client, "operation")

    def begin(self, kind: str, model: str, node: str, source: str | None = None) -> Operation:
        """Create an operation before the command is sent to its worker."""
        operation_id = f"op_{secrets.token_hex(12)}"
        return self.put(Operation(operation_id, kind, model, node, OperationState.PENDING, 0.0, 0.0, source=source))

    def put(self, operation: Operation) -> Operation:
        """Store an operation and return it with its times."""
        fields = [value for item in operation.to_record().items() for value in item]
        created_at, updated_at = self._write(args=[operation.id, LIFETIME_S, *fields])
        return replace(operation, created_at=float(created_at), updated_at=float(updated_at))

    def read(self, operation_id: str) -> Operation | None:
        """Return an operation as its worker last stored it; None if it does not exist."""
        return self._read([operation_id])[1][0]

    def get(self, operation_id: str, hosts: Collection[HostInfo]) -> Operation | None:
        """Return an operation; None if it does not exist. It is shown as failed if its worker has lost it.

        Args:
            hosts: the live worker processes.
        """
        now, (operation,) = self._read([operation_id])
        return None if operation is None else _fail_if_lost(operation, now, hosts)

    def recent(self, hosts: Collection[HostInfo], limit: int = 50) -> list[Operation]:
        """Return the last operations, newest first."""
        ids = self._client.zrange(keys.OPERATIONS, "+inf", "-inf", byscore=True, desc=True, offset=0, num=limit)
        now, operations = self._read(ids)
        return [_fail_if_lost(operation, now, hosts) for operation in operations if operation is not None]

    def _read(self, ids: Sequence[str]) -> tuple[float, list[Operation | None]]:
        """Return the time by Redis's clock, and the operations with these ids."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            for operation_id in ids:
                pipe.hgetall(keys.OPERATION + operation_id)
            (seconds, microseconds), *records = pipe.execute()
        operations = [Operation.from_record(record) if record else None for record in records]
        return seconds + microseconds / 1e6, operations

    def claim_demand(self, model: str, seconds: int) -> bool:
        """Whether the caller may start loading a model for queued jobs: one caller per model in this many seconds."""
        return bool(self._client.set(keys.DEMAND + model, "", nx=True, ex=seconds))

    def store_demand(self, operation: Operation) -> None:
        """Store the operation that loads a model for queued jobs."""
        self._client.set(keys.DEMAND + operation.model, operation.id, xx=True, keepttl=True)

    def demanded(self, model: str) -> Operation | None:
        """Return the last operation that loads a model for queued jobs; None if there was none recently."""
        operation_id = self._client.get(keys.DEMAND + model)
        return self.read(operation_id) if operation_id else None

    def store_load_failure(self, model: str, failure: LoadFailure) -> None:
        """Remember for `FAILURE_S` that a model does not load."""
        self._client.set(keys.LOAD_FAILURE + model, json.dumps(asdict(failure)), ex=FAILURE_S)

    def load_failure(self, model: str) -> LoadFailure | None:
        """Return why a model did not load; None if no failure is known."""
        text = self._client.get(keys.LOAD_FAILURE + model)
        return LoadFailure(**known_fields(LoadFailure, json.loads(text))) if text else None


def _fail_if_lost(operation: Operation, now: float, hosts: Collection[HostInfo]) -> Operation:
    """Return the operation, as failed if no live worker process lists it any more."""
    if operation.state.terminal or any(operation.id in host.operations for host in hosts):
        return operation
    silent_s = now - operation.updated_at
    if silent_s > GONE_S and all(host.node != operation.node for host in hosts):
        return _failed(
            operation, "worker_lost", "The worker process ended before the operation did. Start the operation again."
        )
    if silent_s > SILENT_S and operation.state is OperationState.PENDING:
        return _failed(
            operation, "worker_silent", "The worker did not respond to the command. Start the operation again."
        )
    if silent_s > SILENT_S:
        return _failed(operation, "worker_lost", "The worker process was restarted. Start the operation again.")
    return operation


def _failed(operation: Operation, code: str, message: str) -> Operation:
    return replace(operation, state=OperationState.FAILED, error_code=code, error_message=message)
