"""Ties a worker process to its launcher: when the launcher dies, the process drains and ends."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Final, Self

LAUNCH_VARIABLE: Final = "MLXQ_LAUNCH"
"""Environment variable by which a launcher passes a `Launch` to its child."""
_PR_SET_PDEATHSIG: Final = 1
_POLL_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a worker process.

    Attributes:
        launcher: pid of the launcher; 0 if the process was started without one.
        token: unique to this start; part of the breadcrumb's file name.
    """

    launcher: int
    token: str

    @classmethod
    def new(cls) -> Self:
        """Return a start with this process as launcher."""
        return cls(os.getpid(), secrets.token_hex(4))

    @classmethod
    def current(cls) -> Self:
        """Return the start of this process, from its environment."""
        launcher, _, token = os.environ.get(LAUNCH_VARIABLE, "").partition(":")
        return cls(int(launcher), token) if token else cls(0, secrets.token_hex(4))

    def to_variable(self) -> str:
        """Return the value of the environment variable."""
        return f"{self.launcher}:{self.token}"


def end_with_launcher(launch: Launch) -> None:
    """Arrange that this process gets SIGTERM when its launcher dies.

    Call it in the main thread, before the process claims jobs or names.
    """
    if not launch.launcher:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != launch.launcher:  # the launcher died before the call
            os.kill(os.getpid(), signal.SIGTERM)
    else:
        threading.Thread(target=_watch, args=(launch.launcher,), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
