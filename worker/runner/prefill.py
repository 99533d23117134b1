"""Prompts on their way into the cache. The scheduler decides what a step processes; this does it.

Several short prompts are processed together, whole. A long one has a cache of its own and is processed chunk by chunk;
a chunk may go through the model some layers at a time, so that rows that decode wait for a part of it only. The longest
cached prefix of each prompt is taken over, and each prompt is stored as a prefix for later rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from worker.runner import forward
from worker.runner.base import PrefillCost, PrefillWork, Row, Unread
from worker.runner.kv_cache import KVCache
from worker.runner.memory import is_out_of_memory
from worker.runner.prefix.cache import PrefixCache

RESERVE_STEPS = 8
"""Steps in which the cache of a long prompt is allocated beside rows that decode: at once it would take too long."""

STORED_TOKENS = 256
"""Tokens of a long prompt that become a prefix at a time: storing all of it at the end would delay that step."""

REFRESHED = 8
"""Maximum waiting rows per step whose cached prefix is looked up again after the prefix cache has changed."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What a step processed.

    Attributes:
        rows: those that have all but their last prompt token in `cache` now.
        reused: prompt tokens of each that the prefix cache had.
        tokens: processed, of chunks that have gone through all layers now.
        predicted_s: predicted cost of what was done; None where a cache was allocated or copied.
        out_of_memory: rows for which there was no memory; they are dropped.
    """

    rows: tuple[Row, ...] = ()
    cache: KVCache = field(default_factory=lambda: KVCache([]))
    reused: tuple[int, ...] = ()
    tokens: int = 0
    predicted_s: float | None = 0.0
    out_of_memory: tuple[int, ...] = ()


@dataclass(slots=True)
class _Waiting:
    """A row without a cache of its own, and how many of its tokens were in which version of the prefix cache."""

    row: Row
    reused: int
    version: int

    @property
    def unread(self) -> Unread:
        return Unread(len(self.row.prompt) - 1 - self.reused, self.reused)


@dataclass(slots=True)
class _Partial:
    """A row that is processed chunk by chunk.

    Attributes:
        reused: tokens taken from the prefix cache.
        done: tokens that have gone through all layers.
        stored: those of them that are stored as a prefix.
        under_way: tokens of the chunk that has gone through some layers.
        layers: that it has gone through.
    """

    row: Row
    cache: KVCache
    reused: int
    done: int
    stored: int
    under_way: int = 0
    layers: int = 0

    @property
    def depth(self) -> int:
        """Layers of a pass. What the last one computes is not needed: only its cache is filled."""
        return max(len(self.cache.layers) - 1, 1)

    @property
    def unread(self) -> Unread:
        return Unread(len(self.row.prompt) - 1 - self.done, self.done, self.under_way)

    def deepen(self, layers: int | None) -> KVCache:
        """Advance the chunk by `layers` layers; returns the part of the cache that they fill."""
        filled = self.layers + 1 if self.layers else 0
        self.layers = self.depth if layers is None else min(self.layers + max(layers, 1), self.depth)
        return self.cache.part(filled, self.layers + 1)


class Prefill:
    """Rows whose prompts are not in the cache yet.

    Args:
        model: an mlx-lm model.
        chunk: most tokens of a long prompt's chunk.
        prefixes: has and keeps prefixes of prompts.
        cost: predicts what a chunk takes.
    """

    def __init__(self, model: Any, chunk: int, prefixes: PrefixCache, cost: PrefillCost) -> None:
        self._cost = cost
        self._model = model
        self._chunk = chunk
        self._prefixes = prefixes
        self._waiting: dict[int, _Waiting] = {}
        self._partial: dict[int, _Partial] = {}
        self._order: dict[int, None] = {}
        self._queued: list[Any] = []
        self._at_hand: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of cache that half-processed prompts occupy."""
        return sum(partial.cache.nbytes for partial in self._partial.values())

    def add(self, row: Row) -> None:
        """Take a row in."""
        self._order[row.uid] = None
        self._waiting[row.uid] = self._looked_up(row)

    def remove(self, uids: Collection[int]) -> None:
        """Drop rows; what is processed of them is stored."""
        for uid in uids:
            partial = self._drop(uid)
            if partial is not None and not partial.under_way:
                row = partial.row
                self._prefixes.store(row.owner, row.prompt[: partial.done], partial.cache, 0)

    def unread(self) -> dict[int, Unread]:
        """What is left to process of each row, in the order in which they came."""
        version = self._prefixes.version
        stale = [each for each in self._waiting.values() if each.version != version]
        for each in stale[:REFRESHED]:
            self._waiting[each.row.uid] = self._looked_up(each.row)
        return {uid: (self._partial.get(uid) or self._waiting[uid]).unread for uid in self._order}

    def advance(self, work: PrefillWork | None, *, decoding: bool) -> Prefilled:
        """Queue the work on the device.

        Args:
            decoding: whether rows wait for their next token meanwhile.

        Raises:
            Exception: any error but out of memory, or one that belongs to rows that already decode.
        """
        try:
            # Stay at most one chunk ahead of the device; otherwise all waiting prompts would pile up there.
            mx.eval(self._queued)
            self._queued = []
            self._at_hand = tuple(uid for uid in work.uids if uid in self._order) if work else ()
            return self._work(work, decoding=decoding) if work and self._at_hand else Prefilled()
        except Exception as error:
            if not self._at_hand or not is_out_of_memory(error):
                raise
            return self._give_up()

    def _work(self, work: PrefillWork, *, decoding: bool) -> Prefilled:
        first, *others = self._at_hand
        partial = self._partial.get(first)
        whole = bool(others) or (work.tokens is None and work.layers is None and not self._long(first))
        if whole and partial is None:
            return self._together(self._at_hand)
        self._at_hand = (first,)
        if partial is None:
            partial = self._begin(first)
            if partial.reused and decoding:
                return self._allocated(partial)
        return self._read_on(partial, work, decoding=decoding)

    def _long(self, uid: int) -> bool:
        """Whether a row's cache is worth being reserved at once."""
        waiting = self._waiting.get(uid)
        return waiting is not None and len(waiting.row.prompt) > 2 * self._chunk + 1

    def _together(self, uids: Sequence[int]) -> Prefilled:
        """Process rows whole that have not been begun."""
        rows = self._as_announced(uids)
        if not rows:
            return Prefilled()
        reused, caches = zip(*(self._prefixes.load(row.owner, _unread_tokens(row)) for row in rows), strict=True)
        cache = KVCache.of_rows(caches)
        unread = [_unread_tokens(row)[length:] for row, length in zip(rows, reused, strict=True)]
        media = [forward.placed(row, length) for row, length in zip(rows, reused, strict=True)]
        forward.fill(self._model, cache, unread, media)
        self._queued = cache.queue()
        return self._done(Prefilled(tuple(rows), cache, reused, sum(map(len, unread))))

    def _as_announced(self, uids: Sequence[int]) -> list[Row]:
        """The rows with no more tokens left to process than the scheduler knew of; others wait for its next plan."""
        rows = []
        for before in [self._waiting[uid] for uid in uids if uid in self._waiting]:
            after = self._waiting[before.row.uid] = self._looked_up(before.row)
            if after.reused >= before.reused:
                rows.append(before.row)
        self._at_hand = tuple(row.uid for row in rows)
        return rows

    def _begin(self, uid: int) -> _Partial:
        row = self._waiting[uid].row
        reused, cache = self._prefixes.load(row.owner, _unread_tokens(row))
        partial = self._partial[uid] = _Partial(row, KVCache.of_rows([cache]), reused, reused, reused)
        del self._waiting[uid]
        return partial

    def _read_on(self, partial: _Partial, work: PrefillWork, *, decoding: bool) -> Prefilled:
        if not partial.under_way:
            if self._reserve(partial, decoding=decoding):
                return self._allocated(partial)
            self._start_chunk(partial, work.tokens)
        size, before = partial.under_way, partial.layers
        self._queued = partial.deepen(work.layers).queue()
        predicted_s = self._cost.seconds(size, partial.done) * (partial.layers - before) / partial.depth
        if partial.layers < partial.depth:
            return Prefilled(predicted_s=predicted_s)
        return self._chunk_done(partial, size, predicted_s)

    def _start_chunk(self, partial: _Partial, tokens: int | None) -> None:
        row, start = partial.row, partial.done
        stop = None if tokens is None else start + max(tokens, 1)
        unread = _unread_tokens(row)[start:stop]
        forward.fill(self._model, partial.cache, [unread], [forward.placed(row, start)])
        partial.under_way, partial.layers = len(unread), 0

    def _chunk_done(self, partial: _Partial, size: int, predicted_s: float) -> Prefilled:
        row = partial.row
        partial.done, partial.under_way = partial.done + size, 0
        if partial.done < len(_unread_tokens(row)):
            self._store_partial(partial)
            return Prefilled(tokens=size, predicted_s=predicted_s)
        return self._done(Prefilled((row,), partial.cache, (partial.reused,), size))

    def _reserve(self, partial: _Partial, *, decoding: bool) -> bool:
        """Allocate the whole prompt's cache; whether that is enough for this step."""
        at_once = -(-len(partial.cache.layers) // RESERVE_STEPS) if decoding else None
        return partial.cache.reserve(len(_unread_tokens(partial.row)), at_once) and decoding

    def _allocated(self, partial: _Partial) -> Prefilled:
        """A step for a cache that was allocated or copied, which takes as long as a chunk."""
        self._queued = partial.cache.queue()
        return Prefilled(predicted_s=None)

    def _store_partial(self, partial: _Partial) -> None:
        if partial.done - partial.stored >= STORED_TOKENS:
            row, partial.stored = partial.row, partial.done
            self._prefixes.store_partial(row.owner, row.prompt[: partial.done], partial.cache, 0)

    def _done(self, prefilled: Prefilled) -> Prefilled:
        """Store the prompts at once: rows that begin with the same need not wait until these have ended."""
        for place, row in enumerate(prefilled.rows):
            self._prefixes.store(row.owner, _unread_tokens(row), prefilled.cache, place)
            if row.shared:
                self._prefixes.share(row.owner, _unread_tokens(row)[: row.shared])
            if row.media is not None:
                row.media.release()
            self._drop(row.uid)
        self._at_hand = ()
        return replace(prefilled, predicted_s=None)

    def _give_up(self) -> Prefilled:
        """An allocation failed: drop the rows at hand, and free what can be freed."""
        uids, self._at_hand, self._queued = self._at_hand, (), []
        for uid in uids:
            self._drop(uid)
        self._prefixes.clear()
        mx.clear_cache()
        return Prefilled(predicted_s=None, out_of_memory=uids)

    def _drop(self, uid: int) -> _Partial | None:
        self._at_hand = tuple(each for each in self._at_hand if each != uid)
        self._order.pop(uid, None)
        self._waiting.pop(uid, None)
        return self._partial.pop(uid, None)

    def _looked_up(self, row: Row) -> _Waiting:
        return _Waiting(row, self._prefixes.length(row.owner, _unread_tokens(row)), self._prefixes.version)


def _unread_tokens(row: Row) -> tuple[int, ...]:
    # The last token of a prompt is the first input of the decode batch.
    return row.prompt[:-1]
