"""Measures how fast lists, searches and jobs come from a large archive: `python -m tests.bench.archive_pages`.

The jobs are written by the archive itself, of 20 API keys. One in a thousand has failed. Redis has no job.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Final

from shared.jobs.record import Priority, Status
from shared.jobs.search import JobFilter
from tests.bench.console_pages import record
from web.archive.database import Archive
from web.archive.tables import ArchivedJob

RUNS: Final = 20
LIMIT: Final = 20
_BLOCK: Final = 5000
_OWNERS: Final = 20
_TEXT: Final = "The answer is a text of a few sentences that a language model has written about the question. " * 4
_REQUEST: Final = '{"model":"stub","prompt":"' + "What is the answer to this question, and why? " * 10 + '"}'


def job(number: int, created_at: float) -> ArchivedJob:
    """Return an ended job."""
    return ArchivedJob.of(record(number, owner(number), created_at), _REQUEST, f"{number} {_TEXT}")


def owner(number: int) -> str:
    """Return the id of the API key of a job."""
    return f"{number % _OWNERS:08x}"


def fill(archive: Archive, count: int) -> float:
    """Write jobs, a second apart; return the seconds that it took."""
    began, now = time.perf_counter(), time.time()
    for start in range(0, count, _BLOCK):
        archive.write([job(number, now - count + number) for number in range(start, min(start + _BLOCK, count))])
    return time.perf_counter() - began


def reads(archive: Archive, count: int) -> dict[str, Callable[[], object]]:
    """Return what is measured, by name."""
    middle = time.time() - count / 2
    some = job(count // 2, middle).record["id"]
    one, failed = [owner(7)], JobFilter(status=Status.FAILED)
    return {
        "list of all keys": lambda: archive.page(None, JobFilter(), LIMIT, None),
        "list of all keys, in the middle": lambda: archive.page(None, JobFilter(), LIMIT, middle),
        "list of a key": lambda: archive.page(one, JobFilter(), LIMIT, None),
        "list of a key, in the middle": lambda: archive.page(one, JobFilter(), LIMIT, middle),
        "failed, of all keys": lambda: archive.page(None, failed, LIMIT, None),
        "failed, of a key that has none": lambda: archive.page(one, failed, LIMIT, None),
        "cancelled: no job": lambda: archive.page(None, JobFilter(status=Status.CANCELLED), LIMIT, None),
        "class high": lambda: archive.page(None, JobFilter(priority=Priority.HIGH), LIMIT, None),
        "class high, of a key, failed": lambda: archive.page(
            one, JobFilter(priority=Priority.HIGH, status=Status.FAILED), LIMIT, None
        ),
        "another model, succeeded": lambda: archive.page(
            None, JobFilter(model="other", status=Status.SUCCEEDED), LIMIT, None
        ),
        "metadata that one has": lambda: archive.page(None, JobFilter(metadata={"number": "7"}), LIMIT, None),
        "metadata and a class that no job has": lambda: archive.page(
            None, JobFilter(metadata={"number": "8"}, priority=Priority.HIGH), LIMIT, None
        ),
        "a job": lambda: archive.find(some),
    }


def timed(work: Callable[[], object]) -> list[float]:
    """Return the milliseconds of each of several calls."""
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1000)
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill an archive and print the times of reads from it."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.archive_pages", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000, help="number of jobs (default: 1000000)")
    count = parser.parse_args(arguments).jobs
    with tempfile.TemporaryDirectory(prefix="mlxq-") as folder:
        archive = Archive(Path(folder) / "archive.sqlite3")
        seconds = fill(archive, count)
        size = archive.file.stat().st_size
        print(f"{count:,} jobs, {size / count:.0f} bytes per job, written at {count / seconds:,.0f} jobs/s\n")
        print("| read | median, ms | maximum, ms |\n| --- | --- | --- |")
        for name, work in reads(archive, count).items():
            times = timed(work)
            print(f"| {name} | {median(times):.1f} | {max(times):.1f} |", flush=True)
        archive.close()


if __name__ == "__main__":
    main()
