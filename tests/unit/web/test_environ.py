"""A client cannot choose its address, unless a trusted proxy says it, nor the methods that metrics see."""

from __future__ import annotations

from http import HTTPMethod
from typing import Any

import pytest

from web.http.environ import OTHER, KnownMethods, ProxyMiddleware, networks

TRUSTED = "10.0.0.1, 192.168.0.0/16, ::1"


def seen(middleware: type[Any], *options: Any, **environ: str) -> dict[str, Any]:
    """The environment that the application sees."""
    result: dict[str, Any] = {}
    app = middleware(lambda each, _: result.update(each) or [], *options)
    app(dict(environ), lambda *_: None)
    return result


@pytest.mark.parametrize(
    ("trusted", "address", "forwarded", "client"),
    [
        ("", "10.0.0.1", "1.1.1.1", "10.0.0.1"),
        (TRUSTED, "10.0.0.2", "1.1.1.1", "10.0.0.2"),
        (TRUSTED, "10.0.0.1", "1.1.1.1", "1.1.1.1"),
        (TRUSTED, "10.0.0.1", "6.6.6.6, 1.1.1.1", "1.1.1.1"),
        (TRUSTED, "10.0.0.1", "1.1.1.1, 192.168.7.7", "1.1.1.1"),
        (TRUSTED, "::1", "2001:db8::1", "2001:db8::1"),
        (TRUSTED, "10.0.0.1", "", "10.0.0.1"),
        (TRUSTED, "10.0.0.1", "nonsense", "10.0.0.1"),
        (TRUSTED, "", "1.1.1.1", ""),
    ],
)
def test_only_trusted_proxies_name_the_client(trusted: str, address: str, forwarded: str, client: str) -> None:
    environ = seen(ProxyMiddleware, networks(trusted), REMOTE_ADDR=address, HTTP_X_FORWARDED_FOR=forwarded)
    assert environ["REMOTE_ADDR"] == client


@pytest.mark.parametrize("method", HTTPMethod)
def test_known_methods_stay(method: str) -> None:
    assert seen(KnownMethods, REQUEST_METHOD=method)["REQUEST_METHOD"] == method


@pytest.mark.parametrize("method", ["MADEUP", "get", ""])
def test_other_methods_share_one_name(method: str) -> None:
    assert seen(KnownMethods, REQUEST_METHOD=method)["REQUEST_METHOD"] == OTHER
