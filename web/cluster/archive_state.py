"""The state of the archive, as the background process reports it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from shared.redis import keys
from shared.redis.client import Redis

LATE_S: Final = 60.0
"""An ended job that waits for longer than this is a problem: the background process looks twice a second."""


@dataclass(frozen=True, slots=True)
class ArchiveState:
    """The state of the archive.

    Attributes:
        error: why it could not be used at the last attempt; empty if it could.
        written: number of jobs written so far.
        bytes: size of its content.
        waiting: number of ended jobs that wait for it.
        oldest_s: seconds for which the first of them has waited.
    """

    error: str
    written: int
    bytes: int
    waiting: int
    oldest_s: float

    @property
    def problem(self) -> str:
        """What is wrong, for people; empty if nothing is."""
        if self.error:
            return f"Ended jobs are not archived. {self.error}"
        if self.oldest_s > LATE_S:
            return f"An ended job has waited {self.oldest_s:.0f} s for the archive: is a background process running?"
        return ""


def read_state(client: Redis) -> ArchiveState:
    """Return the state of the archive. Raises `redis.RedisError` if Redis is unreachable."""
    with client.pipeline(transaction=False) as pipe:
        pipe.hmget(keys.ARCHIVE, "error", "written", "bytes")
        pipe.zcard(keys.UNARCHIVED)
        pipe.zrange(keys.UNARCHIVED, 0, 0, withscores=True)
        (error, written, size), waiting, oldest = pipe.execute()
    age_s = max((time.time() - ended_at for _, ended_at in oldest), default=0.0)
    return ArchiveState(error or "", int(written or 0), int(size or 0), waiting, max(0.0, age_s))
