"""Waiting for conditions instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_SHARE = 0.1
_MIN_S, _MAX_S = 0.01, 0.05


def eventually(probe: Callable[[], T], what: str = "condition", within_s: float = 30.0) -> T:
    """Call `probe` until it returns a true value, and return that. Fails after `within_s` seconds.

    The longer the wait, the rarer the calls: many of them send a request, and would slow down what they wait for.
    """
    start = time.monotonic()
    while not (value := probe()):
        waited_s = time.monotonic() - start
        assert waited_s < within_s, f"not fulfilled within {within_s} s: {what}"
        time.sleep(min(max(_SHARE * waited_s, _MIN_S), _MAX_S))
    return value
