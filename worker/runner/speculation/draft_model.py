"""A proposer of draft tokens from a small model with the same vocabulary.

The draft model chooses its tokens with the row's sampling options and the randomness of (seed, position), as the model
does, so that a good draft model often makes the same choice even at high temperatures.

If the model accepts few of the drafts, drafting pauses for a few hundred steps. If the drafts are wrong again after a
pause, the next pause is twice as long. During a pause the draft model computes nothing. After a pause it reads only the
end of each row, because reading long rows is expensive and the drafts are probably wrong again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx

from worker.runner import forward, kv_cache
from worker.runner.decode_row import DecodeRow
from worker.runner.kv_cache import Footprint, KVCache
from worker.runner.prefix.tree import common_length
from worker.runner.sampler import BatchSampler, valid_ids
from worker.runner.speculation.proposer import Proposer

CATCH_UP_TOKENS = 256
"""Maximum tokens per row and step that the draft model processes before it drafts."""

PROBE_TOKENS = CATCH_UP_TOKENS // 8
"""Tokens of each row that the draft model reads after a pause: so few that `propose` reads them in its first pass."""

PAUSE_STEPS = 512
"""Steps without drafts after too few were accepted. A failed attempt costs about 3 steps, so less than 1%."""

MAX_PAUSE_STEPS = 16 * PAUSE_STEPS

MIN_RATE = 0.3
"""Acceptance rate per token below which drafting pauses."""

_PRIOR = (1.4, 2.0)
"""Initial numbers of accepted and drafted tokens. If the first three tokens are wrong, drafting pauses."""
_PRIOR_AFTER_PAUSE = (0.59, 1.0)
"""The same after a pause. If the first token is wrong, drafting pauses again."""
_HALF_LIFE = 64
"""Drafted tokens after which the counts are halved, because the style of a text changes."""


@dataclass(slots=True)
class _Draft:
    """The draft model's cache of a row.

    Attributes:
        start: the row's first token in the cache.
        ids: the tokens in the cache.
    """

    cache: KVCache
    start: int = 0
    ids: list[int] = field(default_factory=list)

    def missing(self, row: DecodeRow) -> list[int]:
        """Return the row's cached tokens after those of the draft model."""
        return row.cached_ids[self.start + len(self.ids) :]


