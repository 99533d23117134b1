"""Models that jobs wait for are asked for, however many the catalog has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.models.catalog import Catalog, CatalogModel
from shared.models.operations import Operations
from shared.models.registry import HostInfo, Registry
from shared.queue import keys
from shared.queue.redis import Redis
from shared.queue.wakeups import LOAD
from web.cluster.model_manager import ModelManager


class App:
    """Of Celery, what tells workers."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    @property
    def control(self) -> App:
        return self

    def broadcast(self, command: str, *, arguments: dict[str, Any], destination: list[str]) -> None:
        assert destination == ["here"]
        self.told.append((command, arguments["model"]))


@pytest.mark.parametrize("names", [("one",), ("one", "two")])
@pytest.mark.parametrize(("has", "waits", "on_demand"), [
    ((), True, True), (("one",), True, True), ((), False, True), ((), True, False),
])  # fmt: skip
def test_what_jobs_wait_for_and_no_worker_has_is_asked_for_once(
    client: Redis, names: tuple[str, ...], has: tuple[str, ...], waits: bool, on_demand: bool
) -> None:
    registry, app = Registry(client), App()
    catalog = Catalog({name: CatalogModel(name, Path(name), "text") for name in names}, "one")
    model_manager = ModelManager(app, Operations(client), registry, catalog, on_demand=on_demand)  # type: ignore[arg-type]
    registry.announce_host(HostInfo("here", "machine", 1, 0.0, 0.0, has, 100, 0), 60)
    if waits:
        client.zadd(f"{keys.QUEUE}one", {"job_1": 1.0})
    for _ in range(3):
        model_manager.demand_waiting()
    assert app.told == ([(LOAD, "one")] if waits and on_demand and not has else [])
