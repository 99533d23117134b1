"""What ties a worker process to the launcher that started it: it drains and ends when the launcher has died."""

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

VARIABLE: Final = "MLXQ_LAUNCH"
_PR_SET_PDEATHSIG: Final = 1
_LOOK_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a worker process.

    Attributes:
        launcher: pid of the launcher; 0: the process was started without one.
        token: distinguishes this start from others; part of the breadcrumb's name.
    """

    launcher: int
    token: str

    @classmethod
    def new(cls) -> Self:
        """A start by this process."""
        return cls(os.getpid(), secrets.token_hex(4))

    @classmethod
    def present(cls) -> Self:
        """The start of this process, as its launcher says in the environment."""
        launcher, _, token = os.environ.get(VARIABLE, "").partition(":")
        return cls(int(launcher), token) if token else cls(0, secrets.token_hex(4))

    def to_variable(self) -> str:
        """The environment variable's value."""
        return f"{self.launcher}:{self.token}"


def end_with_launcher(launch: Launch) -> None:
    """Send this process SIGTERM when its launcher dies. Call it in the main thread, before anything is held."""
    if not launch.launcher:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != launch.launcher:  # it died before
            os.kill(os.getpid(), signal.SIGTERM)
    else:
        threading.Thread(target=_watch, args=(launch.launcher,), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)
