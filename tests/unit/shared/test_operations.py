"""Operations in Redis: told by their worker, and failed when nobody has them in hand any more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from shared.models.operations import GONE_S, SILENT_S, Operation, Operations, OperationState
from shared.models.registry import HostInfo
from shared.queue import keys
from shared.queue.redis import Redis


def host(node: str = "here", *operations: str) -> HostInfo:
    return HostInfo(node, "machine", 1, 0.0, 0.0, ("one",), 100, 50, operations=operations)


def test_a_model_fits_beside_what_is_pinned_if_it_leaves_some_memory_for_jobs() -> None:
    worker = replace(host(), memory_pinned=30)
    assert [worker.could_take(size) for size in (10, 68, 69)] == [True, True, False]


@pytest.fixture
def operations(client: Redis) -> Operations:
    return Operations(client)


@pytest.fixture
def told(operations: Operations, client: Redis) -> Callable[[float, str], Operation]:
    """Makes one that its worker told of so long ago."""

    def tell(seconds_ago: float, state: str) -> Operation:
        begun = operations.begin("load", "two", "here")
        told = operations.put(replace(begun, state=OperationState(state), progress=0.25))
        told = replace(told, updated_at=told.updated_at - seconds_ago)
        client.hset(keys.OPERATION + told.id, "updated_at", told.updated_at)
        return told

    return tell


def test_what_was_told_is_read_again(operations: Operations) -> None:
    begun = operations.begin("load", "two", "here")
    ended = replace(
        begun,
        state=OperationState.FAILED,
        progress=0.5,
        error_code="load_failed",
        error_message="It is broken: ünd kaputt.",
        unloaded=("one", "three"),
        memory_before=12,
        memory_after=0,
    )
    assert operations.put(ended) == operations.read(begun.id) == operations.get(begun.id, [])
    assert operations.read("op_none") is None
    other = operations.begin("unload", "one", "there")
    assert {each.id for each in operations.recent([])} == {begun.id, other.id}


@pytest.mark.parametrize("state", ["pending", "waiting", "draining", "loading"])
def test_what_a_worker_has_in_hand_goes_on_however_long_it_is_silent(
    operations: Operations, told: Callable[[float, str], Operation], state: str
) -> None:
    """So does what waits in its line behind another loading."""
    operation = told(1000, state)
    assert operations.get(operation.id, [host("here", "op_other", operation.id)]) == operation


@pytest.mark.parametrize("state", ["pending", "waiting", "draining", "loading"])
def test_what_a_worker_that_is_gone_had_in_hand_has_failed(
    operations: Operations, told: Callable[[float, str], Operation], state: str
) -> None:
    operation = told(GONE_S + 1, state)
    found = operations.get(operation.id, [host("elsewhere")])
    assert found
    assert (found.state, found.error_code) == (OperationState.FAILED, "worker_lost")
    assert found.progress == 0.25


@pytest.mark.parametrize(("state", "code"), [("pending", "worker_silent"), ("loading", "worker_lost")])
def test_what_a_worker_that_was_started_anew_does_not_know_has_failed(
    operations: Operations, told: Callable[[float, str], Operation], state: str, code: str
) -> None:
    """It has the same name as before."""
    operation = told(SILENT_S + 1, state)
    found = operations.get(operation.id, [host("here")])
    assert found
    assert (found.state, found.error_code) == (OperationState.FAILED, code)


def test_the_newest_comes_first(operations: Operations) -> None:
    first = operations.begin("load", "one", "here")
    second = operations.begin("unload", "one", "here")
    assert [each.id for each in operations.recent([host()])] == [second.id, first.id]


def test_what_was_told_just_now_may_be_on_its_way(operations: Operations) -> None:
    operation = operations.begin("load", "two", "here")
    for hosts in ([], [host("here")]):
        assert operations.get(operation.id, hosts) == operation


def test_one_of_many_has_a_model_loaded_for_jobs_and_all_see_how_it_goes(operations: Operations) -> None:
    assert operations.on_demand("two") is None
    assert [operations.may_demand("two", 30) for _ in range(3)] == [True, False, False]
    assert operations.on_demand("two") is None
    operation = operations.begin("load", "two", "here")
    operations.demanded(operation)
    assert not operations.may_demand("two", 30)
    failed = operations.put(replace(operation, state=OperationState.FAILED))
    assert operations.on_demand("two") == failed
    assert operations.on_demand("one") is None
