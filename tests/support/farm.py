"""A simulation of worker processes and of jobs that crash them, on the real queue scripts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from shared.jobs.record import Ending, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs
from shared.jobs.submission import Submission
from shared.queue.claims import Append, ClaimedJob, Claims, Demand
from shared.queue.recovery import CrashOutcome, report_crash
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings

MODEL: Final = "m"
MAX_DEATHS: Final = 3
RESTART: Final = 20
"""Turns that a process needs to restart. A turn is a step of the engine: one token per row."""

Kills = Callable[["Row"], bool]
"""Whether a row crashes its process now."""


def on_prefill(row: Row) -> bool:
    """Crash before the admission is written."""
    return row.generated == 0


def after_tokens(count: int) -> Kills:
    """Crash after this many tokens of each attempt."""
    return lambda row: row.generated == count


def at_position(position: int) -> Kills:
    """Crash at one position of the answer."""
    return lambda row: row.member.tokens == position


@dataclass(eq=False)
class Member:
    """A job of the farm.

    Attributes:
        need: number of tokens that it generates.
        tokens: number of tokens generated so far.
        held_back: turns in which it was queued although a process had a free row.
        pause, paused: turns since its last token, and their maximum.
    """

    id: str
    need: int
    kills: Kills | None = None
    tokens: int = 0
    held_back: int = 0
    pause: int = 0
    paused: int = 0


@dataclass(eq=False)
class Row:
    """A job in a process's batch."""

    member: Member
    claimed: ClaimedJob
    seq: int
    generated: int = 0
    started: bool = False

    @property
    def kills(self) -> bool:
        return self.member.kills is not None and self.member.kills(self)

    def event(self) -> Append:
        """Return the output of this turn: the admission or a token."""
        job = self.claimed.job
        self.seq += 1
        if not self.started:
            self.started = True
            return Append(job.id, job.attempt, job.claimed_at, self.seq, start=True)
        self.generated += 1
        self.member.tokens += 1
        self.member.pause = 0
        done = self.member.tokens >= self.member.need
        ending = Ending(Status.SUCCEEDED) if done else None
        return Append(job.id, job.attempt, job.claimed_at, self.seq, "x", (1,), ending=ending)


@dataclass(eq=False)
class Process:
    """A worker process."""

    name: str
    claims: Claims
    worker: str
    rows: list[Row] = field(default_factory=list)
    starts: int = 0
    up_at: int = 0


class Farm:
    """Simulated processes and jobs.

    Attributes:
        deaths: number of crashes that jobs caused.
        killed: number of processes that `kill` ended.
        slots: maximum rows per process.
    """

    def __init__(self, client: Redis, processes: int, slots: int, seed: int = 0) -> None:
        self.deaths = self.killed = self.turns = 0
        self.members: dict[str, Member] = {}
        self._client = client
        self._ended: set[str] = set()
        self.slots = slots
        self._rng = random.Random(seed)
        self._jobs = Jobs(client, Settings(durable=False))
        self.processes = [Process(f"w{i}", *self._start(f"w{i}-0")) for i in range(processes)]

    def submit(self, need: int, kills: Kills | None = None) -> Member:
        """Add a job that generates `need` tokens."""
        accepted = self._jobs.create(Submission(Request(MODEL, need, Sampling(0.0), prompt="hi"), "me"))
        member = Member(accepted.job.id, need, kills)
        self.members[member.id] = member
        return member

    def status(self, member: Member) -> Status:
        return self._jobs.get(member.id, "me").status

    def run(self, turns: int) -> None:
        """Run for a number of turns, or until every job has ended."""
        until = self.turns + turns
        while self.turns < until and self.unfinished:
            self.turn()

    @property
    def unfinished(self) -> bool:
        """Whether some job has not ended."""
        return len(self._ended) < len(self.members)

    def turn(self) -> None:
        """Run one step of every process."""
        self.turns += 1
        for member in self.members.values():
            member.pause += member.tokens > 0 and member.id not in self._ended
            member.paused = max(member.paused, member.pause)
        for process in self._rng.sample(self.processes, len(self.processes)):
            if process.up_at <= self.turns:
                self._step(process)

    def kill(self, process: Process) -> CrashOutcome | None:
        """Kill a process; no job causes this."""
        if process.up_at > self.turns:
            return None
        self.killed += 1
        return self._crash(process)

    def _step(self, process: Process) -> None:
        free_rows = self.slots - len(process.rows)
        for claimed in process.claims.claim(MODEL, Demand(rows=free_rows, tokens=10**9)).jobs:
            process.rows.append(Row(self.members[claimed.job.id], claimed, claimed.job.last_event))
        if len(process.rows) < self.slots:
            self._note_held_back()
        if any(row.kills for row in process.rows):
            self.deaths += 1
            self._crash(process)
            return
        rows = [row.event() for row in process.rows]
        process.claims.append(rows)
        process.rows = [row for row, event in zip(process.rows, rows, strict=True) if event.ending is None]
        for event in rows:
            if event.ending is not None:
                self._ended.add(event.job_id)

    def _note_held_back(self) -> None:
        """Count the queued jobs that a process with a free row did not claim."""
        running = {row.member.id for process in self.processes for row in process.rows}
        for job_id in self._client.zrange(keys.QUEUE + MODEL, 0, -1):
            if job_id not in running:
                self.members[job_id].held_back += 1

    def _crash(self, process: Process) -> CrashOutcome:
        in_flight = [row.member.id for row in process.rows]
        outcome = report_crash(self._client, [process.worker], in_flight, MAX_DEATHS, "signal 9 (SIGKILL)")
        self._ended.update(outcome.failed)
        process.rows = []
        process.starts += 1
        process.up_at = self.turns + RESTART
        process.claims, process.worker = self._start(f"{process.name}-{process.starts}")
        return outcome

    def _start(self, worker: str) -> tuple[Claims, str]:
        claims = Claims(self._client, worker)
        claims.renew(3600)
        return claims, worker
