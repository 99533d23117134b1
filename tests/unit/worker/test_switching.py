"""Orders to load and unload, on a worker that only pretends to have models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis import ConnectionError as RedisGone

from shared.models.catalog import Catalog, CatalogModel
from shared.models.operations import Operation, Operations, OperationState
from shared.queue import keys
from shared.queue.redis import Redis
from worker.models.switching import Order, Switcher

LIMIT = 1000


@dataclass(eq=False)
class PretendWorker:
    """What the switcher sees of a worker."""

    model: CatalogModel
    weights_bytes: int
    pinned: bool = False
    core: Any = None


@dataclass
class PretendModels:
    """A worker's models: those named `broken` do not load."""

    catalog: Catalog
    sizes: dict[str, int]
    memory_limit: int = LIMIT
    workers: tuple[Any, ...] = ()
    happened: list[str] = field(default_factory=list)
    rows_hold: int = 0
    clock: int = 0

    def open_worker(self, model: CatalogModel, *, pinned: bool = False) -> PretendWorker:
        loaded: Future[str] = Future()
        if model.id.startswith("broken"):
            loaded.set_exception(OSError(f"{model.path}/weights are cut"))
        else:
            loaded.set_result("runner")
        self.clock += 1
        core = SimpleNamespace(loaded=loaded, used_at=self.clock, idle=True, load_progress=0.5)
        worker = PretendWorker(model, self.sizes[model.id], pinned, core)
        self.workers = (*self.workers, worker)
        self.happened.append(f"load {model.id}")
        return worker

    def consume(self, worker: PretendWorker) -> None:
        assert worker.core.loaded.exception() is None
        self.happened.append(f"serve {worker.model.id}")

    def close_worker(self, worker: PretendWorker) -> None:
        self.workers = tuple(each for each in self.workers if each is not worker)
        self.rows_hold = 0
        self.happened.append(f"close {worker.model.id}")

    def make_room(self, coming: int) -> bool:
        return self.memory_used() + coming <= self.memory_limit

    def divide_memory(self) -> None:
        self.happened.append("divide")

    def announce(self) -> None:
        self.announced = self.names

    def memory_used(self) -> int:
        return sum(worker.weights_bytes for worker in self.workers) + self.rows_hold

    @property
    def names(self) -> set[str]:
        return {worker.model.id for worker in self.workers}


@pytest.fixture
def worker(tmp_path: Path) -> Callable[..., PretendModels]:
    """Makes a worker that has some of its models, the first one used longest ago."""

    def made(warm: Iterable[str], **sizes: int) -> PretendModels:
        models = {}
        for name, size in sizes.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
            models[name] = CatalogModel(name, tmp_path / name, "text")
        found = PretendModels(Catalog(models, next(iter(models))), sizes)
        for name in warm:
            found.open_worker(models[name])
        found.happened.clear()
        return found

    return made


@dataclass
class Desk:
    """Has orders done at once."""

    models: PretendModels
    operations: Operations

    def do(self, kind: str, model: str, **how: bool) -> Operation:
        operation = self.operations.begin(kind, model, "here")
        switcher = Switcher(self.models, self.operations)  # type: ignore[arg-type]
        switcher.put(Order(operation.id, kind, model, **how))
        assert switcher.in_hand == (operation.id,)
        switcher.close()
        switcher.run()
        assert switcher.in_hand == ()
        assert self.models.announced == self.models.names, "before the end was told"
        ended = self.operations.read(operation.id)
        assert ended is not None
        return ended


@pytest.fixture
def do(client: Redis) -> Callable[..., Operation]:
    def done(models: PretendModels, kind: str, model: str, **how: bool) -> Operation:
        return Desk(models, Operations(client)).do(kind, model, **how)

    return done


