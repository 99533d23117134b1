"""Redis under Sentinel: connections that are always the present master's.

A connection asks the sentinels whenever it connects. It connects anew after the old master closed it, fell silent or
refused a write as a replica, so a failover is for its user what any outage is.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any

from redis.backoff import NoBackoff
from redis.connection import BlockingConnectionPool, ConnectionPool
from redis.credentials import UsernamePasswordCredentialProvider
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool, SentinelManagedConnection

from shared.queue.redis_url import SentinelUrl


class _Credentials(UsernamePasswordCredentialProvider):
    """A login that is not shown: workers report the parameters of their broker connection to Flower."""

    def __json__(self) -> str:
        return "**"


def asking_options(where: SentinelUrl, timeout_s: float) -> dict[str, Any]:
    """How to connect to a sentinel. To ask all of them takes no longer than one call may."""
    each_s = timeout_s / len(where.sentinels)
    options: dict[str, Any] = {"socket_timeout": each_s, "socket_connect_timeout": each_s}
    login = where.sentinel_login
    if login.password is not None:
        options["credential_provider"] = _Credentials(login.username, login.password)
    return options


class Sentinels(Sentinel):
    """Those of one master.

    Each is asked once: where redis-py would ask a dead one eleven times, the next one knows.
    """

    def __init__(self, addresses: Iterable[tuple[str, int]], options: dict[str, Any]) -> None:
        asked = list(addresses)
        self._asked = "any of the sentinels " + ", ".join(f"{host}:{port}" for host, port in asked)
        super().__init__(asked, sentinel_kwargs={**options, "retry": Retry(NoBackoff(), 0)})  # type: ignore[no-untyped-call]

    def discover_master(self, service_name: str) -> Any:
        """The master's host and port, from the first that knows; that one is asked first from then on."""
        # redis-py swaps two entries of its list: two threads at once could lose one.
        turn = copy(self)
        turn.sentinels = list(self.sentinels)
        try:
            address = Sentinel.discover_master(turn, service_name)  # type: ignore[no-untyped-call]
        except MasterNotFoundError as error:  # its words are redis-py's objects
            raise MasterNotFoundError(f"no master {service_name!r} is known to {self._asked}") from error
        self.sentinels = turn.sentinels
        return address


class MasterConnection(SentinelManagedConnection):
    """A connection that asks the sentinels each time it connects.

    redis-py's asks only when a pool hands it out: a call that is sent again would go to the old master again, and be
    lost there if that had come back and did not know yet.
    """

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send, to the present master if it is not connected."""
        if not self._sock:
            self.connect()  # type: ignore[no-untyped-call]
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]


class MasterPool(SentinelConnectionPool, BlockingConnectionPool):
    """A bounded pool of connections to the master; who finds all of them in use waits."""

    def owns_connection(self, connection: Any) -> bool:
        """Also an old master's or one that never came about: it will connect anew, to the present master.

        redis-py drops those, but a blocking pool goes on to list them: an outage would fill the memory.
        """
        return bool(ConnectionPool.owns_connection(self, connection))

    def release(self, connection: Any) -> None:
        """Take a connection back."""
        if self.master_address != (connection.host, connection.port):
            connection.disconnect()
        super().release(connection)  # type: ignore[no-untyped-call]

    def disconnect(self, inuse_connections: bool = True) -> None:
        """Disconnect all, the sentinels too, or only those that nobody uses."""
        super().disconnect(inuse_connections)
        if inuse_connections:
            self.sentinel_manager.close()


def master_pool(where: SentinelUrl, timeout_s: float, **options: Any) -> MasterPool:
    """A pool of connections to a master; `options` as for `redis.BlockingConnectionPool`."""
    return MasterPool(  # type: ignore[no-untyped-call]
        where.master,
        Sentinels(where.sentinels, asking_options(where, timeout_s)),
        db=where.db,
        connection_class=MasterConnection,
        username=where.login.username,
        password=where.login.password,
        **options,
    )
