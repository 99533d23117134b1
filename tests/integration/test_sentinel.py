"""Redis under Sentinel: a master, a replica and three sentinels as processes, and the master killed."""

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
from shared.queue.redis import connect, passes
from shared.settings import ROOT
from tests.plugins.sentinels import LOGIN, NAME, PASSWORD, SENTINEL_LOGIN, SENTINEL_PASSWORD, Watched
from tests.plugins.stack import Stack, fake_stack_on
from tests.plugins.work import undisturbed
from tests.support.waiting import eventually

FLOWER_PASSWORD = "hush"
SLOW = "!pause=0.02"
"""Order for the fake backend: a step takes 20 ms."""


def body(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "seed": 0, "temperature": 0}


def taken(client: Client, request: dict[str, Any], key: str) -> RemoteJob | None:
    """A job, when it is accepted now."""
    try:
        return client.submit(request, idempotency_key=key)
    except ClientError:
        return None


def flower_page(stack: Stack, page: str) -> str:
    """What Flower shows there; empty as long as it does not know the worker."""
    answer = httpx2.get(f"{stack.flower_url}{page}?refresh=1", auth=("admin", FLOWER_PASSWORD), timeout=30)
    return answer.text if answer.is_success else ""


@pytest.fixture
def stack(watched: Watched) -> Iterator[Stack]:
    watched.sentinels[0].kill()  # the first that everybody asks; two are enough to agree
    flower = {"FLOWER_PORT": str(free_port()), "FLOWER_PASSWORD": FLOWER_PASSWORD}
    with fake_stack_on(watched.url, RATE_LIMIT="1000/minute", **flower) as stack:
        yield stack


def test_jobs_streams_limits_and_flower_outlive_the_master(watched: Watched, stack: Stack) -> None:
    worker = stack.start_worker()
    flower = stack.start_flower()
    running = body(SLOW, 300)
    with stack.client() as client:
        job = client.submit(running)
        stream = client.events(job.id)
        seen = [next(stream) for _ in range(20)]
        old = watched.master
        old.kill()
        later = eventually(lambda: taken(client, body("later", 30), "once"), "submissions are accepted")
        seen.extend(stream)
        assert watched.master is not old

        assert [event.n for event in seen] == list(range(1, len(seen) + 1))
        assert [event.kind for event in seen].count(EventKind.DONE) == 1
        assert "".join(event.text for event in seen) == undisturbed(SLOW, 300) == client.job(job.id).text
        ended = client.job(later.id, wait_s=30)
        assert (ended.status, ended.text) == (Status.SUCCEEDED, undisturbed("later", 30))

        eventually(lambda: client.request("GET", "/health").json()["status"] == "ok", "all is well")
        stack.redis.delete(*stack.redis.keys("LIMITS*") or ["none"])
        eventually(lambda: client.request("GET", "/v1/jobs") and stack.redis.keys("LIMITS*"), "limits count in Redis")
        left = [int(client.request("GET", "/v1/jobs").headers["X-RateLimit-Remaining"]) for _ in range(2)]
        assert left[1] == left[0] - 1

    for page in ("/broker", f"/worker/{stack.registry.workers()[0].node}"):
        shown = eventually(lambda: flower_page(stack, page), f"Flower shows {page}")  # noqa: B023
        assert not any(secret in shown for secret in (PASSWORD, SENTINEL_PASSWORD, LOGIN, SENTINEL_LOGIN))
    assert worker.poll() is None and flower.poll() is None
    for name in ("web", "worker-0", "flower"):
        assert not any(secret in stack.log(name) for secret in (PASSWORD, SENTINEL_PASSWORD, LOGIN, SENTINEL_LOGIN))


@pytest.mark.slow
@pytest.mark.long
def test_a_master_that_falls_silent_is_left_by_api_and_workers(watched: Watched) -> None:
    with fake_stack_on(watched.url) as stack, stack.client() as client:
        stack.start_worker()
        running = client.submit(body(SLOW, 100)).id
        eventually(lambda: client.job(running).text, "it runs")
        watched.master.process.send_signal(signal.SIGSTOP)  # its connections stay open, as when its machine is gone
        later = eventually(lambda: taken(client, body("later", 30), "once"), "submissions are accepted").id
        # The worker hears of no connection that breaks: it has to give the silent one up.
        for job, text in ((running, undisturbed(SLOW, 100)), (later, undisturbed("later", 30))):
            assert client.job(job, wait_s=30).text == text


def test_a_client_follows_a_new_master_and_leaves_a_demoted_one(watched: Watched) -> None:
    client = connect(watched.url, timeout_s=1, retries=1, connections=1)
    write = "return redis.call('SET', 'key', 'value')"
    client.eval(write, 0)

    held = client.connection_pool.get_connection()
    threading.Timer(0.2, client.connection_pool.release, [held]).start()
    assert client.ping()  # it waited for the one connection

    old = watched.master
    eventually(watched.in_step, "the replica is in step")
    watched.sentinels[0].client.execute_command("SENTINEL", "FAILOVER", NAME)
    eventually(lambda: watched.master is not old, "another master is named")
    # Sentinel would cut the old one's connections; a client may also find out by itself.
    old.client.replicaof("127.0.0.1", watched.master.port)
    assert old.role == "slave"
    assert client.eval(write, 0) == "OK"

    watched.master.kill()
    with pytest.raises(redis.RedisError) as caught:
        client.ping()
    assert passes(caught.value)
    client.close()


PROCESSES = [("-m", "worker.app"), ("-m", "scripts.stack.flower"), ("-m", "web")]


@pytest.mark.parametrize("command", PROCESSES)
def test_a_url_that_does_not_fit_is_one_line_and_the_end(command: tuple[str, ...]) -> None:
    env = {"PATH": os.environ["PATH"], "ENV_FILE": os.devnull, "BROKER_URL": "sentinel://:hush@h:1"}
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode != 0 and not ended.stdout
    assert ended.stderr == "BROKER_URL: must name the master: add ?master=NAME, the name configured in the sentinels\n"
