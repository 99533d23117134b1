"""What nobody asks for and somebody must do all the time: lost jobs, late ones, lost tickets, missing models.

Every API process does it; the scripts see to it that many at once do no harm.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import redis
from kombu.exceptions import OperationalError

from shared.queue.claims import Reaper, Waiting
from shared.queue.wakeups import TicketOffice

log = logging.getLogger(__name__)

_PAUSE_S: Final = 3.0
"""After tickets could not be sent, none are for so long: trying takes time, and jobs must be taken back meanwhile."""


class Upkeep:
    """The round, and the thread (a greenlet under gunicorn) that makes it."""

    def __init__(self, reaper: Reaper, tickets: TicketOffice, demand: Callable[[], object] = lambda: None) -> None:
        self._reaper = reaper
        self._demand = demand
        self._tickets = tickets
        self._away = False
        self._send_from = float("-inf")

    def start(self, alive: Callable[[], bool]) -> None:
        """Make rounds in the background while `alive`."""
        threading.Thread(target=self._run, args=(alive,), name="upkeep", daemon=True).start()

    def round(self) -> None:
        """One round; what cannot be done now is left to the next."""
        try:
            waiting = self._reaper.reap()
            self._away = False
        except redis.RedisError as error:
            if not self._away:
                log.warning("No upkeep while Redis is away: %s", error)
            self._away = True
        except Exception:
            log.exception("Upkeep failed")
        else:
            self._send(waiting)

    def _send(self, waiting: Sequence[Waiting]) -> None:
        """Send tickets; those that cannot be sent now are the rescue's when they can."""
        if time.monotonic() < self._send_from:
            return
        try:
            self._tickets.send_all(waiting)
            self._tickets.rescue()
            self._demand()
        except (redis.RedisError, OperationalError, OSError) as error:
            log.warning("No tickets for %g s, the broker is away: %s", _PAUSE_S, error)
            self._send_from = time.monotonic() + _PAUSE_S
        except Exception:
            log.exception("Tickets cannot be sent")
            self._send_from = time.monotonic() + _PAUSE_S

    def _run(self, alive: Callable[[], bool]) -> None:
        while alive():
            self.round()
            time.sleep(self._reaper.rest_s)
