"""How much of a long prompt is read between two decode steps, found while it runs.

Whoever waits for the next token of a running row waits for the chunk too. So a step with a chunk is to last no longer
than three without one, but for one in a hundred: about twice as long where times vary, more where they do not. What a
chunk will cost is foretold, because one that turns out too dear has been waited for already: its shape (how much is
the pass, a token, a token far behind others) was measured when the model was loaded (`worker.runner.prefill_cost`),
its scale is what the last chunks took beside that. Steps without a chunk are a measure only while they are recent, so
the reading pauses for a moment now and then.

A chunk may go through the model some layers at a time, in several steps. So the weights, which every chunk reads, cost
a step no more than its share of the layers, and chunks are as large as brings the prompt on soonest.
"""

from __future__ import annotations

import statistics
from collections import deque

from worker.runner.prefill_cost import UNKNOWN, Cost

LIMIT = 3.0
"""A step with a chunk lasts no longer than so many without one, but for one in a hundred."""
LEAST_AIM, AIM, MOST_AIM = 1.5, 1.8, 2.2
"""What it is to last: less than at first where more steps are over the limit, more where fewer are."""
PAUSE_AFTER = 16
"""Steps in which something is read, between two pauses."""
PAUSE = 2
"""Steps of a pause. The device may be a step behind: the first may still have a chunk in it."""

_REMEMBERED = 32
"""Steps with a chunk that say what those cost now."""
_OUTLIER = 4
"""Quiet steps that a chunk may take; what is beyond that was somebody else on the machine."""
_TRUST = 2
"""The cost that was measured at the start counts as much as chunks that took so many quiet steps."""
_NEARLY = 0.25
"""So much of a layer may be too much: times are not foretold that well, and one layer less may be half of them."""
_LEAST = 1e-9
_OVER, _WITHIN = 0.9, 1.001
"""What a step over the limit, or within it, does to the aim. They balance when one in a hundred is over it."""


class Pace:
    """Chooses the size of chunks.

    Args:
        most: tokens of a long prompt's chunk at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._cost = UNKNOWN
        self._measured = False
        self._tokens = most
        self._aim = AIM
        self._since_pause = PAUSE_AFTER  # nothing is known yet
        self._before: float | None = None
        # Medians: one step that somebody else on the machine made long says nothing.
        self._quiet_s: deque[float] = deque(maxlen=5)
        # In quiet steps, not in seconds: what makes all steps longer changes nothing.
        self._taken: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    def expect(self, cost: Cost) -> None:
        """Foretell by what was measured."""
        self._cost = cost
        self._measured = True
        self._taken.clear()

    @property
    def tokens(self) -> int:
        """The size of the last chunk beside rows that decode."""
        return self._tokens

    def rests(self) -> bool:
        """Whether nothing is to be read in this step beside the rows that decode. Asked once a step."""
        self._since_pause += 1
        pauses = self._since_pause > PAUSE_AFTER
        if self._since_pause == PAUSE_AFTER + PAUSE:
            self._since_pause = 0
        return pauses

    def chunk(self, position: int, layers: int) -> int:
        """How many tokens the next chunk is to have, behind so many, in a model of so many layers."""
        spare = self._spare()
        if spare is None:
            return self._most

        def fitting(at_once: int) -> int:
            """Tokens for which there is time when so many layers are done in a step."""
            return min(max(int(self._cost.tokens(spare * layers / at_once, position)), 0), self._most)

        # So many layers at once as give the most tokens a step; the chunk is through sooner with more of them.
        best = max(range(1, layers + 1), key=lambda at_once: (fitting(at_once) / -(-layers // at_once), at_once))
        self._tokens = min(max(fitting(best), int(self._cost.efficient(position)), 1), self._most)
        return self._tokens

    def share(self, tokens: int, position: int, layers: int) -> int:
        """How many of the layers there is time for in this step, with such a chunk: one at least."""
        return self.part(self.foretold(tokens, position), layers)

    def part(self, cost: float, layers: int) -> int:
        """How many of the layers there is time for in this step, of something that costs that much: one at least."""
        spare = self._spare()
        if spare is None:
            return layers
        return min(max(int(layers * spare / max(cost, _LEAST) + _NEARLY), 1), layers)

    def foretold(self, tokens: int, position: int) -> float:
        """What `stepped` wants to know of tokens that are being read."""
        return self._cost.seconds(tokens, position)

    def stepped(self, seconds: float, read: float | None) -> None:
        """A decode step took so long, and a chunk was read beside it, as `foretold`; 0: none; None: it did more."""
        before, self._before = self._before, read
        if read is None or before is None:
            return
        if read == before == 0:
            self._quiet_s.append(max(seconds, _LEAST))  # a clock may be coarse
        elif self._quiet_s:
            ratio = seconds / statistics.median(self._quiet_s)
            # The device may have done this chunk, or the one before: half of each, and on the whole it is right.
            self._taken.append((min(ratio - 1, _OUTLIER), (read + before) / 2))
            self._aim = min(max(self._aim * (_OVER if ratio > LIMIT else _WITHIN), LEAST_AIM), MOST_AIM)

    def _spare(self) -> float | None:
        """What the next chunk may cost, in the unit of what is foretold; None when that is not known."""
        if not self._quiet_s or not (self._measured or self._taken):
            return None
        # What was measured counts as some chunks. It was the least of several times, and is so beside the least step.
        trust = _TRUST if self._measured else 0.0
        foretold = trust * min(self._quiet_s) + sum(foretold for _, foretold in self._taken)
        taken = trust + sum(taken for taken, _ in self._taken)
        return (self._aim - 1) * foretold / max(taken, _LEAST)
