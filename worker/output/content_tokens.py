"""Which of an answer's tokens are content. Log-probabilities of the other tokens are not part of a message."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from worker.output.text_field import Span


@dataclass(slots=True)
class _Group:
    """Consecutive tokens that complete a piece of text together: all but the last have no text of their own.

    Attributes:
        first, last: index of the first token in the answer, and that after the last.
        start, end: the first character of the text in the answer's text, and that after its last.
        reported: whether the tokens were reported as content.
    """

    first: int
    last: int
    start: int
    end: int
    reported: bool = False


class ContentTokens:
    """Finds the tokens of content. A token that is only partly content is one of them."""

    def __init__(self) -> None:
        self._groups: deque[_Group] = deque()
        self._count = 0
        self._grouped = 0
        self._length = 0

    def add_token(self, text: str) -> None:
        """Add the next token of the answer with the text that it completes."""
        self._count += 1
        if text:
            self.add_text(text)

    def add_text(self, text: str) -> None:
        """Add text that the tokens so far complete."""
        end = self._length + len(text)
        self._groups.append(_Group(self._grouped, self._count, self._length, end))
        self._grouped, self._length = self._count, end

    def of(self, spans: Iterable[Span]) -> list[int]:
        """Return the tokens of new content, as the first index and that after the last of each run of tokens.

        Args:
            spans: where the content is in the answer's text, in order.
        """
        runs: list[int] = []
        for start, end in spans:
            while self._groups and self._groups[0].end <= start:
                self._groups.popleft()
            for group in self._groups:
                if group.start >= end:
                    break
                if not group.reported and group.last > group.first:
                    group.reported = True
                    _extend(runs, group)
        return runs


def _extend(runs: list[int], group: _Group) -> None:
    if runs and runs[-1] == group.first:
        runs[-1] = group.last
    else:
        runs += [group.first, group.last]
