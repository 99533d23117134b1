"""The memory budget of a worker: jobs that would exceed it wait or fail, and the process never dies."""

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
CACHE_BYTES = MIB
"""Memory for caches. The tiny model needs 512 bytes per token, and 4 MiB for its context of 8192 tokens."""
LARGE, TOO_LARGE = 1200, 2200
"""Prompt lengths in tokens: a large row fits, but not two of them; a too large row never fits."""
TOKENS = 40


@pytest.fixture(scope="module")
def stack(tiny_model_path: Path) -> Iterator[Stack]:
    limit = (tiny_model_path / "model.safetensors").stat().st_size + CACHE_BYTES
    for stack in made_stack(tiny_model_path, {"MEMORY_LIMIT_BYTES": str(limit), "SLOTS": "8"}):
        stack.start_web()
        stack.start_worker()
        yield stack


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with stack.client() as client:
        yield client


def submit(client: Client, tokens: int, *, max_tokens: int = TOKENS) -> RemoteJob:
    return client.submit({"prompt": " a" * tokens, "raw": True, "temperature": 0, "max_tokens": max_tokens})


def finished(client: Client, job: RemoteJob) -> RemoteJob:
    """Wait until a job has ended."""
    while not job.status.terminal:
        job = client.job(job.id, wait_s=60)
    return job


def error_code(job: RemoteJob) -> str | None:
    """Return the error code of a failed job."""
    return job.error["code"] if job.error and job.status is Status.FAILED else None


def refusal(client: Client, tokens: int) -> str:
    """Return why a prompt is not run. The API refuses it, or the worker while it has not announced its tokenizer."""
    try:
        job = finished(client, submit(client, tokens, max_tokens=1))
    except ClientError as error:
        return str(error)
    return job.error["message"] if job.error else ""


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=stack.url, headers={"X-API-Key": stack.key}) as http:
        yield http


def test_a_row_that_exceeds_the_free_memory_waits_for_others_to_end(client: Client, http: httpx2.Client) -> None:
    jobs = [finished(client, job) for job in [submit(client, LARGE) for _ in range(3)]]
    assert {job.status for job in jobs} == {Status.SUCCEEDED}, [job.error for job in jobs]
    views = [http.get(f"/v1/jobs/{job.id}").json() for job in jobs]
    admitted = sorted(view["created_at"] + view["timings"]["queue_s"] for view in views)
    first_tokens = sorted(view["created_at"] + view["timings"]["first_token_s"] for view in views)
    assert admitted[1] > first_tokens[0] and admitted[2] > first_tokens[1], "rows ran together despite the budget"


def test_a_row_that_never_fits_fails_without_affecting_others(client: Client) -> None:
    before, too_large, after = submit(client, 600), submit(client, TOO_LARGE), submit(client, 600)
    assert error_code(finished(client, too_large)) == "out_of_memory"
    assert finished(client, before).text == finished(client, after).text != ""


def test_prompts_near_or_beyond_the_context_do_not_kill_the_worker(stack: Stack, client: Client) -> None:
    worker = stack.processes[-1].pid
    for length in (8191, 8190, 8000, TOO_LARGE):
        assert error_code(finished(client, submit(client, length, max_tokens=1))) == "out_of_memory"
    assert "longer than the model's context of 8192 tokens" in refusal(client, 8192)
    may_exceed = finished(client, submit(client, 1700, max_tokens=600))
    assert error_code(may_exceed) == "out_of_memory", "prompt and answer together may exceed the budget"
    assert finished(client, submit(client, 1700, max_tokens=8)).status is Status.SUCCEEDED
    assert [info.pid for info in stack.ready_workers()] == [worker]


def test_health_and_metrics_report_the_memory_of_mlx(stack: Stack, client: Client, http: httpx2.Client) -> None:
    finished(client, submit(client, 1000))
    weights = (stack.settings.model_path / "model.safetensors").stat().st_size
    (worker,) = http.get("/health").json()["workers"]
    memory = worker["memory"]
    assert set(memory) == {"active_bytes", "cache_bytes", "peak_bytes"}
    assert 0.99 * weights < memory["active_bytes"] <= memory["peak_bytes"]
    metrics = dict(
        re.findall(r"^mlxq_worker_(memory_\w+|kv_bytes)\{[^}]*\} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    )
    assert set(metrics) >= {"memory_active_bytes", "memory_spare_bytes", "memory_peak_bytes", "kv_bytes"}
    assert float(metrics["memory_peak_bytes"]) >= memory["peak_bytes"]
