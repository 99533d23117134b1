"""The query of a page of archived jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, Subquery, func, null, select
from sqlalchemy.engine import Connection

from shared.jobs.record import Status
from shared.jobs.search import JobFilter
from web.archive.tables import ArchivedJob, job_contents, job_metadata, jobs

WINDOW: Final = 2000
"""Maximum jobs that one page examines. A page in which fewer than `limit` match continues after them."""


@dataclass(frozen=True, slots=True)
class Page:
    """Archived jobs, newest first, without their requests.

    Attributes:
        next: continue with jobs created before this time; None if there are no others.
    """

    jobs: list[ArchivedJob]
    next: float | None


def page_of(
    connection: Connection, owners: Sequence[str] | None, wanted: JobFilter, limit: int, before: float | None
) -> Page:
    """Return up to `limit` jobs of these API keys (None: of all) that were created before a time, newest first.

    One index finds candidates in the right order. If it does not cover all conditions, a bounded number of them is
    compared with the others.
    """
    if wanted.status in (Status.QUEUED, Status.RUNNING):
        return Page([], None)
    candidates, covered = _candidates(owners, wanted, before)
    if wanted == replace(covered, after=wanted.after):
        rows = connection.execute(candidates.limit(limit)).all()
        end = rows[-1].created_at if len(rows) == limit else None
    else:
        examined = candidates.limit(WINDOW).subquery()
        matching = (
            select(examined.c.id, examined.c.created_at)
            .join(jobs, jobs.c.id == examined.c.id)
            .where(*_conditions(wanted))
            .order_by(examined.c.created_at.desc())
            .limit(limit)
        )
        rows = connection.execute(matching).all()
        end = rows[-1].created_at if len(rows) == limit else _end(connection, examined)
    return Page(_contents(connection, [row.id for row in rows]), end)


def _candidates(owners: Sequence[str] | None, wanted: JobFilter, before: float | None) -> tuple[Select[Any], JobFilter]:
    """Select id and time of jobs that an index finds, newest first; also return the conditions that it covers."""
    table, job_id, conditions, covered = jobs, jobs.c.id, list[ColumnElement[bool]](), JobFilter()
    if wanted.metadata:
        (name, value), *_ = wanted.metadata.items()
        table, job_id = job_metadata, job_metadata.c.job_id
        conditions, covered = [table.c.name == name, table.c.value == value], JobFilter(metadata={name: value})
    elif wanted.status is not None and (wanted.status is not Status.SUCCEEDED or wanted.model is None):
        conditions, covered = [jobs.c.status == wanted.status], JobFilter(status=wanted.status)
    elif wanted.model is not None:
        conditions, covered = [jobs.c.model == wanted.model], JobFilter(model=wanted.model)
    if owners is not None:
        conditions.append(table.c.owner == owners[0] if len(owners) == 1 else table.c.owner.in_(owners))
    if before is not None:
        conditions.append(table.c.created_at < before)
    if wanted.after is not None:
        conditions.append(table.c.created_at >= wanted.after)
    found = select(job_id.label("id"), table.c.created_at).where(*conditions)
    return found.order_by(table.c.created_at.desc()), covered


def _contents(connection: Connection, job_ids: Sequence[str]) -> list[ArchivedJob]:
    """Read jobs without their requests, in the given order."""
    columns = (job_contents.c.job_id, job_contents.c.record, null().label("request"), job_contents.c.output)
    rows = connection.execute(select(*columns).where(job_contents.c.job_id.in_(job_ids)))
    found = {row.job_id: ArchivedJob.from_row(row) for row in rows}
    return [found[job_id] for job_id in job_ids if job_id in found]


def _conditions(wanted: JobFilter) -> list[ColumnElement[bool]]:
    conditions = []
    if wanted.status is not None:
        conditions.append(jobs.c.status == wanted.status)
    if wanted.model is not None:
        conditions.append(jobs.c.model == wanted.model)
    if wanted.priority is not None:
        conditions.append(jobs.c.priority == int(wanted.priority))
    for name, value in wanted.metadata.items():
        pair = select(job_metadata.c.job_id).where(
            job_metadata.c.job_id == jobs.c.id, job_metadata.c.name == name, job_metadata.c.value == value
        )
        conditions.append(pair.exists())
    return conditions


def _end(connection: Connection, candidates: Subquery) -> float | None:
    """Return the time of the last candidate if there may be others."""
    oldest, count = connection.execute(select(func.min(candidates.c.created_at), func.count())).one()
    return oldest if count == WINDOW else None
