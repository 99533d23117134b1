"""Images of requests, beside the job records that name them: by API key and content, as long as a job may need them.

A conversation that sends the same screenshot again stores it once. Keys share nothing: one that knew another's digest
would still not get its image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from shared import keys
from shared.store import Redis

SLACK_S = 600
"""Images outlive their jobs' deadlines by so much: a clock that jumps, a worker that writes the end."""


class ImageStore:
    """Images in Redis.

    Args:
        client: one that does not decode its answers (`connect(…, decode_responses=False)`): images are bytes.

    Every method raises `redis.RedisError` when Redis is away.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client

    def put(self, owner: str, images: Mapping[str, bytes], lifetime_s: float) -> None:
        """Keep images by their digests for that long at least; one that is there already is not sent again."""
        if not images:
            return
        seconds = round(lifetime_s) + SLACK_S
        names = [_name(owner, digest) for digest in images]
        with self._client.pipeline(transaction=False) as pipe:
            for name in names:
                # What has a lifetime is only ever given a longer one: another job may count on it.
                pipe.expire(name, seconds, gt=True)
                pipe.exists(name)
            known = pipe.execute()[1::2]
        with self._client.pipeline(transaction=False) as pipe:
            for name, data, there in zip(names, images.values(), known, strict=True):
                if not there:
                    pipe.set(name, data, ex=seconds)
            pipe.execute()

    def get(self, owner: str, digests: Collection[str]) -> dict[str, bytes]:
        """Those of them that are kept."""
        asked = list(digests)
        found = self._client.mget([_name(owner, digest) for digest in asked]) if asked else []
        return {digest: data for digest, data in zip(asked, found, strict=True) if data is not None}


def digest(image: bytes) -> str:
    """The name of an image: SHA-256 of its file."""
    return hashlib.sha256(image).hexdigest()


def _name(owner: str, image: str) -> str:
    return f"{keys.IMAGE}{owner}:{image}"
