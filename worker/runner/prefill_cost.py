"""What it costs to read tokens of a prompt on this device, with this model.

A chunk is a pass, which reads the weights once; each of its tokens is computed, and looks at every token before it. The
last part grows with what has been read, and on a CPU it is most of the cost of a long prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from worker.runner import kv_cache as kv

BEHIND = 1024
"""Tokens that the cache pretends to have when it is measured what they cost: no more is needed, it grows evenly."""
_TIMES = 3
"""The least of so many: others on the machine only ever make it more."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a chunk, beside nothing else; only their ratios matter to `worker.engine.prefill_budget`.

    Attributes:
        fixed: of a chunk, however small.
        token: of each of its tokens.
        behind: of each token for each one in the cache.
    """

    fixed: float
    token: float
    behind: float

    def seconds(self, tokens: int, position: int) -> float:
        """Of so many tokens behind so many others; 0 of none."""
        return self.fixed + tokens * self._each(position) if tokens else 0.0

    def tokens(self, seconds: float, position: int) -> float:
        """How many take so long behind so many others."""
        return (seconds - self.fixed) / self._each(position)

    def efficient(self, position: int) -> float:
        """With fewer tokens two thirds of a chunk's time is no token's."""
        return self.fixed / 2 / self._each(position)

    def _each(self, position: int) -> float:
        return self.token + position * self.behind


UNKNOWN = Cost(0.0, 1.0, 0.0)
"""Nothing was measured: one token is like another."""


def measuring(model: Any, most: int) -> Generator[None, None, Cost]:
    """Read chunks of one token and of `most`, and one far behind the beginning; in pieces."""
    one = yield from _seconds(model, 1, 0)
    many = yield from _seconds(model, most, 0)
    token = max(many - one, 0.0) / max(most - 1, 1)
    some = max(most // 4, 1)
    far = yield from _seconds(model, some, BEHIND)
    return Cost(
        fixed=max(one - token, 0.0),
        token=max(token, _least(many, most)),
        behind=max(far - one - (some - 1) * token, 0.0) / (some * BEHIND),
    )


def _least(many: float, most: int) -> float:
    """A token costs something, whatever was measured."""
    return many / most / 100


def _seconds(model: Any, tokens: int, position: int) -> Generator[None, None, float]:
    layers = kv.empty(model, 1)
    kv.feed(model, layers, [(0,) * tokens])
    kv.reserve(layers, position + tokens)
    least = float("inf")
    for _ in range(_TIMES + 1):
        yield
        least = min(least, _timed(lambda: _read_at(model, layers, tokens, position)))
    return least


def _read_at(model: Any, layers: kv.Layers, tokens: int, position: int) -> None:
    kv.pretend(layers, position)
    kv.feed(model, layers, [(0,) * tokens])
    mx.eval(kv.states(layers))


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
