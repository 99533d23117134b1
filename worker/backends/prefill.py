"""Prompts on their way into the cache, a chunk between two decode steps.

Short prompts go together, whole, several at a time; a long one goes alone, chunk by chunk. When both wait they take
turns, so neither kind waits for more than one chunk of the other, and a short prompt never shares a cache
with a long one, which would pad it to that length. What counts is what is left to read: the longest prefix that an
earlier row has left behind is taken over, and each prompt is left behind for the next.

Beside rows that decode, a long prompt is read as the pace allows. Short ones are not: read one by one under the same
budget, 32 that came at once gave two fifths fewer tokens a second, and the last waited four times as long.
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
        self._decoding = False
        self._short: deque[Row] = deque()
        self._long: deque[Row] = deque()
        self._reading: _Reading | None = None
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

    def nbytes(self) -> int:
        """Bytes of cache that half-read prompts occupy."""
        return kv.nbytes(self._reading.cache) if self._reading is not None else 0

    def _next_chunk(self) -> Chunk:
        # No more than one chunk ahead of the device, or the whole queue of prompts would be piled up there.
        mx.eval(self._queued)
        self._queued = []
        self._at_hand = ()
        turns = (self._read_long, self._read_short) if self._long_next else (self._read_short, self._read_long)
        self._long_next = not self._long_next
        return next((chunk for read in turns if (chunk := read()) is not None), Chunk())

    def _next_short(self) -> list[Row]:
        """The first of the short ones and those next in line that are about as long."""
        rows: list[Row] = []
        while self._short and len(rows) < MOST_TOGETHER:
            row = self._short[0]
            if rows and self._apart(row, rows[0]):
                break
            self._short.popleft()
            if self._is_short(row):
                rows.append(row)
            else:  # its prefix was there when it came, and has been forgotten since
                self._long.appendleft(row)
        return rows

    def _apart(self, row: Row, other: Row) -> bool:
        """Whether one would be padded by more than a short prompt has, what was read before included."""
        return abs(len(row.prompt) - len(other.prompt)) > SHORT_CHUNKS * self._chunk

    def _read_short(self) -> Chunk | None:
        """Read short ones, whole; None where none waits."""
        rows = self._next_short()
        if not rows:
            return None
        self._at_hand = tuple(rows)
        reused, layers = zip(*(self._prefixes.load(row.owner, _to_read(row)) for row in rows), strict=True)
        cache = kv.alone(layers[0]) if len(rows) == 1 else kv.merge(layers)
        unread = [_to_read(row)[length:] for row, length in zip(rows, reused, strict=True)]
        self._feed(cache, unread)
        return self._done(Chunk(tuple(rows), cache, reused, sum(map(len, unread))))

    def _read_long(self) -> Chunk | None:
        """Read on in the long one; None where none waits, or in a pause."""
        if self._reading is not None:
            return self._read_on(self._reading)
        if not self._long:
            return None
        row = self._long.popleft()
        self._at_hand = (row,)
        reused, layers = self._prefixes.load(row.owner, _to_read(row))
        self._reading = _Reading(row, kv.alone(layers), reused, reused, reused)
        return self._allocated(self._reading) if reused and self._decoding else self._read_on(self._reading)

    def _read_on(self, reading: _Reading) -> Chunk | None:
        row, start = reading.row, reading.done
        self._at_hand = (row,)
        tokens = _to_read(row)
        at_once = -(-len(reading.cache) // RESERVED_IN) if self._decoding else None
        if kv.reserve(reading.cache, len(tokens), at_once) and self._decoding:
            return self._allocated(reading)
        size = self._pace.next(self._decoding, start)
        if not size:
            return None
        reading.done = min(start + size, len(tokens))
        read = reading.done - start
        self._feed(reading.cache, [tokens[start : reading.done]])
        if reading.done < len(tokens):
            self._keep_begun(reading)
            return Chunk(tokens=read, foretold=self._pace.foretold(read, start))
        self._reading = None
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
        if self._reading is not None and self._reading.row in rows:
            self._reading = None
        self._prefixes.clear()
        mx.clear_cache()
        blamed = [row for row in rows if row.uid in self._tried_again]
        self._long.extendleft(row for row in reversed(rows) if row not in blamed)
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
