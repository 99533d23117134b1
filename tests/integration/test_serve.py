"""`scripts/serve` as a person runs it, in a folder and on ports of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scripts.client.api import Client, Refused
from scripts.stack import processes
from scripts.stack.ports import free_port
from shared.jobs.record import Status
from shared.redis.client import connect
from shared.settings import ROOT
from tests.support.small_models import make_folder
from tests.support.waiting import eventually

TINY_MODEL = ROOT / "models/tiny-random-llama"
UP_WITHIN_S = 120


class Served:
    """One DATA_DIR with the starts of `scripts/serve` in it."""

    def __init__(self, home: Path, **overrides: str) -> None:
        self.data_dir = home / "data"
        self.env_file = home / "env"
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "ENV_FILE": str(self.env_file),
            "DATA_DIR": str(self.data_dir),
            "MODEL_PATH": str(TINY_MODEL),
            "PORT": str(free_port()),
            "FLOWER_PORT": str(free_port()),
            "DRAIN_S": "2",
            **overrides,
        }
        self.store_url = f"unix://{self.data_dir}/run/valkey.sock"
        self._started: list[subprocess.Popen[str]] = []

    def start(self) -> subprocess.Popen[str]:
        """Start it without waiting; what it prints is in `said`."""
        with self._output().open("w") as out:
            process = subprocess.Popen(
                [ROOT / "scripts/serve"], env=self.environment, stdout=out, stderr=out, text=True
            )
        self._started.append(process)
        return process

    def bring_up(self) -> subprocess.Popen[str]:
        """Start it and wait for its screen."""
        process = self.start()
        eventually(lambda: self._is_up(process), "the stack is up", UP_WITHIN_S)
        return process

    def _is_up(self, process: subprocess.Popen[str]) -> bool:
        assert process.poll() is None, self.said()
        return " is ready" in self.said()

    def run(self, **overrides: str) -> subprocess.CompletedProcess[str]:
        """A start that is expected to end by itself."""
        return subprocess.run(
            [ROOT / "scripts/serve"],
            env={**self.environment, **overrides},
            capture_output=True,
            text=True,
            timeout=UP_WITHIN_S,
            check=False,
        )

    def said(self) -> str:
        """What the last start printed."""
        return self._output().read_text()

    def client(self) -> Client:
        """With the key that the first start has made."""
        [key] = re.findall(r"^MLXQ_API_KEY=(.*)$", self.env_file.read_text(), flags=re.MULTILINE)
        return Client(f"http://127.0.0.1:{self.environment['PORT']}", key)

    def processes(self, part: str = "") -> list[psutil.Process]:
        """The stack's processes, or those with this in their command line."""
        return [each for each in processes.find(self.data_dir) if part in " ".join(each.cmdline())]

    def clean_up(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        processes.terminate_all(self.data_dir, grace_s=0)

    def _output(self) -> Path:
        return self.env_file.with_name("said")


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    """A stack that several tests look at. Its path is short: sockets' paths have a limit."""
    with tempfile.TemporaryDirectory(prefix="mlxq") as home:
        served = Served(Path(home))
        try:
            served.bring_up()
            yield served
        finally:
            served.clean_up()


@pytest.fixture
def served() -> Iterator[Served]:
    """A stack for one test, without MLX: what is started and ended does not depend on what it computes."""
    with tempfile.TemporaryDirectory(prefix="mlxq") as home:
        served = Served(Path(home), BACKEND="fake")
        try:
            yield served
        finally:
            served.clean_up()


def test_the_printed_curl_line_works_when_pasted(running: Served) -> None:
    [line] = re.findall(r"^curl .*$", running.said(), flags=re.MULTILINE)
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["finish_reason"] in ("stop", "length")


def test_the_key_is_in_a_private_file_and_not_on_the_screen(running: Served) -> None:
    lines = dict(line.split("=", 1) for line in running.env_file.read_text().splitlines() if "=" in line[:30])
    assert running.env_file.stat().st_mode & 0o777 == 0o600
    for secret in (lines["MLXQ_API_KEY"], lines["FLOWER_PASSWORD"]):
        assert secret not in running.said()
        assert not any(secret in " ".join(process.cmdline()) for process in running.processes())


def test_a_second_start_says_so_and_changes_nothing(running: Served) -> None:
    before = {process.pid for process in running.processes()}
    second = running.run()
    assert second.returncode == 1
    assert re.search(r"already running .*pid \d+, http://127.0.0.1:\d+", second.stderr)
    assert len(second.stderr.splitlines()) == 1
    assert {process.pid for process in running.processes()} == before


@pytest.mark.parametrize("part", ["valkey-server", "worker.app"])
def test_a_child_that_dies_is_started_again_and_said(running: Served, part: str) -> None:
    [victim] = running.processes(part)
    said_before = len(running.said())
    victim.kill()
    eventually(
        lambda: [each for each in running.processes(part) if each.pid != victim.pid], "it is started again", UP_WITHIN_S
    )
    eventually(lambda: re.search(r"exited: .*SIGKILL", running.said()[said_before:]), "the exit is said")
    eventually(lambda: "spawned: " in running.said()[said_before:], "the start is said")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.long)])
