"""`scripts/serve` as a user runs it, with its own folder and ports."""

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


class ServeCommand:
    """Runs `scripts/serve` with one DATA_DIR."""

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
        """Start it without waiting; `output` returns what it prints."""
        with self._output().open("w") as out:
            process = subprocess.Popen(
                [ROOT / "scripts/serve"], env=self.environment, stdout=out, stderr=out, text=True
            )
        self._started.append(process)
        return process

    def bring_up(self) -> subprocess.Popen[str]:
        """Start it and wait until it is ready."""
        process = self.start()
        eventually(lambda: self._is_up(process), "the stack is up", UP_WITHIN_S)
        return process

    def _is_up(self, process: subprocess.Popen[str]) -> bool:
        assert process.poll() is None, self.output()
        return " is ready" in self.output()

    def run(self, **overrides: str) -> subprocess.CompletedProcess[str]:
        """Run it until it exits by itself."""
        return subprocess.run(
            [ROOT / "scripts/serve"],
            env={**self.environment, **overrides},
            capture_output=True,
            text=True,
            timeout=UP_WITHIN_S,
            check=False,
        )

    def output(self) -> str:
        """Return the output of the last start."""
        return self._output().read_text()

    def client(self) -> Client:
        """Return a client with the key from `.env`."""
        [key] = re.findall(r"^MLXQ_API_KEY=(.*)$", self.env_file.read_text(), flags=re.MULTILINE)
        return Client(f"http://127.0.0.1:{self.environment['PORT']}", key)

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Return the stack's processes whose command line contains `part`."""
        return [each for each in processes.find(self.data_dir) if part in " ".join(each.cmdline())]

    def clean_up(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        processes.terminate_all(self.data_dir, grace_s=0)

    def _output(self) -> Path:
        return self.env_file.with_name("output")


@pytest.fixture(scope="module")
def running() -> Iterator[ServeCommand]:
    """A running stack for several tests. Its path is short, because the path of a socket is limited."""
    with tempfile.TemporaryDirectory(prefix="mlxq") as home:
        served = ServeCommand(Path(home))
        try:
            served.bring_up()
            yield served
        finally:
            served.clean_up()


@pytest.fixture
def served() -> Iterator[ServeCommand]:
    """A stack for one test, with the fake model."""
    with tempfile.TemporaryDirectory(prefix="mlxq") as home:
        served = ServeCommand(Path(home), BACKEND="fake")
        try:
            yield served
        finally:
            served.clean_up()


def test_the_printed_curl_line_works_when_pasted(running: ServeCommand) -> None:
    [line] = re.findall(r"^curl .*$", running.output(), flags=re.MULTILINE)
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["finish_reason"] in ("stop", "length")


def test_the_key_is_in_a_private_file_and_not_on_the_screen(running: ServeCommand) -> None:
    lines = dict(line.split("=", 1) for line in running.env_file.read_text().splitlines() if "=" in line[:30])
    assert running.env_file.stat().st_mode & 0o777 == 0o600
    for secret in (lines["MLXQ_API_KEY"], lines["FLOWER_PASSWORD"]):
        assert secret not in running.output()
        assert not any(secret in " ".join(process.cmdline()) for process in running.processes())


def test_a_second_start_is_refused_and_changes_nothing(running: ServeCommand) -> None:
    before = {process.pid for process in running.processes()}
    second = running.run()
    assert second.returncode == 1
    assert re.search(r"already running .*pid \d+, http://127.0.0.1:\d+", second.stderr)
    assert len(second.stderr.splitlines()) == 1
    assert {process.pid for process in running.processes()} == before


@pytest.mark.parametrize("part", ["valkey-server", "worker.app"])
def test_a_child_that_dies_is_restarted_and_reported(running: ServeCommand, part: str) -> None:
    [victim] = running.processes(part)
    length_before = len(running.output())
    victim.kill()
    eventually(
        lambda: [each for each in running.processes(part) if each.pid != victim.pid], "it is restarted", UP_WITHIN_S
    )
    eventually(lambda: re.search(r"exited: .*SIGKILL", running.output()[length_before:]), "the exit is reported")
    eventually(lambda: "spawned: " in running.output()[length_before:], "the restart is reported")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.long)])
def test_a_signal_ends_everything_in_order(served: ServeCommand, number: signal.Signals) -> None:
    process = served.bring_up()
    process.send_signal(number)
    assert process.wait(60) == 0
    assert served.processes() == []
    if number != signal.SIGHUP:  # after SIGHUP there is no terminal
        stopped = re.findall(r"stopped: (\S+)", served.output())
        assert stopped == ["flower", "background", "web", "worker-0", "valkey"]


