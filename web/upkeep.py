"""What nobody asks for and somebody must do each second: take back lost jobs, expire old ones, send lost tickets.

Every API process does it; the scripts see to it that many at once do no harm.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import redis
from kombu.exceptions import OperationalError

from shared.claims import Reaper
from shared.tickets import TicketOffice

log = logging.getLogger(__name__)

_EVERY_S: Final = 1.0


class Upkeep:
    """The round, and the thread (a greenlet under gunicorn) that makes it."""

    def __init__(self, reaper: Reaper, tickets: TicketOffice) -> None:
        self._reaper = reaper
        self._tickets = tickets
        self._away = False

    def start(self, alive: Callable[[], bool]) -> None:
        """Make rounds in the background while `alive`."""
        threading.Thread(target=self._run, args=(alive,), name="upkeep", daemon=True).start()

    def round(self) -> None:
        """One round; what cannot be done now is left to the next."""
        try:
            self._tickets.send_all(self._reaper.reap())
            self._tickets.rescue()
            self._away = False
        except (redis.RedisError, OperationalError, OSError) as error:
            if not self._away:
                log.warning("No upkeep while Redis is away: %s", error)
            self._away = True
        except Exception:
            log.exception("Upkeep failed")

    def _run(self, alive: Callable[[], bool]) -> None:
        while alive():
            self.round()
            time.sleep(_EVERY_S)
