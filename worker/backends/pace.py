"""How many tokens of a long prompt are read between two decode steps, found while it runs.

Whoever waits for the next token of a running row waits for the chunk too. What a chunk costs depends on the model, the
device, how much of the prompt was read before and what else the machine does. So it is measured: chunks are made so
large that a step with one lasts about twice as long as a step without. Steps without one are a measure only while they
are recent, so the reading pauses for a moment now and then. Where nothing decodes nobody waits, and chunks are as large
as they may be.
"""

from __future__ import annotations

import statistics
from collections import deque

SMALLEST = 4
"""A chunk may be so many times smaller than it may be at most: each is a pass, whatever its size."""
PAUSE_AFTER = 16
"""Chunks between two pauses."""
PAUSE = 2
"""Steps of a pause. The device may be a step behind: the first may still have a chunk in it."""

_MOST_GROWTH = 1.25
"""From one chunk to the next: one that was cheap by chance is not followed by one that is far too dear."""


class Pace:
    """Chooses the size of chunks.

    Args:
        most: tokens of a chunk at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._least = max(1, most // SMALLEST)
        self._tokens = float(most)
        self._since_pause = PAUSE_AFTER  # nothing is known yet
        self._read_before: int | None = None
        # Medians: one step that somebody else on the machine made long says nothing.
        self._quiet_s: deque[float] = deque(maxlen=7)
        self._token_s: deque[float] = deque(maxlen=5)

    @property
    def tokens(self) -> int:
        """The size of a chunk beside rows that decode."""
        return int(self._tokens)

    def next(self, decoding: bool) -> int:
        """How many tokens to read now, beside rows that decode or alone; 0 in a pause."""
        if not decoding:
            return self._most
        self._since_pause += 1
        if self._since_pause <= PAUSE_AFTER:
            return self.tokens
        if self._since_pause == PAUSE_AFTER + PAUSE:
            self._since_pause = 0
        return 0

    def stepped(self, seconds: float, read: int | None) -> None:
        """A decode step took so long, and so many tokens of a long prompt were read beside it; None: it did more."""
        before, self._read_before = self._read_before, read
        if read == before == 0:
            self._quiet_s.append(seconds)
        elif read and before and self._quiet_s:
            self._adapt(statistics.median(self._quiet_s), seconds, before)

    def _adapt(self, quiet_s: float, seconds: float, read: int) -> None:
        self._token_s.append((seconds - quiet_s) / read)
        cost = statistics.median(self._token_s)
        fitting = quiet_s / cost if cost > 0 else self._most
        self._tokens = min(max(fitting, self._least), self._tokens * _MOST_GROWTH, self._most)
