"""The two ways to write a stream."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from shared.errors import NotAcceptable
from shared.jobs.log import Event, EventKind
from web.streaming.formats import EventStream, Format, JsonLines, negotiate


@given(st.text(), st.integers(1, 10**9))
def test_any_text_stays_on_one_line(text: str, n: int) -> None:
    data = json.dumps({"text": text}, ensure_ascii=False)
    event = Event(n, EventKind.CHUNK, data)
    written = EventStream().events([event]).decode()
    lines = written.split("\n")
    assert lines == [f"id: {n}", "event: chunk", f"data: {data}", "", ""]
    assert "\r" not in written
    line = JsonLines().events([event])
    assert json.loads(line) == {"id": n, "event": "chunk", "data": {"text": text}}
    assert line.count(b"\n") == 1


@pytest.mark.parametrize("form", [EventStream(), JsonLines()])
def test_events_written_together_are_those_written_one_by_one(form: Format) -> None:
    events = [Event(n, EventKind.CHUNK, f'{{"text":"word {n}"}}') for n in range(1, 5)]
    assert form.events(events) == b"".join(form.events([event]) for event in events)


def test_what_is_no_event_is_a_comment_or_json() -> None:
    assert EventStream.opening == b"retry: 1000\n\n"
    assert EventStream.heartbeat.startswith(b":")
    for line in (JsonLines.heartbeat, JsonLines().farewell("/v1/jobs/j/stream")):
        assert "event" in json.loads(line)


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", "text/event-stream"),
        ("*/*", "text/event-stream"),
        ("text/*", "text/event-stream"),
        ("application/x-ndjson", "application/x-ndjson"),
        ("text/event-stream;q=0.5, application/x-ndjson", "application/x-ndjson"),
    ],
)
def test_the_accept_header_decides(accept: str, media_type: str) -> None:
    assert negotiate(parse_accept_header(accept or None, MIMEAccept)).media_type == media_type


def test_nothing_else_is_on_offer() -> None:
    with pytest.raises(NotAcceptable):
        negotiate(parse_accept_header("text/html", MIMEAccept))
