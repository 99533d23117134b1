"""REDIS_URL and BROKER_URL: their forms, their validation, and the addresses that they stand for.

    redis://[user:password@]host[:port][/DB]
    rediss://[user:password@]host[:port][/DB]                                TLS
    unix://[user:password@]/path[?db=DB]                                     also redis+socket://
    sentinel://[user:password@]host[:port][,host[:port]…][/DB]?master=NAME   hosts of the sentinels, default port 26379

Parameters: `db`, `username` and `password` instead of the parts above; `master`, `sentinel_username`,
`sentinel_password` and `tls=true` for Sentinel; `ssl_ca_certs`, `ssl_certfile` and `ssl_keyfile` with TLS. TLS always
verifies the certificate and the host name. User and password are those of Redis. Special characters are percent-encoded
(`%40` for @). Error messages contain no text of the URL, because any of it may be part of a password.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

SENTINEL: Final = "sentinel"
SENTINEL_PORT: Final = 26379
REDIS_PORT: Final = 6379
_SOCKET: Final = "redis+socket"
"""kombu's name of the scheme `unix`."""
_AUTHORITY: Final = re.compile(rf"{SENTINEL}://([^/?#]*)(.*)", re.DOTALL)
_SERVERS: Final = ("redis", "rediss", "unix", _SOCKET)
_TLS_PARAMETERS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs")
_PARAMETERS: Final[Mapping[str, tuple[str, ...]]] = {
    "redis": ("db", "username", "password"),
    "rediss": ("db", "username", "password", *_TLS_PARAMETERS),
    "unix": ("db", "username", "password"),
    _SOCKET: ("db", "virtual_host", "username", "password"),
    SENTINEL: (
        "master",
        "db",
        "username",
        "password",
        "sentinel_username",
        "sentinel_password",
        "tls",
        *_TLS_PARAMETERS,
    ),
}
"""Supported parameters by scheme."""
_PORT_RANGE: Final = "must have a port from 1 to 65535; percent-encode special characters in the password"


class InvalidUrl(ValueError):
    """The text completes a sentence that begins with the name of the setting."""


@dataclass(frozen=True, slots=True)
class Login:
    """User name and password; either may be missing."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Tls:
    """How the server's certificate is verified, and which certificate the client presents."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def options(self) -> dict[str, Any]:
        """Return the options of redis-py's TLS connections. Without `ca_file`, the system's CAs are trusted."""
        return {
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
            "ssl_ca_certs": self.ca_file,
            "ssl_certfile": self.cert_file,
            "ssl_keyfile": self.key_file,
        }


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """The address of a Redis server: host and port, or the path of a Unix socket."""

    host: str = ""
    port: int = REDIS_PORT
    path: str = ""
    db: int = 0
    login: Login = Login()
    tls: Tls | None = None


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """The address of a Redis master that sentinels monitor."""

    sentinels: tuple[tuple[str, int], ...]
    master: str
    db: int = 0
    login: Login = Login()
    sentinel_login: Login = Login()
    tls: Tls | None = None


RedisUrl: TypeAlias = ServerUrl | SentinelUrl


def is_redis(url: str) -> bool:
    """Whether a URL names a Redis server or its sentinels."""
    return _split(url).scheme in _PARAMETERS


def check_store(url: str) -> str:
    """Validate REDIS_URL and return it unchanged.

    Raises:
        InvalidUrl: the scheme is unknown, or a part is missing or invalid.
    """
    if _split(url).scheme not in ("redis", "rediss", "unix", SENTINEL):
        raise InvalidUrl("must begin with redis://, rediss://, unix:// or sentinel://")
    return check_broker(url)


def check_broker(url: str) -> str:
    """Validate BROKER_URL and return it unchanged. Only URLs of Redis are checked; kombu supports other brokers.

    Raises:
        InvalidUrl: a part is missing or invalid.
    """
    if not _split(url).scheme:
        raise InvalidUrl("must be a URL, such as redis://host:6379/0")
    if is_redis(url):
        parse(url)
    return url


def parse(url: str) -> RedisUrl:
    """Parse a URL for which `is_redis` holds.

    Raises:
        InvalidUrl: a part is missing or invalid.
    """
    parts = _split(url)
    parameters = _parameters(parts)
    return _sentinel(parts, parameters) if parts.scheme == SENTINEL else _server(parts, parameters)


