"""The clients of a run: threads that submit jobs and follow each of them to its end despite the faults."""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import closing
from itertools import islice

from scripts.client.api import Client, ClientError, Refused, RemoteJob
from scripts.client.retries import RetriesExhausted, RetryPolicy
from shared.jobs.log import Event, EventKind
from tests.chaos.checks import Finding, Outcomes, Violation, check_delay, check_job
from tests.chaos.workload import Behaviour, Request, draw

log = logging.getLogger(__name__)

POLL_S = 5
MAX_OUTAGE_S = 120.0
"""Maximum outage that a client tolerates; faults are shorter."""
MAX_JOB_S = 600.0
"""Maximum duration of a job; after that it counts as lost."""


class _JobNotEnded(Exception):
    """A job did not end in time."""


class Clients:
    """Threads that each run one job at a time, until `finish`."""

    def __init__(self, client: Client, requests: Sequence[Request], outcomes: Outcomes, seed: int, count: int) -> None:
        self._finishing = threading.Event()
        self._jobs = JobClient(client, requests, outcomes, self._finishing)
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}/{i}"),), name=f"client-{i}", daemon=True)
            for i in range(count)
        ]

    def start(self) -> None:
        """Start all clients."""
        for thread in self._threads:
            thread.start()

    def stop_submitting(self) -> None:
        """Submit no more jobs, and do not wait for those that are running: the run is aborted."""
        self._finishing.set()

    def finish(self) -> None:
        """Submit no more jobs, and wait until all submitted ones have ended or are lost."""
        self._finishing.set()
        for thread in self._threads:
            thread.join()

    def _run(self, rng: random.Random) -> None:
        while not self._finishing.is_set():
            self._jobs.run_one(rng)
            self._finishing.wait(rng.uniform(0, 0.3))


class JobClient:
    """Runs single jobs and checks their results. Threads may share it."""

    def __init__(
        self, client: Client, requests: Sequence[Request], outcomes: Outcomes, finishing: threading.Event
    ) -> None:
        """Create a client.

        Args:
            finishing: ends the pauses in which a client is disconnected; the jobs are still followed to their end.
        """
        self._client = client
        self._requests = requests
        self._outcomes = outcomes
        self._finishing = finishing
        # The event is never set: every submitted job is followed to its end.
        self._retries = RetryPolicy(MAX_OUTAGE_S, threading.Event())

    def run_one(self, rng: random.Random) -> None:
        """Run a random job with a random behaviour, and record the result."""
        request, behaviour = draw(rng, self._requests)
        key = uuid.UUID(int=rng.getrandbits(128)).hex
        try:
            self._run_job(rng, request, behaviour, key)
        except (_JobNotEnded, RetriesExhausted, ClientError) as error:
            job_id = self._outcomes.accepted.get(key, f"(never accepted) {key}")
            self._outcomes.add_finding(Finding(Violation.LOST, job_id, f"{behaviour}: {type(error).__name__}: {error}"))
        except Exception as error:
            log.exception("a client failed")
            self._outcomes.add_finding(Finding(Violation.WRONG, self._outcomes.accepted.get(key, key), repr(error)))

    def _run_job(self, rng: random.Random, request: Request, behaviour: Behaviour, key: str) -> None:
        body = request.body
        if behaviour is Behaviour.SHORT_DEADLINE:
            body = {**body, "deadline_s": round(rng.uniform(0.2, 3), 2)}
        job = self._submit(body, key)
        self._outcomes.add_accepted(key, job.id, behaviour)
        streamed = self._follow(rng, job, behaviour)
        cancelled_at = self._cancel(job) if behaviour is Behaviour.CANCELS else None
        job = self._wait_for_end(job)
        if rng.random() < 0.2:  # as after a lost response: the same request must return the same job
            again = self._submit(body, key)
            if again.id != job.id:
                self._outcomes.add_finding(Finding(Violation.DUPLICATED, job.id, f"its key also gave {again.id}"))
        logged = self._read(job.id, after=0)
        delays = self._check_delay(job, cancelled_at, body.get("deadline_s"))
        self._outcomes.add_ended(job, logged, [*check_job(job, logged, streamed, behaviour, request.expected), *delays])

    def _submit(self, body: dict[str, object], key: str) -> RemoteJob:
        return self._retries.call(lambda: self._client.submit(body, idempotency_key=key))

    def _follow(self, rng: random.Random, job: RemoteJob, behaviour: Behaviour) -> list[Event]:
        """Do what the behaviour says; return the events that were received."""
        match behaviour:
            case Behaviour.STREAMS:
                return self._read(job.id, after=0)
            case Behaviour.RECONNECTS:
                events = self._read(job.id, after=0, limit=rng.randint(1, 40))
                if events[-1].kind is not EventKind.DONE:
                    self._finishing.wait(rng.uniform(0, 3))
                    events += self._read(job.id, after=events[-1].n)
                return events
            case Behaviour.CANCELS:
                return self._read(job.id, after=0, limit=rng.randint(1, 30))
        return []

    def _read(self, job_id: str, after: int, limit: int | None = None) -> list[Event]:
        """Read events after a cursor, to the end or up to `limit`."""
        events: list[Event] = []
        deadline = time.monotonic() + MAX_JOB_S
        while not (events and events[-1].kind is EventKind.DONE) and len(events) != limit:
            if time.monotonic() > deadline:
                raise _JobNotEnded(f"its stream stopped at event {events[-1].n if events else after}")
            try:
                with closing(self._client.events(job_id, after=events[-1].n if events else after)) as stream:
                    events += islice(stream, None if limit is None else limit - len(events))
            except Refused as error:
                if error.status < 500:
                    raise
            except ClientError as error:
                log.debug("a stream of %s broke: %s", job_id, error)
        return events

    def _cancel(self, job: RemoteJob) -> float | None:
        """Cancel a job; return the time of the response, or None if the job had already ended."""
        try:
            self._retries.call(lambda: self._client.cancel(job.id))
        except Refused as error:
            if error.code != "job_ended":
                raise
            return None
        return time.time()

    def _check_delay(self, job: RemoteJob, cancelled_at: float | None, deadline_s: float | None) -> list[Finding]:
        """Check that a job ended soon after its cancellation or its deadline."""
        if cancelled_at is None and deadline_s is None:
            return []
        record = self._retries.call(lambda: self._client.request("GET", f"/v1/jobs/{job.id}")).json()
        if deadline_s is not None:
            return check_delay(job.id, record["finished_at"], record["created_at"] + deadline_s, "its deadline")
        return check_delay(job.id, record["finished_at"], cancelled_at or 0.0, "its cancellation")

    def _wait_for_end(self, job: RemoteJob) -> RemoteJob:
        deadline = time.monotonic() + MAX_JOB_S
        job_id = job.id
        while not job.status.terminal:
            if time.monotonic() > deadline:
                raise _JobNotEnded(f"it is still {job.status}")
            job = self._retries.call(lambda: self._client.job(job_id, wait_s=POLL_S))
        return job
