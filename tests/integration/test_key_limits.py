"""One API key cannot take the queue from the others: its waiting jobs and its priority are limited."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from shared.jobs.limits import OwnerLimits
from shared.jobs.record import Priority
from tests.plugins.stack import Stack, made_stack
from tests.plugins.web_stack import WebStack, running_web
from tests.support.waiting import eventually


def submit(web: WebStack, key: str, **more: Any) -> httpx2.Response:
    return web.http.post("/v1/jobs", json={"prompt": "hi", **more}, headers={"X-API-Key": key})


def accepted(web: WebStack, key: str, limit: int) -> int:
    """Submit until the first rejection, at most `limit` times; return the number of accepted jobs."""
    for count in range(limit):
        response = submit(web, key)
        if response.status_code != 202:
            assert (response.status_code, response.json()["code"]) == (429, "key_queue_full")
            assert response.headers["Retry-After"] == "10"
            return count
    return limit


def test_waiting_jobs_of_one_key_are_limited_while_others_are_accepted() -> None:
    with running_web(MAX_QUEUE="40") as web, web.client() as redis:
        one, two = (web.keys.create(name, ["infer"]) for name in ("one", "two"))
        few = web.keys.create("few", ["infer"], limits=OwnerLimits(max_queued=3))
        assert accepted(web, one, 20) == 10  # a quarter of the queue
        assert (accepted(web, two, 5), accepted(web, few, 5)) == (5, 3)
        job = web.http.get("/v1/jobs", headers={"X-API-Key": one}).json()["data"][0]["id"]
        assert web.http.post(f"/v1/jobs/{job}/cancel", headers={"X-API-Key": one}).status_code == 200
        assert accepted(web, one, 5) == 1

        # An operator raises the limit in the file; it applies to the next request.
        file = web.home / "keys.json"
        content = json.loads(file.read_text())
        next(entry for entry in content["keys"] if entry["name"] == "few")["max_queued"] = 5
        file.write_text(json.dumps(content))
        assert accepted(web, few, 5) == 2

        # Older processes do not count: missing counts are made up at once, wrong ones when they would reject a job.
        (name,) = redis.scan_iter("mlxq:queued:*")
        redis.delete(name)
        assert accepted(web, one, 5) == 0
        redis.hset(name, mapping={two.split("_")[1]: 1000, "counted_at": 0})
        assert accepted(web, two, 2) == 2


def test_repeated_request_is_answered_although_the_key_is_at_its_limit() -> None:
    with running_web() as web:
        key = web.keys.create("one", ["infer"], limits=OwnerLimits(max_queued=1))
        headers = {"X-API-Key": key, "Idempotency-Key": "k"}
        first, again = (web.http.post("/v1/jobs", json={"prompt": "hi"}, headers=headers) for _ in range(2))
        assert (first.status_code, again.status_code) == (202, 202) and first.json()["id"] == again.json()["id"]
        assert accepted(web, key, 1) == 0


def test_priority_is_limited_per_key() -> None:
    with running_web() as web:
        for highest in Priority:
            key = web.keys.create(highest.label, ["infer"], max_priority=highest)
            for priority in Priority:
                response = submit(web, key, priority=priority.label)
                assert (response.status_code == 202) is (priority >= highest)
                if priority < highest:
                    problem = response.json()
                    assert (response.status_code, problem["code"]) == (403, "priority_not_allowed")
                    assert problem["field"] == "priority" and highest.label in problem["detail"]
            default = submit(web, key).json()["priority"]
            assert default == max(highest, Priority.NORMAL).label
        assert submit(web, web.keys.create("new", ["infer"]), priority="high").status_code == 403
        assert submit(web, web.key, priority="high").status_code == 202  # the operator's own key


@pytest.fixture
def stack(tmp_path_factory: pytest.TempPathFactory) -> Any:
    yield from made_stack(tmp_path_factory.mktemp("model"), {"BACKEND": "fake", "MAX_QUEUE_PER_KEY": "4"})


def test_jobs_that_run_and_return_to_the_queue_are_counted_exactly(stack: Stack) -> None:
    stack.start_web()
    body = {"prompt": "!pause=0.02", "max_tokens": 50}
    with stack.client() as client:
        jobs = [client.submit(body).id for _ in range(4)]
        worker = stack.start_worker(SLOTS="4", LEASE_S="1")
        eventually(lambda: all(client.job(job).text for job in jobs), "all run")
        jobs += [client.submit(body).id for _ in range(4)]
        stack.stop(worker)  # it hands its jobs back
        counts = stack.redis.hgetall(f"mlxq:queued:{stack.model}")
        queued = [job for job in jobs if client.job(job).status == "queued"]
        assert counts[stack.key.split("_")[1]] == str(len(queued)) and len(queued) >= 4
        stack.start_worker(SLOTS="8")
        eventually(lambda: all(client.job(job).status.terminal for job in jobs), "all end")
        assert not stack.redis.exists(f"mlxq:queued:{stack.model}")
