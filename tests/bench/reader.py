"""One client process that reads many streams at once: `{"port", "key", "streams", "body", "pids"}` in, what it saw out.

The words of the streams are moments (the fake backend's `!clock`), so it sees how long each event was on its way. What
it tells is of the time in which every stream is under way.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from tests.bench.resources import cpu_s
from tests.bench.samples import quantile
from tests.bench.wire import RECEIVE, check_status, connect, request
from worker.runner.fake import CLOCK_LAP, TICKS_PER_S, ticks

_MOST_OPENING = 32
"""Streams asked for that have not begun: the cost of many at once is another question."""
_WORD = b" @"
_MOMENT = re.compile(rb'"text":" @(\d+);')
"""The first word of an event; further ones in it are younger."""
_DONE = b"event: done"
"""What follows has all the words once more."""
_END = b"\r\n0\r\n\r\n"


@dataclass(slots=True)
class Tally:
    """What has come on all streams while every one was under way."""

    tokens: int = 0
    delays: list[float] = field(default_factory=list)

    def count(self, data: bytes) -> None:
        """Search what came just now."""
        tick = ticks()
        self.tokens += data.count(_WORD)
        self.delays += [(tick - int(said)) % CLOCK_LAP / TICKS_PER_S for said in _MOMENT.findall(data)]


class Stream:
    """One stream."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.begun = self.done = self.ended = False
        self._before = b""

    def receive(self) -> bytes:
        """What is there."""
        data = self.connection.recv(RECEIVE)
        if not self._before:
            check_status(data, 200)
        self.begun = self.begun or _WORD in data
        seam = self._before[-len(_DONE) :] + data
        self.done = self.done or _DONE in seam
        self.ended = not data or seam.endswith(_END)
        if self.ended and not self.done:
            raise RuntimeError(f"a stream ended early: {data[-500:]!r}")
        self._before = data
        return data


class Reader:
    """Opens streams, and counts from the moment when all have begun until one has ended."""

    def __init__(self, port: int, message: bytes, streams: int, watched: dict[str, psutil.Process]) -> None:
        self._port = port
        self._message = message
        self._watched = watched
        self._unopened = self._silent = self._left = streams
        self._selector = selectors.DefaultSelector()
        self._tally = Tally()
        self._began_at = 0.0
        self._cpu: dict[str, float] = {}
        self.told: dict[str, Any] = {}

    def run(self) -> None:
        """Read all to their ends."""
        with self._selector:
            while self._left:
                self._open()
                for ready, _ in self._selector.select():
                    self._receive(ready.data)

    def _open(self) -> None:
        while self._unopened and self._silent - self._unopened < _MOST_OPENING:
            stream = Stream(connect(self._port))
            self._selector.register(stream.connection, selectors.EVENT_READ, stream)
            stream.connection.sendall(self._message)
            self._unopened -= 1

    def _receive(self, stream: Stream) -> None:
        had_begun = stream.begun
        data = stream.receive()
        self._silent -= stream.begun and not had_begun
        if stream.ended:
            self._left -= 1
            self._selector.unregister(stream.connection)
            stream.connection.close()
        if stream.done:
            self._stop_counting()
        elif self._began_at and not self.told:
            self._tally.count(data)
        elif not self._silent and not self._began_at:
            self._began_at, self._cpu = time.monotonic(), _cpu_s(self._watched)

    def _stop_counting(self) -> None:
        if not self._began_at:
            raise RuntimeError("the streams are not all under way at once: ask for more tokens")
        if not self.told:
            cpu = {name: seconds - self._cpu[name] for name, seconds in _cpu_s(self._watched).items()}
            self.told = _summed_up(self._tally, time.monotonic() - self._began_at, cpu)


def read(port: int, key: str, streams: int, body: dict[str, Any], pids: dict[str, int]) -> dict[str, Any]:
    """What the streams gave, and the CPU that this process and those with the pids took for it."""
    watched = {**{name: psutil.Process(pid) for name, pid in pids.items()}, "client": psutil.Process()}
    reader = Reader(port, request("/inference", key, {**body, "stream": True}), streams, watched)
    reader.run()
    return reader.told


def _cpu_s(watched: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: cpu_s(each) for name, each in watched.items()}


def _summed_up(tally: Tally, seconds: float, cpu: dict[str, float]) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "tokens": tally.tokens,
        "tokens_per_s": tally.tokens / seconds,
        "tokens_per_event": tally.tokens / len(tally.delays),
        "delay_p50_ms": 1000 * statistics.median(tally.delays),
        "delay_p99_ms": 1000 * quantile(tally.delays, 0.99),
        "cpu_ms_per_1000_tokens": {name: 1e6 * used / tally.tokens for name, used in cpu.items()},
    }


if __name__ == "__main__":
    print(json.dumps(read(**json.load(sys.stdin))))
