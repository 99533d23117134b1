"""Which rows prefill in a step, and how much of them.

Short prompts go together, whole, several at a time. A long one goes alone, chunk by chunk. When both wait they take
turns, so neither kind waits for more than one chunk of the other, and a short prompt never shares a cache with a long
one, which would pad it to that length. What counts is what is left to prefill behind the cached prefix.

Beside rows that decode, a long prompt gets the time that `PrefillBudget` allows, if need be some layers of a chunk at a
time. Short prompts are not limited: prefilled one by one under the same budget, 32 that came at once gave two fifths
fewer tokens a second, and the last waited four times as long.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import takewhile

from worker.engine.prefill_budget import PrefillBudget
from worker.runner.base import EncodeWork, PrefillCost, PrefillWork, StepPlan, Unread

SHORT_CHUNKS, SHORT_S = 2, 0.01
"""A prompt is short if it costs at most this many chunks or seconds: no reader notices such a pause."""
MOST_SHORT_CHUNKS = 16
"""A prompt of more chunks is never short."""
SHORT_IMAGE_S = 0.02
"""Images that cost no more are encoded whole, also beside decoding rows."""
MOST_TOGETHER = 8
"""Short prompts in one pass. More would not make a token cheaper, and would delay the first answers."""


class PrefillPolicy:
    """Plans the prefill and the encoding of each step.

    Args:
        chunk: most tokens of a long prompt's chunk.
        depth: layers of a prefill pass.
        cost: of prefill passes, as measured.
        budget: the time for prefill beside decoding rows.
    """

    def __init__(self, chunk: int, depth: int, cost: PrefillCost, budget: PrefillBudget) -> None:
        self._chunk = chunk
        self._depth = depth
        self._cost = cost
        self._budget = budget
        self._short_s = max(cost.seconds(SHORT_CHUNKS * chunk, 0), SHORT_S)
        self._long_uid: int | None = None
        self._long_next = False
        self._images_next = False
        self._pausing: bool | None = None

    def plan(
        self, unread: Mapping[int, Unread], image_s: float | None, *, decoding: bool, alone: Collection[int] = ()
    ) -> StepPlan:
        """Plan a step.

        Args:
            unread: rows that can be prefilled, in their order.
            image_s: seconds that the next image takes to encode; None: no image waits.
            decoding: whether rows wait for their next token meanwhile.
            alone: rows that are not to be prefilled together with others.
        """
        if not unread and image_s is None:
            return StepPlan(speculate=True)
        self._pausing = None if decoding else False
        self._images_next = not self._images_next
        if image_s is not None and (self._images_next or not unread):
            work = self._encode(image_s, decoding)
            if work is not None:
                return StepPlan(encode=work)
        return StepPlan(prefill=self._prefill(unread, decoding, alone))

    def _encode(self, image_s: float, decoding: bool) -> EncodeWork | None:
        if not decoding or image_s <= SHORT_IMAGE_S:
            return EncodeWork()
        return None if self._pauses() else EncodeWork(self._budget.spare_s())

    def _prefill(self, unread: Mapping[int, Unread], decoding: bool, alone: Collection[int]) -> PrefillWork | None:
        """Take turns; where the one kind has nothing to do, it is the other's turn."""
        if self._long_uid not in unread:
            self._long_uid = None
        short, long = self._split(unread, alone)
        long_first, self._long_next = self._long_next, not self._long_next
        if long_first:
            return self._long_work(unread, long, decoding) or self._short_work(unread, short)
        return self._short_work(unread, short) or self._long_work(unread, long, decoding)

    def _split(self, unread: Mapping[int, Unread], alone: Collection[int]) -> tuple[list[int], list[int]]:
        """Return short prompts and long ones; what has begun as a long one stays one."""
        short: list[int] = []
        long: list[int] = []
        for uid, left in unread.items():
            goes_alone = uid == self._long_uid or uid in alone or not self._is_short(left)
            (long if goes_alone else short).append(uid)
        return short, long

    def _short_work(self, unread: Mapping[int, Unread], short: list[int]) -> PrefillWork | None:
        """The first short prompt and those next in line that are about as long, cached prefixes included."""
        if not short:
            return None
        lengths = [unread[uid].position + unread[uid].tokens for uid in short[:MOST_TOGETHER]]
        alike = takewhile(lambda length: abs(length - lengths[0]) <= SHORT_CHUNKS * self._chunk, lengths)
        return PrefillWork(tuple(short[: len(list(alike))]))

    def _long_work(self, unread: Mapping[int, Unread], long: list[int], decoding: bool) -> PrefillWork | None:
        """A chunk of the long prompt under way, or of the next one; beside decoding rows as much as fits in a step."""
        if not long or self._pauses():
            return None
        self._long_uid = uid = long[0] if self._long_uid is None else self._long_uid
        if not decoding:
            return PrefillWork((uid,), self._chunk)
        left = unread[uid]
        size = left.under_way or min(self._budget.chunk(left.position, self._depth), left.tokens)
        return PrefillWork((uid,), size, self._budget.layers(size, left.position, self._depth))

    def _pauses(self) -> bool:
        """Whether no long work is done in this step; counted once a step, and only where there is some."""
        if self._pausing is None:
            self._pausing = self._budget.pauses()
        return self._pausing

    def _is_short(self, left: Unread) -> bool:
        """Whether it costs no more than some chunks at the beginning of a prompt do, or hardly any time."""
        # Costs that were measured on a busy machine may make any prompt look cheap, so its tokens count as well.
        few = left.tokens <= MOST_SHORT_CHUNKS * self._chunk
        return few and self._cost.seconds(left.tokens, left.position) <= self._short_s
