"""Joining a repeated request to its job: clients that retry by themselves must not create a second job.

A job of such a client records the API process that reads it (`Submission.reader`) and the hash of its request. When the
client's connection is lost, the job stays for `GRACE_S`. A retry with the same hash joins it. If the API process itself
has died, nothing marks its jobs: a retry finds out that their reader is dead, if it ran on the same host.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from functools import cache
from threading import Timer
from typing import Any, Final

from shared.jobs.record import Job
from shared.redis import keys
from shared.redis.client import Redis, script

GRACE_S: Final = 5.0
"""How long a job is kept for a retry after its connection was lost. The official clients of OpenAI and Anthropic wait
0.4 to 2 s before their first retries."""
RESTART_S: Final = 60.0
"""How long a job is kept for a retry if the API process is restarted, during which connections are refused."""

_MAX_UNCERTAIN: Final = 1000


class Readers:
    """The clients that read the jobs of this API process."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._detach = script(client, "detach")
        self._abandon = script(client, "abandon")
        self._rejoin = script(client, "rejoin")
        self._uncertain: dict[tuple[str, str], str] = {}

    def detach(self, job: Job, for_s: float = GRACE_S) -> str:
        """Keep a job and its children for a retry, because the connection of its client is lost.

        Returns:
            The time until which it is kept, as text, for `abandon`.
        """
        return str(self._detach(args=[job.id, for_s]))

    def abandon(self, job: Job, kept_until: str) -> bool:
        """Cancel a job and its children, unless a client has joined it since; return whether they were cancelled."""
        return bool(self._abandon(args=[job.id, kept_until]))

    def is_streamed(self, job: Job) -> bool:
        """Whether any client reads the job's events as they come."""
        return any(count for _, count in self._client.pubsub_numsub(keys.LIVE + job.id))

    def rejoin(self, owner: str, fingerprint: str) -> str | None:
        """Return the id of the owner's job with this fingerprint whose client was lost, and read it from now on."""
        found, *readers = self._call_rejoin(owner, fingerprint, [])
        dead = [reader for reader in set(readers) if _is_dead(reader)]
        if not found and dead:
            found = self._call_rejoin(owner, fingerprint, dead)[0]
        return found or None

    def submission_failed(self, owner: str, fingerprint: str, job_id: str) -> None:
        """Remember the id of a job that may have been accepted although Redis's reply was lost."""
        self._uncertain[owner, fingerprint] = job_id
        while len(self._uncertain) > _MAX_UNCERTAIN:
            del self._uncertain[next(iter(self._uncertain))]

    def uncertain_job(self, owner: str, fingerprint: str) -> str | None:
        """Return the id of such a job, once."""
        return self._uncertain.pop((owner, fingerprint), None)

    def _call_rejoin(self, owner: str, fingerprint: str, dead: Sequence[str]) -> list[str]:
        reply: list[str] = self._rejoin(args=[owner, fingerprint, reader_id(), *dead])
        return reply


def after_grace(call: Callable[[], Any]) -> None:
    """Call a function after `GRACE_S`, unless this process ends before. Then the job is not cancelled."""
    timer = Timer(GRACE_S, call)
    timer.daemon = True
    timer.start()


def reader_id() -> str:
    """Return the id of this process as a reader: host, process id, and a random part against reused process ids."""
    return _reader_id(os.getpid())


@cache
def _reader_id(pid: int) -> str:
    return f"{socket.gethostname()}:{pid}:{secrets.token_hex(4)}"


def _is_dead(reader: str) -> bool:
    """Whether a reader is known to have died. Of processes on other hosts this is unknown."""
    host, pid, _ = reader.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    if int(pid) == os.getpid():
        return reader != reader_id()
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
