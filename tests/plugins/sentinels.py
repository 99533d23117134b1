"""A Redis master, a replica and three sentinels, as processes of the real server."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import Server
from tests.support.waiting import eventually

NAME = "jobs"
PASSWORD = "p@ss/w:rd;?"
SENTINEL_PASSWORD = "se&cret#1"
LOGIN = "p%40ss%2Fw%3Ard%3B%3F"
SENTINEL_LOGIN = "se%26cret%231"


class SentinelSetup:
    """Two servers and three sentinels. Two sentinels must agree before a failover."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.servers: list[Server] = []
        self.sentinels: list[Server] = []

    def start(self) -> None:
        # Without a delay, so that the replica is in sync at once.
        lines = (f'primaryauth "{PASSWORD}"', "appendonly yes", "repl-diskless-sync-delay 0")
        self.servers.append(Server(self._home / "a", PASSWORD, *lines))
        self.servers.append(Server(self._home / "b", PASSWORD, *lines, f"replicaof 127.0.0.1 {self.servers[0].port}"))
        eventually(self.in_sync, "the replica is in sync")
        watch = (
            f"sentinel monitor {NAME} 127.0.0.1 {self.servers[0].port} 2",
            f'sentinel auth-pass {NAME} "{PASSWORD}"',
            f'sentinel sentinel-pass "{SENTINEL_PASSWORD}"',
            f"sentinel down-after-milliseconds {NAME} 500",
            f"sentinel failover-timeout {NAME} 2000",
        )
        for i in range(3):
            self.sentinels.append(Server(self._home / f"s{i}", SENTINEL_PASSWORD, *watch, sentinel=True))
        eventually(lambda: all(map(_knows_all, self.sentinels)), "the sentinels know each other and the replica")

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"sentinel://:{LOGIN}@{hosts}/3?master={NAME}&sentinel_password={SENTINEL_LOGIN}"

    @property
    def master(self) -> Server:
        """The current master according to the sentinels."""
        port = int(_master_state(next(each for each in self.sentinels if each.process.poll() is None))["port"])
        return next(server for server in self.servers if server.port == port)

    def in_sync(self) -> bool:
        """Whether a replica is connected to its master."""
        return any(
            server.client.info("replication").get("master_link_status") == "up"
            for server in self.servers
            if server.process.poll() is None
        )

    def close(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.close()


def _master_state(sentinel: Server) -> dict[str, Any]:
    state: dict[str, Any] = sentinel.client.sentinel_master(NAME)  # type: ignore[no-untyped-call]
    return state


def _knows_all(sentinel: Server) -> bool:
    state = _master_state(sentinel)
    return (int(state["num-slaves"]), int(state["num-other-sentinels"])) == (1, 2)


@pytest.fixture
def sentinel_setup() -> Iterator[SentinelSetup]:
    with tempfile.TemporaryDirectory(prefix="mlxq-", ignore_cleanup_errors=True) as folder:
        sentinel_setup = SentinelSetup(Path(folder))
        try:
            sentinel_setup.start()
            yield sentinel_setup
        finally:
            sentinel_setup.close()
