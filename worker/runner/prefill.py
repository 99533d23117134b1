"""Prompts on their way into the cache, a chunk or some layers of one between two decode steps.

Short prompts go together, whole, several at a time; a long one goes alone, chunk by chunk. When both wait they take
turns, so neither kind waits for more than one chunk of the other, and a short prompt never shares a cache
with a long one, which would pad it to that length. What counts is what is left to read: the longest prefix that an
earlier row has left behind is taken over, and each prompt is left behind for the next.

Beside rows that decode, a long prompt is read as the pace allows: a chunk that takes longer than a step may goes
through the model some layers at a time, so that a small share of a step need not mean chunks of a few tokens, which
cost as much as large ones do. Short ones are not paced: read one by one under the same budget, 32 that came at once
gave two fifths fewer tokens a second, and the last waited four times as long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from worker.engine.prefill_budget import Pace
from worker.runner import kv_cache as kv
from worker.runner.base import OutOfMemory, Row
from worker.runner.memory import is_out_of_memory
from worker.runner.prefix_cache import PrefixCache

SHORT_CHUNKS, SHORT_S = 2, 0.01
"""A prompt that costs no more than so many chunks, or seconds, is short: nobody sees a pause of that length."""

MOST_TOGETHER = 8
"""Short prompts in one chunk. More would not make a token cheaper, and would delay the first answers."""

RESERVED_IN = 8
"""Steps in which place is made for a long prompt, beside rows that decode: it takes longer than they may wait."""

KEPT_AT_ONCE = 256
"""Tokens of a long prompt that become a prefix at a time."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What was read in one step.

    Attributes:
        rows: those that have all but their last prompt token in `cache` now.
        reused: how many tokens of each were there before.
        tokens: of the chunk that has gone through all layers now.
        foretold: what the pace expected of what was done; None where it was something else.
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
        done: how many have gone through all layers.
        kept: how many of those are prefixes already.
        under_way: how many more are on their way.
        layers: that those have gone through.
    """

    row: Row
    cache: kv.Layers
    reused: int
    done: int
    kept: int
    under_way: int = 0
    layers: int = 0

    @property
    def depth(self) -> int:
        """Layers to go through. What the last one gives is not needed, only its cache is filled."""
        return max(len(self.cache) - 1, 1)

    def deepen(self, layers: int) -> kv.Layers:
        """Let what is under way go through so many layers more, if there are; the caches which that fills."""
        filled = self.layers + 1 if self.layers else 0
        self.layers = min(self.layers + layers, self.depth)
        return self.cache[filled : self.layers + 1]


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
        self._at_hand = tuple(row for row in self._at_hand if row.uid not in uids)
        self._short = deque(row for row in self._short if row.uid not in uids)
        self._long = deque(row for row in self._long if row.uid not in uids)
        reading = self._reading
        if reading is not None and reading.row.uid in uids:
            if not reading.under_way:
                self._prefixes.store(reading.row.owner, reading.row.prompt[: reading.done], reading.cache, 0)
            self._reading = None

    def advance(self, decoding: bool = False) -> Chunk:
        """Queue the next chunk on the device, or some layers of it, if any prompt waits.

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
        media = [kv.placed(row, length) for row, length in zip(rows, reused, strict=True)]
        self._queued = kv.feed(self._model, cache, unread, media)
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
        self._at_hand = (reading.row,)
        if not reading.under_way and self._reserved(reading):
            return self._allocated(reading)
        if self._decoding and self._pace.rests():
            return None
        if not reading.under_way:
            size = self._pace.chunk(reading.done, reading.depth) if self._decoding else self._chunk
            unread = _to_read(reading.row)[reading.done : reading.done + size]
            kv.put(self._model, reading.cache, [unread], [kv.placed(reading.row, reading.done)])
            reading.under_way, reading.layers = len(unread), 0
        return self._deeper(reading)

    def _reserved(self, reading: _Reading) -> bool:
        """Make place for all of it; whether that is enough for this step."""
        at_once = -(-len(reading.cache) // RESERVED_IN) if self._decoding else None
        return kv.reserve(reading.cache, len(_to_read(reading.row)), at_once) and self._decoding

    def _deeper(self, reading: _Reading) -> Chunk:
        """Queue some layers of what is under way, or all where nobody waits."""
        row, size, before = reading.row, reading.under_way, reading.layers
        paced = self._decoding and size
        share = self._pace.share(size, reading.done, reading.depth) if paced else reading.depth
        self._queued = kv.queue(reading.deepen(share))
        foretold = self._pace.foretold(size, reading.done) * (reading.layers - before) / reading.depth
        if reading.layers < reading.depth:
            return Chunk(foretold=foretold)
        reading.done, reading.under_way = reading.done + size, 0
        if reading.done < len(_to_read(row)):
            self._keep_begun(reading)
            return Chunk(tokens=size, foretold=foretold)
        self._reading = None
        return self._done(Chunk((row,), reading.cache, (reading.reused,), size))

    def _allocated(self, reading: _Reading) -> Chunk:
        """A step of its own for a cache that was made or copied, which takes as long as a chunk."""
        self._queued = kv.queue(reading.cache)
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
            if row.media is not None:
                row.media.release()
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
        """Whether it costs no more than some chunks at the beginning of a prompt do, or hardly any time."""
        foretold = self._pace.foretold
        return foretold(*self._unread(row)) <= max(foretold(SHORT_CHUNKS * self._chunk, 0), SHORT_S)

    def _unread(self, row: Row) -> tuple[int, int]:
        """How many tokens are to be read, and behind how many."""
        tokens = _to_read(row)
        reused = self._prefixes.length(row.owner, tokens)
        return len(tokens) - reused, reused


def _to_read(row: Row) -> tuple[int, ...]:
    # The last token of a prompt is the first that the decode batch is fed.
    return row.prompt[:-1]
