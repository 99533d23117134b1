"""Prompts on their way into the cache, a chunk between two decode steps.

Short prompts go together, whole, several at a time; a long one goes alone, chunk by chunk. When both wait they take
turns, so neither kind waits for more than one chunk of the other, and a short prompt never shares a cache
with a long one, which would pad it to that length. What counts is what is left to read: the longest prefix that an
earlier row has left behind is taken over, and each prompt is left behind for the next.

Beside rows that decode, either kind reads no more in a step than the pace allows: a short prompt that is more by itself
is read in chunks, too, on the short ones' turns. A crowd is not held up for a few: where more short prompts wait than
rows decode, they are read as if none did.
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
"""A prompt that costs no more than so many chunks is short."""

MOST_TOGETHER = 8
"""Short prompts in one chunk. More would not make a token cheaper, and would delay the first answers."""

RESERVED_IN = 8
"""Steps in which place is made for a long prompt, beside rows that decode: it takes longer than they may wait."""

KEPT_AT_ONCE = 256
"""Tokens of a long prompt that become a prefix at a time."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one chunk did.

    Attributes:
        rows: those that have all but their last prompt token in `cache` now.
        reused: how many tokens of each were there before.
        tokens: how many it processed.
        foretold: what the pace expected of that; None where it did something else.
        failed: a row that there is no memory for, even when it is read alone and no prefixes are kept.
    """

    rows: tuple[Row, ...] = ()
    cache: kv.Layers = field(default_factory=list)
    reused: tuple[int, ...] = ()
    tokens: int = 0
    foretold: float | None = 0.0
    failed: tuple[tuple[Row, Exception], ...] = ()


@dataclass(slots=True)
class _Reading:
    """A prompt that is read chunk by chunk.

    Attributes:
        reused: how many of its tokens need not be read.
        done: how many are in the cache.
        kept: how many of those are prefixes already.
    """

    row: Row
    cache: kv.Layers
    reused: int
    done: int
    kept: int


@dataclass(slots=True)
class _Line:
    """Rows of one kind, in their order; `reading` is the first of them, when it has begun and is not read whole."""

    waiting: deque[Row] = field(default_factory=deque)
    reading: _Reading | None = None

    def __len__(self) -> int:
        return len(self.waiting) + (self.reading is not None)


class Prefill:
    """Rows whose prompts are not in the cache yet.

    Args:
        model: an mlx-lm model.
        chunk: tokens of a long prompt that are processed at a time, at most.
        prefixes: gives and keeps the beginnings of prompts.
        pace: says how many tokens a chunk has, beside rows that decode.
    """

    def __init__(self, model: Any, chunk: int, prefixes: PrefixCache, pace: Pace) -> None:
        self._model = model
        self._prefixes = prefixes
        self._chunk = chunk
        self._pace = pace
        self._decoding = 0
        self._short = _Line()
        self._long = _Line()
        self._queued: list[Any] = []
        self._at_hand: tuple[Row, ...] = ()
        self._tried_again: set[int] = set()
        self._long_next = False

    def __len__(self) -> int:
        return len(self._short) + len(self._long)

    def add(self, row: Row) -> None:
        """Take a row in."""
        (self._short if self._is_short(row) else self._long).waiting.append(row)

    def remove(self, uids: Collection[int]) -> None:
        """Drop rows."""
        self._tried_again -= set(uids)
        for line in self._lines:
            line.waiting = deque(row for row in line.waiting if row.uid not in uids)
            reading = line.reading
            if reading is not None and reading.row.uid in uids:
                self._prefixes.store(reading.row.owner, reading.row.prompt[: reading.done], reading.cache, 0)
                line.reading = None

    def advance(self, decoding: int = 0) -> Chunk:
        """Queue the next chunk on the device, if any prompt waits.

        Args:
            decoding: rows that wait for their next token meanwhile.

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

    def nbytes(self) -> int:
        """Bytes of cache that half-read prompts occupy."""
        return sum(kv.nbytes(line.reading.cache) for line in self._lines if line.reading is not None)

    @property
    def _lines(self) -> tuple[_Line, _Line]:
        """Both, the one whose turn it is first."""
        return (self._long, self._short) if self._long_next else (self._short, self._long)

    def _next_chunk(self) -> Chunk:
        # No more than one chunk ahead of the device, or the whole queue of prompts would be piled up there.
        mx.eval(self._queued)
        self._queued = []
        self._at_hand = ()
        lines, self._long_next = self._lines, not self._long_next
        return next((chunk for line in lines if line and (chunk := self._read(line)) is not None), Chunk())

    def _read(self, line: _Line) -> Chunk | None:
        """Read of the first rows of a line; None where nothing is to be read now."""
        if line.reading is not None:
            return self._read_on(line, line.reading)
        if line is self._short and (rows := self._next_short()):
            return self._read_together(rows)
        return self._begin(line) if line.waiting else None

    def _next_short(self) -> list[Row]:
        """Those first in line that go together; none when the first is too much to be read at once."""
        rows: list[Row] = []
        waiting = self._short.waiting
        paced = len(waiting) <= self._decoding
        while waiting and len(rows) < MOST_TOGETHER:
            row = waiting[0]
            if rows and self._apart(row, rows[0]):
                break
            if not self._is_short(row):  # its prefix was there when it came, and has been forgotten since
                self._long.waiting.appendleft(waiting.popleft())
            elif paced and not self._affordable([*rows, row]):
                break
            else:
                rows.append(waiting.popleft())
        return rows

    def _apart(self, row: Row, other: Row) -> bool:
        """Whether one would be padded by more than a short prompt has, what was read before included."""
        return abs(len(row.prompt) - len(other.prompt)) > SHORT_CHUNKS * self._chunk

    def _affordable(self, rows: list[Row]) -> bool:
        """Whether the pace allows to read these together; all are padded to the longest."""
        unread, reused = (max(each) for each in zip(*map(self._unread, rows), strict=True))
        return self._pace.affords(unread * len(rows), reused)

    def _read_together(self, rows: list[Row]) -> Chunk:
        self._at_hand = tuple(rows)
        reused, layers = zip(*(self._prefixes.load(row.owner, _to_read(row)) for row in rows), strict=True)
        cache = kv.alone(layers[0]) if len(rows) == 1 else kv.merge(layers)
        unread = [_to_read(row)[length:] for row, length in zip(rows, reused, strict=True)]
        self._feed(cache, unread)
        return self._done(Chunk(tuple(rows), cache, reused, sum(map(len, unread))))

    def _begin(self, line: _Line) -> Chunk | None:
        row = line.waiting.popleft()
        self._at_hand = (row,)
        reused, layers = self._prefixes.load(row.owner, _to_read(row))
        line.reading = _Reading(row, kv.alone(layers), reused, reused, reused)
        return self._allocated(line.reading) if reused and self._decoding else self._read_on(line, line.reading)

    def _read_on(self, line: _Line, reading: _Reading) -> Chunk | None:
        row, start = reading.row, reading.done
        self._at_hand = (row,)
        tokens = _to_read(row)
        at_once = -(-len(reading.cache) // RESERVED_IN) if self._decoding else None
        if kv.reserve(reading.cache, len(tokens), at_once) and self._decoding:
            return self._allocated(reading)
        size = self._pace.next(self._decoding > 0, start)
        if not size:
            return None
        reading.done = min(start + size, len(tokens))
        read = reading.done - start
        self._feed(reading.cache, [tokens[start : reading.done]])
        if reading.done < len(tokens):
            self._keep_begun(reading)
            return Chunk(tokens=read, foretold=self._pace.foretold(read, start))
        line.reading = None
        return self._done(Chunk((row,), reading.cache, (reading.reused,), read))

    def _allocated(self, reading: _Reading) -> Chunk:
        """A step of its own for a cache that was made or copied, which takes as long as a chunk."""
        self._queued = kv.states(reading.cache)
        mx.async_eval(self._queued)  # type: ignore[no-untyped-call]  # mlx's stub has no types for it
        return Chunk(foretold=None)

    def _keep_begun(self, reading: _Reading) -> None:
        """Keep a long prompt along its way: all of it in one step would hold that one up."""
        if reading.done - reading.kept >= KEPT_AT_ONCE:
            row, reading.kept = reading.row, reading.done
            self._prefixes.store_begun(row.owner, row.prompt[: reading.done], reading.cache, 0)

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
        for line in self._lines:
            if line.reading is not None and line.reading.row in rows:
                line.reading = None
        self._prefixes.clear()
        mx.clear_cache()
        blamed = [row for row in rows if row.uid in self._tried_again]
        self._long.waiting.extendleft(row for row in reversed(rows) if row not in blamed)
        self._tried_again = self._tried_again ^ {row.uid for row in rows}
        return Chunk(failed=tuple((row, OutOfMemory(str(error))) for row in blamed))

    def _is_short(self, row: Row) -> bool:
        """Whether it costs no more than some chunks at the beginning of a prompt do."""
        foretold = self._pace.foretold
        return foretold(*self._unread(row)) <= foretold(SHORT_CHUNKS * self._chunk, 0)

    def _unread(self, row: Row) -> tuple[int, int]:
        """How many tokens are to be read, and behind how many."""
        tokens = _to_read(row)
        reused = self._prefixes.length(row.owner, tokens)
        return len(tokens) - reused, reused

    def _feed(self, cache: kv.Layers, tokens: list[tuple[int, ...]]) -> None:
        kv.feed(self._model, cache, tokens)
        self._queued = kv.states(cache)


def _to_read(row: Row) -> tuple[int, ...]:
    # The last token of a prompt is the first that the decode batch is fed.
    return row.prompt[:-1]
