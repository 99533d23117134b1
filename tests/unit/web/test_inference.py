"""A stream of `/inference`: who stops reading before the end is gone, who has read the end is not."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from shared.jobs.log import Event, EventKind
from web.routes.inference import _watched


def events() -> Generator[list[Event]]:
    yield [Event(1, EventKind.QUEUED, "{}")]
    yield []
    yield [Event(2, EventKind.CHUNK, "{}"), Event(3, EventKind.DONE, "{}")]


@pytest.mark.parametrize(("read", "calls"), [(1, 1), (2, 1), (3, 0)])
def test_a_stream_closed_before_its_end_has_lost_its_client(read: int, calls: int) -> None:
    called: list[None] = []
    stream = _watched(events(), {}, lambda: called.append(None))
    for _ in range(read):
        next(stream)
    stream.close()
    assert len(called) == calls
