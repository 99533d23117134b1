"""Operations as they are read: how far they are, and that none seems to go on for ever."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from shared.operations import SILENT_S, Operation, Operations, OperationState
from shared.store import Redis

NODE = "mlxq-0@here"
ALIVE = frozenset({NODE})


@pytest.fixture
def operations(client: Redis) -> Operations:
    return Operations(client)


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.time() + seconds
    monkeypatch.setattr("shared.operations.time.time", lambda: now)


def read(operations: Operations, operation: Operation, alive: frozenset[str] = ALIVE) -> Operation:
    found = operations.get(operation.id, alive)
    assert found is not None
    return found


def test_it_is_read_as_it_was_written(operations: Operations) -> None:
    begun = operations.begin("load", "one", NODE)
    assert read(operations, begun).state is OperationState.PENDING
    told = replace(
        begun, state=OperationState.FAILED, progress=0.5, error_code="load_failed", error_message="It is broken.",
        unloaded=("two", "three"), memory_before=10, memory_after=None,
    )  # fmt: skip
    written = operations.put(told)
    assert read(operations, begun) == operations.read(begun.id) == written
    assert replace(written, updated_at=told.updated_at) == told
    assert operations.get("op_none", ALIVE) is None


def test_the_newest_comes_first(operations: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    first = operations.begin("load", "one", NODE)
    later(monkeypatch, 1)
    second = operations.begin("unload", "one", NODE)
    assert [each.id for each in operations.recent(ALIVE)] == [second.id, first.id]


def test_a_worker_that_does_not_answer_has_not_heard_of_it(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = operations.begin("load", "one", NODE)
    waiting = operations.begin("load", "two", NODE)
    operations.put(replace(waiting, state=OperationState.WAITING))
    later(monkeypatch, SILENT_S + 1)
    assert (read(operations, begun).state, read(operations, begun).error_code) == ("failed", "worker_silent")
    assert read(operations, waiting).state is OperationState.WAITING, "it is in line behind another"


@pytest.mark.parametrize("state", ["pending", "waiting", "draining", "loading"])
def test_what_a_dead_worker_was_doing_has_failed(
    operations: Operations, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    begun = operations.put(replace(operations.begin("load", "one", NODE), state=OperationState(state)))
    assert read(operations, begun, frozenset()).state == state, "a heartbeat may be late"
    later(monkeypatch, SILENT_S)
    assert read(operations, begun, frozenset()).error_code == "worker_lost"
    done = operations.put(replace(begun, state=OperationState.SUCCEEDED))
    assert read(operations, done, frozenset()).state is OperationState.SUCCEEDED


def test_only_one_asks_for_what_jobs_wait_for(operations: Operations) -> None:
    assert [operations.may_demand("one", 30) for _ in range(3)] == [True, False, False]
    assert operations.may_demand("two", 30)
