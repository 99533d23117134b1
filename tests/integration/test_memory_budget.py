"""A worker's memory, counted beforehand and told: what would pass the budget waits, and nothing ends the process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

pytest.importorskip("mlx_lm")

from scripts.client.api import Client, ClientError, RemoteJob
from shared.jobs.record import Status
from tests.plugins.stack import Stack, made_stack

MIB = 2**20
ROOM = 7 * MIB // 2
"""For caches, beside the weights; a token of the tiny model takes 512 bytes, its context of 8192 takes 4 MiB."""
LARGE, TOO_LARGE = 5000, 7600
"""Tokens of which a row fits alone, and not beside another; and of which it does not fit at all."""
TOKENS = 40


@pytest.fixture(scope="module")
def stack(tiny_model_path: Path) -> Iterator[Stack]:
    limit = (tiny_model_path / "model.safetensors").stat().st_size + ROOM
    for stack in made_stack(tiny_model_path, {"MEMORY_LIMIT_BYTES": str(limit), "SLOTS": "8"}):
        stack.start_web()
        stack.start_worker()
        yield stack


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with stack.client() as client:
        yield client


def submit(client: Client, tokens: int, *, max_tokens: int = TOKENS) -> RemoteJob:
    return client.submit({"prompt": " a" * tokens, "temperature": 0, "max_tokens": max_tokens})


def ended(client: Client, job: RemoteJob) -> RemoteJob:
    while not job.status.terminal:
        job = client.job(job.id, wait_s=60)
    return job


def code(job: RemoteJob) -> str | None:
    """Why it failed."""
    return job.error["code"] if job.error and job.status is Status.FAILED else None


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=stack.url, headers={"X-API-Key": stack.key}) as http:
        yield http


def test_what_would_pass_the_budget_waits_until_others_have_ended(client: Client, http: httpx2.Client) -> None:
    jobs = [ended(client, job) for job in [submit(client, LARGE) for _ in range(3)]]
    assert {job.status for job in jobs} == {Status.SUCCEEDED}, [job.error for job in jobs]
    views = [http.get(f"/v1/jobs/{job.id}").json() for job in jobs]
    admitted = sorted(view["created_at"] + view["timings"]["queue_s"] for view in views)
    spoke = sorted(view["created_at"] + view["timings"]["first_token_s"] for view in views)
    assert admitted[1] > spoke[0] and admitted[2] > spoke[1], "one after the other, though there are eight slots"


def test_a_row_that_never_fits_fails_alone_and_what_comes_after_it_goes_on(client: Client) -> None:
    before, never, after = submit(client, 900), submit(client, TOO_LARGE), submit(client, 900)
    assert code(ended(client, never)) == "out_of_memory"
    assert ended(client, before).text == ended(client, after).text != ""


def test_prompts_up_to_the_context_and_beyond_end_no_process(stack: Stack, client: Client) -> None:
    worker = stack.processes[-1].pid
    for length in (8191, 8190, 8000, TOO_LARGE):
        assert code(ended(client, submit(client, length, max_tokens=1))) == "out_of_memory"
    with pytest.raises(ClientError, match="longer than the model's context of 8192 tokens"):
        submit(client, 8192)
    assert code(ended(client, submit(client, 6600, max_tokens=1500))) == "out_of_memory", "it may grow beyond"
    assert ended(client, submit(client, 6600, max_tokens=8)).status is Status.SUCCEEDED
    assert [info.pid for info in stack.ready_workers()] == [worker]


def test_health_and_metrics_tell_the_librarys_memory(stack: Stack, client: Client, http: httpx2.Client) -> None:
    ended(client, submit(client, 1000))
    weights = (stack.settings.model_path / "model.safetensors").stat().st_size
    (worker,) = http.get("/health").json()["workers"]
    told = worker["memory"]
    assert set(told) == {"active_bytes", "cache_bytes", "peak_bytes"}
    assert 0.99 * weights < told["active_bytes"] <= told["peak_bytes"]
    metrics = dict(
        re.findall(r"^mlxq_worker_(memory_\w+|kv_bytes)\{[^}]*\} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    )
    assert set(metrics) >= {"memory_active_bytes", "memory_spare_bytes", "memory_peak_bytes", "kv_bytes"}
    assert float(metrics["memory_peak_bytes"]) >= told["peak_bytes"]
