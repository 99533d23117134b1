"""Concurrent clients that retry until their job is accepted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from scripts.client.api import Client, ClientError


class Load:
    """Submits jobs from several threads. Each submission is repeated with the same Idempotency-Key until it succeeds.

    Attributes:
        accepted: job ids by Idempotency-Key.
        refused: HTTP statuses of refusals; None for a connection error.
    """

    def __init__(self, url: str, key: str, body: Callable[[str], dict[str, Any]]) -> None:
        self._client = Client(url, key, connections=64)
        self._body = body
        self._stopped = threading.Event()
        self.accepted: dict[str, str] = {}
        self.refused: set[int | None] = set()

    @contextmanager
    def running(self, threads: int, each: int) -> Iterator[None]:
        """Submit `each` jobs per thread during the block; wait at its end until all are accepted."""
        with self._client, ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(self._submit, f"{name}-{n}") for n in range(each) for name in range(threads)]
            try:
                yield
                for future in futures:
                    future.result(120)
            finally:
                self._stopped.set()

    def _submit(self, key: str) -> None:
        while not self._stopped.is_set():
            try:
                self.accepted[key] = self._client.submit(self._body(key), idempotency_key=key).id
                return
            except ClientError as error:
                self.refused.add(getattr(error, "status", None))
                self._stopped.wait(0.02)
