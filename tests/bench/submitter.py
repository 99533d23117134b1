"""One client process that submits jobs over N connections, each its next when the last is accepted."""

from __future__ import annotations

import json
import re
import selectors
import socket
import statistics
import sys
import time
from typing import Any

from tests.bench.samples import quantile
from tests.bench.wire import RECEIVE, check_status, connect, request

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


class Submitter:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._sent_at = 0.0
        self._answer = b""

    def send(self, message: bytes) -> None:
        """Submit the next."""
        self._answer, self._sent_at = b"", time.perf_counter()
        self.connection.sendall(message)

    def receive(self) -> float | None:
        """Seconds that the answer took, once it is whole."""
        data = self.connection.recv(RECEIVE)
        self._answer += data
        head, gap, body = self._answer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not data or (gap and length is None):
            raise RuntimeError(f"no answer: {self._answer!r}")
        if not gap or length is None or len(body) < int(length[1]):
            return None
        check_status(self._answer, 202)
        return time.perf_counter() - self._sent_at


def submit(port: int, key: str, clients: int, jobs: int, body: dict[str, Any]) -> dict[str, Any]:
    """Submit so many jobs in all."""
    message = request("/v1/jobs", key, body)
    took: list[float] = []
    with selectors.DefaultSelector() as selector:
        opened = [Submitter(connect(port)) for _ in range(clients)]
        start = time.perf_counter()
        for each in opened:
            selector.register(each.connection, selectors.EVENT_READ, each)
            each.send(message)
        left = jobs - clients
        while len(took) < jobs:
            for ready, _ in selector.select():
                submitter: Submitter = ready.data
                seconds = submitter.receive()
                if seconds is not None:
                    took.append(seconds)
                    if left > 0:
                        left -= 1
                        submitter.send(message)
        wall_s = time.perf_counter() - start
        for each in opened:
            each.connection.close()
    return {
        "jobs": jobs,
        "clients": clients,
        "jobs_per_s": jobs / wall_s,
        "p50_ms": 1000 * statistics.median(took),
        "p99_ms": 1000 * quantile(took, 0.99),
    }


if __name__ == "__main__":
    print(json.dumps(submit(**json.load(sys.stdin))))
