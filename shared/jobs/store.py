"""The API's operations on jobs: submit, read, list, cancel, delete.

The worker's operations (claim, append, release) are in `shared.queue.claims`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

from shared.errors import Conflict, JobFailure, NotFound
from shared.jobs.images import SLACK_S
from shared.jobs.limits import TokensLeft
from shared.jobs.log import JobLog
from shared.jobs.record import OLD_REQUEST, Job, Status
from shared.jobs.rejections import reject
from shared.jobs.submission import Submission, job_arguments, record_fields
from shared.redis import keys
from shared.redis.client import Redis, script
from shared.redis.durability import ProvenScript
from shared.settings import Settings
from shared.wire import pairs_to_dict

MEMORY_SHARE: Final = 0.9
"""Share of Redis's memory limit that may be used or reserved for jobs; the rest is for the queue's own data."""
DELETED_S: Final = 10
"""Seconds for which record, text and log of a deleted job remain for requests that are waiting for its end."""
_DELETED: Final = "deleted"

_OLD_KEYS: Final = (*(f"mlxq:{name}:" for name in ("clock", "alone", "emptying", "rescue", "tokenizer")), "mlxq.")
"""Prefixes of the first layout's keys. Its Celery queues were named `mlxq.<model>`."""
_WAKEUPS: Final = "mlxq.wakeups."
"""Prefix of the current Celery queues, which must be kept."""


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a queued job.

    Attributes:
        position: 1-based position in the queue. If the job is parked, because its owner runs as many jobs as it may:
            position among the owner's waiting jobs.
        higher: number of jobs of higher classes in the queue.
        turns: turns until its own; see `next_turn` in `lib/queue.lua`.
        max_running: the owner's limit of running jobs if the job is parked, else 0.
    """

    position: int
    higher: int = 0
    turns: float = 0.0
    max_running: int = 0

    @classmethod
    def from_reply(cls, reply: Sequence[int | str]) -> Self:
        """Parse what `queue_place` in `lib/queue.lua` returns."""
        rank, higher, turns, max_running = reply
        return cls(int(rank) + 1, int(higher), float(turns), int(max_running))


@dataclass(frozen=True, slots=True)
class Accepted:
    """An accepted job.

    Attributes:
        new: whether this call created it; False for a repeated Idempotency-Key.
        wake: whether the workers of its model must be woken.
        place: its place in the queue; None if the job is not queued.
        prompt_tokens: number of tokens that the API has given to the job's prompt; None if it has not tokenised it.
        tokens: what is left of the owner's token limits; None if it has none.
    """

    job: Job
    new: bool
    wake: bool
    place: Place | None
    prompt_tokens: int | None = None
    tokens: TokensLeft | None = None


def new_job_id() -> str:
    """Return `job_` and 28 hexadecimal digits; ids sort by creation time."""
    return f"job_{time.time_ns():016x}{secrets.token_hex(6)}"


def fingerprint(request: bytes) -> str:
    """Return a short hash of a request body."""
    return hashlib.blake2b(request, digest_size=16).hexdigest()


class Jobs:
    """The jobs in Redis, accessed by their owners. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self._client = client
        self._settings = settings
        self._log = JobLog(client)
        self._enqueue = ProvenScript(client, "enqueue") if settings.durable else script(client, "enqueue")
        self._recent = script(client, "recent")
        self._stop = script(client, "stop")
        self._fail_waiting = script(client, "fail_waiting")
        self._forget = script(client, "forget")
        self._places = script(client, "places")
        self._adopt = script(client, "adopt")

    def create(self, submission: Submission, job_id: str | None = None) -> Accepted:
        """Accept a job. When this returns, the job is durable and queued.

        Args:
            job_id: the id from `new_job_id` under which images were stored; by default a new id.

        Raises:
            KeyReused: the Idempotency-Key was used for another request.
            Invalid: the job alone could exceed the API key's share of memory.
            KeyQueueFull: the API key's queued jobs reached their number, or its unfinished jobs their share of memory.
            QueueFull, QueueMemoryFull: the queue reached its limit.
            Unavailable: the job's images were lost.
            NotDurable: Redis did not confirm that the job is on disk.
        """
        return self.create_all([submission], [job_id or new_job_id()])

    def create_all(self, submissions: Sequence[Submission], job_ids: Sequence[str]) -> Accepted:
        """Accept all jobs of a request, or none; return the first. The others are its children. Raises like `create`.

        The submissions have the same owner, model, priority, time limits and Idempotency-Key.
        """
        result, *reply = self._enqueue(args=self._arguments(submissions, job_ids))
        if result not in ("created", "exists"):
            reject(result, *reply)
        wake, place, tokens, *flat = reply
        job = Job.from_record(pairs_to_dict(flat))
        # The ids are compared because "exists" may also be the reply to a retry of this call.
        return Accepted(
            job,
            new=job.id == job_ids[0],
            wake=bool(wake),
            place=Place.from_reply(place) if place else None,
            prompt_tokens=submissions[0].prompt_tokens,
            tokens=TokensLeft.from_reply(tokens) if tokens else None,
        )

    def _arguments(self, submissions: Sequence[Submission], job_ids: Sequence[str]) -> list[str]:
        settings, first = self._settings, submissions[0]
        limits = first.limits.with_defaults(settings)
        arguments = {
            "owner": first.owner,
            "model": first.request.model,
            "class": int(first.priority),
            "retention_s": max(settings.retention_s, first.min_retention_s),
            "idempotency_key": first.idempotency_key,
            "fingerprint": first.fingerprint,
            "start_within_s": first.start_within_s or settings.start_within_s,
            "deadline_s": first.deadline_s or settings.deadline_s,
            "images_slack_s": SLACK_S,
            "max_queue": settings.max_queue,
            "queue_bytes": 0 if settings.queue_bytes == "auto" else settings.queue_bytes,
            "weight": limits.weight,
            "owner_queue": limits.max_queued,
            "owner_bytes": limits.max_queued_bytes,
            "max_running": limits.max_running,
            "tokens_per_minute": limits.tokens_per_minute,
            "tokens_per_day": limits.tokens_per_day,
            "memory_share": MEMORY_SHARE,
        }
        jobs, texts = [], []
        for number, (submission, job_id) in enumerate(zip(submissions, job_ids, strict=True)):
            job, text, tokens = job_arguments(submission)
            record = record_fields(submission, settings.log_retention_s or settings.retention_s)
            if number == 0:
                family = {"children": " ".join(job_ids[1:]), "reader": submission.reader}
                record |= {name: value for name, value in family.items() if value}
            jobs.append({"id": job_id, **job, "record": [part for item in record.items() for part in item]})
            texts += [text, tokens]
        return [json.dumps({**arguments, "jobs": jobs}), *texts]

    def key_is_used(self, owner: str, idempotency_key: str) -> bool:
        """Whether an owner's Idempotency-Key already belongs to a job."""
        return bool(idempotency_key) and bool(self._client.exists(f"{keys.IDEM}{owner}:{idempotency_key}"))

    def find(self, owner: str, idempotency_keys: Sequence[str]) -> list[str | None]:
        """Return the ids of the jobs that belong to an owner's Idempotency-Keys; None for unused keys."""
        names = [f"{keys.IDEM}{owner}:{key}" for key in idempotency_keys]
        return [*self._client.mget(names)] if names else []

    def ended(self, job_ids: Sequence[str]) -> set[str]:
        """Return those of the jobs that have ended or no longer exist, with one call."""
        with self._client.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(keys.JOB + job_id, "id", "finished_at")
            fields = pipe.execute() if job_ids else []
        return {each for each, (known, finished) in zip(job_ids, fields, strict=True) if not known or finished}

    def get(self, job_id: str, owner: str | None) -> Job:
        """Return an owner's job; with `None`, that of any owner.

        Raises:
            NotFound: the job does not exist or belongs to another owner.
        """
        record = self._record(job_id)
        if not record or owner not in (None, record["owner"]) or _DELETED in record:
            raise NotFound("There is no such job.", code="job_not_found")
        return Job.from_record(record)

    def latest(self, job: Job) -> Job:
        """Return the present state of a job that was read before, also if it was deleted since, up to `DELETED_S` ago.

        Raises:
            NotFound: the job no longer exists.
        """
        record = self._record(job.id)
        if not record:
            raise NotFound("The job was deleted.", code="job_not_found")
        return Job.from_record(record)

    def recent(self, owner: str, *, limit: int, before: float | None = None) -> list[Job]:
        """Return an owner's jobs, newest first, created before a time (seconds since the epoch)."""
        max_time = "+inf" if before is None else f"({before!r}"
        records = self._read(
            lambda: [pairs_to_dict(json.loads(text)) for text in self._recent(args=[owner, max_time, limit])]
        )
        return [Job.from_record(record) for record in records]

    def stop(self, job_id: str, owner: str | None) -> Job:
        """Cancel a job and its children. A queued job ends at once, a running job at its worker's next step.

        Raises:
            NotFound: the job does not exist or belongs to another owner.
            Conflict: the job and its children have already ended.
        """
        before = self.get(job_id, owner)
        result = self._stop(args=[job_id, Status.CANCELLED])
        job = self.latest(before)
        if result == "ended" and job.status is not Status.CANCELLED:
            raise Conflict(f"The job has already ended: {job.status}.", code="job_ended")
        return job

    def fail_waiting(self, model: str, code: JobFailure, message: str) -> int:
        """Fail up to 1,000 queued jobs of a model that nothing can run; return how many."""
        return int(self._fail_waiting(args=[model, code, message, 1000]))

    def forget(self, job_id: str, owner: str | None, *, erase: bool = False) -> None:
        """Delete a job that has ended, and its children. Requests that are waiting for it still receive its end.

        Args:
            erase: whether the background process must erase the jobs from the archive, and the workers their prefixes.

        Raises:
            NotFound: the job does not exist or belongs to another owner.
            Conflict: the job or a child has not ended.
        """
        self.get(job_id, owner)
        if self._forget(args=[job_id, DELETED_S, "erase" if erase else ""]) == "active":
            raise Conflict("The job has not ended. Cancel it first.", code="job_active")

    def text(self, job: Job) -> str:
        """Return the generated text, which is incomplete while the job runs."""
        return self.texts([job])[0]

    def texts(self, jobs: Sequence[Job]) -> list[str]:
        """Return the generated texts of several jobs with one call."""
        if not jobs:
            return []
        texts = self._client.mget([keys.OUTPUT + job.id for job in jobs])
        # Old workers write text only to the log.
        return [
            self._log.written(job.id, job.last_event).text if job.old_layout else text or ""
            for job, text in zip(jobs, texts, strict=True)
        ]

    def position(self, job: Job) -> int | None:
        """Return a job's 1-based position in the queue; None if it is not queued."""
        return self.positions([job]).get(job.id)

    def positions(self, jobs: Iterable[Job]) -> dict[str, int]:
        """Return the 1-based position of each queued job, by id."""
        return {job_id: place.position for job_id, place in self.places(jobs).items()}

    def places(self, jobs: Iterable[Job]) -> dict[str, Place]:
        """Return the place of each queued job in its queue, by id."""
        queued = [job.id for job in jobs if job.status is Status.QUEUED]
        found = zip(queued, self._places(args=queued), strict=True) if queued else ()
        return {job_id: Place.from_reply(reply) for job_id, reply in found if reply}

    def adopt_old_layout(self) -> int:
        """Convert all jobs of the first layout. Returns how many remain, because old workers run them."""
        remaining, cursor = 0, 0
        while True:
            cursor, names = self._client.scan(cursor, match=keys.JOB + "*", count=500)
            ids = [name.removeprefix(keys.JOB) for name in names]
            with self._client.pipeline(transaction=False) as pipe:
                for job_id in ids:
                    pipe.hexists(keys.JOB + job_id, OLD_REQUEST)
                old = [job_id for job_id, is_old in zip(ids, pipe.execute(), strict=True) if is_old]
            remaining += int(self._adopt(args=old)) if old else 0
            if not int(cursor):
                return remaining

    def drop_old_layout(self) -> None:
        """Delete the first layout's other keys once no job of it remains. Old processes do not need them."""
        for key in self._client.scan_iter(match="mlxq*", count=1000):
            if key.startswith(_OLD_KEYS) and not key.startswith(_WAKEUPS):
                self._client.unlink(key)

    def _record(self, job_id: str) -> dict[str, str]:
        (record,) = self._read(lambda: [self._client.hgetall(keys.JOB + job_id)])
        return record

    def _read(self, fetch: Callable[[], Iterable[dict[str, str]]]) -> list[dict[str, str]]:
        """Return the records that `fetch` reads. If some have the first layout, convert these and fetch again."""
        records = [*fetch()]
        old = [record["id"] for record in records if OLD_REQUEST in record and record["status"] != Status.RUNNING]
        if not old:
            return records
        self._adopt(args=old)
        return [*fetch()]
