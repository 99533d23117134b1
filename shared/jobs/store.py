"""Jobs in Redis, as the API sees them.

What a worker does with a job (claim, append, release) stands in `shared.queue.claims`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

from shared.errors import Conflict, Invalid, KeyQueueFull, KeyReused, NotFound, QueueFull, QueueMemoryFull, Unavailable
from shared.jobs.images import SLACK_S
from shared.jobs.log import JobLog
from shared.jobs.record import OLD_REQUEST, Job, Parsing, Priority, Status
from shared.jobs.request import Request, pack_tokens
from shared.queue import keys
from shared.queue.durability import ProvenScript
from shared.queue.redis import Redis, script
from shared.settings import Settings
from shared.wire import paired

GROWTH_BYTES: Final = 128
"""Bytes that a token of an answer may add to Redis: its event, its text, and the stream's overhead."""
LOGPROB_BYTES: Final = 96
"""Bytes that a log-probability with its token's text adds to an event."""
RECORD_BYTES: Final = 2048
"""Bytes that a job occupies in addition to its request and its answer."""
MEMORY_SHARE: Final = 0.9
"""Share of Redis's memory limit that may be used or reserved; the rest is for the queue's own data."""
RETRY_S: Final = 10
"""Seconds after which a request that found the queue full may try again."""

_OLD_KEYS: Final = (*(f"mlxq:{name}:" for name in ("clock", "alone", "emptying", "rescue", "tokenizer")), "mlxq.")
_WAKEUPS: Final = "mlxq.wakeups."
"""The first layout's queues in Celery were `mlxq.<model>`; today's have names that begin so."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job about to be accepted. Times are seconds from now."""

    request: Request
    owner: str
    priority: Priority = Priority.NORMAL
    metadata: dict[str, str] = field(default_factory=dict)
    request_id: str = ""
    idempotency_key: str = ""
    start_within_s: float | None = None
    deadline_s: float | None = None
    fingerprint: str = ""
    """Hash of the request's meaning: tells a repeated request from a different one with the same Idempotency-Key."""
    images: int = 0
    """How many images were put under its id (`shared.jobs.images`)."""
    image_bytes: int = 0
    prefixes: tuple[str, ...] = ()
    """Hashes of the prompt's prefixes, longest first: a claim finds the worker that has the prefix cached by them."""
    tokens: tuple[int, ...] | None = None
    """The prompt's token ids; None when the API does not know the model's tokenizer."""
    shared: int = 0
    """Number of its first tokens that other API keys may reuse."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that was accepted.

    Attributes:
        new: whether this call created it; False for a repeated Idempotency-Key.
        wake: whether the workers of its model must be woken.
        position: how many jobs are served before it, plus one; None when it does not wait any more.
    """

    job: Job
    new: bool
    wake: bool
    position: int | None


def new_job_id() -> str:
    """`job_` and 28 hex digits; ids sort by the moment they were made."""
    return f"job_{time.time_ns():016x}{secrets.token_hex(6)}"


