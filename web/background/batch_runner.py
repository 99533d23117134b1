"""Run all unfinished batches while this process leads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import gevent
import redis

from shared.jobs.store import Jobs
from shared.redis.client import passes
from shared.settings import Settings
from web.background.leader import Leadership
from web.batches.requests import LineRequests
from web.batches.results import BatchFolder
from web.batches.run import BatchRun
from web.batches.store import Batches, NotLeader
from web.files.store import ABANDONED_S, FileStore

log = logging.getLogger(__name__)

MAX_RUNNING: Final = 16
"""Maximum batches that run at once; the others wait, oldest first."""
LOOK_S: Final = 0.5
"""Interval of looks for new batches."""
_RETRY_S: Final = 5.0
"""Pause before a batch whose run failed is continued."""
_CLEAN_S: Final = 600.0


class BatchRunner:
    """Starts a greenlet for each batch.

    Args:
        stopping: set when the process is to stop.
    """

    def __init__(
        self,
        settings: Settings,
        batches: Batches,
        files: FileStore,
        jobs: Jobs,
        requests: LineRequests,
        leadership: Leadership,
        stopping: threading.Event,
    ) -> None:
        self._settings = settings
        self._batches = batches
        self._files = files
        self._jobs = jobs
        self._requests = requests
        self._leadership = leadership
        self._stopping = stopping
        self._running: dict[str, gevent.Greenlet[..., None]] = {}
        self._retry_at: dict[str, float] = {}
        self._clean_at = 0.0

    def round(self) -> None:
        """Start the batches that wait. Raises `redis.RedisError` if Redis is unreachable."""
        self._running = {batch_id: each for batch_id, each in self._running.items() if not each.dead}
        now = time.monotonic()
        for batch_id in self._batches.unfinished():
            if len(self._running) >= MAX_RUNNING:
                break
            if batch_id not in self._running and self._retry_at.get(batch_id, 0.0) <= now:
                self._running[batch_id] = gevent.spawn(self._run, batch_id)
        if now >= self._clean_at:
            self._clean_at = now + _CLEAN_S
            self._clean()

    def join(self) -> None:
        """Wait until no batch runs: each stops when this process no longer leads or is to stop."""
        gevent.joinall([*self._running.values()])

    def _run(self, batch_id: str) -> None:
        try:
            batch = self._batches.find(batch_id)
            if batch is None:
                return
            BatchRun(
                batch,
                settings=self._settings,
                batches=self._batches,
                files=self._files,
                jobs=self._jobs,
                requests=self._requests,
                token=self._leadership.token,
                leads=self._leads(),
                sleep=gevent.sleep,
            ).run()
            self._retry_at.pop(batch_id, None)
        except NotLeader:
            log.info("batch_left", extra={"batch_id": batch_id})
        except Exception as error:
            self._retry_at[batch_id] = time.monotonic() + _RETRY_S
            transient = isinstance(error, redis.RedisError) and passes(error)
            extra = {"batch_id": batch_id, "reason": str(error)}
            log.log(
                logging.WARNING if transient else logging.ERROR,
                "batch_interrupted",
                exc_info=None if transient else error,
                extra=extra,
            )

    def _leads(self) -> Callable[[], bool]:
        return lambda: self._leadership.valid and not self._stopping.is_set()

    def _clean(self) -> None:
        """Delete expired files, and folders of batches that have ended or were never accepted."""
        removed = self._files.remove_expired()
        root = self._settings.files_path / "batches"
        for path in root.glob("batch_*"):
            batch = self._batches.find(path.name)
            is_new = time.time() - path.stat().st_mtime < ABANDONED_S
            if (batch is None and not is_new) or (batch is not None and batch.status.terminal):
                BatchFolder(root, path.name).remove()
        if removed:
            log.info("expired_files_removed", extra={"count": removed})
