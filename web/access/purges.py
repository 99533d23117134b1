"""Requests to erase everything that belongs to a revoked API key. The background process carries them out."""

from __future__ import annotations

import math
import time

from shared.jobs.request import SHARED_PREFIXES
from shared.redis import keys
from shared.redis.client import Redis


class Purges:
    """The requests in Redis. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    def request(self, key_id: str) -> None:
        """Let the background process erase all data of an API key, and the workers its cached prefixes.

        The entry for the workers stays, so that a worker that is not running now erases the prefixes when it starts.
        Shared prefixes may come from this key, so workers also erase those that no key has used since.
        """
        now = time.time()
        with self._client.pipeline() as pipe:
            pipe.zadd(keys.PURGES, {key_id: now})
            pipe.zadd(keys.PREFIX_CUTOFFS, {key_id: math.inf, SHARED_PREFIXES: now})
            pipe.execute()

    def pending(self) -> dict[str, float]:
        """Return the ids of API keys whose data must be erased, with the time of the request."""
        return dict(self._client.zrange(keys.PURGES, 0, -1, withscores=True))

    def done(self, key_id: str) -> None:
        """Record that nothing of an API key is left."""
        self._client.zrem(keys.PURGES, key_id)
