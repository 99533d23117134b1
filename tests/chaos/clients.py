"""The clients of a run: threads that submit jobs and follow each to its end, whatever breaks meanwhile."""

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
from scripts.client.retries import GaveUp, Patience
from shared.jobs.log import Event, EventKind
from tests.chaos.checks import Fault, Finding, Ledger, judge, overdue
from tests.chaos.workload import Request, Style, draw

log = logging.getLogger(__name__)

POLL_S = 5
AWAY_S = 120.0
"""Longest absence of the service that a client bears; the faults are shorter."""
LONGEST_JOB_S = 600.0
"""A job that has not ended by then is lost."""


class _NoEnd(Exception):
    """A job does not end."""


class Clients:
    """Threads that each have one job under way, until `leave`."""

    def __init__(self, client: Client, requests: Sequence[Request], ledger: Ledger, seed: int, count: int) -> None:
        self._client = client
        self._requests = requests
        self._ledger = ledger
        self._leaving = threading.Event()
        # Never set: who has a job under way follows it to its end.
        self._patience = Patience(AWAY_S, threading.Event())
        self._threads = [
            threading.Thread(
                target=self._come_and_go, args=(random.Random(f"{seed}/{i}"),), name=f"customer-{i}", daemon=True
            )
            for i in range(count)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def abandon(self) -> None:
        """Submit nothing more, and let what is under way be: the run is over before its time."""
        self._leaving.set()

    def leave(self) -> None:
        """Submit nothing more, and wait until every job under way has ended or is given up."""
        self._leaving.set()
        for thread in self._threads:
            thread.join()

    def _come_and_go(self, rng: random.Random) -> None:
        while not self._leaving.is_set():
            request, style = draw(rng, self._requests)
            key = uuid.UUID(int=rng.getrandbits(128)).hex
            try:
                self._one(rng, request, style, key)
            except (_NoEnd, GaveUp, ClientError) as error:
                job_id = self._ledger.accepted.get(key, f"(never accepted) {key}")
                self._ledger.find(Finding(Fault.LOST, job_id, f"{style}: {type(error).__name__}: {error}"))
            except Exception as error:
                log.exception("a client failed")
                self._ledger.find(Finding(Fault.WRONG, self._ledger.accepted.get(key, key), repr(error)))
            self._leaving.wait(rng.uniform(0, 0.3))

    def _one(self, rng: random.Random, request: Request, style: Style, key: str) -> None:
        body = request.body
        if style is Style.EXPIRED:
            body = {**body, "deadline_s": round(rng.uniform(0.2, 3), 2)}
        job = self._submit(body, key)
        self._ledger.accept(key, job.id, style)
        read = self._follow(rng, job, style)
        asked_at = self._cancel(job) if style is Style.CANCELLED else None
        job = self._end_of(job)
        if rng.random() < 0.2:  # the answer may have been lost: the same request, the same job
            again = self._submit(body, key)
            if again.id != job.id:
                self._ledger.find(Finding(Fault.DUPLICATED, job.id, f"its key also gave {again.id}"))
        told = self._read(job.id, after=0)
        late = self._late(job, asked_at, body.get("deadline_s"))
        self._ledger.end(job, told, [*judge(job, told, read, style, request.expected), *late])

    def _submit(self, body: dict[str, object], key: str) -> RemoteJob:
        return self._patience.call(lambda: self._client.submit(body, idempotency_key=key))

    def _follow(self, rng: random.Random, job: RemoteJob, style: Style) -> list[Event]:
        """Do with a job what its style says; the events that were seen on the way."""
        match style:
            case Style.STREAMED:
                return self._read(job.id, after=0)
            case Style.LEFT:
                read = self._read(job.id, after=0, most=rng.randint(1, 40))
                if read[-1].kind is not EventKind.DONE:
                    self._leaving.wait(rng.uniform(0, 3))
                    read += self._read(job.id, after=read[-1].n)
                return read
            case Style.CANCELLED:
                return self._read(job.id, after=0, most=rng.randint(1, 30))
        return []

    def _read(self, job_id: str, after: int, most: int | None = None) -> list[Event]:
        """Events from a cursor on: to the end, or as many as wanted."""
        events: list[Event] = []
        give_up_at = time.monotonic() + LONGEST_JOB_S
        while not (events and events[-1].kind is EventKind.DONE) and len(events) != most:
            if time.monotonic() > give_up_at:
                raise _NoEnd(f"its stream stands at {events[-1].n if events else after}")
            try:
                with closing(self._client.events(job_id, after=events[-1].n if events else after)) as coming:
                    events += islice(coming, None if most is None else most - len(events))
            except Refused as error:
                if error.status < 500:
                    raise
            except ClientError as error:
                log.debug("a stream of %s broke: %s", job_id, error)
        return events

    def _cancel(self, job: RemoteJob) -> float | None:
        """Take it back; when that was answered, None when the job had ended before."""
        try:
            self._patience.call(lambda: self._client.cancel(job.id))
        except Refused as error:
            if error.code != "job_ended":
                raise
            return None
        return time.time()

    def _late(self, job: RemoteJob, asked_at: float | None, deadline_s: float | None) -> list[Finding]:
        """Whether a job that was cancelled, or had a deadline, went on for too long."""
        if asked_at is None and deadline_s is None:
            return []
        record = self._patience.call(lambda: self._client.request("GET", f"/v1/jobs/{job.id}")).json()
        if deadline_s is not None:
            return overdue(job.id, record["finished_at"], record["created_at"] + deadline_s, "its deadline")
        return overdue(job.id, record["finished_at"], asked_at or 0.0, "its cancellation")

    def _end_of(self, job: RemoteJob) -> RemoteJob:
        give_up_at = time.monotonic() + LONGEST_JOB_S
        job_id = job.id
        while not job.status.terminal:
            if time.monotonic() > give_up_at:
                raise _NoEnd(f"it is still {job.status}")
            job = self._patience.call(lambda: self._client.job(job_id, wait_s=POLL_S))
        return job
