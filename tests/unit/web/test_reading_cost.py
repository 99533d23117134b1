"""Listing and polling read little from Redis, however large the jobs are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from shared.redis.client import Redis
from tests.bench.api_cost import MODEL, Site, site

KB = 1000


@dataclass
class Traffic:
    """What a block read from Redis; complete when the block has ended.

    Attributes:
        bytes_read: bytes that the server sent.
        commands: commands that it processed, including each command of a pipeline.
    """

    bytes_read: int = 0
    commands: int = 0


@contextmanager
def count_traffic(client: Redis) -> Iterator[Traffic]:
    """Count the traffic of the server during the block. There must be no other clients."""
    traffic = Traffic()
    first, before = _sent(client), _sent(client)
    reply_to_info = before[0] - first[0]
    yield traffic
    after = _sent(client)
    traffic.bytes_read = after[0] - before[0] - reply_to_info
    traffic.commands = after[1] - before[1] - 1


def _sent(client: Redis) -> tuple[int, int]:
    stats = client.info("stats")
    return int(stats["total_net_output_bytes"]), int(stats["total_commands_processed"])


@pytest.fixture(scope="module")
def api_site() -> Iterator[Site]:
    with site() as running:
        yield running


def read(api_site: Site, path: str) -> Traffic:
    api_site.api.get(path)  # loads scripts and the cluster's state
    with count_traffic(api_site.redis) as traffic:
        response = api_site.api.get(path)
    assert response.status_code == 200, response.text[:500]
    return traffic


def test_listing_a_hundred_jobs_reads_no_prompts(api_site: Site) -> None:
    before = read(api_site, "/v1/jobs?limit=100").bytes_read
    for _ in range(100):
        api_site.submit(MODEL, "x" * 100 * KB)
    traffic = read(api_site, "/v1/jobs?limit=100")
    assert traffic.bytes_read - before < 100 * KB, "at most one kB per job"
    listed = api_site.api.get("/v1/jobs?limit=100").get_json()
    assert len(listed["data"]) == 100


def test_polling_a_job_does_not_read_its_prompt(api_site: Site) -> None:
    job = api_site.submit(MODEL, "x" * 1000 * KB)
    assert read(api_site, f"/v1/jobs/{job}").bytes_read < 4 * KB


@pytest.mark.parametrize("events", [80, 8000])
def test_polling_a_running_job_reads_its_text_but_not_its_events(api_site: Site, events: int) -> None:
    job = api_site.run(events)
    text = api_site.api.get(f"/v1/jobs/{job}").get_json()["output"]["text"]
    assert text == " word" * events
    assert read(api_site, f"/v1/jobs/{job}").bytes_read < len(text) + 4 * KB


def test_polling_takes_a_constant_number_of_commands(api_site: Site) -> None:
    commands = {read(api_site, f"/v1/jobs/{api_site.run(events)}").commands for events in (81, 801, 8001)}
    assert len(commands) == 1


def test_a_long_poll_reads_nothing_while_it_waits(api_site: Site) -> None:
    job = api_site.run(82)
    plain = read(api_site, f"/v1/jobs/{job}").bytes_read
    assert read(api_site, f"/v1/jobs/{job}?wait=0.3").bytes_read < 2 * plain + 4 * KB
