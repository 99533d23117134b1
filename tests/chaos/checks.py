"""The verdict on each job: lost, duplicated, wrong, or as it would have been undisturbed."""

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
from tests.chaos.workload import Reference, Style

LATE_S = 20.0
"""A deadline or a cancel may take effect so much later: Redis or every worker may be away just then."""


class Fault(StrEnum):
    """How a promise can be broken."""

    LOST = "lost"
    """It was accepted, and has no end."""
    DUPLICATED = "duplicated"
    """Something of it is there twice: the job, an event, its start, its end."""
    WRONG = "wrong"
    """Its text, its usage or its end is not what it would have been."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken promise."""

    fault: Fault
    job_id: str
    detail: str


def judge(
    job: RemoteJob, log: Sequence[Event], read: Sequence[Event], style: Style, expected: Reference
) -> list[Finding]:
    """Hold an ended job against its reference.

    Args:
        log: its events, read in one go after its end.
        read: its events as a client saw them while it ran, over all its connections; the first few, or none, where
            its style does not read to the end.
    """
    findings = [
        *_duplicates(log, "log"),
        *_duplicates(read, "stream"),
        *_gaps(log, "log"),
        *(_gaps(read, "stream") if read else ()),
        *_retold(job, log, read, style),
        *_story(log),
        *_text(job, log, style, expected),
    ]
    return [Finding(fault, job.id, detail) for fault, detail in findings]


Found = Iterable[tuple[Fault, str]]


def _duplicates(events: Sequence[Event], where: str) -> Found:
    for number, times in Counter(event.n for event in events).items():
        if times > 1:
            yield Fault.DUPLICATED, f"event {number} is {times} times in the {where}"
    for kind in (EventKind.STARTED, EventKind.DONE):
        times = sum(event.kind is kind for event in events)
        if times > 1:
            yield Fault.DUPLICATED, f"the {where} has {times} {kind} events"


def _gaps(events: Sequence[Event], where: str) -> Found:
    numbers = [event.n for event in events]
    if sorted(set(numbers)) != list(range(1, len(set(numbers)) + 1)):
        yield Fault.WRONG, f"the {where} has a gap: {numbers}"
    elif numbers != sorted(numbers):
        yield Fault.WRONG, f"the {where} is out of order: {numbers}"


def _retold(job: RemoteJob, log: Sequence[Event], read: Sequence[Event], style: Style) -> Found:
    """What a client was told is what the log tells."""
    logged = {event.n: event for event in log}
    for event in read:
        if (truth := logged.get(event.n)) is None:
            yield Fault.WRONG, f"the stream has event {event.n}, the log has not"
        elif event.kind != truth.kind:
            yield Fault.WRONG, f"event {event.n} is {event.kind} in the stream, {truth.kind} in the log"
        elif event.kind is EventKind.DONE:
            yield from _end_told(job, event)
        elif event.data != truth.data:
            yield Fault.WRONG, f"event {event.n} has {event.data!r} in the stream, {truth.data!r} in the log"
    if style.reads_on and (not read or read[-1].kind is not EventKind.DONE):
        yield Fault.WRONG, f"the stream stops at event {read[-1].n if read else 0}"


def _end_told(job: RemoteJob, done: Event) -> Found:
    """The last event of a stream has the whole job."""
    try:
        told = RemoteJob.from_json(json.loads(done.data))
    except (ValueError, KeyError, TypeError) as error:
        yield Fault.WRONG, f"the stream ends with something that is no job: {error!r}"
        return
    if _gist(told) != _gist(job):
        yield Fault.WRONG, f"the stream ends with {_gist(told)}, the job has {_gist(job)}"


def _gist(job: RemoteJob) -> tuple[object, ...]:
    return job.id, job.status, job.text, job.finish_reason, job.usage, job.error


def overdue(job_id: str, finished_at: float, due_at: float, what: str) -> list[Finding]:
    """Hold a job's end against the moment from which it had no business to go on.

    Args:
        finished_at, due_at: seconds since the epoch.
        what: asked for the end.
    """
    late_s = finished_at - due_at
    return [Finding(Fault.WRONG, job_id, f"it ended {late_s:.1f} s after {what}")] if late_s > LATE_S else []


def _story(log: Sequence[Event]) -> Found:
    kinds = [event.kind for event in log]
    if kinds[:1] != [EventKind.QUEUED] or kinds[-1:] != [EventKind.DONE]:
        yield Fault.WRONG, f"the log begins or ends with the wrong event: {[str(kind) for kind in kinds]}"


def _text(job: RemoteJob, log: Sequence[Event], style: Style, expected: Reference) -> Found:
    told = "".join(event.text for event in log)
    if told != job.text:
        yield Fault.WRONG, f"the log tells {told!r}, the job has {job.text!r}"
    if job.status is Status.SUCCEEDED:
        got = Reference.of(job)
        if got != expected:
            yield Fault.WRONG, f"it gave {got}, undisturbed {expected}"
    elif not _may_end_so(job.status, style):
        yield Fault.WRONG, f"it ended {job.status}: {job.error}"
    elif not expected.text.startswith(job.text):
        yield Fault.WRONG, f"cut off, it gave {job.text!r}, undisturbed {expected.text!r}"


def _may_end_so(status: Status, style: Style) -> bool:
    return (status, style) in ((Status.CANCELLED, Style.CANCELLED), (Status.EXPIRED, Style.EXPIRED))


@dataclass(slots=True)
class Ledger:
    """Every submission and what became of it; shared by threads."""

    accepted: dict[str, str] = field(default_factory=dict)
    """Idempotency-Key → job id"""
    ended: dict[str, Status] = field(default_factory=dict)
    styles: Counter[Style] = field(default_factory=Counter)
    resumed: int = 0
    """Jobs that more than one attempt worked on."""
    findings: list[Finding] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def accept(self, key: str, job_id: str, style: Style) -> None:
        """Note that the API accepted a job."""
        with self._lock:
            self.accepted[key] = job_id
            self.styles[style] += 1

    def end(self, job: RemoteJob, log: Sequence[Event], findings: Iterable[Finding]) -> None:
        """Note a job's end."""
        with self._lock:
            self.ended[job.id] = job.status
            self.resumed += any(event.kind is EventKind.RESUMED for event in log)
            self.findings += findings

    def find(self, finding: Finding) -> None:
        """Note a broken promise."""
        with self._lock:
            self.findings.append(finding)

    def count(self, fault: Fault) -> int:
        """Jobs with a fault."""
        return len({finding.job_id for finding in self.findings if finding.fault is fault})
