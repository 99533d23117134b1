"""The rows that decode: one forward pass and one choice of tokens a step, for all of them.

The next step is always queued on the device before the tokens of the last one are read, so the device works while
the host deals with those tokens. A row that ends therefore ran one step too many, unless its room told beforehand.
A few rows may get several tokens each in a step (`worker.runner.speculation.verification`); such a step reads first.

This does what `mlx_lm.generate.GenerationBatch` does, on mlx-lm's models and caches, but for three things that cost
more than a small model itself: it computes no log-probabilities, it samples all rows together, and rows that come
and go do not copy the cache of those that stay.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import mlx.core as mx

from shared.jobs.request import Sampling
from worker.runner import kv_cache as kv
from worker.runner.base import Row
from worker.runner.decode_row import Slot
from worker.runner.logits.penalties import BatchPenalties
from worker.runner.prefix_cache import PrefixCache
from worker.runner.sampler import BatchSampler
from worker.runner.speculation.verification import Speculation

MOST_PADDING = 256
"""Columns of the cache that no row needs, before they are cut off; the caches grow by as many."""

_GREEDY = Sampling(temperature=0.0)


class DecodeBatch:
    """Rows that have their prompts in the cache.

    Args:
        model: an mlx-lm model.
        prefixes: keeps what rows have in the cache when they leave.
        speculation: guesses for a few rows.
    """

    def __init__(self, model: Any, prefixes: PrefixCache, speculation: Speculation) -> None:
        self._model = model
        self._prefixes = prefixes
        self._speculation = speculation
        self._stepped_at: float | None = None
        self._slots: list[Slot | None] = []  # None: a place whose row has ended
        self.clear()

    def __len__(self) -> int:
        return sum(slot is not None for slot in self._slots)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has in the cache."""
        return [slot.length for slot in self._slots if slot is not None]

    def clear(self) -> None:
        """Drop every row and free the cache."""
        self._slots = []
        self._cache: kv.Layers = []
        self._fed = mx.array([], dtype=mx.uint32)
        self._dead_steps = 0
        self._columns = 0
        self._recompose()

    def join(self, rows: Sequence[Row], cache: kv.Layers) -> None:
        """Add rows; `cache` has all but the last token of their prompts, and belongs to the batch from now on."""
        slots = [Slot.of(row) for row in rows]
        last = mx.array([row.prompt[-1] for row in rows], dtype=mx.uint32)
        free = [place for place, slot in enumerate(self._slots) if slot is None][: len(rows)]
        if len(free) == len(rows) and kv.overwrite(self._cache, free, cache):
            for place, slot in zip(free, slots, strict=True):
                self._slots[place] = slot
            self._fed[mx.array(free)] = last
        else:
            self._append(slots, last, cache)
        self._columns = max(self._columns, *(slot.length for slot in slots))
        self._recompose()

    def absorb(self, other: DecodeBatch) -> None:
        """Take over all rows of another batch, which has some and is of no use afterwards. Copies both."""
        other._compact()
        self._append([slot for slot in other._slots if slot is not None], other._fed, other._cache)
        self._columns = max(self._columns, other._columns)
        self._recompose()

    def remove(self, uids: Collection[int]) -> None:
        """Drop rows. Their places stay in the batch until others take them or they have cost as much as a copy."""
        self._empty([place for place, slot in enumerate(self._slots) if slot is not None and slot.row.uid in uids])

    def step(self, *, quiet: bool = False) -> list[tuple[int, int]]:
        """Queue the next token of every row, then read the last one.

        Args:
            quiet: whether the device has nothing else to do: then a few rows may get several tokens each.

        Returns:
            (uid, token) of each row that had one to read. A row that has had its room is dropped.
        """
        slots = [slot for slot in self._slots if slot is not None]
        if not quiet or len(slots) < len(self._slots) or not self._speculation.suits(slots):
            self._stepped_at = None
            return self._step()
        return self._step_guessing(slots) or self._step_timed(slots)

    def _step(self) -> list[tuple[int, int]]:
        fed = self._fed
        unread = [(place, slot) for place, slot in enumerate(self._slots) if slot is not None and slot.newest is None]
        self._empty([place for place, slot in unread if not slot.room])
        self._tidy()
        if self._slots:
            self._queue()
        if not unread:
            return []
        tokens = cast("list[int]", fed.tolist())
        for place, slot in unread:
            slot.cached.append(tokens[place])
        return [(slot.row.uid, tokens[place]) for place, slot in unread]

    def _step_timed(self, slots: Sequence[Slot]) -> list[tuple[int, int]]:
        """The same, and see what it takes: from the end of such a step to that of the next, with the same rows."""
        before = self._stepped_at
        tokens = self._step()
        now = self._speculation.clock()
        if tokens and before is not None and self._stepped_at is not None:
            self._speculation.costs(slots).plain(now - before)
        self._stepped_at = now if tokens else None
        return tokens

    def _step_guessing(self, slots: Sequence[Slot]) -> list[tuple[int, int]]:
        """Where a guess of what comes next pays: read what is queued, then verify it.

        Returns:
            As `step`; none where nothing was done.
        """
        speculation, start = self._speculation, self._speculation.clock()
        if not speculation.length(slots):
            return []
        told = self._read(slots)
        waited_s = speculation.clock() - start
        length = speculation.length(slots)
        if not length:
            self._stepped_at = None
            self._queue()
            return told
        for slot, tokens in zip(slots, speculation.verify(self._cache, slots, length), strict=True):
            told += [(slot.row.uid, token) for token in tokens]
        before, self._stepped_at = self._stepped_at or start, speculation.clock()
        speculation.costs(slots).verified(length, self._stepped_at - before - waited_s)
        self._fed = mx.array([slot.newest for slot in slots], dtype=mx.uint32)
        self._columns = kv.columns(self._cache)
        self._empty([place for place, slot in enumerate(slots) if not slot.room])
        return told

    def _read(self, slots: Sequence[Slot]) -> list[tuple[int, int]]:
        """Wait for what is queued; (uid, token) of each row that it gave one."""
        unread = [(place, slot) for place, slot in enumerate(slots) if slot.newest is None]
        tokens = cast("list[int]", self._fed.tolist())
        for place, slot in unread:
            slot.newest = tokens[place]
        return [(slot.row.uid, tokens[place]) for place, slot in unread]

    def nbytes(self) -> int:
        """Bytes of its cache."""
        return kv.nbytes(self._cache)

    def _append(self, slots: list[Slot], last: mx.array, cache: kv.Layers) -> None:
        if None in self._slots:
            self._compact()
        if self._slots:
            kv.extend(self._cache, cache)
        else:
            self._cache = cache
        self._slots.extend(slots)
        self._fed = mx.concatenate([self._fed, last])

    def _queue(self) -> None:
        kv.grow_ahead(self._cache)
        logits = self._model(self._fed[:, None], cache=self._cache, **self._shifts)[:, -1]
        logits = self._penalties(logits, self._fed, [slot.cached if slot else () for slot in self._slots])
        self._fed = self._sampler(logits, [slot.position if slot else 0 for slot in self._slots])
        mx.async_eval(self._fed)  # type: ignore[no-untyped-call]
        self._columns += 1
        for slot in filter(None, self._slots):
            slot.fed()

    def _recompose(self) -> None:
        self._stepped_at = None  # what the next step takes is no measure
        samplings = [slot.row.sampling if slot else _GREEDY for slot in self._slots]
        self._sampler = BatchSampler(samplings)
        self._penalties = BatchPenalties(samplings)
        self._shifts = kv.shifts([slot.row if slot else None for slot in self._slots])

    def _empty(self, places: Sequence[int]) -> None:
        if not places:
            return
        for place in places:
            if slot := self._slots[place]:
                self._prefixes.store(slot.row.owner, slot.cached, self._cache, place)
            self._slots[place] = None
        if any(self._slots):
            self._recompose()
        else:
            self.clear()

    def _tidy(self) -> None:
        """Compact the batch once the places without a row have cost about as much as the copy will."""
        live = self.lengths
        self._dead_steps += len(self._slots) - len(live)
        if live and (self._dead_steps > len(live) or self._columns - max(live) > MOST_PADDING):
            self._compact()
            self._recompose()

    def _compact(self) -> None:
        live = [(place, slot) for place, slot in enumerate(self._slots) if slot is not None]
        self._dead_steps = 0
        if not live:
            return
        places = [place for place, _ in live]
        kv.keep(self._cache, places)
        self._fed = self._fed[mx.array(places)]
        self._slots = [slot for _, slot in live]
        self._columns = max(slot.length for _, slot in live)