def with_tls_files(url: str, tls: Tls) -> str:
    """Return a URL with the files of the settings. URLs without TLS, and files that the URL names, stay as they are."""
    if not is_redis(url) or (own := parse(url).tls) is None:
        return url
    files = {"ssl_ca_certs": tls.ca_file, "ssl_certfile": tls.cert_file, "ssl_keyfile": tls.key_file}
    if own.ca_file:
        del files["ssl_ca_certs"]
    if own.cert_file or own.key_file:
        del files["ssl_certfile"], files["ssl_keyfile"]
    added = "&".join(f"{name}={quote(path, safe='/')}" for name, path in files.items() if path)
    return f"{url}{'&' if '?' in url else '?'}{added}" if added else url


def unusable_tls_files(urls: Iterable[str], files: Mapping[str, Path | None]) -> dict[str, str]:
    """Return why the settings REDIS_CA_FILE, REDIS_CERT_FILE and REDIS_KEY_FILE cannot be used, by setting."""
    encrypted = any(is_redis(url) and parse(url).tls for url in urls)
    reasons = {}
    for name, file in files.items():
        if file is None:
            continue
        if not os.access(file, os.R_OK):
            reasons[name] = f"{file} does not exist or cannot be read"
        elif not encrypted:
            reasons[name] = "neither REDIS_URL nor BROKER_URL uses TLS: set rediss://, or tls=true for Sentinel"
        elif name == "redis_key_file" and files["redis_cert_file"] is None:
            reasons[name] = "set REDIS_CERT_FILE, too"
    return reasons


def _server(parts: SplitResult, parameters: Mapping[str, str]) -> ServerUrl:
    login = _login(parts.netloc.rpartition("@")[0], parameters)
    if parts.scheme in ("unix", _SOCKET):
        if not parts.path.strip("/"):
            raise InvalidUrl("must have the path of a socket, as in unix:///run/redis.sock")
        db = parameters.get("db") or parameters.get("virtual_host") or ""
        return ServerUrl(path=unquote(parts.path), db=_db(db), login=login)
    port = _port_of(parts)
    if port == 0:
        raise InvalidUrl(_PORT_RANGE)
    return ServerUrl(
        host=unquote(parts.hostname or "localhost"),
        port=port or REDIS_PORT,
        db=_db(parameters.get("db") or parts.path),
        login=login,
        tls=_tls(parameters) if parts.scheme == "rediss" else None,
    )


def _sentinel(parts: SplitResult, parameters: Mapping[str, str]) -> SentinelUrl:
    credentials, _, hosts = parts.netloc.rpartition("@")
    if not parameters.get("master"):
        raise InvalidUrl("must name the master: add ?master=NAME, the name configured in the sentinels")
    if parameters.get("tls", "false") not in ("true", "false"):
        raise InvalidUrl("must have tls=true or tls=false")
    tls = _tls(parameters)
    encrypted = parameters.get("tls") == "true"
    if not encrypted and parameters.keys() & {*_TLS_PARAMETERS}:
        raise InvalidUrl("has a certificate but no TLS: add tls=true")
    return SentinelUrl(
        sentinels=tuple(_host(host) for host in hosts.split(",")),
        master=parameters["master"],
        db=_db(parameters.get("db") or parts.path),
        login=_login(credentials, parameters),
        sentinel_login=Login(parameters.get("sentinel_username"), parameters.get("sentinel_password")),
        tls=tls if encrypted else None,
    )


def _split(url: str) -> SplitResult:
    try:
        if url.startswith(f"{SENTINEL}://"):  # newer versions of urlsplit reject brackets in a list of hosts
            hosts, rest = _AUTHORITY.findall(url)[0]
            return urlsplit(f"{SENTINEL}://{rest}")._replace(netloc=hosts)
        return urlsplit(url)
    except ValueError:  # unbalanced brackets, or characters that are not valid in a host name
        raise InvalidUrl("must be a valid URL; percent-encode special characters in the password") from None


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
        raise InvalidUrl("must end with the number of a database; percent-encode special characters in the password")
    return int(text or 0)


def _login(credentials: str, parameters: Mapping[str, str]) -> Login:
    username, _, password = credentials.partition(":")
    return Login(
        unquote(username) or parameters.get("username") or None,
        unquote(password) or parameters.get("password") or None,
    )


def _tls(parameters: Mapping[str, str]) -> Tls:
    if parameters.get("ssl_cert_reqs", "required") != "required":
        raise InvalidUrl("must not turn off the verification of certificates: remove ssl_cert_reqs")
    tls = Tls(*(parameters.get(name) for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")))
    if tls.key_file and not tls.cert_file:
        raise InvalidUrl("has a key file without a certificate: add ssl_certfile")
    return tls


def _parameters(parts: SplitResult) -> Mapping[str, str]:
    supported = _PARAMETERS[parts.scheme]
    parameters = dict(parse_qsl(parts.query))
    if not parameters.keys() <= {*supported}:
        raise InvalidUrl(f"has an unknown parameter; supported are {', '.join(supported)}")
    return parameters
