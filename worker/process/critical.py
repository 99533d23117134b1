"""Critical threads: when one of them dies, the process ends and logs the reason.

A worker with a dead engine or publisher would keep its lease and its jobs forever. When the process ends instead, its
jobs continue on other workers, and its supervisor starts it again.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from worker.process.exits import EXIT_BROKEN

logger = logging.getLogger(__name__)

FINAL_STEPS_S = 2.0
"""Time limit for the final steps of a process. After that it ends even if a step hangs."""

OnDeath = Callable[[str], object]
"""Called with the reason; ends the process."""

FinalStep = Callable[[], object]


def exit_now(status: int) -> NoReturn:
    """End this process at once: no wait for stuck threads, no destructors of model libraries."""
    try:
        logging.shutdown()
        sys.stdout.flush()
    finally:  # the reader of stdout may have died
        os._exit(status)


def exit_after(status: int, *final_steps: FinalStep) -> NoReturn:
    """Run the final steps, then end this process, at the latest after `FINAL_STEPS_S`."""
    timer = threading.Timer(FINAL_STEPS_S, os._exit, [status])
    timer.daemon = True
    timer.start()
    for step in final_steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - no error may keep the process from ending
            logger.warning("final_step_failed", extra={"reason": str(error)})
    exit_now(status)


def end_process(reason: str, *final_steps: FinalStep) -> NoReturn:
    """Log why this process is broken, and end it."""
    exit_after(EXIT_BROKEN, lambda: logger.critical("worker_ends", extra={"reason": reason}), *final_steps)


class CriticalThread(threading.Thread):
    """A thread whose failure ends the process."""

    def __init__(self, name: str, on_death: OnDeath = end_process) -> None:
        super().__init__(name=name, daemon=True)
        self._on_death = on_death

    def run(self) -> None:
        """Run `work`; report any exception that ends it."""
        try:
            self.work()
        except BaseException as error:
            logger.critical("thread_died", exc_info=error, extra={"critical_thread": self.name})
            self._on_death(f"its {self.name} thread died ({type(error).__name__})")

    def work(self) -> None:
        """Do the thread's work; return when it is done."""
        raise NotImplementedError
