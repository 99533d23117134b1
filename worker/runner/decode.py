"""A batch of decoding rows: one forward pass and one sampling operation per step for all of them.

The next step is usually queued on the device before the tokens of the previous step are read, so the device keeps
working while the host handles those tokens (`StepPlan.ahead`). A row that meets a stop condition has therefore run one
step too many; a row that reaches its token limit has not. If a row is constrained, only the forward pass is queued
before the tokens are read: they decide which tokens may come next. A few rows may get several tokens each in a step
(`worker.runner.speculation`); such a step reads before it queues.

It replaces `mlx_lm.generate.GenerationBatch` on top of mlx-lm's models and caches, and avoids three costs that exceed
the forward pass of a small model: it computes log-probabilities only for rows that ask for them, samples all rows
together, and does not copy the cache of the remaining rows when other rows join or leave.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias, cast

import mlx.core as mx

from shared.jobs.request import Sampling
from worker.runner import forward
from worker.runner.adapters.layers import applied
from worker.runner.base import InvalidLogits, Row, TokenOutput
from worker.runner.column_cache import SLACK, allocated_columns
from worker.runner.decode_row import DecodeRow
from worker.runner.kv_cache import KVCache
from worker.runner.logits.logprobs import BatchLogprobs, Logprob, QueuedLogprobs
from worker.runner.logits.mask import BatchConstraints
from worker.runner.logits.processor import LogitsPipeline, LogitsProcessor
from worker.runner.prefix.blocks import BLOCK
from worker.runner.prefix.cache import PrefixCache
from worker.runner.sampler import INVALID, BatchSampler, valid_ids
from worker.runner.speculation.verification import Speculation

SAVED_TOKENS = 4096
"""Number of decoded tokens after which a row is saved again. A row takes minutes to decode them, and a worker that
continues the row takes seconds to process those that were not saved. Saving more often would wear the disk: large
hybrids have states of 50 to 80 MB. Keys and values are written only once, here or when memory evicts them."""

_GREEDY = Sampling(temperature=0.0)

_Failures: TypeAlias = list[tuple[DecodeRow, Exception]]


class DecodeBatch:
    """Rows that share a cache and decode together. A batch index without a row is empty until another row takes it.

    Args:
        model: an mlx-lm model.
        prefixes: stores the cache of rows that leave.
        speculation: verifies draft tokens while the batch has few rows.
        processors: logits processors, in the order in which they are applied.

    Attributes:
        failures: (uid, error) of rows that raised or got invalid logits, and were removed. The reader clears the list.
    """

    def __init__(
        self, model: Any, prefixes: PrefixCache, speculation: Speculation, processors: Sequence[LogitsProcessor] = ()
    ) -> None:
        self.failures: list[tuple[int, Exception]] = []
        self._model = model
        self._prefixes = prefixes
        self._speculation = speculation
        self._processors = processors
        self._rows: list[DecodeRow | None] = []  # by batch index; None: empty
        self.clear()

    def __len__(self) -> int:
        return sum(row is not None for row in self._rows)

    @property
    def lengths(self) -> list[int]:
        """Number of cached tokens of each row."""
        return [row.length for row in self._rows if row is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return self._cache.nbytes

    def clear(self) -> None:
        """Drop every row and free the cache."""
        self._rows = []
        self._cache = KVCache([])
        self._input_ids = mx.array([], dtype=mx.uint32)  # by batch index; may still be unevaluated
        self._logprobs: list[QueuedLogprobs] = []  # of the input ids
        self._empty_row_steps = 0
        self._columns = 0
        self._rows_changed()

    def join(self, rows: Sequence[Row], cache: KVCache) -> None:
        """Add rows.

        Args:
            cache: holds all tokens of their prompts but the last. The batch takes it over.
        """
        cache.fit()
        joining = [DecodeRow.after_prefill(row) for row in rows]
        input_ids = mx.array([row.prompt[-1] for row in rows], dtype=mx.uint32)
        empty = [index for index, row in enumerate(self._rows) if row is None][: len(rows)]
        if len(empty) == len(rows) and self._cache.overwrite(empty, cache):
            for index, row in zip(empty, joining, strict=True):
                self._rows[index] = row
            self._input_ids[mx.array(empty)] = input_ids
        else:
            self._append(joining, input_ids, cache)
        self._columns = max(self._columns, *(row.length for row in joining))
        self._rows_changed()

    def absorb(self, other: DecodeBatch) -> None:
        """Add all rows of another batch. Copies both caches; `other` must not be empty or be used afterwards."""
        other._compact()
        self._append([row for row in other._rows if row is not None], other._input_ids, other._cache)
        self._logprobs += other._logprobs
        self._columns = max(self._columns, other._columns)
        self._rows_changed()

    def remove(self, uids: Collection[int]) -> None:
        """Remove rows. Their batch indices stay empty until other rows take them or the batch is compacted."""
        self._vacate([index for index, row in enumerate(self._rows) if row is not None and row.uid in uids])

    def step(self, *, speculate: bool = False) -> list[TokenOutput]:
        """Queue the next token of every row, then read the previous one.

        Args:
            speculate: the device has no other work, so a few rows may get several tokens each.

        Returns:
            The tokens that were read. Rows that have reached their limit are removed.
        """
        rows = [row for row in self._rows if row is not None]
        full = len(rows) == len(self._rows)
        drafting = speculate and full and self._speculation.can_verify(len(rows)) and not self._changes_logits
        outputs = (self._step_drafting(rows) if drafting else []) or self._step()
        self._save_long_rows()
        return outputs

    def verify(self, length: int) -> list[TokenOutput]:
        """Verify `length` draft tokens per row, whether it pays or not. All input ids must have been read."""
        rows = [row for row in self._rows if row is not None]
        if not rows:
            return []
        verified = list(zip(rows, self._speculation.verify(self._cache, rows, length), strict=True))
        self._input_ids = mx.array([row.next_input for row in rows], dtype=mx.uint32)
        self._columns = self._cache.columns
        invalid = [row for row, tokens in verified if INVALID in tokens]
        self._fail([(row, InvalidLogits()) for row in invalid])
        self._vacate_ended()
        return [TokenOutput(row.uid, token) for row, tokens in verified if row not in invalid for token in tokens]

    def read(self) -> list[TokenOutput]:
        """Wait for the queued tokens and return them, without queueing another step.

        Rows that have reached their limit are removed.
        """
        unread = self._unread()
        tokens = self._wait(self._input_ids, unread)
        outputs, failures = self._outputs(unread, tokens, self._take_logprobs())
        for index, row in unread:
            row.next_input = tokens[index]
        self._fail(failures)
        self._vacate_ended()
        return outputs

    @property
    def _changes_logits(self) -> bool:
        """Whether a row is constrained, uses a logits processor or asks for log-probabilities."""
        return bool(self._pipeline or self._batch_logprobs or self._constraints)

    def _step(self) -> list[TokenOutput]:
        current, unread, logprobs = self._input_ids, self._unread(), self._take_logprobs()
        self._vacate([index for index, row in unread if not row.remaining])
        self._compact_if_worthwhile()
        logits = self._queue_forward() if self._rows else None
        tokens = self._wait(current, unread) if logits is not None and unread and self._constraints else None
        failures = [] if logits is None else self._queue_sampling(logits)
        if not unread:
            self._fail(failures)
            return []
        if tokens is None:
            tokens = self._wait(current, unread)
        for index, row in unread:
            row.cached_ids.append(tokens[index])
        outputs, invalid = self._outputs(unread, tokens, logprobs)
        return self._without_failed(outputs, failures + invalid)

    def _save_long_rows(self) -> None:
        """Store rows that have decoded many tokens, so that another worker can continue them cheaply.

        A file ends with a complete block. The tokens after it must be few, because a sliding window has only `SLACK`
        columns more than a row needs that begins at the end of the block.
        """
        for index, row in enumerate(self._rows):
            if row is not None and row.sampled - row.saved >= SAVED_TOKENS and row.length % BLOCK < SLACK:
                row.saved = row.sampled
                self._prefixes.store(row.row.owner, row.cached_ids, self._cache, index, save=True)

    def _wait(self, input_ids: mx.array, unread: Sequence[tuple[int, DecodeRow]]) -> list[int]:
        """Wait for queued tokens and return them. The constraints of the rows learn them, once."""
        tokens = cast("list[int]", input_ids.tolist())
        for index, row in unread:
            if row.guide is not None and tokens[index] != INVALID:
                row.guide.advance(tokens[index])
        return tokens

    def _step_drafting(self, rows: Sequence[DecodeRow]) -> list[TokenOutput]:
        """Read the queued tokens, then verify drafts if that pays. Returns an empty list if no draft was worthwhile."""
        if not self._speculation.draft_length(rows):
            return []
        outputs = self.read()
        if not self._rows:
            return outputs
        if None not in self._rows and (length := self._speculation.draft_length(rows)):
            return outputs + self.verify(length)
        return self._without_failed(outputs, self._queue_sampling(self._queue_forward()))

    def _unread(self) -> list[tuple[int, DecodeRow]]:
        return [(index, row) for index, row in enumerate(self._rows) if row is not None and row.next_input is None]

    def _outputs(
        self, unread: Sequence[tuple[int, DecodeRow]], tokens: Sequence[int], queued: Sequence[QueuedLogprobs]
    ) -> tuple[list[TokenOutput], _Failures]:
        """Return the tokens that were read, and the rows with invalid logits."""
        logprobs: dict[int, Logprob] = {}
        for each in queued:
            logprobs |= each.read()
        # The chosen logit may be finite although the log-probability is not: another logit of the row is NaN.
        nan = {uid for uid, (logprob, _) in logprobs.items() if math.isnan(logprob)}
        failures: _Failures = []
        if nan or INVALID in tokens:
            failed = [row for index, row in unread if tokens[index] == INVALID or row.uid in nan]
            failures = [(row, InvalidLogits()) for row in failed]
            unread = [(index, row) for index, row in unread if row not in failed]
        return [TokenOutput(row.uid, tokens[index], *logprobs.get(row.uid, ())) for index, row in unread], failures

    def _take_logprobs(self) -> list[QueuedLogprobs]:
        taken, self._logprobs = self._logprobs, []
        return taken

    def _append(self, rows: list[DecodeRow], input_ids: mx.array, cache: KVCache) -> None:
        if None in self._rows:
            self._compact()
        if self._rows:
            self._cache.extend(cache)
        else:
            self._cache = cache
        self._rows.extend(rows)
        self._input_ids = mx.concatenate([self._input_ids, input_ids])

    def _queue_forward(self) -> mx.array:
        """Queue a forward pass of the input ids. Returns its logits, [batch, vocabulary]."""
        self._cache.grow_ahead()
        inputs = valid_ids(self._input_ids)
        with applied(self._slots):
            logits: mx.array = self._model(inputs[:, None], cache=self._cache.layers, **self._shifts)[:, -1]
        if self._constraints:
            mx.async_eval(logits)  # type: ignore[no-untyped-call]
        return logits

    def _queue_sampling(self, logits: mx.array) -> _Failures:
        """Queue the sampling of the next input ids. Returns the rows whose processors or constraints failed."""
        inputs = valid_ids(self._input_ids)
        unchanged = self._batch_logprobs.select(logits)
        logits, failures = self._pipeline(logits, inputs, [row.cached_ids if row else () for row in self._rows])
        if self._constraints:
            logits, failed = self._constraints(logits)
            failures += failed
        self._input_ids = self._sampler(logits, [row.position if row else 0 for row in self._rows])
        queued = [self._input_ids]
        if unchanged is not None:
            self._logprobs.append(self._batch_logprobs.queue(unchanged, valid_ids(self._input_ids)))
            queued += self._logprobs[-1].arrays
        mx.async_eval(queued)  # type: ignore[no-untyped-call]
        self._columns += 1
        for row in filter(None, self._rows):
            row.advance()
        return [(failed_row, error) for index, error in failures if (failed_row := self._rows[index])]

    def _without_failed(self, outputs: list[TokenOutput], failures: _Failures) -> list[TokenOutput]:
        if not failures:
            return outputs
        self._fail(failures)
        failed = {uid for uid, _ in self.failures}
        return [output for output in outputs if output.uid not in failed]

    def _fail(self, failures: _Failures) -> None:
        """Remove rows. Their cache may hold invalid numbers, so it is not stored."""
        self.failures += [(row.uid, error) for row, error in failures]
        failed = [row for row, _ in failures]
        self._vacate([index for index, row in enumerate(self._rows) if row in failed], store=False)

    def _rows_changed(self) -> None:
        """Rebuild everything that depends on which rows the batch has."""
        rows = [row.row if row else None for row in self._rows]
        self._sampler = BatchSampler([row.sampling if row else _GREEDY for row in rows])
        self._pipeline = LogitsPipeline(self._processors, rows)
        self._batch_logprobs = BatchLogprobs(rows)
        self._constraints = BatchConstraints([row.guide if row else None for row in self._rows])
        self._shifts = forward.shifts(rows)
        self._slots = forward.slots(rows)

    def _vacate_ended(self) -> None:
        self._vacate([index for index, row in enumerate(self._rows) if row and not row.remaining])

    def _vacate(self, indices: Sequence[int], *, store: bool = True) -> None:
        """Store the prefixes of rows, unless `store` is false, and empty their batch indices."""
        if not indices:
            return
        for index in indices:
            if row := self._rows[index]:
                if store:
                    self._prefixes.store(row.row.owner, row.cached_ids, self._cache, index)
                self._speculation.drop([row.uid])
            self._rows[index] = None
        if any(self._rows):
            self._rows_changed()
        else:
            self.clear()

    def _compact_if_worthwhile(self) -> None:
        """Compact if empty batch indices have cost about as much as the copy, or if the cache is too wide."""
        live = self.lengths
        self._empty_row_steps += len(self._rows) - len(live)
        if not live:
            return
        too_wide = allocated_columns(self._columns) > allocated_columns(max(live) + SLACK)
        if too_wide or self._empty_row_steps > len(live):
            self._compact()
            self._rows_changed()

    def _compact(self) -> None:
        live = [(index, row) for index, row in enumerate(self._rows) if row is not None]
        self._empty_row_steps = 0
        if not live:
            return
        indices = [index for index, _ in live]
        self._cache.keep_rows(indices)
        self._input_ids = self._input_ids[mx.array(indices)]
        self._rows = [row for _, row in live]
        self._columns = max(row.length for _, row in live)
