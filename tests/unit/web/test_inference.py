"""A stream of `/inference` that is closed before its end means that the client has disconnected."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from shared.jobs.log import Event, EventKind
from web.routes.inference import _ended_by_client


def events() -> Generator[list[Event]]:
    yield [Event(1, EventKind.QUEUED, "{}")]
    yield []
    yield [Event(2, EventKind.CHUNK, "{}"), Event(3, EventKind.DONE, "{}")]


@pytest.mark.parametrize(("read", "calls"), [(1, 1), (2, 1), (3, 0)])
def test_closing_a_stream_before_its_end_counts_as_a_disconnect(read: int, calls: int) -> None:
    calls_made: list[None] = []
    stream = _ended_by_client(events(), lambda: calls_made.append(None))
    for _ in range(read):
        next(stream)
    stream.close()
    assert len(calls_made) == calls
