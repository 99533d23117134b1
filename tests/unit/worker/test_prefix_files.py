"""The folder of prefixes: files are opened again, verified, evicted, and shared by several processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from shared.settings import ROOT
from worker.runner.prefix import blocks
from worker.runner.prefix.blocks import BLOCK, Block, BlockChain, Tensor
from worker.runner.prefix.files import FREE_BYTES, SUFFIX, PrefixFiles, fingerprint

PLENTY = 2**30
DAY_S = 86_400.0
TOKENS = list(range(4 * BLOCK))


def names(owner: str, tokens: Sequence[int]) -> list[str]:
    """Return the name of each complete block of these tokens."""
    return [chain.name for chain in BlockChain.of(owner).blocks(tokens)]


NAMES = names("me", TOKENS)


def block(seed: int, *, halves: int = 512) -> Block:
    """Return a block of two tensors with `halves` 16-bit numbers each."""
    data = np.random.default_rng(seed).integers(0, 256, 2 * halves, dtype=np.uint8)
    return [Tensor("BF16", (1, 2, halves // 2), data), Tensor("F16", (1, halves), data[::-1].copy())]


SIZE = blocks.size(NAMES[0], block(0))


def files(folder: Path, model: str = "model", max_bytes: int = PLENTY, keep_s: float = DAY_S) -> PrefixFiles:
    opened = PrefixFiles(folder / "prefixes", model, max_bytes, keep_s)
    opened.refresh()
    return opened


def path(folder: Path, name: str, model: str = "model") -> Path:
    return folder / "prefixes" / model / (name + SUFFIX)


def same(block: Block | None, expected: Block) -> bool:
    return block is not None and all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a.data, b.data)
        for a, b in zip(block, expected, strict=True)
    )


def test_written_blocks_are_found_after_reopening(tmp_path: Path) -> None:
    assert files(tmp_path).write([(name, block(i)) for i, name in enumerate(NAMES)]) == 4
    opened = files(tmp_path)
    assert all(opened.has(name) and opened.size(name) == SIZE for name in NAMES)
    assert all(same(opened.read(name), block(i)) for i, name in enumerate(NAMES))
    assert opened.nbytes == 4 * SIZE == sum(path(tmp_path, name).stat().st_size for name in NAMES)
    assert opened.write([(NAMES[0], block(0))]) == 0


def test_the_safetensors_package_can_read_a_file(tmp_path: Path) -> None:
    files(tmp_path).write([(NAMES[0], block(0))])
    content = path(tmp_path, NAMES[0]).read_bytes()
    tensors = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
    assert [(tensors[each]["dtype"], tuple(tensors[each]["shape"])) for each in ("0", "1")] == [
        ("BF16", (1, 2, 256)),
        ("F16", (1, 512)),
    ]
    assert [bytes(tensors[each]["data"]) for each in ("0", "1")] == [tensor.data.tobytes() for tensor in block(0)]


def test_only_the_user_may_read_the_files(tmp_path: Path) -> None:
    files(tmp_path).write([(NAMES[0], block(0))])
    for each in (tmp_path / "prefixes").rglob("*"):
        assert each.stat().st_mode & 0o077 == 0
    assert (tmp_path / "prefixes").stat().st_mode & 0o077 == 0


def test_a_name_depends_on_the_owner_and_all_tokens_up_to_its_end() -> None:
    assert len(NAMES) == 4
    assert names("me", TOKENS[: 2 * BLOCK + 5]) == NAMES[:2]
    other = [1, *TOKENS[1:]]
    assert not set(names("me", other)) & set(NAMES)
    assert not set(names("you", TOKENS)) & set(NAMES)
    late = [*TOKENS[:-1], 0]
    assert [a == b for a, b in zip(names("me", late), NAMES, strict=True)] == [True, True, True, False]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, SIZE // 2, SIZE - 1])
def test_a_truncated_file_is_deleted(tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture) -> None:
    opened = files(tmp_path)
    opened.write([(NAMES[0], block(0))])
    os.truncate(path(tmp_path, NAMES[0]), length)
    assert opened.read(NAMES[0]) is None
    assert not opened.has(NAMES[0])
    assert not path(tmp_path, NAMES[0]).exists()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_file_with_any_changed_byte_is_rejected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened = files(tmp_path)
    opened.write([(NAMES[0], block(0))])
    content = path(tmp_path, NAMES[0]).read_bytes()
    for place in (*range(500), *range(500, len(content), 37), len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 0x11
        path(tmp_path, NAMES[0]).write_bytes(changed)
        assert opened.read(NAMES[0]) is None, place
    path(tmp_path, NAMES[0]).write_bytes(content + b"\0")
    assert opened.read(NAMES[0]) is None


def test_a_file_with_the_name_of_another_block_is_rejected(tmp_path: Path) -> None:
    opened = files(tmp_path)
    opened.write([(NAMES[0], block(0)), (NAMES[1], block(1))])
    shutil.copy(path(tmp_path, NAMES[0]), path(tmp_path, NAMES[1]))
    assert opened.read(NAMES[1]) is None
    assert same(opened.read(NAMES[0]), block(0))


def test_models_are_separate_but_share_the_limit(tmp_path: Path) -> None:
    old = files(tmp_path, "old")
    old.write([(name, block(i)) for i, name in enumerate(NAMES)])
    new = files(tmp_path, "new", max_bytes=5 * SIZE)
    assert not any(map(new.has, NAMES))
    assert new.read(NAMES[0]) is None
    new.write([(name, block(9)) for name in NAMES[:2]])
    assert new.nbytes == 5 * SIZE
    assert [path(tmp_path, name, "old").exists() for name in NAMES] == [True, True, True, False]
    assert [new.has(name) for name in NAMES] == [True, True, False, False]


def test_the_least_recently_used_block_is_deleted_first_from_the_end(tmp_path: Path) -> None:
    opened = files(tmp_path, max_bytes=4 * SIZE)
    others = names("you", TOKENS)
    opened.write([(name, block(0)) for name in others[:2]])
    opened.write([(name, block(0)) for name in NAMES[:2]])
    opened.touch(others[:2])
    opened.write([(NAMES[2], block(0))])
    assert [opened.has(name) for name in (*NAMES[:3], *others[:2])] == [True, False, True, True, True]
    assert opened.nbytes == 4 * SIZE


def test_of_too_many_blocks_the_first_ones_that_fit_are_written(tmp_path: Path) -> None:
    opened = files(tmp_path, max_bytes=3 * SIZE - 1)
    assert opened.write([(name, block(0)) for name in NAMES]) == 2
    assert [opened.has(name) for name in NAMES] == [True, True, False, False]


def test_some_disk_space_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = files(tmp_path)
    opened.write([(name, block(0)) for name in NAMES])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=FREE_BYTES - 2 * SIZE))
    opened.refresh()
    assert [opened.has(name) for name in NAMES] == [True, True, False, False]
    assert opened.write([(NAMES[2], block(0))]) <= 1
    assert opened.nbytes <= 2 * SIZE


def test_unused_files_expire(tmp_path: Path) -> None:
    files(tmp_path).write([(name, block(0)) for name in NAMES])
    long_ago = time.time() - 100
    os.utime(path(tmp_path, NAMES[1]), (long_ago, long_ago))
    opened = files(tmp_path, keep_s=50)
    assert [opened.has(name) for name in NAMES] == [True, False, True, True]


def test_a_block_deleted_by_another_process_is_not_logged_as_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = files(tmp_path)
    opened.write([(NAMES[0], block(0))])
    path(tmp_path, NAMES[0]).unlink()
    assert opened.read(NAMES[0]) is None
    assert not opened.has(NAMES[0])
    assert not caplog.records


CRASH = """
def write_partially(path, name, content):
    whole(path, name, content[:1])
    if name == NAMES[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, name, content)

