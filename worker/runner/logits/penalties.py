"""Repetition, presence and frequency penalties: the first logits processor.

The semantics are those of `mlx_lm.sample_utils.make_logits_processors`. The window is the last 20 tokens of prompt and
answer together. The repetition penalty comes first: it divides a positive logit and multiplies a negative one, once per
distinct token. Then the presence penalty is subtracted once, and the frequency penalty once per occurrence.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from shared.jobs.request import Request, Sampling
from worker.runner.base import IMAGE_TOKENS, Row

WINDOW = 20
"""Number of latest tokens that the penalties consider."""

_NONE = -1


def penalised(sampling: Sampling) -> bool:
    """Return whether any penalty is in use."""
    # As in mlx-lm, a repetition penalty of 0 means none.
    return sampling.repetition_penalty not in (0, 1) or bool(sampling.presence_penalty or sampling.frequency_penalty)


class Penalties:
    """See `worker.runner.logits.processor.LogitsProcessor`."""

    def applies_to(self, request: Request) -> bool:
        """Return whether a request uses any penalty."""
        return penalised(request.sampling)

    def prepare(self, rows: Sequence[Row]) -> BatchPenalties:
        """Return the penalties of these rows."""
        return BatchPenalties([row.sampling for row in rows])


class BatchPenalties:
    """The penalties of rows that all use at least one. Create a new instance when rows join or leave."""

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self._repetition = mx.array([[each.repetition_penalty or 1.0] for each in samplings])
        self._presence = mx.array([[each.presence_penalty] for each in samplings])
        self._frequency = mx.array([[each.frequency_penalty] for each in samplings])

    def __call__(self, logits: mx.array, last: mx.array, history: Sequence[Sequence[int]]) -> mx.array:
        """See `worker.runner.logits.processor.BatchProcessor`. `last` need not be evaluated."""
        return self._apply(logits, last[:, None], mx.array([_padded(tokens) for tokens in history]))

    def _apply(self, logits: mx.array, last: mx.array, earlier: mx.array) -> mx.array:
        # Unused window entries repeat the newest token and are not counted.
        window = mx.concatenate([mx.where(earlier == _NONE, last, earlier), last], axis=-1)
        counted = mx.concatenate([earlier != _NONE, mx.ones(last.shape, dtype=mx.bool_)], axis=-1)
        times = mx.sum((window[:, :, None] == window[:, None, :]) & counted[:, None, :], axis=-1)
        chosen = mx.take_along_axis(logits, window, axis=-1)
        chosen = mx.where(chosen < 0, chosen * self._repetition, chosen / self._repetition)
        chosen = chosen - self._presence - self._frequency * times
        return mx.put_along_axis(logits, window, chosen.astype(logits.dtype), axis=-1)


def _padded(tokens: Sequence[int]) -> list[int]:
    """Return the last tokens for the window without its newest token. Image tokens and missing ones become `_NONE`."""
    text = [token if token < IMAGE_TOKENS else _NONE for token in tokens[-(WINDOW - 1) :]]
    return [_NONE] * (WINDOW - 1 - len(text)) + text
