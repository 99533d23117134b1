"""A breadcrumb can be read after the process died, whatever it was writing at that moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.settings import ROOT
from worker.process import breadcrumb
from worker.process.breadcrumb import SIZE, Breadcrumb, Trace, breadcrumb_path, read

JOBS = tuple(f"job_{i:028x}" for i in range(24))


@pytest.fixture
def crumb(tmp_path: Path) -> Iterator[Breadcrumb]:
    crumb = Breadcrumb(breadcrumb_path(tmp_path / "run", "worker-0", "token"))
    crumb.workers({"host-0-a": "a", "host-0-b": "b"})
    yield crumb
    crumb.close()


def test_it_records_the_engines_activity(crumb: Breadcrumb) -> None:
    both = ("host-0-a", "host-0-b")
    assert read(crumb.path) == Trace("idle", os.getpid(), workers=both)
    crumb.loading("tiny")
    assert read(crumb.path) == Trace("load", os.getpid(), workers=both, model="tiny")
    crumb.step("host-0-a", JOBS)
    assert read(crumb.path) == Trace("step", os.getpid(), "host-0-a", both, JOBS, "a")
    crumb.idle()
    assert read(crumb.path) == Trace("idle", os.getpid(), workers=both)


def test_each_of_several_models_keeps_its_recorded_batch(crumb: Breadcrumb) -> None:
    crumb.step("host-0-a", JOBS[:2])
    crumb.step("host-0-b", JOBS[2:])
    crumb.resume("host-0-a")
    assert read(crumb.path) == Trace("step", os.getpid(), "host-0-a", ("host-0-a", "host-0-b"), JOBS[:2], "a")
    crumb.loading("tiny")
    crumb.resume("host-0-b")
    trace = read(crumb.path)
    assert trace is not None
    assert trace.jobs == JOBS[2:]


def test_nothing_is_written_without_a_change(crumb: Breadcrumb) -> None:
    crumb.step("host-0-a", JOBS)
    before = crumb.path.read_bytes()
    crumb.step("host-0-a", list(JOBS))
    crumb.resume("host-0-a")
    assert crumb.path.read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"phase": "step", "workers": ["w1"], "jobs": ["j"], "newer": 1}, Trace("step", workers=("w1",), jobs=("j",))),
        ({"phase": "idle"}, Trace("idle")),
        ([], None),
        ({"workers": 3}, None),
    ],
)
def test_a_breadcrumb_of_another_version_is_read_as_far_as_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: object, known: Trace | None
) -> None:
    monkeypatch.setattr(breadcrumb, "_fields", lambda _trace: fields)
    other = Breadcrumb(breadcrumb_path(tmp_path / "run", "worker-0", "token"))
    other.close()
    assert other.path is not None
    assert read(other.path) == known


@pytest.mark.parametrize("torn_at", [0, 8, 17, 24, 60, 300])
def test_a_torn_write_leaves_the_previous_trace(crumb: Breadcrumb, torn_at: int) -> None:
    crumb.step("host-0-a", JOBS[:12])
    before = crumb.path.read_bytes()
    crumb.step("host-0-a", JOBS[12:])
    after = bytearray(crumb.path.read_bytes())
    changed = next(half for half in (0, SIZE // 2) if before[half : half + 400] != after[half : half + 400])
    after[changed + torn_at] ^= 0xFF
    crumb.path.write_bytes(bytes(after))
    trace = read(crumb.path)
    assert trace is not None
    assert (trace.jobs, trace.torn) == (JOBS[:12], True)


def test_the_newest_jobs_are_kept_when_not_all_fit(crumb: Breadcrumb) -> None:
    many = tuple(f"job_{i:028x}" for i in range(5000))
    crumb.step("host-0-a", many)
    trace = read(crumb.path)
    assert trace is not None
    assert 800 < len(trace.jobs) < len(many)
    assert trace.jobs == many[-len(trace.jobs) :]
    assert crumb.path.stat().st_size == SIZE


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(SIZE), b"x" * SIZE])
def test_a_file_without_a_valid_slot_is_not_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "crumb"
    assert read(path) is None
    path.write_bytes(content)
    assert read(path) is None


DIES = """
import os, signal, sys
from pathlib import Path
from worker.process.breadcrumb import Breadcrumb, breadcrumb_path
crumb = Breadcrumb(breadcrumb_path(Path(sys.argv[1]), "worker-3", "dead"))
crumb.workers({"w": "m"})
crumb.step("w", ["a", "b"])
print("ready", flush=True)
signal.pause()
"""


def test_it_survives_sigkill_and_its_lock_does_not(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", DIES, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    assert breadcrumb.is_taken(tmp_path, "worker-3")
    assert list(breadcrumb.leftovers(tmp_path, "worker-3")) == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not breadcrumb.is_taken(tmp_path, "worker-3")
    [path] = breadcrumb.leftovers(tmp_path, "worker-3")
    assert read(path) == Trace("step", process.pid, "w", ("w",), ("a", "b"), "m")
    assert breadcrumb.find(tmp_path, "dead") == path
    assert breadcrumb.find(tmp_path, "other") is None
    assert breadcrumb.label_of(path) == "worker-3"
    assert list(breadcrumb.leftovers(tmp_path, "worker-4")) == []


def test_a_breadcrumb_without_a_file_changes_nothing_on_disk() -> None:
    crumb = Breadcrumb(None)
    crumb.workers({"w": "m"})
    crumb.step("w", JOBS)
    crumb.remove()
    crumb.close()
    assert crumb.path is None


def test_all_blocks_are_allocated_from_the_start(crumb: Breadcrumb) -> None:
    assert crumb.path is not None
    assert crumb.path.stat().st_blocks * 512 >= SIZE
