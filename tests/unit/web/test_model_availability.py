"""Jobs for models that nothing can serve are refused and ended; all others keep waiting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import time

import pytest

from shared.errors import JobFailure, MlxqError
from shared.jobs.record import Status
from shared.jobs.store import Jobs
from shared.models.catalog import Catalog, CatalogModel
from shared.models.operations import Operation, Operations, OperationState
from shared.models.registry import HostInfo, ModelCard, Registry, WorkerInfo
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import MODEL, lease, submit, taken
from web.cluster.model_availability import GRACE_S, MARK_S, ModelAvailability

HOST = HostInfo("here", "machine", 1, 0.0, 0.0, (), memory_limit=100, memory_used=0)


@dataclass
class Clock:
    """A clock that stands still."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Cluster:
    """An API process, whose catalog lists the model or not, and what the others have written."""

    client: Redis
    folder: Path
    listed: bool = True
    on_demand: bool = True
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.registry, self.operations = Registry(self.client), Operations(self.client)
        self.jobs = Jobs(self.client, Settings(durable=False))
        models = {MODEL: CatalogModel(MODEL, self.folder, "text", weights_bytes=50)} if self.listed else {}
        self.process = ModelAvailability(
            self.registry,
            self.operations,
            self.jobs,
            Catalog(models, MODEL),
            on_demand=self.on_demand,
            clock=self.clock,
        )
        self.job = submit(self.jobs)

    def announce(self, **changes: object) -> None:
        self.registry.announce_host(replace(HOST, **changes), 1000)  # type: ignore[arg-type]

    def fail_load(self, code: str = "load_failed") -> Operation:
        self.operations.claim_demand(MODEL, 30)
        begun = self.operations.begin("load", MODEL, "here")
        self.operations.store_demand(begun)
        return self.operations.put(
            replace(begun, state=OperationState.FAILED, error_code=code, error_message="It has no weights.")
        )

    def error(self) -> tuple[Status, str | None]:
        """Run a round; return the job's state and error."""
        self.process.round()
        job = self.jobs.get(self.job.id, self.job.owner)
        return job.status, job.error_code

    def refusal(self) -> tuple[int, str, str | None] | None:
        """Return the status, code and field with which a new job is refused; None if it is not."""
        try:
            self.process.check(MODEL)
        except MlxqError as error:
            return error.status, error.code, error.field
        return None

    def pass_time(self, seconds: float) -> None:
        """Let time pass for this process and for the marks in Redis."""
        self.clock.now += seconds
        for model, at in self.client.zrange(keys.SERVABLE, 0, -1, withscores=True):
            self.client.zadd(keys.SERVABLE, {model: at - seconds})


@pytest.fixture
def make(client: Redis, tmp_path: Path) -> Callable[..., Cluster]:
    (tmp_path / "config.json").write_text("{}")
    return lambda **options: Cluster(client, tmp_path, **options)


WAITING = (Status.QUEUED, None)
NOT_FOUND = (Status.FAILED, JobFailure.MODEL)
LOAD_FAILED = (Status.FAILED, JobFailure.LOAD)


@pytest.mark.parametrize("card", [True, False])
def test_jobs_of_a_model_that_nothing_lists_fail_after_a_grace_period(make: Callable[..., Cluster], card: bool) -> None:
    cluster = make(listed=False)
    if card:
        cluster.registry.announce_model(ModelCard(MODEL, "text", 64))
    cluster.registry.mark_servable([MODEL])  # a worker that has just ended, or a process with another catalog
    assert cluster.error() == WAITING and cluster.refusal() is None
    cluster.pass_time(GRACE_S - 1)
    assert cluster.error() == WAITING and cluster.refusal() is None
    cluster.pass_time(2)
    assert cluster.refusal() == (404, "model_not_found", "model")
    assert cluster.error() == NOT_FOUND
    assert cluster.client.zcard(keys.QUEUE + MODEL) == 0


def test_a_process_that_has_just_started_ends_no_jobs(make: Callable[..., Cluster]) -> None:
    """After an outage, the marks are old although workers are about to start. New jobs are refused."""
    cluster = make(listed=False)
    cluster.registry.announce_model(ModelCard(MODEL, "text", 64))
    assert cluster.error() == WAITING
    assert cluster.refusal() == (404, "model_not_found", "model")
    cluster.pass_time(GRACE_S + 1)
    assert cluster.error() == NOT_FOUND


def has_host(cluster: Cluster) -> None:
    cluster.announce(models=(MODEL,))


def has_worker(cluster: Cluster) -> None:
    info = WorkerInfo("here/1", "here", "machine", 1, MODEL, "loading", 8, 0, time(), time(), {}, {})
    cluster.registry.announce_worker(info, 1000)


@pytest.mark.parametrize("serve", [has_host, has_worker])
@pytest.mark.parametrize("listed", [True, False])
def test_jobs_of_a_model_that_a_worker_has_wait(
    make: Callable[..., Cluster], serve: Callable[[Cluster], None], listed: bool
) -> None:
    cluster = make(listed=listed)
    serve(cluster)
    for _ in range(2):
        cluster.fail_load()
        assert cluster.error() == WAITING
        cluster.pass_time(GRACE_S + MARK_S)


