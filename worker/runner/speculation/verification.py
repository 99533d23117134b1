"""Several tokens of a row in one pass of the model: guessed from its text, verified by the model.

A pass over a few tokens costs hardly more than one over a single token where a pass mostly reads the weights, and more
where it mostly computes. So whether it pays is found while it runs: what the passes take, in medians, against how many
tokens the guesses at hand will give, by how such guesses of the same rows did of late. Where it does not pay, nothing
is verified, and rows decode as if this were not there: the odds are learned all the same, from tokens that come anyway.

The choice of a token is a function of logits, seed and position (`worker.runner.sampler`). A guess is kept as far as it
is what the model chooses at those positions, so the text is the one it would have been, drawn or not.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx

from shared.jobs.request import Sampling
from worker.runner import kv_cache as kv
from worker.runner.base import Row
from worker.runner.decode_row import Slot
from worker.runner.logits.penalties import penalised
from worker.runner.prefix_cache import common_length
from worker.runner.sampler import GREEDY_BELOW, BatchSampler
from worker.runner.speculation.pass_cost import LENGTHS, PassCosts

MOST_ROWS = 4
"""More rows fill a pass with tokens that need no guess, and seldom all have one."""

MARGIN = 1.1
"""It pays when it makes decoding so many times faster by our reckoning, which is not exact."""


class Speculation:
    """Decides for all rows of a model, and verifies.

    Args:
        model: an mlx-lm model.
        most: tokens of a row that are guessed at a time, at most; 0: never.

    Attributes:
        drafted: tokens that were guessed and verified.
        accepted: those of them that were right.
    """

    def __init__(self, model: Any, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.drafted = self.accepted = 0
        self._model = model
        self._lengths = [length for length in LENGTHS if length <= most]
        self._able = bool(self._lengths) and kv.trimmable(model)
        self._costs: defaultdict[tuple[int, int], PassCosts] = defaultdict(PassCosts)

    def suits(self, slots: Sequence[Slot]) -> bool:
        """Whether these rows can be guessed together. Penalties depend on the tokens in between."""
        return self._able and 0 < len(slots) <= MOST_ROWS and not any(penalised(slot.row.sampling) for slot in slots)

    def costs(self, slots: Sequence[Slot]) -> PassCosts:
        """What steps of such rows take: what is drawn costs more than what is only compared."""
        return self._costs[len(slots), sum(slot.row.sampling.temperature >= GREEDY_BELOW for slot in slots)]

    def length(self, slots: Sequence[Slot]) -> int:
        """How many tokens to guess now, so that the rows grow fastest and none by more than its room; 0: none."""
        room = min(slot.room if slot.chosen else 0 for slot in slots)
        fitting = [length for length in self._lengths if length < room]
        guessed = [lookup for lookup in (slot.lookup for slot in slots) if lookup.length]
        costs = self.costs(slots)
        if not fitting or not guessed or not costs.known:
            return 0
        right = [lookup.odds.expected(lookup.length, fitting[-1]) for lookup in guessed]

        def speed(length: int) -> float:
            return (1 + sum(each[length - 1] for each in right) / len(slots)) / costs.of(length)

        best = max(fitting, key=speed)
        return best if speed(best) > MARGIN else 0

    def verify(self, cache: kv.Layers, slots: Sequence[Slot], length: int) -> list[list[int]]:
        """Put the newest token of these rows, which are all of the batch, through the model, and what may follow it.

        Returns:
            The tokens that each row grows by: its guess as far as that is right, and one token more.
        """
        guesses = [slot.lookup.guess(length) for slot in slots]
        fed = [
            [slot.newest or 0, *guess, *[0] * (length - len(guess))] for slot, guess in zip(slots, guesses, strict=True)
        ]
        logits = self._model(mx.array(fed), cache=cache, **kv.shifts([slot.row for slot in slots]))
        chosen = self._choose(logits, slots)
        found = [
            tokens[: common_length(tuple(guess), tuple(tokens)) + 1]
            for guess, tokens in zip(guesses, chosen, strict=True)
        ]
        for slot, tokens in zip(slots, found, strict=True):
            slot.grow(tokens)
        kv.take_back(cache, [length + 1 - len(tokens) for tokens in found])
        self.drafted += sum(map(len, guesses))
        self.accepted += sum(map(len, found)) - len(found)
        return found

    def warming(self) -> Iterator[None]:
        """Run a pass of each length, so that every kernel is compiled, and again to see what it takes; in pieces."""
        if not self._able:
            return
        slots = [Slot.of(Row(-1, (0,) * 9, 0, 1000, Sampling(temperature=0.0)))]
        for length in self._lengths:
            for _ in range(2):
                start = self.clock()
                self.verify(kv.empty(self._model, 1), slots, length)
                took = self.clock() - start
                yield
            self.costs(slots).verified(length, took)
        self.drafted = self.accepted = 0

    def stats(self) -> dict[str, float]:
        """Counters for `/metrics`."""
        return {
            "speculation_drafted_tokens_total": self.drafted,
            "speculation_accepted_tokens_total": self.accepted,
        }

    def _choose(self, logits: mx.array, slots: Sequence[Slot]) -> list[list[int]]:
        """The model's choice at each place of a pass: of all rows, one after the other."""
        rows, width, vocabulary = logits.shape
        sampler = BatchSampler([slot.row.sampling for slot in slots for _ in range(width)])
        positions = [slot.position + i for slot in slots for i in range(width)]
        chosen = sampler(logits.reshape(rows * width, vocabulary), positions)
        return cast("list[list[int]]", chosen.reshape(rows, width).tolist())
