"""Waiting for what takes as long as it takes, and ports to listen on."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(probe: Callable[[], T], what: str = "it", within_s: float = 30.0) -> T:
    """The first true value of `probe`, asked again and again until the time is over."""
    end = time.monotonic() + within_s
    while not (value := probe()):
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        time.sleep(0.01)
    return value


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
