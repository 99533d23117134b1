"""Limits how much of a long prompt is prefilled in a step in which other rows decode.

Decoding rows wait for the prefill in their step. So 99 of 100 steps with prefill should take at most three times as
long as a plain step, one without prefill. On average they take about twice as long, or longer if step times vary
little.

The cost of a chunk is predicted, because when a chunk turns out to be too expensive the decoding rows have already
waited. The shape of the prediction (cost per pass, per token, and per token by position) is measured when the model is
loaded. Its scale is the ratio of the recent chunks' measured cost to their predicted cost. The measured cost is
relative to recent plain steps, so prefill pauses regularly for such steps.

A chunk may go through the model a few layers at a time, in several steps. Then each step reads only the weights of
these layers, and a chunk can have the size that finishes the prompt soonest.
"""

from __future__ import annotations

import statistics
from collections import deque

from worker.runner.cost import UNKNOWN_COST, PrefillCost

LIMIT = 3.0
"""Limit on a step with prefill, as a multiple of a plain step, for 99 of 100 steps."""
MIN_AIM, AIM, MAX_AIM = 1.5, 1.8, 2.2
"""Bounds and initial value of the target multiple. It falls while many steps exceed the limit, and rises otherwise."""
PAUSE_AFTER = 16
"""Steps with long prefill between two pauses."""
PAUSE = 2
"""Steps of a pause. The device may be one step behind, so the first of them may still contain a chunk."""

_WINDOW = 32
"""Number of recent steps with prefill from which the scale is computed."""
_OUTLIER = 4
"""Maximum measured cost of a chunk, in plain steps. A higher cost was caused by other processes."""
_PRIOR = 2
"""Weight of the cost measured at loading relative to the cost of recent chunks, in plain steps."""
_ROUNDING = 0.25
"""Part of a layer by which a step may exceed its time. Predictions are inexact, and one layer less may halve it."""
_EPSILON = 1e-9
_OVER, _WITHIN = 0.9, 1.001
"""Factors by which a step over or within the limit changes the target. They balance at one step over in a hundred."""


class PrefillBudget:
    """Computes the time for prefill in a step, and the chunk that fits into it.

    Args:
        max_tokens: maximum tokens of a chunk.
        cost: of prefill passes, measured at loading; `UNKNOWN_COST` if it was not.
    """

    def __init__(self, max_tokens: int, cost: PrefillCost = UNKNOWN_COST) -> None:
        self._max_tokens = max_tokens
        self._cost = cost
        self._measured = cost != UNKNOWN_COST
        self._tokens = max_tokens
        self._aim = AIM
        self._since_pause = PAUSE_AFTER  # begin with a pause, because no plain step has been seen yet
        self._previous_s: float | None = None
        # Its median is used: single steps may be long because of other processes.
        self._plain_s: deque[float] = deque(maxlen=5)
        # Measured cost in plain steps, so that a change of all step times cancels out; and predicted cost in seconds.
        self._chunks: deque[tuple[float, float]] = deque(maxlen=_WINDOW)

    @property
    def tokens(self) -> int:
        """Size of the last chunk in a step with decoding rows."""
        return self._tokens

    @property
    def plain_s(self) -> float:
        """Seconds of a recent plain step; 0 if none has been seen."""
        return statistics.median(self._plain_s) if self._plain_s else 0.0

    def pauses(self) -> bool:
        """Return whether no long prompt is prefilled in this step. Call it once per step."""
        self._since_pause += 1
        pauses = self._since_pause > PAUSE_AFTER
        if self._since_pause == PAUSE_AFTER + PAUSE:
            self._since_pause = 0
        return pauses

    def chunk(self, position: int, depth: int) -> int:
        """Return the number of tokens for the next chunk.

        Args:
            position: tokens in the cache before the chunk.
            depth: layers of the model.
        """
        spare = self.spare_s()
        if spare is None:
            return self._max_tokens

        def fitting(layers: int) -> int:
            """Tokens for which there is time if `layers` layers run in a step."""
            return min(max(int(self._cost.tokens(spare * depth / layers, position)), 0), self._max_tokens)

        # The number of layers per step that gives the most tokens per step; of equal ones the highest.
        best = max(range(1, depth + 1), key=lambda layers: (fitting(layers) / -(-depth // layers), layers))
        self._tokens = min(max(fitting(best), int(self._cost.efficient(position)), 1), self._max_tokens)
        return self._tokens

    def layers(self, tokens: int, position: int, depth: int) -> int:
        """Return how many of `depth` layers a chunk may go through in this step, at least one."""
        spare = self.spare_s()
        if spare is None:
            return depth
        cost = self._cost.seconds(tokens, position)
        return min(max(int(depth * spare / max(cost, _EPSILON) + _ROUNDING), 1), depth)

    def spare_s(self) -> float | None:
        """Return the seconds that prefill or encoding may take in this step by prediction; None while unknown."""
        if not self._plain_s or not (self._measured or self._chunks):
            return None
        # The cost at loading is the lowest of several measurements, so it is compared with the shortest step.
        prior = _PRIOR if self._measured else 0.0
        predicted = prior * min(self._plain_s) + sum(predicted for _, predicted in self._chunks)
        measured = prior + sum(measured for measured, _ in self._chunks)
        return (self._aim - 1) * predicted / max(measured, _EPSILON)

    def record_step(self, seconds: float, predicted_s: float | None) -> None:
        """Record a step with decoding rows.

        Args:
            seconds: from the end of the previous step to the end of this one.
            predicted_s: predicted cost of its prefill and encoding; None: it also did something unpredictable.
        """
        previous_s, self._previous_s = self._previous_s, predicted_s
        if predicted_s is None or previous_s is None:
            return
        if predicted_s == previous_s == 0:
            self._plain_s.append(max(seconds, _EPSILON))  # a coarse clock may measure 0
        elif self._plain_s:
            ratio = seconds / self.plain_s
            # The device may have run this step's chunk or the previous one; half of each is right on average.
            self._chunks.append((min(ratio - 1, _OUTLIER), (predicted_s + previous_s) / 2))
            self._aim = min(max(self._aim * (_OVER if ratio > LIMIT else _WITHIN), MIN_AIM), MAX_AIM)
