"""Usage: jobs and tokens by day, API key and model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import reduce
from operator import add
from typing import Final, TypeVar
from urllib.parse import urlencode

from flask import request
from werkzeug.wrappers import Response as AnyResponse

from shared.jobs.usage import Counters, UsageRow
from web.access.auth import caller, is_admin
from web.console.layout import page, page_description, render, routes
from web.console.pages import key_names
from web.routes.jobs import ALL_KEYS
from web.services import services

_SPANS: Final = (7, 30, 90)
_HEIGHT: Final = 100
Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Day:
    """A bar of the plot; heights in percent of the largest day."""

    day: date
    counters: Counters
    x: float
    width: float
    prompt: float
    completion: float


@routes.get("/console/usage")
@page_description("Show the usage")
@page
def usage_page() -> AnyResponse:
    """Totals, a plot by day, and sums by API key and model."""
    names, usage = key_names(), services().usage
    wanted = request.args.get("key", "") if is_admin() else caller().id
    days = next((span for span in _SPANS if str(span) == request.args.get("days")), 30)
    end = usage.today()
    start = end - timedelta(days=days - 1)
    rows = usage.read([wanted] if wanted in names else [*names], start, end)
    query = {"start": start.isoformat(), "end": end.isoformat(), "format": "csv"}
    query["key"] = wanted if wanted in names else ALL_KEYS if is_admin() else caller().id
    return render(
        "usage",
        "usage",
        total=_sum(row.counters for row in rows),
        bars=_bars(rows, start, days),
        by_use=_by(rows, lambda row: (names.get(row.key_id, row.key_id), row.model)),
        names=names,
        wanted=wanted,
        days=days,
        spans=_SPANS,
        csv=f"/v1/usage?{urlencode(query)}",
    )


def _sum(counters: Iterable[Counters]) -> Counters:
    return reduce(add, counters, Counters())


def _by(rows: Sequence[UsageRow], group: Callable[[UsageRow], Group]) -> list[tuple[Group, Counters]]:
    """Return the sums of groups of rows, those with most tokens first."""
    sums: dict[Group, Counters] = {}
    for row in rows:
        sums[group(row)] = sums.get(group(row), Counters()) + row.counters
    return sorted(sums.items(), key=lambda item: -item[1].tokens)


def _bars(rows: Sequence[UsageRow], start: date, days: int) -> list[Day]:
    sums: Mapping[date, Counters] = dict(_by(rows, lambda row: row.day))
    most = max((each.tokens for each in sums.values()), default=0) or 1
    bars = []
    for number in range(days):
        day = start + timedelta(days=number)
        counters = sums.get(day, Counters())
        prompt, completion = (_HEIGHT * tokens / most for tokens in (counters.prompt, counters.completion))
        bars.append(Day(day, counters, 100 * number / days, 80 / days, round(prompt, 2), round(completion, 2)))
    return bars
