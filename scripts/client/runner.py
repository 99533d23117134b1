"""Runs many prompts concurrently, each from submission to result."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Self

from scripts.client.api import Client, Json, Refused, RemoteJob
from scripts.client.prompts import RESPONSES, Prompt
from scripts.client.results import SUCCEEDED, Result
from scripts.client.retries import RetryPolicy, Stopped

POLL_S = 1.0
"""Minimum interval between polls of a job, in case the API does not support long polls."""

_KEY_REJECTED = (401, 403)


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and its Idempotency-Key."""

    prompt: Prompt
    key: str


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on concurrent work.

    Attributes:
        concurrency: maximum number of concurrent jobs.
        max_ahead: maximum number of tasks that are started before their results are written.
        wait_s: duration of long polls, in seconds.
    """

    concurrency: int
    max_ahead: int
    wait_s: int


class Runner:
    """A pool of threads. Each takes a task, submits it and waits for its end."""

    def __init__(self, client: Client, retries: RetryPolicy, stop: threading.Event, limits: Limits) -> None:
        """Create a runner. `stop` is the event that also ends the waits of `retries`; `__exit__` sets it."""
        self._client = client
        self._retries = retries
        self._stop = stop
        self._limits = limits
        self._ahead = threading.Semaphore(limits.max_ahead)
        self._tasks_lock = threading.Lock()
        self._outcomes: SimpleQueue[tuple[int, Result] | Exception | None] = SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._ahead.release(self._limits.concurrency)

    def run(self, tasks: Iterator[Task]) -> Iterator[tuple[int, Result]]:
        """Generate the index (0, 1, 2…) and result of each task in the order of completion.

        Raises:
            RetriesExhausted: the service was unreachable for too long.
            Refused: it rejects the API key.
        """
        indexed = enumerate(tasks)
        for _ in range(self._limits.concurrency):
            # Daemon threads, so that an interrupted run does not wait for long polls.
            threading.Thread(target=self._work, args=(indexed,), daemon=True).start()
        working = self._limits.concurrency
        while working:
            match self._outcomes.get():
                case None:
                    working -= 1
                case Exception() as error:
                    raise error
                case outcome:
                    yield outcome

    def result_written(self) -> None:
        """Allow another task to start, because a result was written."""
        self._ahead.release()

    def _work(self, tasks: Iterator[tuple[int, Task]]) -> None:
        try:
            for index, task in self._draw(tasks):
                self._outcomes.put((index, self._complete(task)))
            self._outcomes.put(None)
        except Stopped:
            pass
        except Exception as error:  # noqa: BLE001 - raised again by `run`
            self._outcomes.put(error)

    def _draw(self, tasks: Iterator[tuple[int, Task]]) -> Iterator[tuple[int, Task]]:
        """Generate tasks for this thread from those that all threads share."""
        while True:
            self._ahead.acquire()
            if self._stop.is_set():
                raise Stopped
            with self._tasks_lock:
                task = next(tasks, None)
            if task is None:
                self._ahead.release()
                return
            yield task

    def _complete(self, task: Task) -> Result:
        job: RemoteJob | None = None
        try:
            if task.prompt.url:
                return _answer_of(task.prompt, self._answer(task))
            job = self._submit(task)
            while not job.status.terminal:
                job = self._poll(job.id)
            return _job_result(task.prompt, job)
        except Refused as error:
            if error.status in _KEY_REJECTED:
                raise
            return _rejected(task.prompt, job, error)

    def _submit(self, task: Task) -> RemoteJob:
        return self._retries.call(
            lambda: self._client.submit(task.prompt.body, idempotency_key=task.key, wait_s=self._limits.wait_s)
        )

    def _answer(self, task: Task) -> Json:
        """Return the answer of a route of OpenAI's API, which comes when the job has ended."""
        prompt, wait_s = task.prompt, self._limits.wait_s
        while True:
            answer = self._retries.call(
                lambda: self._client.complete(prompt.url, prompt.body, idempotency_key=task.key, wait_s=wait_s)
            )
            if answer is not None:
                return answer
            self._retries.call(lambda: self._client.request("GET", "/v1/jobs?limit=1"))  # whether the service is alive

    def _poll(self, job_id: str) -> RemoteJob:
        polled_at = time.monotonic()
        job = self._retries.call(lambda: self._client.job(job_id, wait_s=self._limits.wait_s))
        if not job.status.terminal:
            self._stop.wait(max(0.0, polled_at + POLL_S - time.monotonic()))
        return job


def _job_result(prompt: Prompt, job: RemoteJob) -> Result:
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
        regions=job.regions,
        parse_error=job.parse_error,
        message=job.message,
    )


def _answer_of(prompt: Prompt, answer: Json) -> Result:
    return _response_result(prompt, answer) if prompt.url == RESPONSES else _answer_result(prompt, answer)


def _response_result(prompt: Prompt, answer: Json) -> Result:
    messages = [item for item in answer["output"] if item["type"] == "message"]
    usage = answer.get("usage") or {}
    return Result(
        line=prompt.line,
        custom_id=prompt.custom_id,
        id=answer["id"].replace("resp_", "job_", 1),
        status=SUCCEEDED,
        request=prompt.digest,
        text="".join(part.get("text", "") for message in messages for part in message["content"]),
        finish_reason="length" if answer["status"] == "incomplete" else "stop",
        usage={"prompt_tokens": usage.get("input_tokens"), "completion_tokens": usage.get("output_tokens")},
        response=answer,
    )


def _answer_result(prompt: Prompt, answer: Json) -> Result:
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    text = choice.get("text") if "text" in choice else choice["message"].get("content")
    return Result(
        line=prompt.line,
        custom_id=prompt.custom_id,
        id=answer["id"].partition("-")[2],
        status=SUCCEEDED,
        request=prompt.digest,
        text=text or "",
        finish_reason=choice.get("finish_reason"),
        usage={name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")},
        response=answer,
    )


def _rejected(prompt: Prompt, job: RemoteJob | None, error: Refused) -> Result:
    return Result(
        line=prompt.line,
        custom_id=prompt.custom_id,
        id=job.id if job else None,
        status="rejected",
        request=prompt.digest,
        error={"code": error.code or f"http_{error.status}", "message": str(error)},
    )
