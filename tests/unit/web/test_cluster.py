"""The cluster's state is read once, however many requests want it at the same moment: threads or greenlets."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from shared.models.registry import HostInfo, ModelCard, WorkerInfo
from shared.settings import ROOT
from tests.support.waiting import eventually
from web.cluster import snapshot
from web.cluster.snapshot import Cluster, ClusterSnapshot

REQUESTS = 200


class Registry:
    """Counts readings; each waits until it is let go."""

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

    def mean_job_s(self, models: Iterable[str]) -> dict[str, float]:
        return {}

    def models(self) -> dict[str, ModelCard]:
        return {"m": ModelCard("m", "text", self.readings)}

    def hosts(self) -> list[HostInfo]:
        return []


def many(read: Callable[[], ClusterSnapshot], registry: Registry) -> list[ClusterSnapshot | Exception]:
    """What so many requests get that all come before the first reading has ended."""
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


def test_requests_that_find_it_stale_together_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_MAX_AGE_S", 60.0)  # a busy machine may keep a thread from asking for long
    registry = Registry()
    found = many(Cluster(registry).now, registry)  # type: ignore[arg-type]
    assert registry.readings == 1
    assert len(set(map(id, found))) == 1


def test_those_that_want_it_as_it_is_now_read_it_at_most_twice() -> None:
    """One that came while a reading was under way must not get what that had read before."""
    registry = Registry()
    shared = Cluster(registry)  # type: ignore[arg-type]
    many(lambda: shared.now(max_age_s=0), registry)
    assert registry.readings <= 2


def test_one_that_comes_in_the_middle_of_a_reading_and_wants_it_new_gets_the_next() -> None:
    registry = Registry()
    shared = Cluster(registry)  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shared.now)
        eventually(lambda: registry.readings)
        second = pool.submit(lambda: shared.now(max_age_s=0))
        registry.open.set()
        assert first.result(30).models["m"].context == 1
        assert second.result(30).models["m"].context == 2


def test_a_reading_that_fails_fails_for_all_that_waited_and_the_next_request_tries_again() -> None:
    registry = Registry()
    shared = Cluster(registry)  # type: ignore[arg-type]
    registry.error = redis.ConnectionError("away")
    found = many(shared.now, registry)
    assert {type(each) for each in found} == {redis.ConnectionError}
    assert registry.readings < REQUESTS / 2, "a request that comes later may try anew, those that waited do not"
    registry.error, before = None, registry.readings
    assert shared.now().models
    assert registry.readings == before + 1


def test_a_request_that_is_killed_in_the_middle_ends_no_other() -> None:
    registry = Registry()
    shared = Cluster(registry)  # type: ignore[arg-type]
    registry.error = KeyboardInterrupt()
    with ThreadPoolExecutor(2) as pool:

        def leader() -> None:
            with pytest.raises(KeyboardInterrupt):
                shared.now()

        leading = pool.submit(leader)
        eventually(lambda: registry.readings)
        waiting = pool.submit(shared.now)
        registry.error = None
        registry.open.set()
        leading.result(30)
        error = waiting.exception(30)
        assert error is None or isinstance(error, redis.ConnectionError)
    assert shared.now().models


def test_waiting_for_a_reading_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_PATIENCE_S", 0.01)
    registry = Registry()
    shared = Cluster(registry)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(shared.now)
        eventually(lambda: registry.readings)
        with pytest.raises(redis.TimeoutError):
            shared.now()
        registry.open.set()


GREENLETS = """
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
    def mean_job_s(self, models):
        return {}
    def models(self):
        return {}
    def hosts(self):
        return []

registry = Registry()
cluster = Cluster(registry)
found = gevent.joinall([gevent.spawn(cluster.now) for _ in range(200)], timeout=30)
assert len({id(each.value) for each in found if each.value}) == 1
print(registry.readings)
"""


def test_greenlets_read_it_once_too() -> None:
    """As under gunicorn: in a process of its own, where all waiting is gevent's."""
    ran = subprocess.run(
        [sys.executable, "-c", GREENLETS], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "1"), ran.stderr
