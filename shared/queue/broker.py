"""The broker in kombu's words, and kombu's transport for Redis Sentinel with sentinels that are asked as ours are."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from redis.sentinel import SentinelConnectionPool

from shared.queue.redis_url import SENTINEL, SentinelUrl, is_sentinel, parse_sentinel
from shared.queue.sentinel import MasterConnection, Sentinels, asking_options

SILENCE_S: Final = 5


def kombu_url(url: str) -> str:
    """The URL of the broker (a Unix socket is spelt `redis+socket://` there)."""
    if is_sentinel(url):
        return _first_sentinel(parse_sentinel(url))
    return "redis+socket://" + url.removeprefix("unix://") if url.startswith("unix://") else url


def transport_options(url: str, timeout_s: float) -> dict[str, Any]:
    """Options that kombu needs beside the URL."""
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        # A server that has fallen silent without closing a connection is left after about this long.
        "health_check_interval": SILENCE_S,
    }
    if is_sentinel(url):
        where = parse_sentinel(url)
        asking = asking_options(where, timeout_s)
        options |= {"master_name": where.master, "sentinels": where.sentinels, "sentinel_kwargs": asking}
    return options


def _first_sentinel(where: SentinelUrl) -> str:
    # Not all of them, as kombu would have it: then it shows the password of each further one in its statistics,
    # and in an outage goes round a circle of URLs that all mean the same.
    (host, port), login = where.sentinels[0], where.login
    user, password = quote(login.username or "", safe=""), quote(login.password or "", safe="")
    credentials = f"{user}:{password}@" if login.password is not None else ""
    host = f"[{host}]" if ":" in host else host
    return f"{SENTINEL}://{credentials}{host}:{port}/{where.db}"


class SentinelChannel(kombu_redis.SentinelChannel):
    """kombu's, which would ask a dead sentinel eleven times before the next."""

    sentinels: tuple[tuple[str, int], ...]
    sentinel_kwargs: dict[str, Any]
    master_name: str
    _connparams: Any

    connection_class = MasterConnection
    from_transport_options = (*kombu_redis.SentinelChannel.from_transport_options, "sentinels")

    def _sentinel_managed_pool(self, asynchronous: bool = False) -> SentinelConnectionPool:
        parameters = self._connparams(asynchronous)
        for of_the_first_sentinel in ("host", "port"):
            parameters.pop(of_the_first_sentinel, None)
        sentinels = Sentinels(self.sentinels, self.sentinel_kwargs)
        # kombu closes them with the pools.
        setattr(self, "_async_sentinel_manager" if asynchronous else "_sentinel_manager", sentinels)
        return SentinelConnectionPool(self.master_name, sentinels, **parameters)  # type: ignore[no-untyped-call]


class SentinelTransport(kombu_redis.SentinelTransport):
    """What kombu takes for `sentinel://`."""

    Channel = SentinelChannel


# kombu has no other way of making a transport known by its scheme; and Flower looks at the scheme.
TRANSPORT_ALIASES[SENTINEL] = f"{__name__}:{SentinelTransport.__name__}"
