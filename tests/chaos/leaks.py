"""Checks that nothing is left in Redis once every job has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from shared.jobs.record import Status
from shared.redis import keys
from shared.redis.client import Redis
from tests.chaos.checks import Outcomes
from tests.chaos.stack import WORKERS, ChaosStack

_SETTLE_S = 20.0
"""Maximum time until expired leases are reaped and ends are reported."""

UNFINISHED = (
    keys.QUEUE,
    keys.QUEUED,
    keys.TURNS,
    keys.PARKED,
    keys.PARKED_COUNTS,
    keys.WAKE,
    keys.RUNNING,
    keys.RESERVED,
    keys.TIMERS,
    keys.IMAGES,
    keys.ENDS,
    keys.DEMAND,
    keys.OLD_QUEUE,
    keys.OLD_TOKENIZER,
    keys.UNFINISHED_BATCHES,
    keys.UNANSWERED,
    keys.UNARCHIVED,
    keys.PURGES,
    keys.WEBHOOK_OUTBOX,
    keys.WEBHOOKS_DUE,
)
"""Keys of unfinished jobs and of earlier versions: none may be left."""
ENDED_JOBS = (
    keys.JOB,
    keys.REQUEST,
    keys.OUTPUT,
    keys.LOG,
    keys.IDEM,
    keys.OWNER,
    keys.BATCH,
    keys.RESPONSE,
    keys.RESPONSES,
    keys.WEBHOOK,
    keys.USAGE,
    keys.CHARGES,
    keys.SESSION,
)
"""Keys of ended jobs, usage and sessions: each must have a time to live."""
PERMANENT = (
    keys.SPEED,
    keys.FAILED,
    keys.MAX_RUNNING,
    keys.BYTES,
    keys.MEMORY,
    keys.LEASES,
    keys.EXTENSIONS,
    keys.PASSED,
    keys.PREFIXES,
    keys.ROUTED,
    keys.WORKER,
    keys.WORKERS,
    keys.HOST,
    keys.HOSTS,
    keys.OPERATION,
    keys.OPERATIONS,
    keys.MODELS,
    keys.ADDED_MODELS,
    keys.ALIASES,
    keys.TOKENIZER,
    keys.ENDED,
    keys.ATTEMPTS,
    keys.TOKENS,
    keys.SHOWN_KEYS,
    keys.SERVABLE,
    keys.LOAD_FAILURE,
    keys.LEADER,
    keys.BATCHES,
    keys.BATCH_COUNTS,
    keys.WEBHOOK_ENDPOINTS,
    keys.WEBHOOK_SECRETS,
    keys.WEBHOOK_COUNTS,
    keys.WEBHOOKS_DEAD,
    keys.SAMPLES,
    keys.ARCHIVE,
    keys.ERASED,
    keys.PREFIX_CUTOFFS,
    "_kombu.",
    "LIMITS",
)
"""Keys of workers and models, of Celery and of the rate limiter."""
_PERMANENT_BYTES = {"failed", "failed_limit", "archive"}


def find_leaks(stack: ChaosStack, outcomes: Outcomes) -> list[str]:
    """Return a line for each leak that does not disappear by itself."""
    return settled(lambda: [*unfinished_work(stack), *_unknown_jobs(stack.redis, outcomes)])


def settled(leaks: Callable[[], list[str]], within_s: float = _SETTLE_S) -> list[str]:
    """Call `leaks` until it finds none, or the time is over; return what it found last."""
    deadline = time.monotonic() + within_s
    while (found := leaks()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def unfinished_work(stack: ChaosStack) -> Iterator[str]:
    """Report, one line each, keys and slots of unfinished jobs, and keys that should expire but do not."""
    store, workers = stack.redis, stack.ready_workers()
    yield from _check_keys(stack)
    leases = set(store.zrange(keys.LEASES, 0, -1))
    if leases != {worker.id for worker in workers} or len(leases) != WORKERS:
        yield f"leases {sorted(leases)}, workers {[worker.id for worker in workers]}"
    for worker in workers:
        if worker.slots_used or worker.stats["publisher_backlog"]:
            backlog = worker.stats["publisher_backlog"]
            yield f"worker {worker.id} has {worker.slots_used} slots in use, {backlog:g} unpublished events"
    if held := set(store.hkeys(keys.BYTES)) - _PERMANENT_BYTES:
        yield f"bytes of unfinished jobs: {sorted(held)}"


def _unknown_jobs(store: Redis, outcomes: Outcomes) -> Iterator[str]:
    """Compare the records with the jobs that clients submitted."""
    recorded = {name.removeprefix(keys.JOB) for name in store.scan_iter(keys.JOB + "*")}
    if extra := recorded - set(outcomes.accepted.values()):
        yield f"{len(extra)} jobs that no client submitted, such as {min(extra)}"
    if missing := set(outcomes.accepted.values()) - recorded:
        yield f"{len(missing)} accepted jobs without a record, such as {min(missing)}"


def _check_keys(stack: ChaosStack) -> Iterator[str]:
    """Check that every key belongs to an ended job, a worker or a model."""
    store = stack.redis
    for name in store.scan_iter(count=1000):
        if name.startswith(ENDED_JOBS):
            if store.ttl(name) == -1:
                yield f"key {name} has no time to live"
            if name.startswith(keys.REQUEST):
                yield from _check_request(store, name)
        elif name.startswith(UNFINISHED) or not name.startswith(PERMANENT):
            yield f"key {name}"


def _check_request(store: Redis, name: str) -> Iterator[str]:
    """Check that only failed jobs keep their request."""
    if store.hget(keys.JOB + name.removeprefix(keys.REQUEST), "status") != Status.FAILED:
        yield f"key {name} belongs to a job that did not fail"
