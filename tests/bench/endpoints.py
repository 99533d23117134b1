"""How each server is asked for a stream, and how the events of its streams are read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol
from urllib.parse import urljoin

import aiohttp

from tests.bench.plans import ChatRequest, Json

KEY_HEADER: Final = "X-API-Key"


def session(
    url: str | None = None, headers: Mapping[str, str] | None = None, connections: int = 0
) -> aiohttp.ClientSession:
    """A client session without time limits.

    Args:
        url: the base of relative paths.
        connections: the maximum; 0: any number.
    """
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=connections),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None),
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """What one event contains.

    Attributes:
        text: whether it has a piece of the answer.
        tokens: the total number of generated tokens, if the event has it.
    """

    text: bool = False
    tokens: int = 0
    error: str = ""


class Endpoint(Protocol):
    """The HTTP interface of a server."""

    def stream(
        self, session: aiohttp.ClientSession, request: ChatRequest
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Send a request; the response streams the answer."""
        ...

    def read(self, event: Json) -> Reading:
        """Interpret one `data:` object of the stream."""
        ...


@dataclass(frozen=True)
class Own:
    """This stack.

    Attributes:
        always_jobs: whether every request is submitted as a job, whose stream is read then; otherwise only those of
            the batch class are, and the others go to `POST /inference`.
    """

    url: str
    headers: dict[str, str]
    always_jobs: bool = False

    @asynccontextmanager
    async def stream(
        self, session: aiohttp.ClientSession, request: ChatRequest
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Greedy."""
        body = {"messages": request.messages, "max_tokens": request.max_tokens, "temperature": 0}
        if request.batch or self.always_jobs:
            path = await self._submit(session, body | ({"priority": "batch"} if request.batch else {}))
            opening = session.get(urljoin(self.url, path), headers=self.headers)
        else:
            opening = session.post(f"{self.url}/inference", json={**body, "stream": True}, headers=self.headers)
        async with opening as response:
            yield response

    async def _submit(self, session: aiohttp.ClientSession, body: Json) -> str:
        async with session.post(f"{self.url}/v1/jobs", json=body, headers=self.headers) as response:
            response.raise_for_status()
            return str((await response.json())["urls"]["stream"])

    def read(self, event: Json) -> Reading:
        """A chunk, or the job when it has ended."""
        if "text" in event:
            return Reading(text=True)
        if event.get("object") != "job":
            return Reading()
        failed = "" if event["status"] == "succeeded" else str(event["error"] or event["status"])
        return Reading(tokens=event["usage"]["completion_tokens"] or 0, error=failed)


@dataclass(frozen=True)
class ChatCompletions:
    """OpenAI's chat completions, which all servers have.

    Attributes:
        model: the name to send; empty: none.
    """

    url: str
    model: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @asynccontextmanager
    async def stream(
        self, session: aiohttp.ClientSession, request: ChatRequest
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Greedy, with the number of tokens at the end."""
        body: Json = {
            "messages": request.messages,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"model": self.model} if self.model else {}),
        }
        async with session.post(f"{self.url}/v1/chat/completions", json=body, headers=self.headers) as response:
            yield response

    def read(self, event: Json) -> Reading:
        """A chunk, which may have the number of tokens."""
        choices = event.get("choices") or [{}]
        text = bool(choices[0].get("delta", {}).get("content"))
        return Reading(text, (event.get("usage") or {}).get("completion_tokens") or 0, str(event.get("error") or ""))
