"""The text of one part of a message, without the white space next to the borders of sections."""

from __future__ import annotations

from typing import TypeAlias

Span: TypeAlias = tuple[int, int]
"""The first character of a piece in the answer's text, and the one after its last."""


class TextField:
    """Passes text on, but holds white space back until other text follows.

    Args:
        trims: whether white space at the beginning and the end is always dropped. Otherwise only next to a border.

    Attributes:
        started: whether there was any text other than white space.
        spans: where the text that the last call returned is in the answer's text.
    """

    def __init__(self, *, trims: bool) -> None:
        self.started = False
        self.spans: list[Span] = []
        self._trims_start = trims
        self._trims_end = trims
        self._space: list[tuple[str, int]] = []  # with the position of each piece

    def push(self, text: str, position: int) -> str:
        """Add text that begins at a position; return what to emit."""
        self.spans = []
        end = len(text.rstrip())
        if not end:
            self._hold(text, position)
            return ""
        start = 0
        if self._trims_start and not self.started:
            start = len(text) - len(text.lstrip())
            self._space = []
        before = self._release()
        self._hold(text[end:], position + end)
        self.started = True
        self._trims_end = False
        self.spans.append((position + start, position + end))
        return before + text[start:end]

    def border(self) -> None:
        """Note that another section begins or has ended here."""
        self._trims_start = True
        self._trims_end = True

    def separate(self) -> None:
        """Put an empty line between the text so far and the next, instead of their white space."""
        self._space = [("\n\n", -1)] if self.started else []

    def flush(self) -> str:
        """Return the white space at the end."""
        self.spans = []
        return "" if self._trims_end else self._release()

    def _hold(self, text: str, position: int) -> None:
        if text:
            self._space.append((text, position))

    def _release(self) -> str:
        released, self._space = self._space, []
        self.spans += [(position, position + len(text)) for text, position in released if position >= 0]
        return "".join(text for text, _ in released)
