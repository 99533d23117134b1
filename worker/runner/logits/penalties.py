"""Penalties for tokens that came before: the first logits processor.

They mean what they mean in `mlx_lm.sample_utils.make_logits_processors`. The window is the last 20 tokens of prompt
and answer together. Repetition first: a logit is divided by the penalty when positive and multiplied when negative,
once however often the token occurs. Then presence is subtracted once, and frequency once per occurrence.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from shared.jobs.request import Request, Sampling
from worker.runner.base import IMAGE_TOKENS, Row

WINDOW = 20
"""How many tokens back the penalties look."""

_NONE = -1


def penalised(sampling: Sampling) -> bool:
    """Whether a row uses any penalty."""
    # As in mlx-lm, a repetition penalty of 0 means none.
    return sampling.repetition_penalty not in (0, 1) or bool(sampling.presence_penalty or sampling.frequency_penalty)


class Penalties:
    """See `worker.runner.logits.processor.LogitsProcessor`."""

    def wanted(self, request: Request) -> bool:
        """Whether a request uses any penalty."""
        return penalised(request.sampling)

    def prepare(self, rows: Sequence[Row]) -> BatchPenalties:
        """The penalties of these rows."""
        return BatchPenalties([row.sampling for row in rows])


class BatchPenalties:
    """The penalties of rows that all use some; make a new one when rows come or go."""

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self._repetition = mx.array([[each.repetition_penalty or 1.0] for each in samplings])
        self._presence = mx.array([[each.presence_penalty] for each in samplings])
        self._frequency = mx.array([[each.frequency_penalty] for each in samplings])

    def __call__(self, logits: mx.array, last: mx.array, history: Sequence[Sequence[int]]) -> mx.array:
        """See `worker.runner.logits.processor.BatchProcessor`. The newest tokens need not be evaluated."""
        return self._apply(logits, last[:, None], mx.array([_padded(tokens) for tokens in history]))

    def _apply(self, logits: mx.array, last: mx.array, earlier: mx.array) -> mx.array:
        # Free places of the window repeat the newest token and count for nothing.
        window = mx.concatenate([mx.where(earlier == _NONE, last, earlier), last], axis=-1)
        counted = mx.concatenate([earlier != _NONE, mx.ones(last.shape, dtype=mx.bool_)], axis=-1)
        times = mx.sum((window[:, :, None] == window[:, None, :]) & counted[:, None, :], axis=-1)
        chosen = mx.take_along_axis(logits, window, axis=-1)
        chosen = mx.where(chosen < 0, chosen * self._repetition, chosen / self._repetition)
        chosen = chosen - self._presence - self._frequency * times
        return mx.put_along_axis(logits, window, chosen.astype(logits.dtype), axis=-1)


def _padded(tokens: Sequence[int]) -> list[int]:
    """The last of them, as many as the window has beside the newest token; pieces of images are none."""
    text = [token if token < IMAGE_TOKENS else _NONE for token in tokens[-(WINDOW - 1) :]]
    return [_NONE] * (WINDOW - 1 - len(text)) + text
