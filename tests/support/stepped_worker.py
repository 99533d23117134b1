"""A model worker without threads, which a test steps by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from shared.jobs.log import JobLog
from shared.jobs.record import Ending, Job
from shared.jobs.store import Jobs
from shared.queue.job_spans import JobSpans
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from shared.tokenizing.client import Tokenizing
from tests.support.queueing import lease, submit
from worker.engine.core import EngineCore
from worker.queue.claimer import Claimer
from worker.queue.prepare import Preparer
from worker.queue.publisher import Publisher
from worker.runner.fake import FakeRunner

SLOTS = 2
"""Rows that its engine decodes at once."""


class Recorder:
    """Replaces the notifier and the task events, and records their calls."""

    def __init__(self) -> None:
        self.woken: list[str] = []
        self.events: list[tuple[str, str]] = []

    def wake(self, models: Iterable[str]) -> None:
        self.woken += models

    def started(self, job: Job) -> None:
        self.events.append(("started", job.id))

    def retried(self, job: Job) -> None:
        self.events.append(("retried", job.id))

    def ended(self, job: Job, ending: Ending) -> None:
        self.events.append((ending.status.value, job.id))


class SteppedWorker:
    """A model worker without threads: `claimer.round` claims, `step` runs the engine and writes its output."""

    def __init__(self, client: Redis, settings: Settings, slots: int = SLOTS) -> None:
        self.client = client
        self.jobs = Jobs(client, settings)
        self.log = JobLog(client)
        self.claims = lease(client, "w1")
        self.recorder = Recorder()
        self.images: dict[str, bytes] = {}
        self.publisher = Publisher(
            self.claims,
            lambda *write_result: self.core.apply_write_result(*write_result),  # noqa: PLW0108 - the core is made later
            on_started=self.recorder.started,
        )
        self.core = EngineCore(FakeRunner, slots, self.publisher.put)
        self.core.load()
        self.preparer = Preparer(Tokenizing(1.0), tuple, self.find_images, self.log)  # starts no helper
        self.claimer = Claimer(
            "fake", self.core, self.claims, self.preparer, self.publisher.put,
            self.recorder, self.recorder, JobSpans(None, ""), slots, lambda: ("w1", "w1-of-another-model"),  # type: ignore[arg-type]
        )  # fmt: skip

    def find_images(self, _job_id: str, digests: Iterable[str]) -> Mapping[str, bytes]:
        return {digest: self.images[digest] for digest in digests if digest in self.images}

    def submit(self, prompt: str = "hello", *, known: bool = True, **more: Any) -> Job:
        """Submit a job. If its tokens are known, the claimer's own thread prepares it."""
        tokens = tuple(prompt.encode()) if known else None
        return submit(self.jobs, model="fake", prompt=prompt, tokens=tokens, **{"max_tokens": 4} | more)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.core.step()
            self.publisher.write()

    def finish(self) -> None:
        """Run until no job is held."""
        for _ in range(200):
            self.claimer.round()
            if self.claimer.idle:
                return
            self.step()
        pytest.fail("it does not end")

    def get(self, job: Job) -> Job:
        return self.jobs.get(job.id, "a")

    def holder(self, job: Job) -> str:
        return str(self.client.hget(keys.JOB + job.id, "worker"))

    def is_spare(self, job: Job) -> bool:
        return bool(self.client.hexists(keys.JOB + job.id, "spare"))

    def holds(self) -> set[str]:
        return set(self.claimer.held)


def raising(error: Exception) -> Callable[..., Any]:
    """A function that raises `error`, whatever it is called with."""

    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def ids(jobs: Iterable[Job]) -> set[str]:
    return {job.id for job in jobs}
