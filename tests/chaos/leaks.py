"""What must be gone once every job has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator

from shared.jobs.record import Status
from shared.redis import keys
from shared.redis.client import Redis
from tests.chaos.checks import Ledger
from tests.chaos.fleet import WORKERS, Fleet

_SETTLE_S = 20.0
"""A lapsed lease is reaped, an end reported: that takes a moment."""

_GONE = (
    keys.QUEUE,
    keys.TURNS,
    keys.WAKE,
    keys.RUNNING,
    keys.RESERVED,
    keys.TIMERS,
    keys.IMAGES,
    keys.ENDS,
    keys.DEMAND,
    keys.OLD_QUEUE,
)
"""Keys that only unfinished jobs have."""
_OF_A_JOB = (keys.JOB, keys.REQUEST, keys.OUTPUT, keys.LOG, keys.IDEM, keys.OWNER)
"""Keys of ended jobs: each must have a TTL."""
_KEPT = (
    keys.SPEED,
    keys.FAILED,
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
    keys.TOKENIZER,
    keys.ENDED,
    "_kombu.",
    "LIMITS",
)
"""Keys of workers and models, Celery's and the limiter's."""
_KEPT_BYTES = {"failed", "failed_limit"}


def leaks(fleet: Fleet, ledger: Ledger) -> list[str]:
    """What is left behind, a line each, when it does not go away by itself."""
    give_up_at = time.monotonic() + _SETTLE_S
    while (found := list(_now(fleet, ledger))) and time.monotonic() < give_up_at:
        time.sleep(0.2)
    return found


def _now(fleet: Fleet, ledger: Ledger) -> Iterator[str]:
    store, cards = fleet.redis, fleet.ready()
    yield from _keys(fleet)
    leases = set(store.zrange(keys.LEASES, 0, -1))
    if leases != {card.id for card in cards} or len(leases) != WORKERS:
        yield f"leases {sorted(leases)}, workers {[card.id for card in cards]}"
    for card in cards:
        if card.slots_used or card.stats["publisher_backlog"]:
            yield f"worker {card.id} has {card.slots_used} slots taken, {card.stats['publisher_backlog']:g} unsaid"
    if held := set(store.hkeys(keys.BYTES)) - _KEPT_BYTES:
        yield f"bytes of unfinished jobs: {sorted(held)}"
    recorded = {name.removeprefix(keys.JOB) for name in store.scan_iter(keys.JOB + "*")}
    if extra := recorded - set(ledger.accepted.values()):
        yield f"{len(extra)} jobs that nobody submitted, such as {min(extra)}"
    if missing := set(ledger.accepted.values()) - recorded:
        yield f"{len(missing)} accepted jobs without a record, such as {min(missing)}"


def _keys(fleet: Fleet) -> Iterator[str]:
    """Every key is one that ended jobs, workers or models have."""
    store = fleet.redis
    for name in store.scan_iter(count=1000):
        if name.startswith(_OF_A_JOB):
            if store.ttl(name) == -1:
                yield f"key {name} has no TTL"
            if name.startswith(keys.REQUEST):
                yield from _request(store, name)
        elif name.startswith(_GONE) or not name.startswith(_KEPT):
            yield f"key {name}"


def _request(store: Redis, name: str) -> Iterator[str]:
    """Only a failed job keeps its request."""
    if store.hget(keys.JOB + name.removeprefix(keys.REQUEST), "status") != Status.FAILED:
        yield f"key {name} of a job that did not fail"
