"""Access to the archive's database.

SQLite blocks, and SQLAlchemy uses locks that greenlets and native threads must not share. So each process has one
native thread for the archive, and every call runs there. WAL mode lets processes read while another one writes.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

from gevent.threadpool import ThreadPool
from sqlalchemy import URL, ColumnElement, Engine, Table, create_engine, delete, event, insert, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from shared.errors import Unavailable
from shared.jobs.search import JobFilter
from shared.jobs.usage import Counters, UsageRow
from web.archive.queries import Page, page_of
from web.archive.tables import (
    ArchivedJob,
    ArchiveTooNew,
    create,
    job_contents,
    job_metadata,
    jobs,
    usage,
)
from web.http.threadpool import run_with_timeout

log = logging.getLogger(__name__)

T = TypeVar("T")

READ_TIMEOUT_S: Final = 5.0
WRITE_TIMEOUT_S: Final = 60.0
BUSY_S: Final = 2.0
"""How long a statement waits for another process's lock."""
_PER_STATEMENT: Final = 500
"""Ids per statement: SQLite limits the number of parameters."""
_RETRY_S: Final = 10
_NO_TABLE: Final = "no such table"
"""How SQLite's error begins if a table does not exist."""
_PRAGMAS: Final = ("synchronous = FULL", "secure_delete = ON", f"busy_timeout = {BUSY_S * 1000:.0f}")
"""Commits are on disk before Redis forgets the jobs, and deleted content is overwritten in the file."""


class ArchiveUnavailable(Unavailable):
    """The archive cannot be read or written: its disk is full or fails, or the file is locked or damaged."""


