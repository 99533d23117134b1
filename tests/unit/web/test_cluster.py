"""Concurrent requests share one reading of the cluster's state, with threads and with greenlets."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from shared.models.registry import HostInfo, ModelCard, Speed, WorkerInfo
from shared.settings import ROOT
from tests.support.waiting import eventually
from web.cluster import snapshot
from web.cluster.snapshot import Cluster, ClusterSnapshot

REQUESTS = 200


class Registry:
    """Counts readings; each blocks until `open` is set."""

    def __init__(self) -> None:
        self.readings = 0
        self.error: BaseException | None = None
        self.open = threading.Event()

    def workers(self) -> list[WorkerInfo]:
        self.readings += 1
        error = self.error
        assert self.open.wait(30)
        if error is not None:
            raise error
        return []

    def speeds(self, models: Iterable[str]) -> dict[str, Speed]:
        return {}

    def models(self) -> dict[str, ModelCard]:
        return {"m": ModelCard("m", "text", self.readings)}

    def hosts(self) -> list[HostInfo]:
        return []


def read_concurrently(read: Callable[[], ClusterSnapshot], registry: Registry) -> list[ClusterSnapshot | Exception]:
    """Start all requests before the first reading ends; return their results."""
    arrived = threading.Semaphore(0)

    def request() -> ClusterSnapshot | Exception:
        arrived.release()
        try:
            return read()
        except redis.RedisError as error:
            return error

    with ThreadPoolExecutor(REQUESTS) as pool:
        futures = [pool.submit(request) for _ in range(REQUESTS)]
        for _ in range(REQUESTS):
            assert arrived.acquire(timeout=30)
        registry.open.set()
        return [future.result(30) for future in futures]


def test_concurrent_requests_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_MAX_AGE_S", 60.0)  # on a busy machine, some threads start much later
    registry = Registry()
    results = read_concurrently(Cluster(registry).snapshot, registry)  # type: ignore[arg-type]
    assert registry.readings == 1
    assert len(set(map(id, results))) == 1


def test_concurrent_requests_for_the_latest_state_read_at_most_twice() -> None:
    """A request that arrives during a reading needs a later one."""
    registry = Registry()
    cluster = Cluster(registry)  # type: ignore[arg-type]
    read_concurrently(lambda: cluster.snapshot(max_age_s=0), registry)
    assert registry.readings <= 2


def test_a_request_for_the_latest_state_during_a_reading_gets_the_next_one() -> None:
    registry = Registry()
    cluster = Cluster(registry)  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cluster.snapshot)
        eventually(lambda: registry.readings)
        second = pool.submit(lambda: cluster.snapshot(max_age_s=0))
        registry.open.set()
        assert first.result(30).models["m"].context == 1
        assert second.result(30).models["m"].context == 2


def test_a_failed_reading_fails_all_waiting_requests_and_the_next_request_tries_again() -> None:
    registry = Registry()
    cluster = Cluster(registry)  # type: ignore[arg-type]
    registry.error = redis.ConnectionError("unavailable")
    results = read_concurrently(cluster.snapshot, registry)
    assert {type(each) for each in results} == {redis.ConnectionError}
    assert registry.readings < REQUESTS / 2, "only requests that arrive later try again"
    registry.error, before = None, registry.readings
    assert cluster.snapshot().models
    assert registry.readings == before + 1


def test_killing_the_reading_request_kills_no_waiting_request() -> None:
    registry = Registry()
    cluster = Cluster(registry)  # type: ignore[arg-type]
    registry.error = KeyboardInterrupt()
    with ThreadPoolExecutor(2) as pool:

        def reader() -> None:
            with pytest.raises(KeyboardInterrupt):
                cluster.snapshot()

        reading = pool.submit(reader)
        eventually(lambda: registry.readings)
        waiting = pool.submit(cluster.snapshot)
        registry.error = None
        registry.open.set()
        reading.result(30)
        error = waiting.exception(30)
        assert error is None or isinstance(error, redis.ConnectionError)
    assert cluster.snapshot().models


def test_waiting_for_a_reading_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_TIMEOUT_S", 0.01)
    registry = Registry()
    cluster = Cluster(registry)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cluster.snapshot)
        eventually(lambda: registry.readings)
        with pytest.raises(redis.TimeoutError):
            cluster.snapshot()
        registry.open.set()


GEVENT_SCRIPT = """
from gevent import monkey
monkey.patch_all()
import gevent
from web.cluster.snapshot import Cluster

class Registry:
    readings = 0
    def workers(self):
        self.readings += 1
        gevent.sleep(0.1)
        return []
    def speeds(self, models):
        return {}
    def models(self):
        return {}
    def hosts(self):
        return []

registry = Registry()
cluster = Cluster(registry)
greenlets = gevent.joinall([gevent.spawn(cluster.snapshot) for _ in range(200)], timeout=30)
assert len({id(each.value) for each in greenlets if each.value}) == 1
print(registry.readings)
"""


def test_greenlets_read_once() -> None:
    """In a separate process, patched by gevent as under gunicorn."""
    script = subprocess.run(
        [sys.executable, "-c", GEVENT_SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (script.returncode, script.stdout.strip()) == (0, "1"), script.stderr
