"""Ended jobs move from Redis to the archive, and lists show them wherever they are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from redis.client import Pipeline

from shared.errors import Gone, NotFound
from shared.jobs.images import ImageStore
from shared.jobs.record import Ending, Job, Status
from shared.jobs.search import JobFilter, JobSearch
from shared.jobs.store import Jobs
from shared.jobs.stored_requests import StoredRequests
from shared.jobs.usage import DAYS_KEPT, Counters, UsageRow, UsageStore
from shared.queue.claims import Claims
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.archive import archived
from tests.support.fake_redis import FakeRedis
from tests.support.queueing import end, lease, run, started, submission, submit
from web.archive.database import Archive, ArchiveUnavailable
from web.archive.history import History, stored_request
from web.archive.queue import ArchiveQueue
from web.archive.tables import ArchivedJob
from web.background import archiver as module
from web.background.archiver import Archiver
from web.cluster.archive_state import read_state

OWNERS = ["a", "b"]
FAILURE = Ending(Status.FAILED, error_code="generation_error", error_message="It failed.")


class Setting:
    """Everything that takes part, in one process."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.settings = Settings(data_dir=folder, durable=False, max_queue=200, **settings)  # type: ignore[arg-type]
        self.client: Redis = FakeRedis()
        self.jobs = Jobs(self.client, self.settings)
        self.usage = UsageStore(self.client)
        self.archive = Archive(folder / "archive.sqlite3")
        self.queue = ArchiveQueue(self.client, self.settings.archive_content)
        self.history = History(self.archive, self.queue, self.jobs, self.usage)
        self.worker: Claims = lease(self.client, "w")

    def archiver(self, leads: Callable[[], bool] = lambda: True) -> Archiver:
        return Archiver(self.settings, self.archive, self.queue, self.usage, lambda: OWNERS, leads)

    def ended(self, **options: object) -> Job:
        """A job that has ended."""
        job = self.jobs.create(submission(**options)).job  # type: ignore[arg-type]
        run(self.worker)
        return self.jobs.get(job.id, None)

    def expire(self, job: Job) -> None:
        """Let Redis forget a job."""
        for prefix in (keys.JOB, keys.OUTPUT, keys.LOG, keys.REQUEST):
            self.client.delete(prefix + job.id)

    def pages(self, owners: list[str], wanted: JobFilter, limit: int) -> list[str]:
        """The ids on all pages."""
        found, before = list[str](), None
        while True:
            recent = JobSearch(self.client).page(owners, wanted, limit=limit, before=before)
            page = self.history.extend(recent, owners, wanted, limit, before)
            assert len(page.jobs) <= limit
            found += [job.id for job in page.jobs]
            before = page.next
            if before is None:
                return found


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    made = Setting(tmp_path)
    yield made
    made.archive.close()


def test_a_job_is_archived_and_outlives_redis(setting: Setting) -> None:
    archiver = setting.archiver()
    archiver.round()
    job = setting.ended(prompt="what was asked", metadata={"x": "y"})
    assert setting.client.exists(keys.REQUEST + job.id), "kept for the archive"
    archiver.round()
    assert not setting.client.exists(keys.REQUEST + job.id)
    assert not setting.client.zcard(keys.UNARCHIVED)
    assert not setting.client.hexists(keys.BYTES, "unarchived")
    assert setting.history.get(job.id, "a") == (job, None)
    setting.expire(job)
    found, stored = setting.history.get(job.id, "a")
    assert found.archived and stored is not None and stored.text == ""
    assert (found.metadata, found.status, found.completion_tokens) == ({"x": "y"}, Status.SUCCEEDED, 2)
    assert stored_request(stored).prompt == "what was asked"
    with pytest.raises(NotFound):
        setting.history.get(job.id, "b")


