"""What breaks and when: a schedule drawn from a seed, and the hands that do it."""

from __future__ import annotations

import logging
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

from scripts.commands.chaosing.fleet import LEASE_S, WORKERS, Fleet
from scripts.commands.chaosing.recovery import Recovery

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


class Hand:
    """Strikes, and mends when it is time."""

    def __init__(self, fleet: Fleet, recovery: Recovery) -> None:
        self.struck: Counter[Kind] = Counter()
        self._fleet = fleet
        self._recovery = recovery
        self._menders: list[threading.Timer] = []

    def play(self, strikes: Sequence[Strike]) -> None:
        """Strike by the clock; returns when the last has been mended."""
        started = time.monotonic()
        for strike in strikes:
            time.sleep(max(0.0, started + strike.at_s - time.monotonic()))
            log.info("%s: number %d, %g s", strike.kind.value, strike.target, strike.lasts_s)
            self._strike(strike)
            self.struck[strike.kind] += 1
        for mender in self._menders:
            mender.join()

    def _strike(self, strike: Strike) -> None:
        fleet = self._fleet
        match strike.kind:
            case Kind.REDIS_KILLED:
                with self._recovery.watching(strike.kind):
                    fleet.valkey.kill(strike.lasts_s)
            case Kind.API_KILLED:
                self._kill_api(strike)
            case Kind.CLIENTS_KILLED:
                self._cut_connections()
            case Kind.DISK_FILLED:
                self._fill_disk(strike)
            case _:
                with self._recovery.watching(strike.kind, strike.target):
                    self._strike_worker(strike)

    def _strike_worker(self, strike: Strike) -> None:
        worker, cable = self._fleet.workers[strike.target], self._fleet.cables[strike.target]
        match strike.kind:
            case Kind.WORKER_KILLED:
                worker.kill()
            case Kind.WORKER_STOPPED:
                worker.signal(signal.SIGTERM)
            case Kind.WORKER_PAUSED:
                worker.signal(signal.SIGSTOP)
                self._mend(strike, lambda: worker.signal(signal.SIGCONT))
            case Kind.WORKER_CUT_OFF:
                cable.cut()
                self._mend(strike, cable.mend)

    def _kill_api(self, strike: Strike) -> None:
        """One of the processes, which their parent starts again; in every fourth case the parent too."""
        processes = self._fleet.api_processes()
        if self.struck[strike.kind] % 4 == 3 or not processes:
            self._fleet.api.kill()
            return
        with suppress(psutil.NoSuchProcess):
            processes[strike.target % len(processes)].kill()

    def _cut_connections(self) -> None:
        for kind in ("normal", "pubsub"):
            with suppress(redis.RedisError):  # it may be away just now
                self._fleet.redis.client_kill_filter(_type=kind, skipme=True)

    def _fill_disk(self, strike: Strike) -> None:
        disk = self._fleet.disk
        if disk is not None:
            with self._recovery.watching(strike.kind):
                disk.fill()
            self._mend(strike, disk.free)

    def _mend(self, strike: Strike, mend: Callable[[], object]) -> None:
        mender = threading.Timer(strike.lasts_s, mend)
        mender.start()
        self._menders.append(mender)