class Archive:
    """The archive in a SQLite file. Methods raise `ArchiveUnavailable`.

    Args:
        file: created by the first write. While it does not exist, the archive is empty.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._created = False

    def write(self, entries: Sequence[ArchivedJob], may_commit: Callable[[], bool] = lambda: True) -> bool:
        """Store jobs, replacing rows of the same jobs. When this returns, they are on disk.

        Args:
            may_commit: if it returns False before the commit, nothing is stored.

        Returns:
            Whether the jobs are stored.
        """

        def work(connection: Connection) -> bool:
            _delete_jobs(connection, [entry.record["id"] for entry in entries])
            rows = [entry.rows() for entry in entries]
            for table in (jobs, job_metadata, job_contents):
                if values := [row for each in rows for row in each[table]]:
                    connection.execute(insert(table), values)
            if not may_commit():
                connection.rollback()
                return False
            return True

        stored: bool = self._write(work)
        return stored

    def missing(self, job_ids: Sequence[str]) -> list[str]:
        """Return those of the jobs that are not stored."""

        def work(connection: Connection) -> list[str]:
            known = set(connection.scalars(select(jobs.c.id).where(jobs.c.id.in_(job_ids))))
            return [job_id for job_id in job_ids if job_id not in known]

        return self._read(work, [*job_ids])

    def find(self, job_id: str) -> ArchivedJob | None:
        """Return a job; None if it is not stored."""

        def work(connection: Connection) -> ArchivedJob | None:
            row = connection.execute(select(job_contents).where(job_contents.c.job_id == job_id)).first()
            return None if row is None else ArchivedJob.from_row(row)

        return self._read(work, None)

    def page(self, owners: Sequence[str] | None, wanted: JobFilter, limit: int, before: float | None) -> Page:
        """Return up to `limit` jobs of these API keys (None: of all) that were created before a time, newest first."""
        return self._read(lambda connection: page_of(connection, owners, wanted, limit, before), Page([], None))

    def erase(self, job_ids: Sequence[str]) -> None:
        """Delete jobs. Their content is overwritten in the file."""
        self._write(lambda connection: _delete_jobs(connection, job_ids), only_existing=True)
        self._truncate_log()

    def erase_some(self, limit: int, *, owner: str | None = None, ended_before: float | None = None) -> int:
        """Delete up to `limit` jobs of an API key, or those of all keys that ended first; return how many.

        Args:
            ended_before: delete only jobs that ended before this time.
        """
        conditions: list[ColumnElement[bool]] = []
        if owner is not None:
            conditions.append(jobs.c.owner == owner)
        if ended_before is not None:
            conditions.append(jobs.c.finished_at < ended_before)

        def work(connection: Connection) -> int:
            oldest = select(jobs.c.id).where(*conditions).limit(limit)
            ids = [*connection.scalars(oldest if owner is not None else oldest.order_by(jobs.c.finished_at))]
            _delete_jobs(connection, ids)
            return len(ids)

        deleted: int = self._write(work, only_existing=True) or 0
        if deleted:
            self._truncate_log()
        return deleted

    def used_bytes(self) -> int:
        """Return the bytes that the content takes in the file. Free pages, which are used again, do not count."""

        def work(connection: Connection) -> int:
            size, count, free = (
                int(connection.scalar(text(f"PRAGMA {name}")) or 0)
                for name in ("page_size", "page_count", "freelist_count")
            )
            return size * (count - free)

        return self._read(work, 0)

    def write_usage(self, rows: Sequence[UsageRow]) -> None:
        """Store the usage of days, replacing what was stored of the same days, keys and models."""

        def work(connection: Connection) -> None:
            for row in rows:
                key = {"day": row.day, "key_id": row.key_id, "model": row.model}
                connection.execute(delete(usage).filter_by(**key))
                connection.execute(insert(usage), {**key, "counters": row.counters.to_text()})

        self._write(work)

    def usage(self, key_ids: Sequence[str], first: date, last: date) -> list[UsageRow]:
        """Return the stored usage of API keys on the days from `first` to `last`, the newest day first."""

        def work(connection: Connection) -> list[UsageRow]:
            wanted = (
                select(usage)
                .where(usage.c.day.between(first, last))
                .order_by(usage.c.day.desc(), usage.c.key_id, usage.c.model)
            )
            known = set(key_ids)
            if len(known) <= _PER_STATEMENT:
                wanted = wanted.where(usage.c.key_id.in_(known))
            return [
                UsageRow(row.day, row.key_id, row.model, Counters.from_text(row.counters))
                for row in connection.execute(wanted)
                if row.key_id in known
            ]

        return self._read(work, [])

    def last_usage_day(self) -> date | None:
        """Return the newest day whose usage is stored."""
        newest = select(usage.c.day).order_by(usage.c.day.desc()).limit(1)
        return self._read(lambda connection: connection.scalar(newest), None)

    def close(self) -> None:
        """End the thread."""
        if "_pool" in self.__dict__:
            self._pool.kill()

    @cached_property
    def _pool(self) -> ThreadPool:
        return ThreadPool(1)

    @cached_property
    def _engine(self) -> Engine:
        engine = create_engine(URL.create("sqlite", database=str(self.file)), poolclass=NullPool)
        event.listen(engine, "connect", _configure)
        return engine

    def _read(self, work: Callable[[Connection], T], empty: T) -> T:
        """Return what `work` reads; `empty` if nothing has been archived yet."""

        def in_thread() -> T:
            if not self.file.exists():
                return empty
            try:
                with self._engine.connect() as connection:
                    return work(connection)
            except OperationalError as error:
                if str(error.orig).startswith(_NO_TABLE):  # another process is creating it
                    return empty
                raise

        return self._run(READ_TIMEOUT_S, in_thread)

    def _write(self, work: Callable[[Connection], T], *, only_existing: bool = False) -> Any:
        def in_thread() -> T | None:
            if only_existing and not self.file.exists():
                return None
            self._create()
            with self._engine.begin() as connection:
                return work(connection)

        return self._run(WRITE_TIMEOUT_S, in_thread)

    def _create(self) -> None:
        if self._created and self.file.exists():
            return
        self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives its other files the same mode
        with self._engine.begin() as connection:
            connection.execute(text("PRAGMA journal_mode = WAL"))
            create(connection)
        self._created = True

    def _truncate_log(self) -> None:
        """Overwrite the write-ahead log, which may still have deleted content. Fails silently while others read."""

        def in_thread() -> None:
            with self._engine.connect() as connection:
                connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))

        if self.file.exists():
            self._run(WRITE_TIMEOUT_S, in_thread)

    def _run(self, timeout_s: float, work: Callable[[], T]) -> T:
        try:
            return run_with_timeout(timeout_s, self._pool, work)
        except (SQLAlchemyError, ArchiveTooNew, OSError) as error:  # TimeoutError is an OSError
            reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
            log.warning("archive_unavailable", extra={"path": str(self.file), "reason": reason})
            detail = f"The archive of ended jobs cannot be used: {reason}"
            raise ArchiveUnavailable(detail, code="archive_unavailable", retry_after=_RETRY_S) from error


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    for pragma in _PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _delete_jobs(connection: Connection, job_ids: Sequence[str]) -> None:
    columns: dict[Table, Any] = {
        jobs: jobs.c.id,
        job_metadata: job_metadata.c.job_id,
        job_contents: job_contents.c.job_id,
    }
    for start in range(0, len(job_ids), _PER_STATEMENT):
        some = job_ids[start : start + _PER_STATEMENT]
        for table, column in columns.items():
            connection.execute(delete(table).where(column.in_(some)))
