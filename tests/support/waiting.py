"""Waiting for conditions instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(probe: Callable[[], T], what: str = "condition", within_s: float = 30.0) -> T:
    """Call `probe` until it returns a true value, and return that. Fails after `within_s` seconds."""
    end = time.monotonic() + within_s
    while not (value := probe()):
        assert time.monotonic() < end, f"not fulfilled within {within_s} s: {what}"
        time.sleep(0.01)
    return value
