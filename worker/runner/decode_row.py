"""A row of a decode batch, with its progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worker.runner.base import Row
from worker.runner.logits.constraint import Guide


@dataclass(slots=True, eq=False)
class DecodeRow:
    """A row with all tokens of its prompt but the last in the cache.

    Attributes:
        position: answer position of the token that is sampled next.
        cached_ids: the tokens in the cache: all but the next input.
        next_input: the token that is the next input; None while it is on the device and has not been read.
        guide: the state of the row's constraint; None if it has none.
        saved: number of tokens that were sampled when the row was last saved as a prefix.
    """

    row: Row
    position: int
    cached_ids: list[int]
    next_input: int | None
    guide: Guide | None = None
    saved: int = 0

    @classmethod
    def after_prefill(cls, row: Row) -> DecodeRow:
        """Return a row that was just prefilled."""
        length = len(row.prompt) - row.generated
        guide = row.constraint.start(row.prompt[:length], row.prompt[length:]) if row.constraint else None
        return cls(row, row.generated, list(row.prompt[:-1]), row.prompt[-1], guide)

    @property
    def uid(self) -> int:
        """See `Row.uid`."""
        return self.row.uid

    @property
    def sampled(self) -> int:
        """Number of tokens sampled since the prefill, including one that has not been read yet."""
        return self.position - self.row.generated

    @property
    def remaining(self) -> int:
        """Number of tokens that may still be sampled."""
        return self.row.max_new_tokens - self.sampled

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return len(self.cached_ids)

    def advance(self) -> None:
        """Record a decode step: the next input was cached, and its successor was sampled but not read."""
        if self.next_input is not None:
            self.cached_ids.append(self.next_input)
            self.next_input = None
        self.position += 1

    def append(self, tokens: Sequence[int]) -> None:
        """Record several sampled tokens: the next input and all of these tokens but the last were cached."""
        self.cached_ids += [*([] if self.next_input is None else [self.next_input]), *tokens[:-1]]
        self.next_input = tokens[-1]
        self.position += len(tokens)
