"""Listing and polling read little from Redis, whatever the jobs hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from shared.queue.redis import Redis
from tests.bench.api_cost import MODEL, Site, site

KB = 1000


@dataclass
class Traffic:
    """Filled when the block ends.

    Attributes:
        bytes_read: bytes that the server sent.
        commands: calls that it answered, those of pipelines one by one.
    """

    bytes_read: int = 0
    commands: int = 0


@contextmanager
def counted(client: Redis) -> Iterator[Traffic]:
    """Count what the server sends during the block, to anybody; there must be no others."""
    traffic = Traffic()
    first, before = _sent(client), _sent(client)
    question = before[0] - first[0]
    yield traffic
    after = _sent(client)
    traffic.bytes_read = after[0] - before[0] - question
    traffic.commands = after[1] - before[1] - 1


def _sent(client: Redis) -> tuple[int, int]:
    stats = client.info("stats")
    return int(stats["total_net_output_bytes"]), int(stats["total_commands_processed"])


@pytest.fixture(scope="module")
def place() -> Iterator[Site]:
    with site() as found:
        yield found


def read(place: Site, path: str) -> Traffic:
    place.api.get(path)  # scripts are loaded and the cluster's state is known
    with counted(place.redis) as traffic:
        answer = place.api.get(path)
    assert answer.status_code == 200, answer.text[:500]
    return traffic


def test_a_list_of_a_hundred_jobs_reads_no_prompts(place: Site) -> None:
    before = read(place, "/v1/jobs?limit=100").bytes_read
    for _ in range(100):
        place.submit(MODEL, "x" * 100 * KB)
    traffic = read(place, "/v1/jobs?limit=100")
    assert traffic.bytes_read - before < 100 * KB, "a kilobyte for each"
    listed = place.api.get("/v1/jobs?limit=100").get_json()
    assert len(listed["data"]) == 100


def test_a_job_with_a_long_prompt_is_polled_without_it(place: Site) -> None:
    job = place.submit(MODEL, "x" * 1000 * KB)
    assert read(place, f"/v1/jobs/{job}").bytes_read < 4 * KB


@pytest.mark.parametrize("events", [80, 8000])
def test_polling_a_running_job_reads_its_text_and_not_its_events(place: Site, events: int) -> None:
    job = place.run(events)
    text = place.api.get(f"/v1/jobs/{job}").get_json()["output"]["text"]
    assert text == " word" * events
    assert read(place, f"/v1/jobs/{job}").bytes_read < len(text) + 4 * KB


def test_polling_takes_as_many_calls_however_long_the_job_has_run(place: Site) -> None:
    calls = {read(place, f"/v1/jobs/{place.run(events)}").commands for events in (81, 801, 8001)}
    assert len(calls) == 1


def test_a_long_poll_reads_nothing_while_it_waits(place: Site) -> None:
    job = place.run(82)
    plain = read(place, f"/v1/jobs/{job}").bytes_read
    assert read(place, f"/v1/jobs/{job}?wait=0.3").bytes_read < 2 * plain + 4 * KB
