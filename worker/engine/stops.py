"""Stop strings. They are matched on text, because a stop string may begin in one token and end in another."""

from __future__ import annotations

from collections.abc import Iterable


class StopMatcher:
    """Passes one row's text on up to the first stop string.

    Text that may be the beginning of a stop string is held back until that is known. Of several stop strings, the one
    that is complete first wins; of those complete at the same character, the longest. So the result depends only on the
    text, not on how it is split into tokens.

    Attributes:
        matched: the stop string that ended the text; None until there is one.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; return the text that may be published now, and whether a stop string ends it."""
        if not self._stops:
            return text, False
        text = self._held + text
        if match := self._first_match(text):
            start, self.matched = match
            self._held = ""
            return text[:start], True
        published = len(text) - self._held_length(text)
        self._held = text[published:]
        return text[:published], False

    def flush(self) -> str:
        """Return the text held back, because no more text follows."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """Return where the first stop string in the text begins, and the string."""
        starts = ((text.find(stop), stop) for stop in self._stops)
        matches = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        return min(matches)[1:] if matches else None

    def _held_length(self, text: str) -> int:
        """Return the length of the longest end of the text that is the beginning of a stop string."""
        return max(_overlap(text, stop) for stop in self._stops)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is a proper prefix of the stop string."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
