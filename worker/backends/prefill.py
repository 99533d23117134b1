"""Prompts on their way into the cache, a chunk between two decode steps.

Short prompts go together, whole, several at a time; a long one goes alone, chunk by chunk. When both wait they take
turns, so neither kind waits for more than one chunk of the other, and a short prompt never shares a cache
with a long one, which would pad it to that length. What counts is what is left to read: the longest prefix that an
earlier row has left behind is taken over, and each prompt is left behind for the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from worker.backends import kv
from worker.backends.base import OutOfMemory, Row
from worker.backends.memory import is_out_of_memory
from worker.backends.pace import Pace
from worker.backends.prefix_cache import PrefixCache

SHORT_CHUNKS = 2
"""A prompt of at most so many chunks is short: the whole of it disturbs less than the number of its chunks would."""

MOST_TOGETHER = 8
"""Short prompts in one chunk. More would not make a token cheaper, and would delay the first answers."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one chunk did.

    Attributes:
        rows: those that have all but their last prompt token in `cache` now.
        reused: how many tokens of each were there before.
        tokens: how many it processed.
        failed: a row that there is no memory for, even when it is read alone and no prefixes are kept.
    """

    rows: tuple[Row, ...] = ()
    cache: kv.Layers = field(default_factory=list)
    reused: tuple[int, ...] = ()
    tokens: int = 0
    failed: tuple[tuple[Row, Exception], ...] = ()


@dataclass(slots=True)
class _Long:
    """The long prompt that is being read; `reused` of its tokens need not be, `done` are in the cache."""

    row: Row
    cache: kv.Layers
    reused: int
    done: int


class Prefill:
    """Rows whose prompts are not in the cache yet.

    Args:
        model: an mlx-lm model.
        chunk: tokens of a long prompt that are processed at a time, at most.
        prefixes: gives and keeps the beginnings of prompts.
        pace: says how many of them, beside rows that decode.
    """

    def __init__(self, model: Any, chunk: int, prefixes: PrefixCache, pace: Pace) -> None:
        self._model = model
        self._prefixes = prefixes
        self._chunk = chunk
        self._pace = pace
        self._decoding = False
        self._short: deque[Row] = deque()
        self._long: deque[Row] = deque()
        self._reading: _Long | None = None
        self._queued: list[Any] = []
        self._at_hand: tuple[Row, ...] = ()
        self._tried_again: set[int] = set()
        self._long_next = False

    def __len__(self) -> int:
        return len(self._short) + len(self._long) + (self._reading is not None)

    def add(self, row: Row) -> None:
        """Take a row in."""
        (self._short if self._is_short(row) else self._long).append(row)

    def remove(self, uids: Collection[int]) -> None:
        """Drop rows."""
        self._tried_again -= set(uids)
        self._short = deque(row for row in self._short if row.uid not in uids)
        self._long = deque(row for row in self._long if row.uid not in uids)
        reading = self._reading
        if reading is not None and reading.row.uid in uids:
            self._prefixes.store(reading.row.owner, reading.row.prompt[: reading.done], reading.cache, 0)
            self._reading = None

    def advance(self, decoding: bool = False) -> Chunk:
        """Queue the next chunk on the device, if any prompt waits.

        Args:
            decoding: whether rows wait for their next token meanwhile.

        Raises:
            Exception: rows that are in the batch already are to blame, or it is not for want of memory.
        """
        self._decoding = decoding
        try:
            return self._next_chunk()
        except Exception as error:
            if not self._at_hand or not is_out_of_memory(error):
                raise
            return self._make_room(error)

    def _next_chunk(self) -> Chunk:
        # No more than one chunk ahead of the device, or the whole queue of prompts would be piled up there.
        mx.eval(self._queued)
        self._queued = []
        self._at_hand = ()
        if self._reading is None and self._long:
            row = self._long.popleft()
            self._at_hand = (row,)
            reused, layers = self._prefixes.load(row.owner, _to_read(row))
            self._reading = _Long(row, kv.merge([layers]), reused, reused)
        reading = self._reading
        turn, self._long_next = self._long_next, not self._long_next
        if reading is not None and (turn or not self._short) and (size := self._pace.next(self._decoding)):
            return self._read_on(reading, size)
        return self._read_short() if self._short else Chunk()

    def nbytes(self) -> int:
        """Bytes of cache that half-read prompts occupy."""
        return kv.nbytes(self._reading.cache) if self._reading is not None else 0

    def _read_short(self) -> Chunk:
        rows = self._next_short()
        if not rows:
            return Chunk()
        self._at_hand = tuple(rows)
        reused, layers = zip(*(self._prefixes.load(row.owner, _to_read(row)) for row in rows), strict=True)
        cache = kv.merge(layers)
        unread = [_to_read(row)[length:] for row, length in zip(rows, reused, strict=True)]
        self._feed(cache, unread)
        return self._done(Chunk(tuple(rows), cache, reused, sum(map(len, unread))))

    def _next_short(self) -> list[Row]:
        """The first of the short ones and those next in line that are about as long, what was read before included."""
        rows: list[Row] = []
        most = SHORT_CHUNKS * self._chunk
        while self._short and len(rows) < MOST_TOGETHER:
            row = self._short[0]
            if rows and abs(len(row.prompt) - len(rows[0].prompt)) > most:
                break
            self._short.popleft()
            if self._is_short(row):
                rows.append(row)
            else:  # its prefix was there when it came, and has been forgotten since
                self._long.appendleft(row)
        return rows

    def _read_on(self, reading: _Long, size: int) -> Chunk:
        row, start = reading.row, reading.done
        self._at_hand = (row,)
        tokens = _to_read(row)
        reading.done = min(start + size, len(tokens))
        kv.reserve(reading.cache, len(tokens))
        self._feed(reading.cache, [tokens[start : reading.done]])
        if reading.done < len(tokens):
            return Chunk(tokens=reading.done - start)
        self._reading = None
        return self._done(Chunk((row,), reading.cache, (reading.reused,), reading.done - start))

    def _done(self, chunk: Chunk) -> Chunk:
        """Keep the prompts: whoever begins with the same need not wait until these rows have ended."""
        for place, row in enumerate(chunk.rows):
            self._prefixes.store(row.owner, _to_read(row), chunk.cache, place)
            if row.shared:
                self._prefixes.share(row.owner, _to_read(row)[: row.shared])
            self._tried_again.discard(row.uid)
        self._at_hand = ()
        return chunk

    def _make_room(self, error: Exception) -> Chunk:
        """An allocation failed: give back what can be given back, and read each of the rows at hand alone once more."""
        rows, self._at_hand, self._queued = self._at_hand, (), []
        if self._reading is not None and self._reading.row in rows:
            self._reading = None
        self._prefixes.clear()
        mx.clear_cache()
        blamed = [row for row in rows if row.uid in self._tried_again]
        self._long.extendleft(row for row in reversed(rows) if row not in blamed)
        self._tried_again = self._tried_again ^ {row.uid for row in rows}
        return Chunk(failed=tuple((row, OutOfMemory(str(error))) for row in blamed))

    def _is_short(self, row: Row) -> bool:
        tokens = _to_read(row)
        return len(tokens) - self._prefixes.length(row.owner, tokens) <= SHORT_CHUNKS * self._chunk

    def _feed(self, cache: kv.Layers, tokens: list[tuple[int, ...]]) -> None:
        kv.feed(self._model, cache, tokens)
        self._queued = kv.states(cache)


def _to_read(row: Row) -> tuple[int, ...]:
    # The last token of a prompt is the first that the decode batch is fed.
    return row.prompt[:-1]
