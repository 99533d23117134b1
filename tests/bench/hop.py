"""From accepted to inserted in the engine: what the queue costs a job when nobody is before it."""

from __future__ import annotations

import json
import statistics
import urllib.request
from pathlib import Path

from tests.bench.contenders import own_stack
from tests.bench.endpoints import Own
from tests.bench.samples import quantile

JOBS = 100


def _queue_s(endpoint: Own) -> float:
    body = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(
        f"{endpoint.url}/inference", json.dumps(body).encode(), {**endpoint.headers, "Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return float(json.load(answer)["timings"]["queue_s"])


def queue_hop(model: Path) -> dict[str, float]:
    """`timings.queue_s` of jobs sent one after another, in milliseconds."""
    with own_stack(model, 32) as served:
        for _ in range(10):
            _queue_s(served.endpoint)
        waits = [_queue_s(served.endpoint) * 1000 for _ in range(JOBS)]
    return {"jobs": JOBS, "p50_ms": statistics.median(waits), "p99_ms": quantile(waits, 0.99)}
