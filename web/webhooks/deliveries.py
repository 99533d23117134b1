"""The queue of webhook deliveries in Redis."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from shared.errors import Conflict, NotFound
from shared.redis import keys
from shared.redis.client import Redis, script
from shared.wire import enum_member, pairs_to_dict

log = logging.getLogger(__name__)

DELIVERED_S: Final = 24 * 3600
"""How long the record of a delivered webhook is kept."""
DEAD_S: Final = 30 * 24 * 3600
"""How long a delivery that failed for good can be sent again."""
FAN_OUT: Final = 200
"""Maximum events turned into deliveries per call."""
MAX_PENDING: Final = 100_000
"""Maximum deliveries that wait. Meanwhile, further events stay in the outbox."""
MAX_BACKOFF_S: Final = 6 * 3600.0
BACKOFF_FACTOR: Final = 4.0
_JITTER: Final = 0.25
_MAX_ERROR: Final = 300
_MAX_SCANNED: Final = 10_000


class DeliveryStatus(StrEnum):
    """The state of a delivery."""

    PENDING = "pending"
    """It is sent now, or again later."""
    DELIVERED = "delivered"
    """The receiver confirmed it with a status of 2xx."""
    DEAD = "dead"
    """All attempts failed, or the receiver refused it for good."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event for one receiver. Times are seconds since the epoch.

    Attributes:
        id: the `webhook-id`, the same in all attempts.
        event_id: id of the event, the same for all receivers.
        kind: type of the event, such as `batch.completed`.
        object_id: id of the job or batch.
        owner: id of the API key to which the job or batch belongs.
        endpoint: id of the registered endpoint; empty for the URL of a job.
        attempts: number of attempts so far.
        next_at: time of the next attempt; None if there will be none.
    """

    id: str
    event_id: str
    kind: str
    object_id: str
    owner: str
    endpoint: str
    url: str
    created_at: float
    status: DeliveryStatus
    attempts: int
    next_at: float | None
    ended_at: float | None
    last_status: int | None
    last_error: str | None

    @classmethod
    def from_record(cls, record: Mapping[str, str]) -> Self:
        """Parse a record."""
        status = enum_member(DeliveryStatus, record["status"], DeliveryStatus.PENDING)
        return cls(
            id=record["id"],
            event_id=record["event_id"],
            kind=record["kind"],
            object_id=record["object_id"],
            owner=record["owner"],
            endpoint=record["endpoint"],
            url=record["url"],
            created_at=float(record["created_at"]),
            status=status,
            attempts=int(record["attempts"]),
            next_at=float(record["next_at"]) if status is DeliveryStatus.PENDING and record.get("next_at") else None,
            ended_at=float(record["ended_at"]) if record.get("ended_at") else None,
            last_status=int(record["last_status"]) if record.get("last_status") else None,
            last_error=record.get("last_error") or None,
        )

    def body(self) -> bytes:
        """Return the body of the webhook, the same in all attempts."""
        event = {
            "id": self.event_id,
            "object": "event",
            "created_at": int(self.created_at),
            "type": self.kind,
            "data": {"id": self.object_id},
        }
        return json.dumps(event, separators=(",", ":")).encode()


class Deliveries:
    """The deliveries in Redis. Methods raise `redis.RedisError` if Redis is unreachable.

    Args:
        max_attempts: number of attempts after which a delivery is dead.
        backoff_s: wait after the first attempt; each further one is `BACKOFF_FACTOR` times longer.
    """

    def __init__(self, client: Redis, max_attempts: int, backoff_s: float) -> None:
        self._client = client
        self._max_attempts = max_attempts
        self._backoff_s = backoff_s
        self._fan_out = script(client, "webhook_fan_out")
        self._attempt = script(client, "webhook_attempt")
        self._settle = script(client, "webhook_settle")

    def fan_out(self, leader: str) -> int:
        """Turn events into deliveries; return how many events were taken."""
        return int(self._fan_out(args=[leader, FAN_OUT, MAX_PENDING]))

    def due(self, limit: int) -> list[str]:
        """Return the ids of deliveries whose next attempt is due, the longest waiting ones first."""
        return [*self._client.zrangebyscore(keys.WEBHOOKS_DUE, "-inf", time.time(), start=0, num=limit)]

    def defer(self, delivery_ids: Sequence[str], seconds: float) -> None:
        """Let deliveries wait, so that they do not stand in the way of others."""
        until = time.time() + seconds
        with self._client.pipeline(transaction=False) as pipe:
            for delivery_id in delivery_ids:
                pipe.zadd(keys.WEBHOOKS_DUE, {delivery_id: until}, xx=True)
            pipe.execute()

    def read(self, delivery_ids: Sequence[str]) -> list[Delivery]:
        """Return those of the deliveries that exist."""
        with self._client.pipeline(transaction=False) as pipe:
            for delivery_id in delivery_ids:
                pipe.hgetall(keys.WEBHOOK + delivery_id)
            return [Delivery.from_record(record) for record in pipe.execute() if record]

    def begin_attempt(self, delivery_id: str, leader: str, timeout_s: float) -> Delivery | None:
        """Record that an attempt begins; None if the delivery is not pending or another process leads.

        Args:
            timeout_s: seconds after which another attempt may begin if the result of this one is never recorded.
        """
        flat = self._attempt(args=[leader, delivery_id, timeout_s])
        return Delivery.from_record(pairs_to_dict(flat)) if flat else None

    def succeed(self, delivery: Delivery, status: int) -> None:
        """Record that the receiver confirmed a delivery. It is never sent again."""
        self._settle(args=[delivery.id, DeliveryStatus.DELIVERED, "", DELIVERED_S, status, ""])

    def fail(self, delivery: Delivery, status: int | None, error: str, *, final: bool = False) -> bool:
        """Record that an attempt failed; return whether there will be another one."""
        code, reason = "" if status is None else status, error[:_MAX_ERROR]
        if final or delivery.attempts >= self._max_attempts:
            self._settle(args=[delivery.id, DeliveryStatus.DEAD, "", DEAD_S, code, reason])
            return False
        due = time.time() + self.backoff_s(delivery.attempts)
        self._settle(args=[delivery.id, DeliveryStatus.PENDING, due, 0, code, reason])
        return True

    def backoff_s(self, attempts: int) -> float:
        """Return the wait after a number of attempts. Jitter spreads the load on a receiver that was away."""
        base = min(self._backoff_s * BACKOFF_FACTOR ** (attempts - 1), MAX_BACKOFF_S)
        return base * random.uniform(1 - _JITTER, 1 + _JITTER)

    def get(self, delivery_id: str, owner: str | None) -> Delivery:
        """Return a delivery.

        Args:
            owner: id of the API key to whose job the delivery must belong; None for an admin.

        Raises:
            NotFound: it does not exist, or belongs to another key or to an endpoint.
        """
        for delivery in self.read([delivery_id]):
            if owner is None or _is_visible(delivery, owner):
                return delivery
        raise NotFound("There is no such delivery.", code="delivery_not_found")

    def list(self, status: DeliveryStatus, owner: str | None, limit: int) -> list[Delivery]:
        """Return the newest deliveries that wait or are dead, as visible for `owner` (see `get`)."""
        index = keys.WEBHOOKS_DEAD if status is DeliveryStatus.DEAD else keys.WEBHOOKS_DUE
        ids, found = [*self._client.zrange(index, -_MAX_SCANNED, -1)][::-1], list[Delivery]()
        while ids and len(found) < limit:
            page, ids = ids[:100], ids[100:]
            found += [each for each in self.read(page) if owner is None or _is_visible(each, owner)]
        return [each for each in found if each.status is status][:limit]

    def forget_key(self, owner: str) -> None:
        """Delete the deliveries that belong to an API key and wait or are dead."""
        for index in (keys.WEBHOOKS_DUE, keys.WEBHOOKS_DEAD):
            for delivery in self.read(self._client.zrange(index, 0, -1)):
                if delivery.owner == owner:
                    self._client.unlink(keys.WEBHOOK + delivery.id)
                    self._client.zrem(index, delivery.id)

    def resend(self, delivery: Delivery) -> Delivery:
        """Send a dead delivery again, with all attempts and under the same id.

        Raises:
            Conflict: it is not dead.
        """
        if delivery.status is not DeliveryStatus.DEAD:
            raise Conflict(f"Only dead deliveries can be sent again; this one is {delivery.status}.", code="not_dead")
        self._settle(args=[delivery.id, "resend", time.time(), 0, "", ""])
        return self.get(delivery.id, None)

    def remove_old(self) -> None:
        """Forget dead deliveries whose records have expired."""
        self._client.zremrangebyscore(keys.WEBHOOKS_DEAD, "-inf", time.time() - DEAD_S)


def _is_visible(delivery: Delivery, owner: str) -> bool:
    return delivery.owner == owner and not delivery.endpoint
