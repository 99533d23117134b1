"""Usage and limits of API keys over HTTP: routes, CSV, headers, and the errors of all three APIs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest

from shared.jobs.limits import OwnerLimits
from tests.plugins.web_stack import MODEL, StubWorker, WebStack
from tests.support.waiting import eventually

StartWorker = Callable[..., StubWorker]
TOKENS = OwnerLimits(tokens_per_minute=600, tokens_per_day=10_000)


def submit(web: WebStack, headers: dict[str, str], path: str = "/v1/jobs", **body: Any) -> httpx2.Response:
    return web.http.post(path, json={"prompt": "hi", "max_tokens": 2, **body}, headers=headers)


def new_key(web: WebStack, name: str, *scopes: str, **options: Any) -> dict[str, str]:
    return {"X-API-Key": web.keys.create(name, [*scopes] or ["infer"], **options)}


def usage(web: WebStack, headers: dict[str, str], **parameters: str) -> httpx2.Response:
    return web.http.get("/v1/usage", params=parameters, headers=headers)


def key_id(headers: dict[str, str]) -> str:
    return headers["X-API-Key"].split("_")[1]


def test_usage_is_shown_to_its_key_and_to_admins(web: WebStack, start_worker: StartWorker) -> None:
    start_worker()
    one, two, ops = new_key(web, "one"), new_key(web, "=two"), new_key(web, "ops", "infer", "admin")
    for headers in (one, one, two):
        submit(web, headers)
    eventually(lambda: usage(web, ops, key="all").json()["total"]["jobs"] >= 3, "all jobs have ended")

    today = datetime.now(UTC).date().isoformat()
    own = usage(web, one).json()
    assert own["total"] == {
        "jobs": 2, "succeeded": 2, "failed": 0, "cancelled": 0, "expired": 0,
        "prompt_tokens": 6, "cached_tokens": 0, "completion_tokens": 4, "reasoning_tokens": 0,
    }  # fmt: skip
    (entry,) = own["data"]
    assert (entry["key"], entry["key_name"], entry["jobs"]) == (key_id(one), "one", 2)
    assert entry["date"] in (own["end"], today)
    assert usage(web, ops, key=key_id(two)).json()["total"]["jobs"] == 1
    assert usage(web, ops, key="all", model="other").json()["data"] == []
    assert usage(web, one, start="2000-01-01", end="2000-01-31").json()["data"] == []

    text = web.http.get("/v1/usage?key=all", headers=ops | {"Accept": "text/csv"})
    assert text.headers["Content-Type"] == "text/csv; charset=utf-8"
    rows = {row["key"]: row for row in csv.DictReader(io.StringIO(text.text))}
    assert (rows[key_id(one)]["completion_tokens"], rows[key_id(two)]["key_name"]) == ("4", "'=two")
    assert usage(web, one, format="csv").text.splitlines()[0].startswith("date,key,key_name,model,jobs,succeeded,")

    for headers, parameters, status, field in (
        (one, {"key": key_id(two)}, 403, None),
        (one, {"key": "all"}, 403, None),
        (ops, {"key": "nobody"}, 404, "key"),
        (one, {"start": "yesterday"}, 400, "start"),
        (one, {"start": "2026-02-30"}, 400, "start"),
        (one, {"start": "2026-01-02", "end": "2026-01-01"}, 400, "start"),
        (one, {"start": "2010-01-01", "end": "2026-01-01"}, 400, "start"),
        (one, {"format": "xml"}, 400, "format"),
        (one, {"begin": "2026-01-01"}, 400, "begin"),
    ):
        refused = usage(web, headers, **parameters)
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, field)


def test_limits_and_what_is_in_use_are_shown(web: WebStack, start_worker: StartWorker) -> None:
    start_worker().hold.set()
    limits = OwnerLimits(2.0, 5, 10**9, 1, 6000, 60_000)
    headers = new_key(web, "limited", limits=limits, rate_limit="50/minute")
    for _ in range(3):
        submit(web, headers)

    def view() -> dict[str, Any]:
        found: dict[str, Any] = web.http.get("/v1/limits", headers=headers).json()
        return found

    eventually(lambda: view()["running_jobs"]["used"] == 1, "one job runs")
    shown = view()
    assert (shown["key"], shown["key_name"], shown["weight"]) == (key_id(headers), "limited", 2.0)
    assert (shown["requests"], shown["max_priority"]) == ({"limit": "50/minute"}, "normal")
    assert shown["running_jobs"] == {"limit": 1, "used": 1}
    assert (shown["queued_jobs"]["limit"], [*shown["queued_jobs"]["used"].values()]) == (5, [2])
    assert shown["tokens_per_day"]["reserved"] == 60_000 - shown["tokens_per_day"]["remaining"] > 0
    assert 0 < shown["queued_bytes"]["used"] < shown["queued_bytes"]["limit"] == 10**9
    unlimited = web.http.get("/v1/limits").json()
    assert unlimited["tokens_per_minute"] == {"limit": None, "remaining": None, "reset_s": 0.0}
    assert web.http.get("/v1/limits", params={"key": key_id(headers)}).status_code == 403


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/v1/jobs", {}, "native"),
        ("/v1/completions", {}, "openai"),
        (
            "/v1/messages",
            {"prompt": None, "model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
            "anthropic",
        ),
    ],
)
def test_exhausted_tokens_are_429_with_the_headers_that_clients_read(
    web: WebStack, start_worker: StartWorker, path: str, body: dict[str, Any], kind: str
) -> None:
    start_worker()
    headers = new_key(web, f"tokens-{kind}", limits=OwnerLimits(tokens_per_minute=3, tokens_per_day=10_000))
    request = {name: value for name, value in {"prompt": "hi", "max_tokens": 2, **body}.items() if value is not None}
    accepted = web.http.post(path, json=request, headers=headers)
    assert accepted.status_code in (200, 202), accepted.text
    assert accepted.headers["RateLimit-Policy"].endswith('"tokens";q=3;w=60, "tokens-day";q=10000;w=86400')
    assert accepted.headers["RateLimit"].startswith('"requests";r=')
    refused = web.http.post(path, json=request | {"max_tokens": 3}, headers=headers)
    assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 120
    assert '"tokens";r=' in refused.headers["RateLimit"]
    error = refused.json()
    if kind == "native":
        assert error["code"] == "tokens_per_minute"
    elif kind == "openai":
        assert (error["error"]["code"], error["error"]["type"]) == ("tokens_per_minute", "rate_limit_error")
        assert refused.headers["x-ratelimit-limit-tokens"] == "3"
        assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
        assert refused.headers["X-Should-Retry"] == "true"
    else:
        assert error["error"]["type"] == "rate_limit_error"
        assert refused.headers["anthropic-ratelimit-tokens-limit"] == "3"
        assert datetime.fromisoformat(refused.headers["anthropic-ratelimit-tokens-reset"]) > datetime(
            2020, 1, 1, tzinfo=UTC
        )


def test_limits_hold_across_api_processes(web: WebStack, start_worker: StartWorker) -> None:
    """Counted in Redis: a restarted process knows what was used."""
    headers = new_key(web, "twice", limits=OwnerLimits(tokens_per_day=6))
    assert submit(web, headers).status_code == 202
    web.restart()
    refused = submit(web, headers, max_tokens=6)
    assert (refused.status_code, refused.json()["code"]) == (429, "tokens_per_day")
