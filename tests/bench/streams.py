"""The memory of many idle streams: one API process, jobs that no worker claims, and a reader for each job."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import psutil

from tests.bench.endpoints import KEY_HEADER, session
from tests.bench.modelless import KEY, modelless


async def _open_streams(port: int, streams: int, api: psutil.Process) -> dict[str, Any]:
    before_mb = _resident_mb(api)
    async with session(f"http://127.0.0.1:{port}", {KEY_HEADER: KEY}) as client:
        paths = [await _submit(client) for _ in range(streams)]
        responses = await asyncio.gather(*map(client.get, paths))
        for response in responses:
            response.raise_for_status()
            await response.content.readline()  # the first line has arrived: the stream is open
        resident_mb = _resident_mb(api)
        for response in responses:
            response.close()
    return {"streams": streams, "before_mb": before_mb, "rss_mb": resident_mb}


async def _submit(client: aiohttp.ClientSession) -> str:
    """The path of the stream of a new job."""
    async with client.post("/v1/jobs", json={"prompt": "wait"}) as response:
        response.raise_for_status()
        return str((await response.json())["urls"]["stream"])


def _resident_mb(process: psutil.Process) -> float:
    return float(process.memory_info().rss / 1e6)


def idle_streams(streams: int) -> dict[str, Any]:
    """Resident memory of one API process before and with this many idle streams."""
    with modelless(worker=False) as stack:
        return asyncio.run(_open_streams(stack.port, streams, stack.processes["web"]))