@pytest.mark.parametrize(("content", "has_request", "has_text"), [("output", False, True), ("none", False, False)])
def test_content_can_be_left_out(tmp_path: Path, content: str, *, has_request: bool, has_text: bool) -> None:
    setting = Setting(tmp_path, archive_content=content)
    archiver = setting.archiver()
    archiver.round()
    job = setting.ended()
    assert not setting.client.exists(keys.REQUEST + job.id)
    archiver.round()
    stored = setting.archive.find(job.id)
    setting.archive.close()
    assert stored is not None
    assert (stored.request is not None, stored.text is not None) == (has_request, has_text)
    if not has_request:
        with pytest.raises(Gone):
            stored_request(stored)


def test_nothing_is_lost_if_the_leader_dies_before_redis_knows(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    archiver = setting.archiver()
    archiver.round()
    job = setting.ended()

    def die(_entries: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setting.queue, "settle", die)
        with pytest.raises(KeyboardInterrupt):
            archiver.round()
    assert setting.client.zcard(keys.UNARCHIVED) == 1
    setting.archiver().round()
    assert setting.client.zcard(keys.UNARCHIVED) == 0
    assert setting.pages(OWNERS, JobFilter(), 5) == [job.id]


def test_a_process_that_no_longer_leads_writes_nothing(setting: Setting) -> None:
    setting.archiver().round()
    job = setting.ended()
    setting.archiver(leads=lambda: False).round()
    assert setting.archive.find(job.id) is None
    assert setting.client.zcard(keys.UNARCHIVED) == 1


def test_jobs_that_are_in_no_list_are_found(setting: Setting) -> None:
    """Such as those that a worker of an earlier version ended, or that ended before there was an archive."""
    job, failed = setting.ended(), submit(setting.jobs, "b")
    end(setting.worker, started(setting.worker), FAILURE)
    line, unfinished = setting.ended(webhook="-"), submit(setting.jobs)
    assert not setting.client.zcard(keys.UNARCHIVED)
    setting.archiver().round()
    ids = [each.id for each in (job, failed, unfinished, line)]
    assert setting.archive.missing(ids) == [unfinished.id, line.id]
    assert setting.client.exists(keys.REQUEST + failed.id), "a failed job keeps its request in Redis"


def test_records_live_until_they_are_archived_even_with_a_short_retention(tmp_path: Path) -> None:
    setting = Setting(tmp_path, retention_s=5)
    archiver = setting.archiver()
    archiver.round()
    job = setting.ended()
    assert all(setting.client.ttl(prefix + job.id) == 3600 for prefix in (keys.JOB, keys.REQUEST))
    archiver.round()
    assert setting.client.ttl(keys.JOB + job.id) <= 5
    setting.archive.close()


def test_the_list_of_waiting_jobs_is_bounded(setting: Setting) -> None:
    setting.archiver().round()
    first = setting.ended()
    setting.client.hincrby(keys.BYTES, "unarchived", 2**26 - 1)
    second = setting.ended()
    waiting = [entry.partition(" ")[0] for entry in setting.queue.waiting(9)]
    assert waiting == []
    assert not setting.client.exists(keys.REQUEST + first.id, keys.REQUEST + second.id)
    setting.archiver().round()
    assert setting.archive.find(first.id) is not None, "without its request"


def test_a_deleted_job_is_erased_and_not_written_again(setting: Setting) -> None:
    archiver = setting.archiver()
    archiver.round()
    kept, deleted = setting.ended(), setting.ended()
    archiver.round()
    waiting = setting.ended()
    for job in (deleted, waiting):
        setting.jobs.forget(job.id, "a", erase=True)
    with pytest.raises(NotFound):
        setting.history.get(deleted.id, "a")
    assert setting.pages(OWNERS, JobFilter(), 5) == [kept.id], "before it is erased"
    setting.archive.write(setting.queue.read([kept.id]))
    archiver.round()
    assert [setting.archive.find(job.id) is not None for job in (kept, deleted, waiting)] == [True, False, False]
    assert setting.client.zcard(keys.ERASED) == 2, "for a process that led before and is about to write it"
    stale = ArchivedJob({**archived(0, "a").record, "id": deleted.id})
    setting.archive.write([stale])
    setting.client.zadd(keys.ERASED, {deleted.id: 1.0, waiting.id: 1.0})
    archiver.round()
    assert setting.client.zcard(keys.ERASED) == 0
    assert setting.archive.find(deleted.id) is None
    assert setting.client.zscore(keys.PREFIX_CUTOFFS, "a") == waiting.finished_at


def test_a_job_that_is_only_in_the_archive_is_erased(setting: Setting) -> None:
    archiver = setting.archiver()
    archiver.round()
    job = setting.ended()
    archiver.round()
    setting.expire(job)
    setting.history.erase([job.id], "a", job.finished_at)
    with pytest.raises(NotFound):
        setting.history.get(job.id, "a")
    archiver.round()
    assert setting.archive.find(job.id) is None


@pytest.mark.parametrize("seed", range(2))
def test_pages_cross_from_redis_to_the_archive_without_gaps_or_duplicates(setting: Setting, seed: int) -> None:
    dice = random.Random(seed)
    archiver = setting.archiver()
    archiver.round()
    expected: list[str] = []
    for number in range(40):
        owner, team = dice.choice(OWNERS), dice.choice(["x", "y"])
        if dice.random() < 0.2:
            job = submit(setting.jobs, owner, metadata={"team": team})
            claimed = started(setting.worker)
            assert claimed.job.id == job.id
            end(setting.worker, claimed, FAILURE)
        else:
            job = setting.ended(owner=owner, metadata={"team": team})
        if number % 4:
            archiver.round()
        if dice.random() < 0.5 and number % 4:
            setting.expire(job)
        expected.append(job.id)
    waiting = submit(setting.jobs, "a").id
    archiver.round()
    limit = dice.randint(1, 7)
    assert setting.pages(OWNERS, JobFilter(), limit) == [waiting, *expected[::-1]]
    for wanted in (JobFilter(status=Status.FAILED), JobFilter(metadata={"team": "x"}), JobFilter(model="other")):
        one_page = setting.pages(["a"], wanted, 100)
        assert setting.pages(["a"], wanted, limit) == one_page
        assert all(setting.history.get(each, "a") for each in one_page)


def test_an_archive_that_fails_stops_nothing_and_is_reported(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.0)
    archiver = setting.archiver()
    archiver.round()
    job = setting.ended()

    def refuse(*_: object) -> None:
        raise ArchiveUnavailable("The disk is full.", code="archive_unavailable")

    with monkeypatch.context() as patch:
        for name in ("write", "page", "find"):
            patch.setattr(setting.archive, name, refuse)
        archiver.round()
        assert read_state(setting.client).problem == "Ended jobs are not archived. The disk is full."
        recent = JobSearch(setting.client).page(OWNERS, JobFilter(), limit=5)
        page = setting.history.extend(recent, None, JobFilter(), 5, None)
        assert [each.id for each in page.jobs] == [job.id] and not page.complete
        with pytest.raises(ArchiveUnavailable):
            setting.history.get("job_unknown", None)
    archiver.round()
    state = read_state(setting.client)
    assert (state.problem, state.written, state.waiting) == ("", 1, 0)


def test_a_full_disk_is_noticed_before_it_is_full(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FREE_BYTES", 2**62)
    setting.archiver().round()
    assert "MiB left" in read_state(setting.client).problem
    assert not setting.archive.file.exists()
    old, deleted = archived(1), archived(2, created_at=2e9)
    setting.archive.write([old, deleted])
    setting.queue.erase([deleted.record["id"]], "a", 0.0)
    setting.archiver().round()
    ids = [old.record["id"], deleted.record["id"]]
    assert setting.archive.missing(ids) == ids, "erasing and deleting go on"


def test_a_full_disk_keeps_no_deleted_and_no_old_job(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.archiver().round()
    deleted, old = setting.ended(), archived(1)
    setting.archiver().round()
    setting.archive.write([old])
    setting.jobs.forget(deleted.id, "a", erase=True)
    monkeypatch.setattr(module, "FREE_BYTES", 2**62)
    setting.archiver().round()
    assert setting.archive.missing([deleted.id, old.record["id"]]) == [deleted.id, old.record["id"]]
    assert "MiB left" in read_state(setting.client).problem


def test_requests_of_jobs_that_are_not_archived_are_not_read(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """They can be large, and there can be many: lines of batches and jobs that wait."""
    ended, unfinished = setting.ended(), submit(setting.jobs)
    read, hget = list[str](), Pipeline.hget
    monkeypatch.setattr(Pipeline, "hget", lambda pipe, key, name: read.append(key) or hget(pipe, key, name))
    assert [each.record["id"] for each in setting.queue.read([ended.id, unfinished.id])] == [ended.id]
    assert read == [keys.REQUEST + ended.id]
    assert ArchiveQueue(setting.client, "output").read([ended.id])[0].text == ""
    assert len(read) == 1, "the archive stores no requests"


def test_a_record_that_cannot_be_read_does_not_keep_others_from_the_archive(setting: Setting) -> None:
    setting.archiver().round()
    damaged, sound = setting.ended(), setting.ended()
    setting.client.hset(keys.JOB + damaged.id, "class", "none")
    setting.archiver().round()
    assert setting.archive.missing([damaged.id, sound.id]) == [damaged.id]
    assert not setting.client.zcard(keys.UNARCHIVED)


def test_a_job_that_waits_for_long_is_reported(setting: Setting) -> None:
    setting.client.zadd(keys.UNARCHIVED, {"job_1 0": 1.0})
    assert "background process" in read_state(setting.client).problem


def test_old_jobs_and_those_beyond_the_size_are_deleted(tmp_path: Path) -> None:
    setting = Setting(tmp_path, archive_max_bytes=2**20)
    setting.archive.write([archived(1), archived(2, created_at=2e9)])
    setting.archiver().round()
    assert setting.archive.missing([archived(1).record["id"], archived(2).record["id"]]) == [archived(1).record["id"]]
    noise = random.Random(1)
    large = [archived(n, created_at=2e9 + n, text=noise.randbytes(3000).hex()) for n in range(3, 1303)]
    setting.archive.write(large)
    assert setting.archive.used_bytes() > 2**20
    setting.archiver().round()
    assert setting.archive.used_bytes() <= 2**20
    assert setting.archive.missing([large[0].record["id"], large[-1].record["id"]])[0] == large[0].record["id"]
    assert read_state(setting.client).bytes <= 2**20
    setting.archive.close()


def test_usage_beyond_the_retention_of_redis_comes_from_the_archive(setting: Setting) -> None:
    setting.ended()
    today = setting.usage.today()
    long_ago = today - timedelta(days=DAYS_KEPT + 5)
    setting.archive.write_usage([UsageRow(long_ago, "a", "m", Counters(7))])
    setting.archiver().round()
    rows = setting.history.usage(OWNERS, long_ago, today)
    assert [(row.day, row.counters.succeeded) for row in rows] == [(today, 1), (long_ago, 7)]
    assert setting.archive.usage(["a"], today, today) == rows[:1]


def test_without_an_archive_ended_jobs_do_not_wait_for_it(setting: Setting) -> None:
    setting.archiver().round()
    job = setting.ended(prompt="hi")
    Archiver(setting.settings, None, setting.queue, setting.usage, lambda: OWNERS, lambda: True).round()
    assert not setting.client.exists(keys.UNARCHIVED, keys.ARCHIVE, keys.REQUEST + job.id)
    setting.ended()
    assert not setting.client.exists(keys.UNARCHIVED)
    with pytest.raises(Gone):
        StoredRequests(setting.client, ImageStore(setting.client)).get(job)


def test_records_of_jobs_keep_fields_of_later_versions(setting: Setting) -> None:
    setting.archiver().round()
    job = setting.ended()
    setting.client.hset(keys.JOB + job.id, "of_a_later_version", json.dumps([1]))
    setting.archiver().round()
    stored = setting.archive.find(job.id)
    assert stored is not None and stored.record["of_a_later_version"] == "[1]"
