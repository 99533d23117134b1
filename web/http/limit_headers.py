"""The headers in which responses report limits.

`RateLimit` and `RateLimit-Policy` are those of the IETF draft (draft-ietf-httpapi-ratelimit-headers). Clients of the
APIs of OpenAI and Anthropic read headers of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from flask import Response, request

from web.access.rate_limits import Quota
from web.http import anthropic_errors, openai_errors


def add_headers(response: Response, quotas: Sequence[Quota]) -> None:
    """Report the limits that apply to a request in its response, in the formats that its client may know."""
    headers = [*_standard_headers(quotas)]
    if anthropic_errors.is_expected(request.path):
        headers += _anthropic_headers(quotas, time.time())
    elif openai_errors.is_expected(request.path):
        headers += _openai_headers(quotas)
    for name, value in headers:
        response.headers[name] = value


def _standard_headers(quotas: Sequence[Quota]) -> Iterator[tuple[str, str]]:
    """Yield the headers of the IETF draft."""
    if quotas:
        yield "RateLimit-Policy", ", ".join(f'"{each.name}";q={each.limit};w={each.window_s}' for each in quotas)
        states = (f'"{each.name}";r={each.remaining};t={math.ceil(each.reset_s)}' for each in quotas)
        yield "RateLimit", ", ".join(states)


def _openai_headers(quotas: Sequence[Quota]) -> Iterator[tuple[str, str]]:
    """Yield the headers of OpenAI's API: they know requests and tokens."""
    for each in quotas:
        if each.name in ("requests", "tokens"):
            yield f"x-ratelimit-limit-{each.name}", str(each.limit)
            yield f"x-ratelimit-remaining-{each.name}", str(each.remaining)
            yield f"x-ratelimit-reset-{each.name}", _duration(each.reset_s)


def _anthropic_headers(quotas: Sequence[Quota], now: float) -> Iterator[tuple[str, str]]:
    """Yield the headers of Anthropic's API. `now` is in seconds since the epoch."""
    for each in quotas:
        if each.name in ("requests", "tokens"):
            prefix = f"anthropic-ratelimit-{each.name}"
            yield f"{prefix}-limit", str(each.limit)
            yield f"{prefix}-remaining", str(each.remaining)
            reset = datetime.fromtimestamp(math.ceil(now + each.reset_s), UTC)
            yield f"{prefix}-reset", reset.isoformat().replace("+00:00", "Z")


def _duration(seconds: float) -> str:
    """Write a duration as OpenAI does: `1h2m3s`, `6m0s`, `0.25s`."""
    rest = round(seconds, 3)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [f"{hours:.0f}h"] if hours else []
    parts += [f"{minutes:.0f}m"] if minutes or hours else []
    return "".join([*parts, f"{round(rest, 3):g}s"])
