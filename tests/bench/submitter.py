"""A client process that submits jobs over N connections, each of which waits for the answer before its next job."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

import aiohttp

from tests.bench.endpoints import KEY_HEADER, session
from tests.bench.samples import quantile


async def _submit_each(
    client: aiohttp.ClientSession, body: dict[str, Any], jobs: Iterable[int], took_s: list[float]
) -> None:
    for _ in jobs:
        start = time.perf_counter()
        async with client.post("/v1/jobs", json=body) as response:
            answer = await response.text()
        took_s.append(time.perf_counter() - start)
        if response.status != 202:
            raise RuntimeError(answer)


async def submit(port: int, key: str, clients: int, jobs: int, body: dict[str, Any]) -> dict[str, Any]:
    """Submit this many jobs in all; jobs per second and latencies."""
    took_s: list[float] = []
    left = iter(range(jobs))  # shared: a connection that is faster sends more
    async with session(f"http://127.0.0.1:{port}", {KEY_HEADER: key}) as client:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as submitters:
            for _ in range(clients):
                submitters.create_task(_submit_each(client, body, left, took_s))
        wall_s = time.perf_counter() - start
    return {
        "jobs": jobs,
        "clients": clients,
        "jobs_per_s": jobs / wall_s,
        "p50_ms": 1000 * statistics.median(took_s),
        "p99_ms": 1000 * quantile(took_s, 0.99),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(submit(**json.load(sys.stdin)))))
