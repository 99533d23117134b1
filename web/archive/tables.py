"""The archive's tables and indexes.

Lists and searches read only `jobs` and `job_metadata`, whose rows are small. What pages show is in `job_contents`. All
lists are in the order of creation, so each index ends with that time.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from sqlalchemy import Column, Date, Float, Index, Integer, LargeBinary, MetaData, Row, String, Table
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateIndex, CreateTable

from shared.jobs.record import Job
from shared.wire import to_json

VERSION: Final = 1
"""Version of the tables. A process refuses an archive of a later version."""
_COMPRESSED: Final = 1
"""zlib level. Higher ones take several times longer and save a few percent."""
_NOT_STORED: Final = frozenset(
    {
        *("webhook", "fingerprint", "idempotency_key", "prefixes", "deferred_at", "spare", "moves", "reader"),
        *("kept_until", "bytes", "request_bytes", "growth_bytes", "size", "charged", "end_by", "stop_as", "worker"),
        *("retention_s", "log_retention_s", "suspicion", "patience", "cohort", "deaths", "repeats_prompt", "deleted"),
    }
)
"""Record fields that matter only while a job is in Redis, or that may hold secrets, such as the URL of a webhook."""

metadata: Final = MetaData()

versions = Table("archive_version", metadata, Column("version", Integer, primary_key=True))

jobs = Table(
    "jobs",
    metadata,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("model", String, nullable=False),
    Column("status", String, nullable=False),
    Column("class", Integer, nullable=False, key="priority"),
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float, nullable=False),
)

job_metadata = Table(
    "job_metadata",
    metadata,
    Column("job_id", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("value", String, nullable=False),
    Column("owner", String, nullable=False),
    Column("created_at", Float, nullable=False),
)

job_contents = Table(
    "job_contents",
    metadata,
    Column("job_id", String, primary_key=True),
    Column("record", LargeBinary, nullable=False),
    Column("request", LargeBinary),
    Column("output", LargeBinary),
)

usage = Table(
    "usage",
    metadata,
    Column("day", Date, primary_key=True),
    Column("key_id", String, primary_key=True),
    Column("model", String, primary_key=True),
    Column("counters", String, nullable=False),
)

_INDEXES: Final = (
    Index("jobs_by_time", jobs.c.created_at),
    Index("jobs_by_status", jobs.c.status, jobs.c.created_at),
    Index("jobs_by_model", jobs.c.model, jobs.c.created_at),
    Index("jobs_by_owner", jobs.c.owner, jobs.c.created_at),
    Index("jobs_by_owner_and_status", jobs.c.owner, jobs.c.status, jobs.c.created_at),
    Index("jobs_by_owner_and_model", jobs.c.owner, jobs.c.model, jobs.c.created_at),
    Index("jobs_by_end", jobs.c.finished_at),
    Index("metadata_by_value", job_metadata.c.name, job_metadata.c.value, job_metadata.c.created_at),
    Index(
        "metadata_by_owner", job_metadata.c.owner, job_metadata.c.name, job_metadata.c.value, job_metadata.c.created_at
    ),
)


class ArchiveTooNew(Exception):
    """A later version has written the archive."""


def create(connection: Connection) -> None:
    """Create what is missing. Several processes may do so at once.

    Raises:
        ArchiveTooNew: a later version has written the archive.
    """
    for table in metadata.tables.values():
        connection.execute(CreateTable(table, if_not_exists=True))
    for index in _INDEXES:
        connection.execute(CreateIndex(index, if_not_exists=True))
    found = connection.scalar(versions.select().order_by(versions.c.version.desc()))
    if found is None:
        connection.execute(versions.insert().values(version=VERSION))
    elif found > VERSION:
        raise ArchiveTooNew(f"a later version of mlxq has written the archive (tables of version {found})")


@dataclass(frozen=True, slots=True)
class ArchivedJob:
    """An ended job.

    Attributes:
        record: the fields of its Redis record that are kept.
        request: its request as JSON; None if it is not stored.
        text: the generated text; None if it is not stored.
    """

    record: Mapping[str, str]
    request: str | None = None
    text: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, str], request: str | None, text: str | None) -> Self:
        """Return what the archive stores of a job, given its whole record."""
        return cls({name: value for name, value in record.items() if name not in _NOT_STORED}, request, text)

    @classmethod
    def from_row(cls, row: Row[Any]) -> Self:
        """Read a row of `job_contents`."""
        return cls(json.loads(_inflated(row.record) or "{}"), _inflated(row.request), _inflated(row.output))

    @property
    def job(self) -> Job:
        """The job."""
        return replace(Job.from_record({"worker": "", **self.record}), archived=True)

    def rows(self) -> dict[Table, list[dict[str, Any]]]:
        """Return its rows, by table."""
        record = self.record
        about = {"owner": record["owner"], "created_at": float(record["created_at"])}
        job = {
            **about,
            "id": record["id"],
            "model": record["model"],
            "status": record["status"],
            "priority": int(record["class"]),
            "finished_at": float(record["finished_at"]),
        }
        pairs = json.loads(record["metadata"]).items()
        contents = {
            "job_id": record["id"],
            "record": _deflated(to_json(self.record)),
            "request": _deflated(self.request),
            "output": _deflated(self.text),
        }
        return {
            jobs: [job],
            job_metadata: [{**about, "job_id": record["id"], "name": name, "value": value} for name, value in pairs],
            job_contents: [contents],
        }


def _deflated(text: str | None) -> bytes | None:
    return None if text is None else zlib.compress(text.encode("utf-8", "surrogatepass"), _COMPRESSED)


def _inflated(data: bytes | None) -> str | None:
    return None if data is None else zlib.decompress(data).decode("utf-8", "surrogatepass")
