"""What every check works with: a way to ask, and a way to say that the answer is not what it should be."""

from __future__ import annotations

import time
from dataclasses import dataclass

import httpx2

from scripts.client.api import Client, Refused, RemoteJob
from shared.jobs.record import Status

JOB_S = 60
"""A short job takes at most this long, a model on a slow machine included."""
POLL_S = 5


class Wrong(Exception):
    """A check failed; the message says how."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The service, as seen by three callers."""

    client: Client
    stranger: Client
    """Without a key."""
    impostor: Client
    """With a key that is none."""

    def finish(self, job: RemoteJob) -> RemoteJob:
        """Wait until a job has ended."""
        end = time.monotonic() + JOB_S
        while not job.status.terminal and time.monotonic() < end:
            job = self.client.job(job.id, wait_s=POLL_S)
        require(job.status.terminal, f"{job.id} is still {job.status} after {JOB_S} s")
        return job

    def succeed(self, job: RemoteJob) -> RemoteJob:
        """Wait until a job has ended well."""
        job = self.finish(job)
        require(job.status is Status.SUCCEEDED, f"{job.id} ended {job.status}: {job.error}")
        return job


def require(truth: object, otherwise: str) -> None:
    """Fail the check unless something holds."""
    if not truth:
        raise Wrong(otherwise)


def require_json(response: httpx2.Response, *names: str) -> dict[str, object]:
    """An answer's JSON object, which must have these members."""
    data = response.json()
    require(isinstance(data, dict), "the answer is no JSON object")
    missing = [name for name in names if name not in data]
    require(not missing, f"the answer lacks {', '.join(missing)}")
    return dict(data)


def require_refusal(client: Client, path: str) -> None:
    """Fail the check unless a caller is turned away with 401."""
    try:
        client.request("GET", path)
    except Refused as error:
        require(error.status == 401, f"answered {error.status} in place of 401")
    else:
        raise Wrong("was let in")