def test_a_second_signal_stops_at_once_and_leaves_no_process(served: ServeCommand) -> None:
    process = served.bring_up()
    process.send_signal(signal.SIGINT)
    eventually(lambda: "stopping" in served.output(), "it is stopping")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert served.processes() == []


@pytest.fixture
def small_disk(served: ServeCommand) -> Iterator[Path]:
    """A small file system for DATA_DIR."""
    served.data_dir.mkdir()
    served.environment["RATE_LIMIT"] = "1000000/minute"
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m,mode=700", "none", str(served.data_dir)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to mount a file system, which root on Linux may")
    try:
        yield served.data_dir
    finally:
        served.clean_up()
        # A helper process that ends with its killed parent may still have a log file open.
        unmount = ["umount", str(served.data_dir)]
        eventually(lambda: subprocess.run(unmount, capture_output=True, check=False).returncode == 0, "it is unmounted")


@pytest.mark.slow
def test_on_a_full_disk_jobs_are_refused_and_none_is_lost(served: ServeCommand, small_disk: Path) -> None:
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
        eventually(lambda: "is full" in served.output(), "it is reported")
        eventually(lambda: "gave up: valkey" in served.output(), "the queue is down")
        submit()
        assert set(refused) == {503}
        ballast.unlink()
        before = len(accepted)
        # Sooner than the regular retry after 30 s.
        eventually(lambda: submit() and len(accepted) > before, "jobs are accepted again", 25)
        assert "has space again" in served.output()
        for job in accepted:
            eventually(lambda i=job: client.job(i, wait_s=10).status is Status.SUCCEEDED, "it ends", UP_WITHIN_S)


def test_orphaned_processes_of_a_killed_serve_are_ended_by_the_next(served: ServeCommand) -> None:
    process = served.bring_up()
    old = {each.pid for each in served.processes()}
    with connect(served.store_url) as queue:
        queue.set("kept", "yes")
    process.kill()
    process.wait()
    assert {each.pid for each in served.processes()} == old
    served.bring_up()
    assert "orphaned processes" in served.output()
    assert not old & {each.pid for each in served.processes()}
    with connect(served.store_url) as queue:
        assert queue.get("kept") == "yes"


def test_a_port_in_use_is_one_line(served: ServeCommand) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", int(served.environment["PORT"])))
        listener.listen()
        result = served.run()
    assert result.returncode == 1
    assert re.fullmatch(r"scripts/serve: port \d+ is taken; set PORT to another one in \S+\n", result.stderr)
    assert served.processes() == []


def test_a_model_that_does_not_load_is_one_line(served: ServeCommand) -> None:
    unknown = make_folder(served.env_file.with_name("unknown-model"))
    (unknown / "config.json").write_text('{"model_type": "no_such_model"}')
    result = served.run(MODEL_PATH=str(unknown), BACKEND="auto")
    assert result.returncode == 1
    assert re.fullmatch(r"scripts/serve: worker-0 did not start: .+\n", result.stderr)
    assert served.processes() == []


def test_an_incomplete_model_is_one_line_before_anything_starts(served: ServeCommand) -> None:
    broken = make_folder(served.env_file.with_name("broken-model"))
    (broken / "model.safetensors").unlink()
    result = served.run(MODEL_PATH=str(broken), BACKEND="auto")
    assert result.returncode == 1
    assert re.fullmatch(r"scripts/serve: the default model cannot be served: .* has no weights .*\n", result.stderr)


def test_a_missing_model_is_one_line(served: ServeCommand) -> None:
    result = served.run(MODEL_PATH=str(served.data_dir / "nothing"), BACKEND="auto")
    assert result.returncode == 1
    assert re.fullmatch(r"scripts/serve: MODEL_PATH .* contains no model .*\n", result.stderr)


def test_a_queue_damaged_by_a_power_failure_is_repaired_and_keeps_its_jobs() -> None:
    with tempfile.TemporaryDirectory(prefix="mlxq") as home:
        served = ServeCommand(Path(home), BACKEND="fake")
        try:
            served.bring_up().kill()
            with served.client() as client:
                job = client.submit({"prompt": "Hello", "max_tokens": 2}, wait_s=30)
            processes.terminate_all(served.data_dir, grace_s=0)
            (file,) = (served.data_dir / "valkey/appendonlydir").glob("*.incr.aof")
            with file.open("ab") as damaged:
                damaged.write(b"\0" * 4096)
            served.bring_up()
            assert "its last 4096 bytes were removed" in served.output()
            with served.client() as client:
                assert client.job(job.id).status is Status.SUCCEEDED
        finally:
            served.clean_up()
