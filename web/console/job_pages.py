"""The list of jobs, and the page of a job."""

from __future__ import annotations

import json
import re
import time
from typing import Final
from urllib.parse import urlencode

from flask import redirect, request
from werkzeug.datastructures import MultiDict
from werkzeug.wrappers import Response as AnyResponse

from shared.errors import Forbidden, Gone, MlxqError
from shared.jobs.record import Job, Priority, Status
from shared.jobs.request import GENERATE
from web.access.auth import caller, is_admin, visible_owner
from web.archive.history import HistoryPage
from web.archive.tables import ArchivedJob
from web.console.layout import page, page_description, render, routes
from web.console.waterfall import bars
from web.routes.job_requests import request_view
from web.routes.jobs import ALL_KEYS, find_jobs
from web.schemas.jobs import StoredRequestView
from web.services import services

_PAGE: Final = 50
_JOB_ID: Final = re.compile(r"job_[0-9a-f]{28}")
_SPANS: Final = {"15m": ("15 minutes", 900), "1h": ("hour", 3600), "24h": ("24 hours", 86_400)}
_MAX_RAW: Final = 200_000
"""Characters of a job's JSON that its page shows."""


@routes.get("/console/jobs")
@page_description("Show the jobs")
@page
def jobs_page() -> AnyResponse:
    """A list with filters."""
    chosen = {name: value.strip() for name, value in request.args.items() if value.strip()}
    if _JOB_ID.fullmatch(chosen.get("text", "")):
        return redirect(f"/console/jobs/{chosen['text']}")
    error, found = "", HistoryPage([], None)
    try:
        found = find_jobs(_query(chosen), _PAGE)
    except MlxqError as refused:
        error = refused.detail
    if not found.complete:
        error = "The archive cannot be read, so older jobs are missing."
    older = None if found.next is None else urlencode({**chosen, "before": repr(found.next)})
    return render(
        "jobs",
        "jobs",
        jobs=found.jobs,
        positions=services().jobs.positions(found.jobs),
        chosen=chosen,
        older=older,
        searched_to=found.next,
        newest=urlencode({name: value for name, value in chosen.items() if name != "before"}),
        error=error,
        models=sorted(services().registry.known_models() | set(services().catalog.models)),
        statuses=[status.value for status in Status],
        priorities=[priority.label for priority in Priority],
        spans=_SPANS,
        all_keys=services().keys.list() if is_admin() else [],
        names={key_id: key.name for key_id, key in services().keys.entries().items()},
    )


@routes.get("/console/jobs/<job_id>")
@page_description("Show a job")
@page
def job_page(job_id: str) -> AnyResponse:
    """Prompt, text, timings, attempts, events and raw JSON."""
    job, archived = services().history.get(job_id, visible_owner())
    stored, why_not = _stored(job, archived)
    views = services().job_views
    view = views.job_json(job) if archived is None else views.archived_json(job, archived.text)
    raw = json.dumps(json.loads(view), indent=2, ensure_ascii=False)
    return render(
        "job",
        "jobs",
        job=job,
        owner=services().keys.entries().get(job.owner),
        position=services().jobs.position(job),
        text=_text(job, archived),
        stored=stored,
        why_not=why_not,
        bars=bars(job),
        raw=raw if len(raw) <= _MAX_RAW else f"{raw[:_MAX_RAW]}\n…",
        own=job.owner == caller().id,
    )


def _text(job: Job, archived: ArchivedJob | None) -> str | None:
    """Return a job's text; None if the archive has none. The results of inputs are numbers, which are not shown."""
    if job.kind != GENERATE:
        return ""
    return services().jobs.text(job) if archived is None else archived.text


def _query(chosen: dict[str, str]) -> MultiDict[str, str]:
    """Return the form's fields as query parameters of `GET /v1/jobs`."""
    query: MultiDict[str, str] = MultiDict()
    for name in ("status", "model", "priority", "key", "before"):
        if name in chosen:
            query[name] = chosen[name]
    if is_admin():
        query.setdefault("key", ALL_KEYS)
    if chosen.get("within") in _SPANS:
        query["after"] = repr(time.time() - _SPANS[chosen["within"]][1])
    for pair in chosen.get("metadata", "").split():
        query.add("metadata", pair)
    return query


def _stored(job: Job, archived: ArchivedJob | None) -> tuple[StoredRequestView | None, str]:
    """Return the request of a job, or why it cannot be shown."""
    try:
        return request_view(job, archived), ""
    except (Gone, Forbidden) as reason:
        return None, reason.detail
