"""Several tokens of a row in one pass of the model: guessed from its text, verified by the model.

A pass over a few tokens costs hardly more than one over a single token where a pass mostly reads the weights, and more
where it mostly computes. So whether it pays is found while it runs: what the passes take, in medians, against how many
tokens the guess at hand will give, by how such guesses of the same row did of late. Where it does not pay, nothing is
verified, and rows decode as if this were not there: the odds are learned all the same, from tokens that come anyway.

The choice of a token is a function of logits, seed and position (`worker.sampler`). A guess is kept as far as it is
what the model chooses at those positions, so the text is the one it would have been, drawn or not.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import mlx.core as mx

from shared.jobs import Sampling
from worker.backends import kv
from worker.backends.lookup import Lookup
from worker.backends.prefix_cache import common_length
from worker.penalties import penalised
from worker.sampler import GREEDY_BELOW, BatchSampler

LENGTHS: Final = (2, 4, 8, 16)
"""Of guesses, in tokens. Only these, so that what each costs is soon known."""

MARGIN = 1.1
"""It pays when it makes decoding so many times faster by our reckoning, which is not exact."""

STALE = 512
"""After so many plain steps what a pass cost may be wrong, and half of what it cost more than one is believed."""

PLAIN_AFTER = 32
"""Verified guesses in succession, before a few steps are plain: nobody knows any more what those cost."""

_LEAST_PLAIN = 3
"""Plain steps to be timed before anything is compared with them."""


@dataclass(slots=True)
class _Width:
    """What passes over so many tokens took of late, and how many plain steps ago the last was."""

    took_s: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    age: int = 0


class Costs:
    """What passes take, in plain steps. Medians: one that somebody else on the machine made long says nothing."""

    def __init__(self) -> None:
        self._plain_s: deque[float] = deque(maxlen=7)
        self._widths = {length: _Width() for length in LENGTHS}
        self._since_plain = 0

    def plain(self, seconds: float) -> None:
        """A step for one token took so long."""
        self._plain_s.append(seconds)
        self._since_plain = 0
        for width in self._widths.values():
            width.age += 1

    def verified(self, length: int, seconds: float) -> None:
        """A step that verified a guess of so many tokens took so long."""
        width = self._widths[length]
        width.took_s.append(seconds)
        width.age = 0
        self._since_plain += 1

    @property
    def known(self) -> bool:
        """Whether plain steps were timed, and not too long ago."""
        return len(self._plain_s) >= _LEAST_PLAIN and self._since_plain < PLAIN_AFTER and min(self._plain_s) > 0

    def of(self, length: int) -> float:
        """Of a step that verifies so many tokens; what was never tried is believed to cost no more than a plain one."""
        width = self._widths[length]
        if not width.took_s:
            return 1.0
        cost = statistics.median(width.took_s) / statistics.median(self._plain_s)
        return (1 + cost) / 2 if width.age > STALE else cost


class Speculation:
    """Decides for all rows of a model, each of which has its own `Lookup`.

    Args:
        model: an mlx-lm model.
        most: tokens guessed at a time, at most; 0: never.

    Attributes:
        drafted: tokens that were guessed and verified.
        accepted: those of them that were right.
    """

    def __init__(self, model: Any, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._model = model
        self._lengths = [length for length in LENGTHS if length <= most]
        self._able = bool(self._lengths) and kv.trimmable(model)
        # What is drawn costs more than what is only compared, and for each token of a guess.
        self._costs = {drawn: Costs() for drawn in (False, True)}
        self.drafted = self.accepted = 0

    def suits(self, sampling: Sampling) -> bool:
        """Whether rows that are sampled so can be guessed. Penalties depend on the tokens in between."""
        return self._able and not penalised(sampling)

    def costs(self, sampling: Sampling) -> Costs:
        """What steps of rows that are sampled so take."""
        return self._costs[sampling.temperature >= GREEDY_BELOW]

    def length(self, lookup: Lookup, sampling: Sampling, room: int) -> int:
        """How many tokens to guess now, so that the row grows fastest and by no more than its room; 0: none."""
        costs = self.costs(sampling)
        fitting = [length for length in self._lengths if length < room]
        if not lookup.length or not fitting or not costs.known:
            return 0
        right = lookup.odds.expected(lookup.length, fitting[-1])
        speed, best = max(((1 + right[length - 1]) / costs.of(length), length) for length in fitting)
        return best if speed > MARGIN else 0

    def verify(
        self, cache: kv.Layers, newest: int, guess: Sequence[int], sampling: Sampling, position: int
    ) -> list[int]:
        """Put the newest token of the only row and a guess of what follows through the model.

        Returns:
            What the model chooses, from this position on: the guess as far as it is right, and one token more. All of
            them but the last are in the cache.
        """
        logits = self._model(mx.array([[newest, *guess]]), cache=cache)[0]
        width = len(guess) + 1
        chosen = BatchSampler([sampling] * width)(logits, range(position, position + width))
        tokens = cast("list[int]", chosen.tolist())
        right = common_length(tuple(guess), tuple(tokens))
        kv.trim(cache, len(guess) - right)
        self.drafted += len(guess)
        self.accepted += right
        return tokens[: right + 1]

    def warm(self) -> None:
        """Run a pass of each length, so that every kernel is compiled, and once more to see what it takes."""
        if not self._able:
            return
        cache, sampling = kv.empty(self._model, 1), Sampling(temperature=0.0)
        for length in self._lengths:
            for _ in range(2):
                start = self.clock()
                self.verify(cache, 0, [0] * length, sampling, 0)
                took = self.clock() - start
            self._costs[False].verified(length, took)
        self.drafted = self.accepted = 0

    def stats(self) -> dict[str, float]:
        """Counters for `/metrics`."""
        return {
            "speculation_drafted_tokens_total": self.drafted,
            "speculation_accepted_tokens_total": self.accepted,
        }
