"""Wire formats of streams."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from shared.errors import NotAcceptable
from shared.jobs.log import Event, EventKind
from web.http.stream_formats import EventStream, Format, JsonLines, negotiate


@given(st.text(), st.integers(1, 10**9))
def test_an_event_with_any_text_is_one_line_of_data(text: str, n: int) -> None:
    data = json.dumps({"text": text}, ensure_ascii=False)
    event = Event(n, EventKind.CHUNK, data)
    encoded = EventStream().events([event]).decode()
    lines = encoded.split("\n")
    assert lines == [f"id: {n}", "event: chunk", f"data: {data}", "", ""]
    assert "\r" not in encoded
    line = JsonLines().events([event])
    assert json.loads(line) == {"id": n, "event": "chunk", "data": {"text": text}}
    assert line.count(b"\n") == 1


@pytest.mark.parametrize("form", [EventStream(), JsonLines()])
def test_encoding_events_together_or_one_by_one_is_the_same(form: Format) -> None:
    events = [Event(n, EventKind.CHUNK, f'{{"text":"word {n}"}}') for n in range(1, 5)]
    assert form.events(events) == b"".join(form.events([event]) for event in events)


def test_heartbeats_and_hints_are_comments_or_json() -> None:
    assert EventStream.opening == b"retry: 1000\n\n"
    assert EventStream.heartbeat.startswith(b":")
    for line in (JsonLines.heartbeat, JsonLines().reconnect_hint("/v1/jobs/j/stream")):
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
def test_the_accept_header_selects_the_format(accept: str, media_type: str) -> None:
    assert negotiate(parse_accept_header(accept or None, MIMEAccept)).media_type == media_type


def test_other_media_types_are_refused() -> None:
    with pytest.raises(NotAcceptable):
        negotiate(parse_accept_header("text/html", MIMEAccept))
