"""Waiting for what takes as long as it takes."""

from __future__ import annotations

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
