"""The supervisord of a stack that is measured, asked over its own socket."""

from __future__ import annotations

import xmlrpc.client
from pathlib import Path
from typing import Any, Final

from supervisor.xmlrpc import SupervisorTransport

_SOCKET: Final = "run/ctl.sock"


class Supervised:
    """Stops and starts the programs of the stack in a data folder."""

    def __init__(self, data_dir: Path) -> None:
        transport = SupervisorTransport(None, None, f"unix://{data_dir / _SOCKET}")
        self._rpc: Any = xmlrpc.client.ServerProxy("http://localhost", transport=transport)

    def stop(self, program: str) -> None:
        """Stop all its processes in an orderly way and wait for their ends."""
        self._rpc.supervisor.stopProcessGroup(program)

    def start(self, program: str) -> None:
        """Start all its processes; returns at once."""
        self._rpc.supervisor.startProcessGroup(program, False)
