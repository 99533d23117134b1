"""Operations in Redis: stored by their worker, and failed when no worker process lists them any more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from shared.models.operations import GONE_S, SILENT_S, Operation, Operations, OperationState
from shared.models.registry import HostInfo
from shared.redis import keys
from shared.redis.client import Redis


def host(node: str = "here", *operations: str) -> HostInfo:
    return HostInfo(node, "machine", 1, 0.0, 0.0, ("one",), 100, 50, operations=operations)


def test_model_fits_if_pinned_models_and_caches_leave_enough_memory() -> None:
    worker = replace(host(), memory_pinned=30)
    assert [worker.can_fit(size) for size in (10, 68, 69)] == [True, True, False]


@pytest.fixture
def operations(client: Redis) -> Operations:
    return Operations(client)


@pytest.fixture
def stored(operations: Operations, client: Redis) -> Callable[[float, str], Operation]:
    """Return a function that creates an operation with a given state, stored some seconds ago."""

    def store(seconds_ago: float, state: str) -> Operation:
        pending = operations.begin("load", "two", "here")
        operation = operations.put(replace(pending, state=OperationState(state), progress=0.25))
        operation = replace(operation, updated_at=operation.updated_at - seconds_ago)
        client.hset(keys.OPERATION + operation.id, "updated_at", operation.updated_at)
        return operation

    return store


def test_stored_operation_is_read_back(operations: Operations) -> None:
    pending = operations.begin("load", "two", "here")
    ended = replace(
        pending,
        state=OperationState.FAILED,
        progress=0.5,
        error_code="load_failed",
        error_message="It is broken: ünd kaputt.",
        unloaded=("one", "three"),
        memory_before=12,
        memory_after=0,
    )
    assert operations.put(ended) == operations.read(pending.id) == operations.get(pending.id, [])
    assert operations.read("op_none") is None
    other = operations.begin("unload", "one", "there")
    assert {each.id for each in operations.recent([])} == {pending.id, other.id}


@pytest.mark.parametrize("state", ["pending", "waiting", "draining", "loading"])
def test_operation_that_its_worker_lists_does_not_time_out(
    operations: Operations, stored: Callable[[float, str], Operation], state: str
) -> None:
    operation = stored(1000, state)
    assert operations.get(operation.id, [host("here", "op_other", operation.id)]) == operation


@pytest.mark.parametrize("state", ["pending", "waiting", "draining", "loading"])
def test_operation_of_a_dead_worker_fails(
    operations: Operations, stored: Callable[[float, str], Operation], state: str
) -> None:
    operation = stored(GONE_S + 1, state)
    result = operations.get(operation.id, [host("elsewhere")])
    assert result
    assert (result.state, result.error_code) == (OperationState.FAILED, "worker_lost")
    assert result.progress == 0.25


@pytest.mark.parametrize(("state", "code"), [("pending", "worker_silent"), ("loading", "worker_lost")])
def test_operation_that_a_restarted_worker_does_not_list_fails(
    operations: Operations, stored: Callable[[float, str], Operation], state: str, code: str
) -> None:
    """The restarted worker has the same name as before."""
    operation = stored(SILENT_S + 1, state)
    result = operations.get(operation.id, [host("here")])
    assert result
    assert (result.state, result.error_code) == (OperationState.FAILED, code)


def test_recent_operations_are_sorted_newest_first(operations: Operations) -> None:
    first = operations.begin("load", "one", "here")
    second = operations.begin("unload", "one", "here")
    assert [each.id for each in operations.recent([host()])] == [second.id, first.id]


def test_new_operation_may_not_be_listed_yet(operations: Operations) -> None:
    operation = operations.begin("load", "two", "here")
    for hosts in ([], [host("here")]):
        assert operations.get(operation.id, hosts) == operation


def test_one_process_starts_loading_for_queued_jobs_and_all_see_the_operation(operations: Operations) -> None:
    assert operations.demanded("two") is None
    assert [operations.claim_demand("two", 30) for _ in range(3)] == [True, False, False]
    assert operations.demanded("two") is None
    operation = operations.begin("load", "two", "here")
    operations.store_demand(operation)
    assert not operations.claim_demand("two", 30)
    failed = operations.put(replace(operation, state=OperationState.FAILED))
    assert operations.demanded("two") == failed
    assert operations.demanded("one") is None
