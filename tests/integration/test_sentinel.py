"""Failover with Redis Sentinel: a master, a replica and three sentinels as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import redis

from scripts.client.api import Client, ClientError, RemoteJob
from scripts.stack.ports import free_port
from shared.jobs.log import EventKind
from shared.jobs.record import Status
from shared.redis.client import connect, passes
from shared.settings import ROOT
from tests.plugins.sentinels import LOGIN, NAME, PASSWORD, SENTINEL_LOGIN, SENTINEL_PASSWORD, SentinelSetup
from tests.plugins.stack import Stack, fake_stack_on
from tests.plugins.work import undisturbed
from tests.support.waiting import eventually

FLOWER_PASSWORD = "hush"
SLOW = "!pause=0.02"
"""Instruction in the prompt for the fake backend: a step takes 20 ms."""


def body(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "seed": 0, "temperature": 0}


def try_submit(client: Client, request: dict[str, Any], key: str) -> RemoteJob | None:
    """Submit a job; return None if it is rejected."""
    try:
        return client.submit(request, idempotency_key=key)
    except ClientError:
        return None


def flower_page(stack: Stack, page: str) -> str:
    """Return a page of Flower; an empty string until Flower knows the worker."""
    response = httpx2.get(f"{stack.flower_url}{page}?refresh=1", auth=("admin", FLOWER_PASSWORD), timeout=30)
    return response.text if response.is_success else ""


@pytest.fixture
def stack(sentinel_setup: SentinelSetup) -> Iterator[Stack]:
    sentinel_setup.sentinels[0].kill()  # clients ask this one first; the other two are a majority
    flower = {"FLOWER_PORT": str(free_port()), "FLOWER_PASSWORD": FLOWER_PASSWORD}
    with fake_stack_on(sentinel_setup.url, RATE_LIMIT="1000/minute", **flower) as stack:
        yield stack


def test_jobs_streams_limits_and_flower_survive_a_failover(sentinel_setup: SentinelSetup, stack: Stack) -> None:
    worker = stack.start_worker()
    flower = stack.start_flower()
    running = body(SLOW, 300)
    with stack.client() as client:
        job = client.submit(running)
        stream = client.events(job.id)
        events = [next(stream) for _ in range(20)]
        old = sentinel_setup.master
        old.kill()
        later = eventually(lambda: try_submit(client, body("later", 30), "once"), "submissions are accepted")
        events.extend(stream)
        assert sentinel_setup.master is not old

        assert [event.n for event in events] == list(range(1, len(events) + 1))
        assert [event.kind for event in events].count(EventKind.DONE) == 1
        assert "".join(event.text for event in events) == undisturbed(SLOW, 300) == client.job(job.id).text
        ended = client.job(later.id, wait_s=30)
        assert (ended.status, ended.text) == (Status.SUCCEEDED, undisturbed("later", 30))

        eventually(lambda: client.request("GET", "/health").json()["status"] == "ok", "the service is healthy")
        stack.redis.delete(*stack.redis.keys("LIMITS*") or ["none"])
        eventually(lambda: client.request("GET", "/v1/jobs") and stack.redis.keys("LIMITS*"), "limits count in Redis")
        remaining = [int(client.request("GET", "/v1/jobs").headers["X-RateLimit-Remaining"]) for _ in range(2)]
        assert remaining[1] == remaining[0] - 1

    for page in ("/broker", f"/worker/{stack.registry.workers()[0].node}"):
        html = eventually(lambda: flower_page(stack, page), f"Flower shows {page}")  # noqa: B023
        assert not any(secret in html for secret in (PASSWORD, SENTINEL_PASSWORD, LOGIN, SENTINEL_LOGIN))
    assert worker.poll() is None and flower.poll() is None
    for name in ("web", "worker-0", "flower"):
        assert not any(secret in stack.log(name) for secret in (PASSWORD, SENTINEL_PASSWORD, LOGIN, SENTINEL_LOGIN))


@pytest.mark.slow
@pytest.mark.long
def test_silent_master_is_abandoned_by_api_and_workers(sentinel_setup: SentinelSetup) -> None:
    with fake_stack_on(sentinel_setup.url) as stack, stack.client() as client:
        stack.start_worker()
        running = client.submit(body(SLOW, 100)).id
        eventually(lambda: client.job(running).text, "the job runs")
        sentinel_setup.master.process.send_signal(
            signal.SIGSTOP
        )  # its connections stay open, as after the loss of its machine
        later = eventually(lambda: try_submit(client, body("later", 30), "once"), "submissions are accepted").id
        # No connection of the worker breaks, so it must detect the silent master by itself.
        for job, text in ((running, undisturbed(SLOW, 100)), (later, undisturbed("later", 30))):
            assert client.job(job, wait_s=30).text == text


def test_client_follows_a_new_master_and_abandons_a_demoted_one(sentinel_setup: SentinelSetup) -> None:
    client = connect(sentinel_setup.url, timeout_s=1, retries=1, connections=1)
    write = "return redis.call('SET', 'key', 'value')"
    client.eval(write, 0)

    held = client.connection_pool.get_connection()
    threading.Timer(0.2, client.connection_pool.release, [held]).start()
    assert client.ping()  # it waited for the only connection

    old = sentinel_setup.master
    eventually(sentinel_setup.in_sync, "the replica is in sync")
    sentinel_setup.sentinels[0].client.execute_command("SENTINEL", "FAILOVER", NAME)
    eventually(lambda: sentinel_setup.master is not old, "the replica was promoted")
    # Sentinel would close the connections to the old master. Here the client must detect the change by itself.
    old.client.replicaof("127.0.0.1", sentinel_setup.master.port)
    assert old.role == "slave"
    assert client.eval(write, 0) == "OK"

    sentinel_setup.master.kill()
    with pytest.raises(redis.RedisError) as caught:
        client.ping()
    assert passes(caught.value)
    client.close()


PROCESSES = [("-m", "worker.app"), ("-m", "scripts.stack.flower"), ("-m", "web")]


@pytest.mark.parametrize("command", PROCESSES)
def test_invalid_url_ends_the_process_with_one_line(command: tuple[str, ...]) -> None:
    env = {"PATH": os.environ["PATH"], "ENV_FILE": os.devnull, "BROKER_URL": "sentinel://:hush@h:1"}
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode != 0 and not result.stdout
    assert result.stderr == "BROKER_URL: must name the master: add ?master=NAME, the name configured in the sentinels\n"
