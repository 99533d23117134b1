"""Verification of draft tokens: the model processes several tokens of a row in one pass.

If a pass is limited by reading the weights, a few tokens cost hardly more than one; if it is limited by computation,
they cost more. So a draft is verified only if its expected number of accepted tokens is worth the cost of the pass.
Otherwise the rows decode without drafts.

A token is a function of logits, seed and position (`worker.runner.sampler`). Draft tokens are accepted up to the first
one that differs from the model's own choice, so the text is the same as without drafts, both greedy and sampled.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import mlx.core as mx

from worker.runner import forward, kv_cache
from worker.runner.adapters.layers import applied
from worker.runner.decode_row import DecodeRow
from worker.runner.kv_cache import KVCache, States
from worker.runner.prefix.tree import common_length
from worker.runner.sampler import GREEDY_BELOW, BatchSampler
from worker.runner.speculation.pass_cost import LENGTHS, UNKNOWN
from worker.runner.speculation.proposer import Proposer

MAX_ROWS = 4
"""Maximum rows of a batch that verifies drafts. More rows use the device well anyway, and rarely all have a draft."""

MIN_SPEEDUP = 1.1
"""Minimum estimated speed-up at which drafts are verified. It is above 1 because the estimate is not exact."""


class Speculation:
    """Decides whether the rows of a batch verify drafts in a step, and verifies them.

    Args:
        model: an mlx-lm model.
        max_length: maximum draft tokens per row and step; 0: no speculation.
        proposers: propose the drafts. In each step, the one with the highest estimated speed-up is used.
        max_rows: maximum rows of a batch that verifies drafts.

    Attributes:
        cost: cost of passes, measured during warm-up.
        drafted: total draft tokens that were verified.
        accepted: total draft tokens that were accepted.
        lengths: possible draft lengths.
        supported: whether this model can verify drafts.
    """

    def __init__(self, model: Any, max_length: int, proposers: Sequence[Proposer], max_rows: int = MAX_ROWS) -> None:
        self.cost = UNKNOWN
        self.drafted = self.accepted = 0
        self.lengths = [length for length in LENGTHS if length <= max_length]
        self._model = model
        self._proposers = proposers
        self._proposer = proposers[0]  # of the next draft
        self._max_rows = max_rows
        self.supported = bool(self.lengths) and kv_cache.mergeable(model)

    def can_verify(self, rows: int) -> bool:
        """Return whether drafts of this many rows can be verified together.

        The rows must neither use logits processors, which depend on the tokens in between, nor ask for
        log-probabilities. The caller checks this.
        """
        return self.supported and 0 < rows <= self._max_rows

    def draft_length(self, rows: Sequence[DecodeRow]) -> int:
        """Return the draft length with the highest speed-up that exceeds no row's token limit; 0: do not draft."""
        remaining = min(row.remaining if row.sampled else 0 for row in rows)
        fitting = [length for length in self.lengths if length < remaining]
        best, chosen, best_speedup = 0, self._proposers[0], MIN_SPEEDUP
        for proposer in self._proposers:
            length, speedup = self._best_length(proposer, rows, fitting)
            if speedup > best_speedup:
                best, chosen, best_speedup = length, proposer, speedup
        self._proposer = chosen
        return best if best and chosen.prepare(rows) else 0

    def _best_length(self, proposer: Proposer, rows: Sequence[DecodeRow], lengths: Sequence[int]) -> tuple[int, float]:
        """Return the draft length with the highest estimated speed-up, and that speed-up; zeros without a draft."""
        # Estimate even if no length fits: each call lets a proposer index more of a prompt.
        accepted = [each for each in proposer.expected(rows, self.lengths[-1]) if each]
        if not lengths or not accepted:
            return 0, 0.0
        sampled_rows = sum(row.row.sampling.temperature >= GREEDY_BELOW for row in rows)
        position = max(row.length for row in rows)

        def speedup(length: int) -> float:
            tokens = 1 + sum(each[length - 1] for each in accepted) / len(rows)
            drafting_s = proposer.seconds(len(rows), length)
            return tokens / self.cost.ratio(len(rows), sampled_rows, length, position, drafting_s)

        return max(((length, speedup(length)) for length in lengths), key=lambda pair: pair[1])

    def verify(self, cache: KVCache, rows: Sequence[DecodeRow], length: int) -> list[list[int]]:
        """Run the next input and a draft of each row through the model, and append the resulting tokens to the rows.

        Args:
            rows: all rows of the batch that `cache` belongs to.
            length: draft tokens per row.

        Returns:
            By row, the accepted draft tokens and one further token.
        """
        drafts = self._proposer.propose(rows, length)
        inputs = [
            [row.next_input or 0, *draft, *[0] * (length - len(draft))] for row, draft in zip(rows, drafts, strict=True)
        ]
        states = cache.states_now()
        inner = [row.row for row in rows]
        with applied(forward.slots(inner)):
            logits = self._model(mx.array(inputs), cache=cache.layers, **forward.shifts(inner))
        chosen = self._choose(logits, rows)
        results = [tokens[: common_length(draft, tokens) + 1] for draft, tokens in zip(drafts, chosen, strict=True)]
        for row, tokens in zip(rows, results, strict=True):
            row.append(tokens)
        accepted = [ids[: len(tokens)] for ids, tokens in zip(inputs, results, strict=True)]
        self._reject(cache, rows, states, accepted, length)
        for draft, tokens in zip(drafts, results, strict=True):
            if draft:
                self._proposer.record(len(draft), len(tokens) - 1)
        self.drafted += sum(map(len, drafts))
        self.accepted += sum(map(len, results)) - len(results)
        return results

    def _reject(
        self,
        cache: KVCache,
        rows: Sequence[DecodeRow],
        states: States,
        accepted: Sequence[Sequence[int]],
        length: int,
    ) -> None:
        """Remove rejected tokens from the cache.

        A recurrent state cannot be shortened: it is restored, and the accepted tokens go through the model again.

        Args:
            states: recurrent states before the pass.
            accepted: by row, the inputs that stay in the cache.
            length: draft tokens per row.
        """
        rejected = [length + 1 - len(ids) for ids in accepted]
        if not any(rejected):
            return
        if not states:
            cache.trim(rejected)
            return
        cache.trim([length + 1] * len(rows))
        cache.restore_states(states)
        inner = [row.row for row in rows]
        forward.fill(self._model, cache, accepted, shifts=forward.shifts(inner), slots=forward.slots(inner))

    def drop(self, uids: Collection[int]) -> None:
        """Drop the proposers' state of rows."""
        for proposer in self._proposers:
            proposer.drop(uids)

    def stats(self) -> dict[str, float]:
        """Counters for `/metrics`."""
        return {
            "speculation_drafted_tokens_total": self.drafted,
            "speculation_accepted_tokens_total": self.accepted,
        }

    def _choose(self, logits: mx.array, rows: Sequence[DecodeRow]) -> list[list[int]]:
        """Return the token that the model chooses after each token of a pass, by row."""
        count, width, vocabulary = logits.shape
        sampler = BatchSampler([row.row.sampling for row in rows for _ in range(width)])
        positions = [row.position + i for row in rows for i in range(width)]
        chosen = sampler(logits.reshape(count * width, vocabulary), positions)
        return cast("list[list[int]]", chosen.reshape(count, width).tolist())
