"""Measures what prefill costs on this device with this model; see `worker.runner.base.PrefillCost`."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import mlx.core as mx

from worker.runner import forward
from worker.runner.base import PrefillCost
from worker.runner.kv_cache import KVCache

BEHIND = 1024
"""Cached tokens behind which a chunk is measured; the cost per cached token is linear."""
_TIMES = 4
"""Measurements of one action; the first compiles kernels."""


def measuring(model: Any, most: int) -> Generator[None, None, PrefillCost]:
    """Process chunks of one token and of `most`, and one far behind the beginning; in pieces."""
    one = yield from _seconds(model, 1, 0)
    many = yield from _seconds(model, most, 0)
    token = max(many - one, 0.0) / max(most - 1, 1)
    some = max(most // 4, 1)
    far = yield from _seconds(model, some, BEHIND)
    return PrefillCost(
        fixed=max(one - token, 0.0),
        token=max(token, many / most / 100),  # a token costs something, whatever was measured
        behind=max(far - one - (some - 1) * token, 0.0) / (some * BEHIND),
    )


def _seconds(model: Any, tokens: int, position: int) -> Generator[None, None, float]:
    cache = KVCache.empty(model)
    forward.fill(model, cache, [(0,) * tokens])
    cache.reserve(position + tokens)
    return (yield from measured(partial(_read_at, model, cache, tokens, position)))


def _read_at(model: Any, cache: KVCache, tokens: int, position: int) -> None:
    cache.pretend(position)
    forward.fill(model, cache, [(0,) * tokens])
    mx.eval(cache.states)


def measured(action: Callable[[], object]) -> Generator[None, None, float]:
    """Seconds that an action takes: the least of several times, because other load on the machine only adds to it."""
    least = float("inf")
    for _ in range(_TIMES):
        yield
        start = time.perf_counter()
        action()
        least = min(least, time.perf_counter() - start)
    return least
