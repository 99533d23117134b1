"""The faults of a run: a schedule drawn from a seed, and the injector that carries it out."""

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
from tests.chaos.managed_process import ManagedProcess
from tests.chaos.network_faults import Link
from tests.chaos.recovery import Recovery
from tests.chaos.stack import LEASE_S, WORKERS, ChaosStack

log = logging.getLogger(__name__)


class FaultKind(StrEnum):
    """A kind of fault."""

    WORKER_KILLED = "worker killed (SIGKILL)"
    WORKER_PAUSED = "worker paused (SIGSTOP, SIGCONT)"
    WORKER_STOPPED = "worker stopped (SIGTERM)"
    WORKER_CUT_OFF = "worker cut off from Redis"
    API_KILLED = "API process killed (SIGKILL)"
    BACKGROUND_KILLED = "background process killed (SIGKILL)"
    REDIS_KILLED = "Redis killed (SIGKILL)"
    CLIENTS_KILLED = "connections cut (CLIENT KILL)"
    DISK_FILLED = "disk of Redis full"


PER_MINUTE = {
    FaultKind.WORKER_KILLED: 2.4,
    FaultKind.WORKER_PAUSED: 0.6,
    FaultKind.WORKER_STOPPED: 0.3,
    FaultKind.WORKER_CUT_OFF: 0.4,
    FaultKind.API_KILLED: 0.7,
    FaultKind.BACKGROUND_KILLED: 0.3,
    FaultKind.REDIS_KILLED: 0.5,
    FaultKind.CLIENTS_KILLED: 0.8,
    FaultKind.DISK_FILLED: 0.15,
}
"""Mean rate of each kind. Each occurs at least once."""

MAX_DURATION_S = 8.0
"""Maximum duration of a fault."""

RETRY_S = MAX_DURATION_S + 2
"""How long a fault is retried whose target is down because of an earlier fault."""
_POLL_S = 0.05
_CANNOT_WRITE = 1
"""Exit status of a Valkey that cannot write."""
_DISK_RECOVERY_S = 2.0
"""How long after the disk was freed Valkey may still exit."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A scheduled fault.

    Attributes:
        at_s: time since the start of the schedule.
        target: number of the worker or API process, for kinds with a target.
        duration_s: time until the fault is undone, for kinds that can be undone.
    """

    at_s: float
    kind: FaultKind
    target: int
    duration_s: float


def schedule(seed: int, minutes: float, kinds: Iterable[FaultKind] = tuple(FaultKind)) -> list[Fault]:
    """Draw the faults of a run. The same arguments give the same schedule."""
    rng = random.Random(seed)
    drawn = [kind for kind in kinds for _ in range(max(1, round(PER_MINUTE[kind] * minutes)))]
    rng.shuffle(drawn)
    interval = minutes * 60 / len(drawn)
    return [
        Fault(
            at_s=round((i + rng.uniform(0.1, 0.9)) * interval, 3),
            kind=kind,
            target=rng.randrange(WORKERS),
            # Half of them shorter than a lease, half longer.
            duration_s=round(rng.choice((rng.uniform(0.2, LEASE_S), rng.uniform(LEASE_S, MAX_DURATION_S))), 3),
        )
        for i, kind in enumerate(drawn)
    ]


class SharedEffect:
    """An effect that overlapping faults share: it is undone when the last of them ends."""

    def __init__(self, apply: Callable[[], bool], undo: Callable[[], object]) -> None:
        self._apply, self._undo = apply, undo
        self._holders = 0
        self._lock = threading.Lock()

    def acquire(self) -> bool:
        """Apply the effect, also if it is already applied; return whether it had a target."""
        with self._lock:
            hit = self._apply()
            self._holders += hit
            return hit

    def release(self) -> None:
        """End one fault; undo the effect if it was the last one."""
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._undo()


