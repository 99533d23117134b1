"""Searching jobs of several API keys, and running stored requests again."""

from __future__ import annotations

import pytest

from shared.errors import Conflict, Gone
from shared.jobs.images import ImageStore
from shared.jobs.record import Ending, Priority, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.search import JobFilter, JobSearch
from shared.jobs.store import Jobs, Submission
from shared.jobs.stored_requests import StoredRequests
from shared.queue.claims import Claims
from shared.queue.recovery import Reaper
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from tests.support.queueing import end, lease, run, started, submission, submit

OWNERS = ("a", "b", "c")
ALL = JobFilter()
FAILURE = Ending(Status.FAILED, error_code="generation_error", error_message="It failed.")


@pytest.fixture
def client() -> Redis:
    return FakeRedis()


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return Jobs(client, Settings(max_queue=50, max_queue_per_key=50, durable=False))


@pytest.fixture
def worker(client: Redis) -> Claims:
    return lease(client, "w1")


def found(client: Redis, wanted: JobFilter = ALL, owners: tuple[str, ...] = OWNERS, limit: int = 2) -> list[str]:
    """The ids on all pages."""
    search, before, ids = JobSearch(client), None, list[str]()
    while True:
        page = search.page(owners, wanted, limit=limit, before=before)
        assert len(page.jobs) <= limit
        ids += [job.id for job in page.jobs]
        before = page.next
        if before is None:
            return ids


def test_pages_of_all_keys_are_newest_first_and_complete(client: Redis, jobs: Jobs) -> None:
    ids = [submit(jobs, OWNERS[n % 3]).id for n in range(11)]
    assert found(client) == ids[::-1]
    assert found(client, owners=("b",)) == ids[1::3][::-1]
    jobs.stop(ids[4], None)
    jobs.forget(ids[4], None)
    client.delete(keys.JOB + ids[7])
    assert found(client) == [each for each in ids[::-1] if each not in (ids[4], ids[7])]


def test_filters_are_combined(client: Redis, jobs: Jobs, worker: Claims) -> None:
    plain = submit(jobs)
    tagged = submit(jobs, metadata={"team": "x", "run": "1"})
    batch = submit(jobs, "b", metadata={"team": "x"}, priority=Priority.BATCH)
    assert found(client, JobFilter(metadata={"team": "x"})) == [batch.id, tagged.id]
    assert found(client, JobFilter(metadata={"team": "x"}, priority=Priority.NORMAL)) == [tagged.id]
    assert found(client, JobFilter(model="other")) == []
    assert found(client, JobFilter(after=tagged.created_at)) == [batch.id, tagged.id]
    claimed = started(worker)
    assert found(client, JobFilter(status=Status.RUNNING)) == [claimed.job.id]
    assert found(client, JobFilter(status=Status.QUEUED)) == [batch.id, tagged.id]
    end(worker, claimed)
    assert found(client, JobFilter(status=Status.SUCCEEDED)) == [plain.id]
    assert found(client, JobFilter(status=Status.QUEUED), owners=("a",)) == [tagged.id]


def test_failed_jobs_are_found_by_their_stored_requests(client: Redis, jobs: Jobs, worker: Claims) -> None:
    submit(jobs)
    failed = submit(jobs, "b")
    run(worker)
    end(worker, started(worker), FAILURE)
    assert found(client, JobFilter(status=Status.FAILED)) == [failed.id]


def test_one_page_looks_at_a_bounded_number_of_jobs(client: Redis, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.jobs.search.MAX_LOOKED_AT", 4)
    monkeypatch.setattr("shared.jobs.search._CHUNK", 2)
    first = submit(jobs, metadata={"team": "x"})
    for _ in range(9):
        submit(jobs)
    wanted = JobFilter(metadata={"team": "x"})
    page = JobSearch(client).page(OWNERS, wanted, limit=5)
    assert page.jobs == [] and page.next is not None
    assert found(client, wanted) == [first.id]
    assert found(client, JobFilter(status=Status.QUEUED, metadata={"team": "x"})) == [first.id]


def test_a_failed_job_runs_again_with_its_images(client: Redis, jobs: Jobs, worker: Claims) -> None:
    images = ImageStore(client)
    stored = StoredRequests(client, images)
    messages = ({"role": "user", "content": [{"type": "image", "image": "d1", "width": 2, "height": 2}]},)
    request = Request("m", 5, Sampling(0.5, seed=9), messages=messages)
    images.put("job_1", {"d1": b"file"})
    job = jobs.create(
        Submission(request, "a", metadata={"x": "y"}, tokens=(1, 2), images=1, image_bytes=4), "job_1"
    ).job
    with pytest.raises(Conflict):
        stored.repeat(job, "")
    end(worker, started(worker), FAILURE)
    again, job_id = stored.repeat(jobs.get("job_1", "a"), "request")
    assert jobs.create(again, job_id).new
    assert (again.request, again.tokens, again.metadata, again.owner) == (request, (1, 2), {"x": "y"}, "a")
    assert images.get(job_id, ["d1"]) == images.get("job_1", ["d1"]) == {"d1": "file"}


@pytest.mark.parametrize(("kept", "is_stored"), [("failed", False), ("all", True)])
def test_keep_requests_decides_about_jobs_that_succeeded(
    client: Redis, jobs: Jobs, worker: Claims, kept: str, *, is_stored: bool
) -> None:
    Reaper(client, 3, 2**20, kept).reap()
    job = jobs.create(submission(prompt="what was asked")).job
    run(worker)
    stored = StoredRequests(client, ImageStore(client))
    if is_stored:
        assert stored.get(job).request.prompt == "what was asked"
    else:
        with pytest.raises(Gone):
            stored.get(job)
