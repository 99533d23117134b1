"""The stored requests of jobs: of unfinished ones, and of those that have ended and whose request is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from shared.errors import Conflict, Gone
from shared.jobs.images import ImageStore
from shared.jobs.record import Job
from shared.jobs.request import Request, unpack_tokens
from shared.jobs.store import new_job_id
from shared.jobs.submission import Submission, inputs_bytes
from shared.redis import keys
from shared.redis.client import Redis


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A job's request.

    Attributes:
        tokens: token ids of the prompt; None if no process has tokenised it yet.
        shared: length of the shared prefix in them.
    """

    request: Request
    tokens: tuple[int, ...] | None
    shared: int


class StoredRequests:
    """The stored requests in Redis. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis, images: ImageStore) -> None:
        self._client = client
        self._images = images

    def get(self, job: Job) -> StoredRequest:
        """Return a job's request.

        Raises:
            Gone: the job has ended, and its request was not kept.
        """
        text, tokens, shared = self._client.hmget(keys.REQUEST + job.id, "request", "tokens", "shared")
        if not text:
            detail = "The request is no longer stored. Those of failed jobs are kept, and all with KEEP_REQUESTS=all."
            raise Gone(detail, code="request_gone")
        return StoredRequest(Request.from_json(text), unpack_tokens(tokens) if tokens else None, int(shared or 0))

    def repeat(
        self, job: Job, request_id: str, find: Callable[[], StoredRequest] | None = None
    ) -> tuple[Submission, str]:
        """Return the submission that runs a job again under a new id, and that id; its images are stored already.

        Args:
            find: returns the job's request, by default `get`'s.

        Raises:
            Conflict: the job has not ended.
            Gone: the request or its images are not stored any more.
        """
        if not job.status.terminal:
            raise Conflict("The job has not ended.", code="job_active")
        stored, job_id = find() if find else self.get(job), new_job_id()
        digests = {part["image"] for part in stored.request.image_parts}
        image_bytes = self._copy_images(job, job_id, digests) if digests else 0
        prefixes, webhook = self._client.hmget(keys.JOB + job.id, "prefixes", "webhook")
        submission = Submission(
            request=stored.request,
            owner=job.owner,
            priority=job.priority,
            metadata=job.metadata,
            request_id=request_id,
            images=len(digests),
            image_bytes=image_bytes,
            prefixes=tuple((prefixes or "").split()),
            tokens=stored.tokens,
            shared=stored.shared,
            webhook=webhook or "",
            result_bytes=inputs_bytes(stored.request, None),
        )
        return submission, job_id

    def images(self, job: Job, digests: Collection[str]) -> dict[str, bytes]:
        """Return the images of a job's request, by digest.

        Raises:
            Gone: an image is not stored any more.
        """
        images = self._images.get(job.id, digests)
        if len(images) < len(set(digests)):
            raise Gone("The job's images are no longer stored.", code="request_gone")
        return images

    def _copy_images(self, source: Job, target: str, digests: Collection[str]) -> int:
        """Store the images of a job for another one; return their size."""
        images = self.images(source, digests)
        self._images.put(target, images)
        return sum(map(len, images.values()))
