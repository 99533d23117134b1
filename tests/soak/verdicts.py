"""What a soak found: whether memory, descriptors, threads and keys stay flat, and whether every job ended once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from shared.redis import keys
from tests.chaos.stack import ChaosStack
from tests.soak.fit import Fit, Limit, fit
from tests.soak.sampler import Instance, ProcessSample, Samples

WARM_UP_S: Final = 600.0
"""Age at which a process counts as warm: its caches and its connection pools are full."""
MIN_SPAN_S: Final = 900.0
"""Shortest span of samples that gives a verdict."""
LIMITS: Final = {
    "rss_mb": Limit(amount=10.0, share=0.03),
    "descriptors": Limit(amount=16.0),
    "threads": Limit(amount=3.0),
}
"""Largest growth per hour of a process. An interpreter's heap of 100 MB varies by some MB with the load. A pool of
connections grows in steps, when more of them are used at once than ever before, and does not shrink. A descriptor that
is lost with each fault would be more: a surviving process experiences about 25 faults in an hour."""
_SERVER: Final = "valkey"
_CONNECTIONS: Final = Limit(amount=512.0)
"""For the descriptors of the server: they are the connections of its clients, which are judged there."""
REDIS_LIMIT: Final = Limit(amount=5.0, share=0.03)
IDLE_SLACK: Final = {"descriptors": 16, "threads": 4}
"""How many more of them a process may have after the run than its predecessor before it, both of them idle."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The fits of one process.

    Attributes:
        lived_s: its age at its last sample.
        last: its last sample.
    """

    instance: Instance
    lived_s: float
    last: ProcessSample
    fits: dict[str, Fit]


@dataclass(frozen=True, slots=True)
class Findings:
    """The fits of all processes that lived long enough, and of Redis's memory."""

    processes: list[Verdict]
    redis: Fit | None

    def growth(self) -> Iterator[str]:
        """Generate a line for each quantity that is not flat."""
        for verdict in self.processes:
            for name, each in verdict.fits.items():
                if not each.flat:
                    yield f"{verdict.instance.role} (pid {verdict.instance.pid}): {name} {_growth(each)}"
        if self.redis is not None and not self.redis.flat:
            yield f"Redis: used_mb {_growth(self.redis)}"


def judge(samples: Samples, began_s: float, minutes: float) -> Findings:
    """Fit all samples from the end of the warm-up, which begins with the load or with the process."""
    warm_up_s = min(WARM_UP_S, minutes * 60 / 4)
    ended_s = began_s + minutes * 60
    redis = [(each.at_s, each.used_mb - each.kept_mb) for each in samples.redis
             if began_s + warm_up_s <= each.at_s <= ended_s]  # fmt: skip
    return Findings(
        [
            Verdict(instance, taken[-1].at_s - taken[0].at_s, taken[-1], fits)
            for instance, taken in samples.of_stack()
            if (fits := _fits(instance.role, _warm(taken, max(began_s, taken[0].at_s) + warm_up_s, ended_s)))
        ],
        fit(redis, REDIS_LIMIT, MIN_SPAN_S),
    )


def _warm(taken: list[ProcessSample], from_s: float, to_s: float) -> list[ProcessSample]:
    return [each for each in taken if from_s <= each.at_s <= to_s]


def _fits(role: str, taken: list[ProcessSample]) -> dict[str, Fit]:
    limits = {**LIMITS, "descriptors": _CONNECTIONS} if role == _SERVER else LIMITS
    found = {
        name: fit([(each.at_s, float(getattr(each, name))) for each in taken], limit, MIN_SPAN_S)
        for name, limit in limits.items()
    }
    return {name: each for name, each in found.items() if each is not None}


def _growth(found: Fit) -> str:
    return f"grows by {found.per_hour:.1f} per hour from about {found.level:.1f}, allowed {found.limit:.1f}"


Levels = dict[str, ProcessSample]
"""The largest idle levels by role."""


def idle_levels(take: Callable[[], Iterator[tuple[Instance, ProcessSample]]]) -> Levels:
    """Return the sample with most descriptors of each role."""
    levels: Levels = {}
    for instance, sample in take():
        if instance.role not in levels or sample.descriptors > levels[instance.role].descriptors:
            levels[instance.role] = sample
    return levels


def left_open(before: Levels, after: Levels) -> Iterator[str]:
    """Generate a line for each role that has more descriptors or threads when idle than before the run."""
    for role, sample in sorted(after.items()):
        if role not in before or role == _SERVER:
            continue
        for name, slack in IDLE_SLACK.items():
            was, now = getattr(before[role], name), getattr(sample, name)
            if now > was + slack:
                yield f"{role}: {now} {name} when idle, {was} before the run"


@dataclass(frozen=True, slots=True)
class JobCount:
    """The jobs of a run.

    Attributes:
        seen: jobs that were seen in Redis, without those of batches.
        batch_lines: lines of batches that have a result.
        ended: ends that Redis counted, of all jobs.
    """

    seen: int
    batch_lines: int
    ended: int

    @property
    def once_each(self) -> bool:
        """Whether there were as many ends as jobs."""
        return self.ended == self.seen + self.batch_lines


def count_jobs(stack: ChaosStack, samples: Samples) -> JobCount:
    """Count the jobs and their ends. Records must be sampled more often than they expire."""
    counts = stack.redis.hgetall(keys.BATCH_COUNTS)
    lines = sum(int(counts.get(name, 0)) for name in ("lines_completed", "lines_failed"))
    ended = sum(int(count) for count in stack.redis.hgetall(keys.ENDED).values())
    return JobCount(sum(not of_batch for of_batch in samples.jobs.values()), lines, ended)


def unexpired(stack: ChaosStack) -> list[str]:
    """Return a line for each key of a job that is left although its retention is over."""
    patterns = (keys.JOB, keys.REQUEST, keys.OUTPUT, keys.LOG, keys.IDEM, keys.OWNER, keys.IMAGES)
    left = (name for name in stack.redis.scan_iter(count=1000) if name.startswith(patterns))
    return [f"key {name} has not expired" for name in left]
