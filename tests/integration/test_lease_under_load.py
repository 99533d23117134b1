"""The lease is renewed in time while a real model runs long prompts and receives huge ones."""

from __future__ import annotations

import threading

import pytest

from shared.jobs.record import Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs
from shared.jobs.submission import Submission
from shared.queue.wakeups import Notifier, make_app
from shared.redis import keys
from shared.redis.client import Redis
from tests.plugins.stack import Stack
from tests.support.waiting import eventually


class LeaseWatch(threading.Thread):
    """Reads the only lease continuously.

    Attributes:
        readings: number of readings.
        min_left_s: shortest time that the lease had left.
    """

    def __init__(self, redis: Redis) -> None:
        super().__init__(daemon=True)
        self._redis = redis
        self._stopped = threading.Event()
        self.readings = 0
        self.min_left_s = float("inf")

    def run(self) -> None:
        while not self._stopped.wait(0.01):
            with self._redis.pipeline() as pipe:
                ((_, lapses_at),), (seconds, micros) = pipe.zrange(keys.LEASES, 0, -1, withscores=True).time().execute()
            self.min_left_s = min(self.min_left_s, lapses_at - seconds - micros / 1e6)
            self.readings += 1

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def submit(stack: Stack, prompt: str, tokens: int) -> str:
    """Submit a job without the API, which would reject a prompt that is too long."""
    request = Request(stack.model, tokens, Sampling(0.0), prompt=prompt)
    accepted = Jobs(stack.redis, stack.settings).create(Submission(request, owner="me"))
    Notifier(make_app(stack.settings)).wake([stack.model])
    return accepted.job.id


def status(stack: Stack, job_id: str) -> Status:
    return Status(stack.redis.hget(keys.JOB + job_id, "status"))


@pytest.mark.long
def test_the_lease_never_lapses_under_load(tiny_stack: Stack) -> None:
    # With chunks of 2,048 tokens, steps take as long as possible.
    worker = tiny_stack.start_worker(LEASE_S="2", PREFILL_STEP_TOKENS="2048", SLOTS="32")
    watch = LeaseWatch(tiny_stack.redis)
    watch.start()
    words = "The quick brown fox jumps over the lazy dog. "
    jobs = [submit(tiny_stack, f"Number {n}", 300) for n in range(28)]
    jobs += [submit(tiny_stack, words * 600, 20) for _ in range(2)]
    huge = [submit(tiny_stack, text, 1) for text in (words * 110_000, "x" * 5_000_000)]
    eventually(lambda: all(status(tiny_stack, job).terminal for job in jobs + huge), "all jobs end", 120)
    watch.stop()
    assert {status(tiny_stack, job) for job in jobs} == {Status.SUCCEEDED}
    assert {status(tiny_stack, job) for job in huge} == {Status.FAILED}, "they exceed the context"
    assert watch.readings > 20
    print("shortest time left of the lease, in s:", round(watch.min_left_s, 2))
    assert watch.min_left_s > 0, "the lease lapsed"
    assert "lease_lapsed" not in tiny_stack.log("worker-0")
    assert worker.poll() is None
