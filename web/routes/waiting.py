"""Clients that wait for a job on their connection: the end of the job, and the end of the connection."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from typing import TYPE_CHECKING, Final

import redis
from flask import Response, request

from shared.errors import MlxqError
from shared.jobs.log import Event, EventKind
from shared.jobs.readers import RESTART_S, after_grace
from shared.jobs.record import Job
from web.http.disconnect import watch_disconnect
from web.http.problems import problem
from web.http.request import idempotency_key
from web.routes.submission import retry_count
from web.services import Services, services
from web.streaming.follower import Watch
from web.streaming.response import restarting

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST: Final = 499
"""A status that nginx logs in this case."""


def disconnect_handler(job: Job, may_retry: Callable[[], bool] = lambda: True) -> Callable[[], None]:
    """Return what to call when the client of a job and its children disconnects.

    With an Idempotency-Key, the jobs continue: other requests may be waiting for them, now or later. If the client
    repeats requests by itself, it gets some time to do so. Otherwise, the jobs are cancelled.

    Args:
        may_retry: whether such a client may still repeat this request.
    """
    if idempotency_key():
        return keep_job
    cancel = job_canceller(services(), job)
    if retry_count() is None:
        return cancel
    retain = job_retainer(services(), job)
    return lambda: retain() if may_retry() else cancel()


def stored_disconnect_handler(job: Job) -> Callable[[], None]:
    """Return the function to call when the client of a resumable stream disconnects.

    It cancels the job after a grace period, unless another client streams the job then.
    """
    return keep_job if idempotency_key() else job_retainer(services(), job, services().readers.is_streamed)


def keep_job() -> None:
    """Let the job continue without its client."""


def job_canceller(current: Services, job: Job) -> Callable[[], None]:
    """Return a function that cancels the job and its children the first time it is called."""

    def cancel() -> None:
        if current.hub.closing:  # while the process shuts down, connections are not closed by clients
            return
        current.jobs.stop(job.id, job.owner)
        log.info("job_cancelled_on_disconnect", extra={"job_id": job.id})

    return _once(cancel, job)


def job_retainer(current: Services, job: Job, is_read: Callable[[Job], bool] = lambda _: False) -> Callable[[], None]:
    """Return a function that cancels the job and its children unless the client comes back soon.

    Args:
        is_read: whether another client reads the job.
    """

    def retain() -> None:
        kept_until = current.readers.detach(job)
        if not current.hub.closing:
            after_grace(_once(lambda: abandon(kept_until), job))

    def abandon(kept_until: str) -> None:
        if not is_read(job) and current.readers.abandon(job, kept_until):
            log.info("job_cancelled_on_disconnect", extra={"job_id": job.id})

    return _once(retain, job)


def _once(call: Callable[[], object], job: Job) -> Callable[[], None]:
    """Return a function that makes a call the first time, and logs its errors."""
    called = False

    def call_once() -> None:
        nonlocal called
        if called:
            return
        called = True
        try:
            call()
        except (MlxqError, redis.RedisError) as error:
            log.info("job_cancel_failed", extra={"job_id": job.id, "reason": str(error)})

    return call_once


def watch_client(environ: WSGIEnvironment, on_disconnect: Callable[[], None]) -> Watch:
    """Return a watch that also calls `on_disconnect`."""

    def watch(wake: Callable[[], None]) -> AbstractContextManager[None]:
        def disconnected() -> None:
            on_disconnect()
            wake()

        return watch_disconnect(environ, disconnected)

    return watch


def wait_for_end(jobs: Sequence[Job], on_disconnect: Callable[[], None]) -> list[Job]:
    """Wait until all jobs have ended; return their latest states.

    Not all have ended if the client has disconnected or the process is shutting down: see `unfinished`.
    """
    current, ended = services(), list[Job]()
    watch = watch_client(request.environ, on_disconnect)
    for job in jobs:
        current.follower.wait(job.id, None, linger_s=current.settings.drain_s / 2, watch=watch)
        ended.append(current.jobs.latest(job))
        if not ended[-1].status.terminal:
            break
    return ended


def unfinished(jobs: Sequence[Job]) -> Response | None:
    """Return the response to a request whose jobs have not all ended; None if they have.

    Args:
        jobs: from `wait_for_end`.
    """
    current = services()
    if all(job.status.terminal for job in jobs):
        return None
    if not current.hub.closing:
        return Response(status=CLIENT_CLOSED_REQUEST)  # nobody reads it, but it is logged and counted
    if retry_count() is not None:
        current.readers.detach(jobs[0], RESTART_S)
    return problem(restarting(jobs[0].id))


def ended_by_client(events: Generator[list[Event]], on_disconnect: Callable[[], None]) -> Generator[list[Event]]:
    """Pass events on; call `on_disconnect` if sending fails before the last one."""
    with closing(events):
        for ready in events:
            ended = bool(ready) and ready[-1].kind is EventKind.DONE
            try:
                yield ready
            except GeneratorExit:
                if not ended:  # sending failed; `watch_disconnect` may not have noticed yet
                    on_disconnect()
                raise
