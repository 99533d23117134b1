"""The folder of prefixes: what is found again, what is not believed, what goes first, and who shares it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from shared.settings import ROOT
from worker.runner.prefix import blocks
from worker.runner.prefix.blocks import BLOCK, Block, Tensor
from worker.runner.prefix.files import ROOM_BYTES, SUFFIX, PrefixFiles, fingerprint

PLENTY = 2**30
DAY_S = 86_400.0
TOKENS = list(range(4 * BLOCK))
NAMES = list(blocks.names("me", TOKENS))


def block(seed: int, *, halves: int = 512) -> Block:
    """Two tensors of so many numbers of 16 bits."""
    data = np.random.default_rng(seed).integers(0, 256, 2 * halves, dtype=np.uint8)
    return [Tensor("BF16", (1, 2, halves // 2), data), Tensor("F16", (1, halves), data[::-1].copy())]


SIZE = blocks.size(NAMES[0], block(0))


def files(folder: Path, model: str = "model", most_bytes: int = PLENTY, keep_s: float = DAY_S) -> PrefixFiles:
    found = PrefixFiles(folder / "prefixes", model, most_bytes, keep_s)
    found.look()
    return found


def path(folder: Path, name: str, model: str = "model") -> Path:
    return folder / "prefixes" / model / (name + SUFFIX)


def same(found: Block | None, wanted: Block) -> bool:
    return found is not None and all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a.data, b.data)
        for a, b in zip(found, wanted, strict=True)
    )


def test_what_was_written_is_found_by_the_next(tmp_path: Path) -> None:
    assert files(tmp_path).write([(name, block(i)) for i, name in enumerate(NAMES)]) == 4
    found = files(tmp_path)
    assert all(found.has(name) and found.size(name) == SIZE for name in NAMES)
    assert all(same(found.read(name), block(i)) for i, name in enumerate(NAMES))
    assert found.nbytes == 4 * SIZE == sum(path(tmp_path, name).stat().st_size for name in NAMES)
    assert found.write([(NAMES[0], block(0))]) == 0


def test_a_file_is_what_the_safetensors_package_reads(tmp_path: Path) -> None:
    files(tmp_path).write([(NAMES[0], block(0))])
    content = path(tmp_path, NAMES[0]).read_bytes()
    read = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
    assert [(read[each]["dtype"], tuple(read[each]["shape"])) for each in ("0", "1")] == [
        ("BF16", (1, 2, 256)),
        ("F16", (1, 512)),
    ]
    assert [bytes(read[each]["data"]) for each in ("0", "1")] == [tensor.data.tobytes() for tensor in block(0)]


def test_only_the_user_may_read_it(tmp_path: Path) -> None:
    files(tmp_path).write([(NAMES[0], block(0))])
    for each in (tmp_path / "prefixes").rglob("*"):
        assert each.stat().st_mode & 0o077 == 0
    assert (tmp_path / "prefixes").stat().st_mode & 0o077 == 0


def test_a_name_tells_the_owner_and_every_token_apart_and_nothing_else() -> None:
    assert len(NAMES) == 4
    assert list(blocks.names("me", TOKENS[: 2 * BLOCK + 5])) == NAMES[:2]
    other = [1, *TOKENS[1:]]
    assert not set(blocks.names("me", other)) & set(NAMES)
    assert not set(blocks.names("you", TOKENS)) & set(NAMES)
    late = [*TOKENS[:-1], 0]
    assert [a == b for a, b in zip(blocks.names("me", late), NAMES, strict=True)] == [True, True, True, False]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, SIZE // 2, SIZE - 1])
def test_a_cut_file_is_dropped(tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture) -> None:
    found = files(tmp_path)
    found.write([(NAMES[0], block(0))])
    os.truncate(path(tmp_path, NAMES[0]), length)
    assert found.read(NAMES[0]) is None
    assert not found.has(NAMES[0])
    assert not path(tmp_path, NAMES[0]).exists()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_file_with_any_byte_changed_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = files(tmp_path)
    found.write([(NAMES[0], block(0))])
    content = path(tmp_path, NAMES[0]).read_bytes()
    for place in (*range(500), *range(500, len(content), 37), len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 0x11
        path(tmp_path, NAMES[0]).write_bytes(changed)
        assert found.read(NAMES[0]) is None, place
    path(tmp_path, NAMES[0]).write_bytes(content + b"\0")
    assert found.read(NAMES[0]) is None


def test_a_file_under_anothers_name_is_dropped(tmp_path: Path) -> None:
    found = files(tmp_path)
    found.write([(NAMES[0], block(0)), (NAMES[1], block(1))])
    shutil.copy(path(tmp_path, NAMES[0]), path(tmp_path, NAMES[1]))
    assert found.read(NAMES[1]) is None
    assert same(found.read(NAMES[0]), block(0))


def test_models_know_nothing_of_each_other_but_share_the_limit(tmp_path: Path) -> None:
    old = files(tmp_path, "old")
    old.write([(name, block(i)) for i, name in enumerate(NAMES)])
    new = files(tmp_path, "new", most_bytes=5 * SIZE)
    assert not any(map(new.has, NAMES))
    assert new.read(NAMES[0]) is None
    new.write([(name, block(9)) for name in NAMES[:2]])
    assert new.nbytes == 5 * SIZE
    assert [path(tmp_path, name, "old").exists() for name in NAMES] == [True, True, True, False]
    assert [new.has(name) for name in NAMES] == [True, True, False, False]


def test_the_least_recently_used_goes_first_and_ends_before_beginnings(tmp_path: Path) -> None:
    found = files(tmp_path, most_bytes=4 * SIZE)
    others = list(blocks.names("you", TOKENS))
    found.write([(name, block(0)) for name in others[:2]])
    found.write([(name, block(0)) for name in NAMES[:2]])
    found.touch(others[:2])
    found.write([(NAMES[2], block(0))])
    assert [found.has(name) for name in (*NAMES[:3], *others[:2])] == [True, False, True, True, True]
    assert found.nbytes == 4 * SIZE


def test_more_than_it_may_hold_is_written_from_the_beginning_as_far_as_it_fits(tmp_path: Path) -> None:
    found = files(tmp_path, most_bytes=3 * SIZE - 1)
    assert found.write([(name, block(0)) for name in NAMES]) == 2
    assert [found.has(name) for name in NAMES] == [True, True, False, False]


def test_the_disk_keeps_some_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = files(tmp_path)
    found.write([(name, block(0)) for name in NAMES])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=ROOM_BYTES - 2 * SIZE))
    found.look()
    assert [found.has(name) for name in NAMES] == [True, True, False, False]
    assert found.write([(NAMES[2], block(0))]) <= 1
    assert found.nbytes <= 2 * SIZE


def test_what_nobody_uses_is_not_kept_for_ever(tmp_path: Path) -> None:
    files(tmp_path).write([(name, block(0)) for name in NAMES])
    long_ago = time.time() - 100
    os.utime(path(tmp_path, NAMES[1]), (long_ago, long_ago))
    found = files(tmp_path, keep_s=50)
    assert [found.has(name) for name in NAMES] == [True, False, True, True]


def test_a_block_that_another_deleted_is_missed_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = files(tmp_path)
    found.write([(NAMES[0], block(0))])
    path(tmp_path, NAMES[0]).unlink()
    assert found.read(NAMES[0]) is None
    assert not found.has(NAMES[0])
    assert not caplog.records


CRASH = """
def write_half(path, name, content):
    whole(path, name, content[:1])
    if name == NAMES[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, name, content)

