"""The report of a dead worker process, also while Redis is unreachable."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.farm import Farm
from worker.process import death
from worker.process.breadcrumb import Breadcrumb, breadcrumb_path
from worker.process.exits import Exit

KILLED = Exit(-9, uptime_s=12.34, oom_kills=1, pid=77)


@pytest.fixture
def crumb(tmp_path: Path) -> Iterator[Breadcrumb]:
    crumb = Breadcrumb(breadcrumb_path(tmp_path / "data/run", "worker-0", "token"))
    crumb.workers({"w0-0": "m"})
    yield crumb
    crumb.close()


@pytest.fixture
def on_fake(client: Redis, monkeypatch: pytest.MonkeyPatch) -> Redis:
    """Send reports to the test's Redis, and keep its client open."""
    monkeypatch.setattr(client, "close", lambda: None)
    monkeypatch.setattr(death, "connect", lambda *_, **__: client)
    return client


def test_one_log_line_describes_the_death_and_names_the_suspects(
    on_fake: Redis, settings: Settings, crumb: Breadcrumb, caplog: pytest.LogCaptureFixture
) -> None:
    farm = Farm(on_fake, 1, slots=4)
    jobs = [farm.submit(50).id for _ in range(2)]
    farm.run(3)
    crumb.step("w0-0", jobs)
    death.report(settings, crumb.path, KILLED)
    [record] = caplog.records
    fields = vars(record)
    assert (record.levelno, record.message) == (logging.ERROR, "worker_process_died")
    assert fields["exit"] == "signal 9 (SIGKILL), after an OOM kill in its control group"
    assert (fields["phase"], fields["in_flight"], fields["uptime_s"], fields["oom_kills"]) == ("step", 2, 12.3, 1)
    assert (sorted(fields["suspects"]), fields["failed"], fields["reported"]) == (sorted(jobs), [], True)
    assert on_fake.hget(keys.JOB + jobs[0], "status") == "queued"
    assert not crumb.path.exists()


@pytest.mark.parametrize("phase", ["load", "idle"])
def test_no_job_is_suspected_of_a_death_between_steps(
    on_fake: Redis, settings: Settings, crumb: Breadcrumb, phase: str
) -> None:
    farm = Farm(on_fake, 1, slots=4)
    job = farm.submit(50).id
    farm.run(3)
    crumb.step("w0-0", [job])
    crumb.loading("tiny") if phase == "load" else crumb.idle()
    death.report(settings, crumb.path, KILLED)
    assert on_fake.hmget(keys.JOB + job, "status", "suspicion") == ["queued", None]


def test_without_redis_the_report_gives_up_and_the_breadcrumb_stays(
    crumb: Breadcrumb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(death, "PAUSE_S", 0.01)
    nowhere = Settings(data_dir=tmp_path / "data", redis_url="unix:///nowhere/at/all")
    started = time.monotonic()
    death.report(nowhere, crumb.path, KILLED)
    assert time.monotonic() - started < death.TRIES * 2 * death.TRY_S + 1
    assert crumb.path.exists()
    assert [vars(record)["reported"] for record in caplog.records] == [False]


def test_leftovers_are_reported_and_removed(
    on_fake: Redis, settings: Settings, crumb: Breadcrumb, caplog: pytest.LogCaptureFixture
) -> None:
    farm = Farm(on_fake, 1, slots=4)
    job = farm.submit(50).id
    farm.run(3)
    crumb.step("w0-0", [job])
    death.report_leftovers(settings, "worker-0")
    assert crumb.path.exists(), "its process is alive"
    crumb.close()
    death.report_leftovers(settings, "worker-1")
    assert crumb.path.exists(), "it belongs to another worker"
    death.report_leftovers(settings, "worker-0")
    assert not crumb.path.exists()
    assert on_fake.hmget(keys.JOB + job, "status", "suspicion") == ["queued", "1"]
    assert [record.message for record in caplog.records] == ["worker_process_died"]


def test_a_leftover_whose_jobs_have_continued_is_not_logged(
    on_fake: Redis, settings: Settings, crumb: Breadcrumb, caplog: pytest.LogCaptureFixture
) -> None:
    crumb.step("w0-0", ["job_gone"])
    crumb.close()
    death.report_leftovers(settings, "worker-0")
    assert not crumb.path.exists()
    assert caplog.records == []
