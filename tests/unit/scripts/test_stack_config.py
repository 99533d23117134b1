"""The configuration of supervisord, read by its own parser, and that of Valkey."""

from __future__ import annotations

import re
import shlex
import socket
import string
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from supervisor.options import ServerOptions

from scripts.stack import config, preflight
from scripts.stack.failure import StartFailed
from scripts.stack.ports import free_port
from shared.redis.client import connect
from shared.settings import Settings
from tests.support.waiting import eventually
from worker.process.exits import EXIT_CONFIG

REFUSED = "%;#\"'\\?"


def make(data_dir: Path, **values: Any) -> Settings:
    return Settings(_env_file=None, data_dir=data_dir, **values)


def parsed(settings: Settings) -> dict[str, Any]:
    """Return supervisord's process groups by name."""
    for folder in (settings.run_dir, settings.log_dir):
        folder.mkdir(parents=True, exist_ok=True)
    config.write(settings)
    options = ServerOptions()
    options.realize(["-c", str(config.supervisord_conf_path(settings))])
    return {group.name: group for group in sorted(options.process_group_configs)}


def test_programs_start_in_order(tmp_path: Path) -> None:
    # supervisord starts groups by ascending priority and stops them by descending priority.
    assert list(parsed(make(tmp_path))) == ["valkey", "worker", "web", "background", "flower"]


def test_an_external_redis_replaces_valkey(tmp_path: Path) -> None:
    settings = make(tmp_path, redis_url="redis://queue.example:6379")
    assert list(parsed(settings)) == ["worker", "web", "background", "flower"]
    assert not config.valkey_conf_path(settings).exists()


def test_each_worker_has_a_number_and_a_log(tmp_path: Path) -> None:
    workers = parsed(make(tmp_path, workers=3))["worker"].process_configs
    assert [worker.name for worker in workers] == ["worker-0", "worker-1", "worker-2"]
    assert [worker.environment["MLXQ_WORKER_INDEX"] for worker in workers] == ["0", "1", "2"]
    assert [Path(worker.stdout_logfile).name for worker in workers] == ["worker-0.log", "worker-1.log", "worker-2.log"]


def test_a_worker_may_drain_before_it_is_killed(tmp_path: Path) -> None:
    settings = make(tmp_path, drain_s=120)
    [worker] = parsed(settings)["worker"].process_configs
    assert worker.stopwaitsecs > 120
    assert config.total_stop_s(settings) > 120


def test_a_worker_without_a_model_is_not_restarted(tmp_path: Path) -> None:
    [worker] = parsed(make(tmp_path))["worker"].process_configs
    assert worker.exitcodes == [EXIT_CONFIG]


def test_a_path_may_contain_spaces(tmp_path: Path) -> None:
    settings = make(tmp_path / "my data")
    groups = parsed(settings)
    [valkey], [web] = groups["valkey"].process_configs, groups["web"].process_configs
    assert shlex.split(valkey.command)[1] == str(config.valkey_conf_path(settings))
    assert web.stdout_logfile == str(settings.log_dir / "web.log")


@pytest.mark.parametrize("character", [each for each in string.punctuation if each != "/"])
def test_each_character_of_a_path_is_used_literally_or_refused(character: str) -> None:
    """supervisord and Valkey must not read it as a pattern, a comment or a variable."""
    with tempfile.TemporaryDirectory(prefix="mlxq-") as home:
        settings = make(Path(home) / f"a{character}b c")
        if character in REFUSED:
            with pytest.raises(StartFailed, match=re.escape(repr(character))):
                preflight.prepare_data_dir(settings)
            return
        preflight.prepare_data_dir(settings)
        groups = parsed(settings)
        [valkey], [web] = groups["valkey"].process_configs, groups["web"].process_configs
        assert web.stdout_logfile == str(settings.log_dir / "web.log")
        with subprocess.Popen(shlex.split(valkey.command), stdout=subprocess.PIPE, text=True) as server:
            try:
                eventually(lambda: settings.redis_socket.is_socket() or server.poll() is not None, "it listens")
                with connect(settings.store_url) as client:
                    assert client.config_get("dir")["dir"] == str(settings.data_dir / "valkey")
                    assert client.config_get("port")["port"] == "0"
                    assert client.config_get("appendfsync")["appendfsync"] == "always"
            finally:
                server.terminate()


def test_valkey_opens_no_port_even_if_its_configuration_has_one(tmp_path: Path) -> None:
    settings = make(tmp_path)
    port = free_port()
    command = [*config.valkey_command(settings)]
    assert command[-2:] == ["--port", "0"]
    config.valkey_conf_path(settings).parent.mkdir(parents=True)
    config.valkey_conf_path(settings).write_text(f"port {port}\nunixsocket {settings.redis_socket.name}\n")
    with subprocess.Popen(command, cwd=settings.run_dir, stdout=subprocess.PIPE, text=True) as server:
        try:
            eventually(lambda: settings.redis_socket.is_socket() or server.poll() is not None, "it listens")
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0
        finally:
            server.terminate()


def test_configuration_files_contain_no_secrets(tmp_path: Path) -> None:
    settings = make(tmp_path, flower_password="hush", mlxq_api_key="quiet")
    text = config.supervisord_conf(settings) + config.valkey_conf(settings)
    assert "hush" not in text
    assert "quiet" not in text


@pytest.mark.parametrize("line", ["appendonly yes", "port 0", "maxmemory-policy noeviction", "set-proc-title no"])
def test_valkeys_configuration_has_a_line(tmp_path: Path, line: str) -> None:
    assert line in config.valkey_conf(make(tmp_path)).splitlines()


@pytest.mark.parametrize(
    ("setting", "machine", "limit"),
    [
        ("auto", 2**29, 256 * 2**20),
        ("auto", 8 * 2**30, 2 * 2**30),
        ("auto", 2**36, 4 * 2**30),
        (10**9, 2**36, 10**9),
    ],
)
def test_valkey_has_a_memory_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: Any, machine: int, limit: int
) -> None:
    monkeypatch.setattr("scripts.stack.config.total_memory", lambda: machine)
    text = config.valkey_conf(make(tmp_path, redis_maxmemory_bytes=setting))
    assert f"maxmemory {limit}" in text.splitlines()
