"""What breaks and when: a schedule drawn from a seed, and the hands that do it."""

from __future__ import annotations

import logging
import math
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

import psutil
import redis

from tests.chaos.disks import Disk
from tests.chaos.fleet import LEASE_S, WORKERS, Fleet, Member
from tests.chaos.network_faults import Link
from tests.chaos.recovery import Recovery

log = logging.getLogger(__name__)


class Kind(StrEnum):
    """A fault."""

    WORKER_KILLED = "worker killed (SIGKILL)"
    WORKER_PAUSED = "worker paused (SIGSTOP, SIGCONT)"
    WORKER_STOPPED = "worker stopped (SIGTERM)"
    WORKER_CUT_OFF = "worker cut off from Redis"
    API_KILLED = "API process killed (SIGKILL)"
    REDIS_KILLED = "Redis killed (SIGKILL)"
    CLIENTS_KILLED = "connections cut (CLIENT KILL)"
    DISK_FILLED = "disk of Redis full"


PER_MINUTE = {
    Kind.WORKER_KILLED: 2.4,
    Kind.WORKER_PAUSED: 0.6,
    Kind.WORKER_STOPPED: 0.3,
    Kind.WORKER_CUT_OFF: 0.4,
    Kind.API_KILLED: 0.7,
    Kind.REDIS_KILLED: 0.5,
    Kind.CLIENTS_KILLED: 0.8,
    Kind.DISK_FILLED: 0.15,
}
"""How often each comes in the mean; each comes once at least."""

LONGEST_S = 8.0
"""No fault lasts for longer: after as much quiet, what was broken is whole or about to be."""

