"""Variables that were set for other applications change neither where messages go nor who may log in to Flower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import pytest

from scripts.stack.ports import free_port
from shared.jobs.record import Status
from tests.plugins.stack import Stack, fake_stack_on
from tests.support.servers import Server

PASSWORD = "a,b:c d=\"e'%$#\\"

FOREIGN = {
    "CELERY_BROKER_URL": "redis://127.0.0.1:1/0",
    "CELERY_BROKER_READ_URL": "redis://127.0.0.1:1/0",
    "CELERY_BROKER_WRITE_URL": "redis://127.0.0.1:1/0",
    "CELERY_RESULT_BACKEND": "redis://127.0.0.1:1/0",
    "CELERY_CONFIG_MODULE": "no_such_module",
    "CELERY_LOADER": "no.such.Loader",
    "FLASK_DEBUG": "1",
    "FLOWER_ADDRESS": "0.0.0.0",
    "FLOWER_BASIC_AUTH": "intruder:intruder",
    "FLOWER_UNAUTHENTICATED_API": "true",
    "FLOWER_URL_PREFIX": "elsewhere",
    "FORWARDED_ALLOW_IPS": "*",
    "GUNICORN_CMD_ARGS": "--bind 127.0.0.1:1 --workers 3",
    "SCRIPT_NAME": "/elsewhere",
    "WEB_CONCURRENCY": "3",
}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with TemporaryDirectory(prefix="mlxq-") as folder:
        queue = Server(Path(folder) / "q", "a", "appendonly yes", "appendfsync always")
        variables = {**FOREIGN, "FLOWER_PORT": str(free_port()), "FLOWER_PASSWORD": PASSWORD}
        with closing(queue), fake_stack_on(f"redis://:a@127.0.0.1:{queue.port}/0", **variables) as found:
            yield found


def test_jobs_run(stack: Stack) -> None:
    stack.start_worker()
    with stack.client() as client:
        job = client.submit({"prompt": "Hello", "max_tokens": 3}, idempotency_key="one", wait_s=30)
        assert job.status is Status.SUCCEEDED
    # Remote control reaches the worker, so its messages go through the broker of our settings.
    with stack.client() as client:
        health = client.request("GET", "/health").json()
    assert [worker["response_s"] is not None for worker in health["workers"]] == [True]


def test_flower_has_one_password_whatever_is_in_it(stack: Stack) -> None:
    stack.start_flower()
    workers = f"{stack.flower_url}/api/workers"
    assert httpx2.get(workers).status_code == 401
    for user, password in (("intruder", "intruder"), ("admin", "a"), ("b", "c d")):
        assert httpx2.get(workers, auth=(user, password)).status_code == 401
    assert httpx2.get(workers, auth=("admin", PASSWORD)).status_code == 200
