"""Stop strings, matched on text: a stop may begin in one token and end in another, and none of it may be emitted."""

from __future__ import annotations

from collections.abc import Iterable


class StopMatcher:
    """Passes one row's text on up to the first stop string.

    Text that may be the beginning of a stop is held back until it is known. Of several stops, the one that is
    complete first wins (of those complete at the same character, the longest): so the result is a function of the
    text alone, however the tokens cut it.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        longest = max(map(len, self._stops), default=0)
        # Proper prefixes of the stops by length, longest first; `endswith` checks all of one length in one call.
        self._prefixes = tuple(
            (length, tuple({stop[:length] for stop in self._stops if len(stop) > length}))
            for length in range(longest - 1, 0, -1)
        )
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be emitted now that this text follows, and whether a stop string ends it."""
        if not self._stops:
            return text, False
        text = self._held + text
        start = self._first_stop(text)
        if start is not None:
            self._held = ""
            return text[:start], True
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, once no text follows."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        found = ((text.find(stop), len(stop)) for stop in self._stops)
        ends = [(start + length, start) for start, length in found if start >= 0]
        return min(ends)[1] if ends else None

    def _undecided(self, text: str) -> int:
        for length, prefixes in self._prefixes[max(0, len(self._prefixes) - len(text)) :]:
            if text.endswith(prefixes):
                return length
        return 0
