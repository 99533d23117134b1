"""Leadership: a lease in Redis that one background process holds at a time."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from typing import Final

import redis

from shared.redis.client import Redis, script

log = logging.getLogger(__name__)

LEASE_S: Final = 5.0
"""After this time without a renewal, another process may lead."""
RENEW_S: Final = 1.0
_MARGIN_S: Final = 1.0
"""The leader stops writing this long before its lease expires. Scripts also check its token."""


class Leadership:
    """This process's part in the election.

    Attributes:
        token: identifies one term of this process.
    """

    def __init__(self, client: Redis) -> None:
        self._lead = script(client, "lead")
        self._valid_until = float("-inf")
        self.token = ""

    @property
    def valid(self) -> bool:
        """Whether this process certainly leads."""
        return time.monotonic() < self._valid_until

    def acquire(self) -> bool:
        """Try to become the leader; return whether this process leads now."""
        self.token = secrets.token_hex(8)
        if not self._extend():
            return False
        log.info("leadership_acquired", extra={"token": self.token})
        return True

    def hold(self, stopping: threading.Event) -> None:
        """Renew the lease until it is lost or the process is to stop."""
        while self.valid and not stopping.wait(RENEW_S):
            try:
                if not self._extend():
                    self._valid_until = float("-inf")
            except redis.RedisError as error:
                log.warning("leadership_not_renewed", extra={"reason": str(error)})
        if not self.valid:
            log.warning("leadership_lost", extra={"token": self.token})

    def release(self) -> None:
        """Let another process lead at once."""
        self._valid_until = float("-inf")
        try:
            self._lead(args=[self.token, 0])
        except redis.RedisError as error:
            log.info("leadership_not_released", extra={"reason": str(error)})

    def _extend(self) -> bool:
        before = time.monotonic()
        leads = bool(self._lead(args=[self.token, round(LEASE_S * 1000)]))
        if leads:
            self._valid_until = before + LEASE_S - _MARGIN_S
        return leads
