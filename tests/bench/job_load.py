"""Many jobs over HTTP: submitting, waiting for their ends, and reading their records."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import aiohttp

from tests.bench.endpoints import Own, session
from tests.bench.plans import Json

T = TypeVar("T")

_CONNECTIONS: Final = 8
_POLL_S: Final = 30
_PAGE: Final = 100
_ENDED: Final = frozenset({"succeeded", "failed", "cancelled", "expired"})


class Unfinished(Exception):
    """Jobs did not end in time."""


def submit(endpoint: Own, bodies: Sequence[Json]) -> list[str]:
    """Submit jobs; their ids, in the order of `bodies`."""

    async def one(client: aiohttp.ClientSession, body: Json) -> str:
        async with client.post("/v1/jobs", json=body) as accepted:
            accepted.raise_for_status()
            return str((await accepted.json())["id"])

    return asyncio.run(_all(endpoint, one, bodies))


def records(endpoint: Own, ids: Sequence[str]) -> list[Json]:
    """The current records of jobs."""
    return asyncio.run(_all(endpoint, lambda client, job: _get(client, job, 0), ids))


def running(endpoint: Own) -> int:
    """How many of the newest 100 jobs are running."""

    async def newest(client: aiohttp.ClientSession, limit: int) -> int:
        async with client.get("/v1/jobs", params={"limit": str(limit)}) as answer:
            answer.raise_for_status()
            return sum(each["status"] == "running" for each in (await answer.json())["data"])

    return asyncio.run(_all(endpoint, newest, [_PAGE]))[0]


def cancel(endpoint: Own, job: str) -> None:
    """Cancel a job."""

    async def one(client: aiohttp.ClientSession, job: str) -> None:
        async with client.post(f"/v1/jobs/{job}/cancel") as answer:
            answer.raise_for_status()

    asyncio.run(_all(endpoint, one, [job]))


def ready_models(endpoint: Own) -> set[str]:
    """The models of ready workers."""

    async def health(client: aiohttp.ClientSession, path: str) -> Json:
        async with client.get(path) as answer:
            found: Json = await answer.json()
            return found

    (found,) = asyncio.run(_all(endpoint, health, ["/health"]))
    return {worker["model"] for worker in found["workers"] if worker["state"] == "ready"}


def ended(endpoint: Own, ids: Sequence[str], within_s: float) -> list[Json]:
    """Wait until all jobs have ended; their records.

    Raises:
        Unfinished: it takes longer than `within_s`.
    """

    async def one(client: aiohttp.ClientSession, job: str) -> Json:
        while (found := await _get(client, job, _POLL_S))["status"] not in _ENDED:
            pass
        return found

    async def within() -> list[Json]:
        async with asyncio.timeout(within_s):
            return await _all(endpoint, one, ids)

    try:
        return asyncio.run(within())
    except TimeoutError:
        raise Unfinished(f"jobs have not ended within {within_s:.0f} s") from None


async def _get(client: aiohttp.ClientSession, job: str, wait_s: float) -> Json:
    async with client.get(f"/v1/jobs/{job}", params={"wait": str(wait_s)}) as answer:
        answer.raise_for_status()
        found: Json = await answer.json()
        return found


async def _all(
    endpoint: Own, act: Callable[[aiohttp.ClientSession, Any], Awaitable[T]], arguments: Sequence[Any]
) -> list[T]:
    """Call `act` for each argument, over a few connections."""
    async with session(endpoint.url, endpoint.headers, _CONNECTIONS) as client:
        return list(await asyncio.gather(*(act(client, each) for each in arguments)))
