"""A row of a decode batch: how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worker.runner.base import Row


@dataclass(slots=True, eq=False)
class DecodeRow:
    """A row that has all but the last token of its prompt in the cache.

    Attributes:
        position: of the token sampled next, in the whole answer.
        cached: the tokens in the cache: all but the one that is the next input.
        newest: the next input; None while it is on the device and not read yet.
    """

    row: Row
    position: int
    cached: list[int]
    newest: int | None

    @classmethod
    def of(cls, row: Row) -> DecodeRow:
        """A row whose prompt was just prefilled."""
        return cls(row, row.generated, list(row.prompt[:-1]), row.prompt[-1])

    @property
    def sampled(self) -> int:
        """Tokens sampled here so far; the newest may not be read yet."""
        return self.position - self.row.generated

    @property
    def left(self) -> int:
        """Tokens that may still be sampled."""
        return self.row.max_new_tokens - self.sampled

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self.cached)

    def stepped(self) -> None:
        """The next input was put into the cache, and the one after it is sampled but not read."""
        if self.newest is not None:
            self.cached.append(self.newest)
            self.newest = None
        self.position += 1

    def grow(self, tokens: Sequence[int]) -> None:
        """These were sampled; all but the last of them, and the input before them, were put into the cache."""
        self.cached += [*([] if self.newest is None else [self.newest]), *tokens[:-1]]
        self.newest = tokens[-1]
        self.position += len(tokens)
