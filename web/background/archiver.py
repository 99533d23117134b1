"""Copy ended jobs and usage to the archive, and delete what is old or was deleted, while this process leads."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Final

from shared.jobs.usage import DAYS_KEPT, UsageStore
from shared.settings import Settings
from web.archive.database import Archive, ArchiveUnavailable
from web.archive.queue import ArchiveQueue

log = logging.getLogger(__name__)

PER_WRITE: Final = 100
"""Jobs per transaction. Their records and texts are in memory meanwhile."""
PER_ROUND: Final = 20
"""Maximum transactions per round."""
ERASED_S: Final = 60.0
"""After this time, a process that led before does not write any more."""
FREE_BYTES: Final = 256 * 2**20
"""Disk space to leave free: the queue may be on the same disk, and needs it more."""
CLEAN_S: Final = 60.0
RECONCILE_S: Final = 600.0
"""Interval of searches for ended jobs that are in no list, and of copies of the usage."""
_RETRY_S: Final = 5.0
_PER_CLEAN: Final = 1000
_MAX_DELETED: Final = 10_000
_PER_CHECK: Final = 500


class Archiver:
    """The only writer of the archive.

    A job leaves the list of waiting jobs only after its row is on disk, and writing it again changes nothing. So no job
    is lost or stored twice, whenever this process dies. Jobs that are not in the list, because a worker of an earlier
    version ended them or the list was full, are found in the lists of API keys.

    Args:
        archive: None if there is no archive.
        key_ids: returns the ids of all API keys.
        leads: returns whether this process still leads.
    """

    def __init__(
        self,
        settings: Settings,
        archive: Archive | None,
        queue: ArchiveQueue,
        usage: UsageStore,
        key_ids: Callable[[], Collection[str]],
        leads: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._archive = archive
        self._queue = queue
        self._usage = usage
        self._key_ids = key_ids
        self._leads = leads
        self._opened = False
        self._written = 0
        self._erased: set[str] = set()  # deleted jobs that have been erased once
        self._error = ""
        self._retry_at = self._clean_at = self._reconcile_at = 0.0

    def round(self) -> None:
        """Write what has ended since the last round. Raises `redis.RedisError` if Redis is unreachable."""
        if not self._opened:
            self._open()
        if self._archive is None or time.monotonic() < self._retry_at:
            return
        try:
            self._erase_deleted(self._archive)
            self._clean_if_due(self._archive)
            self._check_space(self._archive)  # only now: what is deleted makes room
            self._write_waiting(self._archive)
            self._reconcile_if_due(self._archive)
        except ArchiveUnavailable as error:
            self._retry_at = time.monotonic() + _RETRY_S
            self._report(error.detail)
        else:
            self._report("")

    def _open(self) -> None:
        if self._archive is None:
            self._queue.close()
        else:
            self._queue.open()
        self._opened = True

    def _check_space(self, archive: Archive) -> None:
        folder = next(parent for parent in archive.file.parents if parent.exists())
        if shutil.disk_usage(folder).free < FREE_BYTES:
            detail = f"The disk of the archive has less than {FREE_BYTES >> 20} MiB left."
            raise ArchiveUnavailable(detail, code="archive_unavailable")

    def _write_waiting(self, archive: Archive) -> None:
        for _ in range(PER_ROUND):
            entries = self._queue.waiting(PER_WRITE)
            if not entries or not self._write(archive, [entry.partition(" ")[0] for entry in entries]):
                return
            self._queue.settle(entries)

    def _write(self, archive: Archive, job_ids: list[str]) -> bool:
        """Archive jobs; return whether this process still leads."""
        jobs = self._queue.read(job_ids)
        if jobs and not archive.write(jobs, self._leads):
            return False
        self._written += len(jobs)
        return self._leads()

    def _erase_deleted(self, archive: Archive) -> None:
        """Erase deleted jobs, and once more after `ERASED_S`: a process that led before may have written them since."""
        deleted = self._queue.deleted(_MAX_DELETED)
        final = [job_id for job_id, at in deleted.items() if at < time.time() - ERASED_S]
        if due := [*(deleted.keys() - self._erased), *(job_id for job_id in final if job_id in self._erased)]:
            archive.erase(due)
            self._queue.erased(final)
            self._erased = set(deleted) - set(final)

    def _clean_if_due(self, archive: Archive) -> None:
        if time.monotonic() >= self._clean_at:
            self._queue.open()  # a failover of Redis may have lost it
            self._clean(archive)
            self._clean_at = time.monotonic() + CLEAN_S

    def _reconcile_if_due(self, archive: Archive) -> None:
        if time.monotonic() >= self._reconcile_at:
            self._reconcile(archive)
            self._copy_usage(archive)
            self._reconcile_at = time.monotonic() + RECONCILE_S

    def _clean(self, archive: Archive) -> None:
        """Delete jobs that are older than the retention, and the oldest beyond the size limit."""
        expired_at = time.time() - self._settings.archive_retention_s
        while self._leads() and archive.erase_some(_PER_CLEAN, ended_before=expired_at):
            pass
        size = archive.used_bytes()
        while self._leads() and size > self._settings.archive_max_bytes and archive.erase_some(_PER_CLEAN):
            size = archive.used_bytes()
        self._queue.report(error=self._error, size=size)

    def _reconcile(self, archive: Archive) -> None:
        """Archive ended jobs that are in Redis, but neither in the archive nor in the list of those that wait."""
        for owner in [*self._key_ids()]:
            start = 0
            while self._leads() and (job_ids := self._queue.ids(owner, start, _PER_CHECK)):
                start += len(job_ids)
                missing = archive.missing(job_ids)
                while missing:
                    if not self._write(archive, missing[:PER_WRITE]):
                        return
                    missing = missing[PER_WRITE:]

    def _copy_usage(self, archive: Archive) -> None:
        """Copy the usage of the days since the last copy. The last two days may have grown."""
        today = self._usage.today()
        first, last = today - timedelta(days=DAYS_KEPT - 1), archive.last_usage_day()
        if last is not None:
            first = max(first, min(last, today) - timedelta(days=1))
        if rows := self._usage.read([*self._key_ids()], first, today):
            archive.write_usage(rows)

    def _report(self, error: str) -> None:
        """Record the state if it has changed."""
        if error and not self._error:
            log.error("archive_failed", extra={"reason": error})
        elif self._error and not error:
            log.info("archive_works_again")
        if error != self._error or self._written:
            self._queue.report(error=error, written=self._written)
        self._error, self._written = error, 0
