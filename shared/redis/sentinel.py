"""Redis Sentinel: connections that always lead to the current master.

A connection asks the sentinels for the master each time it connects. It reconnects when the old master closes it, stops
answering, or rejects a write because it became a replica. To callers, a failover looks like any other outage.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any

from redis.backoff import NoBackoff
from redis.connection import BlockingConnectionPool, ConnectionPool
from redis.credentials import UsernamePasswordCredentialProvider
from redis.retry import Retry
from redis.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)

from shared.redis.urls import Login, SentinelUrl


class Credentials(UsernamePasswordCredentialProvider):
    """Credentials that are hidden in JSON: workers report their broker connection's parameters to Flower."""

    @classmethod
    def of(cls, login: Login) -> Credentials | None:
        """Return the credentials of a login; None if it has no password."""
        return None if login.password is None else cls(login.username, login.password)

    def __json__(self) -> str:
        return "**"


def sentinel_options(url: SentinelUrl, timeout_s: float) -> dict[str, Any]:
    """Return the options of connections to sentinels. Asking all of them takes at most `timeout_s`."""
    each_s = timeout_s / len(url.sentinels)
    options: dict[str, Any] = {"socket_timeout": each_s, "socket_connect_timeout": each_s}
    if credentials := Credentials.of(url.sentinel_login):
        options["credential_provider"] = credentials
    if url.tls is not None:
        options |= {"ssl": True, **url.tls.options()}
    return options


class Sentinels(Sentinel):
    """The sentinels of one master.

    Each sentinel is asked only once. By default redis-py would ask an unreachable one eleven times before the next.
    """

    def __init__(self, addresses: Iterable[tuple[str, int]], options: dict[str, Any]) -> None:
        sentinels = list(addresses)
        self._addresses = ", ".join(f"{host}:{port}" for host, port in sentinels)
        super().__init__(sentinels, sentinel_kwargs={**options, "retry": Retry(NoBackoff(), 0)})  # type: ignore[no-untyped-call]

    def discover_master(self, service_name: str) -> Any:
        """Return the master's host and port. The first sentinel that answers is asked first from then on."""
        # redis-py swaps two entries of its list, which is not thread-safe. So it works on a copy.
        snapshot = copy(self)
        snapshot.sentinels = list(self.sentinels)
        try:
            address = Sentinel.discover_master(snapshot, service_name)  # type: ignore[no-untyped-call]
        except MasterNotFoundError as error:  # its message contains representations of redis-py's objects
            raise MasterNotFoundError(f"no sentinel knows the master {service_name!r}: {self._addresses}") from error
        self.sentinels = snapshot.sentinels
        return address


class MasterConnection(SentinelManagedConnection):
    """A connection that asks the sentinels each time it connects.

    redis-py asks only when a pool hands out a connection. A retried call would reach the old master again, and its
    writes would be lost if that had restarted and did not yet know that it was replaced.
    """

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send a command; connect to the current master first if there is no connection."""
        if not self._sock:
            self.connect()  # type: ignore[no-untyped-call]
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]


class MasterTlsConnection(MasterConnection, SentinelManagedSSLConnection):
    """The same with TLS."""


class MasterPool(SentinelConnectionPool, BlockingConnectionPool):
    """A bounded pool of connections to the master; callers wait while all connections are in use."""

    def owns_connection(self, connection: Any) -> bool:
        """Whether a connection belongs to this pool, whatever master it was connected to.

        redis-py drops connections to an old master, but its blocking pool keeps listing them, so memory would grow
        during an outage. Here they stay in the pool and reconnect to the current master.
        """
        return bool(ConnectionPool.owns_connection(self, connection))

    def release(self, connection: Any) -> None:
        """Return a connection to the pool; disconnect it if the master has changed."""
        if self.master_address != (connection.host, connection.port):
            connection.disconnect()
        super().release(connection)  # type: ignore[no-untyped-call]

    def disconnect(self, inuse_connections: bool = True) -> None:
        """Disconnect idle connections; with `inuse_connections` all connections and those to sentinels."""
        super().disconnect(inuse_connections)
        if inuse_connections:
            self.sentinel_manager.close()


def master_pool(url: SentinelUrl, timeout_s: float, **options: Any) -> MasterPool:
    """Create a pool of connections to a master; `options` are those of `redis.BlockingConnectionPool`."""
    tls = {} if url.tls is None else url.tls.options()
    return MasterPool(  # type: ignore[no-untyped-call]
        url.master,
        Sentinels(url.sentinels, sentinel_options(url, timeout_s)),
        db=url.db,
        connection_class=MasterConnection if url.tls is None else MasterTlsConnection,
        username=url.login.username,
        password=url.login.password,
        **tls,
        **options,
    )
