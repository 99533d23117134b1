"""Jobs in Redis, as the API sees them.

What a worker does with a job (claim, append, release) stands in `shared.queue.claims`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from shared.errors import Conflict, KeyReused, NotFound, Unavailable
from shared.jobs.images import SLACK_S
from shared.jobs.log import JobLog
from shared.jobs.record import Job, Priority, Status
from shared.jobs.request import Request
from shared.queue import keys
from shared.queue.durability import ProvenScript
from shared.queue.redis import Redis, script
from shared.settings import Settings


@dataclass(frozen=True, slots=True)
class Submission:
    """A job about to be accepted. Times are seconds from now."""

    generation: Request
    owner: str
    priority: Priority = Priority.NORMAL
    metadata: dict[str, str] = field(default_factory=dict)
    request_id: str = ""
    idempotency_key: str = ""
    start_within_s: float | None = None
    deadline_s: float | None = None
    fingerprint: str = ""
    """Hash of what the request means: tells a repeated request from another one under the same key."""
    images: int = 0
    """How many were put under its id (`shared.jobs.images`)."""
    marks: tuple[str, ...] = ()
    """Hashes of its beginnings, of the longest first: by them the claim finds the worker that has its prefix."""


def new_job_id() -> str:
    """`job_` and 28 hex digits; ids sort by the moment they were made, and so do jobs of the same turn."""
    return f"job_{time.time_ns():016x}{secrets.token_hex(6)}"


def fingerprint(request: bytes) -> str:
    """A short hash that tells one request from another."""
    return hashlib.blake2b(request, digest_size=16).hexdigest()


class Jobs:
    """The jobs in Redis, as their owners see them.

    Every method raises `redis.RedisError` when Redis is away.
    """

    def __init__(self, client: Redis, settings: Settings) -> None:
        self._client = client
        self._settings = settings
        self._log = JobLog(client)
        self._enqueue = ProvenScript(client, "enqueue") if settings.durable else script(client, "enqueue")
        self._stop = script(client, "stop")
        self._forget = script(client, "forget")

    def create(self, submission: Submission, job_id: str | None = None) -> tuple[Job, bool]:
        """Accept a job: from here on it is durable, and waits in line.

        Args:
            job_id: of `new_job_id`, where something was kept under it already.

        Returns:
            The job, and whether it is new (not the answer to a repeated Idempotency-Key).

        Raises:
            KeyReused: the Idempotency-Key came before, with another body.
            Unavailable: the queue is full, or has not the job's images.
            NotDurable: Redis does not prove that it keeps the job.
        """
        limits, generation = self._settings, submission.generation
        record = {
            "generation": generation.to_json(),
            "metadata": json.dumps(submission.metadata),
            "request_id": submission.request_id,
            "log_retention_s": str(limits.log_retention_s or limits.retention_s),
            **({"marks": " ".join(submission.marks)} if submission.marks else {}),
        }
        job_id = job_id or new_job_id()
        word, *flat = self._enqueue(
            args=[
                job_id,
                submission.owner,
                generation.model,
                int(submission.priority),
                limits.retention_s,
                submission.idempotency_key,
                submission.fingerprint,
                limits.max_queue,
                submission.start_within_s or limits.start_within_s,
                submission.deadline_s or limits.deadline_s,
                submission.images,
                SLACK_S,
                *(part for pair in record.items() for part in pair),
            ]
        )
        if word == "full":
            raise Unavailable("Too many jobs wait for this model.", code="queue_full", retry_after=10)
        if word == "reused":
            raise KeyReused("This Idempotency-Key was used for another request.", field="Idempotency-Key")
        if word == "images":
            raise Unavailable("The queue has lost the images of this request. Send it again.", retry_after=1)
        job = Job.from_record(dict(zip(flat[::2], flat[1::2], strict=True)))
        return job, job.id == job_id  # "exists" may also be the answer to this very call, sent again

    def known(self, owner: str, idempotency_key: str) -> bool:
        """Whether an owner's Idempotency-Key stands for a job already."""
        return bool(idempotency_key) and bool(self._client.exists(f"{keys.IDEM}{owner}:{idempotency_key}"))

    def get(self, job_id: str, owner: str) -> Job:
        """An owner's job.

        Raises:
            NotFound: there is none, or it is another's.
        """
        record = self._client.hgetall(keys.JOB + job_id)
        if not record or record["owner"] != owner:
            raise NotFound("There is no such job.", code="job_not_found")
        return Job.from_record(record)

    def recent(self, owner: str, *, limit: int, before: float | None = None) -> list[Job]:
        """An owner's jobs, newest first, created before a moment (seconds since the epoch)."""
        own = keys.OWNER + owner
        highest = "+inf" if before is None else f"({before!r}"
        while True:
            ids = self._client.zrange(own, highest, "-inf", byscore=True, desc=True, offset=0, num=limit)
            records = self._read(ids)
            gone = [job_id for job_id, record in zip(ids, records, strict=True) if not record]
            if not gone:
                return [Job.from_record(record) for record in records]
            self._client.zrem(own, *gone)  # and again, or the page would look like the last

    def stop(self, job_id: str, owner: str) -> Job:
        """Cancel a job: at once while it waits, at its worker's next step while it runs.

        Raises:
            NotFound: there is none, or it is another's.
            Conflict: it has ended.
        """
        self.get(job_id, owner)
        word = self._stop(args=[job_id, Status.CANCELLED])
        job = self.get(job_id, owner)
        if word == "ended" and job.status is not Status.CANCELLED:
            raise Conflict(f"The job has ended already: {job.status}.", code="job_ended")
        return job

    def forget(self, job_id: str, owner: str) -> None:
        """Delete a job that has ended.

        Raises:
            NotFound: there is none, or it is another's.
            Conflict: it has not ended.
        """
        self.get(job_id, owner)
        if self._forget(args=[job_id]) == "active":
            raise Conflict("The job has not ended; cancel it first.", code="job_active")

    def text(self, job: Job) -> str:
        """The text generated so far, or in all.

        Raises:
            Gone: only the job's log has it, and that was trimmed.
        """
        return job.text if job.text is not None else self._log.written(job.id, job.last_event).text

    def position(self, job: Job) -> int | None:
        """How many jobs are served before this one, plus one; None when it does not wait."""
        return self.positions([job]).get(job.id)

    def positions(self, jobs: Iterable[Job]) -> dict[str, int]:
        """For each job that waits, by id: how many are served before it, plus one."""
        waiting = [job for job in jobs if job.status is Status.QUEUED]
        if not waiting:
            return {}
        with self._client.pipeline(transaction=False) as pipe:
            for job in waiting:
                pipe.zrank(keys.QUEUE + job.model, job.id)
            ranks = pipe.execute()
        return {job.id: rank + 1 for job, rank in zip(waiting, ranks, strict=True) if rank is not None}

    def _read(self, ids: Iterable[str]) -> list[dict[str, str]]:
        with self._client.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(keys.JOB + job_id)
            return list(pipe.execute())
