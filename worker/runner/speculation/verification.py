"""Several tokens of a row in one pass of the model: drafted by a proposer, verified by the model.

A pass over a few tokens costs hardly more than one over a single token where a pass mostly reads the weights, and more
where it mostly computes. A draft is verified when the tokens that it will probably give are worth what the pass costs;
otherwise rows decode as if there were no drafts.

The choice of a token is a function of logits, seed and position (`worker.runner.sampler`). A draft is accepted as far
as it equals what the model chooses at those positions, so the text is the same as without drafts, greedy or sampled.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import mlx.core as mx

from worker.runner import forward, kv_cache
from worker.runner.decode_row import DecodeRow
from worker.runner.kv_cache import KVCache
from worker.runner.prefix.cache import common_length
from worker.runner.sampler import GREEDY_BELOW, BatchSampler
from worker.runner.speculation.pass_cost import LENGTHS, UNKNOWN
from worker.runner.speculation.proposer import Proposer

MOST_ROWS = 4
"""Maximum rows: more of them use the device well without drafts, and seldom all have one."""

MARGIN = 1.1
"""Minimum estimated speed-up at which drafts are verified: the estimate is not exact."""


class Speculation:
    """Decides whether the rows of a model verify drafts in a step, and verifies them.

    Args:
        model: an mlx-lm model.
        most: maximum draft tokens per row and step; 0: no speculation.
        proposer: drafts.

    Attributes:
        cost: of passes; measured while the model warms.
        drafted: tokens that were drafted and verified.
        accepted: those of them that the model chose as well.
        lengths: of drafts.
        able: whether this model can verify drafts.
    """

    def __init__(self, model: Any, most: int, proposer: Proposer) -> None:
        self.cost = UNKNOWN
        self.drafted = self.accepted = 0
        self.lengths = [length for length in LENGTHS if length <= most]
        self._model = model
        self._proposer = proposer
        self.able = bool(self.lengths) and kv_cache.plain(model)

    def suits(self, rows: int) -> bool:
        """Whether drafts of this many rows can be verified together.

        They must not use logits processors, which depend on the tokens in between, nor ask for log-probabilities.
        """
        return self.able and 0 < rows <= MOST_ROWS

    def length(self, rows: Sequence[DecodeRow]) -> int:
        """How many tokens to draft now, so that the rows grow fastest and none beyond its limit; 0: none."""
        left = min(row.left if row.sampled else 0 for row in rows)
        fitting = [length for length in self.lengths if length < left]
        # Asked for even where none fits: the proposer takes in the tokens of a prompt bit by bit.
        accepted = [each for each in self._proposer.expected(rows, self.lengths[-1]) if each]
        if not fitting or not accepted:
            return 0
        drawn = sum(row.row.sampling.temperature >= GREEDY_BELOW for row in rows)
        position = max(row.length for row in rows)

        def speed(length: int) -> float:
            gained = 1 + sum(each[length - 1] for each in accepted) / len(rows)
            return gained / self.cost.ratio(len(rows), drawn, length, position)

        best = max(fitting, key=speed)
        return best if speed(best) > MARGIN else 0

    def verify(self, cache: KVCache, rows: Sequence[DecodeRow], length: int) -> list[list[int]]:
        """Put the newest token and a draft of each row of a batch through the model.

        Returns:
            The tokens that each row grows by: its draft as far as it is accepted, and one token more.
        """
        drafts = self._proposer.propose(rows, length)
        inputs = [
            [row.newest or 0, *draft, *[0] * (length - len(draft))] for row, draft in zip(rows, drafts, strict=True)
        ]
        logits = self._model(mx.array(inputs), cache=cache.layers, **forward.shifts([row.row for row in rows]))
        chosen = self._choose(logits, rows)
        found = [tokens[: common_length(draft, tokens) + 1] for draft, tokens in zip(drafts, chosen, strict=True)]
        for row, tokens in zip(rows, found, strict=True):
            row.grow(tokens)
        cache.trim([length + 1 - len(tokens) for tokens in found])
        self.drafted += sum(map(len, drafts))
        self.accepted += sum(map(len, found)) - len(found)
        return found

    def drop(self, uids: Collection[int]) -> None:
        """Drop what is known of rows."""
        self._proposer.drop(uids)

    def stats(self) -> dict[str, float]:
        """Counters for `/metrics`."""
        return {
            "speculation_drafted_tokens_total": self.drafted,
            "speculation_accepted_tokens_total": self.accepted,
        }

    def _choose(self, logits: mx.array, rows: Sequence[DecodeRow]) -> list[list[int]]:
        """The model's choice at each place of a pass."""
        count, width, vocabulary = logits.shape
        sampler = BatchSampler([row.row.sampling for row in rows for _ in range(width)])
        positions = [row.position + i for row in rows for i in range(width)]
        chosen = sampler(logits.reshape(count * width, vocabulary), positions)
        return cast("list[list[int]]", chosen.reshape(count, width).tolist())
