"""Background processes are killed while they archive jobs: every job is archived once, and lists are complete."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.redis import keys
from tests.plugins.stack import Stack
from tests.support.waiting import eventually

JOBS = 300


@pytest.mark.long
def test_no_job_is_lost_or_archived_twice_when_leaders_are_killed(fake_stack: Stack) -> None:
    stack = fake_stack
    stack.start_worker()
    with stack.client() as client, ThreadPoolExecutor(16) as pool:
        body = {"prompt": "hi", "max_tokens": 2}
        stack.start_background()
        eventually(lambda: stack.redis.hexists(keys.BYTES, "archive"), "jobs wait for the archive")
        ids = {job.id for job in pool.map(lambda _: client.submit(body), range(JOBS))}
        for _ in range(3):
            before = stack.redis.hget(keys.ARCHIVE, "written")
            eventually(lambda: stack.redis.hget(keys.ARCHIVE, "written") != before or not waiting(stack), "it writes")  # noqa: B023
            assert stack.stop(stack.processes[-1], signal.SIGKILL) == -signal.SIGKILL
            stack.start_background()
        eventually(
            lambda: not client.request("GET", "/v1/jobs?status=queued").json()["data"], "all jobs have ended", 60
        )
        eventually(lambda: not waiting(stack), "all jobs are archived", 60)
        for name in stack.redis.scan_iter(f"{keys.JOB}*"):
            stack.redis.delete(name)
        found, before = list[str](), ""
        while True:
            page = client.request("GET", f"/v1/jobs?limit=100{before}").json()
            found += [job["id"] for job in page["data"]]
            assert all(job["archived"] and job["output"]["text"] for job in page["data"]), json.dumps(page)[:500]
            if page["next"] is None:
                break
            before = f"&before={page['next']}"
    assert sorted(found) == sorted(ids)


def waiting(stack: Stack) -> int:
    return int(stack.redis.zcard(keys.UNARCHIVED))