@pytest.mark.parametrize("on_demand", [True, False])
def test_jobs_of_a_listed_model_wait_while_no_worker_runs(make: Callable[..., Cluster], on_demand: bool) -> None:
    cluster = make(on_demand=on_demand)
    for _ in range(3):
        assert cluster.error() == WAITING and cluster.refusal() is None
        cluster.pass_time(GRACE_S)


def test_another_process_that_lists_the_model_keeps_its_jobs_waiting(make: Callable[..., Cluster]) -> None:
    cluster, other = make(listed=False), make()
    for _ in range(20):
        assert other.error() == WAITING and cluster.error() == WAITING and cluster.refusal() is None
        cluster.pass_time(MARK_S)
        other.clock.now += MARK_S
    cluster.pass_time(GRACE_S)
    assert cluster.error() == NOT_FOUND


def test_jobs_of_a_model_that_does_not_load_fail_at_once(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.announce()
    assert cluster.error() == WAITING and cluster.refusal() is None
    cluster.fail_load()
    assert cluster.refusal() == (422, "load_failed", "model")
    assert cluster.error() == LOAD_FAILED
    job = cluster.jobs.get(cluster.job.id, cluster.job.owner)
    assert job.error_message == "It has no weights."
    cluster.client.delete(keys.DEMAND + MODEL)  # it expires earlier
    assert cluster.refusal() == (422, "load_failed", "model")


def change_folder(cluster: Cluster) -> None:
    (cluster.folder / "model.safetensors").write_bytes(b"12")


def restart_worker(cluster: Cluster) -> None:
    cluster.announce(pid=2)


def expire(cluster: Cluster) -> None:
    cluster.client.delete(keys.LOAD_FAILURE + MODEL, keys.DEMAND + MODEL)


@pytest.mark.parametrize("repair", [change_folder, restart_worker, expire])
def test_a_model_that_may_load_now_is_tried_again(
    make: Callable[..., Cluster], repair: Callable[[Cluster], None]
) -> None:
    cluster = make()
    cluster.announce()
    cluster.fail_load()
    assert cluster.refusal() is not None
    repair(cluster)
    assert cluster.refusal() is None and cluster.error() == WAITING
    cluster.fail_load()
    assert cluster.error() == LOAD_FAILED


@pytest.mark.parametrize("folder", ["missing", "dangling link", "unreadable"])
def test_a_folder_that_cannot_be_read_here_is_no_error(
    make: Callable[..., Cluster], tmp_path: Path, folder: str
) -> None:
    cluster = make()
    cluster.announce()
    if folder == "dangling link":
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / "config.json").unlink()
        tmp_path.rmdir()
        if folder == "unreadable":
            tmp_path.write_text("a file in place of the folder")
    cluster.fail_load()
    assert cluster.refusal() == (422, "load_failed", "model")
    assert cluster.error() == LOAD_FAILED
    if folder == "dangling link":
        (tmp_path / "nowhere").write_bytes(b"12")
        assert cluster.refusal() is None


@pytest.mark.parametrize("code", ["worker_lost", "worker_silent", "not_enough_memory", "internal"])
def test_jobs_wait_after_a_failure_that_may_pass(make: Callable[..., Cluster], code: str) -> None:
    cluster = make()
    cluster.announce()
    cluster.fail_load(code)
    assert cluster.error() == WAITING and cluster.refusal() is None


@pytest.mark.parametrize("changes", [{"memory_limit": 40}, {"memory_pinned": 60}])
def test_jobs_of_a_model_that_fits_no_worker_fail_after_a_grace_period(
    make: Callable[..., Cluster], changes: dict[str, int]
) -> None:
    cluster = make()
    cluster.announce(**changes)
    assert cluster.error() == WAITING
    cluster.pass_time(GRACE_S - 1)
    cluster.announce()  # a larger worker comes back
    assert cluster.error() == WAITING
    cluster.announce(**changes)
    for seconds in (1, GRACE_S - 1):
        assert cluster.error() == WAITING
        cluster.pass_time(seconds)
    cluster.pass_time(1)
    assert cluster.error() == LOAD_FAILED
    assert "No worker has" in (cluster.jobs.get(cluster.job.id, cluster.job.owner).error_message or "")


def test_reserved_and_running_jobs_are_left_to_their_worker(make: Callable[..., Cluster], client: Redis) -> None:
    cluster = make()
    reserved = taken(lease(client, "w1"))
    assert reserved.job.id == cluster.job.id
    waiting = submit(cluster.jobs)
    assert cluster.jobs.fail_waiting(MODEL, JobFailure.LOAD, "reason") == 1
    assert cluster.jobs.get(waiting.id, waiting.owner).status is Status.FAILED
    assert cluster.jobs.get(reserved.job.id, reserved.job.owner).status is Status.QUEUED
