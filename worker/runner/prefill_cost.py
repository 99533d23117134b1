"""Measures the cost of prefill on this device with this model; see `worker.runner.cost.PrefillCost`."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import mlx.core as mx

from worker.runner import forward
from worker.runner.cost import PrefillCost
from worker.runner.kv_cache import KVCache

CONTEXT_TOKENS = 1024
"""Cached tokens before the chunk that measures attention; its cost is linear in them."""
_REPETITIONS = 4
"""Runs per measurement; the first one compiles kernels."""


def measure(model: Any, chunk: int) -> Generator[None, None, PrefillCost]:
    """Measure passes over one token, over `chunk` tokens, and over a few tokens after `CONTEXT_TOKENS` cached ones.

    Yields:
        None, before each pass.

    Returns:
        The cost.
    """
    one = yield from _seconds(model, 1, 0)
    many = yield from _seconds(model, chunk, 0)
    token = max(many - one, 0.0) / max(chunk - 1, 1)
    few = max(chunk // 4, 1)
    with_context = yield from _seconds(model, few, CONTEXT_TOKENS)
    return PrefillCost(
        fixed=max(one - token, 0.0),
        token=max(token, many / chunk / 100),  # never 0, even if the measurement says so
        attention=max(with_context - one - (few - 1) * token, 0.0) / (few * CONTEXT_TOKENS),
    )


def _seconds(model: Any, tokens: int, position: int) -> Generator[None, None, float]:
    cache = KVCache.empty(model)
    forward.fill(model, cache, [(0,) * tokens])
    cache.reserve(position + tokens)
    return (yield from shortest_seconds(partial(_run_pass, model, cache, tokens, position)))


def _run_pass(model: Any, cache: KVCache, tokens: int, position: int) -> None:
    cache.set_columns(position)
    forward.fill(model, cache, [(0,) * tokens])
    mx.eval(cache.states)


def shortest_seconds(action: Callable[[], object]) -> Generator[None, None, float]:
    """Return the shortest duration of several runs, because other load on the machine only adds to it.

    Yields:
        None, before each run.
    """
    shortest = float("inf")
    for _ in range(_REPETITIONS):
        yield
        start = time.perf_counter()
        action()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest
