"""Malformed HTTP gets 4xx and a problem document: never 5xx, never a traceback, and every log line is JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from tests.plugins.web_stack import WebStack, running_web
from tests.support.raw_http import Raw
from tests.support.waiting import eventually

MAX_BODY = 100_000
OK = b"Host: x\r\n"
GET = b"GET /livez HTTP/1.1\r\n" + OK
HEADS = [
    b"\r\n\r\n\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /livez\r\n\r\n",
    b"GET  /livez HTTP/1.1\r\n" + OK + b"\r\n",
    b"GET /livez HTTP/9.9\r\n" + OK + b"\r\n",
    b"GET /livez HTTP/1.1 extra\r\n" + OK + b"\r\n",
    b"GET /livez FTP/1.1\r\n" + OK + b"\r\n",
    b"G@T /livez HTTP/1.1\r\n" + OK + b"\r\n",
    b"\x00\x01\x02\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"get /livez HTTP/1.1\r\n" + OK + b"\r\n",
    b"MADEUP /livez HTTP/1.1\r\n" + OK + b"\r\n",
    b"CONNECT x:1 HTTP/1.1\r\n" + OK + b"\r\n",
    b"GET * HTTP/1.1\r\n" + OK + b"\r\n",
    b"GET http://[::1 HTTP/1.1\r\n" + OK + b"\r\n",
    b"GET //[/ HTTP/1.1\r\n" + OK + b"\r\n",
    b"GET /%ff%00%zz HTTP/1.1\r\n" + OK + b"\r\n",
    b"GET /v1/jobs/%00 HTTP/1.1\r\n" + OK + b"\r\n",
    b"GET /v1/jobs?%ff=%00 HTTP/1.1\r\n" + OK + b"\r\n",
    b"GET /\xff HTTP/1.1\r\n" + OK + b"\r\n",
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n" + OK + b"\r\n",
    GET + b"X: " + b"a" * 20_000 + b"\r\n\r\n",
    GET + b"X: a\r\n" * 200 + b"\r\n",
    GET + b"No colon\r\n\r\n",
    GET + b": empty\r\n\r\n",
    GET + b"Sp ace: a\r\n\r\n",
    GET + b"Folded: a\r\n b\r\n\r\n",
    GET + b"Null: \x00\r\n\r\n",
    GET + b"Content-Length: -1\r\n\r\n",
    GET + b"Content-Length: x\r\n\r\n",
    GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    GET + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    GET + b"Transfer-Encoding: gzip\r\n\r\n",
    GET + b"Transfer-Encoding: made-up, chunked\r\n\r\n",
    GET + b"Expect: the-unexpected\r\n\r\n",
]
UNTRUSTED = [
    b"SCRIPT_NAME: /x",
    b"SCRIPT-NAME: /x",
    b"X-Forwarded-Proto: https",
    b"X-Forwarded-Protocol: ssl\r\nX-Forwarded-Proto: http",
    b"X-Forwarded-For: 1.2.3.4",
    b"X-Forwarded-For: \xff, , nonsense",
    b"X-Forwarded-Host: evil\r\nForwarded: for=1.2.3.4",
    b"X-Forwarded-Prefix: /x",
    b"PATH_INFO: /x",
    b"REMOTE_USER: root",
    b"Host: y",
]
CHUNKED = [
    b"x\r\n",
    b"-1\r\n",
    b"\r\n\r\n",
    b"2\r\n{}x",
    b"2\r\n{}",
    b"ffffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    b"2;\x00=\x00\r\n{}\r\n0\r\n\r\n",
    b"2\r\n{}\r\n0\r\nNo colon\r\n\r\n",
    b"2\r\n{}\r\n0\r\nX: \x00\r\n\r\n",
    b"2\r\n{}\r\n0\r\nX: " + b"a" * 300_000 + b"\r\n\r\n",
    b"2" + b";a" * 10_000 + b"\r\n",
]


@pytest.fixture(scope="module")
def web() -> Iterator[WebStack]:
    limits = {"MAX_BODY_BYTES": str(MAX_BODY), "BODY_MEMORY_BYTES": str(2 * MAX_BODY)}
    with running_web(**limits, SCRIPT_NAME="/prefix") as stack:  # type: ignore[arg-type]
        yield stack


@pytest.fixture(autouse=True)
def clean_log(web: WebStack) -> Iterator[None]:
    yield
    for line in web.log.read_text().splitlines():
        entry = json.loads(line)
        assert entry["level"] != "ERROR" and "exc_info" not in entry, line


def post(web: WebStack, headers: bytes, body: bytes = b"", path: bytes = b"/v1/jobs") -> bytes:
    head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nX-API-Key: " + web.key.encode()
    return head + b"\r\nContent-Type: application/json\r\n" + headers + b"\r\n\r\n" + body


def status(web: WebStack, request: bytes) -> int:
    """Send a request and close the sending half; return the status, or 0 if the connection ends without a response."""
    with Raw(web.url) as raw:
        with suppress(OSError):
            raw.send(request).finish()
        response = raw.receive_until_end()
    if not response:
        return 0
    head, _, body = response.partition(b"\r\n\r\n")
    code = int(head.split()[1])
    if code >= 400 and body:
        assert b"application/problem+json" in head
        assert b"X-Request-ID" in head
        json.loads(body), response
    return code


@pytest.mark.parametrize("head", HEADS, ids=range(len(HEADS)))
def test_a_malformed_head(web: WebStack, head: bytes) -> None:
    assert status(web, head) in (0, 400, 401, 404, 405, 408, 414, 417, 422, 431)


@pytest.mark.parametrize("header", UNTRUSTED)
def test_a_header_that_only_a_proxy_may_send_changes_nothing(web: WebStack, header: bytes) -> None:
    assert status(web, GET + header + b"\r\nConnection: close\r\n\r\n") in (200, 400)
    assert '"client": "1.2.3.4"' not in web.log.read_text()


@pytest.mark.parametrize("body", CHUNKED, ids=range(len(CHUNKED)))
@pytest.mark.parametrize("path", [b"/v1/jobs", b"/inference"])
def test_a_malformed_chunked_body(web: WebStack, path: bytes, body: bytes) -> None:
    assert status(web, post(web, b"Transfer-Encoding: chunked", body, path)) == 400


@pytest.mark.parametrize("body", [b"", b"{", b'{"prompt": "hi"}'])
def test_a_body_that_ends_early(web: WebStack, body: bytes) -> None:
    assert status(web, post(web, b"Content-Length: 100", body)) == 400


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"deflate, gzip", b"\xff"])
def test_a_compressed_body(web: WebStack, encoding: bytes) -> None:
    assert status(web, post(web, b"Content-Length: 2\r\nContent-Encoding: " + encoding, b"{}")) == 415


def test_bodies_beyond_the_budget_are_refused_until_others_have_gone(web: WebStack) -> None:
    job = json.dumps({"prompt": "a" * (MAX_BODY // 2)}).encode()
    length = b"Content-Length: %d" % len(job)
    with ExitStack() as stack:

        def is_full() -> bool:
            """Whether a request is refused. If not, begin another body: an earlier one may have been refused itself."""
            if status(web, post(web, length + b"\r\nConnection: close", job)) == 503:
                return True
            stack.enter_context(Raw(web.url)).send(post(web, length, job[:-1]))
            return False

        eventually(is_full, "the budget is used up")
    eventually(lambda: status(web, post(web, length + b"\r\nConnection: close", job)) == 202)
