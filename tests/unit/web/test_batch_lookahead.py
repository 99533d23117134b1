"""The run of one batch: a full disk, a lost leadership, takeovers, and files that a killed process left."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.errors import QueueFull
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from web.batches.lines import MAX_LINES, Line, raw_lines
from web.batches.requests import Running, Translated, error_result
from web.batches.results import ERROR, OUTPUT, BatchFolder, Result, Results, merge
from web.batches.run import BatchRun
from web.batches.store import Batch, Batches, BatchStatus, NotLeader
from web.files.store import FileStore

OWNER, LEADER, LINES = "0123abcd", "leader-1", 10


class FakeJobs:
    """Jobs that end when they are looked at for the second time."""

    def __init__(self) -> None:
        self.submitted: list[int] = []
        self.stored: dict[str, str] = {}
        self.looks: dict[str, int] = {}
        self.stopped: list[str] = []
        self.refusals = 0

    def find(self, owner: str, idempotency_keys: list[str]) -> list[str | None]:
        return [self.stored.get(key) for key in idempotency_keys]

    def ended(self, job_ids: list[str]) -> set[str]:
        for job_id in job_ids:
            self.looks[job_id] = self.looks.get(job_id, 0) + 1
        return {job_id for job_id in job_ids if self.looks[job_id] > 1 or job_id in self.stopped}

    def forget(self, job_id: str, owner: str) -> None:
        self.stored = {key: each for key, each in self.stored.items() if each != job_id}

    def stop(self, job_id: str, owner: str) -> None:
        self.stopped.append(job_id)


class FakeRequests:
    """Submits lines to `FakeJobs`, once each."""

    def __init__(self, jobs: FakeJobs) -> None:
        self._jobs = jobs

    def submit(self, batch: Batch, line: Line) -> Running | Result:
        if line.body.get("invalid"):
            return error_result(batch, line, QueueFull("never"))
        if self._jobs.refusals:
            self._jobs.refusals -= 1
            raise QueueFull("full for now")
        key = f"{batch.id} {line.number}"
        if key not in self._jobs.stored:
            self._jobs.submitted.append(line.number)
            self._jobs.stored[key] = f"job_{line.number}"
        translated = Translated([], 1, "prompt", lambda _: "{}", nullcontext)
        return Running(line, [f"job_{line.number}"], translated)

    def result(self, batch: Batch, running: Running) -> Result:
        return Result(running.line.number, OUTPUT, {"custom_id": running.line.custom_id}, (1, 0, 2, 0))


class Setup:
    """A batch of ten lines, and what runs it."""

    def __init__(self, client: Redis, home: Path, **change: Any) -> None:
        self.settings = Settings(data_dir=home, durable=False, batch_lookahead=4)
        self.redis = client
        self.batches = Batches(client, durable=False, retention_s=60)
        self.files = FileStore(self.settings.files_path, 3600, 10**9)
        self.jobs = FakeJobs()
        self.batch = self.batches.create(
            "batch_1", OWNER, endpoint="/v1/completions", input_file_id="file-1", completion_window="24h",
            window_s=change.get("window_s", 3600), metadata={},
        )  # fmt: skip
        self.folder = BatchFolder(self.settings.files_path / "batches", "batch_1")
        source = home / "in.jsonl"
        lines = [
            {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": {"invalid": n == 3}}
            for n in range(1, LINES + 1)
        ]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.folder.create(source)
        self.slept: list[float] = []
        self.on_sleep: Callable[[], None] = lambda: None
        client.set(keys.LEADER, LEADER)

    def run(self, token: str = LEADER, leads: Callable[[], bool] = lambda: True) -> Batch:
        latest = self.batches.find("batch_1")
        assert latest is not None
        BatchRun(
            latest,
            settings=self.settings,
            batches=self.batches,
            files=self.files,
            jobs=self.jobs,  # type: ignore[arg-type]
            requests=FakeRequests(self.jobs),  # type: ignore[arg-type]
            token=token,
            leads=leads,
            sleep=self._sleep,
        ).run()
        return self.latest

    @property
    def latest(self) -> Batch:
        latest = self.batches.find("batch_1")
        assert latest is not None
        return latest

    def output(self) -> list[str]:
        """The custom ids of the output file, in order."""
        file = self.files.get(self.latest.output_id or "", OWNER)
        return [json.loads(line)["custom_id"] for line in self.files.path(file).read_text().splitlines()]

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.on_sleep()


@pytest.fixture
def setup(client: Redis, tmp_path: Path) -> Setup:
    return Setup(client, tmp_path)


def test_a_batch_runs_to_its_end(setup: Setup) -> None:
    ended = setup.run()
    assert ended.status is BatchStatus.COMPLETED
    assert (ended.counts.total, ended.counts.completed, ended.counts.failed) == (10, 9, 1)
    assert (ended.counts.prompt_tokens, ended.counts.completion_tokens) == (9, 18)
    assert sorted(setup.output(), key=int) == [str(n) for n in range(1, 11) if n != 3]
    assert setup.jobs.stored == {} and not setup.folder.path.exists()
    assert setup.batches.unfinished() == []


def test_a_full_disk_pauses_the_batch_and_says_so(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    space, write = [False], Results.write

    def write_if_space(self: Results, results: Any) -> None:
        if not space[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, results)

    seen: list[tuple[str, int]] = []

    def look() -> None:
        errors = setup.latest.errors
        if errors:
            seen.append((errors[0].code, len(setup.jobs.submitted)))
            space[0] = len(seen) > 3

    monkeypatch.setattr(Results, "write", write_if_space)
    setup.on_sleep = look
    ended = setup.run()
    assert len(seen) > 3 and set(seen) == {("disk_full", seen[0][1])}, "meanwhile no line is submitted"
    assert (ended.status, ended.errors) == (BatchStatus.COMPLETED, ())
    assert len(setup.output()) == 9 and len(setup.jobs.submitted) == 9


def test_a_full_disk_at_the_end_delays_the_result_files(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    failures, commit = [3], FileStore.commit

    def commit_later(self: FileStore, *arguments: Any) -> None:
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(self, *arguments)

    monkeypatch.setattr(FileStore, "commit", commit_later)
    statuses = []
    setup.on_sleep = lambda: statuses.append((setup.latest.status.value, [e.code for e in setup.latest.errors]))
    assert setup.run().status is BatchStatus.COMPLETED
    assert ("finalizing", ["disk_full"]) in statuses
    assert len(setup.output()) == 9
    assert not [*setup.settings.files_path.glob("*/*.part")]


def test_another_error_of_the_disk_is_not_hidden(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Results, "write", fail)
    with pytest.raises(OSError, match="Input/output"):
        setup.run()


def test_a_full_queue_delays_the_line(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("web.batches.run.time.monotonic", lambda: clock[0])

    def advance() -> None:
        clock[0] += 0.3

    setup.on_sleep = advance
    setup.jobs.refusals = 3
    assert setup.run().status is BatchStatus.COMPLETED
    assert setup.jobs.submitted == [1, 2, 4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("after", range(1, 40, 3))
def test_a_new_leader_continues_at_any_point(setup: Setup, after: int) -> None:
    left = [after]

    def leads() -> bool:
        left[0] -= 1
        return left[0] >= 0

    try:
        setup.run(leads=leads)
    except NotLeader:
        setup.redis.set(keys.LEADER, "leader-2")
        setup.run("leader-2")
    assert setup.latest.status is BatchStatus.COMPLETED
    assert sorted(setup.output(), key=int) == [str(n) for n in range(1, 11) if n != 3]
    assert sorted(setup.jobs.submitted) == [1, 2, 4, 5, 6, 7, 8, 9, 10], "each line was submitted once"


def test_a_process_that_no_longer_leads_changes_nothing(setup: Setup) -> None:
    setup.redis.set(keys.LEADER, "leader-2")
    with pytest.raises(NotLeader):
        setup.run()
    assert setup.latest.status is BatchStatus.VALIDATING


def test_a_cancelled_batch_stops_its_jobs_and_those_of_an_earlier_leader(setup: Setup) -> None:
    setup.jobs.ended = lambda job_ids: {each for each in job_ids if each in setup.jobs.stopped}  # type: ignore[method-assign]
    rounds = [0]

    def lose_leadership() -> bool:
        rounds[0] += 1
        return len(setup.jobs.submitted) < 3

    with pytest.raises(NotLeader):
        setup.run(leads=lose_leadership)
    assert setup.batches.cancel("batch_1", OWNER).status is BatchStatus.CANCELLING
    setup.redis.set(keys.LEADER, "leader-2")
    ended = setup.run("leader-2")
    assert ended.status is BatchStatus.CANCELLED
    assert sorted(setup.jobs.stopped) == ["job_1", "job_2", "job_4", "job_5"]
    assert len(setup.jobs.submitted) == 4


def test_lines_expire_with_the_window(client: Redis, tmp_path: Path) -> None:
    setup = Setup(client, tmp_path, window_s=-1)
    ended = setup.run()
    assert (ended.status, ended.output_id) == (BatchStatus.EXPIRED, None)
    assert (ended.counts.completed, ended.counts.failed) == (0, 10)
    file = setup.files.get(ended.error_id or "", OWNER)
    errors = [json.loads(line)["error"]["code"] for line in setup.files.path(file).read_text().splitlines()]
    assert errors == ["batch_expired"] * 10
    assert setup.jobs.submitted == []


def result(line: int, kind: str = OUTPUT) -> Result:
    return Result(line, kind, {"line": line}, (1, 1, 1, 1))


def test_an_incomplete_entry_and_a_second_one_of_a_line_do_not_count(setup: Setup) -> None:
    first = Results(setup.folder, 100, "a")
    first.write([result(1), result(2, ERROR)])
    first.close()
    (part,) = setup.folder.parts()
    with part.open("ab") as file:
        file.write(result(3).encode()[:-5])  # the process was killed
    second = Results(setup.folder, 100, "b")
    assert [line for line in range(1, 5) if second.has(line)] == [1, 2]
    second.write([result(1), result(3)])
    second.close()
    late = Results(setup.folder, 100, "a")
    counts = late.counts(9)
    assert (counts.completed, counts.failed, counts.prompt_tokens) == (2, 1, 3)
    partials = {kind: setup.files.begin(OWNER) for kind in (OUTPUT, ERROR)}
    merge(setup.folder, 100, partials)
    assert partials[OUTPUT].path.read_text() == '{"line": 1}\n{"line": 3}\n'
    assert partials[ERROR].path.read_text() == '{"line": 2}\n'
    for partial in partials.values():
        partial.discard()


def test_a_failed_write_leaves_no_part_of_an_entry(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(setup.folder, 100, "a")
    results.write([result(1)])
    monkeypatch.setattr("web.batches.results.os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        results.write([result(2)])
    monkeypatch.undo()
    results.write([result(2), result(3)])
    results.close()
    (part,) = setup.folder.parts()
    assert part.read_bytes() == b"".join(result(n).encode() for n in (1, 2, 3))


def test_long_lines_are_cut_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"\xef\xbb\xbfab\n" + b"x" * 25 + b"\n\n" + b"y" * 10 + b"\n" + b"z" * 10)
    assert [*raw_lines(path, 10)] == [(1, b"ab\n"), (2, b"x" * 11), (4, b"y" * 10 + b"\n"), (5, b"z" * 10)]


def test_records_survive_other_versions(setup: Setup) -> None:
    setup.redis.hset(keys.BATCH + "batch_1", mapping={"status": "resting", "color": "red"})
    assert setup.latest == replace(setup.latest, status=BatchStatus.IN_PROGRESS)
    assert MAX_LINES == 50_000
