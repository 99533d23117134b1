"""Celery's broker: BROKER_URL in kombu's format, and a transport for Redis Sentinel.

The transport uses the classes of `shared.queue.sentinel`, so the broker and the queue fail over in the same way.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from redis.sentinel import SentinelConnectionPool

from shared.queue.redis_url import SENTINEL, SentinelUrl, is_sentinel, parse_sentinel
from shared.queue.sentinel import MasterConnection, Sentinels, sentinel_options

HEALTH_CHECK_S: Final = 5
"""Seconds after which a connection to a server that stopped answering is closed."""


def kombu_url(url: str) -> str:
    """Convert a broker URL to kombu's format, which for example has `redis+socket://` for Unix sockets."""
    if is_sentinel(url):
        return _first_sentinel(parse_sentinel(url))
    return "redis+socket://" + url.removeprefix("unix://") if url.startswith("unix://") else url


def transport_options(url: str, timeout_s: float) -> dict[str, Any]:
    """Return the transport options that belong to a broker URL."""
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "health_check_interval": HEALTH_CHECK_S,
    }
    if is_sentinel(url):
        parsed = parse_sentinel(url)
        options["master_name"] = parsed.master
        options["sentinels"] = parsed.sentinels
        options["sentinel_kwargs"] = sentinel_options(parsed, timeout_s)
    return options


def _first_sentinel(url: SentinelUrl) -> str:
    """Return a URL with the first sentinel; the others are passed as a transport option.

    kombu also accepts a list of URLs, but shows the passwords of all but the first in its statistics. And in an outage
    it cycles through URLs that all mean the same.
    """
    (host, port), login = url.sentinels[0], url.login
    user, password = quote(login.username or "", safe=""), quote(login.password or "", safe="")
    credentials = f"{user}:{password}@" if login.password is not None else ""
    host = f"[{host}]" if ":" in host else host
    return f"{SENTINEL}://{credentials}{host}:{port}/{url.db}"


class SentinelChannel(kombu_redis.SentinelChannel):
    """kombu's channel, with `Sentinels`: redis-py's class asks an unreachable sentinel eleven times."""

    sentinels: tuple[tuple[str, int], ...]
    sentinel_kwargs: dict[str, Any]
    master_name: str
    _connparams: Any

    connection_class = MasterConnection
    from_transport_options = (*kombu_redis.SentinelChannel.from_transport_options, "sentinels")

    def _sentinel_managed_pool(self, asynchronous: bool = False) -> SentinelConnectionPool:
        parameters = self._connparams(asynchronous)
        for name in ("host", "port"):  # of the first sentinel
            parameters.pop(name, None)
        sentinels = Sentinels(self.sentinels, self.sentinel_kwargs)
        # kombu closes these attributes together with the pools.
        setattr(self, "_async_sentinel_manager" if asynchronous else "_sentinel_manager", sentinels)
        return SentinelConnectionPool(self.master_name, sentinels, **parameters)  # type: ignore[no-untyped-call]


class SentinelTransport(kombu_redis.SentinelTransport):
    """The transport for `sentinel://` URLs."""

    Channel = SentinelChannel


# kombu has no other way to register a transport for a scheme, and Flower depends on the scheme.
TRANSPORT_ALIASES[SENTINEL] = f"{__name__}:{SentinelTransport.__name__}"
