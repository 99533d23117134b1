"""The load generator: sends the requests of a plan over HTTP and reads each stream to its end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import aiohttp

from tests.bench.endpoints import Endpoint, session
from tests.bench.plans import ChatRequest, Client, Json, Plan
from tests.bench.samples import Outcome, Sample

ANSWER_S = 900
"""A request that takes longer has failed."""


class Load:
    """One plan in progress."""

    def __init__(self, endpoint: Endpoint, client: aiohttp.ClientSession) -> None:
        self._endpoint = endpoint
        self._client = client
        self._start = time.perf_counter()
        self._samples: list[Sample] = []

    async def run(self, plan: Plan) -> Outcome:
        """Send everything. A request that fails is a sample with an error."""
        tasks = [asyncio.create_task(self._run_client(i, client)) for i, client in enumerate(plan.clients)]
        awaited = [task for task, client in zip(tasks, plan.clients, strict=True) if not client.background]
        try:
            await asyncio.gather(*awaited)
            wall_s = self._now()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return Outcome(self._samples, wall_s)

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _run_client(self, index: int, client: Client) -> None:
        for request in client.requests:
            if (early_s := request.at_s - self._now()) > 0:
                await asyncio.sleep(early_s)
            # Latency counts from the planned time, even if the request is sent late.
            sample = Sample(index, request.kind, request.at_s or self._now())
            self._samples.append(sample)
            await self._send(request, sample)

    async def _send(self, request: ChatRequest, sample: Sample) -> None:
        try:
            async with asyncio.timeout(ANSWER_S), self._endpoint.stream(self._client, request) as response:
                response.raise_for_status()
                await self._read(response, sample)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            sample.error = str(error) or type(error).__name__

    async def _read(self, response: aiohttp.ClientResponse, sample: Sample) -> None:
        async for event in _events(response):
            reading = self._endpoint.read(event)
            if reading.text:
                sample.chunks.append(self._now())
            sample.tokens = reading.tokens or sample.tokens
            sample.error = reading.error or sample.error
        if not sample.error and not (sample.chunks and sample.tokens):
            sample.error = "the stream ended without an answer"
        if not sample.error:
            sample.ended_s = self._now()


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[Json]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            with suppress(ValueError):
                yield json.loads(line[6:])


async def _send(endpoint: Endpoint, plan: Plan) -> Outcome:
    async with session() as client:
        return await Load(endpoint, client).run(plan)


def send(endpoint: Endpoint, plan: Plan) -> Outcome:
    """Run a plan; returns when every request that it waits for has succeeded or failed."""
    return asyncio.run(_send(endpoint, plan))
