"""Streams of several choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from unittest.mock import MagicMock, Mock

import pytest
from flask import Flask

from shared.jobs.log import Event, EventKind
from shared.jobs.record import Job, Status
from tests.plugins.work import claimed
from web.openai.answers import ChatAnswer
from web.openai.requests import ChatRequest
from web.openai.streams import AnswerStream
from web.streaming.merge import Feed

DONE = Event(9, EventKind.DONE, "")


def job(status: Status) -> Job:
    return replace(claimed().job, status=status, finish_reason="stop")


def feed(indexes: Iterable[int]) -> Feed:
    for index in indexes:
        yield index, [DONE]


def streamed(jobs: Sequence[Job], on_disconnect: Mock) -> str:
    """Stream choices that end one after the other."""
    fields = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": len(jobs)}
    answer = ChatAnswer(ChatRequest.model_validate(fields), jobs[0], Mock(), Mock())
    stream = AnswerStream(jobs, answer, feed(range(len(jobs))), lambda job: job, "messages", on_disconnect)
    with Flask("test").app_context():
        return stream.response(MagicMock()).get_data(as_text=True)


@pytest.mark.parametrize(
    ("states", "is_abandoned"),
    [
        ([Status.SUCCEEDED, Status.SUCCEEDED], False),
        ([Status.SUCCEEDED, Status.FAILED], False),
        ([Status.FAILED, Status.SUCCEEDED], True),
    ],
)
def test_choices_that_nobody_reads_are_abandoned(states: list[Status], is_abandoned: bool) -> None:
    on_disconnect = Mock()
    text = streamed([job(state) for state in states], on_disconnect)
    assert text.endswith("data: [DONE]\n\n")
    assert ('"error"' in text) == (Status.FAILED in states)
    assert on_disconnect.call_count == int(is_abandoned)
