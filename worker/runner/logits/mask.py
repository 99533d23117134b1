"""Applies the constraints of a batch to its logits.

Constraints need the newest tokens on the host, which the logits processors of `worker.runner.logits.processor` do not.
So the batch queues the forward pass first, reads the newest tokens, and computes the masks while the device works.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import mlx.core as mx
import numpy as np
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from worker.runner.logits.constraint import Guide
from worker.runner.logits.processor import RowFailures

_WORD_BITS: Final = 32
_MAX_THREADS: Final = 8


class BatchConstraints:
    """The constraints of one composition of a batch.

    Args:
        guides: by batch index; None: the row is not constrained, or there is no row.
    """

    def __init__(self, guides: Sequence[Guide | None]) -> None:
        self._guides = [(index, guide) for index, guide in enumerate(guides) if guide is not None]

    def __bool__(self) -> bool:
        """Return whether any row is constrained."""
        return bool(self._guides)

    def __call__(self, logits: mx.array) -> tuple[mx.array, RowFailures]:
        """Set the logits of the tokens that may not come next to minus infinity.

        Args:
            logits: [batch, vocabulary]; need not be evaluated.

        Returns:
            [batch, vocabulary] changed logits, and the rows whose constraint failed; ignore the logits of these rows.
        """
        allowed = self._allowed_by_grammar(*logits.shape)
        for index, guide in self._guides:
            if guide.forced is not None:
                allowed[index] = False
                allowed[index, guide.forced] = True
            elif guide.must_not_end:
                allowed[index, guide.eos] = False
            elif guide.follows_grammar and guide.think_start is not None:
                allowed[index, guide.think_start] = True
        failures: RowFailures = [(index, guide.error) for index, guide in self._guides if guide.error]
        return mx.where(mx.array(allowed), logits, mx.array(-mx.inf, logits.dtype)), failures

    def _allowed_by_grammar(self, rows: int, vocabulary: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which tokens may come next according to the grammars, [rows, vocabulary]."""
        words = max(-(-vocabulary // _WORD_BITS), *(guide.words for _, guide in self._guides))
        bits = np.full((rows, words), -1, dtype=np.int32)
        guides = [(index, guide) for index, guide in self._guides if guide.follows_grammar and guide.error is None]
        if guides:
            self._fill(bits, guides)
        # [:, :vocabulary] because the tokenizer may have more tokens than the model, or the model more than it.
        return np.unpackbits(bits.view(np.uint8), axis=1, count=vocabulary, bitorder="little").view(np.bool_)

    def _fill(self, bits: np.ndarray[Any, np.dtype[np.int32]], guides: Sequence[tuple[int, Guide]]) -> None:
        bits[[index for index, _ in guides]] = 0
        matchers = [(guide.matcher, index) for index, guide in guides if guide.matcher is not None]
        words = guides[0][1].words
        masks = bits if words == bits.shape[1] else np.zeros((len(bits), words), dtype=np.int32)
        if (executor := _executor()) is None:
            for matcher, index in matchers:
                fill_next_token_bitmask(matcher, masks, index)
        else:
            fill_next_token_bitmask_par(executor, matchers, masks)
        if masks is not bits:
            for _, index in matchers:
                bits[index, :words] = masks[index]
        for _, guide in guides:
            guide.check()


@lru_cache(maxsize=1)
def _executor() -> LLExecutor | None:
    """Return the threads that compute masks, which are shared by all models; None if the engine thread does it alone.

    A mask takes about 10 µs, so with one thread, waiting for it would take longer than its work.
    """
    threads = min(_MAX_THREADS, (os.cpu_count() or 1) // 2)
    return LLExecutor(threads) if threads > 1 else None
