"""RabbitMQ as Celery's broker: wake-ups, remote control, and an outage."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import kombu
import pytest

from scripts.stack.ports import free_port
from shared.jobs.record import Status
from shared.queue.wakeups import wakeup_queue
from tests.plugins.stack import Stack, catalog_stack
from tests.plugins.work import undisturbed
from tests.support import rabbitmq
from tests.support.admin import Admin
from tests.support.rabbitmq import RabbitMq
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not rabbitmq.installed(), reason="needs Debian's package rabbitmq-server"),
]

MODELS = ("one", "two")
SLOW = "!pause=0.02"
"""Prompt prefix for the fake backend: each step takes 20 ms."""


class Brokered(NamedTuple):
    """A stack and its broker."""

    stack: Stack
    broker: RabbitMq


@pytest.fixture(scope="module")
def brokered() -> Iterator[Brokered]:
    """The API and a worker with the model `one`."""
    with tempfile.TemporaryDirectory(prefix="mlxq-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        lines = ['default = "one"']
        for name in MODELS:
            (home / name).mkdir()
            (home / name / "config.json").write_text("{}")
            (home / name / "model.safetensors").write_bytes(b"")
            lines += [f"[models.{name}]", f'path = "{home / name}"']
        variables = {"BACKEND": "fake", "FLOWER_PORT": str(free_port()), "FLOWER_PASSWORD": "secret"}
        with (
            closing(RabbitMq(home / "broker")) as broker,
            catalog_stack("\n".join(lines), BROKER_URL=broker.url, **variables) as stack,
        ):
            stack.start_worker()
            eventually(stack.registry.hosts, "the worker accepts commands")
            yield Brokered(stack, broker)


@pytest.fixture
def admin(brokered: Brokered) -> Iterator[Admin]:
    admin = Admin(brokered.stack)
    yield admin
    admin.http.close()


def check_job(stack: Stack, prompt: str, max_tokens: int = 30) -> None:
    """Check that a job runs once, with its whole text."""
    with stack.client() as client:
        body = {"prompt": prompt, "max_tokens": max_tokens, "seed": 0, "temperature": 0}
        job = client.submit(body)
        text = "".join(event.text for event in client.events(job.id))
        assert text == undisturbed(prompt, max_tokens)
        assert client.job(job.id).status is Status.SUCCEEDED


def test_wake_ups_are_sent_through_rabbitmq(brokered: Brokered) -> None:
    received: list[Any] = []
    queue = wakeup_queue("observer")
    with (
        brokered.broker.connect() as connection,
        kombu.Consumer(connection, [queue], callbacks=[lambda body, _: received.append(body)], no_ack=True),
    ):
        check_job(brokered.stack, "wake up")
        connection.drain_events(timeout=10)
    assert received == [{"model": "one"}]
    assert not [name for name in brokered.stack.redis.scan_iter() if not name.startswith(("mlxq:", "LIMITS"))]


def test_models_are_loaded_and_unloaded_through_rabbitmq(brokered: Brokered, admin: Admin) -> None:
    assert admin.ask("load", "two")["state"] == "succeeded"
    assert admin.say("two").status_code == 200
    assert admin.ask("unload", "two")["state"] == "succeeded"


def test_flower_shows_workers_and_jobs(brokered: Brokered) -> None:
    stack = brokered.stack
    flower = stack.start_flower()
    with httpx2.Client(base_url=stack.flower_url, auth=("admin", "secret"), timeout=30, trust_env=False) as http:
        eventually(lambda: http.get("/workers?json=1").json()["data"], "Flower knows the worker")
        check_job(stack, "shown")
        eventually(lambda: http.get("/api/tasks").json(), "Flower knows the job")
    assert stack.stop(flower) == 0


def test_jobs_run_while_rabbitmq_is_away(brokered: Brokered, admin: Admin) -> None:
    with brokered.stack.client() as client:
        running = client.submit({"prompt": SLOW, "max_tokens": 200, "seed": 0, "temperature": 0})
        eventually(lambda: client.job(running.id).text, "it runs")
        brokered.broker.kill()
        check_job(brokered.stack, "without a broker")
        eventually(lambda: client.job(running.id).status.terminal, "it ends")
        assert client.job(running.id).text == undisturbed(SLOW, 200)
    brokered.broker.start()
    # The worker connects again by itself, and takes commands.
    eventually(lambda: admin.ask("load", "two")["state"] == "succeeded", "the worker is connected", 120)
