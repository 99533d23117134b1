"""Health checks: status, reasons and response times."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from scripts.stack.ports import free_port
from shared.models.registry import Registry
from tests.plugins.web_stack import MODEL, ROOT, StubWorker, WebStack, running_web

StartWorker = Callable[..., StubWorker]


def health(web: WebStack) -> tuple[int, dict[str, Any]]:
    sent_at = time.monotonic()
    response = web.http.get("/health")
    assert time.monotonic() - sent_at < 1.5  # a second, and some for a busy test machine
    return response.status_code, response.json()


@contextmanager
def celery_node(web: WebStack, name: str) -> Iterator[None]:
    """A Celery worker that answers pings and consumes no wake-ups."""
    environment = {"PATH": os.environ["PATH"], "DATA_DIR": str(web.home), "ENV_FILE": os.devnull}
    with (web.home / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "shared.queue.wakeups:app", "worker", "-P", "solo", "-n", name],
            cwd=ROOT, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            yield
        finally:
            process.terminate()
            process.wait(20)


def test_without_a_worker_the_service_is_down_but_alive(web: WebStack) -> None:
    status, view = health(web)
    assert (status, view["status"], view["reasons"]) == (503, "down", ["No worker is ready."])
    assert view["redis"]["reachable"] and view["queues"] == {MODEL: 0}
    assert web.http.get("/livez").status_code == 200
    assert web.http.get("/readyz").status_code == 503


def test_a_worker_that_does_not_answer_pings_degrades_the_service(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    status, view = health(web)
    assert (status, view["status"]) == (200, "degraded")
    assert view["reasons"] == ["Worker w1@stub (stub) does not answer pings."]
    (worker,) = view["workers"]
    assert worker["model"] == MODEL and worker["slots"] == 128 and worker["response_s"] is None
    assert worker["heartbeat_age_s"] < 2 and worker["about"] == {"device": "none"}
    assert web.http.get("/readyz").status_code == 200


@pytest.mark.slow
def test_the_status_is_ok_if_every_worker_answers_pings(
    web: WebStack, start_worker: StartWorker, eventually: Callable[..., None]
) -> None:
    with celery_node(web, "w1@stub"):
        start_worker(pause_s=0.05)
        eventually(lambda: health(web)[1]["status"] == "ok", within_s=60)
        status, view = health(web)
        assert status == 200 and 0 < view["workers"][0]["response_s"] < 0.6


def test_without_redis_the_service_is_down_and_recovers(eventually: Callable[..., None]) -> None:
    with running_web() as web:
        web.stop_redis()
        status, view = health(web)
        assert (status, view["status"], view["reasons"]) == (503, "down", ["Redis does not respond."])
        assert web.http.get("/readyz").status_code == 503
        assert web.http.get("/livez").status_code == 200
        assert "mlxq_redis_up 0.0" in web.http.get("/metrics").text
        refused = web.http.post("/v1/jobs", json={"prompt": "hi"})
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert int(refused.headers["Retry-After"]) >= 1

        web.start_redis()
        worker = StubWorker(web.redis_url)
        worker.start()
        eventually(lambda: web.http.get("/readyz").status_code == 200)
        job = web.submit(max_tokens=2)
        assert web.job(job["id"], wait=20)["status"] == "succeeded"
        worker.stop()


def test_an_unavailable_broker_delays_neither_submissions_nor_maintenance() -> None:
    with running_web(BROKER_URL=f"redis://127.0.0.1:{free_port()}/0") as web:
        for _ in range(3):
            sent_at = time.monotonic()
            job = web.submit(max_tokens=2, start_within_s=0.2)
            assert time.monotonic() - sent_at < 2
        assert web.job(job["id"], wait=20)["status"] == "expired"


def test_a_loading_worker_is_not_ready(web: WebStack, start_worker: StartWorker) -> None:
    worker = start_worker()
    client = web.client()
    (info,) = Registry(client).workers()
    worker.stop()
    Registry(client).announce_worker(type(info)(**{**asdict_of(info), "state": "loading"}), 30)
    client.close()
    status, view = health(web)
    assert (status, view["reasons"][0]) == (503, "No worker is ready.")
    assert f"Worker {info.node} ({info.model}) is loading." in view["reasons"]


def asdict_of(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__slots__}
