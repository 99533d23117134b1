"""Whether webhooks slow the engine: its step time without and while events are delivered to bad receivers, in turns.

    python -m tests.bench.webhook_load --events 1000 --rounds 5

The fake model generates timestamps, so step times are measured in the worker. A third of the receivers fail half of the
time, a third hang, and a third are gone.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Final

from shared.redis import keys
from tests.bench.batch_latency import FAKE, batch_stack
from tests.bench.samples import quantile
from tests.plugins.stack import Stack
from tests.support.receivers import Receiver, unused_url
from worker.runner.fake import CLOCK_LAP, TICKS_PER_S

ROWS: Final = 8
TOKENS: Final = 300
PAUSE_S: Final = 0.01
HANGING: Final = 4
"""Hanging receivers, of which each gets at most 8 requests at a time."""
_TICKS: Final = re.compile(r"@(\d+);")


def step_times(stack: Stack) -> list[float]:
    """Run some rows; return the durations of the engine's steps in seconds."""
    with stack.client() as client:
        body = {"prompt": f"!clock=1 !pause={PAUSE_S}", "max_tokens": TOKENS, "raw": True}
        jobs = [client.request("POST", "/v1/jobs", json=body).json()["urls"]["self"] for _ in range(ROWS)]
        for job in jobs:
            while (ended := client.request("GET", f"{job}?wait=30").json())["status"] in ("queued", "running"):
                pass
    ticks = [int(each) for each in _TICKS.findall(ended["output"]["text"])]
    return [(later - earlier) % CLOCK_LAP / TICKS_PER_S for earlier, later in pairwise(ticks)]


@contextmanager
def bad_receivers() -> Iterator[list[str]]:
    """Yield the URLs of receivers that fail half of the time, hang, or are gone."""
    with ExitStack() as stack:
        flaky = [stack.enter_context(Receiver(lambda number, _: 200 if number % 2 else 500)) for _ in range(HANGING)]
        hanging = [stack.enter_context(Receiver(lambda *_: None)) for _ in range(HANGING)]
        yield [url for each in zip(flaky, hanging, strict=True) for url in (*(one.url for one in each), unused_url())]


def add_events(stack: Stack, urls: Sequence[str], count: int) -> None:
    """Put events of ended jobs into the outbox."""
    events = [
        json.dumps(
            {
                "kind": "job.succeeded",
                "id": f"job_{number}",
                "owner": "tests",
                "at": f"{time.time():.6f}",
                "hook": json.dumps({"url": urls[number % len(urls)], "events": ["job.succeeded"]}),
            }
        )
        for number in range(count)
    ]
    stack.redis.rpush(keys.WEBHOOK_OUTBOX, *events)


def forget_deliveries(stack: Stack) -> int:
    """End the deliveries that wait; return how many attempts there were so far."""
    stack.redis.delete(keys.WEBHOOK_OUTBOX, keys.WEBHOOKS_DUE)
    counts = stack.redis.hgetall(keys.WEBHOOK_COUNTS)
    return sum(int(counts.get(outcome, 0)) for outcome in ("delivered", "failed", "dead"))


def measure(events: int, rounds: int) -> list[tuple[list[float], list[float], int]]:
    """Return, for each round, the step times without and with deliveries, and the number of attempts meanwhile."""
    variables = {"WEBHOOK_NETWORKS": "127.0.0.1/32", "WEBHOOK_TIMEOUT_S": "2", "WEBHOOK_BACKOFF_S": "0.5"}
    found = []
    with batch_stack(FAKE, **variables) as stack, bad_receivers() as urls:
        step_times(stack)
        for _ in range(rounds):
            quiet, before = step_times(stack), forget_deliveries(stack)
            add_events(stack, urls, events)
            busy = step_times(stack)
            found.append((quiet, busy, forget_deliveries(stack) - before))
    return found


def main() -> int:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    threading.stack_size(256 * 1024)  # a hanging receiver has a thread for each request
    rounds = measure(options.events, options.rounds)
    for name, share in (("median", 0.5), ("p99", 0.99)):
        pairs = [(quantile(quiet, share), quantile(busy, share)) for quiet, busy, _ in rounds]
        print(f"{name} of the step time, ms: {[tuple(round(each * 1e3, 2) for each in pair) for pair in pairs]}")
        print(f"  ratio: {statistics.median(busy / quiet for quiet, busy in pairs):.3f} (median of the rounds)")
    print(f"attempts meanwhile: {[attempts for _, _, attempts in rounds]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
