"""Jobs of API keys, whether they are in Redis or in the archive."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta

from shared.errors import Gone, NotFound
from shared.jobs.record import Job
from shared.jobs.request import Request
from shared.jobs.search import JobFilter, JobPage
from shared.jobs.store import Jobs
from shared.jobs.usage import DAYS_KEPT, UsageRow, UsageStore
from web.archive.database import Archive, ArchiveUnavailable
from web.archive.queue import ArchiveQueue
from web.archive.tables import ArchivedJob

USAGE_DAYS = 3660
"""Maximum days for which usage can be read at once from the archive: ten years."""


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """Jobs from both places, newest first.

    Attributes:
        next: continue with jobs created before this time; None if there are no others.
        texts: texts of the archived jobs, by id; None for those that are stored without.
        complete: False if the archive could not be read.
    """

    jobs: list[Job]
    next: float | None
    texts: dict[str, str | None] = field(default_factory=dict)
    complete: bool = True


class History:
    """Reads jobs and usage. Methods raise `redis.RedisError` if Redis is unreachable.

    Args:
        archive: None if there is no archive.
    """

    def __init__(self, archive: Archive | None, queue: ArchiveQueue, jobs: Jobs, usage: UsageStore) -> None:
        self._archive = archive
        self._queue = queue
        self._jobs = jobs
        self._usage = usage

    @property
    def has_archive(self) -> bool:
        """Whether there is an archive."""
        return self._archive is not None

    def get(self, job_id: str, owner: str | None) -> tuple[Job, ArchivedJob | None]:
        """Return an owner's job (None: that of any owner), and what the archive has of it if Redis no longer has it.

        Raises:
            NotFound: the job does not exist or belongs to another owner.
            ArchiveUnavailable: Redis does not have the job, and the archive cannot be read.
        """
        try:
            return self._jobs.get(job_id, owner), None
        except NotFound:
            archived = self.archived(job_id, owner)
            if archived is None:
                raise
            return archived.job, archived

    def archived(self, job_id: str, owner: str | None) -> ArchivedJob | None:
        """Return an owner's job from the archive; None if it is not there.

        Raises:
            ArchiveUnavailable: the archive cannot be read.
        """
        found = None if self._archive is None or self._queue.hidden([job_id]) else self._archive.find(job_id)
        return found if found is not None and owner in (None, found.record["owner"]) else None

    def extend(
        self, recent: JobPage, owners: Sequence[str] | None, wanted: JobFilter, limit: int, before: float | None
    ) -> HistoryPage:
        """Merge a page of jobs in Redis with the same page of the archive (owners None: of all API keys).

        Both are in the order of creation, so the page ends where the first of them was not searched further.
        """
        if self._archive is None:
            return HistoryPage(recent.jobs, recent.next)
        try:
            page = self._archive.page(owners, wanted, limit, before)
        except ArchiveUnavailable:
            return HistoryPage(recent.jobs, recent.next, complete=False)
        known = {job.id for job in recent.jobs}
        deleted = self._queue.hidden([each.record["id"] for each in page.jobs])
        older = {each.record["id"]: each for each in page.jobs if each.record["id"] not in known | deleted}
        searched_to = max((end for end in (recent.next, page.next) if end is not None), default=None)
        jobs = sorted([*recent.jobs, *(each.job for each in older.values())], key=_newest_first)
        jobs = [job for job in jobs if searched_to is None or job.created_at >= searched_to]
        if len(jobs) > limit:
            jobs = jobs[:limit]
            searched_to = jobs[-1].created_at
        return HistoryPage(jobs, searched_to, {job.id: older[job.id].text for job in jobs if job.id in older})

    def erase(self, job_ids: Sequence[str], owner: str, ended_at: float | None = None) -> None:
        """Let the background process erase deleted jobs from the archive, and the workers their cached prefixes.

        From now on they are not found any more.

        Args:
            ended_at: when the last of them ended; None if that is unknown.
        """
        self._queue.erase(job_ids, owner, time.time() if ended_at is None else ended_at)

    def usage(self, key_ids: Collection[str], first: date, last: date) -> list[UsageRow]:
        """Return the usage of API keys on the days from `first` to `last`, the newest day first.

        Raises:
            ArchiveUnavailable: some of the days are only in the archive, and it cannot be read.
        """
        oldest = self._usage.today() - timedelta(days=DAYS_KEPT - 1)
        rows = self._usage.read([*key_ids], max(first, oldest), last) if last >= oldest else []
        if self._archive is not None and first < oldest:
            rows += self._archive.usage([*key_ids], first, min(last, oldest - timedelta(days=1)))
        return rows


def stored_request(archived: ArchivedJob) -> Request:
    """Return the request of an archived job.

    Raises:
        Gone: it was not stored.
    """
    if archived.request is None:
        raise Gone("The archive does not have the request of this job.", code="request_gone")
    return Request.from_json(archived.request)


def _newest_first(job: Job) -> float:
    return -job.created_at
