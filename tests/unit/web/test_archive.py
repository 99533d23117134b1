"""The archive's database: pages, searches, erasing, and what happens if the file cannot be used."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from shared.jobs.record import Priority, Status
from shared.jobs.search import JobFilter
from shared.jobs.usage import Counters, UsageRow
from tests.support.archive import archived
from web.archive import queries
from web.archive.database import Archive, ArchiveUnavailable

ALL = JobFilter()


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    opened = Archive(tmp_path / "data/archive.sqlite3")
    yield opened
    opened.close()


def numbers(archive: Archive, wanted: JobFilter = ALL, owners: list[str] | None = None, limit: int = 2) -> list[int]:
    """The numbers of the jobs on all pages."""
    found, before = list[int](), None
    while True:
        page = archive.page(owners, wanted, limit, before)
        assert len(page.jobs) <= limit
        found += [int(each.record["id"][4:], 16) for each in page.jobs]
        before = page.next
        if before is None:
            return found


def test_an_archive_without_a_file_is_empty(archive: Archive) -> None:
    assert numbers(archive) == []
    assert archive.find("job_1") is None
    assert archive.erase_some(5) == 0
    archive.erase(["job_1"])
    assert not archive.file.exists(), "reading creates no file"


def test_any_path_names_the_file(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "what?mode=memory#%41" / "archive.sqlite3")
    archive.write([archived(1)])
    assert archive.file.stat().st_size
    archive.close()
    again = Archive(archive.file)
    assert numbers(again) == [1]
    again.close()


def test_an_archive_that_is_being_created_is_empty(archive: Archive) -> None:
    archive.file.parent.mkdir(parents=True)
    archive.file.touch()
    assert numbers(archive) == []
    assert archive.find("job_1") is None and archive.missing(["job_1"]) == ["job_1"]
    assert archive.last_usage_day() is None
    archive.write([archived(1)])
    assert numbers(archive) == [1]


def test_a_job_is_stored_without_what_only_the_queue_needs(archive: Archive) -> None:
    job = archived(1, request='{"prompt": "\ud800"}', text="Größe 🙂")
    assert archive.write([job])
    assert archive.write([job]), "writing it again changes nothing"
    found = archive.find(job.record["id"])
    assert found == job
    assert "webhook" not in job.record
    assert job.job.archived and job.job.status is Status.SUCCEEDED
    assert archive.file.stat().st_mode & 0o777 == 0o600
    assert archive.missing([job.record["id"], "job_2"]) == ["job_2"]


def test_nothing_is_stored_if_another_process_leads_before_the_commit(archive: Archive) -> None:
    assert not archive.write([archived(1)], may_commit=lambda: False)
    assert numbers(archive) == []


@pytest.mark.parametrize(
    ("wanted", "owners", "expected"),
    [
        (ALL, None, [5, 4, 3, 2, 1, 0]),
        (ALL, ["a"], [4, 2, 0]),
        (ALL, ["a", "b"], [5, 4, 3, 2, 1, 0]),
        (JobFilter(status=Status.FAILED), None, [3, 0]),
        (JobFilter(status=Status.FAILED), ["a"], [0]),
        (JobFilter(status=Status.QUEUED), None, []),
        (JobFilter(model="n"), None, [5, 4]),
        (JobFilter(model="n", status=Status.SUCCEEDED), ["b"], [5]),
        (JobFilter(priority=Priority.BATCH), None, [5]),
        (JobFilter(after=1003.0), None, [5, 4, 3]),
        (JobFilter(metadata={"team": "x"}), None, [4, 1, 0]),
        (JobFilter(metadata={"team": "x", "run": "1"}), None, [4, 0]),
        (JobFilter(metadata={"team": "x"}, status=Status.SUCCEEDED), ["a"], [4]),
        (JobFilter(metadata={"team": "y"}), None, []),
    ],
)
@pytest.mark.parametrize("window", [1, 5000])
def test_filters_are_combined(
    archive: Archive,
    monkeypatch: pytest.MonkeyPatch,
    wanted: JobFilter,
    owners: list[str] | None,
    expected: list[int],
    window: int,
) -> None:
    monkeypatch.setattr(queries, "WINDOW", window)
    both, team = '{"team": "x", "run": "1"}', '{"team": "x"}'
    archive.write(
        [
            archived(0, status="failed", metadata=both),
            archived(1, "b", metadata=team),
            archived(2),
            archived(3, "b", status="failed"),
            archived(4, model="n", metadata=both),
            archived(5, "b", model="n", priority=2),
        ]
    )
    assert numbers(archive, wanted, owners) == expected


def test_erased_jobs_leave_no_trace_in_the_files(archive: Archive) -> None:
    secret = "tell nobody " * 3
    archive.write([archived(1, metadata=f'{{"note": "{secret}"}}'), archived(2), archived(3, "b")])
    archive.erase([archived(1).record["id"]])
    content = b"".join(path.read_bytes() for path in archive.file.parent.iterdir())
    assert secret.encode() not in content
    assert archive.erase_some(10, owner="b") == 1
    assert archive.erase_some(10, ended_before=1000.0) == 0
    assert numbers(archive) == [2]
    assert archive.erase_some(10) == 1
    assert archive.used_bytes() > 0


def test_usage_is_replaced_and_read_by_key_and_day(archive: Archive) -> None:
    first, second = date(2024, 1, 1), date(2024, 1, 2)
    archive.write_usage([UsageRow(first, "a", "m", Counters(1, prompt=5)), UsageRow(second, "b", "m", Counters(1))])
    archive.write_usage([UsageRow(first, "a", "m", Counters(2, prompt=9)), UsageRow(second, "a", "m", Counters(3))])
    assert archive.usage(["a"], first, second) == [
        UsageRow(second, "a", "m", Counters(3)),
        UsageRow(first, "a", "m", Counters(2, prompt=9)),
    ]
    assert archive.usage(["b"], first, first) == []
    assert archive.last_usage_day() == second


def damage(file: Path) -> None:
    file.write_bytes(b"no database " * 100)


def lock(file: Path) -> sqlite3.Connection:
    other = sqlite3.connect(file)
    other.execute("BEGIN IMMEDIATE")
    return other


def of_a_later_version(file: Path) -> None:
    with sqlite3.connect(file) as other:
        other.execute("INSERT INTO archive_version VALUES (99)")


def without_permission(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("fault", [damage, lock, of_a_later_version, without_permission])
def test_an_archive_that_cannot_be_used_is_reported(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, fault: object
) -> None:
    monkeypatch.setattr("web.archive.database._PRAGMAS", ("busy_timeout = 10",))
    archive.write([archived(1)])
    archive.close()
    broken = Archive(archive.file)
    held = fault(archive.file)  # type: ignore[operator]
    try:
        with pytest.raises(ArchiveUnavailable):
            broken.write([archived(2)])
    finally:
        if held:
            held.close()
        broken.close()
