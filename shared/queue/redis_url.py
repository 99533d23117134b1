"""Where Redis is: what REDIS_URL and BROKER_URL may say, and the form that both have for Redis Sentinel.

    sentinel://[user:password@]host[:port][,host[:port]…][/DB]?master=NAME[&sentinel_username=…][&sentinel_password=…]

The hosts are the sentinels' (port 26379 unless said), user and password are Redis's own. What would end a part of the
URL is written in percent as everywhere (`%40` for @). An error says what is wrong and never repeats a password.
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


class WrongUrl(ValueError):
    """The line says what is wrong."""


@dataclass(frozen=True, slots=True)
class Login:
    """A user and a password, each perhaps absent."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """A master under the watch of sentinels."""

    sentinels: tuple[tuple[str, int], ...]
    master: str
    db: int = 0
    login: Login = Login()
    sentinel_login: Login = Login()


def is_sentinel(url: str) -> bool:
    """Whether sentinels must be asked for the master."""
    return url.startswith(f"{SENTINEL}://")


def check_store(url: str) -> str:
    """The URL of a queue's Redis, as it came.

    Raises:
        WrongUrl: it is none.
    """
    if _split(url).scheme not in (*_PLAIN, SENTINEL):
        raise WrongUrl("must begin with redis://, rediss://, unix:// or sentinel://")
    return check_broker(url)


def check_broker(url: str) -> str:
    """The URL of a broker, as it came. Any that kombu knows will do; those of Redis are looked at.

    Raises:
        WrongUrl: it is none.
    """
    parts = _split(url)
    if not parts.scheme:
        raise WrongUrl("is no URL, such as redis://host:6379/0")
    if parts.scheme == SENTINEL:
        parse_sentinel(url)
    elif parts.scheme in _PLAIN:
        _port_of(parts)
    return url


def parse_sentinel(url: str) -> SentinelUrl:
    """The parts of a URL that `is_sentinel`.

    Raises:
        WrongUrl: a part is missing or makes no sense.
    """
    parts = _split(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    named = _parameters(parts.query)
    if not named.get("master"):
        raise WrongUrl("names no master: add ?master=NAME, the name that the sentinels know it by")
    return SentinelUrl(
        sentinels=tuple(_host(each) for each in hosts.split(",")),
        master=named["master"],
        db=_db(parts.path),
        login=_login(credentials),
        sentinel_login=Login(named.get("sentinel_username"), named.get("sentinel_password")),
    )


def _split(url: str) -> SplitResult:
    try:
        if is_sentinel(url):  # brackets in a list of hosts are an error to newer versions of Python
            hosts, rest = _AUTHORITY.findall(url)[0]
            return urlsplit(f"{SENTINEL}://{rest}")._replace(netloc=hosts)
        return urlsplit(url)
    except ValueError as error:  # brackets that do not close
        raise WrongUrl(f"cannot be read: {error}") from None


def _port_of(parts: SplitResult) -> int | None:
    try:
        return parts.port
    except ValueError:
        raise WrongUrl("has a port that is no number from 1 to 65535") from None


def _host(text: str) -> tuple[str, int]:
    """One sentinel's host and port; an IPv6 address stands in brackets."""
    parts = _split(f"//{text}")
    if not parts.hostname:
        raise WrongUrl("names no sentinel: host:port, several with commas in between")
    port = _port_of(parts)
    if port == 0:
        raise WrongUrl("has a port that is no number from 1 to 65535")
    return parts.hostname, port or SENTINEL_PORT


def _db(path: str) -> int:
    text = path.strip("/")
    if text and not (text.isascii() and text.isdecimal()):
        raise WrongUrl(f"has the database {text!r}, which is no number")
    return int(text or 0)


def _login(credentials: str) -> Login:
    username, _, password = credentials.partition(":")
    return Login(unquote(username) or None, unquote(password) or None)


def _parameters(query: str) -> Mapping[str, str]:
    named = dict(parse_qsl(query))
    if unknown := sorted(named.keys() - set(_PARAMETERS)):
        raise WrongUrl(f"has the unknown parameter {unknown[0]!r}; there are {', '.join(_PARAMETERS)}")
    return named
