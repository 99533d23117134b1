"""What must be gone once every job has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator

from scripts.commands.chaosing.checks import Ledger
from scripts.commands.chaosing.fleet import WORKERS, Fleet
from shared.queue import keys
from shared.queue.wakeups import own_queue, queue_name

_SETTLE_S = 20.0
"""A ticket too many is taken and dropped, a lapsed lease reaped: that takes a moment."""


def leaks(fleet: Fleet, ledger: Ledger) -> list[str]:
    """What is left behind, a line each, when it does not go away by itself."""
    give_up_at = time.monotonic() + _SETTLE_S
    while (found := list(_now(fleet, ledger))) and time.monotonic() < give_up_at:
        time.sleep(0.2)
    return found


def _now(fleet: Fleet, ledger: Ledger) -> Iterator[str]:
    store, cards = fleet.redis, fleet.ready()
    for pattern in (keys.QUEUE, keys.RUNNING, keys.CLOCK, keys.TIMERS):
        yield from (f"key {name}" for name in store.scan_iter(pattern + "*"))
    leases = set(store.zrange(keys.LEASES, 0, -1))
    if leases != {card.id for card in cards} or len(leases) != WORKERS:
        yield f"leases {sorted(leases)}, workers {[card.id for card in cards]}"
    for card in cards:
        if card.slots_used or card.stats["publisher_backlog"]:
            yield f"worker {card.id} has {card.slots_used} slots taken, {card.stats['publisher_backlog']:g} unsaid"
    model = fleet.settings.model_id
    queues = [queue_name(model), *(own_queue(model, card.node).name for card in cards)]
    if tickets := sum(map(store.llen, queues)):
        yield f"{tickets} tickets"
    recorded = {name.removeprefix(keys.JOB) for name in store.scan_iter(keys.JOB + "*")}
    if extra := recorded - set(ledger.accepted.values()):
        yield f"{len(extra)} jobs that nobody submitted, such as {min(extra)}"
    if missing := set(ledger.accepted.values()) - recorded:
        yield f"{len(missing)} accepted jobs without a record, such as {min(missing)}"