def test_an_order_that_comes_twice_is_done_once(worker: Callable[..., PretendModels], client: Redis) -> None:
    models, operations = worker(["one"], one=300, two=300), Operations(client)
    operation = operations.begin("load", "two", "here")
    order = Order(operation.id, "load", "two")
    for _ in range(2):
        switcher = Switcher(models, operations)  # type: ignore[arg-type]
        switcher.put(order)
        switcher.put(order)
        assert switcher.in_hand == (operation.id,)
        switcher.close()
        switcher.run()
        ended = operations.read(operation.id)
        assert ended is not None
        assert ended.state is OperationState.SUCCEEDED
        assert models.happened == ["load two", "serve two"]


def test_beside_what_is_warm_while_there_is_memory(
    worker: Callable[..., PretendModels], do: Callable[..., Operation]
) -> None:
    models = worker(["one"], one=300, two=300)
    ended = do(models, "load", "two")
    assert (ended.state, ended.progress, ended.unloaded) == (OperationState.SUCCEEDED, 1.0, ())
    assert (ended.memory_before, ended.memory_after) == (300, 600)
    assert models.names == {"one", "two"}


def test_the_least_recently_used_goes_first_and_no_more_than_must(
    worker: Callable[..., PretendModels], do: Callable[..., Operation]
) -> None:
    models = worker(["one", "two", "three"], one=300, two=300, three=300, four=500)
    ended = do(models, "load", "four")
    assert ended.unloaded == ("one", "two")
    assert models.happened == ["close one", "close two", "load four", "serve four"]


def test_what_has_jobs_counts_as_in_use_however_long_ago_they_came(
    worker: Callable[..., PretendModels], do: Callable[..., Operation]
) -> None:
    models = worker(["one", "two"], one=400, two=400, three=400)
    models.workers[0].core.idle = False
    assert do(models, "load", "three").unloaded == ("two",)


def test_what_is_pinned_stays_and_the_order_fails_before_anything_goes(
    worker: Callable[..., PretendModels], do: Callable[..., Operation]
) -> None:
    models = worker(["one", "two"], one=400, two=400, three=700)
    models.workers[1].pinned = True
    ended = do(models, "load", "three")
    assert (ended.state, ended.error_code) == (OperationState.FAILED, "not_enough_memory")
    assert "beside two" in str(ended.error_message)
    assert models.happened == []


def test_in_the_place_of_what_is_warm_it_is_loaded_before_that_goes_where_memory_allows(
    worker: Callable[..., PretendModels], do: Callable[..., Operation]
) -> None:
    models = worker(["one"], one=300, two=300, three=900)
    assert do(models, "load", "two", replace=True).unloaded == ("one",)
    assert models.happened == ["load two", "serve two", "close one"]
    models.happened.clear()
    assert do(models, "load", "three", replace=True).unloaded == ("two",)
    assert models.happened == ["close two", "load three", "serve three"]


def test_what_is_warm_already_is_pinned_and_replaces_the_others_when_asked(
    worker: Callable[..., PretendModels], do: Callable[..., Operation]
) -> None:
    models = worker(["one", "two"], one=300, two=300)
    assert do(models, "load", "two", pin=True).state is OperationState.SUCCEEDED
    assert (models.happened, models.workers[1].pinned) == ([], True)
    assert do(models, "load", "two", replace=True).unloaded == ("one",)
    assert models.names == {"two"}


@pytest.mark.parametrize("replace", [False, True])
def test_a_model_that_does_not_load_leaves_or_puts_back_what_was_there(
    worker: Callable[..., PretendModels], do: Callable[..., Operation], replace: bool, tmp_path: Path
) -> None:
    models = worker(["one"], one=300, broken_small=300, broken_large=900)
    failed = do(models, "load", "broken_small", replace=replace)
    assert (failed.state, failed.error_code) == (OperationState.FAILED, "load_failed")
    assert str(tmp_path) not in str(failed.error_message)
    assert models.happened == ["load broken_small", "close broken_small"]
    models.happened.clear()
    assert do(models, "load", "broken_large", replace=replace).error_code == "load_failed"
    assert models.happened[-2:] == ["load one", "serve one"]
    assert models.names == {"one"}


