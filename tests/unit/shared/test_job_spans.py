"""The spans of jobs whose attempts ended in different ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from shared.jobs.record import Attempt, AttemptEnd, EndedJob, Ending, Job, Status
from shared.jobs.request import EMBED, Request, Sampling
from shared.queue.claims import ClaimedJob
from shared.queue.job_spans import JobSpans, Stages
from shared.tracing import Tracer, span_id
from tests.support.collector import Collector, ReceivedSpan

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
RECORD = {
    "id": "job_1", "owner": "o", "model": "m", "status": "queued", "attempt": "1", "class": "1", "metadata": "{}",
    "request_id": "r", "seq": "1", "created_at": "100.0", "traceparent": f"00-{TRACE}-{CALLER}-01",
}  # fmt: skip
JOB = Job.from_record(RECORD)
REQUEST = Request("m", 9, Sampling(0.5), messages=({"role": "user", "content": "hi"},))
LOST, HANDED_BACK = AttemptEnd.WORKER_LOST, AttemptEnd.HANDED_BACK


class Sent:
    """Sends spans, and returns those that arrived."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._tracer = Tracer(collector.url, "", "test", "here")
        self.spans = JobSpans(self._tracer, "w@here")

    def received(self) -> list[ReceivedSpan]:
        self._tracer.close()
        return self._collector.trace(TRACE)


@pytest.fixture
def sent() -> Iterator[Sent]:
    with Collector() as collector:
        yield Sent(collector)


def claimed(job: Job) -> ClaimedJob:
    return ClaimedJob(job, REQUEST, None, 0, 0.0, 0.0)


def attempts(*ends: AttemptEnd) -> tuple[Attempt, ...]:
    """Attempts of two seconds, one second apart, from second 101 on by Redis's clock."""
    return tuple(Attempt(n, f"w{n}@x/1", 98 + 3.0 * n, 100 + 3.0 * n, how) for n, how in enumerate(ends, 1))


def names(spans: list[ReceivedSpan]) -> list[tuple[str, int]]:
    return [(span.name, span.attributes["mlxq.attempt"]) for span in spans]


def test_only_attempts_right_before_this_one_are_sent_again(sent: Sent) -> None:
    job = replace(JOB, attempt=5, history=attempts(LOST, HANDED_BACK, LOST, LOST))
    ending = Ending(Status.SUCCEEDED, finish_reason="stop", prompt_tokens=3, completion_tokens=2)
    # This process's clock is 1000 s ahead of Redis's.
    sent.spans.attempt_ended(claimed(job), Stages(1100.0, 1116.0, 1113.0, 1114.0, 1114.5), ending)
    found = sent.received()
    assert names(found) == [
        ("queue", 3), ("chat m", 3), ("queue", 4), ("chat m", 4), ("queue", 5), ("chat m", 5),
        ("prefill", 5), ("decode", 5),
    ]  # fmt: skip
    assert [(span.start, span.end) for span in found[:3]] == [(1106, 1107), (1107, 1109), (1109, 1110)]
    last = found[5]
    assert last.links == tuple(f"{span_id('job_1', n, 'attempt'):016x}" for n in (1, 2, 3, 4))
    assert {span.parent for span in found[:6]} == {CALLER} and {span.parent for span in found[6:]} == {last.id}
    assert last.attributes["mlxq.worker"] == "w@here" and found[1].attributes["mlxq.worker"] == "w3@x"


@pytest.mark.parametrize(
    ("request_", "operation"),
    [
        (REQUEST, "chat"),
        (replace(REQUEST, messages=None, prompt="hi"), "text_completion"),
        (replace(REQUEST, messages=None, kind=EMBED, inputs=("hi",), dimensions=64), "embeddings"),
    ],
)
def test_operations_and_attributes_have_the_names_of_opentelemetry(
    sent: Sent, request_: Request, operation: str
) -> None:
    ending = Ending(Status.SUCCEEDED, "stop", prompt_tokens=3, completion_tokens=2, reasoning_tokens=1)
    job = replace(claimed(JOB), request=request_)
    sent.spans.attempt_ended(job, Stages(100.0, 104.0, 101.0, 102.0, 103.0), ending)
    [attempt] = [span for span in sent.received() if span.name == f"{operation} m"]
    assert attempt.attributes["gen_ai.operation.name"] == operation
    assert operation in {each.value for each in gen_ai_attributes.GenAiOperationNameValues}
    known = {value for value in vars(gen_ai_attributes).values() if isinstance(value, str)}
    assert {name for name in attempt.attributes if name.startswith("gen_ai.")} <= known
    assert attempt.attributes["gen_ai.response.time_to_first_chunk"] == 3.0


def test_an_attempt_that_is_handed_back_is_no_error(sent: Sent) -> None:
    sent.spans.attempt_ended(claimed(JOB), Stages(100.0, 103.0, 101.0), None)
    found = sent.received()
    assert sorted(names(found)) == [("chat m", 1), ("prefill", 1), ("queue", 1)]
    [attempt] = [span for span in found if span.name == "chat m"]
    assert attempt.attributes["mlxq.attempt.outcome"] == "handed_back" and not attempt.failed


def test_a_job_that_crashed_its_workers_has_all_its_attempts(sent: Sent) -> None:
    job = replace(JOB, status=Status.FAILED, attempt=2, finished_at=106.0, history=attempts(LOST, LOST))
    sent.spans.ended_without_worker(job, EndedJob("job_1", "m", Status.FAILED, "worker_lost", "it crashed"))
    found = sent.received()
    assert [span.attributes["mlxq.attempt"] for span in found] == [1, 1, 2, 2]
    assert [span.failed for span in found] == [False, True, False, True]
    assert "it crashed" not in json.dumps([span.attributes for span in found])


def test_a_job_that_expires_in_the_queue_failed_there(sent: Sent) -> None:
    job = replace(JOB, status=Status.EXPIRED, attempt=0, finished_at=160.0)
    sent.spans.ended_without_worker(job, EndedJob("job_1", "m", Status.EXPIRED, "start_timeout", "too late"))
    [queue] = sent.received()
    assert (queue.name, queue.end - queue.start, queue.failed) == ("queue", 60.0, True)


@pytest.mark.parametrize("traceparent", ["", "nonsense"])
def test_jobs_without_a_trace_have_no_spans(sent: Sent, traceparent: str) -> None:
    job = replace(JOB, traceparent=traceparent, finished_at=101.0)
    sent.spans.attempt_ended(claimed(job), Stages(100.0, 103.0), None)
    sent.spans.ended_without_worker(job, EndedJob("job_1", "m", Status.CANCELLED))
    assert sent.received() == []


def test_spans_of_a_trace_that_is_not_sampled_are_not_sent(sent: Sent) -> None:
    job = replace(JOB, traceparent=JOB.traceparent[:-1] + "0")
    sent.spans.attempt_ended(claimed(job), Stages(100.0, 103.0, 101.0), None)
    assert sent.received() == []


def test_the_log_tells_once_that_the_collector_takes_no_spans(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with Collector() as collector:
        tracer = Tracer(collector.url, "", "test", "here")
        for collector.status in (400, 400, 200, 200):
            tracer.start("span", None).end()
            tracer._provider.force_flush()
        tracer.close()
    messages = [record.message for record in caplog.records if record.name != "urllib3.connectionpool"]
    assert messages == ["traces_dropped", "traces_sent"] and len(collector.spans) == 2
