"""A job that is deleted the moment it ends: every request that was waiting for it receives its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2
import psutil
import pytest

from shared.jobs.store import Jobs
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.plugins.web_stack import StubWorker, WebStack
from tests.support.waiting import eventually

JOBS = 20


@contextmanager
def suspended(web: WebStack) -> Iterator[None]:
    """Stop the API process during the block, so that it notices everything that happens in it afterwards."""
    processes = psutil.Process(web.process.pid).children()
    assert processes
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def native_stream(web: WebStack) -> dict[str, Any]:
    job_id = web.submit(max_tokens=3)["id"]
    response = web.http.get(f"/v1/jobs/{job_id}/stream", headers={"Accept": "application/x-ndjson"})
    return _done(response)


def inference_stream(web: WebStack) -> dict[str, Any]:
    body = {"prompt": "hi", "max_tokens": 3, "stream": True}
    return _done(web.http.post("/inference", json=body, headers={"Accept": "application/x-ndjson"}))


def inference(web: WebStack) -> dict[str, Any]:
    answer: dict[str, Any] = web.http.post("/inference", json={"prompt": "hi", "max_tokens": 3}).json()
    return {"status": "succeeded" if "text" in answer else answer, **answer}


def long_poll(web: WebStack) -> dict[str, Any]:
    job_id = web.submit(max_tokens=3)["id"]
    answer: dict[str, Any] = web.http.get(f"/v1/jobs/{job_id}", params={"wait": 10}).json()
    return answer


def preferred_wait(web: WebStack) -> dict[str, Any]:
    body = {"prompt": "hi", "max_tokens": 3}
    answer: dict[str, Any] = web.http.post("/v1/jobs", json=body, headers={"Prefer": "wait=10"}).json()
    return answer


def _done(response: httpx2.Response) -> dict[str, Any]:
    """Return the job in the last event of a stream."""
    last = json.loads(response.text.strip().splitlines()[-1])
    assert last["event"] == "done", response.text
    job: dict[str, Any] = last["data"]
    return job


def channels(client: Redis) -> list[str]:
    """Return the channels on which API processes wait for events or ends."""
    return [name for prefix in (keys.LIVE, keys.DONE) for name in client.pubsub_channels(f"{prefix}job_*")]


READERS = [native_stream, inference_stream, inference, long_poll, preferred_wait]


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_receives_the_end_of_a_deleted_job(
    web: WebStack, start_worker: Callable[..., StubWorker], reader: Callable[[WebStack], dict[str, Any]]
) -> None:
    worker = start_worker()
    worker.hold.set()
    owner = web.key.split("_")[1]
    with web.client() as client, ThreadPoolExecutor(JOBS) as pool:
        jobs = Jobs(client, Settings(durable=False))
        results = [pool.submit(reader, web) for _ in range(JOBS)]
        eventually(lambda: len(channels(client)) == JOBS, "all readers wait")
        ids = [job.id for job in jobs.recent(owner, limit=JOBS)]
        with suspended(web):
            worker.hold.clear()
            for job_id in ids:
                eventually(lambda: jobs.get(job_id, owner).status.terminal, "it ends")  # noqa: B023
                jobs.forget(job_id, owner)
        answers = [result.result(30) for result in results]
    assert [answer.get("status") for answer in answers] == ["succeeded"] * JOBS
    assert all((answer.get("output") or answer)["text"].startswith("w") for answer in answers)
    assert len(ids) == JOBS
    for job_id in ids:
        assert web.http.get(f"/v1/jobs/{job_id}").status_code == 404
        assert web.http.get(f"/v1/jobs/{job_id}/stream").status_code == 404
    assert web.http.get("/v1/jobs").json()["data"] == []
