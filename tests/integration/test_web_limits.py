"""Rate limits: per key, reported in headers, and enforced without Redis."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.plugins.web_stack import WebStack, running_web
from tests.support.waiting import eventually
from web.access.api_keys import new_key


@pytest.fixture(scope="module")
def limited() -> Iterator[WebStack]:
    with running_web(RATE_LIMIT="5/minute", READ_RATE_LIMIT="20/minute") as stack:
        yield stack


def new_key_headers(web: WebStack, rate_limit: str | None = None) -> dict[str, str]:
    return {"X-API-Key": web.keys.create(new_key(), ["infer"], rate_limit)}


def statuses(web: WebStack, headers: dict[str, str], count: int) -> list[int]:
    return [web.http.post("/inference/models", headers=headers).status_code for _ in range(count)]


def reads(web: WebStack, headers: dict[str, str], count: int) -> list[int]:
    return [web.http.get("/v1/jobs", headers=headers).status_code for _ in range(count)]


def test_requests_over_the_limit_are_refused(limited: WebStack) -> None:
    headers = new_key_headers(limited)
    first = limited.http.post("/inference/models", headers=headers)
    assert (first.headers["X-RateLimit-Limit"], first.headers["X-RateLimit-Remaining"]) == ("5", "4")
    assert float(first.headers["X-RateLimit-Reset"]) >= time.time()
    assert "Retry-After" not in first.headers
    assert statuses(limited, headers, 5) == [200] * 4 + [429]
    refused = limited.http.post("/v1/jobs", headers=headers, json={"prompt": "hi"})
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert 1 <= int(refused.headers["Retry-After"]) <= 61


def test_limits_are_per_key_and_configurable(limited: WebStack) -> None:
    assert statuses(limited, new_key_headers(limited), 5) == [200] * 5
    assert statuses(limited, new_key_headers(limited, "2/minute"), 3) == [200, 200, 429]


def test_reads_have_a_limit_of_their_own(limited: WebStack) -> None:
    headers = new_key_headers(limited)
    assert reads(limited, headers, 10) == [200] * 10
    read = limited.http.get("/v1/jobs", headers=headers)
    assert (read.headers["X-RateLimit-Limit"], read.headers["X-RateLimit-Remaining"]) == ("20", "9")
    write = limited.http.post("/inference/models", headers=headers)
    assert (write.headers["X-RateLimit-Limit"], write.headers["X-RateLimit-Remaining"]) == ("5", "4")
    assert statuses(limited, headers, 5) == [200] * 4 + [429]
    assert reads(limited, headers, 10) == [200] * 9 + [429]
    refused = limited.http.get("/v1/jobs", headers=headers)
    assert refused.headers["X-RateLimit-Limit"] == "20"
    assert 1 <= int(refused.headers["Retry-After"]) <= 61


@pytest.mark.parametrize(("own", "limit"), [("2/minute", "20"), ("2/second", "2"), ("300/minute", "300")])
def test_a_key_may_read_as_often_as_its_own_limit_allows(limited: WebStack, own: str, limit: str) -> None:
    read = limited.http.get("/v1/jobs", headers=new_key_headers(limited, own))
    assert read.headers["X-RateLimit-Limit"] == limit


def test_probes_are_not_limited(limited: WebStack) -> None:
    assert {limited.http.get("/livez").status_code for _ in range(20)} == {200}


def test_guessing_keys_is_limited(limited: WebStack) -> None:
    responses = [limited.http.get("/v1/jobs", headers={"X-API-Key": new_key()}).status_code for _ in range(301)]
    assert set(responses[:300]) == {401} and responses[300] == 429
    assert statuses(limited, new_key_headers(limited), 1) == [200]  # from the same address


def test_requests_to_unknown_routes_and_methods_are_limited_by_address() -> None:
    with running_web() as web:
        sent = [
            web.http.request("PUT" if i % 2 else "GET", "/v1/jobs" if i % 2 else f"/{i}").status_code
            for i in range(301)
        ]
        assert set(sent[:300]) <= {404, 405} and sent[300] == 429
        assert web.http.get("/v1/jobs").status_code == 200


def test_limits_are_enforced_without_redis_and_counted_in_redis_again() -> None:
    with running_web(READ_RATE_LIMIT="5/minute", RATE_LIMIT="5/minute") as web:
        headers = new_key_headers(web)
        web.stop_redis()
        assert [web.http.get("/v1/jobs", headers=headers).status_code for _ in range(6)] == [503] * 5 + [429]
        web.start_redis()
        other = new_key_headers(web)
        eventually(lambda: web.http.get("/v1/jobs", headers=other).status_code == 200, "Redis is used again", 20)
