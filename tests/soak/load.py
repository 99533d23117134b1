"""Load: as many sessions as a number of clients can run, or sessions at a given rate."""

from __future__ import annotations

import argparse
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from tests.soak.clients import Sessions
from tests.soak.sampler import Samples

CLIENTS: Final = 24
"""Clients that measure the capacity, and keep the service busy all the time."""
MAX_SESSIONS: Final = 64
"""Sessions that may run at once under the steady load: the faults delay some, and others start meanwhile."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the service can do without faults.

    Attributes:
        per_s: sessions that ended per second.
        cores: mean number of cores that the stack and its clients used.
    """

    per_s: float
    cores: float


def capacity(sessions: Sessions, samples: Samples, options: argparse.Namespace) -> Capacity:
    """Measure how many sessions per second end while each of `CLIENTS` clients runs one after the other."""
    stop, seconds = threading.Event(), options.capacity_s

    def run(number: int) -> None:
        rng = random.Random(f"{options.seed}/capacity/{number}")
        while not stop.is_set():
            sessions.run_one(rng)

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(run, number) for number in range(CLIENTS)]
        try:
            stop.wait(seconds / 4)  # the caches fill
            before, started = sessions.ended.total(), time.monotonic()
            began_s = samples.now()
            stop.wait(seconds)
            per_s = (sessions.ended.total() - before) / (time.monotonic() - started)
        finally:
            stop.set()
        for each in running:
            each.result()
    return Capacity(per_s, samples.cores(began_s, samples.now()))


@dataclass(slots=True)
class Load:
    """Starts sessions at random times with a mean rate, whether or not earlier ones have ended.

    Attributes:
        started: number of sessions that were started.
        skipped: number of sessions that were not started, because `MAX_SESSIONS` were running.
    """

    sessions: Sessions
    per_s: float
    seed: int
    started: int = 0
    skipped: int = 0

    def run(self, until: threading.Event) -> None:
        """Start sessions until the event is set, and wait for their ends."""
        rng, free = random.Random(f"{self.seed}/load"), threading.Semaphore(MAX_SESSIONS)
        next_at = time.monotonic()
        with ThreadPoolExecutor(MAX_SESSIONS) as pool:
            while not until.wait(max(0.0, next_at - time.monotonic())):
                next_at += rng.expovariate(self.per_s)
                if not free.acquire(blocking=False):
                    self.skipped += 1
                    continue
                self.started += 1
                pool.submit(self._run_one, random.Random(rng.getrandbits(64)), free)

    def _run_one(self, rng: random.Random, free: threading.Semaphore) -> None:
        try:
            self.sessions.run_one(rng)
        finally:
            free.release()
