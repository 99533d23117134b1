"""Erase everything that belongs to purged API keys, while this process leads."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from shared.errors import Conflict, NotFound
from web.archive.database import ArchiveUnavailable
from web.batches.results import BatchFolder
from web.http.threadpool import LARGE, run_in_threadpool
from web.services import Services

log = logging.getLogger(__name__)

SETTLED_S: Final = 120.0
"""How long the erasure is repeated: requests that were under way may still submit jobs."""
_PAUSE_S: Final = 5.0
_CHUNK: Final = 500
_ALL: Final = 1_000_000


class KeyEraser:
    """Carries out the requests of `web.access.purges`. It can be interrupted at any point: the next round repeats it.

    The usage of the key is kept: it consists of numbers only.

    Args:
        leads: returns whether this process still leads. If not, a round ends early.
    """

    def __init__(self, current: Services, leads: Callable[[], bool] = lambda: True) -> None:
        self._services = current
        self._leads = leads
        self._next_at = 0.0
        self._purges = current.purges

    def round(self) -> None:
        """Erase what is left of purged keys. Raises `redis.RedisError` if Redis is unreachable."""
        if time.monotonic() < self._next_at:
            return
        self._next_at = time.monotonic() + _PAUSE_S
        for key_id, requested_at in self._purges.pending().items():
            try:
                is_empty = self._erase(key_id)
            except (ArchiveUnavailable, OSError) as error:
                log.warning("purge_incomplete", extra={"key_id": key_id, "reason": str(error)})
                continue
            if is_empty and self._leads() and time.time() - requested_at > SETTLED_S:
                self._purges.done(key_id)
                log.info("purge_done", extra={"key_id": key_id})

    def _erase(self, key_id: str) -> bool:
        """Erase what can be erased now; return whether nothing is left."""
        is_empty = self._erase_batches(key_id)
        is_empty &= self._erase_jobs(key_id)
        self._erase_responses(key_id)
        self._erase_files(key_id)
        self._services.receivers.forget_key(key_id)
        self._services.deliveries.forget_key(key_id)
        self._erase_archive(key_id)
        return is_empty

    def _erase_batches(self, key_id: str) -> bool:
        """Delete batches that have ended, and cancel the others; return whether none is left."""
        batches, root = self._services.batches, self._services.settings.files_path / "batches"
        is_empty = True
        for batch in batches.read(batches.ids(key_id)):
            if not self._leads():
                return False
            if batch.status.terminal:
                BatchFolder(root, batch.id).remove()
                batches.remove(batch.id, key_id)
            else:
                is_empty = False
                with suppress(Conflict, NotFound):
                    batches.cancel(batch.id, key_id)
        return is_empty

    def _erase_jobs(self, key_id: str) -> bool:
        """Delete jobs that have ended, and cancel the others; return whether none is left."""
        is_empty = True
        for job_id in self._services.archive_queue.ids(key_id, 0, _ALL):
            if not self._leads():
                return False
            is_empty &= self._erase_job(job_id, key_id)
        return is_empty

    def _erase_job(self, job_id: str, key_id: str) -> bool:
        """Delete a job that has ended, or cancel it; return whether it had ended."""
        jobs = self._services.jobs
        try:
            with suppress(NotFound):  # a child is deleted with its parent
                jobs.forget(job_id, key_id)
        except Conflict:
            with suppress(Conflict, NotFound):
                jobs.stop(job_id, key_id)
            return False
        return True

    def _erase_responses(self, key_id: str) -> None:
        responses, store = self._services.responses, self._services.response_store
        for owner, response_id, _ in responses.unanswered():
            if owner == key_id:
                responses.discard(response_id, owner)
        if key_id in store.owners():
            for entry in store.entries(key_id):
                responses.discard(entry.id, key_id)

    def _erase_files(self, key_id: str) -> None:
        """Delete the key's folders: of uploaded files and results, and of responses."""
        settings = self._services.settings
        for root in (settings.files_path, settings.responses_path):
            with suppress(FileNotFoundError):
                # In a thread: thousands of files take longer than this process may leave its leadership unrenewed.
                run_in_threadpool(LARGE, partial(shutil.rmtree, root / key_id))

    def _erase_archive(self, key_id: str) -> None:
        archive = self._services.archive
        while archive is not None and self._leads() and archive.erase_some(_CHUNK, owner=key_id):
            pass
