"""Many prompts at once, each from its submission to its result."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Self

from scripts.client.api import Client, Refused, RemoteJob
from scripts.client.prompts import Prompt
from scripts.client.results import Result
from scripts.client.retries import Patience, Stopped

POLL_S = 1.0
"""At most one question a job in this time, even when the API does not hold answers back."""

_KEY_REFUSED = (401, 403)


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and the Idempotency-Key it goes under."""

    prompt: Prompt
    key: str


@dataclass(frozen=True, slots=True)
class Pace:
    """How much goes on at a time.

    Attributes:
        concurrency: jobs at once.
        ahead: tasks begun at most before the results before them have been taken.
        wait_s: how long the API is asked to hold an answer back until the job has ended.
    """

    concurrency: int
    ahead: int
    wait_s: int


class Runner:
    """Threads that each take a task, hand it in, and wait for its end."""

    def __init__(self, client: Client, patience: Patience, stop: threading.Event, pace: Pace) -> None:
        """Work at a pace. `stop` is the event that `patience` heeds; leaving the runner sets it."""
        self._client = client
        self._patience = patience
        self._stop = stop
        self._pace = pace
        self._room = threading.Semaphore(pace.ahead)
        self._feed_lock = threading.Lock()
        self._outcomes: SimpleQueue[tuple[int, Result] | Exception | None] = SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._room.release(self._pace.concurrency)

    def run(self, tasks: Iterator[Task]) -> Iterator[tuple[int, Result]]:
        """Each task's place (0, 1, 2…) and result, as they come.

        Raises:
            GaveUp: the service stayed away.
            Refused: it does not accept the key (any more).
        """
        places = enumerate(tasks)
        for _ in range(self._pace.concurrency):
            # Daemons: who interrupts the run does not wait for answers held back by the API.
            threading.Thread(target=self._work, args=(places,), daemon=True).start()
        at_work = self._pace.concurrency
        while at_work:
            match self._outcomes.get():
                case None:
                    at_work -= 1
                case Exception() as error:
                    raise error
                case outcome:
                    yield outcome

    def taken(self) -> None:
        """Say that a result is dealt with, so that another task may begin."""
        self._room.release()

    def _work(self, tasks: Iterator[tuple[int, Task]]) -> None:
        try:
            for place, task in self._share(tasks):
                self._outcomes.put((place, self._complete(task)))
            self._outcomes.put(None)
        except Stopped:
            pass
        except Exception as error:  # noqa: BLE001 - `run` raises it: a thread must not end unheard
            self._outcomes.put(error)

    def _share(self, tasks: Iterator[tuple[int, Task]]) -> Iterator[tuple[int, Task]]:
        """This thread's part of what all threads draw from."""
        while True:
            self._room.acquire()
            if self._stop.is_set():
                raise Stopped
            with self._feed_lock:
                task = next(tasks, None)
            if task is None:
                self._room.release()
                return
            yield task

    def _complete(self, task: Task) -> Result:
        job: RemoteJob | None = None
        try:
            job = self._submit(task)
            while not job.status.terminal:
                job = self._poll(job.id)
            return _ended(task.prompt, job)
        except Refused as error:
            if error.status in _KEY_REFUSED:
                raise
            return _refused(task.prompt, job, error)

    def _submit(self, task: Task) -> RemoteJob:
        return self._patience.call(
            lambda: self._client.submit(task.prompt.body, idempotency_key=task.key, wait_s=self._pace.wait_s)
        )

    def _poll(self, job_id: str) -> RemoteJob:
        asked_at = time.monotonic()
        job = self._patience.call(lambda: self._client.job(job_id, wait_s=self._pace.wait_s))
        if not job.status.terminal:
            self._stop.wait(max(0.0, asked_at + POLL_S - time.monotonic()))
        return job


def _ended(prompt: Prompt, job: RemoteJob) -> Result:
    return Result(
        line=prompt.line,
        custom_id=prompt.custom_id,
        id=job.id,
        status=job.status,
        request=prompt.digest,
        text=job.text,
        finish_reason=job.finish_reason,
        usage=job.usage,
        timings=job.timings,
        error=job.error,
        actions=job.actions,
        parse_error=job.parse_error,
    )


def _refused(prompt: Prompt, job: RemoteJob | None, error: Refused) -> Result:
    return Result(
        line=prompt.line,
        custom_id=prompt.custom_id,
        id=job.id if job else None,
        status="rejected",
        request=prompt.digest,
        error={"code": error.code or f"http_{error.status}", "message": str(error)},
    )
