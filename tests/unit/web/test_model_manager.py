"""Loading models on demand for waiting jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.errors import Invalid
from shared.models.additions import CatalogAdditions, CatalogUpdates
from shared.models.catalog import Catalog, CatalogModel
from shared.models.operations import Operations
from shared.models.registry import HostInfo, Registry
from shared.queue.wakeups import LOAD
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from web.cluster.model_downloads import ModelDownloads
from web.cluster.model_manager import ModelManager


class FakeCelery:
    """Records commands to workers."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, str]] = []

    @property
    def control(self) -> FakeCelery:
        return self

    def broadcast(self, command: str, *, arguments: dict[str, Any], destination: list[str]) -> None:
        assert destination == ["here"]
        self.commands.append((command, arguments["model"]))


@pytest.mark.parametrize("names", [("one",), ("one", "two")])
@pytest.mark.parametrize(("loaded", "waiting", "on_demand"), [
    ((), True, True), (("one",), True, True), ((), False, True), ((), True, False),
])  # fmt: skip
def test_a_model_is_loaded_once_if_jobs_wait_for_it_and_no_worker_has_it(
    client: Redis, names: tuple[str, ...], loaded: tuple[str, ...], waiting: bool, on_demand: bool
) -> None:
    registry, celery = Registry(client), FakeCelery()
    catalog = Catalog({name: CatalogModel(name, Path(name), "text") for name in names}, "one")
    model_manager = ModelManager(celery, Operations(client), registry, catalog, on_demand=on_demand)  # type: ignore[arg-type]
    registry.announce_host(HostInfo("here", "machine", 1, 0.0, 0.0, loaded, 100, 0), 60)
    if waiting:
        client.zadd(f"{keys.QUEUE}one", {"job_1": 1.0})
    for _ in range(3):
        model_manager.load_for_waiting_jobs()
    assert celery.commands == ([(LOAD, "one")] if waiting and on_demand and not loaded else [])


@pytest.fixture
def celery() -> FakeCelery:
    return FakeCelery()


@pytest.fixture
def downloads(client: Redis, settings: Settings, celery: FakeCelery) -> ModelDownloads:
    """Downloads to the worker `here`."""
    catalog, additions, operations = Catalog({}, "one"), CatalogAdditions(client), Operations(client)
    registry = Registry(client)
    registry.announce_host(HostInfo("here", "machine", 1, 0.0, 0.0, (), 100, 0), 60)
    manager = ModelManager(celery, operations, registry, catalog, on_demand=False)  # type: ignore[arg-type]
    return ModelDownloads(operations, additions, catalog, CatalogUpdates(settings, catalog, additions), manager)


@pytest.mark.parametrize("hub", ["org/..", "org/.", "org/.git", "org/-x", f"org/{'x' * 129}"])
def test_a_download_never_leaves_the_folder_of_models(downloads: ModelDownloads, celery: FakeCelery, hub: str) -> None:
    with pytest.raises(Invalid, match="Set another name") as caught:
        downloads.start(hub, None, None, None)
    assert caught.value.field == "name" and not celery.commands


def test_a_download_is_found_after_many_other_operations(client: Redis, downloads: ModelDownloads) -> None:
    first = downloads.start("org/model", None, None, None)
    for _ in range(60):
        Operations(client).begin("load", "one", "here")
    assert downloads.start("org/model", None, None, None).id == first.id
    assert [each.id for each in downloads.recent()] == [first.id]
