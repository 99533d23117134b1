"""Flower shows each job as a task, with the state of its end."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import pytest

from scripts.client.api import Client
from scripts.stack.ports import free_port
from shared.jobs.record import Status
from shared.queue.wakeups import TASK
from tests.plugins.stack import Stack, fake_stack_on
from tests.support.servers import Server
from tests.support.waiting import eventually

PASSWORD = "hush"
SLOW = "!pause=0.02"


@pytest.fixture
def broker() -> Iterator[Server]:
    with TemporaryDirectory(prefix="mlxq-") as folder, closing(Server(Path(folder) / "b", "b")) as server:
        yield server


@pytest.fixture
def stack(broker: Server) -> Iterator[Stack]:
    """A stack with Flower and a separate broker."""
    with TemporaryDirectory(prefix="mlxq-") as folder:
        queue = Server(Path(folder) / "q", "a", "appendonly yes", "appendfsync always")
        with (
            closing(queue),
            fake_stack_on(
                f"redis://:a@127.0.0.1:{queue.port}/0",
                BROKER_URL=f"redis://:b@127.0.0.1:{broker.port}/1",
                FLOWER_PORT=str(free_port()),
                FLOWER_PASSWORD=PASSWORD,
                SLOTS="4",
                LEASE_S="1",
            ) as stack,
        ):
            stack.start_flower()
            yield stack


def tasks(stack: Stack) -> dict[str, dict[str, Any]]:
    """Return the tasks of Flower's API by uuid."""
    response = httpx2.get(f"{stack.flower_url}/api/tasks", auth=("admin", PASSWORD), timeout=30)
    shown: dict[str, dict[str, Any]] = response.raise_for_status().json()
    return shown


def submit(client: Client, prompt: str, tokens: int = 10, **more: Any) -> str:
    return client.submit({"prompt": prompt, "max_tokens": tokens, "seed": 0, "temperature": 0, **more}).id


def cancel(client: Client, job_id: str) -> str:
    client.cancel(job_id)
    eventually(lambda: client.job(job_id).status is Status.CANCELLED, "it is cancelled")
    return job_id


def test_jobs_of_all_kinds_are_tasks_with_their_ids_and_states(stack: Stack, broker: Server) -> None:
    expected: dict[str, str] = {}
    with stack.client() as client:
        # Jobs that no worker ever claims.
        for n in range(3):
            expected[cancel(client, submit(client, f"cancelled while it waits {n}"))] = "REVOKED"
        for n in range(2):
            expected[submit(client, f"expires while it waits {n}", start_within_s=1)] = "REVOKED"
        eventually(lambda: all(client.job(job).status.terminal for job in expected), "they expire")

        first = stack.start_worker()
        expected |= {submit(client, f"succeeds {n}"): "SUCCESS" for n in range(5)}
        expected |= {submit(client, f"!row-fails=3 fails {n}"): "FAILURE" for n in range(2)}
        eventually(lambda: all(client.job(job).status.terminal for job in expected), "they end")

        for n in range(2):
            job = submit(client, f"{SLOW} cancelled while it runs {n}", 4000)
            eventually(lambda: client.job(job).text, "it runs")  # noqa: B023
            expected[cancel(client, job)] = "REVOKED"
        expected[submit(client, f"{SLOW} expires while it runs", 4000, deadline_s=1)] = "REVOKED"

        lost = submit(client, f"{SLOW} its worker is killed", 150)
        expected[lost] = "SUCCESS"
        eventually(lambda: client.job(lost).text, "it runs")
        stack.stop(first, signal.SIGKILL)
        stack.start_worker()

        broker.client.flushall()
        expected |= {submit(client, f"with an emptied broker {n}"): "SUCCESS" for n in range(4)}
        eventually(lambda: all(client.job(job).status.terminal for job in expected), "all end")
        assert {client.job(job).status for job in expected if expected[job] == "SUCCESS"} == {Status.SUCCEEDED}

    assert len(expected) == 20
    eventually(
        lambda: {uuid: task["state"] for uuid, task in tasks(stack).items()} == expected, "Flower shows them all"
    )
    shown = tasks(stack).values()
    assert Counter((task["name"], task["kwargs"]) for task in shown) == {(TASK, "{'model': 'fake'}"): 20}
