"""Operations: loading and unloading models on running workers, with their progress and result."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Final, Self

from shared.models.registry import HostInfo
from shared.queue import keys
from shared.queue.redis import Redis, script
from shared.wire import known, member

LIFETIME_S: Final = 24 * 3600
SILENT_S: Final = 15.0
"""A live worker that has not announced an operation for so long does not know of it."""
GONE_S: Final = 5.0
"""The same for a worker that is not there."""


class OperationState(StrEnum):
    """The state of an operation. A state that only newer versions know is read as `loading`."""

    PENDING = "pending"
    """The worker was asked."""
    WAITING = "waiting"
    """The worker has queued it."""
    DRAINING = "draining"
    """Jobs of a model that must be unloaded get time to end."""
    LOADING = "loading"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def terminal(self) -> bool:
        """Whether nothing follows."""
        return self in (OperationState.SUCCEEDED, OperationState.FAILED)


@dataclass(frozen=True, slots=True)
class Operation:
    """One of them. Times are seconds since the epoch, by Redis's clock.

    Attributes:
        kind: `load` or `unload`.
        node: Celery's name for the worker process.
        progress: of the loading, from 0 to 1.
        error_code, error_message: why it failed.
        unloaded: models that were unloaded for it.
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
        data["state"] = member(OperationState, data["state"], OperationState.LOADING)
        return cls(**data)

    def to_record(self) -> dict[str, str]:
        """As Redis holds it, without the moments: Redis's clock gives those."""
        fields = asdict(self) | {"unloaded": " ".join(self.unloaded)}
        del fields["created_at"], fields["updated_at"]
        return {name: "" if value is None else str(value) for name, value in fields.items()}


class Operations:
    """The operations in Redis. Methods raise `redis.RedisError` when Redis is away."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._write = script(client, "operation")

    def begin(self, kind: str, model: str, node: str) -> Operation:
        """A new one, which its worker is about to be asked for."""
        name = f"op_{secrets.token_hex(12)}"
        return self.put(Operation(name, kind, model, node, OperationState.PENDING, 0.0, 0.0))

    def put(self, operation: Operation) -> Operation:
        """Write how it is now."""
        fields = [part for pair in operation.to_record().items() for part in pair]
        created_at, updated_at = self._write(args=[operation.id, LIFETIME_S, *fields])
        return replace(operation, created_at=float(created_at), updated_at=float(updated_at))

    def read(self, name: str) -> Operation | None:
        """An operation, as its worker last published it; None when there is none."""
        return self._read([name])[1][0]

    def get(self, name: str, hosts: Collection[HostInfo]) -> Operation | None:
        """One; None when there is none. What no worker has in hand any more has failed.

        Args:
            hosts: the workers that live.
        """
        now, (operation,) = self._read([name])
        return None if operation is None else _as_it_is(operation, now, hosts)

    def recent(self, hosts: Collection[HostInfo], most: int = 50) -> list[Operation]:
        """The newest first."""
        names = self._client.zrange(keys.OPERATIONS, "+inf", "-inf", byscore=True, desc=True, offset=0, num=most)
        now, found = self._read(names)
        return [_as_it_is(operation, now, hosts) for operation in found if operation is not None]

    def _read(self, names: Sequence[str]) -> tuple[float, list[Operation | None]]:
        """The moment by Redis's clock, and the operations of these names."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            for name in names:
                pipe.hgetall(keys.OPERATION + name)
            (seconds, microseconds), *records = pipe.execute()
        found = [Operation.from_record(record) if record else None for record in records]
        return seconds + microseconds / 1e6, found

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


def _as_it_is(operation: Operation, now: float, hosts: Collection[HostInfo]) -> Operation:
    """The operation; failed when no worker has it in hand any more."""
    if operation.state.terminal or any(operation.id in host.operations for host in hosts):
        return operation
    silent_s = now - operation.updated_at
    if silent_s > GONE_S and all(host.node != operation.node for host in hosts):
        return _failed(operation, "worker_lost", "The worker is gone.")
    if silent_s > SILENT_S and operation.state is OperationState.PENDING:
        return _failed(operation, "worker_silent", "The worker was asked and did not answer.")
    if silent_s > SILENT_S:
        return _failed(operation, "worker_lost", "The worker has been started anew.")
    return operation


def _failed(operation: Operation, code: str, message: str) -> Operation:
    return replace(operation, state=OperationState.FAILED, error_code=code, error_message=message)