whole, blocks.write = blocks.write, write_partially
files(folder).write([(name, block(i)) for i, name in enumerate(NAMES)])
"""
WRITE = """
seed = int(sys.argv[2])
own = names(str(seed), TOKENS)
opened = files(folder, max_bytes=6 * SIZE)
for _ in range(20):
    opened.write([(name, block(i)) for i, name in enumerate(NAMES)])
    opened.write([(name, block(seed)) for name in own])
    with opened._lock():
        assert sum(file.stat().st_size for file in path(folder, "").parent.iterdir()) <= 6 * SIZE
    content = opened.read(NAMES[0])
    assert content is None or same(content, block(0))
"""


def start(script: str, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start another process that runs a script with the names of this module."""
    module = f"import os, runpy, signal, sys; globals().update(runpy.run_path({__file__!r}))\n"
    command = [sys.executable, "-c", f"{module}folder = Path(sys.argv[1])\n{script}", str(folder), *more]
    return subprocess.Popen(command, cwd=ROOT)


def test_a_crash_during_a_write_leaves_no_broken_file(tmp_path: Path) -> None:
    assert start(CRASH, tmp_path).wait(30) == -signal.SIGKILL
    assert len(list(path(tmp_path, "").parent.iterdir())) == 2  # a complete file and a partial one
    opened = files(tmp_path)  # the lock was released when the process died
    assert [opened.has(name) for name in NAMES] == [True, False, False, False]
    assert same(opened.read(NAMES[0]), block(0))
    assert [each.name for each in path(tmp_path, "").parent.iterdir()] == [NAMES[0] + SUFFIX]
    assert opened.write([(name, block(i)) for i, name in enumerate(NAMES)]) == 3


def test_concurrent_writers_respect_the_common_limit(tmp_path: Path) -> None:
    workers = [start(WRITE, tmp_path, str(seed)) for seed in (7, 8, 9)]
    assert [worker.wait(30) for worker in workers] == [0, 0, 0]
    opened = files(tmp_path)
    assert all(opened.read(each.stem) for each in path(tmp_path, "").parent.iterdir())
    assert 0 < opened.nbytes <= 6 * SIZE


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


def test_the_fingerprint_depends_on_weights_quantisation_and_layout(weights: Path) -> None:
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


def test_checkpoints_are_found_by_the_block_before_them(tmp_path: Path) -> None:
    chain = BlockChain.of("me").after(TOKENS[: 2 * BLOCK + 5])
    opened = files(tmp_path)
    opened.write([(NAMES[1], block(0)), (chain.checkpoint_name, block(1))])
    path(tmp_path, "notes-of-somebody-else").touch()
    for each in (opened, files(tmp_path)):
        assert each.checkpoints(NAMES[1]) == [chain.checkpoint_name]
        assert each.checkpoints(NAMES[0]) == []
    path(tmp_path, chain.checkpoint_name).unlink()
    assert opened.read(chain.checkpoint_name) is None
    assert opened.checkpoints(NAMES[1]) == []
