"""The rate limit: per key, told in headers, and in force without Redis."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.plugins.web_stack import WebStack, running_web
from web.access.api_keys import new_key


@pytest.fixture(scope="module")
def limited() -> Iterator[WebStack]:
    with running_web(RATE_LIMIT="5/minute") as stack:
        yield stack


def someone(web: WebStack, rate_limit: str | None = None) -> dict[str, str]:
    return {"X-API-Key": web.keys.create(new_key(), ["infer"], rate_limit)}


def statuses(web: WebStack, headers: dict[str, str], count: int) -> list[int]:
    return [web.http.get("/inference/models", headers=headers).status_code for _ in range(count)]


def test_a_key_gets_its_share_and_no_more(limited: WebStack) -> None:
    headers = someone(limited)
    first = limited.http.get("/v1/jobs", headers=headers)
    assert (first.headers["X-RateLimit-Limit"], first.headers["X-RateLimit-Remaining"]) == ("5", "4")
    assert float(first.headers["X-RateLimit-Reset"]) >= time.time()
    assert "Retry-After" not in first.headers
    assert statuses(limited, headers, 5) == [200] * 4 + [429]
    refused = limited.http.post("/v1/jobs", headers=headers, json={"prompt": "hi"})
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert 1 <= int(refused.headers["Retry-After"]) <= 61


def test_keys_do_not_share_and_may_have_limits_of_their_own(limited: WebStack) -> None:
    assert statuses(limited, someone(limited), 5) == [200] * 5
    assert statuses(limited, someone(limited, "2/minute"), 3) == [200, 200, 429]


def test_probes_are_not_limited(limited: WebStack) -> None:
    assert {limited.http.get("/livez").status_code for _ in range(20)} == {200}


def test_guessing_keys_is_slowed(limited: WebStack) -> None:
    answers = [limited.http.get("/v1/jobs", headers={"X-API-Key": new_key()}).status_code for _ in range(301)]
    assert set(answers[:300]) == {401} and answers[300] == 429
    assert statuses(limited, someone(limited), 1) == [200]  # a valid key from the same address


def test_without_redis_each_process_still_limits_and_recovers() -> None:
    with running_web(RATE_LIMIT="5/minute") as web:
        headers = someone(web)
        web.stop_redis()
        asked_at = time.monotonic()
        assert [web.http.get("/v1/jobs", headers=headers).status_code for _ in range(6)] == [503] * 5 + [429]
        assert time.monotonic() - asked_at < 10
        web.start_redis()
        other, end = someone(web), time.monotonic() + 20
        while web.http.get("/v1/jobs", headers=other).status_code != 200:
            assert time.monotonic() < end
