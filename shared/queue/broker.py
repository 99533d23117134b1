"""Celery's broker: BROKER_URL in kombu's format, and transports for Redis and Redis Sentinel.

kombu receives URLs without user name and password, because it shows parts of them in statistics and logs. The
transports receive the credentials as an object that hides them. With Sentinel, they use the classes of
`shared.redis.sentinel`, so the broker and the queue fail over in the same way.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from redis.sentinel import SentinelConnectionPool

from shared.redis.sentinel import Credentials, MasterConnection, MasterTlsConnection, Sentinels, sentinel_options
from shared.redis.urls import SENTINEL, RedisUrl, SentinelUrl, is_redis, parse

HEALTH_CHECK_S: Final = 5
"""Seconds after which a connection to a server that stopped answering is closed."""


def kombu_url(url: str) -> str:
    """Convert a broker URL to kombu's format, without credentials. URLs of other brokers stay as they are."""
    if not is_redis(url):
        return url
    parsed = parse(url)
    if isinstance(parsed, SentinelUrl):
        # kombu also accepts a list of URLs, but in an outage it cycles through URLs that all mean the same. So the
        # other sentinels are passed as a transport option.
        (host, port), scheme = parsed.sentinels[0], SENTINEL
    elif parsed.path:
        db = f"?virtual_host={parsed.db}" if parsed.db else ""
        return f"redis+socket://{quote(parsed.path)}{db}"
    else:
        host, port, scheme = parsed.host, parsed.port, "redis" if parsed.tls is None else "rediss"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/{parsed.db}"


def transport_options(url: str, timeout_s: float) -> dict[str, Any]:
    """Return the transport options that belong to a broker URL."""
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "health_check_interval": HEALTH_CHECK_S,
    }
    return {**options, **_redis_options(parse(url), timeout_s)} if is_redis(url) else options


def tls_options(url: str) -> dict[str, Any] | None:
    """Return Celery's `broker_use_ssl` for a broker URL. Without it, kombu accepts any certificate."""
    tls = parse(url).tls if is_redis(url) else None
    return None if tls is None else tls.options()


def _redis_options(url: RedisUrl, timeout_s: float) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if credentials := Credentials.of(url.login):
        options["credentials"] = credentials
    if isinstance(url, SentinelUrl):
        options["master_name"] = url.master
        options["sentinels"] = url.sentinels
        options["sentinel_kwargs"] = sentinel_options(url, timeout_s)
    return options


class _ClosingChannel(kombu_redis.Channel):
    """kombu's channel, which also closes its connections if Redis is away.

    kombu first finishes reading and deletes the channel's queues. If that fails, it leaves the connections open.
    """

    def close(self) -> None:
        """Close the channel."""
        try:
            super().close()
        except self.connection_errors:  # type: ignore[attr-defined]  # the stubs lack it
            self._in_poll = False
            self._fanout_queues.clear()  # type: ignore[attr-defined]  # when the process connects again, it declares the same queues
            super().close()


class RedisChannel(_ClosingChannel):
    """kombu's channel, with credentials that no statistics show."""

    credentials: Credentials | None = None

    from_transport_options = (*kombu_redis.Channel.from_transport_options, "credentials")

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        return _with_credentials(super()._connparams(asynchronous), self.credentials)  # type: ignore[misc]


class SentinelChannel(_ClosingChannel, kombu_redis.SentinelChannel):
    """kombu's channel, with `Sentinels`: redis-py's class asks an unreachable sentinel eleven times."""

    credentials: Credentials | None = None
    sentinels: tuple[tuple[str, int], ...]
    sentinel_kwargs: dict[str, Any]
    master_name: str

    connection_class = MasterConnection
    connection_class_ssl = MasterTlsConnection
    from_transport_options = (*kombu_redis.SentinelChannel.from_transport_options, "credentials", "sentinels")

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        return _with_credentials(super()._connparams(asynchronous), self.credentials)  # type: ignore[misc]

    def _sentinel_managed_pool(self, asynchronous: bool = False) -> SentinelConnectionPool:
        parameters = self._connparams(asynchronous)
        for name in ("host", "port"):  # of the first sentinel
            parameters.pop(name, None)
        sentinels = Sentinels(self.sentinels, self.sentinel_kwargs)
        # kombu closes these attributes together with the pools.
        setattr(self, "_async_sentinel_manager" if asynchronous else "_sentinel_manager", sentinels)
        return SentinelConnectionPool(self.master_name, sentinels, **parameters)  # type: ignore[no-untyped-call]


class RedisTransport(kombu_redis.Transport):
    """The transport for the URLs of Redis servers."""

    Channel = RedisChannel


class SentinelTransport(kombu_redis.SentinelTransport):
    """The transport for `sentinel://` URLs."""

    Channel = SentinelChannel


def _with_credentials(parameters: dict[str, Any], credentials: Credentials | None) -> dict[str, Any]:
    for name in ("username", "password"):
        parameters.pop(name, None)
    return parameters if credentials is None else {**parameters, "credential_provider": credentials}


# kombu has no other way to register a transport for a scheme, and Flower depends on the scheme.
for scheme in ("redis", "rediss"):
    TRANSPORT_ALIASES[scheme] = f"{__name__}:{RedisTransport.__name__}"
TRANSPORT_ALIASES[SENTINEL] = f"{__name__}:{SentinelTransport.__name__}"
