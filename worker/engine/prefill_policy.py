"""Decides which rows are prefilled in a step, and how much of them.

Short prompts are prefilled whole, several at a time. A long prompt is prefilled alone, chunk by chunk. If prompts of
both kinds wait, they take turns, so neither kind waits for more than one chunk of the other. A short prompt never
shares a cache with a long one, because it would be padded to the same length. A prompt is short or long by the part
that is not in the prefix cache. Images take turns with long prompts; short prompts are prefilled in the same step.

While other rows decode, a long prompt gets the time that `PrefillBudget` allows; a chunk may go through a few layers at
a time. Short prompts are not limited. Prefilled one by one under the same budget, 32 simultaneous prompts gave 40%
fewer tokens per second, and the last one waited four times as long. Only prompts of the class `batch` take few tokens
per pass, because a row of another class that comes meanwhile waits for the pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import accumulate, takewhile

from worker.engine.prefill_budget import PrefillBudget
from worker.runner.base import EncodeWork, PrefillWork, RemainingPrompt, StepPlan
from worker.runner.cost import PrefillCost

SHORT_CHUNKS, SHORT_PASSES, SHORT_S = 2, 4, 0.05
"""A prompt is short if it costs at most as much as this many chunks, or the fixed cost of this many passes, or this
many seconds. Splitting it would add the fixed cost of a pass for each chunk, and readers do not notice such a pause. An
image that costs at most `SHORT_S` is also encoded whole, even if rows decode."""
ALONE_CHUNKS, ALONE_TOKENS = 4, 512
"""While no row decodes, a chunk of a long prompt is this many times as long, but at most this many tokens. On a CPU,
512 tokens in chunks of 128 take 0.65 to 0.8 of the time that they take in chunks of 32 (0.96 with recurrent layers)."""
MAX_SHORT_CHUNKS = 16
"""A prompt of more chunks is never short."""
BATCH_PASSES = 4
"""A pass over short prompts of the class `batch` has at most this part of a chunk. With a whole chunk, the p99 of the
time to the first token beside a batch is 1.50 instead of 1.20 times the p99 without a batch, and the batch is no faster
(`tests.bench.batch_engine`, a CPU)."""
MAX_SHORT_PROMPTS = 8
"""Maximum short prompts in one pass. More would not make a token cheaper, and would delay the first answers."""
TOGETHER_S = 0.08
"""Maximum seconds of several short prompts in one pass, unless `MAX_SHORT_PROMPTS` prompts of `SHORT_CHUNKS` chunks
cost more."""


class PrefillPolicy:
    """Plans the prefill and the encoding of each step.

    Args:
        chunk: maximum tokens of a long prompt's chunk while other rows decode.
        depth: layers of the model.
        cost: of prefill passes, measured at loading.
        budget: limits prefill while rows decode.
    """

    def __init__(self, chunk: int, depth: int, cost: PrefillCost, budget: PrefillBudget) -> None:
        self._chunk = chunk
        self._alone_chunk = max(chunk, min(ALONE_CHUNKS * chunk, ALONE_TOKENS))
        self._depth = depth
        self._cost = cost
        self._budget = budget
        chunks_s = cost.seconds(SHORT_CHUNKS * chunk, 0)
        self._short_s = max(chunks_s, SHORT_PASSES * cost.fixed, SHORT_S)
        self._together_s = max(MAX_SHORT_PROMPTS * chunks_s, TOGETHER_S)
        self._long_uid: int | None = None
        self._long_next = False
        self._images_next = True
        self._pausing: bool | None = None

    def plan(
        self,
        remaining: Mapping[int, RemainingPrompt],
        image_s: float | None,
        *,
        decoding: bool,
        exclusive: Collection[int] = (),
        batch: bool = False,
    ) -> StepPlan:
        """Plan a step.

        Args:
            remaining: rows that can be prefilled, in the order of admission.
            image_s: seconds that encoding the next image takes; None: no image waits.
            decoding: whether other rows decode in the step.
            exclusive: rows that must not be prefilled together with others.
            batch: whether all these rows have the class `batch`.
        """
        if not remaining and image_s is None:
            return StepPlan(speculate=True)
        self._pausing = None if decoding else False
        short, long = self._split(remaining, exclusive)
        if image_s is not None and (self._images_next or not long):
            self._images_next = False
            if (work := self._encode(image_s, decoding)) is not None:
                self._long_next = True  # the short prompts have their turn now
                return StepPlan(encode=work, prefill=self._short_work(remaining, short, batch))
        self._images_next = True
        return StepPlan(prefill=self._prefill(remaining, short, long, decoding, batch))

    def _encode(self, image_s: float, decoding: bool) -> EncodeWork | None:
        if not decoding or image_s <= SHORT_S:
            return EncodeWork()
        return None if self._pauses() else EncodeWork(self._budget.spare_s())

    def _prefill(
        self,
        remaining: Mapping[int, RemainingPrompt],
        short: list[int],
        long: list[int],
        decoding: bool,
        batch: bool,
    ) -> PrefillWork | None:
        """Let short and long prompts take turns; if there are none of the one kind, continue with the other."""
        long_first, self._long_next = self._long_next, not self._long_next
        if long_first:
            return self._long_work(remaining, long, decoding) or self._short_work(remaining, short, batch)
        return self._short_work(remaining, short, batch) or self._long_work(remaining, long, decoding)

    def _split(
        self, remaining: Mapping[int, RemainingPrompt], exclusive: Collection[int]
    ) -> tuple[list[int], list[int]]:
        """Return the short prompts and the long ones. A prompt that began as a long one stays one."""
        if self._long_uid not in remaining:
            self._long_uid = None
        short: list[int] = []
        long: list[int] = []
        for uid, left in remaining.items():
            is_long = uid == self._long_uid or uid in exclusive or not self._is_short(left)
            (long if is_long else short).append(uid)
        return short, long

    def _short_work(
        self, remaining: Mapping[int, RemainingPrompt], short: list[int], batch: bool
    ) -> PrefillWork | None:
        """Prefill the first short prompt and the following ones of about the same length, cached prefixes included."""
        if not short:
            return None
        candidates = short[: self._together(remaining, short, batch)]
        lengths = [remaining[uid].position + remaining[uid].tokens for uid in candidates]
        alike = takewhile(lambda length: abs(length - lengths[0]) <= SHORT_CHUNKS * self._chunk, lengths)
        return PrefillWork(tuple(short[: len(list(alike))]))

    def _together(self, remaining: Mapping[int, RemainingPrompt], short: list[int], batch: bool) -> int:
        """Return how many of the first short prompts are prefilled together; at least one."""
        first = [remaining[uid] for uid in short[:MAX_SHORT_PROMPTS]]
        costs = [left.tokens if batch else self._cost.seconds(left.tokens, left.position) for left in first]
        most = self._chunk // BATCH_PASSES if batch else self._together_s
        return max(1, sum(total <= most for total in accumulate(costs)))

    def _long_work(
        self, remaining: Mapping[int, RemainingPrompt], long: list[int], decoding: bool
    ) -> PrefillWork | None:
        """Prefill a chunk of the present or the next long prompt; while rows decode, as much as fits into the step."""
        if not long or self._pauses():
            return None
        self._long_uid = uid = long[0] if self._long_uid is None else self._long_uid
        left = remaining[uid]
        if not decoding:
            return PrefillWork((uid,), min(self._alone_chunk, left.tokens))
        size = left.in_progress or min(self._budget.chunk(left.position, self._depth), left.tokens)
        return PrefillWork((uid,), size, self._budget.layers(size, left.position, self._depth))

    def _pauses(self) -> bool:
        """Whether this step has no long work. Asks the budget once per step, and only if there is long work."""
        if self._pausing is None:
            self._pausing = self._budget.pauses()
        return self._pausing

    def _is_short(self, left: RemainingPrompt) -> bool:
        """Whether the remaining part costs at most a few chunks at the beginning of a prompt, or hardly any time."""
        # If the costs were measured on a busy machine, any prompt may look cheap. So its tokens are bounded as well.
        bounded = left.tokens <= MAX_SHORT_CHUNKS * self._chunk
        return bounded and self._cost.seconds(left.tokens, left.position) <= self._short_s