def test_what_cannot_be_put_back_is_not_served(
    worker: Callable[..., PretendModels], do: Callable[..., Operation]
) -> None:
    models = worker(["broken_now"], broken_now=300, broken_large=900)
    assert do(models, "load", "broken_large").error_code == "load_failed"
    assert models.names == set()


def test_memory_that_rows_hold_is_not_taken_from_them(
    worker: Callable[..., PretendModels], do: Callable[..., Operation]
) -> None:
    models = worker(["one"], one=300, two=300)
    models.rows_hold = 500
    ended = do(models, "load", "two")
    assert (ended.state, ended.error_code) == (OperationState.FAILED, "not_enough_memory")
    assert (models.names, models.happened) == ({"one"}, ["divide"])


@pytest.mark.parametrize("successor", ["two", "broken"])
def test_rows_of_what_is_to_be_replaced_hold_nothing_up(
    worker: Callable[..., PretendModels], do: Callable[..., Operation], successor: str
) -> None:
    models = worker(["one"], one=300, **{successor: 300})
    models.rows_hold = 500
    ended = do(models, "load", successor, replace=True)
    assert ended.unloaded == ("one",)
    if successor == "two":
        assert (ended.state, models.names) == (OperationState.SUCCEEDED, {"two"})
    else:
        assert (ended.error_code, models.names) == ("load_failed", {"one"})


def test_a_model_that_cannot_be_served_once_it_is_loaded_leaves_what_was_there(
    worker: Callable[..., PretendModels], do: Callable[..., Operation], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = worker(["one"], one=600, two=600)
    consume = models.consume

    def gone(worker: PretendWorker) -> None:
        if worker.model.id == "two":
            raise FileNotFoundError(f"{worker.model.path}/tokenizer.json")
        consume(worker)

    monkeypatch.setattr(models, "consume", gone)
    ended = do(models, "load", "two")
    assert (ended.error_code, ended.error_message) == ("load_failed", "two does not load: two/tokenizer.json")
    assert (models.names, models.happened[-1]) == ({"one"}, "serve one")


def test_an_operation_that_cannot_be_read_keeps_the_next_ones_from_nothing(
    worker: Callable[..., PretendModels], client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = Operations(client)
    switcher = Switcher(worker([], one=300), operations)  # type: ignore[arg-type]
    ids = [operations.begin("load", "one", "here").id for _ in range(2)]
    for name in ids:
        switcher.put(Order(name, "load", "one"))
    client.hset(keys.OPERATION + ids[0], "state", "of another version")
    switcher.close()
    switcher.run()
    ended = operations.read(ids[1])
    assert ended is not None and ended.state is OperationState.SUCCEEDED
    assert switcher.in_hand == ()


def test_an_unloading(worker: Callable[..., PretendModels], do: Callable[..., Operation]) -> None:
    models = worker(["one"], one=300, two=300)
    ended = do(models, "unload", "one")
    assert (ended.state, ended.unloaded, ended.memory_after) == (OperationState.SUCCEEDED, ("one",), 0)
    assert do(models, "unload", "one").error_code == "model_not_loaded"
    assert do(models, "load", "nine").error_code == "model_not_found"


def test_an_end_that_redis_cannot_take_is_told_when_it_is_back(
    worker: Callable[..., PretendModels],
    do: Callable[..., Operation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put, calls = Operations.put, []

    def away(self: Operations, operation: Operation) -> Operation:
        calls.append(operation.state)
        if operation.state.terminal and len(calls) < 5:
            raise RedisGone("away")
        return put(self, operation)

    monkeypatch.setattr("worker.models.switching.PUBLISH_EVERY_S", 0.01)
    monkeypatch.setattr(Operations, "put", away)
    assert do(worker(["one"], one=300), "unload", "one").state is OperationState.SUCCEEDED
