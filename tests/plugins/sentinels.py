"""A master, its replica and the sentinels that watch both, as processes of the real server."""

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


class Watched:
    """Two servers and three sentinels, of which two must agree that the master is gone."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.servers: list[Server] = []
        self.sentinels: list[Server] = []

    def start(self) -> None:
        # A replica that has nothing to do yet is to be in step at once.
        lines = (f'primaryauth "{PASSWORD}"', "appendonly yes", "repl-diskless-sync-delay 0")
        self.servers.append(Server(self._home / "a", PASSWORD, *lines))
        self.servers.append(Server(self._home / "b", PASSWORD, *lines, f"replicaof 127.0.0.1 {self.servers[0].port}"))
        eventually(self.in_step, "the replica is in step")
        watch = (
            f"sentinel monitor {NAME} 127.0.0.1 {self.servers[0].port} 2",
            f'sentinel auth-pass {NAME} "{PASSWORD}"',
            f'sentinel sentinel-pass "{SENTINEL_PASSWORD}"',
            f"sentinel down-after-milliseconds {NAME} 500",
            f"sentinel failover-timeout {NAME} 2000",
        )
        for i in range(3):
            self.sentinels.append(Server(self._home / f"s{i}", SENTINEL_PASSWORD, *watch, sentinel=True))
        eventually(lambda: all(map(_sees_all, self.sentinels)), "the sentinels know each other and the replica")

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"sentinel://:{LOGIN}@{hosts}/3?master={NAME}&sentinel_password={SENTINEL_LOGIN}"

    @property
    def master(self) -> Server:
        """The server that clients are told of."""
        port = int(_seen_by(next(each for each in self.sentinels if each.process.poll() is None))["port"])
        return next(server for server in self.servers if server.port == port)

    def in_step(self) -> bool:
        """Whether a replica follows."""
        return any(
            server.client.info("replication").get("master_link_status") == "up"
            for server in self.servers
            if server.process.poll() is None
        )

    def close(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.close()


def _seen_by(sentinel: Server) -> dict[str, Any]:
    seen: dict[str, Any] = sentinel.client.sentinel_master(NAME)  # type: ignore[no-untyped-call]
    return seen


def _sees_all(sentinel: Server) -> bool:
    seen = _seen_by(sentinel)
    return (int(seen["num-slaves"]), int(seen["num-other-sentinels"])) == (1, 2)


@pytest.fixture
def watched() -> Iterator[Watched]:
    with tempfile.TemporaryDirectory(prefix="mlxq-", ignore_cleanup_errors=True) as folder:
        watched = Watched(Path(folder))
        try:
            watched.start()
            yield watched
        finally:
            watched.close()