whole, blocks.write = blocks.write, write_half
files(folder).write([(name, block(i)) for i, name in enumerate(NAMES)])
"""
WRITE = """
seed = int(sys.argv[2])
own = list(blocks.names(str(seed), TOKENS))
found = files(folder, most_bytes=6 * SIZE)
for _ in range(20):
    found.write([(name, block(i)) for i, name in enumerate(NAMES)])
    found.write([(name, block(seed)) for name in own])
    with found._alone():
        assert sum(kept.stat().st_size for kept in path(folder, "").parent.iterdir()) <= 6 * SIZE
    content = found.read(NAMES[0])
    assert content is None or same(content, block(0))
"""


def start(script: str, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """Another process, with what this module has."""
    module = f"import os, runpy, signal, sys; globals().update(runpy.run_path({__file__!r}))\n"
    command = [sys.executable, "-c", f"{module}folder = Path(sys.argv[1])\n{script}", str(folder), *more]
    return subprocess.Popen(command, cwd=ROOT)


def test_a_crash_in_the_middle_of_a_write_leaves_nothing_behind(tmp_path: Path) -> None:
    assert start(CRASH, tmp_path).wait(30) == -signal.SIGKILL
    assert len(list(path(tmp_path, "").parent.iterdir())) == 2  # a whole one and a half one
    found = files(tmp_path)  # the lock has ended with its process
    assert [found.has(name) for name in NAMES] == [True, False, False, False]
    assert same(found.read(NAMES[0]), block(0))
    assert [each.name for each in path(tmp_path, "").parent.iterdir()] == [NAMES[0] + SUFFIX]
    assert found.write([(name, block(i)) for i, name in enumerate(NAMES)]) == 3


def test_workers_that_write_at_once_share_the_folder_and_its_limit(tmp_path: Path) -> None:
    workers = [start(WRITE, tmp_path, str(seed)) for seed in (7, 8, 9)]
    assert [worker.wait(30) for worker in workers] == [0, 0, 0]
    found = files(tmp_path)
    assert all(found.read(each.stem) for each in path(tmp_path, "").parent.iterdir())
    assert 0 < found.nbytes <= 6 * SIZE


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization": {"bits": 4}}')
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    return folder


def changed(change: Callable[[Path], Any], folder: Path) -> bool:
    before = fingerprint(folder, "layout")
    change(folder)
    return fingerprint(folder, "layout") != before


def test_other_weights_another_quantisation_and_another_layout_are_other_models(weights: Path) -> None:
    file = weights / "model.safetensors"
    seen = file.stat()

    def same_size_and_time(_: Path) -> None:
        file.write_bytes(os.urandom(100_000))
        os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))

    assert not changed(lambda _: None, weights)
    assert changed(same_size_and_time, weights)
    assert changed(lambda folder: (folder / "config.json").write_text('{"quantization": {"bits": 8}}'), weights)
    assert changed(lambda _: os.truncate(file, 99_999), weights)
    assert changed(lambda folder: (folder / "more.safetensors").write_bytes(b"1"), weights)
    assert fingerprint(weights, "another") != fingerprint(weights, "layout")
