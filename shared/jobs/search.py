"""Search the jobs of API keys by status, model, class, time and metadata, newest first.

There is no index of all jobs: each API key has a list of its own, and this merges the lists. A page looks at a bounded
number of jobs, so it may have fewer than were asked for, even none, and still be followed by others.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from typing import Final, NamedTuple, Self

from shared.jobs.record import Job, Priority, Status
from shared.redis import keys
from shared.redis.client import Redis, script

MAX_LOOKED_AT: Final = 2000
"""Maximum jobs that one page examines."""
MAX_CANDIDATES: Final = 20_000
"""Maximum unfinished or failed jobs that one search examines."""
_CHUNK: Final = 250
_LARGEST_BLOCK: Final = 512
_DELETED: Final = "deleted"
_GONE: Final = ("", _DELETED)
"""Replies of `search.lua` about jobs that no longer exist, and about deleted ones."""


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs to find; None and empty values match all.

    Attributes:
        after: earliest time of creation, in seconds since the epoch.
        metadata: names and values that a job's metadata must contain.
    """

    status: Status | None = None
    model: str | None = None
    priority: Priority | None = None
    after: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def matches_all(self) -> bool:
        """Whether no record needs to be read to know that it matches."""
        return self == JobFilter(after=self.after)

    @property
    def in_redis(self) -> tuple[str, str, str]:
        """The conditions that `search.lua` checks: status, model and class."""
        return self.status or "", self.model or "", "" if self.priority is None else str(int(self.priority))

    def matches_metadata(self, text: str) -> bool:
        """Whether the metadata of a job, as JSON, has the names and values."""
        return not self.metadata or self.metadata.items() <= json.loads(text).items()


class _Examined(NamedTuple):
    """The reply of `search.lua` about a job that exists. Owner and metadata are empty if it does not match."""

    created_at: float
    matches: bool
    owner: str = ""
    metadata: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a reply."""
        created_at, owner, metadata = f"{text[1:]}  ".split(" ", 2)
        return cls(float(created_at), text.startswith("+"), owner, metadata)


@dataclass(frozen=True, slots=True)
class JobPage:
    """Jobs that were found, newest first.

    Attributes:
        next: continue with jobs created before this time; None if there are no others.
    """

    jobs: list[Job]
    next: float | None


class JobSearch:
    """Finds jobs. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._examine = script(client, "search")

    def page(self, owners: Sequence[str], wanted: JobFilter, *, limit: int, before: float | None = None) -> JobPage:
        """Return up to `limit` jobs of these API keys that were created before a time."""
        if wanted.status in (Status.QUEUED, Status.RUNNING):
            return self._among(self._unfinished(), owners, wanted, limit, before)
        if wanted.status is Status.FAILED:
            return self._among(self._failed(), owners, wanted, limit, before)
        return self._through_lists(owners, wanted, limit, before)

    def _through_lists(self, owners: Sequence[str], wanted: JobFilter, limit: int, before: float | None) -> JobPage:
        """Go through the lists of jobs, newest first."""
        entries = heapq.merge(
            *(self._list(owner, wanted.after, before, limit) for owner in owners), key=itemgetter(0), reverse=True
        )
        found: list[tuple[float, str]] = []
        looked_at = 0
        while looked_at < MAX_LOOKED_AT:
            # Without conditions every entry is a job, unless it was deleted or its time is over.
            size = limit - len(found) if wanted.matches_all else _CHUNK
            chunk = list(islice(entries, size))
            for (before, _, job_id), job in zip(chunk, self._examined(chunk, wanted), strict=True):
                if job is not None and job.matches and wanted.matches_metadata(job.metadata):
                    found.append((before, job_id))
                if len(found) == limit:
                    return JobPage(self._jobs(found), before)
            if len(chunk) < size:
                return JobPage(self._jobs(found), None)
            looked_at += len(chunk)
        return JobPage(self._jobs(found), before)

    def _list(
        self, owner: str, after: float | None, before: float | None, block: int
    ) -> Iterator[tuple[float, str, str]]:
        """Yield time, owner and id of an API key's jobs, newest first, read in blocks that grow."""
        name, oldest = keys.OWNER + owner, "-inf" if after is None else repr(after)
        newest = "+inf" if before is None else f"({before!r}"
        while True:
            entries = self._client.zrange(
                name, newest, oldest, byscore=True, desc=True, withscores=True, offset=0, num=block
            )
            for job_id, created_at in entries:
                yield created_at, owner, job_id
            if len(entries) < block:
                return
            newest, block = f"({entries[-1][1]!r}", min(2 * block, _LARGEST_BLOCK)

    def _examined(self, entries: Sequence[tuple[float, str, str]], wanted: JobFilter) -> Iterator[_Examined | None]:
        """Examine the job of each entry; None for jobs that are gone. Those that no longer exist leave the list."""
        texts = self._replies([job_id for _, _, job_id in entries], wanted)
        for (_, owner, job_id), text in zip(entries, texts, strict=True):
            if not text:
                self._client.zrem(keys.OWNER + owner, job_id)
            yield None if text in _GONE else _Examined.parse(text)

    def _among(
        self, job_ids: list[str], owners: Sequence[str], wanted: JobFilter, limit: int, before: float | None
    ) -> JobPage:
        """Search these jobs for a page. Ids sort by the time of creation."""
        known, found = set(owners), list[tuple[float, str]]()
        newest_first = sorted(job_ids, reverse=True)
        looked_at = 0
        for start in range(0, len(newest_first), _CHUNK):
            chunk = newest_first[start : start + _CHUNK]
            for job_id, text in zip(chunk, self._replies(chunk, wanted), strict=True):
                job = _Examined.parse(text) if text not in _GONE else None
                if job is None or (before is not None and job.created_at >= before):
                    continue
                looked_at += 1
                is_new = job.created_at >= (wanted.after or 0.0)
                if is_new and job.matches and job.owner in known and wanted.matches_metadata(job.metadata):
                    found.append((job.created_at, job_id))
                if len(found) == limit or looked_at == MAX_LOOKED_AT:
                    return JobPage(self._jobs(found), job.created_at)
        return JobPage(self._jobs(found), None)

    def _unfinished(self) -> list[str]:
        """Return the ids of unfinished jobs: each has a time at which it expires."""
        return [*self._client.zrange(keys.TIMERS, 0, MAX_CANDIDATES - 1)]

    def _failed(self) -> list[str]:
        """Return the ids of jobs whose request is kept, which are all that failed unless memory was short."""
        newest = self._client.zrange(keys.FAILED, 0, MAX_CANDIDATES - 1, desc=True)
        return [entry.partition(" ")[0] for entry in newest]

    def _replies(self, job_ids: Sequence[str], wanted: JobFilter) -> list[str]:
        """Return the reply of `search.lua` about each job."""
        return self._examine(args=[*wanted.in_redis, *job_ids]) if job_ids else []

    def _jobs(self, found: Sequence[tuple[float, str]]) -> list[Job]:
        with self._client.pipeline(transaction=False) as pipe:
            for _, job_id in found:
                pipe.hgetall(keys.JOB + job_id)
            return [Job.from_record(record) for record in pipe.execute() if record] if found else []
