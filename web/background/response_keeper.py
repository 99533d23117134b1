"""Store the answers of responses whose jobs have ended, and delete responses that are old or too many."""

from __future__ import annotations

import logging
import time
from collections.abc import Container
from typing import Final

import redis

from shared.errors import Unavailable
from shared.jobs.store import Jobs
from shared.settings import Settings
from web.responses.store import Entry, ResponseStore
from web.responses.stored import Responses
from web.responses.view import job_id

log = logging.getLogger(__name__)

PAGE: Final = 500
"""Responses whose jobs are looked up with one call."""
ABANDONED_S: Final = 60.0
"""A response without a job for this long belongs to a request that was never accepted."""
_CLEAN_S: Final = 60.0


class ResponseKeeper:
    """Does the work for stored responses that no request does.

    API processes store a response before its job is accepted, and read its answer from the job's log. Before the log
    expires, this copies the answer. It can be interrupted at any point: the next round, of any process, repeats it.
    """

    def __init__(self, settings: Settings, responses: Responses, store: ResponseStore, jobs: Jobs) -> None:
        self._lifetime_s = settings.responses_retention_s
        self._bytes_per_key = settings.responses_bytes_per_key
        self._responses = responses
        self._store = store
        self._jobs = jobs
        self._clean_at = 0.0

    def round(self) -> None:
        """Store the answers that have become complete. Raises `redis.RedisError` if Redis is unreachable."""
        waiting = self._responses.unanswered()
        for start in range(0, len(waiting), PAGE):
            page = waiting[start : start + PAGE]
            ended = self._jobs.ended([job_id(response_id) for _, response_id, _ in page])
            for owner, response_id, created_at in page:
                if job_id(response_id) in ended:
                    self._settle(owner, response_id, created_at)
        if time.monotonic() >= self._clean_at:
            self._clean_at = time.monotonic() + _CLEAN_S
            self.clean()

    def clean(self) -> None:
        """Delete expired responses, and the oldest of API keys that have too many. Those in progress are kept."""
        waiting = {response_id for _, response_id, _ in self._responses.unanswered()}
        for owner in self._store.owners():
            try:
                self._clean(owner, waiting)
            except OSError as error:  # such as that of `lost+found`, the root's own folder on a disk
                log.warning("responses_not_cleaned", extra={"key_id": owner, "reason": str(error)})

    def _clean(self, owner: str, waiting: Container[str]) -> None:
        entries = [entry for entry in self._store.entries(owner) if entry.id not in waiting]
        for entry in surplus(entries, time.time() - self._lifetime_s, self._bytes_per_key):
            self._responses.discard(entry.id, owner)

    def _settle(self, owner: str, response_id: str, created_at: float) -> None:
        extra = {"response_id": response_id}
        try:
            if self._responses.store_answer(response_id, owner):
                return
            if time.time() - created_at > ABANDONED_S:
                self._responses.discard(response_id, owner)
                log.warning("response_discarded", extra=extra)
        except Unavailable as error:  # the disk is full: the next round tries again
            log.warning("response_not_stored", extra={**extra, "reason": str(error)})
        except redis.RedisError:
            raise
        except Exception:
            log.exception("response_not_stored", extra=extra)


def surplus(entries: list[Entry], expired_at: float, most_bytes: int) -> list[Entry]:
    """Return the entries to delete: those last used before a time, and the oldest beyond a total size."""
    kept, deleted = 0, list[Entry]()
    for entry in sorted(entries, key=lambda entry: entry.used_at, reverse=True):
        if entry.used_at <= expired_at or kept + entry.bytes > most_bytes:
            deleted.append(entry)
        else:
            kept += entry.bytes
    return deleted
