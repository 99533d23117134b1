"""How each server is asked for a stream, and how its events are read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urljoin

import aiohttp

from tests.bench.plans import Ask, Json


@dataclass(frozen=True, slots=True)
class Reading:
    """What one event tells."""

    text: bool = False
    tokens: int = 0
    error: str = ""


class Endpoint(Protocol):
    """A server's way."""

    def stream(self, session: aiohttp.ClientSession, ask: Ask) -> Any:
        """An asynchronous context with the response that streams the answer."""
        ...

    def read(self, event: Json) -> Reading:
        """What one `data:` object of the stream tells."""
        ...


@dataclass(frozen=True)
class Own:
    """This stack: `POST /inference`; `POST /v1/jobs` and the job's stream where a request may wait, or for all."""

    url: str
    headers: dict[str, str]
    always_jobs: bool = False

    @asynccontextmanager
    async def stream(self, session: aiohttp.ClientSession, ask: Ask) -> AsyncIterator[aiohttp.ClientResponse]:
        """Greedy; batch class when it may wait."""
        body = {"messages": ask.messages, "max_tokens": ask.max_tokens, "temperature": 0}
        if ask.batch or self.always_jobs:
            path = await self._submit(session, body | ({"priority": "batch"} if ask.batch else {}))
            opening = session.get(urljoin(self.url, path), headers=self.headers)
        else:
            opening = session.post(f"{self.url}/inference", json={**body, "stream": True}, headers=self.headers)
        async with opening as response:
            yield response

    async def _submit(self, session: aiohttp.ClientSession, body: Json) -> str:
        async with session.post(f"{self.url}/v1/jobs", json=body, headers=self.headers) as accepted:
            accepted.raise_for_status()
            return str((await accepted.json())["urls"]["stream"])

    def read(self, event: Json) -> Reading:
        """A chunk, or the job at its end."""
        if "text" in event:
            return Reading(text=True)
        if event.get("object") != "job":
            return Reading()
        failed = "" if event["status"] == "succeeded" else str(event["error"] or event["status"])
        return Reading(tokens=event["usage"]["completion_tokens"] or 0, error=failed)


@dataclass(frozen=True)
class ChatCompletions:
    """OpenAI's chat completions, as the libraries' own servers have them."""

    url: str
    model: str = ""
    more: Json = field(default_factory=dict)

    @asynccontextmanager
    async def stream(self, session: aiohttp.ClientSession, ask: Ask) -> AsyncIterator[aiohttp.ClientResponse]:
        """Greedy, with the tokens counted."""
        body: Json = {
            "messages": ask.messages,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"model": self.model} if self.model else {}),
            **self.more,
        }
        async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
            yield response

    def read(self, event: Json) -> Reading:
        """A chunk, perhaps with the count."""
        choices = event.get("choices") or [{}]
        text = bool(choices[0].get("delta", {}).get("content"))
        return Reading(text, (event.get("usage") or {}).get("completion_tokens") or 0, str(event.get("error") or ""))
