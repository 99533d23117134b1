"""`/v1/usage` and `/v1/limits`: what API keys have used, and what they may use."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from datetime import date, timedelta
from functools import reduce
from operator import add
from typing import Final, cast

from flask import Blueprint, Response, request
from pydantic import BaseModel

from shared.errors import Invalid, NotFound
from shared.jobs.usage import DAYS_KEPT, Counters
from web.access.api_keys import ApiKey
from web.access.auth import caller, require_scope
from web.archive.history import USAGE_DAYS
from web.http import openapi
from web.http.openapi import describe
from web.schemas.requests import PriorityName
from web.schemas.usage import (
    LimitsView,
    QueuedBytes,
    QueuedJobs,
    RequestLimit,
    RunningJobs,
    TokensPerDay,
    TokensPerMinute,
    UsageCounters,
    UsageEntry,
    UsageReport,
)
from web.services import services

routes = Blueprint("usage", __name__)

_ALL: Final = "all"
_DEFAULT_DAYS, _MAX_DAYS_OF_ALL = 30, 92
_FIRST_DAY: Final = date(1970, 1, 1)
_CSV: Final = "text/csv"
COLUMNS: Final = ("date", "key", "key_name", "model", *UsageCounters.model_fields)
"""Columns of the CSV form."""


@routes.get("/v1/usage")
@describe(
    "Get usage",
    responses={200: (UsageReport, "text/csv")},
    errors=(404,),
    parameters=(openapi.START, openapi.END, openapi.KEY, openapi.MODEL, openapi.USAGE_FORMAT),
)
def get_usage() -> Response:
    """Ended jobs and their tokens by day (UTC), API key and model.

    With `format=csv` or `Accept: text/csv` the answer is CSV with the fields of `data` as columns. Days are kept for
    400 days, and in the archive for as long as it exists. Another key, or `all`, needs the scope `admin`.
    """
    today = services().usage.today()
    end = _day("end", today)
    start = _day("start", end - timedelta(days=_DEFAULT_DAYS - 1))
    keys = _keys()
    history = services().history
    max_days = USAGE_DAYS if history.has_archive else DAYS_KEPT
    _check_range(start, end, _MAX_DAYS_OF_ALL if len(keys) > 1 else max_days)
    model, as_csv = request.args.get("model"), _wants_csv()
    rows = history.usage([*keys], start, min(end, today))
    entries = [UsageEntry.of_row(row, keys[row.key_id]) for row in rows if model in (None, row.model)]
    if as_csv:
        return Response(_csv(entries), content_type=f"{_CSV}; charset=utf-8")
    total = reduce(add, (row.counters for row in rows if model in (None, row.model)), Counters())
    return _json(UsageReport(start=start, end=end, data=entries, total=UsageCounters.of(total)))


@routes.get("/v1/limits")
@describe("Get limits", responses={200: LimitsView}, errors=(404,), parameters=(openapi.KEY,))
def get_limits() -> Response:
    """The limits of the caller's key, and how much of them is in use. Another key needs the scope `admin`."""
    return _json(_limits(_key(request.args.get("key", caller().id))))


def _limits(key: ApiKey) -> LimitsView:
    current = services()
    limits = key.limits.with_defaults(current.settings)
    per_minute, per_day = limits.tokens_per_minute or None, limits.tokens_per_day or None
    models = {*current.cluster.snapshot().models, *current.catalog.models}
    used = current.usage.in_use(key.id, per_minute or 0, models)
    return LimitsView(
        key=key.id,
        key_name=key.name,
        weight=limits.weight,
        max_priority=cast("PriorityName", key.max_priority.label),
        requests=RequestLimit(limit=key.rate_limit or current.settings.rate_limit),
        tokens_per_minute=TokensPerMinute(
            limit=per_minute,
            remaining=max(0, int(per_minute - used.debt)) if per_minute else None,
            reset_s=round(used.debt * 60 / per_minute, 3) if per_minute else 0.0,
        ),
        tokens_per_day=TokensPerDay(
            limit=per_day,
            used=used.today,
            reserved=used.reserved,
            remaining=max(0, per_day - used.today - used.reserved) if per_day else None,
            reset_s=round(used.day_left_s, 3),
        ),
        queued_jobs=QueuedJobs(limit=limits.max_queued or 0, used=used.queued),
        queued_bytes=QueuedBytes(limit=limits.max_queued_bytes or None, used=used.bytes),
        running_jobs=RunningJobs(limit=limits.max_running or None, used=used.running),
    )


def _keys() -> dict[str, str]:
    """Return the names of the keys whose usage is requested, by id."""
    wanted = request.args.get("key", caller().id)
    if wanted == _ALL:
        require_scope("admin")
        return {key.id: key.name for key in services().keys.entries().values()}
    key = _key(wanted)
    return {key.id: key.name}


def _key(key_id: str) -> ApiKey:
    """Return a key by its id, also a revoked one.

    Raises:
        Forbidden: it is not the caller's key, and the caller lacks the scope `admin`.
        NotFound: there is no such key.
    """
    if key_id == caller().id:
        return caller()
    require_scope("admin")
    entry = services().keys.entries().get(key_id)
    if entry is None:
        raise NotFound("There is no API key with this id.", code="key_not_found", field="key")
    return entry


def _day(name: str, default: date) -> date:
    text = request.args.get(name)
    if text is None:
        return default
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise Invalid(f"{name} must be a day such as {default.isoformat()}.", field=name) from None
    if day < _FIRST_DAY:
        raise Invalid(f"{name} must not be before {_FIRST_DAY}.", field=name)
    return day


def _check_range(start: date, end: date, max_days: int) -> None:
    if start > end:
        raise Invalid(f"start ({start}) must not be after end ({end}).", field="start")
    if (end - start).days >= max_days:
        raise Invalid(f"start and end may be at most {max_days} days apart.", field="start")


def _wants_csv() -> bool:
    wanted = request.args.get("format")
    if wanted not in (None, "csv", "json"):
        raise Invalid("format must be csv or json.", field="format")
    accepted = request.accept_mimetypes.best_match(["application/json", _CSV]) == _CSV
    return wanted == "csv" or (wanted is None and accepted)


def _csv(entries: Iterable[UsageEntry]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(_safe(entry.model_dump()) for entry in entries)
    return text.getvalue()


def _safe(row: dict[str, object]) -> dict[str, object]:
    """Keep spreadsheets from taking the name of a key or a model for a formula."""
    return {name: f"'{value}" if str(value).startswith(("=", "+", "-", "@")) else value for name, value in row.items()}


def _json(view: BaseModel) -> Response:
    return Response(view.model_dump_json(), content_type="application/json")
