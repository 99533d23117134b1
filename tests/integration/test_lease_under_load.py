"""The lease is renewed on time whatever the engine and the claimer do: a real model, a long prompt, a huge one."""

from __future__ import annotations

import threading

import pytest

from shared.jobs.record import Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.queue import keys
from shared.queue.redis import Redis
from shared.queue.wakeups import Notifier, make_app
from tests.plugins.stack import Stack
from tests.support.waiting import eventually


class LeaseWatch(threading.Thread):
    """Sees the only lease there is, again and again."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(daemon=True)
        self._redis = redis
        self._over = threading.Event()
        self.seen = 0
        self.least_s = float("inf")

    def run(self) -> None:
        while not self._over.wait(0.01):
            with self._redis.pipeline() as pipe:
                ((_, lapses_at),), (seconds, micros) = pipe.zrange(keys.LEASES, 0, -1, withscores=True).time().execute()
            self.least_s = min(self.least_s, lapses_at - seconds - micros / 1e6)
            self.seen += 1

    def stop(self) -> None:
        self._over.set()
        self.join()


def submit(stack: Stack, prompt: str, tokens: int) -> str:
    """Past the API, which would refuse what is too long."""
    asked = Request(stack.model, tokens, Sampling(0.0), prompt=prompt)
    accepted = Jobs(stack.redis, stack.settings).create(Submission(asked, owner="me"))
    Notifier(make_app(stack.settings)).wake([stack.model])
    return accepted.job.id


def status(stack: Stack, job_id: str) -> Status:
    return Status(stack.redis.hget(keys.JOB + job_id, "status"))


@pytest.mark.long
def test_no_work_of_the_worker_keeps_its_lease_from_being_renewed(tiny_stack: Stack) -> None:
    # Chunks of 2,048 tokens: one step takes as long as it can.
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
    assert {status(tiny_stack, job) for job in huge} == {Status.FAILED}, "they do not fit the model"
    assert watch.seen > 20
    print("least left of the lease:", round(watch.least_s, 2))
    assert watch.least_s > 0, "it never lapsed"
    assert "lease_lapsed" not in tiny_stack.log("worker-0")
    assert worker.poll() is None
