"""How much of a long prompt is prefilled beside rows that decode.

Decoding rows wait for the prefill in their step. So 99 of 100 steps with prefill should last at most three times as
long as a step without. On average they last about twice as long, or longer where step times vary little. The cost of a
chunk is predicted, because the decoding rows have already waited when a chunk turns out to be too expensive. Its shape
(cost per pass, per token, and per token behind many others) is measured when the model is loaded. Its scale is what the
last chunks took compared with their prediction. Only recent steps without prefill are a reference, so prefill pauses
now and then.

A chunk may go through the model some layers at a time, in several steps. So the weights, which every chunk reads, cost
a step no more than its share of the layers, and chunks are of the size that finishes the prompt soonest.
"""

from __future__ import annotations

import statistics
from collections import deque

from worker.runner.base import UNKNOWN_COST, PrefillCost

LIMIT = 3.0
"""Longest step with prefill, as a multiple of a step without, except one in a hundred."""
LEAST_AIM, AIM, MOST_AIM = 1.5, 1.8, 2.2
"""Target multiple: it falls while many steps exceed the limit, and rises while few do."""
PAUSE_AFTER = 16
"""Steps with long prefill between two pauses."""
PAUSE = 2
"""Steps of a pause. The device may be a step behind, so that the first may still contain a chunk."""

_REMEMBERED = 32
"""Steps with prefill from which the scale is computed."""
_OUTLIER = 4
"""Maximum measured cost of a chunk, in plain steps; anything more was caused by other processes."""
_TRUST = 2
"""Weight of the measured cost against that of chunks, in plain steps."""
_ROUNDING = 0.25
"""Part of a layer by which a step may exceed its time: predictions are not exact, and one layer less may halve it."""
_LEAST = 1e-9
_OVER, _WITHIN = 0.9, 1.001
"""Factors by which a step over the limit, or within it, changes the target. They balance at one in a hundred."""


class PrefillBudget:
    """The time for prefill in a step, and the chunks that fit into it.

    Args:
        most: most tokens of a chunk.
        cost: of prefill passes, as measured; `UNKNOWN_COST` where nothing was.
    """

    def __init__(self, most: int, cost: PrefillCost = UNKNOWN_COST) -> None:
        self._most = most
        self._cost = cost
        self._measured = cost != UNKNOWN_COST
        self._tokens = most
        self._aim = AIM
        self._since_pause = PAUSE_AFTER  # no plain step has been seen yet
        self._before: float | None = None
        # Medians: one step that another process made long says nothing.
        self._plain_s: deque[float] = deque(maxlen=5)
        # In plain steps, not in seconds: what makes all steps longer changes nothing.
        self._taken: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    @property
    def tokens(self) -> int:
        """Size of the last chunk beside rows that decode."""
        return self._tokens

    def pauses(self) -> bool:
        """Whether nothing long is prefilled in this step. To be called once a step."""
        self._since_pause += 1
        pauses = self._since_pause > PAUSE_AFTER
        if self._since_pause == PAUSE_AFTER + PAUSE:
            self._since_pause = 0
        return pauses

    def chunk(self, position: int, depth: int) -> int:
        """Return how many tokens the next chunk should have behind `position` others, in a pass of `depth` layers."""
        spare = self.spare_s()
        if spare is None:
            return self._most

        def fitting(at_once: int) -> int:
            """Tokens for which there is time when `at_once` layers run in a step."""
            return min(max(int(self._cost.tokens(spare * depth / at_once, position)), 0), self._most)

        # As many layers at once as give the most tokens a step; with more of them the chunk is finished sooner.
        best = max(range(1, depth + 1), key=lambda at_once: (fitting(at_once) / -(-depth // at_once), at_once))
        self._tokens = min(max(fitting(best), int(self._cost.efficient(position)), 1), self._most)
        return self._tokens

    def layers(self, tokens: int, position: int, depth: int) -> int:
        """Return how many of `depth` layers such a chunk may run through in this step: at least one."""
        spare = self.spare_s()
        if spare is None:
            return depth
        cost = self._cost.seconds(tokens, position)
        return min(max(int(depth * spare / max(cost, _LEAST) + _ROUNDING), 1), depth)

    def spare_s(self) -> float | None:
        """Predicted seconds that prefill or encoding may take in this step; None while that is not known."""
        if not self._plain_s or not (self._measured or self._taken):
            return None
        # The measured cost was the least of several measurements, so it is compared with the shortest step.
        trust = _TRUST if self._measured else 0.0
        predicted = trust * min(self._plain_s) + sum(predicted for _, predicted in self._taken)
        taken = trust + sum(taken for taken, _ in self._taken)
        return (self._aim - 1) * predicted / max(taken, _LEAST)

    def stepped(self, seconds: float, predicted_s: float | None) -> None:
        """Note a decode step.

        Args:
            seconds: from the end of the step before to the end of this one.
            predicted_s: of the prefill and encoding in it; None: it did something else beside.
        """
        before, self._before = self._before, predicted_s
        if predicted_s is None or before is None:
            return
        if predicted_s == before == 0:
            self._plain_s.append(max(seconds, _LEAST))  # a clock may be coarse
        elif self._plain_s:
            ratio = seconds / statistics.median(self._plain_s)
            # The device may have run this chunk or the one before: half of each is right on average.
            self._taken.append((min(ratio - 1, _OUTLIER), (predicted_s + before) / 2))
            self._aim = min(max(self._aim * (_OVER if ratio > LIMIT else _WITHIN), LEAST_AIM), MOST_AIM)
