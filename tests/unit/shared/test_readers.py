"""Retries of a request join its job if the connection or the API process was lost, and only then."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from shared.jobs import readers as module
from shared.jobs.readers import Readers, reader_id
from shared.jobs.record import Job, Status
from shared.jobs.store import Jobs, new_job_id
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import end, lease, started, submission, submit


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return Jobs(client, Settings(durable=False))


@pytest.fixture
def readers(client: Redis) -> Readers:
    return Readers(client)


def read(jobs: Jobs, reader: str = "") -> Job:
    """Submit a job whose client waits for it."""
    return submit(jobs, fingerprint="f", reader=reader or reader_id())


def test_a_connected_job_is_not_joined(jobs: Jobs, readers: Readers) -> None:
    read(jobs)
    assert readers.rejoin("a", "f") is None


def test_a_job_without_its_client_is_joined_once(jobs: Jobs, readers: Readers) -> None:
    job = read(jobs)
    kept_until = readers.detach(job)
    assert readers.rejoin("a", "another") is None
    assert readers.rejoin("another", "f") is None
    assert readers.rejoin("a", "f") == job.id
    assert readers.rejoin("a", "f") is None, "it has a client again"
    assert not readers.abandon(job, kept_until)
    assert jobs.get(job.id, "a").status is Status.QUEUED


def test_equal_requests_that_lost_their_clients_are_joined_each(jobs: Jobs, readers: Readers) -> None:
    lost = [read(jobs) for _ in range(2)]
    for job in lost:
        readers.detach(job)
    assert {readers.rejoin("a", "f") for _ in range(2)} == {job.id for job in lost}
    assert readers.rejoin("a", "f") is None


def test_a_job_that_nobody_joins_is_cancelled(jobs: Jobs, readers: Readers) -> None:
    job = read(jobs)
    assert readers.abandon(job, readers.detach(job))
    assert jobs.get(job.id, "a").status is Status.CANCELLED


def test_an_older_loss_does_not_cancel(jobs: Jobs, readers: Readers) -> None:
    job = read(jobs)
    first = readers.detach(job)
    assert readers.rejoin("a", "f") == job.id
    second = readers.detach(job)
    assert first != second
    assert not readers.abandon(job, first)
    assert readers.abandon(job, second)


def test_a_job_that_has_ended_since_is_joined(client: Redis, jobs: Jobs, readers: Readers) -> None:
    job = read(jobs)
    worker = lease(client, "w1")
    end(worker, started(worker))
    readers.detach(job)
    assert readers.rejoin("a", "f") == job.id


def test_a_job_is_joined_only_for_a_while(
    jobs: Jobs, readers: Readers, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = read(jobs)
    readers.detach(job)
    client.hincrbyfloat(keys.JOB + job.id, "kept_until", -2 * module.GRACE_S)
    assert readers.rejoin("a", "f") is None


def test_jobs_of_a_dead_process_are_joined(jobs: Jobs, readers: Readers) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    job = read(jobs, f"{socket.gethostname()}:{dead.pid}:aa")
    assert readers.rejoin("a", "f") == job.id
    assert readers.rejoin("a", "f") is None, "it is read by this process now"


def test_the_first_of_several_choices_is_joined(jobs: Jobs, readers: Readers) -> None:
    dead = f"{socket.gethostname()}:{os.getpid()}:aa"
    choices = [submission(fingerprint="f", reader=dead) for _ in range(3)]
    first = jobs.create_all(choices, [new_job_id() for _ in choices]).job
    assert readers.rejoin("a", "f") == first.id
    assert readers.rejoin("a", "f") is None


def test_jobs_of_an_earlier_process_with_the_same_id_are_joined(jobs: Jobs, readers: Readers) -> None:
    job = read(jobs, f"{socket.gethostname()}:{os.getpid()}:aa")
    assert readers.rejoin("a", "f") == job.id


@pytest.mark.parametrize("reader", ["elsewhere:1:aa", f"{socket.gethostname()}:{os.getppid()}:aa"])
def test_jobs_of_other_processes_are_not_joined(jobs: Jobs, readers: Readers, reader: str) -> None:
    read(jobs, reader)
    assert readers.rejoin("a", "f") is None


def test_a_deleted_job_is_not_recreated(client: Redis, jobs: Jobs, readers: Readers) -> None:
    job = read(jobs)
    client.delete(keys.JOB + job.id)
    readers.detach(job)
    assert not client.exists(keys.JOB + job.id)


def test_the_id_of_this_process_is_stable() -> None:
    assert reader_id() == reader_id()
    assert reader_id().split(":")[1] == str(os.getpid())
