"""Checks of each job: whether it was lost, duplicated or changed compared with an undisturbed run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from threading import Lock

from scripts.client.api import RemoteJob
from shared.jobs.log import Event, EventKind
from shared.jobs.record import Status
from tests.chaos.workload import Behaviour, Reference

MAX_DELAY_S = 20.0
"""Maximum delay of a deadline or a cancellation: Redis or all workers may be down at that time."""


class Violation(StrEnum):
    """A kind of broken guarantee."""

    LOST = "lost"
    """An accepted job did not end."""
    DUPLICATED = "duplicated"
    """A job, an event, a start or an end occurred twice."""
    WRONG = "wrong"
    """A text, a token count or an end differs from the undisturbed run."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken guarantee."""

    violation: Violation
    job_id: str
    detail: str


def check_job(
    job: RemoteJob, log: Sequence[Event], streamed: Sequence[Event], behaviour: Behaviour, expected: Reference
) -> list[Finding]:
    """Compare an ended job with its reference.

    Args:
        log: its events, read at once after its end.
        streamed: its events as a client received them while it ran, over all its connections. Only the first ones, or
            none, if the client's behaviour does not read to the end.
    """
    findings = [
        *_duplicates(log, "log"),
        *_duplicates(streamed, "stream"),
        *_gaps(log, "log"),
        *(_gaps(streamed, "stream") if streamed else ()),
        *_stream_differences(job, log, streamed, behaviour),
        *_wrong_ends(log),
        *_result_differences(job, log, behaviour, expected),
    ]
    return [Finding(violation, job.id, detail) for violation, detail in findings]


Violations = Iterable[tuple[Violation, str]]


def _duplicates(events: Sequence[Event], source: str) -> Violations:
    for number, count in Counter(event.n for event in events).items():
        if count > 1:
            yield Violation.DUPLICATED, f"event {number} is {count} times in the {source}"
    for kind in (EventKind.STARTED, EventKind.DONE):
        count = sum(event.kind is kind for event in events)
        if count > 1:
            yield Violation.DUPLICATED, f"the {source} has {count} {kind} events"


def _gaps(events: Sequence[Event], source: str) -> Violations:
    numbers = [event.n for event in events]
    if sorted(set(numbers)) != list(range(1, len(set(numbers)) + 1)):
        yield Violation.WRONG, f"the {source} has a gap: {numbers}"
    elif numbers != sorted(numbers):
        yield Violation.WRONG, f"the {source} is out of order: {numbers}"


def _stream_differences(
    job: RemoteJob, log: Sequence[Event], streamed: Sequence[Event], behaviour: Behaviour
) -> Violations:
    """Compare the stream with the log."""
    logged = {event.n: event for event in log}
    for event in streamed:
        if (entry := logged.get(event.n)) is None:
            yield Violation.WRONG, f"event {event.n} is in the stream but not in the log"
        elif event.kind != entry.kind:
            yield Violation.WRONG, f"event {event.n} is {event.kind} in the stream, {entry.kind} in the log"
        elif event.kind is EventKind.DONE:
            yield from _final_event_differences(job, event)
        elif event.data != entry.data:
            yield Violation.WRONG, f"event {event.n} has {event.data!r} in the stream, {entry.data!r} in the log"
    if behaviour.reads_to_end and (not streamed or streamed[-1].kind is not EventKind.DONE):
        yield Violation.WRONG, f"the stream stops at event {streamed[-1].n if streamed else 0}"


def _final_event_differences(job: RemoteJob, done: Event) -> Violations:
    """Compare the last event of a stream, which contains the job, with the job."""
    try:
        final = RemoteJob.from_json(json.loads(done.data))
    except (ValueError, KeyError, TypeError) as error:
        yield Violation.WRONG, f"the last event of the stream contains no job: {error!r}"
        return
    if _summary(final) != _summary(job):
        yield Violation.WRONG, f"the stream ends with {_summary(final)}, the job has {_summary(job)}"


def _summary(job: RemoteJob) -> tuple[object, ...]:
    return job.id, job.status, job.text, job.finish_reason, job.usage, job.error


def check_delay(job_id: str, finished_at: float, due_at: float, cause: str) -> list[Finding]:
    """Check that a job ended soon after it was due to end.

    Args:
        finished_at, due_at: seconds since the epoch.
        cause: why it was due, such as "its deadline".
    """
    delay_s = finished_at - due_at
    if delay_s <= MAX_DELAY_S:
        return []
    return [Finding(Violation.WRONG, job_id, f"it ended {delay_s:.1f} s after {cause}")]


def _wrong_ends(log: Sequence[Event]) -> Violations:
    kinds = [event.kind for event in log]
    if kinds[:1] != [EventKind.QUEUED] or kinds[-1:] != [EventKind.DONE]:
        yield Violation.WRONG, f"the log begins or ends with the wrong event: {[str(kind) for kind in kinds]}"


def _result_differences(job: RemoteJob, log: Sequence[Event], behaviour: Behaviour, expected: Reference) -> Violations:
    logged = "".join(event.text for event in log)
    if logged != job.text:
        yield Violation.WRONG, f"the log has the text {logged!r}, the job {job.text!r}"
    if job.status is Status.SUCCEEDED:
        actual = Reference.of(job)
        if actual != expected:
            yield Violation.WRONG, f"it gave {actual}, undisturbed {expected}"
    elif not _may_end_with(job.status, behaviour):
        yield Violation.WRONG, f"it ended {job.status}: {job.error}"
    elif not expected.text.startswith(job.text):
        yield Violation.WRONG, f"it was stopped at {job.text!r}, the undisturbed text is {expected.text!r}"


def _may_end_with(status: Status, behaviour: Behaviour) -> bool:
    return (status, behaviour) in ((Status.CANCELLED, Behaviour.CANCELS), (Status.EXPIRED, Behaviour.SHORT_DEADLINE))


@dataclass(slots=True)
class Outcomes:
    """All submitted jobs and their outcomes; shared by threads."""

    accepted: dict[str, str] = field(default_factory=dict)
    """Job id by Idempotency-Key."""
    ended: dict[str, Status] = field(default_factory=dict)
    behaviours: Counter[Behaviour] = field(default_factory=Counter)
    resumed: int = 0
    """Number of jobs with more than one attempt."""
    findings: list[Finding] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def add_accepted(self, key: str, job_id: str, behaviour: Behaviour) -> None:
        """Record that the API accepted a job."""
        with self._lock:
            self.accepted[key] = job_id
            self.behaviours[behaviour] += 1

    def add_ended(self, job: RemoteJob, log: Sequence[Event], findings: Iterable[Finding]) -> None:
        """Record the end of a job."""
        with self._lock:
            self.ended[job.id] = job.status
            self.resumed += any(event.kind is EventKind.RESUMED for event in log)
            self.findings += findings

    def add_finding(self, finding: Finding) -> None:
        """Record a broken guarantee."""
        with self._lock:
            self.findings.append(finding)

    def count(self, violation: Violation) -> int:
        """Return the number of jobs with a violation."""
        return len({finding.job_id for finding in self.findings if finding.violation is violation})
