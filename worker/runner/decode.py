"""A batch of rows that decode: one forward pass and one choice of tokens a step, for all of them.

The next step is always queued on the device before the tokens of the last one are read, so the device works while the
host deals with those tokens. A row that ends has therefore run one step too many, unless it ends at its limit. A few
rows may get several tokens each in a step (`worker.runner.speculation`); such a step reads first.

It replaces `mlx_lm.generate.GenerationBatch`, on mlx-lm's models and caches, and avoids three costs that exceed a
small model's own: it computes log-probabilities only for rows that ask, samples all rows together, and does not copy
the cache of the rows that stay when others come or go.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import mlx.core as mx

from shared.jobs.request import Sampling
from worker.runner import forward
from worker.runner.base import Row, TokenOutput
from worker.runner.decode_row import DecodeRow
from worker.runner.kv_cache import SLACK, KVCache, width
from worker.runner.logits.logprobs import BatchLogprobs, Logprob, QueuedLogprobs
from worker.runner.logits.processor import LogitsPipeline, LogitsProcessor, RowFailures
from worker.runner.prefix.cache import PrefixCache
from worker.runner.sampler import BatchSampler
from worker.runner.speculation.verification import Speculation

_GREEDY = Sampling(temperature=0.0)


class DecodeBatch:
    """Rows that have their prompts in the cache.

    Args:
        model: an mlx-lm model.
        prefixes: keeps what rows have in the cache when they leave.
        speculation: drafts for a few rows.
        processors: of logits, in the order in which they are applied.

    Attributes:
        failures: (uid, error) of rows that raised and were dropped; the reader clears them.
    """

    def __init__(
        self, model: Any, prefixes: PrefixCache, speculation: Speculation, processors: Sequence[LogitsProcessor] = ()
    ) -> None:
        self.failures: list[tuple[int, Exception]] = []
        self._model = model
        self._prefixes = prefixes
        self._speculation = speculation
        self._processors = processors
        self._rows: list[DecodeRow | None] = []  # None: a place whose row has ended
        self.clear()

    def __len__(self) -> int:
        return sum(row is not None for row in self._rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has in the cache."""
        return [row.length for row in self._rows if row is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of its cache."""
        return self._cache.nbytes

    def clear(self) -> None:
        """Drop every row and free the cache."""
        self._rows = []
        self._cache = KVCache([])
        self._input = mx.array([], dtype=mx.uint32)  # of the next pass, by place; may still be on the device
        self._logprobs: list[QueuedLogprobs] = []  # of those tokens
        self._dead_steps = 0
        self._columns = 0
        self._recompose()

    def join(self, rows: Sequence[Row], cache: KVCache) -> None:
        """Add rows; `cache` has all but the last token of their prompts, and belongs to the batch from now on."""
        joining = [DecodeRow.of(row) for row in rows]
        last = mx.array([row.prompt[-1] for row in rows], dtype=mx.uint32)
        free = [place for place, row in enumerate(self._rows) if row is None][: len(rows)]
        if len(free) == len(rows) and self._cache.overwrite(free, cache):
            for place, row in zip(free, joining, strict=True):
                self._rows[place] = row
            self._input[mx.array(free)] = last
        else:
            self._append(joining, last, cache)
        self._columns = max(self._columns, *(row.length for row in joining))
        self._recompose()

    def absorb(self, other: DecodeBatch) -> None:
        """Take over all rows of another batch, which has some and is of no use afterwards. Copies both."""
        other._compact()
        self._append([row for row in other._rows if row is not None], other._input, other._cache)
        self._logprobs += other._logprobs
        self._columns = max(self._columns, other._columns)
        self._recompose()

    def remove(self, uids: Collection[int]) -> None:
        """Drop rows. Their places stay empty until other rows take them, or the batch is compacted."""
        self._empty([place for place, row in enumerate(self._rows) if row is not None and row.row.uid in uids])

    def step(self, *, speculate: bool = False) -> list[TokenOutput]:
        """Queue the next token of every row, then read the last one.

        Args:
            speculate: whether the device has nothing else to do: then a few rows may get several tokens each.

        Returns:
            Of each row that had a token to read. A row that has reached its limit is dropped.
        """
        rows = [row for row in self._rows if row is not None]
        full = len(rows) == len(self._rows)
        if speculate and full and self._speculation.suits(len(rows)) and not (self._pipeline or self._batch_logprobs):
            return self._step_drafting(rows) or self._step()
        return self._step()

    def verify(self, length: int) -> list[TokenOutput]:
        """Verify drafts of `length` tokens unconditionally; all inputs must have been read."""
        rows = [row for row in self._rows if row is not None]
        outputs = [
            TokenOutput(row.row.uid, token)
            for row, tokens in zip(rows, self._speculation.verify(self._cache, rows, length), strict=True)
            for token in tokens
        ]
        self._input = mx.array([row.newest for row in rows], dtype=mx.uint32)
        self._columns = self._cache.columns
        self._empty([place for place, row in enumerate(rows) if not row.left])
        return outputs

    def read(self) -> list[TokenOutput]:
        """Wait for the queued tokens and read them, without queueing more."""
        unread = self._unread()
        tokens = cast("list[int]", self._input.tolist())
        outputs = self._outputs(unread, tokens, self._take_logprobs())
        for place, row in unread:
            row.newest = tokens[place]
        return outputs

    def _step(self) -> list[TokenOutput]:
        current, unread, logprobs = self._input, self._unread(), self._take_logprobs()
        self._empty([place for place, row in unread if not row.left])
        self._tidy()
        failures = self._queue() if self._rows else []
        if not unread:
            self._fail(failures)
            return []
        tokens = cast("list[int]", current.tolist())
        for place, row in unread:
            row.cached.append(tokens[place])
        return self._without_failed(self._outputs(unread, tokens, logprobs), failures)

    def _step_drafting(self, rows: Sequence[DecodeRow]) -> list[TokenOutput]:
        """Where drafts pay: read what is queued, then verify them. Empty where nothing was done."""
        if not self._speculation.length(rows):
            return []
        outputs = self.read()
        if length := self._speculation.length(rows):
            return outputs + self.verify(length)
        return self._without_failed(outputs, self._queue())

    def _unread(self) -> list[tuple[int, DecodeRow]]:
        return [(place, row) for place, row in enumerate(self._rows) if row is not None and row.newest is None]

    def _outputs(
        self, unread: Sequence[tuple[int, DecodeRow]], tokens: Sequence[int], queued: Sequence[QueuedLogprobs]
    ) -> list[TokenOutput]:
        if not queued:
            return [TokenOutput(row.row.uid, tokens[place]) for place, row in unread]
        known: dict[int, Logprob] = {}
        for each in queued:
            known |= each.read()
        return [TokenOutput(row.row.uid, tokens[place], *known.get(row.row.uid, ())) for place, row in unread]

    def _take_logprobs(self) -> list[QueuedLogprobs]:
        taken, self._logprobs = self._logprobs, []
        return taken

    def _append(self, rows: list[DecodeRow], last: mx.array, cache: KVCache) -> None:
        if None in self._rows:
            self._compact()
        if self._rows:
            self._cache.extend(cache)
        else:
            self._cache = cache
        self._rows.extend(rows)
        self._input = mx.concatenate([self._input, last])

    def _queue(self) -> RowFailures:
        """Queue a pass over the inputs, and the choice of the next ones; the rows whose processors raised."""
        self._cache.grow_ahead()
        logits = self._model(self._input[:, None], cache=self._cache.layers, **self._shifts)[:, -1]
        raw = self._batch_logprobs.select(logits)
        logits, failures = self._pipeline(logits, self._input, [row.cached if row else () for row in self._rows])
        self._input = self._sampler(logits, [row.position if row else 0 for row in self._rows])
        queued = [self._input]
        if raw is not None:
            self._logprobs.append(self._batch_logprobs.queue(raw, self._input))
            queued += self._logprobs[-1].arrays
        mx.async_eval(queued)  # type: ignore[no-untyped-call]
        self._columns += 1
        for row in filter(None, self._rows):
            row.stepped()
        return failures

    def _without_failed(self, outputs: list[TokenOutput], failures: RowFailures) -> list[TokenOutput]:
        if not failures:
            return outputs
        self._fail(failures)
        failed = {uid for uid, _ in self.failures}
        return [output for output in outputs if output.uid not in failed]

    def _fail(self, failures: RowFailures) -> None:
        """Drop rows whose logits processors raised."""
        for place, error in failures:
            if row := self._rows[place]:
                self.failures.append((row.row.uid, error))
        self._empty([place for place, _ in failures])

    def _recompose(self) -> None:
        rows = [row.row if row else None for row in self._rows]
        self._sampler = BatchSampler([row.sampling if row else _GREEDY for row in rows])
        self._pipeline = LogitsPipeline(self._processors, rows)
        self._batch_logprobs = BatchLogprobs(rows)
        self._shifts = forward.shifts(rows)

    def _empty(self, places: Sequence[int]) -> None:
        if not places:
            return
        for place in places:
            if row := self._rows[place]:
                self._prefixes.store(row.row.owner, row.cached, self._cache, place)
                self._speculation.drop([row.row.uid])
            self._rows[place] = None
        if any(self._rows):
            self._recompose()
        else:
            self.clear()

    def _tidy(self) -> None:
        """Compact the batch when empty places have cost about as much as the copy, or when it is too wide."""
        live = self.lengths
        self._dead_steps += len(self._rows) - len(live)
        if live and (self._dead_steps > len(live) or width(self._columns) > width(max(live) + SLACK)):
            self._compact()
            self._recompose()

    def _compact(self) -> None:
        live = [(place, row) for place, row in enumerate(self._rows) if row is not None]
        self._dead_steps = 0
        if not live:
            return
        places = [place for place, _ in live]
        self._cache.keep(places)
        self._input = self._input[mx.array(places)]
        self._rows = [row for _, row in live]
        self._columns = max(row.length for _, row in live)
