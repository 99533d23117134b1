"""Prompts on their way into the cache, a chunk between two decode steps.

Short prompts go together, whole, several at a time; a long one goes alone, chunk by chunk. When both wait they take
turns, so neither kind waits for more than one chunk of the other, and a short prompt never shares a cache
with a long one, which would pad it to that length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from worker.backends import kv
from worker.backends.base import Row

SHORT_CHUNKS = 2
"""A prompt of at most so many chunks is short: the whole of it disturbs less than the number of its chunks would."""

MOST_TOGETHER = 8
"""Short prompts in one chunk. More would not make a token cheaper, and would delay the first answers."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one chunk did: rows that have all but their last prompt token in `cache`, and the tokens it processed."""

    rows: tuple[Row, ...] = ()
    cache: kv.Layers = field(default_factory=list)
    tokens: int = 0


@dataclass(slots=True)
class _Long:
    """The long prompt that is being read."""

    row: Row
    cache: kv.Layers
    done: int = 0


class Prefill:
    """Rows whose prompts are not in the cache yet.

    Args:
        model: an mlx-lm model.
        chunk: tokens of a long prompt that are processed at a time.
    """

    def __init__(self, model: Any, chunk: int) -> None:
        self._model = model
        self._chunk = chunk
        self._short: deque[Row] = deque()
        self._long: deque[Row] = deque()
        self._reading: _Long | None = None
        self._queued: list[Any] = []
        self._long_next = False

    def __len__(self) -> int:
        return len(self._short) + len(self._long) + (self._reading is not None)

    def add(self, row: Row) -> None:
        """Take a row in."""
        (self._short if _to_read(row) <= SHORT_CHUNKS * self._chunk else self._long).append(row)

    def remove(self, uids: Collection[int]) -> None:
        """Drop rows."""
        self._short = deque(row for row in self._short if row.uid not in uids)
        self._long = deque(row for row in self._long if row.uid not in uids)
        if self._reading is not None and self._reading.row.uid in uids:
            self._reading = None

    def advance(self) -> Chunk:
        """Queue the next chunk on the device, if any prompt waits."""
        # No more than one chunk ahead of the device, or the whole queue of prompts would be piled up there.
        mx.eval(self._queued)
        self._queued = []
        if self._reading is None and self._long:
            row = self._long.popleft()
            self._reading = _Long(row, kv.empty(self._model, 1))
        reading = self._reading
        turn, self._long_next = self._long_next, not self._long_next
        if reading is not None and (turn or not self._short):
            return self._read_on(reading)
        return self._read_short() if self._short else Chunk()

    def nbytes(self) -> int:
        """Bytes of cache that half-read prompts occupy."""
        return kv.nbytes(self._reading.cache) if self._reading is not None else 0

    def _read_short(self) -> Chunk:
        rows = tuple(self._short.popleft() for _ in range(min(MOST_TOGETHER, len(self._short))))
        cache = kv.empty(self._model, len(rows))
        self._feed(cache, [row.prompt[:-1] for row in rows])
        return Chunk(rows, cache, sum(map(_to_read, rows)))

    def _read_on(self, reading: _Long) -> Chunk:
        row, start = reading.row, reading.done
        reading.done = min(start + self._chunk, _to_read(row))
        self._feed(reading.cache, [row.prompt[start : reading.done]])
        if reading.done < _to_read(row):
            return Chunk(tokens=reading.done - start)
        self._reading = None
        return Chunk((row,), reading.cache, reading.done - start)

    def _feed(self, cache: kv.Layers, tokens: list[tuple[int, ...]]) -> None:
        kv.feed(self._model, cache, tokens)
        self._queued = kv.states(cache)


def _to_read(row: Row) -> int:
    # The last token of a prompt is the first that the decode batch is fed.
    return len(row.prompt) - 1
