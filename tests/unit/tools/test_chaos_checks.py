"""The judge of a chaos run finds every way in which a promise can be broken."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from scripts.client.api import RemoteJob
from shared.jobs.log import Event, EventKind
from shared.jobs.record import Status
from tests.chaos.checks import LATE_S, Fault, Ledger, judge, overdue
from tests.chaos.report import summary
from tests.chaos.workload import Reference, Style

EXPECTED = Reference("Once upon a time", "stop", 7, 5)
JOB = RemoteJob(
    "job_1",
    Status.SUCCEEDED,
    EXPECTED.text,
    "stop",
    {"prompt_tokens": 7, "completion_tokens": 5, "cached_tokens": 3},
    {},
    None,
)


def told(*texts: str, kinds: str = "qs") -> list[Event]:
    names = {"q": EventKind.QUEUED, "s": EventKind.STARTED, "r": EventKind.RESUMED}
    events = [Event(0, names[kind], "{}") for kind in kinds]
    events += [Event(0, EventKind.CHUNK, json.dumps({"text": text})) for text in texts]
    return numbered([*events, Event(0, EventKind.DONE, "{}")])


def numbered(events: list[Event]) -> list[Event]:
    return [event._replace(n=i) for i, event in enumerate(events, start=1)]


WHOLE = told("Once upon", " a time")


def heard(log: list[Event], job: RemoteJob = JOB) -> list[Event]:
    """A log as a stream tells it: the whole job at its end."""
    whole = json.dumps({**asdict(job), "output": {"text": job.text, "finish_reason": job.finish_reason}})
    return [event._replace(data=whole) if event.kind is EventKind.DONE else event for event in log]


def faults(
    job: RemoteJob = JOB,
    log: list[Event] = WHOLE,
    read: list[Event] | None = None,
    style: Style = Style.STREAMED,
) -> set[Fault]:
    seen = (heard(log, job) if style.reads_on else []) if read is None else read
    return {finding.fault for finding in judge(job, log, seen, style, EXPECTED)}


def test_a_job_as_it_should_be_has_no_findings() -> None:
    assert not faults()
    assert not faults(read=[], style=Style.POLLED)
    assert not faults(log=told("Once", " upon a time", kinds="qsqr"))


@pytest.mark.parametrize(
    ("text", "finish_reason", "prompt", "completion"),
    [
        ("Once upon a tide", "stop", 7, 5),
        (EXPECTED.text, "length", 7, 5),
        (EXPECTED.text, "stop", 8, 5),
        (EXPECTED.text, "stop", 7, 6),
    ],
)
def test_another_text_end_or_count_is_wrong(text: str, finish_reason: str, prompt: int, completion: int) -> None:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    job = replace(JOB, text=text, finish_reason=finish_reason, usage=usage)
    assert faults(job, told(text)) == {Fault.WRONG}


def test_a_log_that_tells_something_else_than_the_job_is_wrong() -> None:
    assert faults(log=told("Once upon")) == {Fault.WRONG}


def test_a_gap_in_the_log_or_in_what_was_read_is_wrong() -> None:
    gap = [event for event in WHOLE if event.n != 2]
    assert faults(log=gap) == {Fault.WRONG}
    read = heard(WHOLE)
    assert faults(read=[event for event in read if event.n != 2]) == {Fault.WRONG}
    assert faults(read=[*read[1:3], read[0], *read[3:]]) == {Fault.WRONG}


@pytest.mark.parametrize("style", [Style.STREAMED, Style.LEFT, Style.CANCELLED])
def test_a_stream_that_tells_something_else_than_the_log_is_wrong(style: Style) -> None:
    read = heard(WHOLE)
    other = [event._replace(data='{"text":"Twice upon"}') if event.n == 3 else event for event in read]
    assert faults(read=other, style=style) == {Fault.WRONG}
    assert faults(read=[read[0], read[1]._replace(kind=EventKind.RESUMED), *read[2:]], style=style) == {Fault.WRONG}
    assert faults(read=heard(WHOLE, replace(JOB, text="Once")), style=style) == {Fault.WRONG}
    assert faults(read=[*read[:-1], read[-1]._replace(data="{}")], style=style) == {Fault.WRONG}


def test_a_stream_that_has_more_than_the_log_is_wrong() -> None:
    short = told(EXPECTED.text)
    assert faults(log=short, read=heard(told(EXPECTED.text, "", ""))) == {Fault.WRONG}


def test_who_reads_to_the_end_gets_there_and_who_cancels_need_not() -> None:
    for part in (WHOLE[:3], []):
        assert faults(read=part) == faults(read=part, style=Style.LEFT) == {Fault.WRONG}
        assert not faults(read=part, style=Style.CANCELLED)


def test_a_deadline_or_a_cancel_that_nobody_heeds_is_wrong() -> None:
    assert not overdue("job_1", 100 + LATE_S, 100, "its deadline")
    assert [finding.fault for finding in overdue("job_1", 101 + LATE_S, 100, "its deadline")] == [Fault.WRONG]


def test_what_is_there_twice_is_duplicated() -> None:
    assert Fault.DUPLICATED in faults(read=[*WHOLE[:3], *WHOLE[2:]])
    assert Fault.DUPLICATED in faults(log=told("Once upon", " a time", kinds="qsqs"))
    assert Fault.DUPLICATED in faults(log=numbered([*WHOLE, WHOLE[-1]]))


def test_a_log_without_its_end_is_wrong() -> None:
    assert faults(log=WHOLE[:-1]) == {Fault.WRONG}


@pytest.mark.parametrize(("status", "style"), [(Status.CANCELLED, Style.CANCELLED), (Status.EXPIRED, Style.EXPIRED)])
def test_a_job_cut_off_as_it_was_asked_may_give_the_beginning_of_its_text(status: Status, style: Style) -> None:
    cut = replace(JOB, status=status, text="Once", finish_reason=None, usage={})
    assert not faults(cut, told("Once"), style=style)
    assert faults(replace(cut, text="Twice"), told("Twice"), style=style) == {Fault.WRONG}
    assert faults(cut, told("Once"), style=Style.POLLED) == {Fault.WRONG}


def test_a_failed_job_is_wrong() -> None:
    failed = replace(JOB, status=Status.FAILED, text="Once", error={"code": "worker_lost"})
    assert faults(failed, told("Once")) == {Fault.WRONG}


def test_the_ledger_counts_jobs_and_not_findings() -> None:
    ledger = Ledger()
    ledger.end(JOB, WHOLE, judge(replace(JOB, text="a", finish_reason="length"), WHOLE, [], Style.POLLED, EXPECTED))
    assert (ledger.count(Fault.WRONG), ledger.count(Fault.LOST)) == (1, 0)
    assert len(ledger.findings) > 1


def test_a_summary_has_nearest_ranks() -> None:
    assert summary([]) == {"count": 0}
    assert summary([float(n) for n in range(100, 0, -1)]) == {"count": 100, "p50": 50, "p95": 95, "max": 100}
