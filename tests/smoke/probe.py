"""Clients and assertions for the checks."""

from __future__ import annotations

import time
from dataclasses import dataclass

import httpx2

from scripts.client.api import Client, Refused, RemoteJob
from shared.jobs.record import Status

JOB_S = 60
"""Maximum duration of a short job, also with a large model on a slow machine."""
POLL_S = 5


class CheckFailed(Exception):
    """A check failed. The message says why."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Clients of the service with different keys."""

    client: Client
    without_key: Client
    wrong_key: Client
    """With a well-formed but unknown key."""

    def finish(self, job: RemoteJob) -> RemoteJob:
        """Wait until a job has ended."""
        end = time.monotonic() + JOB_S
        while not job.status.terminal and time.monotonic() < end:
            job = self.client.job(job.id, wait_s=POLL_S)
        require(job.status.terminal, f"{job.id} is still {job.status} after {JOB_S} s")
        return job

    def succeed(self, job: RemoteJob) -> RemoteJob:
        """Wait until a job has succeeded."""
        job = self.finish(job)
        require(job.status is Status.SUCCEEDED, f"{job.id} ended {job.status}: {job.error}")
        return job


def require(condition: object, failure: str) -> None:
    """Fail the check with a message if the condition is false."""
    if not condition:
        raise CheckFailed(failure)


def require_json(response: httpx2.Response, *names: str) -> dict[str, object]:
    """Return the JSON object of a response, which must have these members."""
    data = response.json()
    require(isinstance(data, dict), "the response is not a JSON object")
    missing = [name for name in names if name not in data]
    require(not missing, f"the response lacks {', '.join(missing)}")
    return dict(data)


def require_unauthorized(client: Client, path: str) -> None:
    """Fail the check unless a request is answered with 401."""
    try:
        client.request("GET", path)
    except Refused as error:
        require(error.status == 401, f"answered {error.status} instead of 401")
    else:
        raise CheckFailed("the request was accepted")