def fingerprint(request: bytes) -> str:
    """A short hash that distinguishes requests."""
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
        self._recent = script(client, "recent")
        self._stop = script(client, "stop")
        self._forget = script(client, "forget")
        self._adopt = script(client, "adopt")

    def create(self, submission: Submission, job_id: str | None = None) -> Accepted:
        """Accept a job: from here on it is durable and waits in the queue.

        Args:
            job_id: from `new_job_id`, if images were already stored under it.

        Raises:
            KeyReused: the Idempotency-Key came before, with another body.
            Invalid: it may grow to more bytes than one key may hold.
            KeyQueueFull: the key's unfinished jobs hold as many bytes as one key may.
            QueueFull, QueueMemoryFull: the queue has no room.
            Unavailable: the job's images are gone.
            NotDurable: Redis does not prove that it keeps the job.
        """
        job_id = job_id or new_job_id()
        word, *reply = self._enqueue(args=self._arguments(submission, job_id))
        if word not in ("created", "exists"):
            _refuse(word)
        wake, rank, *flat = reply
        job = Job.from_record(paired(flat))
        # "exists" may also be the answer to this very call, sent again
        return Accepted(job, job.id == job_id, bool(wake), None if rank == "" else int(rank) + 1)

    def _arguments(self, submission: Submission, job_id: str) -> list[str | int]:
        limits, request = self._settings, submission.request
        text = request.to_json()
        tokens = "" if submission.tokens is None else pack_tokens(submission.tokens)
        size = len(text.encode()) + len(tokens) + submission.image_bytes
        ask = {
            "id": job_id,
            "owner": submission.owner,
            "model": request.model,
            "class": int(submission.priority),
            "retention_s": limits.retention_s,
            "idempotency_key": submission.idempotency_key,
            "fingerprint": submission.fingerprint,
            "start_within_s": submission.start_within_s or limits.start_within_s,
            "deadline_s": submission.deadline_s or limits.deadline_s,
            "images": submission.images,
            "images_slack_s": SLACK_S,
            "request_bytes": size,
            "growth_bytes": RECORD_BYTES + _token_bytes(request) * request.max_tokens,
            "max_queue": limits.max_queue,
            "queue_bytes": 0 if limits.queue_bytes == "auto" else limits.queue_bytes,
            "owner_bytes": 0 if limits.queue_bytes_per_key == "auto" else limits.queue_bytes_per_key,
            "memory_share": MEMORY_SHARE,
        }
        record = {
            "metadata": json.dumps(submission.metadata),
            "request_id": submission.request_id,
            "log_retention_s": str(limits.log_retention_s or limits.retention_s),
            "size": str(_expected_tokens(submission)),
            **_optional(submission),
        }
        return [json.dumps(ask), text, tokens, submission.shared, *(part for pair in record.items() for part in pair)]

    def known(self, owner: str, idempotency_key: str) -> bool:
        """Whether an owner's Idempotency-Key stands for a job already."""
        return bool(idempotency_key) and bool(self._client.exists(f"{keys.IDEM}{owner}:{idempotency_key}"))

    def get(self, job_id: str, owner: str) -> Job:
        """An owner's job.

        Raises:
            NotFound: there is none, or it is another's.
        """
        (record,) = self._read(lambda: [self._client.hgetall(keys.JOB + job_id)])
        if not record or record["owner"] != owner:
            raise NotFound("There is no such job.", code="job_not_found")
        return Job.from_record(record)

    def recent(self, owner: str, *, limit: int, before: float | None = None) -> list[Job]:
        """An owner's jobs, newest first, created before a moment (seconds since the epoch)."""
        highest = "+inf" if before is None else f"({before!r}"
        records = self._read(lambda: [paired(json.loads(text)) for text in self._recent(args=[owner, highest, limit])])
        return [Job.from_record(record) for record in records]

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
        """The text generated so far, or in all."""
        return self.texts([job])[0]

    def texts(self, jobs: Sequence[Job]) -> list[str]:
        """The texts of several jobs, in one call."""
        if not jobs:
            return []
        texts = self._client.mget([keys.OUTPUT + job.id for job in jobs])
        # What an old worker generates stands in the log alone until the job is adopted.
        return [
            self._log.written(job.id, job.last_event).text if job.old_layout else text or ""
            for job, text in zip(jobs, texts, strict=True)
        ]

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

    def adopt_old_layout(self) -> int:
        """Move all jobs of the first layout to today's; how many are left because old workers run them."""
        left, cursor = 0, 0
        while True:
            cursor, found = self._client.scan(cursor, match=keys.JOB + "*", count=500)
            ids = [key.removeprefix(keys.JOB) for key in found]
            with self._client.pipeline(transaction=False) as pipe:
                for job_id in ids:
                    pipe.hexists(keys.JOB + job_id, OLD_REQUEST)
                old = [job_id for job_id, is_old in zip(ids, pipe.execute(), strict=True) if is_old]
            left += int(self._adopt(args=old)) if old else 0
            if not int(cursor):
                return left

    def drop_old_layout(self) -> None:
        """Delete what the first layout kept beside its jobs, once none is left; old processes do without."""
        for key in self._client.scan_iter(match="mlxq*", count=1000):
            if key.startswith(_OLD_KEYS) and not key.startswith(_WAKEUPS):
                self._client.unlink(key)

    def _read(self, fetch: Callable[[], Iterable[dict[str, str]]]) -> list[dict[str, str]]:
        """The records that `fetch` gives; those of the first layout are moved to today's, and all are read again."""
        records = [*fetch()]
        old = [record["id"] for record in records if OLD_REQUEST in record and record["status"] != Status.RUNNING]
        if not old:
            return records
        self._adopt(args=old)
        return [*fetch()]


def _token_bytes(request: Request) -> int:
    """What a token of the answer may add to Redis."""
    return GROWTH_BYTES + (0 if request.logprobs is None else LOGPROB_BYTES * (1 + request.logprobs))


def _optional(submission: Submission) -> dict[str, str]:
    """Record fields that most jobs do without."""
    request, fields = submission.request, dict[str, str]()
    if submission.prefixes:
        fields["prefixes"] = " ".join(submission.prefixes)
    if request.logprobs is not None:
        fields["logprobs"] = "1"
    if request.parse is not None:
        images = request.image_parts
        size = (images[-1]["width"], images[-1]["height"]) if images else None
        fields["parsing"] = Parsing(request.parse, size).to_json()
    return fields


def _expected_tokens(submission: Submission) -> int:
    """Estimated tokens of worker memory that the job needs at first: its prompt and the first part of its answer."""
    request = submission.request
    if submission.tokens is not None:
        prompt = len(submission.tokens)
    else:
        said = request.prompt or "".join(str(message["content"]) for message in request.messages or ())
        prompt = len(said) // 4
    return prompt + min(request.max_tokens, 256)


def _refuse(word: str) -> NoReturn:
    match word:
        case "reused":
            raise KeyReused(
                "This Idempotency-Key was used for another request; choose a new one.", field="Idempotency-Key"
            )
        case "images":
            raise Unavailable(
                "The images of this request were lost before it was accepted. Send it again.", retry_after=1
            )
        case "too large":
            detail = "This job may grow to more bytes than one API key may hold (QUEUE_BYTES_PER_KEY)."
            raise Invalid(detail, code="job_too_large", field="max_tokens")
        case "owner full":
            raise KeyQueueFull(
                "This API key's unfinished jobs hold all the memory that one key may; try again when some have ended.",
                retry_after=RETRY_S,
            )
        case "full":
            raise QueueFull("The queue of this model is full. Try again later.", retry_after=RETRY_S)
        case _:
            raise QueueMemoryFull(
                "The queue's memory is full; it empties as jobs end.",
                retry_after=RETRY_S,
            )
