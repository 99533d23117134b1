"""Samples of every process and of Redis, taken at an interval."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Self

import psutil
import redis

from shared.redis import keys
from shared.redis.client import Redis
from tests.chaos.leaks import ENDED_JOBS, PERMANENT, UNFINISHED
from tests.chaos.managed_process import ManagedProcess
from tests.chaos.stack import ChaosStack

log = logging.getLogger(__name__)

_PATTERNS: Final = sorted((*ENDED_JOBS, *PERMANENT, *UNFINISHED), key=len, reverse=True)
KEPT: Final = (keys.WEBHOOK, keys.BATCH)
"""Records that outlast the run by design: deliveries are kept for a day, batches as long as their files."""
CLIENTS: Final = "clients"
"""Role of this process. Its memory grows, because it keeps all results until the end."""
_MEASURED_RECORDS: Final = 20
"""Records of a kind whose size is measured; the others are taken to have the same mean."""


@dataclass(frozen=True, slots=True, order=True)
class Instance:
    """One process from its start to its end.

    Attributes:
        role: what it does; a process that replaces another one has the same.
    """

    role: str
    started_at: float
    pid: int


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """The resources of a process at a time.

    Attributes:
        at_s: seconds since the start of the run.
        cpu_s: CPU time that the process has used so far.
    """

    at_s: float
    rss_mb: float
    descriptors: int
    threads: int
    cpu_s: float


@dataclass(frozen=True, slots=True)
class RedisSample:
    """What Redis holds at a time.

    Attributes:
        used_mb: its memory (`used_memory`).
        kept_mb: the part of it that `KEPT` records occupy.
        counts: number of keys by pattern.
    """

    at_s: float
    used_mb: float
    kept_mb: float
    counts: dict[str, int]


@dataclass(slots=True)
class Samples:
    """All samples of a run.

    Attributes:
        jobs: ids of all jobs that were seen in Redis; True for those of batches, which are deleted early.
    """

    started: float = field(default_factory=time.monotonic)
    processes: dict[Instance, list[ProcessSample]] = field(default_factory=dict)
    redis: list[RedisSample] = field(default_factory=list)
    jobs: dict[str, bool] = field(default_factory=dict)

    def now(self) -> float:
        """Seconds since the start of the run."""
        return time.monotonic() - self.started

    def of_stack(self) -> list[tuple[Instance, list[ProcessSample]]]:
        """Return the samples of all processes but this one."""
        return sorted((each, taken) for each, taken in self.processes.items() if each.role != CLIENTS)

    def cores(self, from_s: float, to_s: float) -> float:
        """Return the mean number of cores that the stack and its clients used between two times."""
        within = [[each for each in taken if from_s <= each.at_s <= to_s] for taken in self.processes.values()]
        return sum(taken[-1].cpu_s - taken[0].cpu_s for taken in within if taken) / max(to_s - from_s, 1.0)


class Sampler:
    """Takes samples in a thread while the `with` block runs."""

    def __init__(self, stack: ChaosStack, interval_s: float) -> None:
        self.samples = Samples()
        self._stack = stack
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            started = time.monotonic()
            self.take()
            self._ended.wait(max(0.0, started + self._interval_s - time.monotonic()))

    def take(self) -> None:
        """Take one sample of everything that is running."""
        at_s = self.samples.now()
        for instance, sample in process_samples(self._stack, at_s):
            self.samples.processes.setdefault(instance, []).append(sample)
        try:
            self.samples.redis.append(self._redis_sample(at_s))
        except redis.RedisError as error:
            log.info("Redis was not sampled: %s", error)

    def _redis_sample(self, at_s: float) -> RedisSample:
        store, counts, kept = self._stack.redis, Counter[str](), dict[str, list[str]]()
        jobs: list[str] = []
        for name in store.scan_iter(count=1000):
            pattern = pattern_of(name)
            counts[pattern] += 1
            if pattern == keys.JOB:
                jobs.append(name.removeprefix(keys.JOB))
            if pattern in KEPT:
                kept.setdefault(pattern, []).append(name)
        self._remember(job for job in jobs if job not in self.samples.jobs)
        kept_bytes = sum(len(names) * _mean_bytes(store, names) for names in kept.values())
        return RedisSample(at_s, float(store.info("memory")["used_memory"]) / 1e6, kept_bytes / 1e6, dict(counts))

    def _remember(self, new: Iterable[str]) -> None:
        for job in new:
            key = self._stack.redis.hget(keys.JOB + job, "idempotency_key")
            self.samples.jobs[job] = " " in (key or "")  # only the keys of batches contain a space


def pattern_of(name: str) -> str:
    """Return the constant in `shared.redis.keys` that a key begins with; for other keys, the whole name."""
    return next((pattern for pattern in _PATTERNS if name.startswith(pattern)), name)


def _mean_bytes(store: Redis, names: list[str]) -> float:
    measured = names[:: -(-len(names) // _MEASURED_RECORDS)]
    return sum(store.memory_usage(name) or 0 for name in measured) / len(measured)


def process_samples(stack: ChaosStack, at_s: float) -> Iterator[tuple[Instance, ProcessSample]]:
    """Generate a sample of every process of the stack, and of this process, which runs the clients."""
    families = [_family(managed) for managed in stack.all_processes]
    for family in (*families, [(CLIENTS, psutil.Process())]):
        for role, process in family:
            try:
                with process.oneshot():
                    instance = Instance(role, process.create_time(), process.pid)
                    memory, threads = process.memory_info().rss / 1e6, process.num_threads()
                    cpu_s = sum(process.cpu_times()[:2])
                yield instance, ProcessSample(at_s, memory, process.num_fds(), threads, cpu_s)
            except psutil.Error:  # it has just ended
                continue


def _family(managed: ManagedProcess) -> Iterator[tuple[str, psutil.Process]]:
    """Generate a process and its descendants with their roles. Helper processes are the children of the children."""
    try:
        root = psutil.Process(managed.pid) if managed.pid is not None else None
        children = sorted(root.children(), key=lambda child: child.create_time()) if root else []
    except psutil.Error:
        return
    if root is None:
        return
    parent = f"{managed.name} parent" if children and managed.name != "background" else managed.name
    yield parent, root
    for child in children:
        yield (f"{managed.name} helper" if parent == managed.name else managed.name), child
        try:
            for helper in child.children(recursive=True):
                yield f"{managed.name} helper", helper
        except psutil.Error:
            continue
