"""A row of the batch that decodes: how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worker.runner.base import Row
from worker.runner.speculation.ngram import Lookup


@dataclass(slots=True)
class Slot:
    """One of them.

    Attributes:
        position: of the token chosen next, in the whole answer.
        cached: the tokens in the cache: all but the one fed next.
        newest: the one fed next; None while it is not read yet.
    """

    row: Row
    position: int
    cached: list[int]
    newest: int | None
    _lookup: Lookup | None = None

    @classmethod
    def of(cls, row: Row) -> Slot:
        """A row that has all but the last token of its prompt in the cache."""
        return cls(row, row.generated, list(row.prompt[:-1]), row.prompt[-1])

    @property
    def chosen(self) -> int:
        """Tokens chosen here so far; the newest may not be read yet."""
        return self.position - self.row.generated

    @property
    def room(self) -> int:
        """Tokens that may still be chosen."""
        return self.row.room - self.chosen

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self.cached)

    def fed(self) -> None:
        """The newest token was put into the cache, and the next is chosen but not read."""
        if self.newest is not None:
            self.cached.append(self.newest)
            self.newest = None
        self.position += 1

    def grow(self, tokens: Sequence[int]) -> None:
        """These were chosen, and all but the last of them, and the newest before them, put into the cache."""
        self.cached += [*([] if self.newest is None else [self.newest]), *tokens[:-1]]
        self.newest = tokens[-1]
        self.position += len(tokens)

    @property
    def lookup(self) -> Lookup:
        """What guesses its next tokens, from all that were read."""
        if self._lookup is None:
            self._lookup = Lookup(self.cached)
        unknown = self.cached[len(self._lookup) :]
        if self.newest is not None and len(self._lookup) <= self.length:
            unknown.append(self.newest)
        for token in unknown:
            self._lookup.add(token)
        return self._lookup
