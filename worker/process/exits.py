"""How worker processes end."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Final

EXIT_CONFIG: Final = 78
"""Exit status when no model loads (EX_CONFIG): starting again would not help."""
EXIT_BROKEN: Final = 70
"""Exit status of a worker that found itself broken (EX_SOFTWARE)."""


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of a worker process.

    Attributes:
        status: as `subprocess` gives it: the number of the signal that ended it is negative.
        uptime_s: how long it lived.
        oom_kills: processes that the kernel killed for want of memory in its cgroup meanwhile; None: unknown.
    """

    status: int
    uptime_s: float | None = None
    oom_kills: int | None = None
    pid: int = 0

    @property
    def abnormal(self) -> bool:
        """Whether it ended without having given up what it held."""
        return self.status not in (0, EXIT_CONFIG)

    def describe(self) -> str:
        """How it ended, in words."""
        if self.status == EXIT_BROKEN:
            how = "status 70, it found itself broken"
        elif self.status >= 0:
            how = f"status {self.status}"
        else:
            how = _signal_name(-self.status)
        return f"{how}, and the kernel's OOM killer was at work" if self.oom_kills else how


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