class FaultInjector:
    """Carries out a schedule and undoes each fault when its duration is over.

    Attributes:
        injected: number of faults by kind that hit a target.
    """

    def __init__(
        self, stack: ChaosStack, recovery: Recovery, retry_s: float = RETRY_S, *, api_parent: bool = True
    ) -> None:
        """Create an injector.

        Args:
            retry_s: how long a fault is retried whose target is down.
            api_parent: whether every fourth death of an API process includes the parent, and with it all others.
        """
        self.injected: Counter[FaultKind] = Counter()
        self._stack = stack
        self._recovery = recovery
        self._retry_s = retry_s
        self._api_parent = api_parent
        self._timers: list[threading.Timer] = []
        self._pauses = [SharedEffect(*_pause(worker)) for worker in stack.workers]
        self._cuts = [SharedEffect(*_cut(link)) for link in stack.links]
        self._disk = SharedEffect(*_fill(stack.disk, stack.valkey)) if stack.disk is not None else None

    def run(self, faults: Sequence[Fault]) -> None:
        """Inject the faults at their times; return when the last one is undone."""
        started = time.monotonic()
        try:
            for fault in faults:
                time.sleep(max(0.0, started + fault.at_s - time.monotonic()))
                self._inject_or_retry(fault)
            for timer in self._timers:
                timer.join()
        finally:
            for timer in self._timers:
                timer.cancel()

    def _inject_or_retry(self, fault: Fault) -> None:
        """Inject a fault. If its target is down because of an earlier fault, retry until it is back."""
        deadline = time.monotonic() + self._retry_s
        while not (hit := self._inject(fault)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        outcome = "" if hit else ": skipped, the target was not running"
        log.info("%s: number %d, %g s%s", fault.kind.value, fault.target, fault.duration_s, outcome)
        self.injected[fault.kind] += hit

    def _inject(self, fault: Fault) -> bool:
        """Inject a fault; return whether it hit its target."""
        stack = self._stack
        match fault.kind:
            case FaultKind.REDIS_KILLED:
                with self._recovery.measuring(fault.kind) as measurement:
                    measurement.hit = stack.valkey.kill(fault.duration_s)
                return measurement.hit
            case FaultKind.API_KILLED:
                return self._kill_api(fault)
            case FaultKind.BACKGROUND_KILLED:
                return stack.background.kill()
            case FaultKind.CLIENTS_KILLED:
                return self._cut_connections()
            case FaultKind.DISK_FILLED:
                return self._fill_disk(fault)
            case _:
                with self._recovery.measuring(fault.kind, fault.target) as measurement:
                    measurement.hit = self._inject_into_worker(fault)
                return measurement.hit

    def _inject_into_worker(self, fault: Fault) -> bool:
        worker = self._stack.workers[fault.target]
        match fault.kind:
            case FaultKind.WORKER_KILLED:  # every third time with its launcher, so that the death is not reported
                return worker.kill() if self.injected[fault.kind] % 3 == 2 else worker.kill_child()
            case FaultKind.WORKER_PAUSED:
                return self._apply(self._pauses[fault.target], fault)
            case FaultKind.WORKER_CUT_OFF:
                return worker.pid is not None and self._apply(self._cuts[fault.target], fault)
        # A worker handles SIGTERM only after its imports.
        return self._stack.worker_info(fault.target) is not None and worker.signal(signal.SIGTERM)

    def _kill_api(self, fault: Fault) -> bool:
        """Kill an API process, which its parent restarts; every fourth time the parent too."""
        if self._api_parent and self.injected[fault.kind] % 4 == 3:
            return self._stack.api.kill()
        processes = self._stack.api_processes()
        if not processes:
            return False
        try:
            processes[fault.target % len(processes)].kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def _cut_connections(self) -> bool:
        cut = 0
        for kind in ("normal", "pubsub"):
            with suppress(redis.RedisError):  # Redis may be down
                cut += self._stack.redis.client_kill_filter(_type=kind, skipme=True)
        return cut > 0

    def _fill_disk(self, fault: Fault) -> bool:
        if self._disk is None:
            return False
        with self._recovery.measuring(fault.kind) as measurement:
            measurement.hit = self._apply(self._disk, fault)
        return measurement.hit

    def _apply(self, effect: SharedEffect, fault: Fault) -> bool:
        hit = effect.acquire()
        if hit:
            timer = threading.Timer(fault.duration_s, effect.release)
            timer.daemon = True
            timer.start()
            self._timers.append(timer)
        return hit


def _pause(worker: ManagedProcess) -> tuple[Callable[[], bool], Callable[[], object]]:
    return lambda: worker.signal(signal.SIGSTOP), lambda: worker.signal(signal.SIGCONT)


def _cut(link: Link) -> tuple[Callable[[], bool], Callable[[], object]]:
    def cut() -> bool:
        link.cut()
        return True

    return cut, link.restore


def _fill(disk: Disk, valkey: ManagedProcess) -> tuple[Callable[[], bool], Callable[[], object]]:
    """Return functions that fill and free the disk. Valkey may exit meanwhile: it cannot write what it acknowledged."""

    def fill() -> bool:
        valkey.allow_exit(_CANNOT_WRITE, math.inf)
        return disk.fill()

    def free() -> None:
        disk.free()
        valkey.allow_exit(_CANNOT_WRITE, _DISK_RECOVERY_S)

    return fill, free
