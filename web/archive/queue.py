"""What Redis holds for the archive: ended jobs that are not archived yet, and deleted jobs to erase from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from shared.jobs.record import OLD_REQUEST, Job
from shared.jobs.request import GENERATE
from shared.redis import keys
from shared.redis.client import Redis, script
from web.archive.tables import ArchivedJob

log = logging.getLogger(__name__)

_NO_HOOK = "-"
"""The webhook of jobs that are lines of batches, which are not archived."""


class ArchiveQueue:
    """The background process's access to Redis. Methods raise `redis.RedisError` if Redis is unreachable.

    Args:
        content: what the archive stores of a job: `all`, `output` or `none`.
    """

    def __init__(self, client: Redis, content: str) -> None:
        self._client = client
        self._content = content
        self._archived = script(client, "archived")
        self._erase = script(client, "erase")

    def open(self) -> None:
        """Let jobs that end from now on wait for the archive."""
        self._client.hset(keys.BYTES, "archive", self._content)

    def close(self) -> None:
        """Let jobs no longer wait: there is no archive. Deleted jobs stay listed, in case it is switched on again."""
        self._client.hdel(keys.BYTES, "archive")
        while waiting := self.waiting(1000):
            self.settle(waiting)
        self._client.delete(keys.ARCHIVE)

    def waiting(self, limit: int) -> list[str]:
        """Return entries of ended jobs that wait, those that ended first: each is the id, a space and a number."""
        return [*self._client.zrange(keys.UNARCHIVED, 0, limit - 1)]

    def read(self, job_ids: Sequence[str]) -> list[ArchivedJob]:
        """Return those of the jobs that have ended, were not deleted, and belong in the archive."""
        with self._client.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hgetall(keys.JOB + job_id)
            records = [record for record in pipe.execute() if _belongs(record)] if job_ids else []
        requests, texts = self._requests(records), self._texts(records)
        return [ArchivedJob.of(record, requests.get(record["id"]), texts.get(record["id"])) for record in records]

    def _requests(self, records: Sequence[dict[str, str]]) -> dict[str, str | None]:
        """Return the requests of jobs, without those that Redis no longer has."""
        job_ids = [record["id"] for record in records if self._content == "all"]
        with self._client.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hget(keys.REQUEST + job_id, "request")
            requests = pipe.execute() if job_ids else []
        return dict(zip(job_ids, requests, strict=True))

    def _texts(self, records: Sequence[dict[str, str]]) -> dict[str, str | None]:
        """Return the texts of jobs. The results of inputs are large and are not archived."""
        job_ids = [record["id"] for record in records if record.get("kind", GENERATE) == GENERATE]
        if self._content == "none":
            return {}
        with self._client.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.get(keys.OUTPUT + job_id)
            texts = pipe.execute() if job_ids else []
        return {job_id: text or "" for job_id, text in zip(job_ids, texts, strict=True)}

    def settle(self, entries: Sequence[str]) -> None:
        """Remove entries of jobs that have been archived."""
        self._archived(args=[*entries])

    def hidden(self, job_ids: Sequence[str]) -> set[str]:
        """Return those of the jobs that were deleted a moment ago, or are yet to be erased."""
        with self._client.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hexists(keys.JOB + job_id, "deleted")
                pipe.zscore(keys.ERASED, job_id)
            flags = pipe.execute() if job_ids else []
        each = zip(job_ids, flags[::2], flags[1::2], strict=True)
        return {job_id for job_id, deleted, erased_at in each if deleted or erased_at is not None}

    def deleted(self, limit: int) -> dict[str, float]:
        """Return deleted jobs that must be erased from the archive, with the time of their deletion."""
        return dict(self._client.zrange(keys.ERASED, 0, limit - 1, withscores=True))

    def erase(self, job_ids: Sequence[str], owner: str, unused_since: float) -> None:
        """Let the background process erase deleted jobs, and workers the API key's prefixes not used since a time.

        Works also while the memory of Redis is full.
        """
        self._erase(args=[owner, unused_since, *job_ids])

    def erased(self, job_ids: Sequence[str]) -> None:
        """Forget deleted jobs that have been erased."""
        if job_ids:
            self._client.zrem(keys.ERASED, *job_ids)

    def ids(self, owner: str, start: int, limit: int) -> list[str]:
        """Return the ids of jobs of an API key in Redis, oldest first, without the first `start`."""
        return [*self._client.zrange(keys.OWNER + owner, start, start + limit - 1)]

    def report(self, *, error: str = "", written: int = 0, size: int | None = None) -> None:
        """Record the state for the health check and for metrics."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hset(keys.ARCHIVE, "error", error)
            pipe.hincrby(keys.ARCHIVE, "written", written)
            if size is not None:
                pipe.hset(keys.ARCHIVE, "bytes", size)
            pipe.execute()


def _belongs(record: dict[str, str]) -> bool:
    ended = bool(record.get("finished_at")) and OLD_REQUEST not in record
    return ended and "deleted" not in record and record.get("webhook") != _NO_HOOK and _is_valid(record)


def _is_valid(record: dict[str, str]) -> bool:
    """Whether a record can be read. A damaged one must not keep other jobs from the archive."""
    try:
        Job.from_record(record)
    except (LookupError, TypeError, ValueError) as error:
        log.error("job_not_archived", extra={"job_id": record.get("id"), "reason": repr(error)})
        return False
    return True
