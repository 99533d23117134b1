"""Every key in Redis after all jobs are gone: only those remain that shared/queue/keys.py documents as permanent."""

from __future__ import annotations

import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest

from scripts.client.api import Client
from scripts.stack.ports import free_port
from shared.jobs.store import DELETED_S
from shared.redis import keys
from shared.redis.client import Redis
from tests.plugins.stack import Stack, made_stack
from tests.plugins.web_stack import running_web
from tests.support.waiting import eventually

JOBS = 100
FLOWER_PASSWORD = "hush"
CONSTANT: Final = {
    keys.BYTES, keys.ENDED, keys.ATTEMPTS, keys.TOKENS, keys.MEMORY, keys.PASSED, keys.MODELS, keys.ROUTED,
    keys.SPEED + "*", keys.SERVABLE, keys.USAGE + "*", keys.PREFIX_CUTOFFS,
    # as long as workers live, and a few lease lifetimes longer
    keys.LEASES, keys.EXTENSIONS, keys.WORKER + "*", keys.WORKERS, keys.HOST + "*", keys.HOSTS,
    "LIMITS:*",
    # Celery's: a few members per living process
    "_kombu.binding.*", "_kombu.binding_deadlines", "_kombu.binding_permanent.*",
}  # fmt: skip
"""Keys that may remain, all of a constant size."""


def remaining(client: Redis) -> set[str]:
    """Return the keys that are not in `CONSTANT`."""
    patterns = [re.compile(re.escape(name).replace(r"\*", ".*")) for name in CONSTANT]
    return {key for key in client.scan_iter("*") if not any(pattern.fullmatch(key) for pattern in patterns)}


def bindings(client: Redis) -> int:
    """Return the number of queues that Celery has registered."""
    return sum(int(client.scard(key)) for key in client.scan_iter("_kombu.binding.*"))


def test_jobs_that_no_worker_saw_leave_nothing() -> None:
    with running_web() as web, web.client() as client:

        def submit_cancel_delete(n: int) -> None:
            body = {"prompt": "x" * 100, "max_tokens": 3}
            job = web.http.post("/v1/jobs", json=body, headers={"Idempotency-Key": f"{n}"}).json()["id"]
            assert web.http.post(f"/v1/jobs/{job}/cancel").status_code == 200
            assert web.http.delete(f"/v1/jobs/{job}").status_code == 204

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(submit_cancel_delete, range(JOBS)))
        eventually(lambda: not client.exists(keys.ENDS), "the API process has read the ends")
        eventually(lambda: not remaining(client), "deleted jobs are gone", within_s=DELETED_S + 20)
        assert client.hget(keys.BYTES, "total") is None
        assert sum(int(client.memory_usage(key)) for key in client.scan_iter("*")) < 2_000


@pytest.fixture
def stack() -> Any:
    flower = {"FLOWER_PORT": str(free_port()), "FLOWER_PASSWORD": FLOWER_PASSWORD}
    yield from made_stack(Path("fake"), {"BACKEND": "fake", "LEASE_S": "1", "RETENTION_S": "2", **flower})


def use(stack: Stack, client: Client, number: int) -> None:
    """Run, cancel, fail and expire jobs; the retention deletes some of them, and requests the others."""
    bodies: list[dict[str, Any]] = [
        {"prompt": "ends"}, {"prompt": "!row-fails=1 fails"}, {"prompt": "expires", "start_within_s": 0.01},
    ]  # fmt: skip
    jobs = [
        client.submit({"max_tokens": 3, **body}, idempotency_key=f"{number}-{body['prompt'][:8]}") for body in bodies
    ]
    for job in jobs:
        eventually(lambda i=job.id: client.job(i).status.terminal, "it ends")  # type: ignore[misc]
    client.request("DELETE", f"/v1/jobs/{jobs[0].id}")
    httpx2.get(f"{stack.url}/health", timeout=30)
    httpx2.get(f"{stack.flower_url}/workers?refresh=1", auth=("admin", FLOWER_PASSWORD), timeout=30)


def answers(stack: Stack) -> bool:
    try:
        return httpx2.get(f"{stack.url}/livez", timeout=30).is_success
    except httpx2.TransportError:
        return False


def test_killed_processes_leave_a_constant(stack: Stack) -> None:
    counts = []
    for number in range(3):
        web, worker, flower = stack.start_web(), stack.start_worker(MLXQ_WORKER_INDEX="0"), stack.start_flower()
        with stack.client() as client:
            use(stack, client, number)
        for process in (flower, worker, web):
            stack.stop(process, signal.SIGKILL)
        eventually(lambda: not answers(stack), "gunicorn's orphaned process has ended, so the next one gets the port")
        counts.append(bindings(stack.redis) - int(stack.redis.scard("_kombu.binding.reply.celery.pidbox")))
    assert counts[1] == counts[2], "a start adds no binding"
    stack.start_web()
    eventually(lambda: not remaining(stack.redis), "all jobs are gone", within_s=DELETED_S + 20)
