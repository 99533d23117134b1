"""Measures how long the stages of a job take."""

from __future__ import annotations

import time

from shared.queue.claims import ClaimedJob
from shared.queue.job_spans import Stages


class Timings:
    """A job's timings in seconds: its age at the claim by Redis's clock, plus this process's monotonic clock.

    A job is queued until it is first admitted to a batch, by this attempt or an earlier one. If an earlier attempt
    generated the first token, `first_token_s` is omitted, because its time is unknown.
    """

    def __init__(self, claimed: ClaimedJob) -> None:
        job = claimed.job
        self._queued_before_s = None if job.started_at is None else job.started_at - job.created_at
        self._age_s = claimed.age_s
        self._claimed = time.monotonic()
        self._admitted: float | None = None
        self._prefilled: float | None = None
        self._first_token: float | None = None
        self._last_token: float | None = None
        self._token_before: float | None = None
        self._first_token_known = True
        self._first_token_reported = False

    def admitted(self) -> None:
        """Record the admission to the batch; only the first one counts."""
        if self._admitted is None:
            self._admitted = time.monotonic()

    def prefilled(self) -> None:
        """Record that the prompt is in the cache; only the first time counts."""
        if self._prefilled is None:
            self._prefilled = time.monotonic()

    def token(self) -> None:
        """Record a token."""
        now = time.monotonic()
        if self._first_token is None:
            self._first_token = now
        self._token_before, self._last_token = self._last_token, now

    def forget_first_token(self) -> None:
        """Omit `first_token_s`, because an earlier attempt generated the first token."""
        self._first_token_known = False

    @property
    def queue_s(self) -> float | None:
        """Seconds in the queue; None if an earlier attempt was admitted, so that they were reported before."""
        return None if self._queued_before_s is not None else self._queue_s(time.monotonic())

    @property
    def token_gap_s(self) -> float | None:
        """Seconds between the last two tokens of this attempt; None before the second one."""
        if self._last_token is None or self._token_before is None:
            return None
        return self._last_token - self._token_before

    def report_first_token(self) -> float | None:
        """Return `first_token_s` once, as soon as it is known; None otherwise."""
        if self._first_token_reported or self._first_token is None or not self._first_token_known:
            return None
        self._first_token_reported = True
        return self._since_creation(self._first_token)

    def stages(self) -> Stages:
        """Return when each stage began, by the clock of this process, for traces."""
        now = time.monotonic()
        offset_s = time.time() - now

        def at(moment: float | None) -> float | None:
            return None if moment is None else moment + offset_s

        created = self._claimed - self._age_s + offset_s
        return Stages(created, now + offset_s, at(self._admitted), at(self._prefilled), at(self._first_token))

    def as_dict(self) -> dict[str, float]:
        """Return `queue_s` and `total_s`, and `prefill_s` and `first_token_s` if they are known."""
        now = time.monotonic()
        timings = {"queue_s": self._queue_s(now), "total_s": self._since_creation(now)}
        if self._admitted is not None and self._prefilled is not None:
            timings["prefill_s"] = self._prefilled - self._admitted
        if self._first_token is not None and self._first_token_known:
            timings["first_token_s"] = self._since_creation(self._first_token)
        return timings

    def _queue_s(self, now: float) -> float:
        if self._queued_before_s is not None:
            return self._queued_before_s
        return self._since_creation(now if self._admitted is None else self._admitted)

    def _since_creation(self, moment: float) -> float:
        return self._age_s + moment - self._claimed
