"""Clients that wait: streams that are closed before their end, and the errors of failed jobs."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import pytest

from shared.errors import Expiry, JobFailure
from shared.jobs.log import Event, EventKind
from shared.jobs.record import Status
from tests.plugins.work import claimed
from web.results.failures import job_failure
from web.routes.waiting import ended_by_client


def events() -> Generator[list[Event]]:
    yield [Event(1, EventKind.QUEUED, "{}")]
    yield []
    yield [Event(2, EventKind.CHUNK, "{}"), Event(3, EventKind.DONE, "{}")]


@pytest.mark.parametrize(("read", "calls"), [(1, 1), (2, 1), (3, 0)])
def test_closing_a_stream_before_its_end_counts_as_a_disconnect(read: int, calls: int) -> None:
    calls_made: list[None] = []
    stream = ended_by_client(events(), lambda: calls_made.append(None))
    for _ in range(read):
        next(stream)
    stream.close()
    assert len(calls_made) == calls


STATUSES = {
    JobFailure.CONTEXT_LENGTH: 422,
    JobFailure.TEMPLATE: 422,
    JobFailure.LOAD: 422,
    JobFailure.MODEL: 404,
    Expiry.START: 504,
    Expiry.DEADLINE: 504,
}


@pytest.mark.parametrize("code", [*JobFailure, *Expiry])
def test_the_status_of_a_job_that_did_not_succeed(code: JobFailure | Expiry) -> None:
    status = Status.EXPIRED if isinstance(code, Expiry) else Status.FAILED
    job = replace(claimed().job, status=status, error_code=code, error_message="The reason.")
    error = job_failure(job, "messages")
    assert (error.status, error.code, error.detail) == (STATUSES.get(code, 500), code, "The reason.")
    fields = {422: "messages", 404: "model"}
    assert error.field == ("model" if code == JobFailure.LOAD else fields.get(error.status))
    assert error.retry_after is None
