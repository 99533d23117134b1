"""Repair of a damaged append-only file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from scripts.stack import aof, config, preflight
from scripts.stack.failure import StartFailed
from shared.redis.client import connect
from shared.settings import Settings
from tests.support.waiting import eventually

KEYS = 50


def run_valkey(settings: Settings, work: Callable[[], None]) -> None:
    """Start Valkey, call `work` while it answers, and kill it."""
    with subprocess.Popen(config.valkey_command(settings), stdout=subprocess.DEVNULL) as server:
        try:
            eventually(lambda: settings.redis_socket.is_socket() or server.poll() is not None, "it listens")
            assert server.poll() is None
            work()
        finally:
            server.kill()
    settings.redis_socket.unlink(missing_ok=True)


@pytest.fixture
def settings() -> Iterator[Settings]:
    """Settings with the data of a stopped Valkey."""
    with TemporaryDirectory(prefix="mlxq-") as folder:
        settings = Settings(_env_file=None, data_dir=Path(folder))
        preflight.prepare_data_dir(settings)
        config.write(settings)

        def fill() -> None:
            with connect(settings.store_url) as client:
                for number in range(KEYS):
                    client.set(f"key-{number}", "value")

        run_valkey(settings, fill)
        yield settings


def last_file(settings: Settings) -> Path:
    (file,) = (settings.data_dir / "valkey/appendonlydir").glob("*.incr.aof")
    return file


def count_keys(settings: Settings) -> int:
    counts: list[int] = []

    def count() -> None:
        with connect(settings.store_url) as client:
            counts.append(client.dbsize())

    run_valkey(settings, count)
    return counts[0]


def test_an_intact_file_is_not_changed(settings: Settings) -> None:
    assert aof.repair(settings) is None
    assert count_keys(settings) == KEYS


@pytest.mark.parametrize("garbage", [b"\0" * 4096, b"*3\r\n$3\r\nSET\r\n$5\r\nkey", b"garbage"])
def test_a_damaged_end_is_removed_after_a_copy_was_made(settings: Settings, garbage: bytes) -> None:
    file = last_file(settings)
    intact = file.read_bytes()
    file.write_bytes(intact + garbage)
    repair = aof.repair(settings)
    assert repair is not None
    assert repair.cut_bytes == len(garbage)
    assert repair.backup.read_bytes() == intact + garbage
    assert str(len(garbage)) in str(repair)
    assert count_keys(settings) == KEYS


def test_an_incomplete_last_command_is_removed(settings: Settings) -> None:
    file = last_file(settings)
    os.truncate(file, file.stat().st_size - 3)
    assert aof.repair(settings) is not None
    assert count_keys(settings) == KEYS - 1


@pytest.mark.parametrize("content", ["", "\0" * 100, 'file "elsewhere" seq 1 type i\n'])
def test_a_damaged_manifest_is_reported(settings: Settings, content: str) -> None:
    manifest = last_file(settings).with_name("appendonly.aof.manifest")
    manifest.write_text(content)
    with pytest.raises(StartFailed, match=str(manifest)):
        aof.repair(settings)


def test_a_new_folder_has_nothing_to_repair(tmp_path: Path) -> None:
    assert aof.repair(Settings(_env_file=None, data_dir=tmp_path)) is None
