"""Prefill: computes the cache of prompts. The scheduler decides what a step processes; this module executes it.

Several short prompts are processed together, each in one pass. A long prompt has a cache of its own and is processed
chunk by chunk. A chunk may run through a few layers per step, so that decoding rows wait for a part of it only. Each
prompt starts from its longest cached prefix and is itself stored as a prefix for later rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from worker.output.format import PLAIN, MessageFormat
from worker.runner import forward
from worker.runner.base import PrefillWork, RemainingPrompt, Row
from worker.runner.batching.support import UNRESTRICTED, BatchingSupport
from worker.runner.cost import PrefillCost
from worker.runner.kv_cache import KVCache
from worker.runner.memory import is_out_of_memory
from worker.runner.prefix import checkpoints
from worker.runner.prefix.cache import PrefixCache

RESERVE_STEPS = 8
"""Number of steps over which the cache of a long prompt is allocated while other rows decode."""

STORED_TOKENS = 256
"""Tokens of a long prompt that are stored as a prefix at a time. Storing all of them at the end would delay a step."""

SAVED_TOKENS = 2048
"""Minimum length of a prompt that is written to disk at once, so that a worker that takes over need not compute it.
Unless memory never fills, it would be written later in any case, when memory evicts it."""

MAX_REFRESHED = 8
"""Maximum waiting rows per step for which the prefix is looked up again after the prefix cache has changed."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prefill work that a step has done.

    Attributes:
        rows: rows with a complete prefill: `cache` holds all tokens of their prompts but the last.
        reused: by row, the number of prompt tokens that came from the prefix cache.
        tokens: number of prompt tokens that have passed all layers in this step.
        predicted_s: predicted seconds of the work; None if a cache was allocated or copied.
        out_of_memory: uids of rows that were dropped because an allocation failed.
    """

    rows: tuple[Row, ...] = ()
    cache: KVCache = field(default_factory=lambda: KVCache([]))
    reused: tuple[int, ...] = ()
    tokens: int = 0
    predicted_s: float | None = 0.0
    out_of_memory: tuple[int, ...] = ()


@dataclass(slots=True)
class _Waiting:
    """A row that waits for its prefill to begin.

    Attributes:
        reused: number of its prompt tokens that the prefix cache had when it was last looked up.
        version: `PrefixCache.version` at that time.
        stops: tokens after which the prefill takes checkpoints.
    """

    row: Row
    reused: int
    version: int
    stops: tuple[int, ...]

    @property
    def remaining(self) -> RemainingPrompt:
        return RemainingPrompt(len(self.row.prompt) - 1 - self.reused, self.reused)


@dataclass(slots=True)
class _Partial:
    """A row that is processed chunk by chunk.

    Attributes:
        reused: number of tokens taken from the prefix cache.
        done: number of tokens that have passed all layers.
        stored: number of tokens that are stored as a prefix.
        stops: tokens after which checkpoints are still to be taken.
        chunk: size of the unfinished chunk, in tokens; 0 if there is none.
        layers: number of layers that the chunk has passed.
    """

    row: Row
    cache: KVCache
    reused: int
    done: int
    stored: int
    stops: tuple[int, ...] = ()
    chunk: int = 0
    layers: int = 0

    @property
    def depth(self) -> int:
        """Number of layers of a pass. The last layer does not count: only its cache is needed, not its output."""
        return max(len(self.cache.layers) - 1, 1)

    @property
    def remaining(self) -> RemainingPrompt:
        return RemainingPrompt(len(self.row.prompt) - 1 - self.done, self.done, self.chunk)

    def advance(self, layers: int | None) -> KVCache:
        """Advance the chunk by `layers` layers; None: all. Returns the part of the cache to evaluate for this."""
        filled = self.layers + 1 if self.layers else 0
        self.layers = self.depth if layers is None else min(self.layers + max(layers, 1), self.depth)
        return self.cache.layer_range(filled, self.layers + 1)


class Prefill:
    """The prefill of all rows that do not decode yet.

    Args:
        model: an mlx-lm model.
        chunk: maximum tokens per chunk of a long prompt.
        prefixes: provides and stores prefixes.
        cost: predicts the duration of a chunk.
        batching: which rows may be prefilled together, whatever the plan says, and in which pieces.
        turn_ends, form: which tokens of the chat template end a message, and which mark thoughts.
    """

    def __init__(
        self,
        model: Any,
        chunk: int,
        prefixes: PrefixCache,
        cost: PrefillCost,
        batching: BatchingSupport = UNRESTRICTED,
        turn_ends: Collection[int] = (),
        form: MessageFormat = PLAIN,
    ) -> None:
        self._batching = batching
        self._turn_ends = turn_ends
        self._form = form
        self._cost = cost
        self._model = model
        self._chunk = chunk
        self._prefixes = prefixes
        self._waiting: dict[int, _Waiting] = {}
        self._partial: dict[int, _Partial] = {}
        self._order: dict[int, None] = {}
        self._queued: list[Any] = []  # arrays that the device is computing
        self._current: tuple[int, ...] = ()  # uids that the step processes

    @property
    def nbytes(self) -> int:
        """Bytes of the caches of partially processed prompts."""
        return sum(partial.cache.nbytes for partial in self._partial.values())

    def add(self, row: Row) -> None:
        """Add a row."""
        self._order[row.uid] = None
        self._waiting[row.uid] = self._look_up(row)

    def remove(self, uids: Collection[int]) -> None:
        """Remove rows. The processed part of their prompts is stored as a prefix."""
        for uid in uids:
            partial = self._drop(uid)
            if partial is not None and not partial.chunk:
                row = partial.row
                self._prefixes.store(row.owner, row.prompt[: partial.done], partial.cache, 0)

    def remaining(self) -> dict[int, RemainingPrompt]:
        """Return the remaining prompt of each row, in the order of arrival."""
        version = self._prefixes.version
        stale = [each for each in self._waiting.values() if each.version != version]
        for each in stale[:MAX_REFRESHED]:
            self._waiting[each.row.uid] = self._look_up(each.row)
        return {uid: (self._partial.get(uid) or self._waiting[uid]).remaining for uid in self._order}

    def advance(self, work: PrefillWork | None, *, decoding: bool) -> Prefilled:
        """Queue the work on the device.

        Args:
            decoding: whether other rows wait for their next token meanwhile.

        Raises:
            Exception: the step failed, other than by running out of memory for the rows of `work`.
        """
        try:
            # Stay at most one chunk ahead of the device. Otherwise the caches of all prompts would be queued there.
            mx.eval(self._queued)
            self._queued = []
            self._current = tuple(uid for uid in work.uids if uid in self._order) if work else ()
            return self._execute(work, decoding=decoding) if work and self._current else Prefilled()
        except Exception as error:
            if not self._current or not is_out_of_memory(error):
                raise
            return self._drop_current()

    def _execute(self, work: PrefillWork, *, decoding: bool) -> Prefilled:
        first, *others = self._current
        partial = self._partial.get(first)
        whole = bool(others) or (work.tokens is None and work.layers is None and not self._is_long(first))
        if whole and partial is None and self._in_one_piece(first):
            return self._prefill_together(self._current)
        self._current = (first,)
        if partial is None:
            partial = self._start_row(first)
            if partial.reused and decoding:
                return self._allocated(partial)
        return self._prefill_chunk(partial, work, decoding=decoding)

    def _is_long(self, uid: int) -> bool:
        """Return whether a row's cache should be allocated for the whole prompt at once."""
        waiting = self._waiting.get(uid)
        return waiting is not None and len(waiting.row.prompt) > 2 * self._chunk + 1

    def _prefill_together(self, uids: Sequence[int]) -> Prefilled:
        """Prefill several waiting rows in one pass: those that the model can process with the first one."""
        rows = self._compatible(self._as_planned(uids))
        if not rows:
            return Prefilled()
        reused, caches = zip(*(self._prefixes.load(row.owner, _prefill_ids(row)) for row in rows), strict=True)
        cache = KVCache.of_rows(caches)
        starts = list(reused)
        for stops in self._passes(rows):
            self._fill(rows, cache, starts, stops)
            starts = stops
        self._queued = cache.queue()
        return self._done(Prefilled(tuple(rows), cache, reused, sum(starts) - sum(reused)))

    def _fill(self, rows: Sequence[Row], cache: KVCache, starts: Sequence[int], stops: Sequence[int]) -> None:
        """Process tokens `starts[i]` to `stops[i]` of each row, and store a checkpoint if its prompt continues."""
        input_ids = [row.prompt[start:stop] for row, start, stop in zip(rows, starts, stops, strict=True)]
        media = [forward.placed(row, start) for row, start in zip(rows, starts, strict=True)]
        forward.fill(self._model, cache, input_ids, media, slots=forward.slots(rows))
        for index, (row, stop) in enumerate(zip(rows, stops, strict=True)):
            if stop in self._waiting[row.uid].stops:
                self._prefixes.store(row.owner, row.prompt[:stop], cache, index)

    def _passes(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return, by pass, the token at which it ends in each row. All rows have tokens in every pass."""
        stops = [self._waiting[row.uid].stops for row in rows]
        count = max(map(len, stops))
        ends = [len(row.prompt) - 1 for row in rows]
        if not count:
            return [ends]
        # A row with fewer checkpoints than another has shorter passes before its first one.
        padded = [[*range(each[0] - count + len(each), each[0]), *each] for each in stops]
        return [*(list(each) for each in zip(*padded, strict=True)), ends]

    def _in_one_piece(self, uid: int) -> bool:
        """Return whether a waiting row's prompt may be prefilled in a single pass."""
        row = self._waiting[uid].row
        return self._batching.continues or _piece_end(row, 0, self._chunk) == len(row.prompt) - 1

    def _compatible(self, rows: list[Row]) -> list[Row]:
        """Return the first row, and those that may be prefilled together with it. The others wait for the next plan."""
        if not rows:
            return rows
        first = self._waiting[rows[0].uid]
        others = [
            row
            for row in rows[1:]
            if bool(first.stops) == bool(self._waiting[row.uid].stops)
            and self._in_one_piece(row.uid)
            and self._batching.may_prefill(first.remaining, self._waiting[row.uid].remaining)
        ]
        self._current = tuple(row.uid for row in (rows[0], *others))
        return [rows[0], *others]

    def _as_planned(self, uids: Sequence[int]) -> list[Row]:
        """Return the rows that have no more tokens to process than planned. The others wait for the next plan.

        A row has more tokens to process if its prefix has been evicted since the scheduler made the plan.
        """
        rows = []
        for planned in [self._waiting[uid] for uid in uids if uid in self._waiting]:
            current = self._waiting[planned.row.uid] = self._look_up(planned.row)
            if current.reused >= planned.reused:
                rows.append(planned.row)
        self._current = tuple(row.uid for row in rows)
        return rows

    def _start_row(self, uid: int) -> _Partial:
        row = self._waiting[uid].row
        reused, cache = self._prefixes.load(row.owner, _prefill_ids(row))
        stops = self._waiting.pop(uid).stops
        partial = self._partial[uid] = _Partial(row, KVCache.of_rows([cache]), reused, reused, reused, stops)
        return partial

    def _prefill_chunk(self, partial: _Partial, work: PrefillWork, *, decoding: bool) -> Prefilled:
        if not partial.chunk:
            if self._reserve(partial, decoding=decoding):
                return self._allocated(partial)
            self._start_chunk(partial, work.tokens)
        size, before = partial.chunk, partial.layers
        self._queued = partial.advance(work.layers).queue()
        predicted_s = self._cost.seconds(size, partial.done) * (partial.layers - before) / partial.depth
        if partial.layers < partial.depth:
            return Prefilled(predicted_s=predicted_s)
        return self._chunk_done(partial, size, predicted_s)

    def _start_chunk(self, partial: _Partial, tokens: int | None) -> None:
        row, start = partial.row, partial.done
        stop = None if tokens is None else start + max(tokens, 1)
        if not self._batching.continues:
            stop = _piece_end(row, start, self._chunk)
        if partial.stops:
            stop = min(partial.stops[0], len(row.prompt) if stop is None else stop)
        if stop is not None and row.media is not None:
            stop = row.media.pass_end(stop)
        input_ids = _prefill_ids(row)[start:stop]
        media, slots = [forward.placed(row, start)], forward.slots([row])
        forward.fill(self._model, partial.cache, [input_ids], media, slots=slots)
        partial.chunk, partial.layers = len(input_ids), 0

    def _chunk_done(self, partial: _Partial, size: int, predicted_s: float) -> Prefilled:
        row = partial.row
        partial.done, partial.chunk = partial.done + size, 0
        if partial.done < len(_prefill_ids(row)):
            self._store_partial(partial)
            return Prefilled(tokens=size, predicted_s=predicted_s)
        return self._done(Prefilled((row,), partial.cache, (partial.reused,), size))

    def _reserve(self, partial: _Partial, *, decoding: bool) -> bool:
        """Allocate the cache of the whole prompt. Returns whether this step should do nothing else."""
        max_layers = -(-len(partial.cache.layers) // RESERVE_STEPS) if decoding else None
        return partial.cache.reserve(len(_prefill_ids(partial.row)), max_layers) and decoding

    def _allocated(self, partial: _Partial) -> Prefilled:
        """End a step that allocated or copied a cache, because that takes as long as a chunk."""
        self._queued = partial.cache.queue()
        return Prefilled(predicted_s=None)

    def _store_partial(self, partial: _Partial) -> None:
        checkpoint = partial.done in partial.stops
        partial.stops = tuple(stop for stop in partial.stops if stop > partial.done)
        if checkpoint or partial.done - partial.stored >= STORED_TOKENS:
            row, partial.stored = partial.row, partial.done
            self._prefixes.store_partial(
                row.owner, row.prompt[: partial.done], partial.cache, len(row.prompt), checkpoint=checkpoint
            )

    def _done(self, prefilled: Prefilled) -> Prefilled:
        """Store the prompts as prefixes now, so that other rows can reuse them while these rows decode."""
        for index, row in enumerate(prefilled.rows):
            tokens = _prefill_ids(row)
            self._prefixes.store(row.owner, tokens, prefilled.cache, index, save=len(tokens) >= SAVED_TOKENS)
            if row.shared:
                self._prefixes.share(row.owner, tokens[: row.shared])
            if row.media is not None:
                row.media.release()
            self._drop(row.uid)
        self._current = ()
        return replace(prefilled, predicted_s=None)

    def _drop_current(self) -> Prefilled:
        """Drop the current rows after a failed allocation, and free prefixes and unused buffers."""
        uids, self._current, self._queued = self._current, (), []
        for uid in uids:
            self._drop(uid)
        self._prefixes.clear()
        mx.clear_cache()
        return Prefilled(predicted_s=None, out_of_memory=uids)

    def _drop(self, uid: int) -> _Partial | None:
        self._current = tuple(each for each in self._current if each != uid)
        self._order.pop(uid, None)
        self._waiting.pop(uid, None)
        return self._partial.pop(uid, None)

    def _look_up(self, row: Row) -> _Waiting:
        tokens, prefixes = _prefill_ids(row), self._prefixes
        reused = prefixes.length(row.owner, tokens)
        stops: list[int] = []
        if row.owner is not None and prefixes.layout and prefixes.layout.recurrent:
            matched = prefixes.matched(row.owner, tokens)
            stops = checkpoints.stops(row, prefixes.layout, reused, matched, self._turn_ends, self._form)
        return _Waiting(row, reused, prefixes.version, tuple(stops))


def _piece_end(row: Row, start: int, chunk: int) -> int:
    """Return where a pass from `start` on ends if a row must be processed in the same pieces whenever it is prefilled.

    Those are chunks of the request's prompt without its last token, and then single tokens, as they were decoded.
    """
    decoded_from = len(row.prompt) - row.generated - 1
    return start + 1 if start >= decoded_from else min(start - start % chunk + chunk, decoded_from)


def _prefill_ids(row: Row) -> tuple[int, ...]:
    # The last token of a prompt is not prefilled: it is the first input of the decode batch.
    return row.prompt[:-1]
