"""Commands to load and unload models, on a worker with fake models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis import ConnectionError as RedisUnreachable

from shared.models.catalog import Catalog, CatalogModel
from shared.models.operations import Operation, Operations, OperationState
from shared.redis import keys
from shared.redis.client import Redis
from tests.support.waiting import eventually
from worker.service import switching
from worker.service.switching import SwitchCommand, Switcher

LIMIT = 1000


@dataclass(eq=False)
class FakeWorker:
    """A model worker as the switcher sees it."""

    model: CatalogModel
    weights_bytes: int
    pinned: bool = False
    core: Any = None


@dataclass
class FakeModels:
    """The models of a worker. Models whose names begin with `broken` do not load."""

    catalog: Catalog
    sizes: dict[str, int]
    memory_limit: int = LIMIT
    workers: tuple[Any, ...] = ()
    calls: list[str] = field(default_factory=list)
    row_bytes: int = 0
    clock: int = 0
    unused_models: set[str] = field(default_factory=set)

    def open(self, model: CatalogModel, *, pinned: bool = False) -> FakeWorker:
        loaded: Future[str] = Future()
        if model.id.startswith("broken"):
            loaded.set_exception(OSError(f"{model.path}/weights are cut"))
        else:
            loaded.set_result("runner")
        self.clock += 1
        core = SimpleNamespace(loaded=loaded, used_at=self.clock, idle=True, load_progress=0.5)
        worker = FakeWorker(model, self.sizes[model.id], pinned, core)
        self.workers = (*self.workers, worker)
        self.calls.append(f"load {model.id}")
        return worker

    def serve(self, worker: FakeWorker) -> None:
        assert worker.core.loaded.exception() is None
        self.calls.append(f"serve {worker.model.id}")

    def close(self, worker: FakeWorker) -> None:
        self.workers = tuple(each for each in self.workers if each is not worker)
        self.row_bytes = 0
        self.calls.append(f"close {worker.model.id}")

    def unused(self) -> list[FakeWorker]:
        return [each for each in self.workers if each.model.id in self.unused_models]

    def fits(self, model: CatalogModel, others: Iterable[FakeWorker]) -> bool:
        return model.measure() + sum(worker.weights_bytes for worker in others) <= 0.98 * self.memory_limit

    def free_memory(self, needed_bytes: int) -> bool:
        return self.memory_used() + needed_bytes <= self.memory_limit

    def divide_memory(self) -> None:
        self.calls.append("divide")

    def announce(self) -> None:
        self.announced = self.names

    def memory_used(self) -> int:
        return sum(worker.weights_bytes for worker in self.workers) + self.row_bytes

    @property
    def names(self) -> set[str]:
        return {worker.model.id for worker in self.workers}


@pytest.fixture
def worker(tmp_path: Path) -> Callable[..., FakeModels]:
    """Return a function that makes a worker with some of its models loaded, the first one used longest ago."""

    def make(loaded: Iterable[str], **sizes: int) -> FakeModels:
        models = {}
        for name, size in sizes.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
            models[name] = CatalogModel(name, tmp_path / name, "text")
        fake = FakeModels(Catalog(models, next(iter(models))), sizes)
        for name in loaded:
            fake.open(models[name])
        fake.calls.clear()
        return fake

    return make


@dataclass
class Harness:
    """Carries out commands at once."""

    models: FakeModels
    operations: Operations

    def do(self, kind: str, model: str, **options: bool) -> Operation:
        operation = self.operations.begin(kind, model, "here")
        switcher = Switcher(self.models, self.operations, self.models.announce)  # type: ignore[arg-type]
        switcher.put(SwitchCommand(operation.id, kind, model, **options))
        assert switcher.operations == (operation.id,)
        switcher.close()
        switcher.run()
        assert switcher.operations == ()
        assert self.models.announced == self.models.names, "the models are announced before the end is published"
        ended = self.operations.read(operation.id)
        assert ended is not None
        return ended


@pytest.fixture
def do(client: Redis) -> Callable[..., Operation]:
    def run(models: FakeModels, kind: str, model: str, **options: bool) -> Operation:
        return Harness(models, Operations(client)).do(kind, model, **options)

    return run


def test_a_command_that_is_delivered_twice_runs_once(worker: Callable[..., FakeModels], client: Redis) -> None:
    models, operations = worker(["one"], one=300, two=300), Operations(client)
    operation = operations.begin("load", "two", "here")
    command = SwitchCommand(operation.id, "load", "two")
    for _ in range(2):
        switcher = Switcher(models, operations, models.announce)  # type: ignore[arg-type]
        switcher.put(command)
        switcher.put(command)
        assert switcher.operations == (operation.id,)
        switcher.close()
        switcher.run()
        ended = operations.read(operation.id)
        assert ended is not None
        assert ended.state is OperationState.SUCCEEDED
        assert models.calls == ["load two", "serve two"]


def test_unused_models_are_unloaded_between_commands(
    worker: Callable[..., FakeModels], client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switching, "UNUSED_CHECK_S", 0.01)
    models, operations = worker(["one", "two"], one=300, two=300), Operations(client)
    switcher = Switcher(models, operations, models.announce)  # type: ignore[arg-type]
    switcher.start()
    models.unused_models = {"two"}
    eventually(lambda: models.calls == ["close two"], "the unused model is unloaded")
    operation = operations.begin("load", "two", "here")
    models.unused_models = set()
    switcher.put(SwitchCommand(operation.id, "load", "two"))
    switcher.close()
    switcher.join()
    assert models.names == models.announced == {"one", "two"}


def test_a_model_is_loaded_in_addition_to_others_if_memory_allows(
    worker: Callable[..., FakeModels], do: Callable[..., Operation]
) -> None:
    models = worker(["one"], one=300, two=300)
    ended = do(models, "load", "two")
    assert (ended.state, ended.progress, ended.unloaded) == (OperationState.SUCCEEDED, 1.0, ())
    assert (ended.memory_before, ended.memory_after) == (300, 600)
    assert models.names == {"one", "two"}


def test_as_few_models_as_possible_are_unloaded_least_recently_used_first(
    worker: Callable[..., FakeModels], do: Callable[..., Operation]
) -> None:
    models = worker(["one", "two", "three"], one=300, two=300, three=300, four=500)
    ended = do(models, "load", "four")
    assert ended.unloaded == ("one", "two")
    assert models.calls == ["close one", "close two", "load four", "serve four"]


def test_a_model_with_jobs_counts_as_in_use(worker: Callable[..., FakeModels], do: Callable[..., Operation]) -> None:
    models = worker(["one", "two"], one=400, two=400, three=400)
    models.workers[0].core.idle = False
    assert do(models, "load", "three").unloaded == ("two",)


def test_a_command_that_would_need_a_pinned_model_unloaded_changes_nothing(
    worker: Callable[..., FakeModels], do: Callable[..., Operation]
) -> None:
    models = worker(["one", "two"], one=400, two=400, three=700)
    models.workers[1].pinned = True
    ended = do(models, "load", "three")
    assert (ended.state, ended.error_code) == (OperationState.FAILED, "not_enough_memory")
    assert "in addition to two" in str(ended.error_message)
    assert models.calls == []


def test_a_replaced_model_is_unloaded_after_its_replacement_is_loaded_if_memory_allows(
    worker: Callable[..., FakeModels], do: Callable[..., Operation]
) -> None:
    models = worker(["one"], one=300, two=300, three=900)
    assert do(models, "load", "two", replace=True).unloaded == ("one",)
    assert models.calls == ["load two", "serve two", "close one"]
    models.calls.clear()
    assert do(models, "load", "three", replace=True).unloaded == ("two",)
    assert models.calls == ["close two", "load three", "serve three"]


def test_a_command_for_a_loaded_model_can_pin_it_and_unload_the_others(
    worker: Callable[..., FakeModels], do: Callable[..., Operation]
) -> None:
    models = worker(["one", "two"], one=300, two=300)
    assert do(models, "load", "two", pin=True).state is OperationState.SUCCEEDED
    assert (models.calls, models.workers[1].pinned) == ([], True)
    assert do(models, "load", "two", replace=True).unloaded == ("one",)
    assert models.names == {"two"}


@pytest.mark.parametrize("replace", [False, True])
def test_if_loading_fails_the_previous_models_stay_or_are_loaded_again(
    worker: Callable[..., FakeModels], do: Callable[..., Operation], replace: bool, tmp_path: Path
) -> None:
    models = worker(["one"], one=300, broken_small=300, broken_large=900)
    failed = do(models, "load", "broken_small", replace=replace)
    assert (failed.state, failed.error_code) == (OperationState.FAILED, "load_failed")
    assert str(tmp_path) not in str(failed.error_message)
    assert models.calls == ["load broken_small", "close broken_small"]
    models.calls.clear()
    assert do(models, "load", "broken_large", replace=replace).error_code == "load_failed"
    assert models.calls[-2:] == ["load one", "serve one"]
    assert models.names == {"one"}


def test_a_model_that_cannot_be_loaded_again_is_not_served(
    worker: Callable[..., FakeModels], do: Callable[..., Operation]
) -> None:
    models = worker(["broken_now"], broken_now=300, broken_large=900)
    assert do(models, "load", "broken_large").error_code == "load_failed"
    assert models.names == set()


def test_rows_keep_their_memory(worker: Callable[..., FakeModels], do: Callable[..., Operation]) -> None:
    models = worker(["one"], one=300, two=300)
    models.row_bytes = 500
    ended = do(models, "load", "two")
    assert (ended.state, ended.error_code) == (OperationState.FAILED, "not_enough_memory")
    assert (models.names, models.calls) == ({"one"}, ["divide"])


@pytest.mark.parametrize("successor", ["two", "broken"])
def test_rows_of_a_replaced_model_do_not_delay_its_replacement(
    worker: Callable[..., FakeModels], do: Callable[..., Operation], successor: str
) -> None:
    models = worker(["one"], one=300, **{successor: 300})
    models.row_bytes = 500
    ended = do(models, "load", successor, replace=True)
    assert ended.unloaded == ("one",)
    if successor == "two":
        assert (ended.state, models.names) == (OperationState.SUCCEEDED, {"two"})
    else:
        assert (ended.error_code, models.names) == ("load_failed", {"one"})


def test_if_serving_a_loaded_model_fails_the_previous_models_are_loaded_again(
    worker: Callable[..., FakeModels], do: Callable[..., Operation], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = worker(["one"], one=600, two=600)
    serve = models.serve

    def fail(worker: FakeWorker) -> None:
        if worker.model.id == "two":
            raise FileNotFoundError(f"{worker.model.path}/tokenizer.json")
        serve(worker)

    monkeypatch.setattr(models, "serve", fail)
    ended = do(models, "load", "two")
    assert (ended.error_code, ended.error_message) == ("load_failed", "two does not load: two/tokenizer.json")
    assert (models.names, models.calls[-1]) == ({"one"}, "serve one")


def test_an_operation_that_cannot_be_read_does_not_stop_the_next_ones(
    worker: Callable[..., FakeModels], client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = Operations(client)
    models = worker([], one=300)
    switcher = Switcher(models, operations, models.announce)  # type: ignore[arg-type]
    ids = [operations.begin("load", "one", "here").id for _ in range(2)]
    for name in ids:
        switcher.put(SwitchCommand(name, "load", "one"))
    client.hset(keys.OPERATION + ids[0], "state", "of another version")
    switcher.close()
    switcher.run()
    ended = operations.read(ids[1])
    assert ended is not None and ended.state is OperationState.SUCCEEDED
    assert switcher.operations == ()


def test_a_model_is_unloaded(worker: Callable[..., FakeModels], do: Callable[..., Operation]) -> None:
    models = worker(["one"], one=300, two=300)
    ended = do(models, "unload", "one")
    assert (ended.state, ended.unloaded, ended.memory_after) == (OperationState.SUCCEEDED, ("one",), 0)
    assert do(models, "unload", "one").error_code == "model_not_loaded"
    assert do(models, "load", "nine").error_code == "model_not_found"


def test_the_end_of_an_operation_is_published_when_redis_is_reachable_again(
    worker: Callable[..., FakeModels],
    do: Callable[..., Operation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put, calls = Operations.put, []

    def unreachable(self: Operations, operation: Operation) -> Operation:
        calls.append(operation.state)
        if operation.state.terminal and len(calls) < 5:
            raise RedisUnreachable("refused")
        return put(self, operation)

    monkeypatch.setattr("worker.service.switching.PUBLISH_EVERY_S", 0.01)
    monkeypatch.setattr(Operations, "put", unreachable)
    assert do(worker(["one"], one=300), "unload", "one").state is OperationState.SUCCEEDED
