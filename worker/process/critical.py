"""Threads that the process cannot do without: when one of them dies, so does the process, and says why.

A worker that lives on with a dead engine or publisher would keep its lease and its jobs for ever. Ended, its jobs
continue elsewhere and its supervisor starts it again.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

logger = logging.getLogger(__name__)

EXIT_BROKEN = 70
"""Exit status of a worker that found itself broken (EX_SOFTWARE)."""

LAST_ACTS_S = 2.0
"""What is done and said at the end has so long; whatever hangs then, the process ends."""

OnDeath = Callable[[str], object]
"""Called with the reason; ends the process."""

LastAct = Callable[[], object]


def leave(status: int) -> NoReturn:
    """End this process now: threads that are stuck and destructors of model libraries have no say in its status."""
    try:
        logging.shutdown()
        sys.stdout.flush()
    finally:  # even if nobody reads what we write
        os._exit(status)


def depart(status: int, *last_acts: LastAct) -> NoReturn:
    """Do the last there is to do, and end this process within `LAST_ACTS_S` in any case."""
    timer = threading.Timer(LAST_ACTS_S, os._exit, [status])
    timer.daemon = True
    timer.start()
    for act in last_acts:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - nothing may keep it from ending
            logger.warning("left undone at the end: %s", error)
    leave(status)


def end_process(reason: str, *last_acts: LastAct) -> NoReturn:
    """End this process because it is broken, and say why."""
    depart(EXIT_BROKEN, lambda: logger.critical("the worker ends itself: %s", reason), *last_acts)


class VitalThread(threading.Thread):
    """A thread whose failure ends the process."""

    def __init__(self, name: str, on_death: OnDeath = end_process) -> None:
        super().__init__(name=name, daemon=True)
        self._on_death = on_death

    def run(self) -> None:
        """Work until done; announce anything that ends it otherwise."""
        try:
            self.work()
        except BaseException as error:
            logger.critical("thread %s died", self.name, exc_info=error)
            self._on_death(f"its {self.name} thread died ({type(error).__name__})")

    def work(self) -> None:
        """What the thread does."""
        raise NotImplementedError
