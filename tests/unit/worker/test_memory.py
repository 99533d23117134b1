"""Available memory, memory limits, and the cache memory of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worker.runner import memory
from worker.runner.base import OutOfMemory
from worker.runner.kv_cache import Footprint
from worker.runner.length_buckets import LengthBuckets
from worker.runner.memory import device_limit, is_out_of_memory, memory_errors

GIB = 2**30


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[malloc] Unable to allocate 4294967296 bytes."),
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer"),
        RuntimeError("[metal::malloc] Resource limit (499000) exceeded."),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU…OutOfMemory)"),
        RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
        MemoryError(),
    ],
    ids=str,
)
def test_errors_of_failed_allocations_are_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(OutOfMemory), memory_errors():
        raise error


@pytest.mark.parametrize("error", [RuntimeError("[matmul] shapes do not fit"), ValueError("out of memory"), KeyError()])
def test_other_errors_are_raised_unchanged(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), memory_errors():
        raise error


def buckets(max_padding_bytes: int, footprint: Footprint | None = None) -> LengthBuckets:
    hundred = Footprint(0, ((100, None),))
    return LengthBuckets(lambda: pytest.fail("counting bytes needs no batch"), footprint or hundred, max_padding_bytes)


def test_rows_are_counted_at_the_length_of_their_bucket() -> None:
    batches = buckets(max_padding_bytes=500 * 100)
    assert batches.bytes([]) == 0
    assert batches.bytes([3]) == 256 * 100
    assert batches.bytes([250]) == 512 * 100, "the cache grows before it is full"
    assert batches.bytes([300, 300, 440]) == 3 * 512 * 100
    # 600 tokens of padding are too many for one bucket. The rest covers rows that join in another order.
    assert batches.bytes([100, 300, 900, 900, 900]) == (3 * 1024 + 2 * 512 + 500) * 100


def test_a_long_row_does_not_increase_the_memory_of_short_rows() -> None:
    """Next to a row of 32,000 tokens, nearly as many short rows fit as the remaining memory holds."""
    batches, short, long = buckets(max_padding_bytes=1000 * 100), 680, 32_000
    limit = 300 * batches.bytes([short])
    rows = next(n for n in range(1, 400) if batches.bytes([long, *[short] * n]) > limit) - 1
    assert 300 - batches.bytes([long]) / batches.bytes([short]) - rows < 3


def test_counting_visits_each_row_once() -> None:
    visited: list[int] = []

    class CountingFootprint(Footprint):
        def filled(self, tokens: int) -> int:
            visited.append(tokens)
            return super().filled(tokens)

    buckets(0, CountingFootprint(0, ((100, None),))).bytes(range(1, 500))
    assert len(visited) == 499


def test_sliding_windows_and_states_do_not_grow() -> None:
    footprint = Footprint(1000, ((10, 256), (1, None)))
    assert footprint.allocated(100) == 1000 + 256 * 11
    assert footprint.allocated(10_000) == 1000 + 512 * 10 + 10_240


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(str(content))


def test_free_memory_is_limited_by_the_control_group_and_its_parents(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    root = tmp_path / "fs"
    write(root / "outer", memory__max=1000, memory__current=900, memory__stat="anon 1\ninactive_file 150\n")
    write(root / "outer/inner", memory__max="max", memory__current=1, memory__stat="")
    assert memory._free_of_groups(root, own) == [250]
    write(root / "outer/inner", memory__max=100)
    assert sorted(memory._free_of_groups(root, own)) == [99, 250]


def test_in_a_container_the_own_group_is_the_root(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("12:cpu:/x\n4:memory:/docker/abc\n0::/\n")
    usage = {"memory__limit_in_bytes": 1000, "memory__usage_in_bytes": 1200, "memory__stat": "total_inactive_file 1\n"}
    write(tmp_path / "fs/memory", **usage)
    assert memory._free_of_groups(tmp_path / "fs", own) == [0]
    assert memory._free_of_groups(tmp_path / "fs", tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("device", "workers", "limit"),
    [
        ({"max_recommended_working_set_size": 10 * GIB, "memory_size": 16 * GIB}, 1, 9 * GIB),
        ({"max_recommended_working_set_size": 10 * GIB}, 2, 4.5 * GIB),
        ({"free_memory": 70 * GIB, "total_memory": 80 * GIB}, 1, 0.9 * 80 * GIB),
        ({"architecture": "x86_64"}, 1, 10 * GIB + 0.8 * 20 * GIB),
        ({}, 2, 10 * GIB + 0.4 * 20 * GIB),
    ],
)
def test_the_limit_depends_on_the_device(
    device: dict[str, Any], workers: int, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx.core.device_info", lambda: device)
    monkeypatch.setattr("mlx.core.get_active_memory", lambda: 10 * GIB)
    monkeypatch.setattr(memory, "available_memory", lambda: 20 * GIB)
    assert device_limit(workers) == pytest.approx(limit)


def test_this_machine_has_free_memory() -> None:
    assert 2**20 < memory.available_memory() < 2**50


def test_without_control_groups_the_machine_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_of_groups", list)
    monkeypatch.setattr(memory, "_free_of_machine", lambda: 7)
    assert memory.available_memory() == 7
