"""A RabbitMQ server of Debian's package that can be killed and restarted."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Final

import kombu
from kombu.exceptions import OperationalError

from scripts.stack.ports import free_port
from tests.support.waiting import eventually

_PROGRAM: Final = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""Not the script in /usr/sbin, which accepts only some users and does not pass the environment on."""
_START_WITHIN_S: Final = 120.0


def installed() -> bool:
    """Whether this machine has RabbitMQ."""
    return _PROGRAM.exists()


class RabbitMq:
    """One node with its own port mapper (epmd), which RabbitMQ would otherwise leave behind.

    Attributes:
        url: the URL for BROKER_URL.
    """

    def __init__(self, home: Path) -> None:
        port, mapper_port = free_port(), free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{port}//"
        self.home = home
        home.mkdir()
        self._env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),  # of the cookie
            "ERL_EPMD_PORT": str(mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"mlxq-{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_PID_FILE": str(home / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
        }
        self._mapper = subprocess.Popen(["epmd", "-port", str(mapper_port)], env=self._env)
        self.start()

    def start(self) -> None:
        """Start the node and wait until it accepts connections."""
        with (self.home / "out").open("ab") as out:
            self.process = subprocess.Popen(
                [str(_PROGRAM)], env=self._env, cwd=self.home, stdout=out, stderr=out, start_new_session=True
            )
        eventually(self._answers, "RabbitMQ answers", _START_WITHIN_S)

    def connect(self) -> kombu.Connection:
        """Return a connection that does not retry."""
        return kombu.Connection(self.url, connect_timeout=2)

    def kill(self) -> None:
        """Kill the node with its helper processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Kill everything."""
        self.kill()
        self._mapper.kill()
        self._mapper.wait()

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.home / "out").read_text()
        with suppress(OperationalError, OSError), self.connect() as connection:
            connection.connect()
            return True
        return False
