"""Runs a stack for an hour under mixed load and faults, and checks that nothing grows: `scripts/soak --minutes 60`.

Two workers, two API processes, a background process and their own Valkey serve sessions of many kinds at 80 % of the
capacity that was measured before. Meanwhile processes are killed and connections are cut. Every 10 s, memory,
descriptors and threads of every process are sampled, and the keys in Redis.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.models.folder import ModelError, check_folder
from shared.settings import ROOT
from tests.bench import machine
from tests.chaos.checks import Outcomes
from tests.chaos.clients import JobClient
from tests.chaos.command import run_in_workspace
from tests.chaos.faults import FaultInjector
from tests.chaos.leaks import settled, unfinished_work
from tests.chaos.recovery import Recovery
from tests.chaos.stack import ChaosStack, build
from tests.chaos.workload import prepare_requests
from tests.soak import plan, verdicts
from tests.soak.chart import svg
from tests.soak.clients import Sessions
from tests.soak.load import Load, capacity
from tests.soak.report import Report
from tests.soak.sampler import Sampler, process_samples
from tests.support.receivers import Receiver

log = logging.getLogger(__name__)

_SLOTS = 16
_REQUESTS = 40
_SHARE = 0.8
_INTERVAL_S = 10.0
_MAX_RETENTION_S = 180
_IDLE_WITHIN_S = 30.0
_PREFIX_BYTES = 32 * 2**20
"""The prefix cache fills during the warm-up, so that its growth ends."""


def build_stack(home: Path, options: argparse.Namespace) -> ChaosStack:
    """Prepare a stack whose records and caches reach their final size within a few minutes."""
    retention_s = str(int(min(_MAX_RETENTION_S, max(40, options.minutes * 20))))
    variables = {
        "RETENTION_S": retention_s,
        "RESPONSES_RETENTION_S": retention_s,
        "PREFIX_CACHE_BYTES": str(_PREFIX_BYTES),
        "PREFIX_DISK_BYTES": str(4 * _PREFIX_BYTES),
        "WEBHOOK_NETWORKS": "127.0.0.1/32",
        "WEBHOOK_BACKOFF_S": "1",
        "MAX_QUEUE": "100000",
    }
    return build(home, options.model.resolve(), _SLOTS, options.network, "auto", **variables)


def run(stack: ChaosStack, options: argparse.Namespace) -> Report:
    """Measure the capacity, apply the load and the faults, wait until the stack has recovered, and check it."""
    stack.start()
    outcomes, recovery = Outcomes(), Recovery(stack)
    injector = FaultInjector(stack, recovery, api_parent=False)
    with Receiver(_flaky) as receiver, Sampler(stack, options.interval) as sampler:
        samples = sampler.samples
        with stack.new_client() as client:
            requests = prepare_requests(client, options.seed, _REQUESTS)
            jobs = JobClient(client, requests, outcomes, threading.Event())
            first = Sessions(client, jobs, outcomes, receiver, stack.settings.model_id)
            full = capacity(first, samples, options)
        log.info("capacity: %.2f sessions per second with %.2f cores", full.per_s, full.cores)
        before, began_s = _idle(stack, sampler), samples.now()
        with stack.new_client() as client:
            jobs = JobClient(client, requests, outcomes, threading.Event())
            load = Load(first.continued(client, jobs), _SHARE * full.per_s, options.seed)
            _apply(load, injector, options)
        stack.wait_ready()
        recovery.wait()
        leaks = settled(lambda: list(unfinished_work(stack)), _IDLE_WITHIN_S)
        leaks += verdicts.left_open(before, _idle(stack, sampler))
        sampler.take()
        jobs_count = verdicts.count_jobs(stack, samples)
        leaks += settled(lambda: verdicts.unexpired(stack), 2 * stack.settings.retention_s + _IDLE_WITHIN_S)
    leaks += stack.stop()
    found = verdicts.judge(samples, began_s, options.minutes)
    return Report(options, full, load, began_s, injector.injected, outcomes, samples, found, jobs_count, leaks)


def _apply(load: Load, injector: FaultInjector, options: argparse.Namespace) -> None:
    """Apply the load for the time of the run, and the faults meanwhile."""
    over = threading.Event()
    timer = threading.Timer(options.minutes * 60, over.set)
    timer.daemon = True
    loading = threading.Thread(target=load.run, args=(over,), name="load", daemon=True)
    timer.start()
    loading.start()
    try:
        injector.run(plan.schedule(options.seed, options.minutes))
    except BaseException:
        over.set()
        raise
    loading.join()


def _idle(stack: ChaosStack, sampler: Sampler) -> verdicts.Levels:
    """Wait until no job is left and idle connections are closed; return the levels of all processes."""
    settled(lambda: list(unfinished_work(stack)), _IDLE_WITHIN_S)
    settled(lambda: _open_connections(stack), _IDLE_WITHIN_S)
    return verdicts.idle_levels(lambda: process_samples(stack, sampler.samples.now()))


def _open_connections(stack: ChaosStack) -> list[str]:
    """Return a line for each connection to the API."""
    return [
        str(connection.raddr)
        for process in stack.api_processes()
        for connection in process.net_connections("tcp")
        if connection.status == "ESTABLISHED" and connection.laddr.port == stack.settings.port
    ]


def _flaky(number: int, name: str) -> int:
    """Reject the first attempt of every fifth delivery."""
    return 500 if number == 1 and sum(map(ord, name)) % 5 == 0 else 200


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Exit status: 0 if nothing grew and every job ended once, 1 otherwise, 130 if the run was interrupted. "
        f"Growth is judged from {verdicts.WARM_UP_S / 60:.0f} minutes after the start of a process, if it lives for "
        f"{verdicts.MIN_SPAN_S / 60:.0f} more minutes.",
    )
    add = parser.add_argument
    add("--seed", type=int, default=1, help="seed of the sessions and the faults (default %(default)s)")
    add("--minutes", type=float, default=60, help="duration of the load (default %(default)s); the run takes longer")
    add("--capacity-s", type=float, default=60, help="seconds for which the capacity is measured (default %(default)s)")
    add("--interval", type=float, default=_INTERVAL_S, help="seconds between samples (default %(default)s)")
    add("--model", type=Path, default=ROOT / "models/tiny-random-llama", help="MLX model folder")
    add("--network", choices=("auto", "namespace", "proxy"), default="auto", help="how workers are cut off")
    add("--json", type=Path, help="write all samples and results to this file")
    add("--svg", type=Path, help="draw memory, descriptors and threads into this file")
    add("--keep", action="store_true", help="keep the folder with the logs, as after a failure")
    options = parser.parse_args(argv)
    try:
        check_folder(options.model)
    except ModelError as error:
        parser.error(str(error))
    return options


def _save(report: Report, options: argparse.Namespace) -> None:
    about: dict[str, Any] = machine.about()
    if options.json:
        options.json.write_text(json.dumps({**about, **report.as_json()}, indent=1) + "\n", "utf-8")
    if options.svg:
        options.svg.write_text(svg(report.samples, f"{about['machine']['cpu']}, {about['date'][:10]}"), "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print the report; return the exit status."""
    options = arguments(sys.argv[1:] if argv is None else argv)
    return run_in_workspace(
        lambda home: build_stack(home, options),
        lambda stack: run(stack, options),
        lambda report: _save(report, options),
        keep=options.keep,
    )


if __name__ == "__main__":
    # SIGTERM acts like Ctrl-C, so that everything is cleaned up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
