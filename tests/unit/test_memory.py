"""How much memory there is, and what fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worker.runner import memory
from worker.runner.base import Fit, OutOfMemory
from worker.runner.memory import Budget, Footprint, device_limit, exhaustion_told, is_out_of_memory

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
def test_what_the_library_says_when_memory_ends(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(OutOfMemory), exhaustion_told():
        raise error


@pytest.mark.parametrize("error", [RuntimeError("[matmul] shapes do not fit"), ValueError("out of memory"), KeyError()])
def test_other_errors_are_raised_as_they_are(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), exhaustion_told():
        raise error


def test_a_batch_takes_what_its_longest_row_takes_for_each() -> None:
    budget = Budget(10 * 512 * 100, Footprint(0, ((100, None),)))
    assert budget.needed([]) == 0
    assert budget.needed([3, 257, 500]) == 3 * 512 * 100
    assert budget.fits(500, [3] * 9) is Fit.NOW
    assert budget.fits(500, [3] * 10) is Fit.LATER
    assert budget.fits(3, [500] * 10) is Fit.LATER
    assert budget.fits(5121, []) is Fit.NEVER


def test_a_row_waits_for_memory_that_there_may_be_again() -> None:
    budget = Budget(512 * 100, Footprint(0, ((100, None),)), hoped_bytes=1024 * 100)
    assert [budget.fits(length, []) for length in (512, 513, 1024, 1025)] == [Fit.NOW, Fit.LATER, Fit.LATER, Fit.NEVER]


def test_windows_and_states_do_not_grow() -> None:
    footprint = Footprint(1000, ((10, 256), (1, None)))
    assert footprint.bytes(100) == 1000 + 256 * 11
    assert footprint.bytes(10_000) == 1000 + 512 * 10 + 10_240


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(str(content))


def test_a_control_group_leaves_what_it_and_those_around_it_do_not_use(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    root = tmp_path / "fs"
    write(root / "outer", memory__max=1000, memory__current=900, memory__stat="anon 1\ninactive_file 150\n")
    write(root / "outer/inner", memory__max="max", memory__current=1, memory__stat="")
    assert memory._free_of_groups(root, own) == [250]
    write(root / "outer/inner", memory__max=100)
    assert sorted(memory._free_of_groups(root, own)) == [99, 250]


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
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
def test_the_limit_is_chosen_by_device(
    device: dict[str, Any], workers: int, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx.core.device_info", lambda: device)
    monkeypatch.setattr("mlx.core.get_active_memory", lambda: 10 * GIB)
    monkeypatch.setattr(memory, "available_memory", lambda: 20 * GIB)
    assert device_limit(workers) == pytest.approx(limit)


def test_this_machine_has_some() -> None:
    assert 2**20 < memory.available_memory() < 2**50


def test_a_machine_without_control_groups_has_what_it_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_of_groups", list)
    monkeypatch.setattr(memory, "_free_of_machine", lambda: 7)
    assert memory.available_memory() == 7
