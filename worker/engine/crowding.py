"""How many rows are worth decoding together: all that there are slots for, until it is proven that fewer give more.

More rows give more tokens a second, unless their contexts are so long that memory cannot keep up: a cache of the
processor overflows, or the machine swaps. A slow step proves nothing, for whatever else runs on the machine makes steps
slow. So where fewer rows have given more, that is a suspicion, and three stretches are compared, one right after
another: many rows, fewer, and many again. Only when many are clearly slower in all, before and after, and that twice in
a row, is there a cap.

Fewer rows come about by themselves when rows leave and nobody waits. Where the batch stays full, a trial on suspicion
holds back whoever waits, for a moment and seldom. A cap is widened step by step, and dropped when nobody waits or when
contexts have become short.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from worker.engine.stretches import Gain, Known, Step, Stretches

LONG = 500
"""Tokens of the mean context, below which what rows read is little beside the weights."""
HOLD_S = 2.0
"""Most that a trial lasts, and with it that anybody waits for one."""
TRIAL_PAUSE_S, MOST_TRIAL_PAUSE_S = 60.0, 480.0
"""From one trial to the next; twice as long after each that proves nothing."""
WIDEN_S, MOST_WIDEN_S = 120.0, 480.0
"""From a cap to its widening; twice as long after each that was wrong."""
WIDEN_ON_S = 30.0
"""From one widening to the next, when no proof has come in between."""
CLEARLY, AGAIN = 1.1, 1.05
"""Fewer must give so many times more: where nothing is proven yet, and beside a cap."""
PROOFS = 2
"""In a row, before there is a cap."""


class Crowding:
    """Says how many rows may be in the batch.

    Args:
        slots: most rows.
        clock: tells the time in seconds.

    Attributes:
        cap: so many rows are worth while; `slots` where nothing else is proven.
    """

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.cap = self._slots = slots
        self._clock = clock
        self._known = Known()
        self._stretches = Stretches()
        self._stepped_at = 0.0
        self._undisturbed = False
        self._proofs = 0
        self._cap_context = 0.0
        self._held_until = 0.0
        self._trial_at, self._trial_pause_s = 0.0, TRIAL_PAUSE_S
        self._widen_at, self._widen_s = 0.0, WIDEN_S

    @property
    def capped(self) -> bool:
        """Whether fewer rows are worth while than there are slots for."""
        return self.cap < self._slots

    def most(self, rows: int, waiting: int, urgent: bool = False) -> int:
        """How many rows may be in the batch now.

        Args:
            rows: those that are.
            waiting: those that would like to be.
            urgent: whether one of them has been running before.
        """
        now = self._clock()
        if not waiting and rows < self.cap:
            self._lift()
        elif self.capped and now >= self._widen_at:
            self._widen(now)
        if urgent or not rows or not waiting:
            self._held_until = 0.0
            return self._slots if urgent else self.cap
        if now >= self._trial_at and self._suspicious(rows + waiting, now):
            self._held_until = now + HOLD_S
            self._trial_at = now + self._trial_pause_s
            self._trial_pause_s = min(2 * self._trial_pause_s, MOST_TRIAL_PAUSE_S)
        return rows if now < self._held_until else self.cap

    def stepped(self, rows: int, context: int, tokens: int, undisturbed: bool) -> None:
        """A step has ended.

        Args:
            rows: those that it gave tokens to.
            context: tokens of their contexts, of all together.
            tokens: those that it gave.
            undisturbed: whether it did nothing else.
        """
        last, self._stepped_at = self._stepped_at, self._clock()
        before, self._undisturbed = self._undisturbed, undisturbed and rows > 0
        if not before or not self._undisturbed or self._stepped_at <= last:
            return  # the device may be a step behind: what it did meanwhile is only known after two
        step = Step(self._stepped_at, self._stepped_at - last, rows, context / rows, tokens)
        if self.capped and step.context < self._cap_context / 2:
            self._lift()
        if step.context < LONG:
            self._stretches.restart()
            return
        self._known.add(step)
        if gain := self._stretches.add(step):
            self._judge(gain, step)
        elif self._held_until and self._stretches.enough:
            self._held_until = 0.0

    def forget(self) -> None:
        """The batch is lost: what it showed says nothing of what follows."""
        self._lift()
        self._stretches.restart()
        self._proofs = 0
        self._undisturbed = False
        self._held_until = 0.0

    def _suspicious(self, wanted: int, now: float) -> bool:
        """Whether the batch was full and would be again, and fewer rows have given more, or nobody knows yet."""
        full = min(wanted, self._stretches.most) >= self.cap
        if not full or not self._undisturbed or not self._stretches.ready or self._stretches.least_s > HOLD_S:
            return False
        known = self._known.gain(self._stretches, now)
        return known is None or known.times >= self._margin

    @property
    def _margin(self) -> float:
        return AGAIN if self.capped else CLEARLY

    def _judge(self, gain: Gain, last: Step) -> None:
        if gain.times < self._margin:
            self._proofs = self._proofs if self.capped else 0
            return
        self._proofs += 1
        self._trial_at, self._trial_pause_s = last.at, TRIAL_PAUSE_S
        if self._proofs >= PROOFS:
            known = self._known.gain(self._stretches, last.at) or gain
            most = min(gain.rows, gain.than * 3 // 4)  # so steep a fall has not ended there
            self._cap_at(max(1, min(most, max(known.rows, most // 2))), last)

    def _cap_at(self, rows: int, last: Step) -> None:
        self.cap, self._cap_context = rows, last.context
        self._widen_at = last.at + self._widen_s
        self._widen_s = min(2 * self._widen_s, MOST_WIDEN_S)
        self._stretches.restart()

    def _widen(self, now: float) -> None:
        self.cap = min(self._slots, max(self.cap + 1, self.cap * 4 // 3))
        self._trial_at, self._widen_at = now, now + WIDEN_ON_S
        self._stretches.restart()

    def _lift(self) -> None:
        if self.capped:
            self.cap = self._slots
            self._proofs = 0
            self._widen_s = WIDEN_S
            self._trial_at = self._clock()  # should it be needed again, that is soon known
            self._stretches.restart()
