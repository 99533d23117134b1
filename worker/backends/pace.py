"""How many tokens of a long prompt are read between two decode steps, found while it runs.

Whoever waits for the next token of a running row waits for the chunk too. So a step with a chunk is to last no longer
than three without one, but for one in a hundred: about twice as long where times vary, more where they do not. What a
chunk will cost is foretold, because one that turns out too dear has been waited for already: its shape (how much is the
pass, a token, a token far behind others) was measured when the model was loaded (`worker.backends.cost`), its scale is
what the last chunks took beside that. Steps without a chunk are a measure only while they are recent, so the reading
pauses for a moment now and then. Where nothing decodes nobody waits, and chunks are as large as they may be.
"""

from __future__ import annotations

import statistics
from collections import deque

from worker.backends.cost import UNKNOWN, Cost

LIMIT = 3.0
"""A step with a chunk lasts no longer than so many without one, but for one in a hundred."""
LEAST_AIM, AIM, MOST_AIM = 1.5, 1.8, 2.2
"""What it is to last: less than at first where more steps are over the limit, more where fewer are."""
PAUSE_AFTER = 16
"""Chunks between two pauses."""
PAUSE = 2
"""Steps of a pause. The device may be a step behind: the first may still have a chunk in it."""

_REMEMBERED = 32
"""Steps with a chunk that say what those cost now."""
_OUTLIER = 4
"""Quiet steps that a chunk may take; what is beyond that was somebody else on the machine."""
_TRUST = 2
"""The cost that was measured at the start counts as much as chunks that took so many quiet steps."""
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

    def next(self, decoding: bool, position: int = 0) -> int:
        """How many tokens to read now behind so many, beside rows that decode or alone; 0 in a pause."""
        if not decoding:
            return self._most
        self._since_pause += 1
        if self._since_pause <= PAUSE_AFTER:
            self._tokens = self._fitting(position)
            return self._tokens
        if self._since_pause == PAUSE_AFTER + PAUSE:
            self._since_pause = 0
        return 0

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

    def _fitting(self, position: int) -> int:
        spare = self._spare()
        if spare is None:
            return self._most
        fitting = max(self._cost.tokens(spare, position), self._cost.efficient(position), 1.0)
        return int(min(fitting, self._most))

    def _spare(self) -> float | None:
        """What the next chunk may cost, in the unit of what is foretold; None when that is not known."""
        if not self._quiet_s or not (self._measured or self._taken):
            return None
        # What was measured counts as some chunks. It was the least of several times, and is so beside the least step.
        trust = _TRUST if self._measured else 0.0
        foretold = trust * min(self._quiet_s) + sum(foretold for _, foretold in self._taken)
        taken = trust + sum(taken for taken, _ in self._taken)
        return (self._aim - 1) * foretold / max(taken, _LEAST)
