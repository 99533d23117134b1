"""Many jobs at once over HTTP: submitted, waited for, and read as records."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import aiohttp

from tests.bench.endpoints import Own

Json = dict[str, Any]
T = TypeVar("T")

_CONNECTIONS: Final = 8
_POLL_S: Final = 30
_PAGE: Final = 100
_ENDED: Final = frozenset({"succeeded", "failed", "cancelled", "expired"})


class Unfinished(Exception):
    """Jobs that have not ended in time."""


def submit(endpoint: Own, bodies: Sequence[Json]) -> list[str]:
    """Submit jobs over a few connections; their ids, in the order of `bodies`."""

    async def one(session: aiohttp.ClientSession, body: Json) -> str:
        async with session.post("/v1/jobs", json=body) as accepted:
            accepted.raise_for_status()
            return str((await accepted.json())["id"])

    return asyncio.run(_all(endpoint, one, bodies))


def records(endpoint: Own, ids: Sequence[str]) -> list[Json]:
    """The jobs as they are now."""
    return asyncio.run(_all(endpoint, lambda session, job: _get(session, job, 0), ids))


def running(endpoint: Own) -> int:
    """How many of the newest 100 jobs run."""

    async def newest(session: aiohttp.ClientSession, limit: int) -> int:
        async with session.get("/v1/jobs", params={"limit": str(limit)}) as answer:
            answer.raise_for_status()
            return sum(each["status"] == "running" for each in (await answer.json())["data"])

    return asyncio.run(_all(endpoint, newest, [_PAGE]))[0]


def cancel(endpoint: Own, job: str) -> None:
    """Ask for a job's end."""

    async def one(session: aiohttp.ClientSession, job: str) -> None:
        async with session.post(f"/v1/jobs/{job}/cancel") as answer:
            answer.raise_for_status()

    asyncio.run(_all(endpoint, one, [job]))


def ready_models(endpoint: Own) -> set[str]:
    """The models that ready workers have."""

    async def health(session: aiohttp.ClientSession, path: str) -> Json:
        async with session.get(path) as answer:
            found: Json = await answer.json()
            return found

    (found,) = asyncio.run(_all(endpoint, health, ["/health"]))
    return {worker["model"] for worker in found["workers"] if worker["state"] == "ready"}


def ended(endpoint: Own, ids: Sequence[str], within_s: float) -> list[Json]:
    """The jobs once all of them have ended.

    Raises:
        Unfinished: that takes longer than `within_s`.
    """

    async def one(session: aiohttp.ClientSession, job: str) -> Json:
        while (found := await _get(session, job, _POLL_S))["status"] not in _ENDED:
            pass
        return found

    async def within() -> list[Json]:
        async with asyncio.timeout(within_s):
            return await _all(endpoint, one, ids)

    try:
        return asyncio.run(within())
    except TimeoutError:
        raise Unfinished(f"jobs have not ended within {within_s:.0f} s") from None


async def _get(session: aiohttp.ClientSession, job: str, wait_s: float) -> Json:
    async with session.get(f"/v1/jobs/{job}", params={"wait": str(wait_s)}) as answer:
        answer.raise_for_status()
        found: Json = await answer.json()
        return found


async def _all(
    endpoint: Own, act: Callable[[aiohttp.ClientSession, Any], Awaitable[T]], arguments: Sequence[Any]
) -> list[T]:
    """`act` for each argument, a few at a time."""
    async with aiohttp.ClientSession(
        endpoint.url,
        connector=aiohttp.TCPConnector(limit=_CONNECTIONS),
        headers=endpoint.headers,
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        return list(await asyncio.gather(*(act(session, each) for each in arguments)))
