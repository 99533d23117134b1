"""Stop signals, handled only at safe points."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequested(BaseException):
    """A stop signal arrived. Not an Exception, so that no error handler on the way catches it."""


class StopSignals:
    """Turns SIGINT, SIGTERM and SIGHUP into `StopRequested`, which only `pause` raises."""

    def __init__(self) -> None:
        self._stop_requested = False
        self.hung_up = False
        """Whether the terminal was closed: writing to it would fail."""
        self._wakeup, writer = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(writer, False)
        # The pipe interrupts `select` in `pause`; Python resumes it after a handler that does not raise.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _STOP_SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if not (number == signal.SIGHUP and ignored):  # started with nohup
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._stop_requested = True
        self.hung_up |= number == signal.SIGHUP

    def pause(self, seconds: float) -> None:
        """Sleep.

        Raises:
            StopRequested: a signal arrived, now or since the last call. The next call sleeps again.
        """
        if not self._stop_requested and select.select([self._wakeup], [], [], seconds)[0]:
            os.read(self._wakeup, 4096)
        if self._stop_requested:
            self._stop_requested = False
            raise StopRequested

    def ignore(self) -> None:
        """Ignore stop signals from now on, so that nothing interrupts the cleanup."""
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
