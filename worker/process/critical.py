"""Critical threads: when one of them dies, the process ends and logs why.

A worker that lived on with a dead engine or publisher would keep its lease and its jobs forever. When it ends, its jobs
continue elsewhere, and its supervisor starts it again.
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
"""Bound on the final steps of a process; whatever hangs then, it ends."""

OnDeath = Callable[[str], object]
"""Called with the reason; ends the process."""

FinalStep = Callable[[], object]


def exit_now(status: int) -> NoReturn:
    """End this process with this status, whatever stuck threads and destructors of model libraries do."""
    try:
        logging.shutdown()
        sys.stdout.flush()
    finally:  # even if nobody reads what we write
        os._exit(status)


def exit_after(status: int, *final_steps: FinalStep) -> NoReturn:
    """Take the final steps, and end this process within `FINAL_STEPS_S` in any case."""
    timer = threading.Timer(FINAL_STEPS_S, os._exit, [status])
    timer.daemon = True
    timer.start()
    for step in final_steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - nothing may keep it from ending
            logger.warning("final_step_failed", extra={"reason": str(error)})
    exit_now(status)


def end_process(reason: str, *final_steps: FinalStep) -> NoReturn:
    """End this process because it is broken, and log why."""
    exit_after(EXIT_BROKEN, lambda: logger.critical("worker_ends", extra={"reason": reason}), *final_steps)


class CriticalThread(threading.Thread):
    """A thread whose failure ends the process."""

    def __init__(self, name: str, on_death: OnDeath = end_process) -> None:
        super().__init__(name=name, daemon=True)
        self._on_death = on_death

    def run(self) -> None:
        """Work until done; report anything that ends the thread otherwise."""
        try:
            self.work()
        except BaseException as error:
            logger.critical("thread_died", exc_info=error, extra={"critical_thread": self.name})
            self._on_death(f"its {self.name} thread died ({type(error).__name__})")

    def work(self) -> None:
        """What the thread does."""
        raise NotImplementedError
