"""Storage for the images of unfinished jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Final

from shared.redis import keys
from shared.redis.client import Redis

UNACCEPTED_S: Final = 120
"""Lifetime in seconds of images until their job is accepted."""
SLACK_S: Final = 600
"""Seconds that images outlive their job's deadline; normally they are deleted when the job ends."""


class ImageStore:
    """Images in Redis. Methods raise `redis.RedisError` if Redis is unreachable.

    Args:
        client: a client that returns bytes (`connect(…, decode_responses=False)`).
    """

    def __init__(self, client: Redis) -> None:
        self._client = client

    def put(self, job_id: str, images: Mapping[str, bytes]) -> None:
        """Store a job's images by digest. Must be called before the job is submitted: submission checks for them."""
        with self._client.pipeline() as pipe:
            pipe.hset(keys.IMAGES + job_id, mapping=dict(images))
            pipe.expire(keys.IMAGES + job_id, UNACCEPTED_S)
            pipe.execute()

    def get(self, job_id: str, digests: Collection[str]) -> dict[str, bytes]:
        """Return the images that are stored, by digest."""
        names = list(digests)
        images = self._client.hmget(keys.IMAGES + job_id, names) if names else []
        return {name: image for name, image in zip(names, images, strict=True) if image is not None}

    def drop(self, job_id: str) -> None:
        """Delete the images of a job that was not accepted."""
        self._client.unlink(keys.IMAGES + job_id)


def digest(image: bytes) -> str:
    """Return the name of an image: the SHA-256 of its file."""
    return hashlib.sha256(image).hexdigest()