class DraftModelProposer(Proposer):
    """See `worker.runner.speculation.proposer.Proposer`.

    Args:
        model: an mlx-lm model without recurrent layers.
        vocabulary: size of the logits of the model that verifies the drafts.

    Attributes:
        token_s: seconds to draft a token, measured during warm-up.
        footprint: cache memory of a row in the draft model.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        self.token_s = 0.0
        self.footprint = Footprint.of(model)
        self._model = model
        self._vocabulary = vocabulary
        self._drafts: dict[int, _Draft] = {}
        self._accepted, self._drafted = _PRIOR
        self._paused_steps = 0
        self._next_pause = PAUSE_STEPS

    def expected(self, rows: Sequence[DecodeRow], max_length: int) -> list[list[float]]:
        """Estimate acceptance by the recent acceptance rate of all rows."""
        if self._paused_steps:
            self._paused_steps -= 1
            return [[] for _ in rows]
        rate, all_accepted, total, totals = self._accepted / self._drafted, 1.0, 0.0, []
        for _ in range(max_length):
            all_accepted *= rate
            total += all_accepted
            totals.append(total)
        return [[] if row.row.media is not None else totals for row in rows]

    def seconds(self, rows: int, length: int) -> float:
        """Return the seconds of drafting; rows are drafted one after another."""
        return rows * length * self.token_s

    def prepare(self, rows: Sequence[DecodeRow]) -> bool:
        """Process tokens of the rows that the draft model has not seen. Returns whether it can draft now."""
        ready = [self._catch_up(row) for row in rows if row.row.media is None]
        return all(ready)

    def propose(self, rows: Sequence[DecodeRow], length: int) -> list[list[int]]:
        """Return the draft model's continuation of each row."""
        return [self._draft(row, length) if row.row.media is None else [] for row in rows]

    def record(self, drafted: int, accepted: int) -> None:
        """See `Proposer.record`. Ignores the other rows of a pass after which drafting pauses."""
        if self._paused_steps:
            return
        self._drafted += accepted + (accepted < drafted)
        self._accepted += accepted
        if self._accepted < MIN_RATE * self._drafted:
            self._paused_steps, self._next_pause = self._next_pause, min(2 * self._next_pause, MAX_PAUSE_STEPS)
            self._accepted, self._drafted = _PRIOR_AFTER_PAUSE
            self._drafts.clear()
        elif self._drafted > _HALF_LIFE:
            self._accepted, self._drafted = self._accepted / 2, self._drafted / 2
            self._end_probing()

    def drop(self, uids: Collection[int]) -> None:
        """Drop the caches of rows."""
        for uid in uids:
            self._drafts.pop(uid, None)

    @property
    def _probing(self) -> bool:
        """Whether the draft model has been paused and has not helped since."""
        return self._next_pause > PAUSE_STEPS

    def _end_probing(self) -> None:
        if self._probing:
            self._next_pause = PAUSE_STEPS
            self._drafts.clear()  # read the rows from their start

    def _draft_of(self, row: DecodeRow) -> _Draft:
        """Return the draft model's cache of a row, without tokens that the model has not accepted."""
        if row.uid not in self._drafts:
            start = max(0, row.length - PROBE_TOKENS) if self._probing else 0
            self._drafts[row.uid] = _Draft(KVCache.empty(self._model), start)
        draft = self._drafts[row.uid]
        self._forget_rejected(draft, row)
        return draft

    def _catch_up(self, row: DecodeRow) -> bool:
        draft = self._draft_of(row)
        missing = draft.missing(row)
        if len(missing) <= PROBE_TOKENS:  # `propose` processes these together with the first draft token
            return True
        self._process(draft, missing[:CATCH_UP_TOKENS])
        mx.async_eval(draft.cache.states)  # type: ignore[no-untyped-call]
        return False

    def _forget_rejected(self, draft: _Draft, row: DecodeRow) -> None:
        known = common_length(draft.ids, row.cached_ids[draft.start :])
        if known < len(draft.ids):
            draft.cache.trim([len(draft.ids) - known])
            del draft.ids[known:]

    def _draft(self, row: DecodeRow, length: int) -> list[int]:
        draft = self._draft_of(row)
        logits = self._process(draft, [*draft.missing(row), row.next_input or 0])
        sampler, tokens = BatchSampler([row.row.sampling]), list[mx.array]()
        for i in range(length):
            tokens.append(valid_ids(sampler(self._fitted(logits), [row.position + i])))
            if i + 1 < length:
                logits = self._model(tokens[-1][:, None], cache=draft.cache.layers)[:, -1]
        ids = cast("list[int]", mx.concatenate(tokens).tolist())
        draft.ids += ids[:-1]
        return ids

    def _process(self, draft: _Draft, ids: Sequence[int]) -> mx.array:
        """Process the next tokens of a row. Returns the logits after the last of them."""
        logits = forward.fill(self._model, draft.cache, [ids])
        draft.ids += ids
        if logits is None:
            raise ValueError("a pass needs a token")
        return logits[:, -1]

    def _fitted(self, logits: mx.array) -> mx.array:
        """Return logits of the size of the verifying model's, because the sampler's noise depends on the size."""
        missing = self._vocabulary - logits.shape[-1]
        if missing > 0:
            return mx.pad(logits, [(0, 0), (0, missing)], constant_values=mx.array(-mx.inf, logits.dtype))
        return logits[:, : self._vocabulary]


def usable(model: Any) -> bool:
    """Return whether a model can draft: rejected tokens must be removed from its cache."""
    return kv_cache.mergeable(model) and not kv_cache.recurrent(model)
