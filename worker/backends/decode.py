"""The rows that decode: one forward pass and one choice of tokens a step, for all of them.

The next step is always queued on the device before the tokens of the last one are read, so the device works while
the host deals with those tokens. A row that ends therefore ran one step too many, unless its room told beforehand.
A row that is alone may get several tokens in a step (`worker.backends.speculation`); that step reads first.

This does what `mlx_lm.generate.GenerationBatch` does, on mlx-lm's models and caches, but for three things that cost
more than a small model itself: it computes no log-probabilities, it samples all rows together, and rows that come
and go do not copy the cache of those that stay.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from shared.jobs import Sampling
from worker.backends import kv
from worker.backends.base import Row
from worker.backends.lookup import Lookup
from worker.backends.prefix_cache import PrefixCache
from worker.backends.speculation import Speculation
from worker.penalties import BatchPenalties
from worker.sampler import BatchSampler

MOST_PADDING = 256
"""Columns of the cache that no row needs, before they are cut off; the caches grow by as many."""

_GREEDY = Sampling(temperature=0.0)


@dataclass(slots=True)
class _Slot:
    """A row of the batch.

    Attributes:
        position: of the token chosen next, in the whole answer.
        cached: the tokens in the cache: all but the one fed next.
        newest: the one fed next; None while it is not read yet.
        lookup: guesses its next tokens, once it was alone.
    """

    row: Row
    position: int
    cached: list[int]
    newest: int | None
    lookup: Lookup | None = None

    @classmethod
    def of(cls, row: Row) -> _Slot:
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

    def looked_up(self) -> Lookup:
        """What guesses its next tokens, with all that were read."""
        if self.lookup is None:
            self.lookup = Lookup(self.cached)
        unknown = self.cached[len(self.lookup) :]
        if self.newest is not None and len(self.lookup) <= self.length:
            unknown.append(self.newest)
        for token in unknown:
            self.lookup.add(token)
        return self.lookup


class DecodeBatch:
    """Rows that have their prompts in the cache.

    Args:
        model: an mlx-lm model.
        prefixes: keeps what rows have in the cache when they leave.
        speculation: for a row that is alone.
    """

    def __init__(self, model: Any, prefixes: PrefixCache, speculation: Speculation) -> None:
        self._model = model
        self._prefixes = prefixes
        self._speculation = speculation
        self._slots: list[_Slot | None] = []  # None: a place whose row has ended
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
        self._stepped_at: float | None = None
        self._recompose()

    def join(self, rows: Sequence[Row], cache: kv.Layers) -> None:
        """Add rows; `cache` has all but the last token of their prompts, and belongs to the batch from now on."""
        slots = [_Slot.of(row) for row in rows]
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

    def step(self, *, alone: bool = False) -> list[tuple[int, int]]:
        """Queue the next token of every row, then read the last one.

        Args:
            alone: whether the device does nothing beside: a row that has all of it to itself may get several tokens.

        Returns:
            (uid, token) of each row that had one to read. A row that has had its room is dropped.
        """
        slot = self._slots[0] if alone and len(self._slots) == 1 else None
        if slot is None or not self._speculation.suits(slot.row.sampling):
            self._stepped_at = None
            return self._step()
        uid = slot.row.uid
        return [(uid, token) for token in self._guess(slot)] or self._step_timed(slot)

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

    def _step_timed(self, slot: _Slot) -> list[tuple[int, int]]:
        """The same, and see what it takes for this row: from the end of such a step to that of the next."""
        before = self._stepped_at
        tokens = self._step()
        self._stepped_at = self._speculation.clock() if tokens and self._slots else None
        if self._stepped_at is not None and before is not None:
            self._speculation.costs(slot.row.sampling).plain(self._stepped_at - before)
        return tokens

    def _guess(self, slot: _Slot) -> list[int]:
        """Read what is queued for the only row and verify a guess of what follows, where that pays.

        Returns:
            The tokens read; none where nothing was done.
        """
        speculation, sampling, start = self._speculation, slot.row.sampling, self._speculation.clock()
        if not slot.chosen or not speculation.length(slot.looked_up(), sampling, slot.room):
            return []
        read, newest = self._read(slot)
        waited_s = speculation.clock() - start
        length = speculation.length(slot.looked_up(), sampling, slot.room)
        if not length:
            self._stepped_at = None
            self._queue()
            return read
        read += self._verify(slot, newest, length)
        before, self._stepped_at = self._stepped_at or start, speculation.clock()
        speculation.costs(sampling).verified(length, self._stepped_at - before - waited_s)
        if not slot.room:
            self._empty([0])
        return read

    def _read(self, slot: _Slot) -> tuple[list[int], int]:
        """Wait for the newest token of the only row: it alone, unless it was read before, and it in any case."""
        if slot.newest is not None:
            return [], slot.newest
        slot.newest = cast("int", self._fed.item())
        return [slot.newest], slot.newest

    def _verify(self, slot: _Slot, newest: int, length: int) -> list[int]:
        """The next tokens of the only row: as many as a guess of that length gives."""
        guess = slot.looked_up().guess(length)
        tokens = self._speculation.verify(self._cache, newest, guess, slot.row.sampling, slot.position)
        slot.cached += [newest, *tokens[:-1]]
        slot.newest = tokens[-1]
        slot.position += len(tokens)
        self._fed = mx.array(tokens[-1:], dtype=mx.uint32)
        self._columns += len(tokens)
        return tokens

    def nbytes(self) -> int:
        """Bytes of its cache."""
        return kv.nbytes(self._cache)

    def _append(self, slots: list[_Slot], last: mx.array, cache: kv.Layers) -> None:
        if None in self._slots:
            self._compact()
        if self._slots:
            kv.extend(self._cache, cache)
        else:
            self._cache = cache
        self._slots.extend(slots)
        self._fed = mx.concatenate([self._fed, last])

    def _queue(self) -> None:
        logits = self._model(self._fed[:, None], cache=self._cache)[:, -1]
        logits = self._penalties(logits, self._fed, [slot.cached if slot else () for slot in self._slots])
        self._fed = self._sampler(logits, [slot.position if slot else 0 for slot in self._slots])
        mx.async_eval(self._fed)  # type: ignore[no-untyped-call]
        self._columns += 1
        for slot in filter(None, self._slots):
            if slot.newest is not None:
                slot.cached.append(slot.newest)
                slot.newest = None
            slot.position += 1

    def _recompose(self) -> None:
        samplings = [slot.row.sampling if slot else _GREEDY for slot in self._slots]
        self._sampler = BatchSampler(samplings)
        self._penalties = BatchPenalties(samplings)

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
