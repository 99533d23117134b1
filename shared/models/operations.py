"""Switching models on running workers, as operations to look at: what was asked, how far it is, how it ended."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Final, Self

from shared.models.registry import HostInfo
from shared.queue import keys
from shared.queue.redis import Redis
from shared.wire import known

LIFETIME_S: Final = 24 * 3600
SILENT_S: Final = 15.0
"""A worker that lives and has not said for so long that it has an operation does not know of it."""
GONE_S: Final = 5.0
"""The same of a worker that is not there."""


class OperationState(StrEnum):
    """How far an operation is."""

    PENDING = "pending"
    """The worker was asked."""
    WAITING = "waiting"
    """The worker has it in line."""
    DRAINING = "draining"
    """What runs on a model that has to go is given time to end."""
    LOADING = "loading"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def terminal(self) -> bool:
        """Whether nothing follows."""
        return self in (OperationState.SUCCEEDED, OperationState.FAILED)


@dataclass(frozen=True, slots=True)
class Operation:
    """One of them. Times are seconds since the epoch.

    Attributes:
        kind: `load` or `unload`.
        node: Celery's name for the worker process.
        progress: of the loading, from 0 to 1.
        error_code, error_message: why it failed.
        unloaded: models that had to make place.
        memory_before, memory_after: bytes that the model library held in use.
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

    @classmethod
    def from_record(cls, record: dict[str, str]) -> Self:
        """Read what `Operations` wrote."""
        data: dict[str, Any] = known(cls, record)
        for name in ("created_at", "updated_at", "progress"):
            data[name] = float(data[name])
        for name in ("memory_before", "memory_after"):
            data[name] = int(data[name]) if data.get(name) else None
        for name in ("error_code", "error_message"):
            data[name] = data.get(name) or None
        data["unloaded"] = tuple(data["unloaded"].split())
        data["state"] = OperationState(data["state"])
        return cls(**data)

    def to_record(self) -> dict[str, str]:
        """As Redis holds it."""
        fields = asdict(self) | {"unloaded": " ".join(self.unloaded)}
        return {name: "" if value is None else str(value) for name, value in fields.items()}


class Operations:
    """The operations in Redis. Methods raise `redis.RedisError` when Redis is away."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    def begin(self, kind: str, model: str, node: str) -> Operation:
        """A new one, which its worker is about to be asked for."""
        now = time.time()
        new = Operation(f"op_{secrets.token_hex(12)}", kind, model, node, OperationState.PENDING, now, now)
        operation = self.put(new)
        self._client.zadd(keys.OPERATIONS, {operation.id: now})
        self._client.zremrangebyscore(keys.OPERATIONS, "-inf", now - LIFETIME_S)
        return operation

    def put(self, operation: Operation) -> Operation:
        """Write how it is now."""
        operation = replace(operation, updated_at=time.time())
        name = keys.OPERATION + operation.id
        with self._client.pipeline() as pipe:
            pipe.hset(name, mapping=operation.to_record())
            pipe.expire(name, LIFETIME_S)
            pipe.execute()
        return operation

    def read(self, name: str) -> Operation | None:
        """One, as its worker last told; None when there is none."""
        record = self._client.hgetall(keys.OPERATION + name)
        return Operation.from_record(record) if record else None

    def get(self, name: str, hosts: Collection[HostInfo]) -> Operation | None:
        """One; None when there is none. What no worker has in hand any more has failed.

        Args:
            hosts: the workers that live.
        """
        operation = self.read(name)
        if operation is None or operation.state.terminal or any(name in host.operations for host in hosts):
            return operation
        silent_s = time.time() - operation.updated_at
        if silent_s > GONE_S and all(host.node != operation.node for host in hosts):
            return _failed(operation, "worker_lost", "The worker is gone.")
        if silent_s > SILENT_S and operation.state is OperationState.PENDING:
            return _failed(operation, "worker_silent", "The worker was asked and did not answer.")
        if silent_s > SILENT_S:
            return _failed(operation, "worker_lost", "The worker has been started anew.")
        return operation

    def recent(self, hosts: Collection[HostInfo], most: int = 50) -> list[Operation]:
        """The newest first."""
        names = self._client.zrange(keys.OPERATIONS, "+inf", "-inf", byscore=True, desc=True, offset=0, num=most)
        found = (self.get(name, hosts) for name in names)
        return [operation for operation in found if operation is not None]

    def may_demand(self, model: str, seconds: int) -> bool:
        """Whether this call is the one that has a model loaded for waiting jobs; once in so many seconds."""
        return bool(self._client.set(keys.DEMAND + model, "", nx=True, ex=seconds))

    def demanded(self, operation: Operation) -> None:
        """Note which operation that is."""
        self._client.set(keys.DEMAND + operation.model, operation.id, xx=True, keepttl=True)

    def on_demand(self, model: str) -> Operation | None:
        """The newest operation that loads, or has tried to load, a model for waiting jobs; it is soon forgotten."""
        name = self._client.get(keys.DEMAND + model)
        return self.read(name) if name else None


def _failed(operation: Operation, code: str, message: str) -> Operation:
    return replace(operation, state=OperationState.FAILED, error_code=code, error_message=message)
