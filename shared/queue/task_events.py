"""Celery task events for jobs, so that Flower shows each job as a task whose uuid is the job id.

Workers send events for the jobs that they run, API processes for jobs that end without a worker. Events only inform
operators: they are dropped when the queue is full or the broker is unreachable.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, Full, Queue
from time import monotonic
from typing import Any, Final

from celery import Celery
from kombu.exceptions import OperationalError
from redis import RedisError

from shared.jobs.record import EndedJob, Ending, Job, Status
from shared.queue.wakeups import TASK

logger = logging.getLogger(__name__)

MAX_QUEUED: Final = 10_000
PAUSE_S: Final = 3.0
"""Time after a broker failure in which events are dropped."""

Event = tuple[str, dict[str, Any]]


class TaskEvents(threading.Thread):
    """A thread with its own broker connection that sends events in batches.

    Args:
        app: the Celery app; its broker is used.
        node: the Celery node name in the events.
    """

    QUEUE_NODE: Final = "mlxq-queue"
    """Node name in events of jobs that no worker holds."""

    def __init__(self, app: Celery, node: str) -> None:
        super().__init__(name="task-events", daemon=True)
        self._app = app
        self._node = node
        self._queue: Queue[Event | None] = Queue(MAX_QUEUED)
        self._paused_until = 0.0

    def claimed(self, job: Job) -> None:
        """Report that a worker has claimed a job."""
        self._put("task-received", job, **_arguments(job), retries=max(0, job.attempt - 1))

    def started(self, job: Job) -> None:
        """Report that a job was admitted to the batch."""
        self.claimed(job)
        self._put("task-started", job)

    def retried(self, job: Job) -> None:
        """Report that a worker returned a job to the queue."""
        self._put("task-retried", job, exception="handed back to the queue")

    def ended(self, job: Job, ending: Ending) -> None:
        """Report that a job has ended."""
        runtime = ending.timings.get("total_s")
        match ending.status:
            case Status.SUCCEEDED:
                self._put("task-succeeded", job, result=repr(ending.finish_reason), runtime=runtime)
            case Status.FAILED:
                self._put("task-failed", job, exception=f"{ending.error_code}: {ending.error_message}")
            case status:
                expired = status is Status.EXPIRED
                self._put("task-revoked", job, terminated=not expired, signum=None, expired=expired)

    def ended_without_worker(self, job: EndedJob) -> None:
        """Report a job that ended while it was queued, or because its worker crashed."""
        self._put("task-received", job, **_arguments(job))
        if job.status is Status.FAILED:
            self._put("task-failed", job, exception=f"{job.error_code}: {job.error_message}")
        else:
            expired = job.status is Status.EXPIRED
            self._put("task-revoked", job, terminated=False, signum=None, expired=expired)

    def stop(self) -> None:
        """Send the queued events and end the thread; give up after one second."""
        with suppress(Full):
            self._queue.put_nowait(None)
        if self.is_alive():
            self.join(1.0)

    def run(self) -> None:
        """Send until stopped."""
        while True:
            try:
                if self._send_until_stopped():
                    return
            except (OperationalError, RedisError, OSError) as error:
                logger.warning("task_events_dropped", extra={"reason": str(error)})
            except Exception:  # this thread sends all events, so one malformed event must not end it
                logger.exception("task_events_dropped")
            self._paused_until = monotonic() + PAUSE_S

    def _send_until_stopped(self) -> bool:
        event = self._queue.get()
        if event is None or monotonic() < self._paused_until:
            return event is None
        with (
            self._app.connection_for_write() as connection,
            self._app.events.Dispatcher(
                connection, hostname=self._node, buffer_while_offline=False, buffer_group={"task"}
            ) as dispatcher,
        ):
            while event is not None:
                kind, fields = event
                dispatcher.send(kind, **fields)
                try:
                    event = self._queue.get_nowait()
                except Empty:
                    dispatcher.flush(errors=False)
                    event = self._queue.get()
            dispatcher.flush(errors=False)
        return True

    def _put(self, kind: str, job: Job | EndedJob, **fields: Any) -> None:
        event: Mapping[str, Any] = {"uuid": job.id, "name": TASK, **fields}
        with suppress(Full):
            self._queue.put_nowait((kind, dict(event)))


def _arguments(job: Job | EndedJob) -> dict[str, str]:
    return {"args": "()", "kwargs": repr({"model": job.model})}
