"""The timings of a job as bars: waiting, prefill, decoding, and every attempt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shared.jobs.record import Job

_MIN_SHARE: Final = 0.4
"""Minimum width of a bar in percent, so that it is visible."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of the waterfall.

    Attributes:
        kind: its colour: `queue`, `prefill`, `decode` or `attempt`.
        start_s, end_s: seconds after the submission.
        x, width: in percent of the whole time.
    """

    label: str
    kind: str
    start_s: float
    end_s: float
    x: float
    width: float
    note: str = ""

    @property
    def seconds(self) -> float:
        """The duration."""
        return self.end_s - self.start_s


def bars(job: Job) -> list[Bar]:
    """Return the bars of a job, in the order in which they begin."""
    end_s = max((job.finished_at or time.time()) - job.created_at, 1e-6)
    return [_bar(end_s, *each) for each in (*_phases(job, end_s), *_attempts(job, end_s))]


def _phases(job: Job, end_s: float) -> Iterator[tuple[str, str, float, float, str]]:
    started_s = end_s if job.started_at is None else job.started_at - job.created_at
    yield "Queue", "queue", 0.0, started_s, ""
    if job.started_at is None:
        return
    first_s = job.timings.get("first_token_s")
    prefill_s = job.timings.get("prefill_s")
    if first_s is not None:
        first_s = max(first_s, started_s)  # the worker's clock measured it
        prefill_start_s = max(started_s, first_s - prefill_s) if prefill_s is not None else started_s
        yield "Prefill", "prefill", prefill_start_s, first_s, _tokens(job.prompt_tokens, "prompt ")
        yield "Decode", "decode", first_s, end_s, _tokens(job.completion_tokens)


def _tokens(number: int | None, kind: str = "") -> str:
    return f"{number} {kind}token{'' if number == 1 else 's'}" if number else ""


def _attempts(job: Job, end_s: float) -> Iterator[tuple[str, str, float, float, str]]:
    for attempt in job.history:
        start_s = attempt.started_at - job.created_at
        ended_s = end_s if attempt.ended_at is None else attempt.ended_at - job.created_at
        how = "running" if attempt.how is None else attempt.how.value.replace("_", " ")
        yield f"Attempt {attempt.number}", "attempt", start_s, ended_s, how


def _bar(whole_s: float, label: str, kind: str, start_s: float, end_s: float, note: str) -> Bar:
    x = min(max(100 * start_s / whole_s, 0.0), 100.0 - _MIN_SHARE)
    width = min(max(100 * (end_s - start_s) / whole_s, _MIN_SHARE), 100.0 - x)
    return Bar(label, kind, start_s, end_s, round(x, 3), round(width, 3), note)
