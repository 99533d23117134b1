"""A strike counts when it hits something, what several hold down goes up with the last, and odd ends are told."""

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
from tests.chaos.faults import Hand, Kind, Strike, Switch
from tests.chaos.fleet import Fleet, Member
from tests.chaos.recovery import Recovery, Watch

SLEEP = "import time; time.sleep(60)"
LAUNCHES = f"""
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
status = child.wait()
os.kill(os.getpid(), -status)
"""


class Unwatched:
    @contextmanager
    def watching(self, kind: str, worker: int | None = None) -> Iterator[Watch]:
        yield Watch()


class Away:
    def client_kill_filter(self, **_: object) -> int:
        raise redis.ConnectionError


@pytest.fixture
def member(tmp_path: Path) -> Iterator[Callable[[str], Member]]:
    members: list[Member] = []

    def make(program: str) -> Member:
        members.append(Member("worker-0", [sys.executable, "-c", program], {}, tmp_path / "log"))
        return members[-1]

    yield make
    for each in members:
        each.kill()
        each.stop()


def hand(worker: Member, patience_s: float = 0.0) -> Hand:
    fleet: Any = SimpleNamespace(
        workers=[worker],
        links=[],
        disk=None,
        valkey=worker,
        api=worker,
        redis=Away(),
        api_processes=list,
        card=lambda _: None,
    )
    return Hand(cast("Fleet", fleet), cast("Recovery", Unwatched()), patience_s)


HITTABLE = [kind for kind in Kind if kind not in (Kind.WORKER_CUT_OFF, Kind.DISK_FILLED)]


@pytest.mark.parametrize("kind", HITTABLE)
def test_a_strike_into_nothing_does_not_count(kind: Kind, member: Callable[[str], Member]) -> None:
    striker = hand(member(SLEEP))
    striker.play([Strike(0, kind, 0, 0.1)])
    assert striker.struck[kind] == 0


@pytest.mark.parametrize("kind", [Kind.WORKER_KILLED, Kind.WORKER_PAUSED, Kind.REDIS_KILLED])
def test_a_strike_waits_for_a_process_that_is_about_to_be_there(kind: Kind, member: Callable[[str], Member]) -> None:
    worker = member(LAUNCHES)
    striker = hand(worker, patience_s=30)
    threading.Timer(0.2, worker.keep).start()
    striker.play([Strike(0, kind, 0, 0.1)])
    assert striker.struck[kind] == 1


def end(worker: Member, eventually: Callable[..., None]) -> None:
    eventually(lambda: worker.pid is None)
    worker.keep()


def test_an_end_that_no_strike_explains_is_told(
    member: Callable[[str], Member], eventually: Callable[..., None]
) -> None:
    worker = member("raise SystemExit(70)")
    worker.keep()
    end(worker, eventually)
    assert worker.odd_exits == [70]


def test_a_killed_process_ends_as_it_should(member: Callable[[str], Member], eventually: Callable[..., None]) -> None:
    worker = member(SLEEP)
    worker.keep()
    assert worker.kill()
    end(worker, eventually)
    assert worker.odd_exits == []


def test_a_stopped_process_that_does_not_end_with_0_is_told(
    member: Callable[[str], Member], eventually: Callable[..., None]
) -> None:
    worker = member(SLEEP)
    worker.keep()
    assert worker.signal(signal.SIGTERM)
    end(worker, eventually)
    assert worker.odd_exits == [-signal.SIGTERM]


def test_an_excuse_holds_for_its_time_and_its_status(
    member: Callable[[str], Member], eventually: Callable[..., None]
) -> None:
    worker = member("raise SystemExit(1)")
    worker.excuse(1, 60)
    worker.keep()
    end(worker, eventually)
    assert worker.odd_exits == []
    late = member("raise SystemExit(1)")
    late.excuse(1, -1)
    late.excuse(2, 60)
    late.keep()
    end(late, eventually)
    assert late.odd_exits == [1]


class SmallDisk:
    def fill(self) -> bool:
        return True

    def free(self) -> None:
        pass


@pytest.mark.parametrize("full", [True, False])
def test_a_server_without_room_may_end_itself_as_long_as_that_lasts(
    full: bool, member: Callable[[str], Member], eventually: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "_BACK_S", -1)
    valkey = member("raise SystemExit(1)")
    fill, free = faults._fill(cast("Disk", SmallDisk()), valkey)
    assert fill()
    if not full:
        free()
    valkey.keep()
    end(valkey, eventually)
    assert valkey.odd_exits == ([] if full else [1])


def test_what_two_hold_down_goes_up_with_the_second() -> None:
    said: list[str] = []
    switch = Switch(lambda: not said.append("down"), lambda: said.append("up"))
    assert switch.hold() and switch.hold()
    switch.release()
    assert said == ["down", "down"]
    switch.release()
    assert said == ["down", "down", "up"]


def test_what_was_not_there_to_be_held_is_not_let_go() -> None:
    switch = Switch(lambda: False, lambda: pytest.fail("nothing was down"))
    assert not switch.hold()


def test_a_pause_that_overlaps_another_lasts_to_its_own_end(
    member: Callable[[str], Member], eventually: Callable[..., None]
) -> None:
    worker = member(SLEEP)
    worker.keep()
    ups: list[float] = []
    sent = worker.signal
    worker.signal = lambda number: (ups.append(time.monotonic()) if number == signal.SIGCONT else None) or sent(number)  # type: ignore[method-assign]
    striker, started = hand(worker), time.monotonic()
    striker.play([Strike(0, Kind.WORKER_PAUSED, 0, 0.1), Strike(0.05, Kind.WORKER_PAUSED, 0, 0.4)])
    assert striker.struck[Kind.WORKER_PAUSED] == 2
    assert len(ups) == 1 and ups[0] - started >= 0.4


def test_a_launcher_whose_child_was_killed_has_an_explained_end(
    member: Callable[[str], Member], eventually: Callable[..., None]
) -> None:
    worker = member(LAUNCHES)
    worker.keep()
    eventually(worker.kill_child)
    eventually(lambda: worker.pid is None)
    worker.keep()
    assert worker.odd_exits == []
