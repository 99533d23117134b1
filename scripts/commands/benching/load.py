"""The load: N clients that each send one chat request at the same moment and read its stream to the end."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

TOPICS = (
    "the capital of France", "how bread rises", "why the sky is blue", "the rules of chess", "how a bicycle stays up",
    "the life of a star", "what a prime number is", "how rivers shape land", "the history of tea", "why cats purr",
    "how vaccines work", "the phases of the moon", "what makes glass clear", "how bees find home", "the use of zero",
    "how clouds form",
)  # fmt: skip


def prompt(index: int) -> list[dict[str, str]]:
    """The messages of client `index`: short, and different for each."""
    topic = TOPICS[index % len(TOPICS)]
    return [{"role": "user", "content": f"Question {index}: explain {topic} in a few sentences."}]


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: seconds to the first token, moments of all chunks (seconds since the start), tokens."""

    first_token_s: float
    chunks: tuple[float, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Burst:
    """What N simultaneous requests gave."""

    clients: int
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    gap_p50_s: float
    gap_p99_s: float
    tokens: int

    @classmethod
    def of(cls, samples: Sequence[Sample], wall_s: float) -> Burst:
        """Sum the samples of one burst up."""
        first = [sample.first_token_s for sample in samples]
        gaps = [b - a for s in samples for a, b in zip(s.chunks, s.chunks[1:], strict=False)] or [0.0]
        tokens = sum(sample.tokens for sample in samples)
        return cls(
            clients=len(samples),
            tokens_per_s=tokens / wall_s,
            ttft_p50_s=statistics.median(first),
            ttft_p99_s=quantile(first, 0.99),
            gap_p50_s=statistics.median(gaps),
            gap_p99_s=quantile(gaps, 0.99),
            tokens=tokens,
        )


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


class Endpoint(Protocol):
    """How to ask a server for a stream, and to read it."""

    @property
    def url(self) -> str:
        """Where requests go."""
        ...

    @property
    def headers(self) -> dict[str, str]:
        """What goes with each."""
        ...

    def body(self, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        """The request."""
        ...

    def chunk(self, event: dict[str, Any]) -> bool:
        """Whether an event carries text."""
        ...

    def tokens(self, event: dict[str, Any]) -> int | None:
        """The usage count, when the event has it."""
        ...


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


async def _request(session: aiohttp.ClientSession, endpoint: Endpoint, index: int, max_tokens: int) -> Sample:
    start = time.perf_counter()
    chunks: list[float] = []
    tokens = 0
    async with session.post(
        endpoint.url, json=endpoint.body(prompt(index), max_tokens), headers=endpoint.headers
    ) as response:
        response.raise_for_status()
        async for event in _events(response):
            if endpoint.chunk(event):
                chunks.append(time.perf_counter() - start)
            tokens = endpoint.tokens(event) or tokens
    if not chunks or not tokens:
        raise RuntimeError(f"{endpoint.url} gave no tokens")
    return Sample(chunks[0], tuple(chunks), tokens)


async def _burst(endpoint: Endpoint, clients: int, max_tokens: int, offset: int) -> Burst:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=900)
    ) as session:
        start = time.perf_counter()
        samples = await asyncio.gather(*(_request(session, endpoint, offset + i, max_tokens) for i in range(clients)))
        return Burst.of(samples, time.perf_counter() - start)


def burst(endpoint: Endpoint, clients: int, max_tokens: int, offset: int = 0) -> Burst:
    """Send `clients` requests at once, prompts numbered from `offset`, and wait for all.

    Raises:
        aiohttp.ClientError: a request failed.
    """
    return asyncio.run(_burst(endpoint, clients, max_tokens, offset))
