"""Send webhooks while this process leads."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import gevent
import redis
from gevent.pool import Pool

from shared.errors import NotFound
from web.http.outbound import UrlRefused, parse_url
from web.webhooks.deliveries import FAN_OUT, Deliveries, Delivery
from web.webhooks.receivers import Receivers, UrlPolicy
from web.webhooks.signing import headers

log = logging.getLogger(__name__)

MAX_SENDING: Final = 256
"""Maximum requests at a time."""
MAX_PER_HOST: Final = 8
"""Maximum requests to one host at a time: one that hangs must not delay the others."""
LOOK_S: Final = 0.25
"""Interval of looks for events and due deliveries."""
_DUE: Final = 500
_BUSY_S: Final = 2.0
"""Wait of deliveries to a host that has `MAX_PER_HOST` requests."""
_MARGIN_S: Final = 15.0
_CLEAN_S: Final = 3600.0


class Sender:
    """Sends due deliveries.

    Args:
        timeout_s: for one attempt: name resolution, connection, request and response.
        leader: returns the leader's token.
        leads: whether this process still leads and is not to stop.
    """

    def __init__(
        self,
        deliveries: Deliveries,
        receivers: Receivers,
        policy: UrlPolicy,
        timeout_s: float,
        leader: Callable[[], str],
        leads: Callable[[], bool],
    ) -> None:
        self._deliveries = deliveries
        self._receivers = receivers
        self._policy = policy
        self._timeout_s = timeout_s
        self._leader = leader
        self._leads = leads
        self._pool = Pool(MAX_SENDING)
        self._sending: dict[str, str] = {}  # delivery → host
        self._clean_at = 0.0

    def work(self, stopping: threading.Event) -> None:
        """Send until this process no longer leads or is to stop."""
        while self._leads():
            try:
                self.round()
            except redis.RedisError as error:
                log.warning("webhooks_paused", extra={"reason": str(error)})
                stopping.wait(1.0)
            except Exception:
                log.exception("webhook_round_failed")
                stopping.wait(1.0)
            stopping.wait(LOOK_S)
        self._pool.join(self._timeout_s)

    def round(self) -> None:
        """Turn events into deliveries and begin to send those that are due."""
        while self._leads() and self._deliveries.fan_out(self._leader()) == FAN_OUT:
            gevent.sleep(0)
        waiting = [each for each in self._deliveries.due(_DUE) if each not in self._sending]
        per_host = Counter(self._sending.values())
        busy = []
        for delivery in self._deliveries.read(waiting):
            host = _host(delivery.url)
            if per_host[host] >= MAX_PER_HOST:
                busy.append(delivery.id)
            elif self._pool.free_count() > 0:
                per_host[host] += 1
                self._sending[delivery.id] = host
                self._pool.spawn(self._send, delivery.id)
        if busy:
            self._deliveries.defer(busy, _BUSY_S)
        if time.monotonic() >= self._clean_at:
            self._clean_at = time.monotonic() + _CLEAN_S
            self._deliveries.remove_old()

    def _send(self, delivery_id: str) -> None:
        try:
            if self._leads():
                delivery = self._deliveries.begin_attempt(delivery_id, self._leader(), self._timeout_s + _MARGIN_S)
                if delivery is not None:
                    self._attempt(delivery)
        except Exception as error:  # noqa: BLE001 -- the next attempt is due after a while
            log.warning("webhook_interrupted", extra={"webhook_id": delivery_id, "reason": str(error)})
        finally:
            self._sending.pop(delivery_id, None)

    def _attempt(self, delivery: Delivery) -> None:
        extra = {"webhook_id": delivery.id, "event": delivery.kind, "attempt": delivery.attempts}
        try:
            status = self._post(delivery)
        except NotFound:
            self._deliveries.fail(delivery, None, "The endpoint was removed.", final=True)
            return
        except UrlRefused as error:
            self._failed(delivery, None, str(error), extra)
            return
        except (OSError, http.client.HTTPException) as error:
            self._failed(delivery, None, f"The request failed: {type(error).__name__}.", extra)
            return
        if 200 <= status < 300:
            self._deliveries.succeed(delivery, status)
            log.info("webhook_delivered", extra=extra)
        else:
            gone = status == http.client.GONE
            self._failed(delivery, status, f"The receiver returned status {status}.", extra, final=gone)

    def _failed(
        self, delivery: Delivery, status: int | None, reason: str, extra: dict[str, object], *, final: bool = False
    ) -> None:
        again = self._deliveries.fail(delivery, status, reason, final=final)
        log.log(
            logging.INFO if again else logging.WARNING,
            "webhook_failed" if again else "webhook_dead",
            extra={**extra, "reason": reason},
        )

    def _post(self, delivery: Delivery) -> int:
        """Send a delivery; return the status of the response. A redirect is not followed."""
        known = self._receivers.secrets_for(delivery.endpoint, delivery.owner)
        body, target = delivery.body(), parse_url(delivery.url)
        fields = {
            "Content-Type": "application/json",
            "User-Agent": "mlxq-webhooks",
            **headers(known, delivery.id, int(time.time()), body),
        }
        deadline = time.monotonic() + self._timeout_s
        caller = delivery.endpoint or delivery.owner
        with self._policy.outbound.connection(target, deadline, caller) as connection:
            connection.request("POST", target.path, body=body, headers=fields)
            with connection.getresponse() as response:
                return response.status


def _host(url: str) -> str:
    try:
        return parse_url(url).authority
    except UrlRefused:
        return ""
