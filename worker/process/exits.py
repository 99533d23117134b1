"""Exit statuses of worker processes, and their description for logs and error messages."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Final

EXIT_CONFIG: Final = 78
"""No model loads, or Redis is unsuitable (EX_CONFIG). A supervisor should not restart the process."""
EXIT_BROKEN: Final = 70
"""The worker found itself broken (EX_SOFTWARE)."""


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of a worker process.

    Attributes:
        status: as `subprocess` reports it: negative if a signal with that number ended the process.
        uptime_s: how long the process lived.
        oom_kills: OOM kills in its control group during that time; None if unknown.
    """

    status: int
    uptime_s: float | None = None
    oom_kills: int | None = None
    pid: int = 0

    @property
    def abnormal(self) -> bool:
        """Whether the process ended without handing its jobs back."""
        return self.status not in (0, EXIT_CONFIG)

    def describe(self) -> str:
        """Return a phrase for logs and error messages."""
        if self.status == EXIT_BROKEN:
            description = f"status {EXIT_BROKEN} (it found itself broken)"
        elif self.status >= 0:
            description = f"status {self.status}"
        else:
            description = _signal_name(-self.status)
        return f"{description}, after an OOM kill in its control group" if self.oom_kills else description


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
