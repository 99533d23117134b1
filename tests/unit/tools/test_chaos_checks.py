"""The checks of a chaos run find every kind of broken guarantee."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from scripts.client.api import RemoteJob
from shared.jobs.log import Event, EventKind
from shared.jobs.record import Status
from shared.redis import keys
from tests.chaos import leaks
from tests.chaos.checks import MAX_DELAY_S, Outcomes, Violation, check_delay, check_job
from tests.chaos.report import summary
from tests.chaos.workload import Behaviour, Reference

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


def log_of(*texts: str, kinds: str = "qs") -> list[Event]:
    names = {"q": EventKind.QUEUED, "s": EventKind.STARTED, "r": EventKind.RESUMED}
    events = [Event(0, names[kind], "{}") for kind in kinds]
    events += [Event(0, EventKind.CHUNK, json.dumps({"text": text})) for text in texts]
    return numbered([*events, Event(0, EventKind.DONE, "{}")])


def numbered(events: list[Event]) -> list[Event]:
    return [event._replace(n=i) for i, event in enumerate(events, start=1)]


LOG = log_of("Once upon", " a time")


def stream_of(log: list[Event], job: RemoteJob = JOB) -> list[Event]:
    """A log as a client receives it: the last event contains the job."""
    final = json.dumps({**asdict(job), "output": {"text": job.text, "finish_reason": job.finish_reason}})
    return [event._replace(data=final) if event.kind is EventKind.DONE else event for event in log]


def violations(
    job: RemoteJob = JOB,
    log: list[Event] = LOG,
    streamed: list[Event] | None = None,
    behaviour: Behaviour = Behaviour.STREAMS,
) -> set[Violation]:
    events = (stream_of(log, job) if behaviour.reads_to_end else []) if streamed is None else streamed
    return {finding.violation for finding in check_job(job, log, events, behaviour, EXPECTED)}


def test_a_correct_job_has_no_findings() -> None:
    assert not violations()
    assert not violations(streamed=[], behaviour=Behaviour.POLLS)
    assert not violations(log=log_of("Once", " upon a time", kinds="qsqr"))


@pytest.mark.parametrize(
    ("text", "finish_reason", "prompt", "completion"),
    [
        ("Once upon a tide", "stop", 7, 5),
        (EXPECTED.text, "length", 7, 5),
        (EXPECTED.text, "stop", 8, 5),
        (EXPECTED.text, "stop", 7, 6),
    ],
)
def test_a_different_text_end_or_token_count_is_wrong(
    text: str, finish_reason: str, prompt: int, completion: int
) -> None:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    job = replace(JOB, text=text, finish_reason=finish_reason, usage=usage)
    assert violations(job, log_of(text)) == {Violation.WRONG}


def test_a_log_that_differs_from_the_job_is_wrong() -> None:
    assert violations(log=log_of("Once upon")) == {Violation.WRONG}


def test_a_gap_in_the_log_or_in_the_stream_is_wrong() -> None:
    gap = [event for event in LOG if event.n != 2]
    assert violations(log=gap) == {Violation.WRONG}
    streamed = stream_of(LOG)
    assert violations(streamed=[event for event in streamed if event.n != 2]) == {Violation.WRONG}
    assert violations(streamed=[*streamed[1:3], streamed[0], *streamed[3:]]) == {Violation.WRONG}


@pytest.mark.parametrize("behaviour", [Behaviour.STREAMS, Behaviour.RECONNECTS, Behaviour.CANCELS])
def test_a_stream_that_differs_from_the_log_is_wrong(behaviour: Behaviour) -> None:
    streamed = stream_of(LOG)
    other = [event._replace(data='{"text":"Twice upon"}') if event.n == 3 else event for event in streamed]
    assert violations(streamed=other, behaviour=behaviour) == {Violation.WRONG}
    assert violations(
        streamed=[streamed[0], streamed[1]._replace(kind=EventKind.RESUMED), *streamed[2:]], behaviour=behaviour
    ) == {Violation.WRONG}
    assert violations(streamed=stream_of(LOG, replace(JOB, text="Once")), behaviour=behaviour) == {Violation.WRONG}
    assert violations(streamed=[*streamed[:-1], streamed[-1]._replace(data="{}")], behaviour=behaviour) == {
        Violation.WRONG
    }


def test_a_stream_with_more_events_than_the_log_is_wrong() -> None:
    short = log_of(EXPECTED.text)
    assert violations(log=short, streamed=stream_of(log_of(EXPECTED.text, "", ""))) == {Violation.WRONG}


def test_only_a_client_that_cancels_may_miss_the_end() -> None:
    for part in (LOG[:3], []):
        assert (
            violations(streamed=part) == violations(streamed=part, behaviour=Behaviour.RECONNECTS) == {Violation.WRONG}
        )
        assert not violations(streamed=part, behaviour=Behaviour.CANCELS)


def test_a_late_end_is_wrong() -> None:
    assert not check_delay("job_1", 100 + MAX_DELAY_S, 100, "its deadline")
    assert [finding.violation for finding in check_delay("job_1", 101 + MAX_DELAY_S, 100, "its deadline")] == [
        Violation.WRONG
    ]


def test_a_repeated_event_is_duplicated() -> None:
    assert Violation.DUPLICATED in violations(streamed=[*LOG[:3], *LOG[2:]])
    assert Violation.DUPLICATED in violations(log=log_of("Once upon", " a time", kinds="qsqs"))
    assert Violation.DUPLICATED in violations(log=numbered([*LOG, LOG[-1]]))


def test_a_log_without_its_end_is_wrong() -> None:
    assert violations(log=LOG[:-1]) == {Violation.WRONG}


@pytest.mark.parametrize(
    ("status", "behaviour"), [(Status.CANCELLED, Behaviour.CANCELS), (Status.EXPIRED, Behaviour.SHORT_DEADLINE)]
)
def test_a_stopped_job_may_have_the_beginning_of_its_text(status: Status, behaviour: Behaviour) -> None:
    stopped = replace(JOB, status=status, text="Once", finish_reason=None, usage={})
    assert not violations(stopped, log_of("Once"), behaviour=behaviour)
    assert violations(replace(stopped, text="Twice"), log_of("Twice"), behaviour=behaviour) == {Violation.WRONG}
    assert violations(stopped, log_of("Once"), behaviour=Behaviour.POLLS) == {Violation.WRONG}


def test_a_failed_job_is_wrong() -> None:
    failed = replace(JOB, status=Status.FAILED, text="Once", error={"code": "worker_lost"})
    assert violations(failed, log_of("Once")) == {Violation.WRONG}


def test_jobs_are_counted_not_findings() -> None:
    outcomes = Outcomes()
    outcomes.add_ended(
        JOB, LOG, check_job(replace(JOB, text="a", finish_reason="length"), LOG, [], Behaviour.POLLS, EXPECTED)
    )
    assert (outcomes.count(Violation.WRONG), outcomes.count(Violation.LOST)) == (1, 0)
    assert len(outcomes.findings) > 1


def test_a_summary_has_nearest_ranks() -> None:
    assert summary([]) == {"count": 0}
    assert summary([float(n) for n in range(100, 0, -1)]) == {"count": 100, "p50": 50, "p95": 95, "max": 100}


def test_every_kind_of_key_has_a_rule() -> None:
    channels = {keys.LIVE, keys.DONE}
    kinds = {value for name, value in vars(keys).items() if name.isupper() and value.startswith("mlxq:")}
    assert kinds - channels == {
        key for key in (*leaks.UNFINISHED, *leaks.ENDED_JOBS, *leaks.PERMANENT) if key.startswith("mlxq:")
    }
