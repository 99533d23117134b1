"""Many clients who submit and do not give up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from scripts.client.api import Client, ClientError


class Load:
    """Threads that submit job after job, each with an Idempotency-Key that it repeats until it is answered."""

    def __init__(self, url: str, key: str, body: Callable[[str], dict[str, Any]]) -> None:
        self._client = Client(url, key, connections=64)
        self._body = body
        self._ended = threading.Event()
        self.accepted: dict[str, str] = {}
        """Idempotency-Key → id of the job."""
        self.refused: set[int | None] = set()

    @contextmanager
    def running(self, threads: int, each: int) -> Iterator[None]:
        with self._client, ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(self._send, f"{name}-{n}") for n in range(each) for name in range(threads)]
            try:
                yield
                for future in futures:
                    future.result(120)
            finally:
                self._ended.set()

    def _send(self, key: str) -> None:
        while not self._ended.is_set():
            try:
                self.accepted[key] = self._client.submit(self._body(key), idempotency_key=key).id
                return
            except ClientError as error:
                self.refused.add(getattr(error, "status", None))
                self._ended.wait(0.02)
