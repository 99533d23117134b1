"""Validation of REDIS_URL and BROKER_URL, and the URL format for Redis Sentinel.

    sentinel://[user:password@]host[:port][,host[:port]…][/DB]?master=NAME[&sentinel_username=…][&sentinel_password=…]

The hosts are those of the sentinels (default port 26379). User and password are those of Redis. Special characters are
percent-encoded (`%40` for @). Error messages never contain a password.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

SENTINEL: Final = "sentinel"
SENTINEL_PORT: Final = 26379
_AUTHORITY: Final = re.compile(rf"{SENTINEL}://([^/?#]*)(.*)", re.DOTALL)
_PLAIN: Final = ("redis", "rediss", "unix")
_PARAMETERS: Final = ("master", "sentinel_username", "sentinel_password")
_PORT_RANGE: Final = "must have a port from 1 to 65535"


class InvalidUrl(ValueError):
    """The text completes a sentence that begins with the name of the setting."""


@dataclass(frozen=True, slots=True)
class Login:
    """User name and password; either may be missing."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """The address of a Redis master that sentinels monitor."""

    sentinels: tuple[tuple[str, int], ...]
    master: str
    db: int = 0
    login: Login = Login()
    sentinel_login: Login = Login()


def is_sentinel(url: str) -> bool:
    """Whether a URL names sentinels."""
    return url.startswith(f"{SENTINEL}://")


def is_redis(url: str) -> bool:
    """Whether a URL names a Redis server or its sentinels."""
    return _split(url).scheme in (*_PLAIN, SENTINEL)


def check_store(url: str) -> str:
    """Validate REDIS_URL and return it unchanged.

    Raises:
        InvalidUrl: the scheme is unknown, or a part is missing or invalid.
    """
    if _split(url).scheme not in (*_PLAIN, SENTINEL):
        raise InvalidUrl("must begin with redis://, rediss://, unix:// or sentinel://")
    return check_broker(url)


def check_broker(url: str) -> str:
    """Validate BROKER_URL and return it unchanged. Only URLs of Redis are checked; kombu supports other brokers.

    Raises:
        InvalidUrl: a part is missing or invalid.
    """
    parts = _split(url)
    if not parts.scheme:
        raise InvalidUrl("must be a URL, such as redis://host:6379/0")
    if parts.scheme == SENTINEL:
        parse_sentinel(url)
    elif parts.scheme in _PLAIN:
        _port_of(parts)
    return url


def parse_sentinel(url: str) -> SentinelUrl:
    """Parse a Sentinel URL.

    Raises:
        InvalidUrl: a part is missing or invalid.
    """
    parts = _split(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    parameters = _parameters(parts.query)
    if not parameters.get("master"):
        raise InvalidUrl("must name the master: add ?master=NAME, the name configured in the sentinels")
    return SentinelUrl(
        sentinels=tuple(_host(host) for host in hosts.split(",")),
        master=parameters["master"],
        db=_db(parts.path),
        login=_login(credentials),
        sentinel_login=Login(parameters.get("sentinel_username"), parameters.get("sentinel_password")),
    )


def _split(url: str) -> SplitResult:
    try:
        if is_sentinel(url):  # newer versions of urlsplit reject brackets in a list of hosts
            hosts, rest = _AUTHORITY.findall(url)[0]
            return urlsplit(f"{SENTINEL}://{rest}")._replace(netloc=hosts)
        return urlsplit(url)
    except ValueError as error:  # unbalanced brackets
        raise InvalidUrl(f"must be a valid URL: {error}") from None


def _port_of(parts: SplitResult) -> int | None:
    try:
        return parts.port
    except ValueError:
        raise InvalidUrl(_PORT_RANGE) from None


def _host(text: str) -> tuple[str, int]:
    """Parse host and port of a sentinel; an IPv6 address is written in brackets."""
    parts = _split(f"//{text}")
    if not parts.hostname:
        raise InvalidUrl("must name the sentinels: host:port, separated by commas")
    port = _port_of(parts)
    if port == 0:
        raise InvalidUrl(_PORT_RANGE)
    return parts.hostname, port or SENTINEL_PORT


def _db(path: str) -> int:
    text = path.strip("/")
    if text and not (text.isascii() and text.isdecimal()):
        raise InvalidUrl(f"must end with the number of a database, not {text!r}")
    return int(text or 0)


def _login(credentials: str) -> Login:
    username, _, password = credentials.partition(":")
    return Login(unquote(username) or None, unquote(password) or None)


def _parameters(query: str) -> Mapping[str, str]:
    parameters = dict(parse_qsl(query))
    if unknown := sorted(parameters.keys() - set(_PARAMETERS)):
        raise InvalidUrl(f"has the unknown parameter {unknown[0]!r}; supported are {', '.join(_PARAMETERS)}")
    return parameters
