"""The query of a page of archived jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, Subquery, func, select
from sqlalchemy.engine import Connection

from shared.jobs.record import Status
from shared.jobs.search import JobFilter
from web.archive.tables import ArchivedJob, job_contents, job_metadata, jobs

WINDOW: Final = 5000
"""Maximum jobs that one page examines. A page in which fewer than `limit` match continues after them."""


@dataclass(frozen=True, slots=True)
class Page:
    """Archived jobs, newest first.

    Attributes:
        next: continue with jobs created before this time; None if there are no others.
    """

    jobs: list[ArchivedJob]
    next: float | None


def page_of(
    connection: Connection, owners: Sequence[str] | None, wanted: JobFilter, limit: int, before: float | None
) -> Page:
    """Return up to `limit` jobs of these API keys (None: of all) that were created before a time, newest first.

    One index finds candidates in the right order, and a bounded number of them is compared with the other conditions.
    """
    if wanted.status in (Status.QUEUED, Status.RUNNING):
        return Page([], None)
    candidates = _candidates(owners, wanted, before).subquery()
    matching = (
        select(jobs.c.created_at, job_contents)
        .join(candidates, candidates.c.id == jobs.c.id)
        .join(job_contents, job_contents.c.job_id == jobs.c.id)
        .where(*_conditions(owners, wanted))
        .order_by(jobs.c.created_at.desc())
        .limit(limit)
    )
    rows = connection.execute(matching).all()
    found = [ArchivedJob.from_row(row) for row in rows]
    if len(rows) == limit:
        return Page(found, rows[-1].created_at)
    return Page(found, _end(connection, candidates))


def _candidates(owners: Sequence[str] | None, wanted: JobFilter, before: float | None) -> Select[Any]:
    """Select id and time of the newest jobs that an index finds: by metadata, by status or by model."""
    if wanted.metadata:
        (name, value), *_ = wanted.metadata.items()
        table, job_id = job_metadata, job_metadata.c.job_id
        conditions = [table.c.name == name, table.c.value == value]
    else:
        table, job_id, conditions = jobs, jobs.c.id, []
        if wanted.status not in (None, Status.SUCCEEDED) or (wanted.status and wanted.model is None):
            conditions.append(jobs.c.status == wanted.status)
        elif wanted.model is not None:
            conditions.append(jobs.c.model == wanted.model)
    if owners is not None:
        conditions.append(_one_of(table.c.owner, owners))
    if before is not None:
        conditions.append(table.c.created_at < before)
    if wanted.after is not None:
        conditions.append(table.c.created_at >= wanted.after)
    newest = select(job_id.label("id"), table.c.created_at).where(*conditions)
    return newest.order_by(table.c.created_at.desc()).limit(WINDOW)


def _conditions(owners: Sequence[str] | None, wanted: JobFilter) -> list[ColumnElement[bool]]:
    conditions = []
    if owners is not None:
        conditions.append(_one_of(jobs.c.owner, owners))
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


def _one_of(column: Any, owners: Sequence[str]) -> ColumnElement[bool]:
    condition: ColumnElement[bool] = column == owners[0] if len(owners) == 1 else column.in_(owners)
    return condition


def _end(connection: Connection, candidates: Subquery) -> float | None:
    """Return the time of the last candidate if there may be others."""
    oldest, count = connection.execute(select(func.min(candidates.c.created_at), func.count())).one()
    return oldest if count == WINDOW else None
