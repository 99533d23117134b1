"""Being asked to stop, noticed at safe points only."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequested(BaseException):
    """Somebody wants the stack to end. Not an Exception: no error handling on the way may swallow it."""


class StopSignals:
    """Turns SIGINT, SIGTERM and SIGHUP into `StopRequested`, raised from `pause` and from nowhere else."""

    def __init__(self) -> None:
        self._asked = False
        self.hung_up = False
        """Whether the terminal has gone away: writing to it would fail."""
        self._wakeup, writer = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(writer, False)
        # The pipe ends a pause at once; a handler alone would let the sleep go on.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _STOP:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if not (number == signal.SIGHUP and ignored):  # nohup stays nohup
                signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self._asked = True
        self.hung_up |= number == signal.SIGHUP

    def pause(self, seconds: float) -> None:
        """Sleep.

        Raises:
            StopRequested: a signal came, now or earlier. The next pause sleeps again, until the next signal.
        """
        if not self._asked and select.select([self._wakeup], [], [], seconds)[0]:
            os.read(self._wakeup, 4096)
        if self._asked:
            self._asked = False
            raise StopRequested

    def ignore(self) -> None:
        """Nothing interrupts what is left to do."""
        for number in _STOP:
            signal.signal(number, signal.SIG_IGN)
