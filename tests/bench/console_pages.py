"""Measures how fast the console's pages answer with many finished jobs: `python -m tests.bench.console_pages`.

The jobs are written to Redis as they are after their end, of 20 API keys. One in a thousand has failed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Final

import httpx2

from shared.redis import keys
from shared.redis.client import Redis
from tests.plugins.web_stack import MODEL, WebStack, running_web
from tests.support.waiting import eventually
from web.access.sessions import COOKIE, Sessions

RUNS: Final = 15
_FAILED_EVERY: Final = 1000
_BLOCK: Final = 2000
PAGES: Final = {
    "overview": "/",
    "jobs": "/console/jobs",
    "jobs, failed": "/console/jobs?status=failed",
    "jobs, running": "/console/jobs?status=running",
    "jobs, of a key": "/console/jobs?key={key}",
    "jobs, metadata that one has": "/console/jobs?metadata=number%3D7",
    "jobs, no match": "/console/jobs?status=cancelled",
    "a job": "/console/jobs/{job}",
    "playground": "/console/playground",
    "models": "/console/models",
    "batches": "/console/batches",
    "webhooks": "/console/webhooks",
    "keys": "/console/keys",
    "usage": "/console/usage",
}


def record(number: int, owner: str, created_at: float) -> dict[str, str]:
    """Return the record of a job that has ended."""
    failed = number % _FAILED_EVERY == 0
    fields = {
        "id": job_id(number, created_at), "owner": owner, "model": MODEL, "class": str(number % 3), "worker": "",
        "status": "failed" if failed else "succeeded", "attempt": "1", "seq": "40", "request_id": f"{number:032x}",
        "metadata": f'{{"number": "{number}"}}', "created_at": f"{created_at:.6f}", "claimed_at": f"{created_at:.6f}",
        "started_at": f"{created_at + 0.5:.6f}", "finished_at": f"{created_at + 3:.6f}", "retention_s": "86400",
        "prompt_tokens": "120", "completion_tokens": "80", "queue_s": "0.5", "first_token_s": "0.8", "total_s": "3.0",
        "finish_reason": "stop", "sampling": "", "fingerprint": "", "idempotency_key": "", "request_bytes": "500",
    }  # fmt: skip
    return fields | ({"error_code": "generation_error", "error_message": "It failed."} if failed else {})


def job_id(number: int, created_at: float) -> str:
    """Return the id of a job."""
    return f"job_{int(created_at * 1e9):016x}{number:012x}"


def fill(client: Redis, owners: Sequence[str], count: int) -> str:
    """Write the jobs; return the id of one that succeeded."""
    newest = time.time()
    for start in range(0, count, _BLOCK):
        with client.pipeline(transaction=False) as pipe:
            for number in range(start, min(start + _BLOCK, count)):
                owner, created_at = owners[number % len(owners)], newest - number * 0.5
                fields = record(number, owner, created_at)
                pipe.hset(keys.JOB + fields["id"], mapping=fields)
                pipe.set(keys.OUTPUT + fields["id"], "An answer of eighty tokens. " * 12)
                pipe.zadd(keys.OWNER + owner, {fields["id"]: fields["created_at"]})
                if fields["status"] == "failed":
                    pipe.zadd(keys.FAILED, {f"{fields['id']} 500": newest + 86400})
                    pipe.hset(keys.REQUEST + fields["id"], "request", "{}")
            pipe.execute()
    return job_id(1, newest - 0.5)


def timings(stack: WebStack, count: int) -> Iterator[tuple[str, list[float]]]:
    """Yield the times of each page in seconds."""
    owners = [stack.keys.create(f"team {number}", {"infer", "admin"}).split("_")[1] for number in range(20)]
    client = stack.client()
    job = fill(client, owners, count)
    # The jobs let Valkey rewrite its log. Meanwhile every write waits for the disk, also that of the rate limiter.
    eventually(lambda: not client.info("persistence")["aof_rewrite_in_progress"], "the log is rewritten", 120)
    session = Sessions(client).begin(owners[0])
    headers = {"Accept": "text/html", "Cookie": f"{COOKIE}={session.token}"}
    with httpx2.Client(base_url=stack.url, headers=headers, timeout=60) as http:
        for name, path in PAGES.items():
            address = path.format(key=owners[0], job=job)
            http.get(address).raise_for_status()
            yield name, [http.get(address).raise_for_status().elapsed.total_seconds() for _ in range(RUNS)]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.console_pages", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000, help="finished jobs (default: %(default)s)")
    count = parser.parse_args().jobs
    with running_web() as stack:
        print(f"{count:,} finished jobs\n\n| page | median ms | slowest ms |\n| --- | --- | --- |")
        for name, times in timings(stack, count):
            print(f"| {name} | {1000 * median(times):.0f} | {1000 * max(times):.0f} |", flush=True)


if __name__ == "__main__":
    main()
