"""Receivers of webhooks that confirm, fail, hang or redirect."""

from __future__ import annotations

import socket
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


@dataclass(frozen=True)
class Received:
    """One request and the status with which it was answered; None if it was not answered."""

    headers: dict[str, str]
    body: bytes
    status: int | None

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


Answer = Callable[[int, str], int | None]
"""Returns the status for the n-th request (from 1) with a webhook id; None: do not answer."""


class Receiver:
    """An HTTP server that records what it receives."""

    def __init__(self, answer: Answer = lambda _number, _id: 200, port: int = 0) -> None:
        self.received: list[Received] = []
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._answer = answer
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = receiver.take({name.lower(): value for name, value in self.headers.items()}, body)
                if status is None:
                    receiver.wait_for_end()
                    return
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", f"{receiver.url}redirected")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def confirmed(self) -> list[str]:
        """The webhook ids that were answered with 2xx, in order."""
        with self._lock:
            return [each.id for each in self.received if each.status and 200 <= each.status < 300]

    def take(self, headers: dict[str, str], body: bytes) -> int | None:
        with self._lock:
            self._counts[headers["webhook-id"]] += 1
            status = self._answer(self._counts[headers["webhook-id"]], headers["webhook-id"])
            self.received.append(Received(headers, body, status))
        return status

    def wait_for_end(self) -> None:
        self._stopped.wait(60)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def unused_url() -> str:
    """Return a URL at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}/"