def test_a_signal_ends_everything_in_order(served: Served, number: signal.Signals) -> None:
    process = served.bring_up()
    process.send_signal(number)
    assert process.wait(60) == 0
    assert served.processes() == []
    if number != signal.SIGHUP:  # there the terminal is gone
        stopped = re.findall(r"stopped: (\S+)", served.said())
        assert stopped == ["flower", "web", "worker-0", "valkey"]


def test_a_second_signal_is_quick_and_leaves_no_process(served: Served) -> None:
    process = served.bring_up()
    process.send_signal(signal.SIGINT)
    eventually(lambda: "stopping" in served.said(), "it is stopping")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert served.processes() == []


@pytest.fixture
def small_disk(served: Served) -> Iterator[Path]:
    """A file system of its own for DATA_DIR."""
    served.data_dir.mkdir()
    served.environment["RATE_LIMIT"] = "1000000/minute"
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m,mode=700", "none", str(served.data_dir)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to mount a file system, which root on Linux may")
    try:
        yield served.data_dir
    finally:
        served.clean_up()
        subprocess.run(["umount", str(served.data_dir)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_acceptance_and_loses_nothing(served: Served, small_disk: Path) -> None:
    served.bring_up()
    accepted, refused = [], []
    ballast = small_disk / "ballast"

    def submit() -> bool:
        try:
            accepted.append(client.submit({"prompt": "!pause=0.01 hello", "max_tokens": 5 if accepted else 200}).id)
        except Refused as refusal:
            refused.append(refusal.status)
        return bool(refused)

    with served.client() as client:
        submit()
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        eventually(submit, "a job is refused")
        eventually(lambda: "is full" in served.said(), "it is said")
        eventually(lambda: "gave up: valkey" in served.said(), "the queue is down")
        submit()
        assert set(refused) == {503}
        ballast.unlink()
        before = len(accepted)
        # Sooner than what does not stay up has its next turn (30 s).
        eventually(lambda: submit() and len(accepted) > before, "jobs are accepted again", 25)
        assert "has space again" in served.said()
        for job in accepted:
            eventually(lambda i=job: client.job(i, wait_s=10).status is Status.SUCCEEDED, "it ends", UP_WITHIN_S)


def test_what_a_killed_serve_left_behind_is_ended_by_the_next(served: Served) -> None:
    process = served.bring_up()
    old = {each.pid for each in served.processes()}
    with connect(served.store_url) as queue:
        queue.set("kept", "yes")
    process.kill()
    process.wait()
    assert {each.pid for each in served.processes()} == old
    served.bring_up()
    assert "orphaned processes" in served.said()
    assert not old & {each.pid for each in served.processes()}
    with connect(served.store_url) as queue:
        assert queue.get("kept") == "yes"


def test_a_taken_port_is_one_line(served: Served) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", int(served.environment["PORT"])))
        listener.listen()
        result = served.run()
    assert result.returncode == 1
    assert re.fullmatch(r"scripts/serve: port \d+ is taken; set PORT to another one in \S+\n", result.stderr)
    assert served.processes() == []


def test_a_model_that_does_not_load_is_one_line(served: Served) -> None:
    unknown = make_folder(served.env_file.with_name("unknown-model"))
    (unknown / "config.json").write_text('{"model_type": "no_such_model"}')
    result = served.run(MODEL_PATH=str(unknown), BACKEND="auto")
    assert result.returncode == 1
    assert re.fullmatch(r"scripts/serve: worker-0 did not start: .+\n", result.stderr)
    assert served.processes() == []


def test_a_model_that_is_not_whole_is_one_line_before_anything_starts(served: Served) -> None:
    broken = make_folder(served.env_file.with_name("broken-model"))
    (broken / "model.safetensors").unlink()
    result = served.run(MODEL_PATH=str(broken), BACKEND="auto")
    assert result.returncode == 1
    assert re.fullmatch(r"scripts/serve: the default model cannot be served: .* has no weights .*\n", result.stderr)


def test_a_missing_model_is_one_line(served: Served) -> None:
    result = served.run(MODEL_PATH=str(served.data_dir / "nothing"), BACKEND="auto")
    assert result.returncode == 1
    assert re.fullmatch(r"scripts/serve: MODEL_PATH .* contains no model .*\n", result.stderr)


def test_a_queue_that_a_power_failure_damaged_is_repaired_and_keeps_its_jobs() -> None:
    with tempfile.TemporaryDirectory(prefix="mlxq") as home:
        served = Served(Path(home), BACKEND="fake")
        try:
            served.bring_up().kill()
            with served.client() as client:
                job = client.submit({"prompt": "Hello", "max_tokens": 2}, wait_s=30)
            processes.terminate_all(served.data_dir, grace_s=0)
            (file,) = (served.data_dir / "valkey/appendonlydir").glob("*.incr.aof")
            with file.open("ab") as damaged:
                damaged.write(b"\0" * 4096)
            served.bring_up()
            assert "its last 4096 bytes were removed" in served.said()
            with served.client() as client:
                assert client.job(job.id).status is Status.SUCCEEDED
        finally:
            served.clean_up()