PATIENCE_S = LONGEST_S + 2
"""What is not there to be hit comes back within so long, or this strike is wasted."""
_RETRY_S = 0.05
_CANNOT_WRITE = 1
"""Exit status of a Valkey that cannot write."""
_BACK_S = 2.0
"""A Valkey that could not write may be ending for so long after there is room again."""


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault.

    Attributes:
        at_s: since the schedule's start.
        target: number of the worker or API process, where that means something.
        lasts_s: how long it is before it is mended, where there is anything to mend.
    """

    at_s: float
    kind: Kind
    target: int
    lasts_s: float


def schedule(seed: int, minutes: float, kinds: Iterable[Kind] = tuple(Kind)) -> list[Strike]:
    """The strikes of a run: the same for the same arguments."""
    rng = random.Random(seed)
    deck = [kind for kind in kinds for _ in range(max(1, round(PER_MINUTE[kind] * minutes)))]
    rng.shuffle(deck)
    gap = minutes * 60 / len(deck)
    return [
        Strike(
            at_s=round((i + rng.uniform(0.1, 0.9)) * gap, 3),
            kind=kind,
            target=rng.randrange(WORKERS),
            # Below a lease and above it: both have to be borne.
            lasts_s=round(rng.choice((rng.uniform(0.2, LEASE_S), rng.uniform(LEASE_S, LONGEST_S))), 3),
        )
        for i, kind in enumerate(deck)
    ]


class Switch:
    """What several strikes may hold down at a time: it goes up with the last of them."""

    def __init__(self, down: Callable[[], bool], up: Callable[[], object]) -> None:
        self._down, self._up = down, up
        self._held = 0
        self._lock = threading.Lock()

    def hold(self) -> bool:
        """Press it down, again if it is down; whether there was something to press."""
        with self._lock:
            hit = self._down()
            self._held += hit
            return hit

    def release(self) -> None:
        """Take one hand off."""
        with self._lock:
            self._held -= 1
            if self._held == 0:
                self._up()


class Hand:
    """Strikes, and mends when it is time.

    Attributes:
        struck: the strikes that hit something.
    """

    def __init__(self, fleet: Fleet, recovery: Recovery, patience_s: float = PATIENCE_S) -> None:
        self.struck: Counter[Kind] = Counter()
        self._fleet = fleet
        self._recovery = recovery
        self._patience_s = patience_s
        self._menders: list[threading.Timer] = []
        self._pauses = [Switch(*_pause(worker)) for worker in fleet.workers]
        self._cuts = [Switch(*_cut(link)) for link in fleet.links]
        self._disk = Switch(*_fill(fleet.disk, fleet.valkey)) if fleet.disk is not None else None

    def play(self, strikes: Sequence[Strike]) -> None:
        """Strike by the clock; returns when the last has been mended."""
        started = time.monotonic()
        try:
            for strike in strikes:
                time.sleep(max(0.0, started + strike.at_s - time.monotonic()))
                self._strike_or_wait(strike)
            for mender in self._menders:
                mender.join()
        finally:
            for mender in self._menders:
                mender.cancel()

    def _strike_or_wait(self, strike: Strike) -> None:
        """Strike once there is something to hit: what an earlier fault took away comes back soon."""
        give_up_at = time.monotonic() + self._patience_s
        while not (hit := self._strike(strike)) and time.monotonic() < give_up_at:
            time.sleep(_RETRY_S)
        said = "" if hit else ": missed, there was nothing to hit"
        log.info("%s: number %d, %g s%s", strike.kind.value, strike.target, strike.lasts_s, said)
        self.struck[strike.kind] += hit

    def _strike(self, strike: Strike) -> bool:
        """Whether it hit."""
        fleet = self._fleet
        match strike.kind:
            case Kind.REDIS_KILLED:
                with self._recovery.watching(strike.kind) as watch:
                    watch.hit = fleet.valkey.kill(strike.lasts_s)
                return watch.hit
            case Kind.API_KILLED:
                return self._kill_api(strike)
            case Kind.CLIENTS_KILLED:
                return self._cut_connections()
            case Kind.DISK_FILLED:
                return self._fill_disk(strike)
            case _:
                with self._recovery.watching(strike.kind, strike.target) as watch:
                    watch.hit = self._strike_worker(strike)
                return watch.hit

    def _strike_worker(self, strike: Strike) -> bool:
        worker = self._fleet.workers[strike.target]
        match strike.kind:
            case Kind.WORKER_KILLED:  # in every third case with its launcher, so that nobody reports the death at once
                return worker.kill() if self.struck[strike.kind] % 3 == 2 else worker.kill_child()
            case Kind.WORKER_PAUSED:
                return self._hold(self._pauses[strike.target], strike)
            case Kind.WORKER_CUT_OFF:
                return worker.pid is not None and self._hold(self._cuts[strike.target], strike)
        # One that has only begun to start knows no SIGTERM yet.
        return self._fleet.card(strike.target) is not None and worker.signal(signal.SIGTERM)

    def _kill_api(self, strike: Strike) -> bool:
        """One of the processes, which their parent starts again; in every fourth case the parent too."""
        if self.struck[strike.kind] % 4 == 3:
            return self._fleet.api.kill()
        processes = self._fleet.api_processes()
        if not processes:
            return False
        try:
            processes[strike.target % len(processes)].kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def _cut_connections(self) -> bool:
        cut = 0
        for kind in ("normal", "pubsub"):
            with suppress(redis.RedisError):  # it may be away just now
                cut += self._fleet.redis.client_kill_filter(_type=kind, skipme=True)
        return cut > 0

    def _fill_disk(self, strike: Strike) -> bool:
        if self._disk is None:
            return False
        with self._recovery.watching(strike.kind) as watch:
            watch.hit = self._hold(self._disk, strike)
        return watch.hit

    def _hold(self, switch: Switch, strike: Strike) -> bool:
        hit = switch.hold()
        if hit:
            mender = threading.Timer(strike.lasts_s, switch.release)
            mender.daemon = True
            mender.start()
            self._menders.append(mender)
        return hit


def _pause(worker: Member) -> tuple[Callable[[], bool], Callable[[], object]]:
    return lambda: worker.signal(signal.SIGSTOP), lambda: worker.signal(signal.SIGCONT)


def _cut(link: Link) -> tuple[Callable[[], bool], Callable[[], object]]:
    def cut() -> bool:
        link.cut()
        return True

    return cut, link.mend


def _fill(disk: Disk, valkey: Member) -> tuple[Callable[[], bool], Callable[[], object]]:
    """While there is no room, Valkey ends itself: it cannot write what it has promised to keep."""

    def fill() -> bool:
        valkey.excuse(_CANNOT_WRITE, math.inf)
        return disk.fill()

    def free() -> None:
        disk.free()
        valkey.excuse(_CANNOT_WRITE, _BACK_S)

    return fill, free
