"""Images of jobs, beside the records that name them: for as long as a job is on its way, and no longer."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Final

from shared.queue import keys
from shared.queue.redis import Redis

UNACCEPTED_S: Final = 120
"""Lifetime of images whose job is not accepted meanwhile, whatever happens to the process that put them."""
SLACK_S: Final = 600
"""Lifetime of an accepted job's images beyond its deadline; the script that ends the job deletes them."""


class ImageStore:
    """Images in Redis.

    Args:
        client: one that does not decode its answers (`connect(…, decode_responses=False)`): images are bytes.

    Every method raises `redis.RedisError` when Redis is away.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client

    def put(self, job_id: str, images: Mapping[str, bytes]) -> None:
        """Keep a job's images by their digests. To be called before the job is accepted, which makes sure of them."""
        with self._client.pipeline() as pipe:
            pipe.hset(keys.IMAGES + job_id, mapping=dict(images))
            pipe.expire(keys.IMAGES + job_id, UNACCEPTED_S)
            pipe.execute()

    def get(self, job_id: str, digests: Collection[str]) -> dict[str, bytes]:
        """Those of them that are kept."""
        asked = list(digests)
        found = self._client.hmget(keys.IMAGES + job_id, asked) if asked else []
        return {digest: data for digest, data in zip(asked, found, strict=True) if data is not None}

    def drop(self, job_id: str) -> None:
        """Forget those of a job that was not accepted."""
        self._client.unlink(keys.IMAGES + job_id)


def digest(image: bytes) -> str:
    """The name of an image: SHA-256 of its file."""
    return hashlib.sha256(image).hexdigest()
