"""supervisord, started as a child and spoken to over its socket."""

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
from http.client import HTTPException
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import Faults, SupervisorTransport

_CALL_S = 10.0
_GONE = (OSError, HTTPException, xmlrpc.client.ProtocolError)


class SupervisorGone(Exception):
    """supervisord does not answer."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process under supervision, as supervisord sees it now."""

    program: str
    name: str
    state: str
    pid: int
    log: Path

    @property
    def given_up(self) -> bool:
        """Whether supervisord will not start it again by itself."""
        return self.state in ("EXITED", "FATAL")

    @property
    def failing(self) -> bool:
        """Whether it has died and not been up for a while since."""
        return self.given_up or self.state == "BACKOFF"


class Supervisor:
    """One supervisord. It runs in a session of its own, so that a Ctrl-C reaches serve and not the children."""

    def __init__(self, conf: Path, control: Path, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-P", "-m", "supervisor.supervisord", "-c", str(conf)]
        control.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # Not a file: it says here that its disk is full, and would end if it could not.
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._said: deque[str] = deque(maxlen=1)
        self._listener = threading.Thread(target=self._listen, name="supervisord", daemon=True)
        self._listener.start()
        self._control = control
        # The transport has no time limit of its own, and a supervisord that hangs must not hang us.
        socket.setdefaulttimeout(_CALL_S)
        transport = SupervisorTransport(None, None, f"unix://{control}")
        self._rpc = xmlrpc.client.ServerProxy("http://localhost", transport=transport)

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    @property
    def listening(self) -> bool:
        """Whether it can be spoken to."""
        with socket.socket(socket.AF_UNIX) as probe:  # the file is there a moment before anybody listens
            return probe.connect_ex(str(self._control)) == 0

    @property
    def last_words(self) -> str:
        """What it said last, which is nothing unless something is wrong."""
        if not self.alive:
            self._listener.join(1.0)  # until what it said at its end has come
        return "".join(self._said)

    def start(self, program: str) -> None:
        """Start all processes of a program that do not run."""
        self._call("startProcessGroup", program, False)

    def stop(self, program: str) -> None:
        """Stop all processes of a program and wait for their ends."""
        self._call("stopProcessGroup", program, True)

    def start_one(self, child: Child) -> None:
        """Start a process that was given up."""
        # A refusal means that it runs already, or cannot be run at all: its next state tells.
        with suppress(xmlrpc.client.Fault):
            self._call("startProcess", f"{child.program}:{child.name}", False)

    def children(self) -> list[Child]:
        """All processes, running or not."""
        return [
            Child(each["group"], each["name"], each["statename"], each["pid"], Path(each["stdout_logfile"]))
            for each in self._call("getAllProcessInfo")
        ]

    def shutdown(self) -> None:
        """Ask for the orderly end: supervisord stops the programs, last started first, then itself."""
        self._process.terminate()

    def _listen(self) -> None:
        for line in self._process.stderr or ():
            self._said.extend([line.strip()] * bool(line.strip()))

    def _call(self, method: str, *arguments: object) -> Any:
        try:
            return getattr(self._rpc.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == Faults.SHUTDOWN_STATE:  # somebody told it to end; it listens to nothing else now
                raise SupervisorGone(fault.faultString) from fault
            raise
        except _GONE as error:
            raise SupervisorGone(str(error)) from error
