"""supervisord as a child process, controlled over its socket."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import xmlrpc.client
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import Faults

_CALL_TIMEOUT_S = 10.0
_CONNECTION_ERRORS = (OSError, HTTPException, xmlrpc.client.ProtocolError)


class SupervisorUnavailable(Exception):
    """supervisord does not answer."""


@dataclass(frozen=True, slots=True)
class Child:
    """A supervised process and its state in supervisord."""

    program: str
    name: str
    state: str
    pid: int
    log: Path

    @property
    def stopped_for_good(self) -> bool:
        """Whether supervisord will not restart it."""
        return self.state in ("EXITED", "FATAL")

    @property
    def failing(self) -> bool:
        """Whether it has exited and has not run for `startsecs` since."""
        return self.stopped_for_good or self.state == "BACKOFF"


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_CALL_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _UnixTransport(xmlrpc.client.Transport):
    """XML-RPC over a Unix socket, with a time limit that supervisor's own transport lacks."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> HTTPConnection:  # noqa: ARG002 - the path is the address
        """Return the connection of the last call, or a new one."""
        connection = self._connection[1] or _UnixConnection(self._path)
        self._connection = "", connection
        return connection


class Supervisor:
    """One supervisord, in its own session so that Ctrl-C reaches serve but not the children."""

    def __init__(self, conf: Path, control: Path, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-P", "-m", "supervisor.supervisord", "-c", str(conf)]
        control.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # Not a file: supervisord reports a full disk here, and exits if that write fails.
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._output: deque[str] = deque(maxlen=1)
        self._reader = threading.Thread(target=self._read_output, name="supervisord", daemon=True)
        self._reader.start()
        self._control = control
        self._transport = _UnixTransport(control)
        self._rpc = xmlrpc.client.ServerProxy("http://localhost", transport=self._transport)

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    @property
    def listening(self) -> bool:
        """Whether its socket accepts connections."""
        with socket.socket(socket.AF_UNIX) as probe:  # the file exists before the socket listens
            return probe.connect_ex(str(self._control)) == 0

    @property
    def last_output(self) -> str:
        """The last line on its stderr; empty if there was no problem."""
        if not self.alive:
            self._reader.join(1.0)  # read the rest of the output
        return "".join(self._output)

    def start(self, program: str) -> None:
        """Start all processes of a program that are not running."""
        self._call("startProcessGroup", program, False)

    def stop(self, program: str) -> None:
        """Stop all processes of a program and wait until they have ended."""
        self._call("stopProcessGroup", program, True)

    def start_one(self, child: Child) -> None:
        """Start one process that supervisord no longer restarts."""
        # A fault means that it already runs or cannot be started; its next state shows which.
        with suppress(xmlrpc.client.Fault):
            self._call("startProcess", f"{child.program}:{child.name}", False)

    def children(self) -> list[Child]:
        """Return all processes, running or not."""
        return [
            Child(info["group"], info["name"], info["statename"], info["pid"], Path(info["stdout_logfile"]))
            for info in self._call("getAllProcessInfo")
        ]

    def shutdown(self) -> None:
        """Begin the shutdown: supervisord stops the programs, the last one first, and then exits."""
        self._process.terminate()

    def close(self) -> None:
        """Kill supervisord if it is still running, and release the connections to it."""
        self._process.kill()
        self._process.wait()
        self._transport.close()
        self._reader.join(_CALL_TIMEOUT_S)
        if self._process.stderr and not self._reader.is_alive():
            self._process.stderr.close()

    def _read_output(self) -> None:
        for line in self._process.stderr or ():
            if line.strip():
                self._output.append(line.strip())

    def _call(self, method: str, *arguments: object) -> Any:
        try:
            return getattr(self._rpc.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == Faults.SHUTDOWN_STATE:  # another process has begun its shutdown
                raise SupervisorUnavailable(fault.faultString) from fault
            raise
        except _CONNECTION_ERRORS as error:
            raise SupervisorUnavailable(str(error)) from error
