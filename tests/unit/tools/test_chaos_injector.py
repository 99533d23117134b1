"""Faults count only if they hit a target, overlapping faults share an effect, and unexpected exits are recorded."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis

from tests.chaos import faults
from tests.chaos.disks import Disk
from tests.chaos.faults import Fault, FaultInjector, FaultKind, SharedEffect
from tests.chaos.managed_process import ManagedProcess
from tests.chaos.recovery import Measurement, Recovery
from tests.chaos.stack import ChaosStack

MakeProcess = Callable[[str], ManagedProcess]

SLEEP = "import time; time.sleep(60)"
LAUNCHER = f"""
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
status = child.wait()
os.kill(os.getpid(), -status)
"""


class NoRecovery:
    @contextmanager
    def measuring(self, kind: str, worker: int | None = None) -> Iterator[Measurement]:
        yield Measurement()


class UnreachableRedis:
    def client_kill_filter(self, **_: object) -> int:
        raise redis.ConnectionError


@pytest.fixture
def make_process(tmp_path: Path) -> Iterator[MakeProcess]:
    processes: list[ManagedProcess] = []

    def make(program: str) -> ManagedProcess:
        processes.append(ManagedProcess("worker-0", [sys.executable, "-c", program], {}, tmp_path / "log"))
        return processes[-1]

    yield make
    for each in processes:
        each.kill()
        each.stop()


def make_injector(worker: ManagedProcess, retry_s: float = 0.0) -> FaultInjector:
    stack: Any = SimpleNamespace(
        workers=[worker],
        links=[],
        disk=None,
        valkey=worker,
        api=worker,
        background=worker,
        redis=UnreachableRedis(),
        api_processes=list,
        worker_info=lambda _: None,
    )
    return FaultInjector(cast("ChaosStack", stack), cast("Recovery", NoRecovery()), retry_s)


WITH_TARGET = [kind for kind in FaultKind if kind not in (FaultKind.WORKER_CUT_OFF, FaultKind.DISK_FILLED)]


@pytest.mark.parametrize("kind", WITH_TARGET)
def test_a_fault_without_a_running_target_does_not_count(kind: FaultKind, make_process: MakeProcess) -> None:
    injector = make_injector(make_process(SLEEP))
    injector.run([Fault(0, kind, 0, 0.1)])
    assert injector.injected[kind] == 0


@pytest.mark.parametrize("kind", [FaultKind.WORKER_KILLED, FaultKind.WORKER_PAUSED, FaultKind.REDIS_KILLED])
def test_a_fault_is_retried_until_its_target_runs(kind: FaultKind, make_process: MakeProcess) -> None:
    worker = make_process(LAUNCHER)
    injector = make_injector(worker, retry_s=30)
    threading.Timer(0.2, worker.ensure_running).start()
    injector.run([Fault(0, kind, 0, 0.1)])
    assert injector.injected[kind] == 1


def restart(worker: ManagedProcess, eventually: Callable[..., None]) -> None:
    eventually(lambda: worker.pid is None)
    worker.ensure_running()


def test_an_unexpected_exit_is_recorded(make_process: MakeProcess, eventually: Callable[..., None]) -> None:
    worker = make_process("raise SystemExit(70)")
    worker.ensure_running()
    restart(worker, eventually)
    assert worker.unexpected_exits == [70]


def test_the_exit_of_a_killed_process_is_expected(make_process: MakeProcess, eventually: Callable[..., None]) -> None:
    worker = make_process(SLEEP)
    worker.ensure_running()
    assert worker.kill()
    restart(worker, eventually)
    assert worker.unexpected_exits == []


def test_a_stopped_process_must_exit_with_status_0(make_process: MakeProcess, eventually: Callable[..., None]) -> None:
    worker = make_process(SLEEP)
    worker.ensure_running()
    assert worker.signal(signal.SIGTERM)
    restart(worker, eventually)
    assert worker.unexpected_exits == [-signal.SIGTERM]


def test_an_allowed_exit_has_a_status_and_a_time_limit(
    make_process: MakeProcess, eventually: Callable[..., None]
) -> None:
    worker = make_process("raise SystemExit(1)")
    worker.allow_exit(1, 60)
    worker.ensure_running()
    restart(worker, eventually)
    assert worker.unexpected_exits == []
    late = make_process("raise SystemExit(1)")
    late.allow_exit(1, -1)
    late.allow_exit(2, 60)
    late.ensure_running()
    restart(late, eventually)
    assert late.unexpected_exits == [1]


class SmallDisk:
    def fill(self) -> bool:
        return True

    def free(self) -> None:
        pass


@pytest.mark.parametrize("full", [True, False])
def test_valkey_may_exit_only_while_its_disk_is_full(
    full: bool, make_process: MakeProcess, eventually: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "_DISK_RECOVERY_S", -1)
    valkey = make_process("raise SystemExit(1)")
    fill, free = faults._fill(cast("Disk", SmallDisk()), valkey)
    assert fill()
    if not full:
        free()
    valkey.ensure_running()
    restart(valkey, eventually)
    assert valkey.unexpected_exits == ([] if full else [1])


def test_a_shared_effect_is_undone_by_the_last_fault() -> None:
    calls: list[str] = []
    effect = SharedEffect(lambda: not calls.append("applied"), lambda: calls.append("undone"))
    assert effect.acquire() and effect.acquire()
    effect.release()
    assert calls == ["applied", "applied"]
    effect.release()
    assert calls == ["applied", "applied", "undone"]


def test_an_effect_without_a_target_is_not_undone() -> None:
    effect = SharedEffect(lambda: False, lambda: pytest.fail("nothing was applied"))
    assert not effect.acquire()


def test_overlapping_pauses_end_with_the_last_one(make_process: MakeProcess, eventually: Callable[..., None]) -> None:
    worker = make_process(SLEEP)
    worker.ensure_running()
    resumed_at: list[float] = []
    send = worker.signal

    def record(number: int) -> bool:
        if number == signal.SIGCONT:
            resumed_at.append(time.monotonic())
        return send(number)

    worker.signal = record  # type: ignore[method-assign]
    injector, started = make_injector(worker), time.monotonic()
    injector.run([Fault(0, FaultKind.WORKER_PAUSED, 0, 0.1), Fault(0.05, FaultKind.WORKER_PAUSED, 0, 0.4)])
    assert injector.injected[FaultKind.WORKER_PAUSED] == 2
    assert len(resumed_at) == 1 and resumed_at[0] - started >= 0.4


def test_the_exit_of_a_launcher_is_expected_when_its_child_was_killed(
    make_process: MakeProcess, eventually: Callable[..., None]
) -> None:
    worker = make_process(LAUNCHER)
    worker.ensure_running()
    eventually(worker.kill_child)
    eventually(lambda: worker.pid is None)
    worker.ensure_running()
    assert worker.unexpected_exits == []
