"""A client process that reads many streams at once: the parameters of `read` as JSON in, figures out.

The words of the streams are timestamps (the fake backend's `!clock`), so the reader sees how long each event took to
arrive. Its figures cover the time in which every stream is running.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import time
from typing import Any, Final

import aiohttp
import psutil

from tests.bench.endpoints import KEY_HEADER, session
from tests.bench.resources import cpu_s
from tests.bench.samples import quantile
from worker.runner.fake import CLOCK_LAP, TICKS_PER_S, ticks

_MAX_OPENING: Final = 32
"""Streams that were requested and have no token yet: the cost of opening many at once is another question."""
_WORD: Final = b" @"
_TIMESTAMP: Final = re.compile(rb'"(?:text|content)":" @(\d+);')
"""The first word of an event; if it has more, those are younger."""
_DONE: Final = re.compile(rb"event: done|data: \[DONE\]")
"""The last event, which in a job's stream repeats the whole text."""
_MAX_DONE: Final = 12
"""Bytes of `_DONE`."""


class Reader:
    """Reads streams to their ends and counts from the moment when all have begun until the first one ends.

    Attributes:
        figures: the result, once a stream has ended.
    """

    def __init__(self, path: str, streams: int, body: dict[str, Any], watched: dict[str, psutil.Process]) -> None:
        self._path = path
        self._silent = streams
        self._body = body
        self._watched = watched
        self._opening = asyncio.Semaphore(_MAX_OPENING)
        self._tokens = 0
        self._delays: list[float] = []
        self._began_at = 0.0
        self._cpu: dict[str, float] = {}
        self.figures: dict[str, Any] = {}

    async def read(self, client: aiohttp.ClientSession) -> None:
        """Read one stream.

        Raises:
            RuntimeError: it was refused or ended early, or the streams do not overlap.
        """
        await self._opening.acquire()
        begun = done = False
        before = b""
        async with client.post(self._path, json=self._body) as response:
            if response.status != 200:
                raise RuntimeError(await response.text())
            async for data in response.content.iter_any():
                done = done or _DONE.search(before[-_MAX_DONE:] + data) is not None
                before = data
                if done:
                    self._stop()
                elif begun:
                    self._count(data)
                elif _WORD in data:
                    begun = True
                    self._begin()
        if not done:
            raise RuntimeError(f"a stream ended early: {before[-500:]!r}")

    def _begin(self) -> None:
        self._opening.release()
        self._silent -= 1
        if not self._silent:
            self._began_at, self._cpu = time.monotonic(), self._cpu_s()

    def _count(self, data: bytes) -> None:
        if not self._began_at or self.figures:
            return
        now = ticks()
        self._tokens += data.count(_WORD)
        self._delays += [(now - int(sent)) % CLOCK_LAP / TICKS_PER_S for sent in _TIMESTAMP.findall(data)]

    def _stop(self) -> None:
        if not self._began_at:
            raise RuntimeError("the streams do not all run at once: request more tokens")
        if not self.figures:
            seconds = time.monotonic() - self._began_at
            cpu = {name: used - self._cpu[name] for name, used in self._cpu_s().items()}
            self.figures = {
                "seconds": seconds,
                "tokens": self._tokens,
                "tokens_per_s": self._tokens / seconds,
                "tokens_per_event": self._tokens / len(self._delays),
                "delay_p50_ms": 1000 * statistics.median(self._delays),
                "delay_p99_ms": 1000 * quantile(self._delays, 0.99),
                "cpu_ms_per_1000_tokens": {name: 1e6 * used / self._tokens for name, used in cpu.items()},
            }

    def _cpu_s(self) -> dict[str, float]:
        return {name: cpu_s(process) for name, process in self._watched.items()}


async def read(
    port: int, key: str, path: str, streams: int, body: dict[str, Any], pids: dict[str, int]
) -> dict[str, Any]:
    """The figures of all streams, with the CPU time of this process and of those with the given pids."""
    watched = {**{name: psutil.Process(pid) for name, pid in pids.items()}, "client": psutil.Process()}
    reader = Reader(path, streams, {**body, "stream": True}, watched)
    url = f"http://127.0.0.1:{port}"
    async with session(url, {KEY_HEADER: key}) as client, asyncio.TaskGroup() as readers:
        for _ in range(streams):
            readers.create_task(reader.read(client))
    return reader.figures


if __name__ == "__main__":
    print(json.dumps(asyncio.run(read(**json.load(sys.stdin)))))
